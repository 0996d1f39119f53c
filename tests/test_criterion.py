"""Parity of the criterion with Hugging Face's loss and IDEA-Research's `SetCriterion`: pairs, losses, gradients."""

from __future__ import annotations

import os
from typing import NamedTuple
from unittest import mock

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._dynamo.utils import counters as dynamo_counters
from transformers.loss import loss_deformable_detr, loss_for_object_detection

import dab_fast
from dab_fast import measure
from dab_fast.adapters.huggingface import criterion as huggingface
from dab_fast.parameters import StepAside
from dab_fast.parts import matching
from tests.support import idea_criterion
from tests.support.criterion import (
    CODEBASES,
    SIZES,
    TOLERANCE,
    C,
    accelerated,
    assert_close,
    assert_same_outcome,
    case,
    config,
    of_huggingface,
    outputs_of,
)
from tests.support.models import accelerated_copy, huggingface_model, images, labels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("codebase", CODEBASES.values(), ids=CODEBASES)
def test_losses_and_gradients(codebase, sizes, dtype):
    logits, boxes, targets = case(sizes, dtype=dtype)
    ours, theirs = (codebase(logits, boxes, targets, fast=fast)[:2] for fast in (True, False))
    assert list(ours[1]) == list(theirs[1])
    for name, x in theirs[1].items():
        assert_close(ours[1][name], x, TOLERANCE[dtype])
    assert_close(ours[0], theirs[0], TOLERANCE[dtype])
    for a, b in zip(*(torch.autograd.grad(x[0], (logits, boxes)) for x in (ours, theirs)), strict=True):
        assert_close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize("codebase", CODEBASES.values(), ids=CODEBASES)
def test_gradient_of_each_loss_and_of_the_targets(codebase):
    logits, boxes, targets = case((4, 2), dtype=torch.float64)
    leaves = [logits, boxes, *(target["boxes"].requires_grad_() for target in targets)]
    ours, theirs = (codebase(logits, boxes, targets, fast=fast)[1] for fast in (True, False))
    for name, x in theirs.items():
        if x.requires_grad:
            found = (torch.autograd.grad(y, leaves, retain_graph=True, materialize_grads=True) for y in (ours[name], x))
            for a, b in zip(*found, strict=True):
                assert_close(a, b, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "change",
    [
        {"class_cost": 3, "bbox_cost": 0, "giou_cost": 7},
        {"bbox_loss_coefficient": 7, "giou_loss_coefficient": 3},
        {"focal_alpha": 0.6},
        {"focal_alpha": -1.0},
        {"auxiliary_loss": False},
    ],
    ids=str,
)
def test_settings_of_huggingface(change):
    given = (*case((4, 2), dtype=torch.float64), config(**change))
    ours, theirs = (of_huggingface(*given, fast=fast) for fast in (True, False))
    assert list(ours[1]) == list(theirs[1])
    assert_close(ours[0], theirs[0], TOLERANCE[torch.float64])
    assert (ours[2] is None) == (theirs[2] is None)
    for a, b in zip(ours[2] or (), theirs[2] or (), strict=True):
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def found_and_least_cost(logits, boxes, targets, pairs):
    """Of every layer and image, in float64: what the found pairs cost, and what the best do."""
    give = {"class_weight": 2.0, "bbox_weight": 5.0, "giou_weight": 2.0, "alpha": 0.25, "giou_eps": 0.0}
    wide = [x.detach().double() for x in (logits, boxes)]
    objects = matching.objects_of(targets, "labels", logits, boxes)
    objects = objects._replace(boxes=objects.boxes.double())
    costs = matching._pair_costs(*wide, objects, matching.Costs(**give)).numpy()
    for layer, row in enumerate(pairs):
        start = 0
        for size, (queries, chosen) in zip(objects.sizes, row, strict=True):
            matrix = costs[start : start + size, layer].T
            best = matrix[linear_sum_assignment(matrix)].sum()
            yield matrix[queries, chosen].sum(), best
            start += size


def theirs_pairs(logits, boxes, targets):
    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(2.0, 5.0, 2.0)
    given = [{"class_labels": x["labels"], "boxes": x["boxes"]} for x in targets]
    return [matcher({"logits": x, "pred_boxes": y}, given) for x, y in zip(logits, boxes, strict=True)]


