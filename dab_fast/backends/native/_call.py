"""What every call of `dab_fast._C` needs: operands, the shape they share, and where to run.

Importing this raises ImportError, with the cause, where the extension cannot be used.

A CUDA call launches on torch's current stream of the tensors' device, and results and partial sums are allocated by
torch on that stream. No other stream exists here and no tensor outlives its call, so memory is as safe as with any op
of torch: a tensor made on another stream needs the caller's `record_stream`, and nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dab_fast.backends.native._extension import extension

C = extension()

Operand = tuple[int, int, int, int, int]  # address, dtype, strides of the three leading dimensions

_DTYPES = {getattr(torch, name): code for code, name in enumerate(C.DTYPES)}
_NOTHING = nullcontext()


def why_not(device: torch.device) -> str | None:
    """Why the extension cannot run on tensors of `device`, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has code for CPU and CUDA tensors, got {device.type}"
    if not C.HAS_CUDA:
        return f"it was built without CUDA code: {C.WHY_NO_CUDA}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"its kernels need sm_80 or newer, got sm_{capability[0]}{capability[1]}"
    return None


def shared_rows(x: Tensor) -> tuple[int, int, int]:
    """The leading dimensions of x, [..., width], padded or flattened to three."""
    leading = x.shape[:-1]
    if len(leading) > 3:
        return (1, 1, math.prod(leading))
    return (*(1,) * (3 - len(leading)), *leading)


def addressable(x: Tensor | None) -> Tensor | None:  # [..., width]
    """x with adjacent columns and at most three leading dimensions; copied only where it is not so already."""
    if x is None:
        return None
    if x.dim() > 4:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def operand(x: Tensor | None) -> Operand | None:  # [..., width], addressable
    """What the extension is told of x, which has to outlive the call."""
    if x is None:
        return None
    stride = x.stride()
    return (x.data_ptr(), _DTYPES[x.dtype], *(0,) * (4 - len(stride)), *stride[:-1])  # type: ignore[return-value]


def result_operand(x: Tensor | None) -> Operand | None:  # [..., width], contiguous
    """`operand` of a new tensor, which is written in place and so never copied."""
    if x is None:
        return None
    stride = x.stride() if x.dim() < 5 else (x.shape[-1], 1)
    return (x.data_ptr(), _DTYPES[x.dtype], *(0,) * (4 - len(stride)), *stride[:-1])  # type: ignore[return-value]


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes the device of x torch's current one, where it is not."""
    if x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def stream_of(x: Tensor) -> tuple[int, int]:
    """The device of x, and torch's current stream on it."""
    return x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index)


def partial_sums(x: Tensor, columns: int) -> Tensor:  # [rows of partial sums, columns]
    """Scratch memory for the sums over the rows of x, [..., width]."""
    rows = C.cuda_partial_rows(x.numel() // x.shape[-1])
    return torch.empty((rows, columns), dtype=torch.float32, device=x.device)


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def run(
    kernel: str,
    options: Sequence[float],
    inputs: Sequence[Tensor | None],  # [..., width]; the leading dimensions of the first, or none
    results: Sequence[Tensor | None],  # contiguous, written in place
    sums: int | None = None,  # for a backward kernel: how many sums over all rows are among the results
) -> None:
    """C.cpu_<kernel> or C.cuda_<kernel>, where the first input is."""
    inputs = [addressable(x) for x in inputs]
    first = inputs[0]
    assert first is not None
    args = (shared_rows(first), *options, *map(operand, inputs), *map(result_operand, results))
    if not on_cuda(first):
        getattr(C, f"cpu_{kernel}")(*args, torch.get_num_threads())
        return
    partial = partial_sums(first, sums) if sums else None
    memory = () if sums is None else (0 if partial is None else partial.data_ptr(),)
    with on_device_of(first):
        getattr(C, f"cuda_{kernel}")(*args, *memory, *stream_of(first))
