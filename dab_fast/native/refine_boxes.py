"""`refine_boxes` with its tail by `dab_fast._C`: the last linear, the inverse sigmoid of the old box, sum, sigmoid.

The two wide layers stay PyTorch's matrix products.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dab_fast import reference
from dab_fast.native._call import run


def forward(
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
) -> list[Tensor]:  # [..., 4] and, with `keep`, what the two relus give, [..., D] each, all in float32
    """The refined boxes."""
    with _no_autocast(hidden):
        h1 = _relu_layer(hidden.float(), w1, b1)
        h2 = _relu_layer(h1, w2, b2)
    refined = h2.new_empty((*hidden.shape[:-1], 4))
    if w1.dim() == 2:
        _tail(h2, boxes, w3, b3, eps, refined)
    else:
        for layer in zip(h2, boxes, w3, b3, refined, strict=True):
            _tail(*layer[:4], eps, layer[4])
    return [refined, h1, h2] if keep else [refined]


def backward(
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
    need_hidden: bool,
    need_boxes: bool,
    need_weights: bool,
) -> list[Tensor]:  # those needed of d_hidden; d_boxes; d_w1, d_w2, [(L,) 6 * D + 4] of w3, b1, b2, b3 in float32
    """The gradients; those of w3, b1, b2 and b3 follow one another in one tensor."""
    d = hidden.shape[-1]
    d_h2 = h2.new_empty(h2.shape) if need_hidden or need_weights else None
    d_boxes = boxes.new_empty(boxes.shape) if need_boxes else None
    sums = h2.new_empty((*w1.shape[:-2], 6 * d + 4)) if need_weights else None
    if w1.dim() == 2:
        _tail_backward(d_refined, refined, h2, boxes, w3, eps, d_h2, d_boxes, sums)
    else:
        for i in range(len(w1)):
            some = [None if x is None else x[i] for x in (d_h2, d_boxes, sums)]
            _tail_backward(d_refined[i], refined[i], h2[i], boxes[i], w3[i], eps, *some)
    results: list[Tensor] = []
    d_weights: list[Tensor] = []
    if d_h2 is not None:
        rows, rows1, rows2 = (_rows(x, w1) for x in (hidden, h1, h2))
        with _no_autocast(hidden):
            d_a2 = _relu_backward(_rows(d_h2, w1), rows2)
            d_a1 = _relu_backward(d_a2 @ w2.float(), rows1)
            if need_hidden:
                results.append((d_a1 @ w1.float()).to(hidden.dtype).view(hidden.shape))
            if sums is not None:
                d_weights = [(d_a1.mT @ rows.float()).to(w1.dtype), (d_a2.mT @ rows1).to(w2.dtype), sums]
                torch.sum(d_a1, -2, out=sums[..., 4 * d : 5 * d])
                torch.sum(d_a2, -2, out=sums[..., 5 * d : 6 * d])
    if d_boxes is not None:
        results.append(d_boxes)
    return results + d_weights


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast reaches into the ops of this library; these products are to stay in float32."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] as [(L,) N, D], for weight [(L,) D, D]."""
    return x.reshape(-1, x.shape[-1]) if weight.dim() == 2 else x.reshape(len(weight), -1, x.shape[-1])


def _relu_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(weight x + bias) in float32: x [..., D]; weight [(L,) D, D]; bias [(L,) D]."""
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight.float(), bias.float()).relu_()
    rows = torch.baddbmm(bias.float().unsqueeze(1), _rows(x, weight), weight.float().mT)
    return rows.relu_().view(x.shape)


def _relu_backward(d_out: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(d_out, out, 0)


def _tail(h2: Tensor, boxes: Tensor, w3: Tensor, b3: Tensor, eps: float, refined: Tensor) -> None:
    if refined.numel():
        run("box_tail", (boxes.shape[-1], h2.shape[-1], eps), (h2, boxes, w3, b3), (refined,))


def _tail_backward(
    d_refined: Tensor,  # [..., 4]
    refined: Tensor,  # [..., 4]
    h2: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w3: Tensor,  # [4, D]
    eps: float,
    d_h2: Tensor | None,  # [..., D]
    d_boxes: Tensor | None,  # [..., 2 or 4]
    sums: Tensor | None,  # [6 * D + 4]: d_w3, d_b1, d_b2, d_b3
) -> None:
    d = h2.shape[-1]
    if not refined.numel():
        if sums is not None:
            sums.zero_()
        return
    # d_w3 and d_b3 are summed as one row.
    results = (d_h2, d_boxes, *((None, None) if sums is None else (sums[: 4 * d], sums[6 * d :])))
    inputs = (h2, boxes, w3, None, refined, d_refined)
    columns = 0 if sums is None else 4 * d + 4
    options = (boxes.shape[-1], d, eps, reference.clamp_passes_at_bounds())
    run("box_tail_backward", options, inputs, results, sums=columns)
