"""`refine_boxes` in plain PyTorch: the specification, per layer where each has a box MLP of its own, or recomputed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dab_fast import reference


def run(
    tensors: tuple[Tensor, ...],  # hidden, boxes, w1, b1, w2, b2, w3, b3
    *,
    eps: float,
    layered: bool,  # a box MLP per leading index
    recompute: bool,
) -> Tensor:  # [..., 4]
    if recompute:
        refined = checkpoint(_refine, tensors, eps, layered, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(refined, Tensor)
        return refined
    return _refine(tensors, eps, layered)


def _refine(tensors: tuple[Tensor, ...], eps: float, layered: bool) -> Tensor:
    if layered:
        return torch.stack([reference.refine_boxes(*layer, eps=eps) for layer in zip(*tensors, strict=True)])
    return reference.refine_boxes(*tensors, eps=eps)
