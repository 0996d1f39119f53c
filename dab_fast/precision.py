"""In which dtype something is computed: boxes, angles, logits and statistics never below float32."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dab_fast._tracing import apart, constant_of_a_graph


def at_least_float32(x: Tensor) -> Tensor:
    """x in float64 where it is that already, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


@constant_of_a_graph  # torch 2.11 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    """Of some devices, "meta" for one, autocast knows nothing."""
    return torch.amp.is_autocast_available(device_type)


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would take the box MLP and the logits to half precision."""
    if autocast_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer reads x here: autocast's, where that is on."""
    if autocast_on(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, where what float16 cannot hold becomes its largest number: tiny anchors overflow it."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


@functools.cache
def clamp_passes_at_bounds() -> bool:
    """Whether the installed torch's clamp passes the gradient where x is exactly a bound: torch < 2.14 does.

    The original models follow their torch there, and so do the specification and the kernels' gradients.
    """

    def probe() -> bool:
        x = torch.zeros((), requires_grad=True)
        node: Any = x.clamp(min=0).grad_fn
        return bool(node(torch.ones(())))  # without autograd's engine, whose threads no fork survives

    return apart(probe)
