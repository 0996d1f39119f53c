"""Who is running this code: eager PyTorch, a compiler, an exporter, or a transform of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.autograd import forward_ad

T = TypeVar("T")


def compiling() -> bool:
    """Whether torch.compile or torch.export traces this call."""
    return torch.compiler.is_compiling()


def exporting() -> bool:
    """Whether the graph being traced will run without this package: torch.export, torch.jit.trace, ONNX."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


F = TypeVar("F", bound=Callable[..., object])


def constant_of_a_graph(fn: F) -> F:
    """fn, whose result torch.compile takes for a constant instead of tracing it.

    What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@constant_of_a_graph
def _functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which only plain PyTorch serves."""
    return _functorch() or forward_ad._current_level >= 0


def constant(x: float) -> float:
    """x, which under torch.compile becomes a constant of the graph.

    With dynamic=True a float read from a module is a symbol, and torch 2.13 fails on one that enters the subgraph of an
    autograd.Function.
    """
    if compiling():
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return guard_scalar(x)
    return x


def apart(fn: Callable[[], T]) -> T:
    """fn() in a new thread, which has none of the caller's modes: inference, autocast, torch.func, a default device."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()
