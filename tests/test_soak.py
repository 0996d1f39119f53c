"""An accelerated model in long use: sizes at random, training and evaluation in turn, weights that an EMA moves."""

from __future__ import annotations

import copy
import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import dab_fast
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from tests.support.models import accelerated_copy, huggingface_model, images, labels, perturb_

CALLS = 1000
WARM = 200  # calls after which everything that is kept has been kept
SIZES = [(height, width) for height in (64, 80, 96) for width in (64, 96, 128)]
MOST_GROWTH = 0.05  # of the resident memory: fragments of the allocator, not a folded copy a call


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def tensors() -> int:
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def moved(model: Any, teacher: Any) -> None:
    """As an EMA does it, through `.data`: no version of a parameter tells."""
    for p, q in zip(model.parameters(), teacher.parameters(), strict=True):
        p.data.lerp_(q.data, 0.01)


@pytest.mark.sweep
def test_answers_stay_right_and_memory_flat():
    theirs = huggingface_model()
    teacher = copy.deepcopy(theirs)
    perturb_(teacher, seed=5, std=0.05)
    ours = accelerated_copy(theirs)
    draw = random.Random(0)
    before = None
    for call in range(CALLS):
        height, width = draw.choice(SIZES)
        batch = draw.choice((1, 2))
        given = images(batch, height, width, padded=batch > 1 and draw.random() < 0.5)
        training = draw.random() < 0.2
        found = []
        for model in (ours, theirs):
            model.train(training)
            torch.manual_seed(call)
            if training:
                out = model(**given, labels=labels(batch))
                out.loss.backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(p.grad, alpha=-1e-5)
                model.zero_grad()
            else:
                with torch.no_grad():
                    out = model(**given)
            found.append((out.logits.detach(), out.pred_boxes.detach()))
        if not training:
            for x, y, tolerance in zip(*found, (HIDDEN_TOLERANCE, BOX_TOLERANCE), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=tolerance, msg=lambda m, n=call: f"call {n}: {m}")
        if call % 10 == 0:
            for model in (ours, theirs):
                moved(model, teacher)
        if call % 100 == 50:  # what an optimizer's rounding pulled apart
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        del out, found
        if call == WARM:
            before = tensors(), resident()
    assert before is not None
    assert tensors() <= before[0] + 50
    assert resident() <= before[1] * (1 + MOST_GROWTH)
    assert not dab_fast.accelerate(ours).stepped_aside
