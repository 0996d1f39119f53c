"""Random cases for the criteria of all codebases, and what the original and the fast one say of them."""

from __future__ import annotations

import copy

import torch
from transformers import DabDetrConfig

import dab_fast
from dab_fast.adapters.huggingface import criterion as huggingface
from tests.support import idea_criterion

L, Q, C = 3, 12, 5

# How many objects each image has.
SIZES = {
    "some": (4, 2),
    "one_object": (1,),
    "an_empty_image": (0, 3, 1),
    "all_empty": (0, 0),
    "more_objects_than_queries": (Q + 3, 2),
}

# Sums of up to a thousand terms in float32, in another order, and the originals' 1 - (1 - p), which loses up to 6e-8 of
# a p of some tenths.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def case(sizes, *, dtype=torch.float32, layers=L, queries=Q, classes=C, seed=0):
    """Logits [L, B, Q, C] and boxes [L, B, Q, 4], which require gradients, and targets."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits = (6 * rand(layers, len(sizes), queries, classes) - 4).to(dtype).requires_grad_()
    boxes = (0.05 + 0.9 * rand(layers, len(sizes), queries, 4)).to(dtype).requires_grad_()
    targets = [
        {
            "labels": torch.randint(classes, (n,), generator=generator),
            "boxes": (0.05 + 0.9 * rand(n, 4)).to(torch.float64 if dtype == torch.float64 else torch.float32),
        }
        for n in sizes
    ]
    return logits, boxes, targets


def config(**change):
    return DabDetrConfig(**({"num_labels": C, "decoder_layers": L, "auxiliary_loss": True} | change))


def of_huggingface(logits, boxes, targets, settings=None, *, fast):
    settings = settings or config()
    given = [{"class_labels": x["labels"], "boxes": x["boxes"]} for x in targets]
    last = logits[-1]
    if fast:
        of_layers = logits if settings.auxiliary_loss else logits[-1:]
        return huggingface.loss(huggingface.ORIGINAL, of_layers, given, boxes, settings)
    return huggingface.ORIGINAL(last, given, last.device, boxes[-1], settings, logits, boxes)


def outputs_of(logits, boxes):
    layers = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    return layers[-1] | {"aux_outputs": layers[:-1]}


def of_idea(logits, boxes, targets, criterion=None, *, fast, **kwargs):
    """The weighted sum and the losses by name."""
    criterion = criterion or idea_criterion.SetCriterion(num_classes=logits.shape[-1])
    if fast:
        criterion = accelerated(criterion)
    losses = criterion(outputs_of(logits, boxes), targets, **kwargs)
    if fast:
        assert not criterion.dab_fast_reasons
    weights = criterion.weight_dict
    total = sum(x * weights[k] for name, x in losses.items() if (k := name.rstrip("_0123456789")) in weights)
    return total, losses


def accelerated(criterion):
    criterion = copy.deepcopy(criterion)
    dab_fast.accelerate(criterion)
    return criterion


CODEBASES = {"huggingface": of_huggingface, "idea": of_idea}


def assert_close(ours, theirs, tolerance):
    """In units of the original's norm."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
    ours, theirs = ours.detach(), theirs.detach()
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def assert_same_outcome(ours, theirs):
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert list(ours) == list(theirs)
        for name, x in theirs.items():
            torch.testing.assert_close(ours[name], x, rtol=0, atol=0, equal_nan=True)
