"""`accelerate` under torch's global defaults and modes: what a probe makes for itself is its own business."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dab_fast.adapters import _probe
from dab_fast.adapters.idea_research import models
from tests.support.surgery import (
    accelerate,
    assert_same,
    attempt,
    huggingface_decoder,
    idea,
    run_huggingface_decoder,
    run_idea_decoder,
)

pytestmark = pytest.mark.usefixtures("float64")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Any] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "detect_anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("codebase", ["huggingface", "idea"])
@pytest.mark.parametrize("default", DEFAULTS)
def test_accelerate_under_torchs_global_defaults(default, codebase):
    base, run = (idea(), run_idea_decoder) if codebase == "idea" else (huggingface_decoder(), run_huggingface_decoder)
    ours = copy.deepcopy(base)
    dtype = torch.get_default_dtype()
    forget()
    with DEFAULTS[default]():
        given = torch.get_default_dtype()
        reasons = accelerate(ours)
        assert torch.get_default_dtype() == given
    assert not reasons() and torch.get_default_dtype() == dtype
    assert_same(attempt(run, ours), attempt(run, copy.deepcopy(base)))
    assert not reasons()


@pytest.mark.parametrize("default", ["float64", "meta", "autocast", "inference_mode"])
def test_an_mlp_is_looked_at_anew_under_torchs_global_defaults(default):
    """The first call in training asks about MLPs whose flag is another."""
    ours = copy.deepcopy(idea())
    reasons = accelerate(ours)
    forget()
    with DEFAULTS[default]():
        assert models.is_relu_mlp(ours.ref_point_head)
    assert not reasons()


def forget() -> None:
    """What earlier tests found out."""
    models._IS_RELU_MLP.clear()
    _probe.parameter_shapes.cache_clear()
