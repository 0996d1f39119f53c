"""What the extension cannot do with an op's arguments, in a function of the op's name; does not load it."""

from __future__ import annotations

import torch
from torch import Tensor


def box_position_embed(dtype: torch.dtype, num_feats: int, tensors: tuple[Tensor | None, ...]) -> str | None:
    boxes = tensors[0]
    assert boxes is not None
    doubles = [x is not None and x.dtype == torch.float64 for x in tensors]
    if boxes.is_cuda and (dtype == torch.float64 or any(doubles)):
        return "its CUDA kernels compute in float32, got float64"
    if any(doubles) and not doubles[0]:
        return f"its kernels compute as precisely as boxes, {boxes.dtype}, got float64"
    if num_feats > 512:
        return f"its kernels take num_feats up to 512, got {num_feats}"
    if boxes.shape[-1] not in (1, 2, 4):
        return f"its kernels take 1, 2 or 4 coordinates, got {boxes.shape[-1]}"
    if boxes.numel() >= 2**31:
        return f"its kernels count boxes in 31 bits, got {list(boxes.shape)}"
    return None


def refine_boxes(tensors: tuple[Tensor, ...]) -> str | None:
    if any(x.dtype == torch.float64 for x in tensors):
        return "its kernels compute in float32, got float64"
    if tensors[0].shape[:-1].numel() >= 2**31:
        return f"its kernels count rows in 31 bits, got {list(tensors[0].shape)}"
    return None