def ours_pairs(logits, boxes, targets):
    objects = matching.objects_of(targets, "labels", logits, boxes)
    return matching.match(logits, boxes, objects, matching.Costs(2.0, 5.0, 2.0, 0.25, 0.0)).pairs


@pytest.mark.parametrize("seed", range(20))
def test_pairs(seed):
    """The same as the original's, 640 assignments in all."""
    given = case((7, 0, 1, 30, 12, 3, 5, 2), layers=4, queries=25, classes=7, seed=seed)
    for ours, theirs in zip(ours_pairs(*given), theirs_pairs(*given), strict=True):
        for (a, b), (c, d) in zip(ours, theirs, strict=True):
            assert np.array_equal(a, c) and np.array_equal(b, d)


def test_ties():
    """Queries and objects that are twice the same: any pairs of least cost are right."""
    logits, boxes, targets = case((6, 4), layers=4)
    with torch.no_grad():
        logits[:, :, 1::2], boxes[:, :, 1::2] = logits[:, :, ::2].clone(), boxes[:, :, ::2].clone()
        for target in targets:
            for x in target.values():
                x[1::2] = x[::2].clone()
    ours, theirs = ours_pairs(logits, boxes, targets), theirs_pairs(logits, boxes, targets)
    eps = torch.finfo(torch.float64).eps
    for found, best in found_and_least_cost(logits, boxes, targets, ours):
        assert abs(found - best) <= 4 * eps * abs(best)
    differ = sum(
        not np.array_equal(a, c) or not np.array_equal(b, d)
        for x, y in zip(ours, theirs, strict=True)
        for (a, b), (c, d) in zip(x, y, strict=True)
    )
    assert differ == 0  # costs that are equal there are equal here


def broken(what):
    logits, boxes, targets = case((4, 2))
    with torch.no_grad():
        if what == "nan_logit":
            logits[1, 0, 3, 2] = float("nan")
        elif what == "nan_center":
            boxes[1, 0, 3, 0] = float("nan")
        elif what == "nan_size_of_the_last_layer":
            boxes[-1, 1, 3, 3] = float("nan")
        elif what == "inverted_box":
            boxes[0, 1, 3, 2] = -0.1
        elif what == "inverted_target":
            targets[1]["boxes"][1, 3] = -0.1
        elif what == "infinite_box":
            boxes[0, 1, 3, 2] = float("inf")
        elif what == "center_outside":
            targets[0]["boxes"][0, 0] = -0.1
        elif what == "no_such_label":
            targets[0]["labels"][0] = C
        elif what == "negative_label":
            targets[0]["labels"][0] = -1
        elif what == "a_target_too_few":
            targets.pop()
        elif what == "boxes_without_labels":
            targets[0]["labels"] = targets[0]["labels"][1:]
        elif what == "labels_of_int32":
            targets[0]["labels"] = targets[0]["labels"].int()
    return logits, boxes, targets


def outcome(run):
    try:
        return {name: x.detach() for name, x in run().items()}
    except Exception as error:
        return type(error), str(error)


BROKEN = (
    "nan_logit",
    "nan_center",
    "nan_size_of_the_last_layer",
    "inverted_box",
    "inverted_target",
    "infinite_box",
    "center_outside",
    "no_such_label",
    "negative_label",
    "a_target_too_few",
    "boxes_without_labels",
    "labels_of_int32",
)


@pytest.mark.parametrize("what", BROKEN)
def test_what_the_original_refuses_or_replaces_is_left_to_it(what):
    logits, boxes, targets = broken(what)
    criterion = idea_criterion.SetCriterion(num_classes=C)
    fast = accelerated(criterion)
    ours, theirs = (outcome(lambda c=c: c(outputs_of(logits, boxes), targets)) for c in (fast, criterion))
    assert_same_outcome(ours, theirs)
    if what != "no_such_label":  # both raise while they look the costs up
        assert fast.dab_fast_reasons.total() == 1
        with pytest.raises(StepAside):
            of_huggingface(logits, boxes, targets, fast=True)


