"""The box head of IDEA-Research's models: the forward of the user's model on the fused op."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

import dab_fast
from dab_fast import ops
from dab_fast.accuracy import BOX_TOLERANCE
from tests.support import idea_head
from tests.support.idea_head import COMPUTED, NOTED, Shared


@pytest.fixture
def calls(monkeypatch):
    """The calls of the op."""
    refine_boxes = mock.Mock(wraps=ops.refine_boxes)
    monkeypatch.setattr(ops, "refine_boxes", refine_boxes)
    return refine_boxes


def accelerated(model):
    ours = copy.deepcopy(model)
    report = dab_fast.accelerate(ours)
    assert report.parts[""] == ("head",)
    return ours, report


def outcome(model, x=None):
    """All that a model gives, and every gradient of a random combination of it."""
    result = model(torch.ones(idea_head.D) if x is None else x)
    values = torch.utils._pytree.tree_leaves(result)
    assert {type(value) for value in values} == {torch.Tensor}
    if not any(value.requires_grad for value in values):
        return values, []
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)
    return values, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_same(ours, theirs):
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=BOX_TOLERANCE)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("query_dim", [2, 4])
@pytest.mark.parametrize("model", NOTED, ids=lambda x: x.__name__)
def test_the_op_computes_the_boxes(model, query_dim, grad, calls):
    if model is idea_head.OutOfPlace and query_dim == 2:
        pytest.skip("two columns cannot be added to four")
    theirs = model(query_dim=query_dim)
    ours, report = accelerated(theirs)
    with torch.set_grad_enabled(grad):
        assert_same(outcome(ours), outcome(theirs))
    assert calls.call_count == (idea_head.L if isinstance(theirs.bbox_embed, torch.nn.ModuleList) else 1)
    assert not report.stepped_aside


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("model", COMPUTED, ids=lambda x: x.__name__)
def test_what_else_is_done_with_deltas_and_points_is_done(model, grad, calls):
    theirs = model()
    ours, report = accelerated(theirs)
    with torch.set_grad_enabled(grad):
        assert_same(outcome(ours), outcome(theirs))
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (outcome(model)[0] for model in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2e-2)  # bfloat16 has 8 bits
    assert not report.stepped_aside


def test_reference_points_of_one_layer_serve_all(calls):
    theirs = Shared(refined=False)
    ours, _ = accelerated(theirs)
    assert_same(outcome(ours), outcome(theirs))
    assert calls.call_count == 1


def test_boxes_are_float32_under_autocast():
    theirs = Shared().eval()
    ours, _ = accelerated(theirs)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(torch.ones(idea_head.D, dtype=torch.float64))["boxes"]
        with torch.autocast("cpu", torch.bfloat16):
            found, original = (model(torch.ones(idea_head.D))["boxes"] for model in (ours, theirs))
    assert (found.dtype, original.dtype) == (torch.float32, torch.bfloat16)
    assert (found - exact).abs().mean() < 0.5 * (original - exact).abs().mean()


def test_an_inverse_sigmoid_with_another_eps_is_known(monkeypatch, calls):
    original = idea_head.inverse_sigmoid
    monkeypatch.setattr(idea_head, "inverse_sigmoid", lambda x: original(x, 1e-5))
    theirs = Shared()
    ours, _ = accelerated(theirs)
    assert_same(outcome(ours), outcome(theirs))
    assert calls.call_args.kwargs["eps"] == 1e-5


def test_another_inverse_sigmoid_is_the_originals(monkeypatch, calls):
    theirs = Shared()
    ours, report = accelerated(theirs)
    monkeypatch.setattr(idea_head, "inverse_sigmoid", lambda x: torch.logit(x, 1e-3))
    assert_same(outcome(ours), outcome(theirs))
    assert "inverse_sigmoid is not" in str(report)
    assert not calls.called
    with pytest.raises(ValueError, match="inverse_sigmoid is not"):
        dab_fast.accelerate(Shared())


class Gelu(idea_head.MLP):
    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return x


CHANGES = {
    "a hook": (lambda m: m.bbox_embed.register_forward_hook(lambda *_: None), "hook"),
    "a hook on a layer": (lambda m: m.bbox_embed.layers[1].register_forward_hook(lambda *_: None), "hook"),
    "another class": (lambda m: setattr(m, "bbox_embed", Gelu(32, 32, 32, 4)), "Gelu"),
    "two layers": (lambda m: setattr(m, "bbox_embed", idea_head.MLP(32, 32, 4)), "three linear layers"),
    "narrow": (lambda m: setattr(m, "bbox_embed", idea_head.MLP(32, 16, 16, 4)), "three linear layers"),
    "without a bias": (lambda m: setattr(m.bbox_embed.layers[0], "bias", None), "bias"),
    "an instance's forward": (lambda m: setattr(m.bbox_embed, "forward", lambda x: x[..., :4]), "patched"),
    "parametrized": (lambda m: torch.nn.utils.parametrizations.weight_norm(m.bbox_embed.layers[2]), "MLP"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_box_mlp_is_the_originals(name, when, calls):
    change, reason = CHANGES[name]
    theirs = Shared()
    ours = copy.deepcopy(theirs)
    if when == "after":
        report = dab_fast.accelerate(ours)
    for model in (theirs, ours):
        torch.manual_seed(0)
        change(model)
    if when == "before":
        with pytest.raises(ValueError, match=reason):
            dab_fast.accelerate(ours)
    assert_same(outcome(ours), outcome(theirs))
    if when == "after":
        assert reason in str(report)
    assert not calls.called


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patched", [(idea_head.MLP, "forward"), (torch, "relu")], ids=["class", "function"])
def test_a_patch_of_what_the_box_mlp_calls_shows(patched, when, monkeypatch):
    theirs = Shared()
    ours = copy.deepcopy(theirs)
    original = getattr(*patched)
    if when == "after":
        dab_fast.accelerate(ours)
    monkeypatch.setattr(*patched, lambda *args: 0.5 * original(*args))
    if when == "before":
        with pytest.raises(ValueError, match="MLP"):
            dab_fast.accelerate(ours)
    assert_same(outcome(ours), outcome(theirs))


def test_what_was_changed_in_place_before_the_sigmoid_raises():
    ours, _ = accelerated(idea_head.Changing())
    with pytest.raises(RuntimeError, match="changed in place"), torch.no_grad():
        ours(torch.ones(idea_head.D))


def test_a_gradient_that_would_end_in_what_is_noted_raises():
    theirs = idea_head.ThroughAFunction()
    ours, _ = accelerated(theirs)
    with torch.no_grad():
        assert_same(outcome(ours), outcome(theirs))
    with pytest.raises(RuntimeError, match="without its head"):
        ours(torch.ones(idea_head.D))["boxes"].sum().backward()


def test_copies_and_restored_models(calls):
    theirs = Shared()
    ours, _ = accelerated(theirs)
    twin = copy.deepcopy(ours)
    assert_same(outcome(twin), outcome(theirs))
    assert calls.call_count == 1
    assert ours.bbox_embed is ours._modules["bbox_embed"]
    dab_fast.restore(ours)
    assert type(ours) is Shared
    assert_same(outcome(ours), outcome(theirs))
    assert calls.call_count == 1


def test_compiled_and_transformed_it_is_the_originals(calls):
    theirs = Shared()
    ours, report = accelerated(theirs)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(outcome(compiled), outcome(theirs))
    x, forward = torch.ones(idea_head.D), lambda model: lambda x: model(x)["boxes"]
    torch.testing.assert_close(
        *(torch.func.jacrev(forward(model))(x) for model in (ours, theirs)), rtol=1e-4, atol=1e-5
    )
    assert not calls.called
    assert not report.stepped_aside
