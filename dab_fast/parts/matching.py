"""Which query predicts which object: the assignments of all decoder layers and images, with one read by the host.

This file needs scipy, as the originals' matchers do. The cost of a pair, of DETR with Deformable DETR's class term:

    cost_class (positive - negative focal term of the object's class) + cost_bbox |box - box'|_1 - cost_giou GIoU

computed for the pairs of a query and an object of the same image alone, in float32 at least.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dab_fast.parameters import StepAside
from dab_fast.precision import at_least_float32, autocast_off

_LOG_EPS = 1e-8  # inside the logarithms of the class cost, in every codebase


class Objects(NamedTuple):
    """The objects of a batch, image after image."""

    labels: Tensor  # int64 [T]
    boxes: Tensor  # [T, 4] cx, cy, w, h
    sizes: list[int]  # how many each image has


@dataclass(frozen=True)
class Costs:
    """The weights of a pair's cost, and what else its formula depends on."""

    class_weight: float
    bbox_weight: float
    giou_weight: float
    alpha: float  # of the focal term
    giou_eps: float  # added to both denominators of GIoU


class Matches(NamedTuple):
    """In every layer image i has min(Q, sizes[i]) pairs; N is their sum."""

    pairs: list[list[tuple[np.ndarray, np.ndarray]]]  # by layer and image: queries, ascending, and their objects
    queries: Tensor  # int64 [L * N], of the flattened [L, B, Q]
    objects: Tensor  # int64 [L * N], of all T


def objects_of(targets: Any, labels_key: str, logits: Tensor, boxes: Tensor) -> Objects:
    """The objects in a list of dictionaries, one per image.

    Args:
        targets: "boxes", [n, 4], and labels, int64 [n], by their codebase's key.
        logits: [L, B, Q, C], and `boxes`, [L, B, Q, 4]: what is compared with the objects.

    Raises:
        StepAside: the original would broadcast these, convert them or refuse them.
    """
    if boxes.shape != (*logits.shape[:3], 4) or boxes.device != logits.device:
        raise StepAside(f"the predicted boxes are {list(boxes.shape)}, the logits {list(logits.shape)}")
    if not isinstance(targets, (list, tuple)) or len(targets) != logits.shape[1]:
        raise StepAside("the targets are not a list with a dictionary for each image")
    for target in targets:
        if not {labels_key, "boxes"} <= set(target):
            raise StepAside(f"a target has no {labels_key} or no boxes")
        labels, given = target[labels_key], target["boxes"]
        if type(labels) is not Tensor or labels.dim() != 1 or labels.dtype != torch.int64:
            raise StepAside(f"the {labels_key} of a target are no vector of int64")
        if type(given) is not Tensor or given.shape != (len(labels), 4):
            raise StepAside(f"the boxes of a target are not [{len(labels)}, 4]")
        if given.dtype not in (boxes.dtype, torch.float32) or {given.device, labels.device} != {boxes.device}:
            raise StepAside(f"the boxes of a target are {given.dtype} on {given.device}")
    return Objects(
        torch.cat([target[labels_key] for target in targets]),
        torch.cat([target["boxes"] for target in targets]),
        [len(target["boxes"]) for target in targets],
    )


@torch.no_grad()
def match(
    logits: Tensor,  # [L, B, Q, C]
    boxes: Tensor,  # [L, B, Q, 4] cx, cy, w, h
    objects: Objects,
    costs: Costs,
) -> Matches:
    """The assignments of least cost, each solved on the host as the originals solve it.

    Raises:
        StepAside: a box or a cost is no finite number, a box has a negative number in it, or a label is no class: each
            codebase refuses or replaces these in a way of its own.
    """
    layers, batch, queries, classes = logits.shape
    with autocast_off(logits):
        logits, boxes, given = (at_least_float32(x) for x in (logits, boxes, objects.boxes))
        # One read of all: a wait of the host for the GPU costs more than the costs do.
        found = [_pair_costs(logits, boxes, objects._replace(boxes=given), costs).flatten()]
        ranges = [boxes, *((given, objects.labels) if len(given) else ())]
        found += [limit.reshape(1) for x in ranges if x.numel() for limit in x.aminmax()]
        read = torch.cat(found).to("cpu").numpy()

    count = layers * queries * len(objects.boxes)
    _check(read[:count], read[count:], classes)
    matrix = read[:count].reshape(len(objects.boxes), layers, queries)
    starts = [0, *itertools.accumulate(objects.sizes)][:batch]
    pairs = [
        [
            linear_sum_assignment(matrix[start : start + size, layer].T)
            for start, size in zip(starts, objects.sizes, strict=True)
        ]
        for layer in range(layers)
    ]
    return Matches(pairs, *_indices(pairs, starts, queries, logits.device))