@pytest.mark.parametrize("what", ["inverted", "nan"])
def test_a_whole_model_raises_what_the_original_raises(what):
    model = huggingface_model()
    fast = accelerated_copy(model)
    given = labels()
    given[1]["boxes"][0, 2] = -0.1 if what == "inverted" else float("nan")
    with pytest.raises(ValueError, match="boxes2 must be in") as theirs:
        model(**images(), labels=given)
    with pytest.raises(ValueError, match="boxes2 must be in") as ours:
        fast(**images(), labels=given)
    assert str(ours.value) == str(theirs.value)
    (reason,) = fast.dab_fast_reasons
    assert "not finite" in reason


def exact(logits, boxes, targets, codebase):
    """In float64, of the same numbers."""
    wide = [{name: x.double() if x.is_floating_point() else x for name, x in t.items()} for t in targets]
    return codebase(logits.double(), boxes.double(), wide, fast=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codebase", CODEBASES.values(), ids=CODEBASES)
def test_half_precision(codebase, dtype):
    """Under autocast, as the originals run: against float64, ours errs no more than they do, and as float32 does."""
    logits, boxes, targets = case((4, 2), dtype=dtype)
    right = exact(logits, boxes, targets, codebase)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = (codebase(logits, boxes, targets, fast=fast) for fast in (True, False))
    for name, x in right[1].items():
        a, b = (abs(found[1][name].double() - x).item() for found in (ours, theirs))
        assert a <= max(b, TOLERANCE[torch.float32] * abs(x.item())), name
    gradients = [torch.autograd.grad(x[0], (logits, boxes)) for x in (ours, theirs, right)]
    for a, b, x in zip(*gradients, strict=True):
        a, b = ((y.double() - x.double()).norm() for y in (a, b))
        # Each gradient is rounded to half precision where it is handed on, in sums whose order is not theirs.
        assert a <= 1.1 * b + torch.finfo(dtype).eps / 2 * x.double().norm()


def test_a_loss_of_ones_own_wins():
    fast = accelerated_copy(huggingface_model())
    fast.loss_function = lambda logits, *_, **__: (logits.sum(), {"own": logits.sum()}, None)
    assert list(fast(**images(), labels=labels()).loss_dict) == ["own"]
    assert list(fast.dab_fast_reasons) == ["loss_function is not transformers' own for DAB-DETR"]


PATCHES = {
    "matcher": (loss_deformable_detr.DeformableDetrHungarianMatcher, "forward"),
    "matcher_class": (loss_deformable_detr, "DeformableDetrHungarianMatcher"),
    "criterion_class": (loss_deformable_detr, "DeformableDetrImageLoss"),
    "loss_boxes": (loss_for_object_detection.ImageLoss, "loss_boxes"),
    "loss_labels": (loss_deformable_detr.DeformableDetrImageLoss, "loss_labels"),
    "box_iou": (loss_for_object_detection, "box_iou"),
    "focal": (loss_deformable_detr, "sigmoid_focal_loss"),
    "assignment": (loss_deformable_detr, "linear_sum_assignment"),
    "aux": (loss_deformable_detr, "_set_aux_loss"),
}


@pytest.mark.parametrize("where", PATCHES.values(), ids=PATCHES)
def test_what_is_patched_runs(where):
    """And the fast loss comes back with the original."""
    owner, name = where
    fast = accelerated_copy(huggingface_model())
    original, called = getattr(owner, name), []

    def patched(*args, **kwargs):
        called.append(name)
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, patched):
        fast(**images(), labels=labels())
    (reason,) = fast.dab_fast_reasons
    assert called and reason.endswith(f"{name} is patched")
    fast(**images(), labels=labels())
    assert fast.dab_fast_reasons.total() == 1


