"""The accuracy rule of every op: at most twice PyTorch's own error in the same dtype, against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What is left where PyTorch's own error happens to vanish, in units of the largest result: a sum of some hundred
# float32 terms in another order; in half precision one rounding of the stored result.
FLOOR = {torch.float32: 16 * 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor | None],
    cotangents: list[Tensor],  # one per result
    dtype: torch.dtype | None = None,  # of the inputs; None leaves them as they are
) -> dict[str, Tensor]:
    """The results "out0", "out1" ... and the gradients "d_<input>" of function(*inputs)."""
    leaves = {}
    for name, x in inputs.items():
        leaf = None if x is None else x.detach().to(dtype or x.dtype)
        # A view of a leaf: strides survive, where a detached clone of a permuted tensor would lose them.
        leaves[name] = leaf if leaf is None else leaf.requires_grad_()
    results = function(*leaves.values())
    results = results if isinstance(results, tuple) else (results,)
    given = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(
        results,
        list(given.values()),
        [c.to(out.dtype) for c, out in zip(cotangents, results, strict=True)],
    )
    named = {f"out{i}": out.detach() for i, out in enumerate(results)}
    return named | {f"d_{name}": g for name, g in zip(given, gradients, strict=True)}


def assert_accurate(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],  # in float64
    own: dict[str, Tensor],  # PyTorch's, in the dtypes of `actual`
) -> None:
    assert actual.keys() == exact.keys() == own.keys()
    for name, want in exact.items():
        got, theirs = actual[name], own[name]
        assert got.shape == want.shape and got.dtype == theirs.dtype, name
        if not want.numel():
            continue
        error, allowed = (got.double() - want).abs().max(), 2 * (theirs.double() - want).abs().max()
        allowed = allowed + FLOOR[got.dtype] * want.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
