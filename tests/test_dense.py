"""The FFN and its dropout: F.dropout's random numbers, less kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dab_fast import measure
from dab_fast.parts import dense
from dab_fast.reference import ACTIVATIONS, Parameters
from tests.support.models import assert_same_gradients

N, D, INNER = 7, 8, 32
RATES = (0.0, 0.3, 1.0)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("rows", [5, 0])
def test_dropout_is_that_of_pytorch(p: float, rows: int):
    results = []
    for dropout in (dense.dropout, F.dropout):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 30).view(5, 6)[:rows].clone().requires_grad_()
        y = dropout(x, p)
        y.sum().backward()
        results.append((y, x.grad, torch.rand(1)))  # the last: as many random numbers were drawn
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _parameters(activation: str) -> Parameters:
    shapes = {
        "linear1.weight": (INNER, D),
        "linear1.bias": (INNER,),
        "linear2.weight": (D, INNER),
        "linear2.bias": (D,),
    }
    if activation == "prelu":
        shapes["activation.weight"] = (1,)
    return {f"layer.{name}": torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def _composition(params: Parameters, x: Tensor, activation: str, p: float) -> Tensor:
    inner = F.linear(x, params["layer.linear1.weight"], params["layer.linear1.bias"])
    slope = (params["layer.activation.weight"],) if activation == "prelu" else ()
    inner = F.prelu(inner, *slope) if slope else ACTIVATIONS[activation](inner)
    return F.linear(F.dropout(inner, p), params["layer.linear2.weight"], params["layer.linear2.bias"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu"])
def test_ffn(activation: str, p: float):
    params, given = _parameters(activation), torch.randn(N, D)
    results = []
    for fast in (True, False):
        torch.manual_seed(2)
        x = given.clone().requires_grad_()
        y = dense.ffn(params, "layer", x, activation, p) if fast else _composition(params, x, activation, p)
        assert y.grad_fn is not None and ("FFN" in y.grad_fn.name()) == (fast and p < 1)
        leaves = {"x": x, **params}
        d_y = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append((y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), d_y), strict=True))))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert_same_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_ffn_keeps_its_input_and_the_mask(p: float):
    params, x = _parameters("prelu"), torch.randn(N, D, requires_grad=True)
    kept = measure.saved_bytes(lambda: dense.ffn(params, "layer", x, "prelu", p), [x, *params.values()])
    assert kept == (N * INNER if p > 0 else 0)  # besides the input
