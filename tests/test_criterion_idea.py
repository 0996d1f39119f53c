"""IDEA-Research's `SetCriterion`, and forks of it: what is served, and what is left to the original."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import dab_fast
from tests.support import idea_criterion
from tests.support.criterion import (
    TOLERANCE,
    C,
    Q,
    accelerated,
    assert_close,
    assert_same_outcome,
    case,
    of_idea,
    outputs_of,
)


class WithoutEps(idea_criterion.SetCriterion):
    """With a GIoU of another file's."""

    def loss_boxes(self, *args):
        with mock.patch.object(idea_criterion, "GIOU_EPS", 0.0):
            return super().loss_boxes(*args)


class OtherMatcher(idea_criterion.HungarianMatcher):
    def forward(self, outputs, targets):
        return super().forward(outputs | {"pred_boxes": outputs["pred_boxes"].sqrt()}, targets)


class Weighted(idea_criterion.SetCriterion):
    def loss_labels(self, *args, **kwargs):
        losses = super().loss_labels(*args, **kwargs)
        return losses | {"loss_ce": 1.1 * losses["loss_ce"]}


@pytest.mark.parametrize(
    "criterion, reason",
    [
        (WithoutEps(), "loss_giou is not what the original computes"),
        (Weighted(), "loss_ce is not what the original computes"),
        (idea_criterion.SetCriterion(matcher=OtherMatcher()), "matcher finds other pairs"),
    ],
    ids=["giou", "weights", "matcher"],
)
def test_another_criterion_is_left_as_it_is(criterion, reason):
    with pytest.raises(ValueError, match=reason):
        dab_fast.accelerate(criterion)
    assert "dab_fast" not in str(vars(criterion))


def test_a_criterion_without_eps_is_served(monkeypatch):
    monkeypatch.setattr(idea_criterion, "GIOU_EPS", 0.0)
    given = case((4, 2), dtype=torch.float64)
    ours, theirs = (of_idea(*given, fast=fast) for fast in (True, False))
    for name, x in theirs[1].items():
        assert_close(ours[1][name], x, TOLERANCE[torch.float64])


def test_indices_are_returned_as_by_the_original():
    given = case((4, 0, 2))
    criterion = idea_criterion.SetCriterion(num_classes=C)
    results = [c(outputs_of(*given[:2]), given[2], return_indices=True)[1] for c in (accelerated(criterion), criterion)]
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_losses_of_a_forks_own_are_its_own():
    """Denoising losses, and those of masks, which only the last layer has."""
    logits, boxes, targets = case((4, 2))
    criterion = idea_criterion.DenoisingCriterion(num_classes=C, losses=["labels", "masks", "boxes"])
    fast = accelerated(criterion)
    outputs = outputs_of(logits, boxes) | {"pred_masks": torch.randn(2, Q, 6, 6)}
    known = (torch.randn(8, C), torch.randint(C, (8,)))
    ours, theirs = (c(outputs, targets, mask_dict={"known": known}) for c in (fast, criterion))
    assert list(ours) == list(theirs) and {"tgt_loss_ce", "loss_mask"} <= set(ours)
    for name, x in theirs.items():
        assert_close(ours[name], x, TOLERANCE[torch.float32])
    assert not fast.dab_fast_reasons


def test_settings_of_an_accelerated_criterion_are_read_anew(caplog):
    given = case((4, 2), dtype=torch.float64)
    criterion = idea_criterion.SetCriterion(num_classes=C)
    fast = accelerated(criterion)
    for c in (criterion, fast):
        c.focal_alpha, c.matcher.cost_class, c.matcher.focal_alpha = 0.4, 3.0, 0.6
    ours, theirs = (c(outputs_of(*given[:2]), given[2]) for c in (fast, criterion))
    assert not fast.dab_fast_reasons
    for name, x in theirs.items():
        assert_close(ours[name], x, TOLERANCE[torch.float64])


def hooked(criterion):
    criterion.matcher.register_forward_hook(lambda *_: None)


def other_matcher(criterion):
    criterion.matcher = OtherMatcher()


def other_loss(criterion):
    criterion.loss_boxes = lambda *_: {"loss_bbox": torch.zeros(())}


@pytest.mark.parametrize(
    "change, reason",
    [(hooked, "matcher has a hook"), (other_matcher, "finds other pairs"), (other_loss, "loss_boxes changed")],
)
def test_a_changed_criterion_steps_aside(change, reason):
    given = case((4, 2))
    criterion = idea_criterion.SetCriterion(num_classes=C)
    fast = accelerated(criterion)
    for c in (criterion, fast):
        change(c)
    ours, theirs = (c(outputs_of(*given[:2]), given[2]) for c in (fast, criterion))
    assert_same_outcome(*({name: x.detach() for name, x in found.items()} for found in (ours, theirs)))
    (found,) = fast.dab_fast_reasons
    assert reason in found


def test_restore():
    criterion = idea_criterion.SetCriterion(num_classes=C)
    matcher = criterion.matcher
    dab_fast.accelerate(criterion)
    assert criterion.matcher is matcher
    dab_fast.restore(criterion)
    assert type(criterion) is idea_criterion.SetCriterion and criterion.matcher is matcher
    assert "dab_fast" not in str(vars(criterion))
