"""Argument checks of the public ops: what must hold, and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    name: str,
    x: object,
    shape: tuple[int | str | None, ...],  # an int must match; a str or None only counts as a dimension
    *,
    like: Tensor | None = None,  # must be on the same device
    leading: bool = False,  # any leading dimensions before `shape`
    boolean: bool = False,
) -> None:
    same = isinstance(x, Tensor) and like is not None and x.shape == shape and x.device == like.device
    if same and not boolean and x.is_floating_point():  # type: ignore[attr-defined]
        return  # an op has up to eight tensors, and every call pays for their checks
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    tail = x.shape[len(x.shape) - len(shape) :] if leading else x.shape
    fits = len(tail) == len(shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(shape, tail, strict=False)
    )
    if not fits:
        dims = ", ".join("..." if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{'..., ' * leading}{dims}], got {list(x.shape)}")
    if boolean != (x.dtype == torch.bool) or not (boolean or x.is_floating_point()):
        raise TypeError(f"{name} must be {'bool' if boolean else 'floating point'}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other arguments are, got {x.device}")
