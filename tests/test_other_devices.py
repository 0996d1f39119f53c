"""Devices that are neither a CPU nor a CUDA GPU run every op and the decoder in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dab_fast import ops, reference
from dab_fast.accuracy import HIDDEN_TOLERANCE
from dab_fast.decoder.forward import decode
from tests.support.models import assert_same_gradients
from tests.test_decoder import arguments, decoder, masks

DEVICES = ("mps", "xpu")


class Elsewhere(Tensor):
    """A CPU tensor that says it is on another device. What that device's kernels make of an op is not shown."""

    where = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        return self.where


class _MakesTensorsElsewhere(TorchFunctionMode):
    """`torch.arange(..., device=x.device)` and the like."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == Elsewhere.where:
            return func(*args, **kwargs | {"device": "cpu"}).as_subclass(Elsewhere)
        return func(*args, **kwargs)


@contextlib.contextmanager
def elsewhere(name: str) -> Iterator[None]:
    Elsewhere.where = torch.device(name, 0)
    try:
        with _MakesTensorsElsewhere():
            yield
    finally:
        Elsewhere.where = torch.device("cpu")


def call_decode(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    model = decoder()
    params = {name: given[name] for name, _ in model.named_parameters()}
    inputs = (given[str(i)] for i in range(4))
    out, _ = decode(params, model.config, *inputs, memory_key_padding_mask=given["mask"])
    return tuple(out)


def decode_arguments() -> dict[str, Tensor]:
    model = decoder()
    inputs = {str(i): x for i, x in enumerate(arguments(model.config))}
    mask = masks("padding", model.config)["memory_key_padding_mask"]
    return {**dict(model.named_parameters()), **inputs, "mask": mask}


def call_attention(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    tensors = (given[name] for name in ("q", "q_pos", "k", "k_pos", "v"))
    masks = {"key_padding_mask": given["mask"], "attn_mask": given["attn_mask"]}
    return (ops.modulated_cross_attention(*tensors, **masks),)


def attention_arguments() -> dict[str, Tensor]:
    shapes = {"q": (2, 5, 3, 8), "q_pos": (2, 5, 3, 8), "k": (2, 7, 3, 8), "k_pos": (1, 7, 3, 8), "v": (2, 7, 3, 8)}
    mask, attn_mask = torch.rand(2, 7) < 0.3, torch.rand(6, 5, 7) < 0.3
    attn_mask[:, 1] = True  # a query that sees nothing
    return {**{name: torch.randn(shape) for name, shape in shapes.items()}, "mask": mask, "attn_mask": attn_mask}


def call_embedding(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return ops.box_position_embed(given["boxes"], given["scale"], given["size"], num_feats=8)


def embedding_arguments() -> dict[str, Tensor]:
    return {"boxes": torch.rand(2, 5, 4) * 0.8 + 0.1, "scale": torch.randn(2, 5, 16), "size": torch.randn(2, 5, 2)}


def call_refine(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (ops.refine_boxes(*given.values(), eps=1e-3),)


def refine_arguments() -> dict[str, Tensor]:
    shapes = {"w1": (16, 16), "b1": (16,), "w2": (16, 16), "b2": (16,), "w3": (4, 16), "b3": (4,)}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return {"hidden": torch.randn(2, 5, 16), "boxes": torch.rand(2, 5, 4) * 0.8 + 0.1, **weights}


CALLS = {
    "decode": (call_decode, decode_arguments),
    "modulated_cross_attention": (call_attention, attention_arguments),
    "box_position_embed": (call_embedding, embedding_arguments),
    "refine_boxes": (call_refine, refine_arguments),
}
every_call = pytest.mark.parametrize("call, make", CALLS.values(), ids=CALLS)

Call = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def run(call: Call, given: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """What a call returns, and the gradients of what was given to it."""
    given = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in given.items()}
    outputs = call(given)
    sum(x.square().mean() for x in outputs).backward()
    return outputs, {name: x.grad for name, x in given.items() if x.requires_grad}


@pytest.mark.parametrize("device", DEVICES)
@every_call
def test_values_and_gradients(call, make, device):
    given = make()
    with ops.backend("torch"):
        theirs, their_gradients = run(call, given)
    with elsewhere(device):
        ours, our_gradients = run(call, {name: x.as_subclass(Elsewhere) for name, x in given.items()})
        assert all(x.device.type == device for x in ours)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.as_subclass(Tensor), y, rtol=0, atol=HIDDEN_TOLERANCE)
    assert_same_gradients(our_gradients, their_gradients)


@every_call
def test_meta(call, make):
    """On "meta" there are shapes alone, and autocast does not know the device."""
    given = make()
    theirs, their_gradients = run(call, given)
    ours, our_gradients = run(call, {name: x.to("meta") for name, x in given.items()})
    for x, y in zip(ours, theirs, strict=True):
        assert x.is_meta and (x.shape, x.dtype) == (y.shape, y.dtype)
    assert our_gradients.keys() == their_gradients.keys()
    assert all(x is None or x.is_meta for x in our_gradients.values())


@pytest.mark.parametrize("device", DEVICES)
def test_attention_keeps_no_scores(device):
    b, n, h, d = 2, 40, 3, 8
    kept: list[Tensor] = []
    with elsewhere(device), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        q, k, v = (torch.randn(b, n, h, d).as_subclass(Elsewhere).requires_grad_() for _ in range(3))
        ops.modulated_cross_attention(q, None, k, None, v)
    assert kept and max(x.numel() for x in kept) < b * h * n * n


@pytest.mark.parametrize("device", DEVICES)
def test_attention_in_half_precision_has_float32_logits(device):
    """Tiny boxes give queries that are as large as float16 goes."""
    given = {name: x.half() if x.is_floating_point() else x for name, x in attention_arguments().items()}
    given["q_pos"] = given["q_pos"].sign() * 60000
    with elsewhere(device):
        ours = call_attention({name: x.as_subclass(Elsewhere) for name, x in given.items()})[0].as_subclass(Tensor)
    exact = call_attention({name: x.double() if x.is_floating_point() else x for name, x in given.items()})[0]
    theirs = reference.modulated_cross_attention(
        *(given[name] for name in ("q", "q_pos", "k", "k_pos", "v")),
        key_padding_mask=given["mask"],
        attn_mask=given["attn_mask"],
    )
    assert ours.dtype == torch.float16 and ours.isfinite().all()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
