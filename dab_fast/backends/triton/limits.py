"""What the Triton kernels cannot do with an op's arguments, in a function of the op's name; imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from dab_fast.backends.triton.configs import WIDEST_HEAD


def box_position_embed(dtype: torch.dtype, num_feats: int, tensors: tuple[Tensor | None, ...]) -> str | None:
    return "its kernels compute in float32, got float64" if dtype == torch.float64 else None


def modulated_cross_attention(dtypes: list[torch.dtype], widest: int, scale: float | None) -> str | None:
    if any(dtype != dtypes[0] for dtype in dtypes):
        return f"its kernels need one dtype for all tensors, got {', '.join(map(str, dtypes))}"
    if dtypes[0] not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels compute in float32, float16 or bfloat16, got {dtypes[0]}"
    if widest > WIDEST_HEAD:
        return f"its heads are at most {WIDEST_HEAD} wide, got {widest}"
    if scale is not None and scale <= 0:
        return f"its kernels need a positive scale, got {scale}"
    return None


def refine_boxes(tensors: tuple[Tensor, ...]) -> str | None:
    hidden = tensors[0]
    if hidden.shape[-1] > 512:
        return f"its kernels hold a row of hidden in registers, at most 512 wide, got {hidden.shape[-1]}"
    if hidden.dtype == torch.float64:
        return "its kernels compute in float32, got float64"
    if hidden.shape[:-1].numel() >= 2**31:
        return f"its kernels count rows in 31 bits, got {list(hidden.shape)}"
    return None