def test_counts():
    """Of the losses and their backward, six layers: what a GPU would launch, and where the host would wait for it."""
    given = case((7, 3), layers=6, queries=30, classes=9)
    counts = {}
    for name, settings in (
        ("huggingface", config(num_labels=9, decoder_layers=6)),
        ("idea", idea_criterion.SetCriterion(num_classes=9)),
    ):
        for fast in (True, False):
            other = accelerated(settings) if fast and name == "idea" else settings

            def step(fast=fast and name == "huggingface", name=name, other=other):
                CODEBASES[name](*given, other, fast=fast)[0].backward()

            counts[name, fast] = measure.count(step)
    assert counts["huggingface", True].syncs.total() == 1
    assert counts["idea", True].syncs.total() == 2  # the original itself reads the number of boxes
    for name in CODEBASES:
        assert counts[name, False].syncs.total() > 80
        assert counts[name, True].aten.total() < counts[name, False].aten.total() / 6


def test_losses_may_be_changed_in_place():
    """As the originals', which are no views."""
    logits, boxes, targets = case((4, 2))
    for codebase in CODEBASES.values():
        total, losses, *_ = codebase(logits, boxes, targets, fast=True)
        before = {name: x.item() for name, x in losses.items()}
        losses["loss_ce"].mul_(2)
        losses["cardinality_error_0"].mul_(2)
        for name, x in losses.items():
            assert x.item() == before[name] * (2 if name in ("loss_ce", "cardinality_error_0") else 1)
        total.backward()


def test_compiled_model_breaks_no_more_graphs_than_the_original():
    """In training with a loss, over two shapes; the losses and gradients are the original's."""
    model = huggingface_model(decoder_layers=2)
    expected, found = (two_compiled_steps(x) for x in (model, accelerated_copy(model)))
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            torch.testing.assert_close(x, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    assert found.breaks <= expected.breaks
    assert found.graphs <= expected.graphs


class Compiled(NamedTuple):
    steps: list[dict[str, Tensor]]  # the losses and one gradient of each
    breaks: int
    graphs: int


def two_compiled_steps(model):
    torch.compiler.reset()
    dynamo_counters.clear()
    compiled = torch.compile(model, backend="eager")
    steps = []
    for given in (images(), images(2, 64, 96)):
        model.zero_grad()
        outputs = compiled(**given, labels=labels())
        outputs.loss.backward()
        steps.append(outputs.loss_dict | {"loss": outputs.loss, "gradient": model.class_embed.weight.grad.clone()})
    return Compiled(steps, sum(dynamo_counters["graph_break"].values()), dynamo_counters["stats"]["unique_graphs"])


def two_processes(rank, store, results):
    """Each has other numbers of objects, so that their mean is neither's; rank 1 steps aside from its second call."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({name: str(x) for name, x in names.items()})  # accelerate asks for these
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    accelerate.PartialState(cpu=True, backend="gloo")
    given = case(((4, 2), (0, 1))[rank], dtype=torch.float64)
    fast = accelerated(idea_criterion.SetCriterion(num_classes=C))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        for call in range(2):
            if call == 1 and rank == 1:
                fast.matcher.register_forward_hook(lambda *_: None)
            found = [
                of_huggingface(*given, fast=True)[1],
                fast(outputs_of(*given[:2]), given[2]),
                of_huggingface(*given, fast=False)[1],
                idea_criterion.SetCriterion(num_classes=C)(outputs_of(*given[:2]), given[2]),
            ]
            for ours, theirs in zip(found[:2], found[2:], strict=True):
                for name, x in theirs.items():
                    assert_close(ours[name], x, TOLERANCE[torch.float32])  # the count of boxes is float32
    results[rank] = (reduced.call_count, fast.dab_fast_reasons.total())
    dist.destroy_process_group()


def test_the_number_of_boxes_is_averaged_over_processes_once_a_call(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(two_processes, (tmp_path / "store", results), nprocs=2)
        assert dict(results) == {0: (8, 0), 1: (8, 1)}


def test_the_criterion_is_a_part_to_be_chosen(monkeypatch):
    model, given = huggingface_model(), images()
    expected = model(**given, labels=labels()).loss
    calls = []
    known = huggingface.loss
    monkeypatch.setattr(huggingface, "loss", lambda *args: calls.append(args) or known(*args))
    for parts, called in ((("head",), 0), (("head", "criterion"), 1)):
        dab_fast.accelerate(model, parts=parts)
        assert model(**given, labels=labels()).loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert len(calls) == called
    with pytest.raises(ValueError, match="must contain"):
        dab_fast.accelerate(huggingface_model(), parts=("criterion",))
