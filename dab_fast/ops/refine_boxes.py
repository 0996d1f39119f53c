"""The box MLP, the inverse sigmoid of the old box, sum, sigmoid: the refined box."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dab_fast._first_derivative import first_derivative_only
from dab_fast._tracing import constant
from dab_fast.backends.torch import refine_boxes as in_pytorch
from dab_fast.ops import _backends
from dab_fast.ops._checks import check_tensor
from dab_fast.ops._library import define


def refine_boxes(
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4] in [0, 1]
    w1: Tensor,  # [D, D]; or [L, D, D] where hidden is [L, ..., D], a box MLP per layer, and so for the others
    b1: Tensor,  # [D]
    w2: Tensor,  # [D, D]
    b2: Tensor,  # [D]
    w3: Tensor,  # [4, D]
    b3: Tensor,  # [4]
    *,
    eps: float,
    recompute: bool = False,
) -> Tensor:  # [..., 4], at least float32
    """sigmoid(W3 relu(W2 relu(W1 hidden + b1) + b2) + b3 + inverse_sigmoid(boxes)): the refined boxes.

    Args:
        hidden: Tensor[..., D], the layer's output.
        boxes: Tensor[..., 2 or 4] in [0, 1], the layer's anchors: cx, cy(, w, h). With 2, only x and y are added to.
        w1, b1, w2, b2, w3, b3: the three linear layers of the box MLP, shared or one of each per leading index.
        eps: of the inverse sigmoid, in (0, 0.5).
        recompute: run the box MLP again in the backward instead of keeping its 2 D activations per row.

    Returns:
        Tensor[..., 4] of refined boxes in (0, 1), float32 (float64 for float64 inputs) whatever the dtype of `hidden`.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
        BackendUnavailable: the backend chosen by name cannot run this.
    """
    check_tensor("hidden", hidden, (None,), leading=True)
    d = hidden.shape[-1]
    check_tensor("boxes", boxes, (*hidden.shape[:-1], None), like=hidden)
    if boxes.shape[-1] not in (2, 4):
        raise ValueError(f"boxes must have shape [..., 2] or [..., 4], got {list(boxes.shape)}")
    layered = isinstance(w1, Tensor) and w1.dim() == 3
    lead = hidden.shape[:1] if layered else ()
    check_tensor("w1", w1, (*lead, d, d), like=hidden)
    check_tensor("b1", b1, (*lead, d), like=hidden)
    check_tensor("w2", w2, (*lead, d, d), like=hidden)
    check_tensor("b2", b2, (*lead, d), like=hidden)
    check_tensor("w3", w3, (*lead, 4, d), like=hidden)
    check_tensor("b3", b3, (*lead, 4), like=hidden)
    if not 0.0 < eps < 0.5:
        raise ValueError(f"eps must be in (0, 0.5), got {eps}")
    eps = constant(eps)
    tensors = (hidden, boxes, w1, b1, w2, b2, w3, b3)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    backend = _backends.select("refine_boxes", hidden, tensors)
    if backend == "torch":
        return in_pytorch.run(tensors, eps=eps, layered=layered, recompute=recompute and grad)
    if grad:
        return _RefineBoxes.apply(*tensors, eps, recompute, backend)
    return _forward(*tensors, eps, False, backend)[0]


def _fake_forward(
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w1: Tensor,  # [D, D], or [L, D, D] where hidden is [L, ..., D]; the others likewise
    b1: Tensor,  # [D]
    w2: Tensor,  # [D, D]
    b2: Tensor,  # [D]
    w3: Tensor,  # [4, D]
    b3: Tensor,  # [4]
    eps: float,
    keep: bool,
    backend: str,
) -> list[Tensor]:  # [..., 4] and, with `keep`, what the two relus give, [..., D] each, all in float32
    shapes = [(*hidden.shape[:-1], 4)] + [hidden.shape] * (2 * keep)
    return [hidden.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _fake_backward(
    d_refined: Tensor,  # [..., 4]
    refined: Tensor,  # [..., 4]
    h1: Tensor,  # [..., D]
    h2: Tensor,  # [..., D]
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w1: Tensor,  # [D, D] or [L, D, D]
    w2: Tensor,  # [D, D] or [L, D, D]
    w3: Tensor,  # [4, D] or [L, 4, D]
    eps: float,
    needs: list[bool],  # of hidden, boxes, the weights
    backend: str,
) -> list[Tensor]:  # those needed of d_hidden; d_boxes; d_w1, d_w2, [(L,) 6 * D + 4] of w3, b1, b2, b3 in float32
    results = [x.new_empty(x.shape) for x, need in zip((hidden, boxes), needs[:2], strict=True) if need]
    if needs[2]:
        results += [x.new_empty(x.shape) for x in (w1, w2)]
        results.append(w1.new_empty((*w1.shape[:-2], 6 * hidden.shape[-1] + 4), dtype=torch.float32))
    return results


_forward = define("refine_boxes", _fake_forward)
_backward = define("refine_boxes_backward", _fake_backward)


class _RefineBoxes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [..., D]
        boxes: Tensor,  # [..., 2 or 4]
        w1: Tensor,  # [(L,) D, D]
        b1: Tensor,  # [(L,) D]
        w2: Tensor,  # [(L,) D, D]
        b2: Tensor,  # [(L,) D]
        w3: Tensor,  # [(L,) 4, D]
        b3: Tensor,  # [(L,) 4]
        eps: float,
        recompute: bool,
        backend: str,
    ) -> Tensor:
        tensors = (hidden, boxes, w1, b1, w2, b2, w3, b3)
        results = _forward(*tensors, eps, not recompute, backend)
        ctx.save_for_backward(*tensors, *results)
        ctx.eps, ctx.backend = eps, backend
        return results[0]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_refined: Tensor) -> tuple[Tensor | None, ...]:
        tensors, refined = saved[:8], saved[8]
        h1, h2 = saved[9:] or _forward(*tensors, ctx.eps, True, ctx.backend)[1:]
        hidden, boxes, w1, b1, w2, b2, w3, b3 = tensors
        needs = ctx.needs_input_grad
        need_weights = any(needs[2:8])
        options = ctx.eps, [needs[0], needs[1], need_weights], ctx.backend
        found = iter(_backward(d_refined, refined, h1, h2, hidden, boxes, w1, w2, w3, *options))
        d_hidden = next(found) if needs[0] else None
        d_boxes = next(found) if needs[1] else None
        if not need_weights:
            return d_hidden, d_boxes, *(None,) * 9
        d_w1, d_w2, sums = found
        d = hidden.shape[-1]
        d_w3, d_b1, d_b2, d_b3 = sums.split((4 * d, d, d, 4), -1)
        gradients = (
            d_w1,
            d_b1.to(b1.dtype),
            d_w2,
            d_b2.to(b2.dtype),
            d_w3.view(w3.shape).to(w3.dtype),
            d_b3.to(b3.dtype),
        )
        wanted = (x if need else None for x, need in zip(gradients, needs[2:8], strict=True))
        return d_hidden, d_boxes, *wanted, *(None,) * 3
