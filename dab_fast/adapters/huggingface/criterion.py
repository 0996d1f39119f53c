"""The loss of Hugging Face's DAB-DETR, `DeformableDetrForObjectDetectionLoss`, for all layers at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.loss import loss_deformable_detr as theirs
from transformers.loss import loss_for_object_detection as shared

from dab_fast._tracing import compiling, transformed
from dab_fast.adapters._description import Code, is_from
from dab_fast.parameters import StepAside
from dab_fast.parts import criterion, matching

ORIGINAL = theirs.DeformableDetrForObjectDetectionLoss
# What it reads in its file, beside what its criterion and matcher do.
_NAMES = (*ORIGINAL.__code__.co_names, "linear_sum_assignment")
_READ = {name: vars(theirs)[name] for name in _NAMES if name in vars(theirs)}

_MATCHER_ALPHA = 0.25  # whatever `config.focal_alpha` is
_LOSSES = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")  # in the order of their dictionary


@torch.compiler.disable  # one break of the graph, where tracing the original's loss makes a dozen
def loss(
    function: Any,  # the model's `loss_function`
    logits: Tensor,  # [L, B, Q, C], or [1, B, Q, C] without auxiliary losses
    labels: list[dict[str, Tensor]],
    boxes: Tensor,  # [L, B, Q, 4]
    config: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """What `function` returns: the weighted sum, the losses by name, and the auxiliary outputs.

    Raises:
        StepAside: `function` is not transformers' own, or refuses what is given, or does not read it as it stands.
    """
    if compiling() or transformed():
        raise StepAside("the loss is traced or transformed")
    if function is not ORIGINAL:
        raise StepAside("loss_function is not transformers' own for DAB-DETR")
    if (patched := _patched()) is not None:
        raise StepAside(f"{patched} is patched")
    auxiliary = bool(config.auxiliary_loss)
    if auxiliary and not len(logits) == len(boxes) == config.decoder_layers:
        raise StepAside(f"config.decoder_layers is {config.decoder_layers}, and there are {len(boxes)} layers")
    if logits.shape[-1] != config.num_labels:
        raise StepAside(f"there are {logits.shape[-1]} classes, and config.num_labels is {config.num_labels}")
    if not (config.class_cost or config.bbox_cost or config.giou_cost):
        raise StepAside("every cost in the config is 0")
    of_layers = boxes if auxiliary else boxes[-1:]
    objects = matching.objects_of(labels, "class_labels", logits, of_layers)
    costs = matching.Costs(config.class_cost, config.bbox_cost, config.giou_cost, _MATCHER_ALPHA, giou_eps=0)
    matches = matching.match(logits, of_layers, objects, costs)
    rules = criterion.Rules(config.focal_alpha, giou_eps=0, counts="likely")
    num_boxes = _num_boxes(len(objects.labels), logits.device)
    found, _ = criterion.sums(logits, of_layers, objects, matches, rules, num_boxes)
    ce, bbox, giou = found.sum(1).unbind()
    total = ce + config.bbox_loss_coefficient * bbox + config.giou_loss_coefficient * giou
    counts = criterion.cardinality_error(logits, objects, rules)
    named = dict(zip(_LOSSES, (*criterion.apart(found), *criterion.apart(counts[None])), strict=True))
    suffixes = ("", *(f"_{layer}" for layer in range(len(logits) - 1)))
    outputs: Any = vars(theirs)["_set_aux_loss"](logits, boxes) if auxiliary else None
    return total, {name + suffix: x[i - 1] for i, suffix in enumerate(suffixes) for name, x in named.items()}, outputs


def _num_boxes(count: int, device: torch.device) -> float | Tensor:
    """The objects of all processes over their number, at least 1: what transformers computes, and waits for."""
    state = getattr(shared, "PartialState", None)
    if state is None or state._shared_state == {} or state().num_processes == 1:
        return max(float(count), 1.0)
    total = torch.tensor([count], dtype=torch.float32).to(device, non_blocking=True)
    return (vars(shared)["reduce"](total) / state().num_processes).clamp(min=1)


def _patched() -> str | None:
    """The name of something that computes the original loss and is not as transformers has it."""
    for name, x in _READ.items():
        if vars(theirs).get(name) is not x:
            return name
    code, foreign = _code()
    return foreign or code.changed()


@functools.cache
def _code() -> tuple[Code, str | None]:
    """The functions of their criterion and matcher, and the name of one that is from another package."""
    matcher = theirs.DeformableDetrHungarianMatcher()
    root = theirs.DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=[])
    code = Code(root, type(root))
    if not is_from(ORIGINAL, {"transformers"}):
        return code, ORIGINAL.__name__
    return code, code.foreign(root, type(root), also=("accelerate",))
