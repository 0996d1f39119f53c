"""`box_position_embed` by `dab_fast._C`, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from dab_fast import precision
from dab_fast.backends.native._call import C, run


def _scale_kind(scale: Tensor | None, num_feats: int) -> int:
    if scale is None:
        return 0
    if scale.shape[-1] == 1:
        return C.SCALES["per_box"]
    return C.SCALES["shared" if scale.dim() == 1 else "per_element"]


def forward(
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
    ref_size_logits: Tensor | None,  # [..., 2]
    num_feats: int,
    temperature: float,
    order: str,
    dtype: torch.dtype,
    query: bool,
) -> list[Tensor]:  # [..., n * num_feats] and, with `query`, [..., 2 * num_feats]
    """The sine embedding, and its center half scaled and modulated."""
    n = boxes.shape[-1]
    leading = boxes.shape[:-1]
    results = [boxes.new_empty((*leading, n * num_feats), dtype=dtype)]
    if query:
        results.append(boxes.new_empty((*leading, 2 * num_feats), dtype=dtype))
    if not boxes.numel():
        return results
    options = (n, num_feats, temperature, order == "xywh", _scale_kind(scale, num_feats))
    run("box_position_embed", options, (boxes, scale, ref_size_logits), (results[0], results[1] if query else None))
    return results


def backward(
    d_sine: Tensor | None,  # [..., n * num_feats]
    d_query_sine: Tensor | None,  # [..., 2 * num_feats]
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,
    ref_size_logits: Tensor | None,
    num_feats: int,
    temperature: float,
    order: str,
    needs: list[bool],  # of boxes, scale, ref_size_logits
) -> list[Tensor]:  # those needed of d_boxes, d_scale, d_ref_size_logits
    """The gradients; the sines are computed again rather than kept."""
    wanted = zip((boxes, scale, ref_size_logits), needs, strict=True)
    found = [x.new_empty(x.shape) if need and x is not None else None for x, need in wanted]
    results = [x for x in found if x is not None]
    if not boxes.numel() or (d_sine is None and d_query_sine is None):
        return [x.zero_() for x in results]
    kind = _scale_kind(scale, num_feats)
    options = (boxes.shape[-1], num_feats, temperature, order == "xywh", kind, precision.clamp_passes_at_bounds())
    inputs = (boxes, scale, ref_size_logits, d_sine, d_query_sine)
    summed = found[1] is not None and kind == C.SCALES["shared"]
    run("box_position_embed_backward", options, inputs, found, sums=2 * num_feats if summed else 0)
    return results
