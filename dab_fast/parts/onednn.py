"""PyTorch's private oneDNN convolutions, as its compiler uses them: weights reordered once, and a sum in the same call.

They are used where their schemas are the known ones and a trial gave the right values. They have no gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dab_fast._tracing import apart

Pair = tuple[int, int]

_SETTINGS = "Tensor W, Tensor? B, int[] padding, int[] stride, int[] dilation, int groups"
_BINARY = "str binary_attr, Scalar? alpha, str? unary_attr, Scalar?[] unary_scalars, str? unary_algorithm"
_SCHEMAS = {
    ("_reorder_convolution_weight", "default"): "Tensor self, int[2] padding=0, int[2] stride=1, int[2] dilation=1, "
    "int groups=1, int[]? input_size=None",
    ("_convolution_pointwise", "default"): f"Tensor X, {_SETTINGS}, str attr, Scalar?[] scalars, str? algorithm",
    ("_convolution_pointwise_", "binary"): f"Tensor(a!) other, Tensor X, {_SETTINGS}, {_BINARY}",
}


def serves(x: Tensor) -> bool:
    """Whether these convolutions are for images or features such as x.

    Not under a TorchDispatchMode, which may count operations that it knows, or ask a reordered weight for its memory.
    """
    enabled = bool(torch.backends.mkldnn.enabled) and not torch._C._len_torch_dispatch_stack()
    return x.device.type == "cpu" and x.dtype == torch.float32 and enabled and _works()


def reordered(
    weight: Tensor,  # [O, I / groups, kh, kw]
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    size: Sequence[int],  # of the input: another order is best for another
) -> Tensor:
    """The weight in oneDNN's own order, which has no strides and can be neither copied nor pickled."""
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, size)
    return result


def convolution(
    x: Tensor,  # [B, I, height, width], channels last
    weight: Tensor,  # [O, I / groups, kh, kw], reordered or not
    bias: Tensor,  # [O]
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    residual: Tensor | None = None,  # of the result's shape, channels last
) -> Tensor:
    """conv2d; with a residual the sum, in the residual's memory. Gives [B, O, height', width'], channels last."""
    settings = (weight, bias, padding, stride, dilation, groups)
    result: Tensor
    if residual is None:
        result = torch.ops.mkldnn._convolution_pointwise(x, *settings, "none", [], "")
    else:
        result = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *settings, "add", None, None, [], None)
    return result


@functools.cache
def _works() -> bool:
    try:
        return bool(torch.backends.mkldnn.is_available()) and _has_schemas() and apart(_has_values)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _has_schemas() -> bool:
    for (name, overload), arguments in _SCHEMAS.items():
        schema: Any = getattr(getattr(torch.ops.mkldnn, name), overload)._schema
        if str(schema).partition("(")[2].rpartition(") -> ")[0] != arguments:
            return False
    return True


@torch.no_grad()
def _has_values() -> bool:
    """Also that NaN stays NaN."""
    randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with torch.device("cpu"):
        x, weight, residual = (
            randn(size).contiguous(memory_format=torch.channels_last)
            for size in ((2, 5, 9, 8), (7, 5, 3, 3), (2, 7, 5, 8))
        )
        bias = randn(7)
    residual[0, 0, 0, 0] = torch.nan
    settings = (2, 1), (1, 2), (1, 2), 1  # stride, padding, dilation, groups
    expected = F.conv2d(x, weight, bias, *settings)
    for w in (weight, reordered(weight, *settings, x.shape)):
        plain = convolution(x, w, bias, *settings)
        summed = convolution(x, w, bias, *settings, residual.clone())
        for y, right in ((plain, expected), (summed, expected + residual)):
            if not torch.allclose(y, right, rtol=0, atol=1e-4, equal_nan=True):
                return False
    return True