def giou(
    a: Tensor,  # [..., 4] cx, cy, w, h
    b: Tensor,  # the same, broadcastable
    eps: float,
) -> Tensor:  # [...]
    """The generalized IoU of boxes (Rezatofighi et al., arXiv 1902.09630), in the originals' order of operations."""
    (low_a, high_a), (low_b, high_b) = _corners(a), _corners(b)
    inner = _area((torch.min(high_a, high_b) - torch.max(low_a, low_b)).clamp(min=0))
    union = _area(high_a - low_a) + _area(high_b - low_b) - inner
    hull = _area((torch.max(high_a, high_b) - torch.min(low_a, low_b)).clamp(min=0))
    if eps == 0:
        return inner / union - (hull - union) / hull
    return inner / (union + eps) - (hull - union) / (hull + eps)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    center, size = boxes.split(2, -1)
    return torch.sub(center, size, alpha=0.5), torch.add(center, size, alpha=0.5)


def _area(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)
    return width * height


def _pair_costs(logits: Tensor, boxes: Tensor, objects: Objects, costs: Costs) -> Tensor:  # [T, L, Q]
    """In the originals' order of operations, so that costs that are equal there are equal here."""
    images = torch.from_numpy(np.repeat(np.arange(len(objects.sizes)), objects.sizes))
    images = images.to(logits.device, non_blocking=True)
    first = torch.arange(0, logits.numel(), logits.shape[-1], device=logits.device).view(logits.shape[:3])
    classes = first.transpose(0, 1).index_select(0, images) + objects.labels[:, None, None]
    p = logits.take(classes).sigmoid()
    rest = 1 - p
    negative = (1 - costs.alpha) * p**2 * (rest + _LOG_EPS).log()
    positive = costs.alpha * rest**2 * (p + _LOG_EPS).log()
    theirs = boxes.transpose(0, 1).index_select(0, images)  # [T, L, Q, 4]
    distance = torch.cdist(theirs.flatten(1, 2), objects.boxes[:, None], p=1).view(p.shape)
    overlap = giou(theirs, objects.boxes[:, None, None], costs.giou_eps)
    return costs.bbox_weight * distance + costs.class_weight * (negative - positive) - costs.giou_weight * overlap


def _check(costs: np.ndarray, limits: np.ndarray, classes: int) -> None:
    """`limits`: least and largest number of the predicted boxes, and where there are objects, of theirs and labels."""
    if not np.isfinite(limits).all() or (limits[::2] < 0).any():
        raise StepAside("a box or label has a negative number in it, or one that is not finite")
    if len(limits) == 6 and limits[5] >= classes:
        raise StepAside(f"there is a label {int(limits[5])}, and {classes} classes")
    if not np.isfinite(costs).all():
        raise StepAside("a cost is not finite")


def _indices(
    pairs: list[list[tuple[np.ndarray, np.ndarray]]], starts: list[int], queries: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The second and third field of `Matches`, by one transfer."""
    batch = len(starts)
    flat = [(layer * batch + i, *pair) for layer, images in enumerate(pairs) for i, pair in enumerate(images)]
    found = np.stack(
        (
            np.concatenate([block * queries + chosen for block, chosen, _ in flat]),
            np.concatenate([starts[block % batch] + which for block, _, which in flat]),
        )
    )
    return torch.from_numpy(found).to(device, non_blocking=True).unbind()  # type: ignore[return-value]
