"""Sine embedding of anchor boxes, times the content-dependent scale, times the width/height modulation."""

from __future__ import annotations

import torch
from torch import Tensor

from dab_fast import reference
from dab_fast.ops._checks import check_tensor


def sine_embed(
    coordinates: Tensor,  # [..., n] in (0, 1)
    num_feats: int = 128,
    temperature: float = 10000.0,
    order: str = "yxwh",
) -> Tensor:  # [..., n * num_feats]
    """sin and cos of 2*pi*c / temperature^(2*floor(i/2) / num_feats) for every coordinate c and feature i."""
    _check_embedding("coordinates", coordinates, num_feats, order)
    return reference.sine_embed(coordinates, num_feats, temperature, order)


def box_position_embed(
    boxes: Tensor,  # [..., 2 or 4]: cx, cy(, w, h) in (0, 1)
    scale: Tensor | None = None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
    ref_size_logits: Tensor | None = None,  # [..., 2]: w, h; needs 4-d boxes
    *,
    num_feats: int = 128,
    temperature: float = 10000.0,
    order: str = "yxwh",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [..., n * num_feats], [..., 2 * num_feats]
    """The sine embedding g of `boxes`, and g's center half times `scale` times sigmoid(ref_size_logits) / (w, h)."""
    _check_embedding("boxes", boxes, num_feats, order)
    if boxes.shape[-1] not in (2, 4):
        raise ValueError(f"boxes must have shape [..., 2] or [..., 4], got {list(boxes.shape)}")
    if scale is not None:
        width = 1 if scale.shape[-1:] == (1,) else 2 * num_feats
        check_tensor("scale", scale, (width,) if scale.dim() == 1 else (*boxes.shape[:-1], width), like=boxes)
    if ref_size_logits is not None:
        check_tensor("ref_size_logits", ref_size_logits, (*boxes.shape[:-1], 2), like=boxes)
        if boxes.shape[-1] != 4:
            raise ValueError(f"boxes must have shape [..., 4] for ref_size_logits, got {list(boxes.shape)}")
    return reference.box_position_embed(
        boxes, scale, ref_size_logits, num_feats=num_feats, temperature=temperature, order=order, dtype=dtype
    )


def _check_embedding(name: str, x: Tensor, num_feats: int, order: str) -> None:
    check_tensor(name, x, (None,), leading=True)
    if num_feats < 2 or num_feats % 2:
        raise ValueError(f"num_feats must be even and at least 2, got {num_feats}")
    if order not in ("yxwh", "xywh"):
        raise ValueError(f'order must be "yxwh" or "xywh", got {order!r}')
