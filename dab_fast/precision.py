"""In which dtype something is computed: boxes, angles, logits and statistics never below float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float64 where it is that already, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would take the box MLP and the logits to half precision."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer reads x here: autocast's, where that is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, where what float16 cannot hold becomes its largest number: tiny anchors overflow it."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)
