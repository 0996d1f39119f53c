"""Changes that users make to a model, and whether the accelerated model still answers as the original does.

The original is a copy that `accelerate` never sees. Both get the same change, and must then give the same outputs and
gradients, raise both, or both vary; a reason that the report gives must name what was changed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dab_fast
from tests.support import idea_models
from tests.support.models import HIDDEN_TOLERANCE, assert_same_gradients, huggingface_model, images, perturb_

# Before accelerate, after it, and after a call that was served fast, which leaves a watch behind.
MOMENTS = ("before", "after", "after a call")
WHEN = pytest.mark.parametrize("when", MOMENTS)


@dataclass(frozen=True)
class Change:
    """One change: `apply` edits a model in place, and `named` must be part of the reason, if there is one."""

    name: str
    apply: Callable[[Any], None]
    named: str
    matters: bool = True  # it changes what the original computes, or the test shows nothing
    padded: bool = False
    served: bool = False  # the fast path computes this, so it must not step aside


def cases(*changes: Change) -> Any:
    return pytest.mark.parametrize("change", changes, ids=lambda change: change.name)


@dataclass
class Ran:
    """What a run gave: outputs and gradients by name, or the exception."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    error: Exception | None = None


Runner = Callable[..., dict[str, Tensor]]  # (module, padded) to outputs; inputs that take gradients are under "d_"


def attempt(run: Runner, module: nn.Module, *, padded: bool = False) -> Ran:
    """Outputs, and the gradients of a random combination of them."""
    try:
        outputs = run(module, padded)
        leaves = {name: x for name, x in outputs.items() if name.startswith("d_")}
        outputs = {name: x for name, x in outputs.items() if name not in leaves}
        leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(3)
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs.values())
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except Exception as error:
        return Ran({}, {}, error)
    return Ran({name: x.detach() for name, x in outputs.items()}, dict(zip(leaves, found, strict=True)))


def huggingface() -> Any:
    return _huggingface(torch.get_default_dtype())


@functools.cache
def _huggingface(dtype: torch.dtype) -> Any:
    return huggingface_model()


def huggingface_decoder() -> Any:
    return huggingface().model.decoder


def idea(**variant: Any) -> nn.Module:
    return _idea(torch.get_default_dtype(), **variant)


@functools.cache
def _idea(dtype: torch.dtype, **variant: Any) -> nn.Module:
    return idea_models.oracle(**variant)


def run_model(model: Any, padded: bool) -> dict[str, Tensor]:
    out = model(**images(padded=padded), return_dict=True)
    return {name: out[name] for name in ("logits", "pred_boxes", "last_hidden_state")}


def run_huggingface_decoder(decoder: Any, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    b, q, s, d = 2, 5, 6, decoder.config.hidden_size
    shapes = {"inputs_embeds": (b, q, d), "encoder_hidden_states": (b, s, d), "object_queries": (b, s, d)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["query_position_embeddings"] = torch.randn(b, q, 4, generator=generator)
    given["query_position_embeddings"][:, 0, 0] = -13.0  # where the eps of the inverse sigmoid shows
    given = {name: x.requires_grad_() for name, x in given.items()}
    mask = torch.arange(s).expand(b, s) < torch.tensor([[s], [s - 2]]) if padded else None
    out = decoder(**given, memory_key_padding_mask=mask)
    if isinstance(out, tuple):
        named = {f"out{i}": x for i, x in enumerate(out) if isinstance(x, Tensor)}
    else:
        keys = ("last_hidden_state", "intermediate_hidden_states", "reference_points")
        named = {key: out[key] for key in keys}
    return named | {f"d_{name}": x for name, x in given.items()}


def run_idea_decoder(decoder: Any, padded: bool) -> dict[str, Tensor]:
    given = idea_models.inputs(decoder.query_dim, requires_grad=True)
    out = decoder(**given, **idea_models.MASKS["padded" if padded else "none"])
    return {f"out{i}": x for i, x in enumerate(out)} | {f"d_{name}": x for name, x in given.items()}


def accelerate(model: nn.Module) -> Callable[[], str]:
    """Accelerates; the function returned says every reason so far for which a module was not, or stepped aside."""
    try:
        report = dab_fast.accelerate(model)
    except ValueError as error:
        reason = str(error)
        if "model must contain" not in reason:
            raise
        return lambda: reason
    return lambda: "; ".join(
        [f"{name}: {reason}" for name, reason in report.not_replaced.items()]
        + [f"{name}: {reason}" for name, reasons in report.stepped_aside.items() for reason in reasons]
    )


def enter(model: nn.Module, run: Runner, when: str, *, padded: bool = False) -> Callable[[], str] | None:
    """What comes before a change: nothing, `accelerate`, or `accelerate` and a call. Returns as `accelerate` does."""
    if when == "before":
        return None
    reasons = accelerate(model)
    if when == "after a call":
        attempt(run, model, padded=padded)
        assert not reasons()
    return reasons


def check(base: nn.Module, run: Runner, change: Change, when: str) -> None:
    """The accelerated model with `change` made `when` answers as the original does, and any reason names the change."""
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    torch.manual_seed(0)
    change.apply(theirs)
    reasons = enter(ours, run, when, padded=change.padded)
    torch.manual_seed(0)
    change.apply(ours)
    reasons = reasons or accelerate(ours)
    expected = attempt(run, theirs, padded=change.padded)
    if change.matters and expected.error is None:
        assert differ(expected, unchanged(base, run, change.padded)), (
            "the change must matter, or the test shows nothing"
        )
    assert_same(attempt(run, ours, padded=change.padded), expected)
    if change.served:
        assert not reasons()
    if expected.error is None and reasons():
        assert change.named in reasons() or "differ" in reasons(), reasons()  # a probe says by how much, not where


@functools.cache
def unchanged(base: nn.Module, run: Runner, padded: bool) -> Ran:
    return attempt(run, copy.deepcopy(base), padded=padded)


def differ(one: Ran, two: Ran) -> bool:
    try:
        assert_same(one, two)
    except AssertionError:
        return True
    return False


def assert_same(ours: Ran, theirs: Ran) -> None:
    if theirs.error is not None:
        assert ours.error is not None, f"the original raises {theirs.error!r}"
        return
    if ours.error is not None:
        raise AssertionError(f"the original runs, ours raises {ours.error!r}") from ours.error
    assert ours.outputs.keys() == theirs.outputs.keys()
    for name, x in theirs.outputs.items():
        assert ours.outputs[name].shape == x.shape, f"{name}: {list(ours.outputs[name].shape)}, not {list(x.shape)}"
        torch.testing.assert_close(
            ours.outputs[name],
            x,
            rtol=0,
            atol=HIDDEN_TOLERANCE,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert_same_gradients(ours.gradients, theirs.gradients)


def mlp(module: Any, *widths: int) -> nn.Module:
    """An MLP of the kind of `module`, with other widths and every parameter random."""
    new = copy.deepcopy(module)
    new.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
    if hasattr(module, "num_layers"):
        new.num_layers = len(widths) - 1
    perturb_(new, seed=4)
    return new
