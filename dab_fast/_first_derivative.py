"""The backward of a fused operation, which has a first derivative only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dab_fast._tracing import compiling

Gradients = tuple[Tensor | None, ...]


def first_derivative_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Makes `backward(ctx, saved, *d_outputs)` the backward of an autograd Function; `saved` is `ctx.saved_tensors`.

    To differentiate what it returns again raises. `once_differentiable` of PyTorch ties its error to the gradients of
    the outputs alone, so a second derivative by `autograd.grad`, or of a sum, would leave terms out without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *d_outputs: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # once: a checkpoint gives them out only once
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *d_outputs)
        with torch.no_grad():
            gradients = backward(ctx, saved, *d_outputs)
        if compiling():  # compiled code refuses a second derivative itself
            return gradients
        return _Gradients.apply(gradients, *d_outputs, *saved)

    return wrapper


class _Gradients(torch.autograd.Function):
    """Gradients as a function of all they depend on, whose own backward raises."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, *depend_on: Tensor | None) -> Gradients:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "dab_fast's fused operations have a first derivative only: call dab_fast.restore(model) before a step that "
            "differentiates twice (create_graph=True)"
        )
