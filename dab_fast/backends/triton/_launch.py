"""What every launch needs: rows with adjacent columns, and the right device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes 2 µs of the host."""
    return -(-a // b)


def rows_of(x: Tensor) -> tuple[Tensor, int]:  # x: [..., width]
    """x as rows of adjacent elements, and the stride of a row; copies only what is no such thing."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; entering a device guard costs more than asking whether it is needed."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)
