"""The losses of all decoder layers in one pass, from the pairs that `matching` found.

The originals compute every layer's on its own and wait for the GPU in each: their sums, over a stack of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dab_fast.parts.matching import Matches, Objects, giou
from dab_fast.precision import at_least_float32, autocast_off


@dataclass(frozen=True)
class Rules:
    """What the losses depend on beside predictions and objects."""

    focal_alpha: float  # weight of an object's class; of all other classes 1 - focal_alpha; negative: no weights
    giou_eps: float  # added to both denominators of GIoU
    counts: Literal["likely", "last"]  # a query predicts an object where it likely has a class, or no last class


def sums(
    logits: Tensor,  # [L, B, Q, C]
    boxes: Tensor,  # [L, B, Q, 4] cx, cy, w, h
    objects: Objects,
    matches: Matches,
    rules: Rules,
    num_boxes: float | Tensor,  # the objects per process, at least 1
) -> tuple[Tensor, Tensor]:  # [3, L], [L, 4]
    """Focal loss of the classes, L1 loss and GIoU loss of the matched boxes, each over `num_boxes`.

    In float32 at least; differentiable in logits, boxes and the objects' boxes. The second result is the L1 loss by
    coordinate, not divided by anything, without a gradient.
    """
    with autocast_off(logits):
        chosen, given = (
            at_least_float32(x).index_select(0, index).view(len(logits), -1, 4)
            for x, index in ((boxes.flatten(0, 2), matches.queries), (objects.boxes, matches.objects))
        )
        distance = (chosen - given).abs().sum(1)
        overlap = (1 - giou(chosen, given, rules.giou_eps)).sum(1)
        focal = _focal(logits, objects, matches, rules.focal_alpha)
        return torch.stack((focal, distance.sum(1), overlap)) / num_boxes, distance.detach()


def apart(
    rows: Tensor,  # [n, L]
) -> list[tuple[Tensor, ...]]:
    """The numbers of each row, no views of it: whoever gets them may change them in place, as the originals'."""
    numbers: tuple[Tensor, ...] = torch.unbind_copy(rows.flatten())  # type: ignore[func-returns-value, assignment]
    layers = rows.shape[1]
    return [numbers[i : i + layers] for i in range(0, len(numbers), layers)]


def _focal(logits: Tensor, objects: Objects, matches: Matches, alpha: float) -> Tensor:  # [L]
    """The sum of w sigmoid(z)^2 softplus(z) over queries and classes: z is the logit, or minus it for a pair's class.

    w is `alpha` for a pair's class, else 1 - alpha.
    """
    logits = at_least_float32(logits)
    pairs = matches.queries * logits.shape[-1] + objects.labels.index_select(0, matches.objects)

    def marked(others: float, of_pairs: float) -> Tensor:
        return (
            torch.full_like(logits, others, memory_format=torch.contiguous_format)
            .view(-1)
            .index_fill_(0, pairs, of_pairs)
            .view(logits.shape)
        )

    weight = (1 - alpha, alpha) if alpha >= 0 else (1, 1)
    z = logits * marked(1, -1)
    # Above the threshold softplus(z) is z; at 40 that is right to the last bit of float64.
    return (z.sigmoid() ** 2 * F.softplus(z, threshold=40) * marked(*weight)).sum((1, 2, 3))


@torch.no_grad()
def cardinality_error(logits: Tensor, objects: Objects, rules: Rules) -> Tensor:  # [L]
    """The mean over images of how far the number of predicted objects is from that of objects."""
    with autocast_off(logits):
        if rules.counts == "likely":
            predicted = logits.amax(-1).sigmoid() > 0.5
        else:
            predicted = logits.argmax(-1) != logits.shape[-1] - 1
        sizes = torch.tensor(objects.sizes, dtype=torch.float32).to(logits.device, non_blocking=True)
        return (predicted.sum(-1) - sizes).abs().mean(-1)


@torch.no_grad()
def class_error(logits: Tensor, objects: Objects, matches: Matches) -> Tensor:  # []
    """How many per cent of the pairs of the last layer have another class than their object; 100 without pairs."""
    of_last = len(matches.queries) // len(logits)
    if not of_last:
        return torch.full((), 100.0, device=logits.device)
    last = slice(len(matches.queries) - of_last, None)
    predicted = logits.flatten(0, 2).index_select(0, matches.queries[last]).argmax(-1)
    right = predicted == objects.labels.index_select(0, matches.objects[last])
    return 100 - right.float().mean() * 100
