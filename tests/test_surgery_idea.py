"""Surgery on IDEA-Research decoders and forks, and what surrounds accelerate: defaults, dropout, tools."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import dab_fast
from dab_fast import measure
from tests.support import idea_second_writing as second
from tests.support.idea_models import D, H, L, Q, inputs
from tests.support.models import assert_same_gradients, huggingface_model
from tests.support.surgery import (
    WHEN,
    Change,
    accelerate,
    assert_same,
    attempt,
    cases,
    check,
    enter,
    huggingface_decoder,
    idea,
    mlp,
    run_huggingface_decoder,
    run_idea_decoder,
)
from tests.test_surgery import layers, setting

pytestmark = pytest.mark.usefixtures("float64")


def rewritten(kind: type, old: str, new: str) -> type:
    """A fork: the class with one piece of its source exchanged."""
    source = inspect.getsource(kind)
    assert old in source
    namespace = dict(vars(second))
    exec(source.replace(old, new), namespace)
    return namespace[kind.__name__]


def becomes(path: str, kind: type) -> Any:
    return lambda d: setattr(d.get_submodule(path), "__class__", kind)


def head(path: str, *widths: int) -> Any:
    return lambda d: setattr(d, path, mlp(getattr(d, path), *widths))


class ScaledLayer(second.TransformerDecoderLayer):
    def forward(self, *args):
        return super().forward(*args) * 1.1


class ScaledAttention(second.Attention):
    def forward(self, *args):
        return super().forward(*args) * 1.1


class FlaggedLayer(second.TransformerDecoderLayer):
    scale = 1.0

    def forward(self, *args):
        return super().forward(*args) * self.scale


class FlaggedAttention(second.Attention):
    scale = 1.0

    def forward(self, *args):
        return super().forward(*args) * self.scale


def flagged(d: Any) -> None:
    """A fork whose flags are off: it computes what the original computes."""
    for layer in d.layers:
        layer.__class__, layer.cross_attn.__class__ = FlaggedLayer, FlaggedAttention


def patch_instance(path: str) -> Any:
    def apply(d: Any) -> None:
        module = d.get_submodule(path)
        found = module.forward
        module.forward = lambda *args: found(*args) * 1.1

    return apply


def query_position_in_layer_1(d: Any) -> None:
    d.layers[1].ca_qpos_proj, d.layers[1].keep_query_pos = nn.Linear(D, D), True


CHANGED = [
    Change("query_scale_of_3", head("query_scale", D, D, D, D), "query_scale"),
    Change("ref_point_head_of_3", head("ref_point_head", 2 * D, D, D, D), "ref_point_head"),
    Change("ref_anchor_head_of_3", head("ref_anchor_head", D, D, D, 2), "ref_anchor_head"),
    Change("ref_anchor_head_of_1", head("ref_anchor_head", D, 2), "ref_anchor_head"),
    Change("ref_point_head_wider", head("ref_point_head", 2 * D, 40, D), "ref_point_head"),
    Change("bbox_embed_of_2", head("bbox_embed", D, D, 4), "bbox_embed"),
    Change("bbox_embed_of_4", head("bbox_embed", D, D, D, D, 4), "bbox_embed"),
    Change("bbox_embed_of_5_outputs", head("bbox_embed", D, D, D, 5), "bbox_embed"),
    Change("layer_class", becomes("layers.1", ScaledLayer), "layers.1"),
    Change("first_layer_class", becomes("layers.0", ScaledLayer), "layers.0"),
    Change("every_layer_class", lambda d: [becomes(f"layers.{i}", ScaledLayer)(d) for i in range(L)], "layers"),
    Change("attention_class", becomes("layers.1.cross_attn", ScaledAttention), "cross_attn"),
    Change(
        "every_attention_class",
        lambda d: [becomes(f"layers.{i}.cross_attn", ScaledAttention)(d) for i in range(L)],
        "cross_attn",
    ),
    Change("layer_patched", patch_instance("layers.1"), "layers.1"),
    Change("attention_patched", patch_instance("layers.1.self_attn"), "self_attn"),
    Change("heads", setting("layers.1.self_attn.num_heads", 2), "heads"),
    Change("keep_query_pos_of_one", query_position_in_layer_1, "keep_query_pos"),
    Change("layers_reversed", layers(lambda x: x[::-1]), "layers"),
    Change("first_layer_dropped", layers(lambda x: x[1:]), "layers"),
    Change("layers_doubled", layers(lambda x: [*x, *copy.deepcopy(x)]), "layers"),
    Change("layers_shared", layers(lambda x: [x[0], x[1], x[1]]), "layers"),
    Change("norm_eps", setting("norm.eps", 0.1), "norm"),
    Change("activation", setting("layers.1.activation", nn.PReLU(48)), "activation"),
    Change("d_model", setting("d_model", 16), "d_model"),
    Change("query_scale_type", setting("query_scale_type", "fix_elewise"), "query_scale"),
    Change("modulation_off", setting("modulate_hw_attn", False), "ref_anchor_head"),
    Change("box_mlp_off", setting("bbox_embed", None), "bbox_embed", served=True),
]


@WHEN
@cases(*CHANGED)
def test_changed_decoders(change, when):
    check(idea(), run_idea_decoder, change, when)


@cases(
    Change("layer_flag", setting("layers.1.scale", 1.1), "layers.1"),
    Change("attention_flag", setting("layers.1.cross_attn.scale", 1.1), "cross_attn"),
    Change("flag_of_the_class", lambda d: None, "FlaggedLayer"),
)
def test_flags_of_a_layer_after_accelerate(change, monkeypatch):
    base = copy.deepcopy(idea())
    flagged(base)
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    reasons = accelerate(ours)
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
    if change.name == "flag_of_the_class":
        monkeypatch.setattr(FlaggedLayer, "scale", 1.1)
    for decoder in (theirs, ours):
        change.apply(decoder)
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
    assert change.named in reasons() or "layers" in reasons()


@WHEN
@pytest.mark.parametrize("kind", ["TransformerDecoderLayer", "Attention", "TransformerDecoder", "ReluMLP"])
def test_patched_classes(kind, when, monkeypatch):
    owner = getattr(second, kind)
    theirs, ours = copy.deepcopy(idea()), copy.deepcopy(idea())
    found, reasons = owner.forward, enter(ours, run_idea_decoder, when)

    def forward(self, *args, **kwargs):
        out = found(self, *args, **kwargs)
        return [x * 1.1 for x in out] if isinstance(out, list) else out * 1.1

    monkeypatch.setattr(owner, "forward", forward)
    reasons = reasons or accelerate(ours)
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
    assert reasons()


@WHEN
@pytest.mark.parametrize("name", ["point_features", "logit_1e3"])
def test_patched_functions(name, when, monkeypatch):
    theirs, ours = copy.deepcopy(idea()), copy.deepcopy(idea())
    found, reasons = getattr(second, name), enter(ours, run_idea_decoder, when)
    monkeypatch.setattr(second, name, lambda *args: found(*args) * 1.1)
    reasons = reasons or accelerate(ours)
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
    assert reasons()


BoxesUnbounded = rewritten(second.TransformerDecoder, "+ logit_1e3(boxes))", "+ 2 * logit_1e3(boxes))")
NormsBoxInput = rewritten(second.TransformerDecoder, "mlp(x)[..., ", "mlp(self.norm(x))[..., ")


@pytest.mark.parametrize("kind", [BoxesUnbounded, NormsBoxInput])
def test_a_head_assigned_later_to_a_fork(kind):
    """Without a head the fork computes what the original computes; what it does with one was never compared."""
    theirs = copy.deepcopy(idea(bbox_embed=None))
    theirs.__class__ = kind
    ours = copy.deepcopy(theirs)
    reasons = accelerate(ours)
    theirs.bbox_embed = copy.deepcopy(idea().bbox_embed)
    ours.bbox_embed = copy.deepcopy(idea().bbox_embed)
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
    assert "bbox_embed" in reasons()


ANCHORS = "boxes = torch.sigmoid(refpoints_unsigmoid)"
FORKS = {
    "without_detach": ("boxes.detach()", "boxes"),
    "detached_content": ("x = layer(\n                x,", "x = layer(\n                x.detach(),"),
    "detached_first_anchors": (ANCHORS, "boxes = torch.sigmoid(refpoints_unsigmoid).detach()"),
    "detached_sine": ("features = point_features(boxes, half)", "features = point_features(boxes.detach(), half)"),
    "detached_memory": ("x, half = tgt,", "memory = memory.detach()\n        x, half = tgt,"),
    "branches_on_requires_grad": (
        "x, half = tgt,",
        "tgt = tgt * 2 if tgt.requires_grad else tgt\n        x, half = tgt,",
    ),
    "branches_on_grad_mode": (
        "x, half = tgt,",
        "tgt = tgt * 2 if torch.is_grad_enabled() else tgt\n        x, half = tgt,",
    ),
    "branches_on_a_frozen_parameter": (
        "x, half = tgt,",
        "tgt = tgt * 2 if self.norm.weight.requires_grad else tgt\n        x, half = tgt,",
    ),
    "more_outputs_in_training": (
        "return [torch.stack(all_states)",
        "all_states = all_states * (2 if self.training else 1)\n        return [torch.stack(all_states)",
    ),
    "branches_on_a_layers_training": (
        "x, half = tgt,",
        "tgt = tgt * 2 if self.layers[1].training else tgt\n        x, half = tgt,",
    ),
    "scaled_gradient": (
        "all_states.append(self.norm(x))",
        "all_states.append(self.norm(2 * x - x.detach()))",
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fork", FORKS)
def test_forks_whose_gradients_or_modes_differ(fork, training):
    theirs = copy.deepcopy(idea()).train(training)
    theirs.__class__ = rewritten(second.TransformerDecoder, *FORKS[fork])
    ours = copy.deepcopy(theirs)
    reasons = accelerate(ours)
    for mode in (training, not training):
        assert_same(attempt(run_idea_decoder, ours.train(mode)), attempt(run_idea_decoder, theirs.train(mode)))
    assert reasons()


def dropping(codebase: str) -> nn.Module:
    """A decoder with dropout everywhere; its parameters are perturbed."""
    if codebase == "idea":
        return copy.deepcopy(idea(dropout=0.5))
    rates = dict(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5)
    return huggingface_model(**rates).model.decoder


def frozen_layers(d: Any) -> None:
    d.train()
    d.layers.eval()


def one_frozen_layer(d: Any) -> None:
    d.train()
    d.layers[0].eval()


def dropout_modules_only(d: Any) -> None:
    d.eval()
    for module in d.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def attention_only(d: Any) -> None:
    d.eval()
    for layer in d.layers:
        getattr(layer.cross_attn, "cross_attn", layer.cross_attn).train()


def all_but_the_decoder(d: Any) -> None:
    d.train()
    d.training = False


def the_decoder_alone(d: Any) -> None:
    d.eval()
    d.training = True


def one_block(d: Any) -> None:
    d.eval()
    getattr(d.layers[1], "mlp", d.layers[1]).train()


@pytest.mark.parametrize("codebase", ["huggingface", "idea"])
@WHEN
@pytest.mark.parametrize(
    "modes",
    [
        frozen_layers,
        one_frozen_layer,
        dropout_modules_only,
        attention_only,
        all_but_the_decoder,
        the_decoder_alone,
        one_block,
    ],
)
def test_dropout_asks_the_module_that_drops(codebase, modes, when):
    run = run_idea_decoder if codebase == "idea" else run_huggingface_decoder
    theirs = dropping(codebase).train()
    ours = copy.deepcopy(theirs)
    entered = enter(ours, run, when)
    for decoder in (theirs, ours):
        modes(decoder)
    if entered is None:
        accelerate(ours)

    def spread(decoder: nn.Module) -> float:
        torch.manual_seed(0)
        one, *others = (run(decoder, False) for _ in range(6))
        return max((x - other[name]).abs().max().item() for other in others for name, x in one.items())

    expected = spread(theirs)
    assert (spread(ours) > 0) == (expected > 0)
    if expected == 0:
        assert_same(attempt(run, ours), attempt(run, theirs))


@pytest.mark.parametrize("training", [False, True])
def test_one_frozen_layer_drops_in_the_others_alone(training):
    """With the first layer's rates alone the variance comes from it alone, so freezing it stops all of it."""
    theirs = copy.deepcopy(idea(dropout=0.5)).train()
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    for decoder in (theirs, ours):
        for layer in decoder.layers[1:]:
            layer.eval()
        decoder.layers[0].train(training)
    states = [[run_idea_decoder(d, False)["out0"] for _ in range(2)] for d in (theirs, ours)]
    assert [(a != b).any().item() for a, b in states] == [training, training]


OTHER_ARGUMENTS = "refpoints_unsigmoid=None,\n    ):"
IGNORING = rewritten(
    second.TransformerDecoder,
    OTHER_ARGUMENTS,
    "level_start_index=None, spatial_shapes=None, valid_ratios=None, " + OTHER_ARGUMENTS,
)
NO_FLAG = rewritten(
    second.TransformerDecoder,
    "self.bbox_embed[number] if self.bbox_embed_diff_each_layer else self.bbox_embed",
    "self.bbox_embed",
)


def without_flag(d: Any) -> None:
    del d.bbox_embed_diff_each_layer
    d.__class__ = NO_FLAG


@pytest.mark.parametrize("change", [becomes("", IGNORING), without_flag])
def test_forks_with_the_same_maths_are_served(change):
    theirs = copy.deepcopy(idea())
    change(theirs)
    ours = copy.deepcopy(theirs)
    reasons = accelerate(ours)
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
    if type(theirs) is IGNORING:
        more = dict(level_start_index=torch.zeros(1), spatial_shapes=torch.ones(1, 2), valid_ratios=None)
        with torch.no_grad():
            torch.testing.assert_close(ours(**inputs(), **more), theirs(**inputs(), **more), rtol=0, atol=2e-5)
    assert not reasons()


DEFAULTS: dict[str, Any] = {
    "float64": lambda: _default(torch.set_default_dtype, torch.get_default_dtype(), torch.float64),
    "float16": lambda: _default(torch.set_default_dtype, torch.get_default_dtype(), torch.float16),
    "meta_device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "one_thread": nullcontext,
    "anomaly_detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


class _default:
    def __init__(self, set_it: Any, was: Any, value: Any) -> None:
        self.set_it, self.was, self.value = set_it, was, value

    def __enter__(self) -> None:
        self.set_it(self.value)

    def __exit__(self, *error: Any) -> None:
        self.set_it(self.was)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("codebase", ["huggingface", "idea"])
@pytest.mark.parametrize("default", DEFAULTS)
def test_accelerate_under_torchs_global_defaults(default, codebase):
    base, run = (idea(), run_idea_decoder) if codebase == "idea" else (huggingface_decoder(), run_huggingface_decoder)
    ours = copy.deepcopy(base)
    with DEFAULTS[default]():
        reasons = accelerate(ours)
    assert not reasons()
    assert_same(attempt(run, ours), attempt(run, copy.deepcopy(base)))
    assert not reasons()


@pytest.mark.parametrize("codebase", ["huggingface", "idea"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accelerate_a_model_of_another_dtype(dtype, codebase):
    ours = copy.deepcopy(idea() if codebase == "idea" else huggingface_decoder()).to(dtype)
    assert not accelerate(ours)()


@pytest.mark.parametrize("codebase", ["huggingface", "idea"])
def test_accelerate_leaves_random_state_gradients_and_weights(codebase):
    ours = copy.deepcopy(idea(dropout=0.1) if codebase == "idea" else huggingface_decoder()).train()
    for p in ours.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    modes, versions = [m.training for m in ours.modules()], [p._version for p in ours.parameters()]
    state = torch.get_rng_state()
    accelerate(ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in ours.modules()] == modes and [p._version for p in ours.parameters()] == versions
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name]) and torch.equal(p.grad, torch.ones_like(p))


class BreaksUnderFunctionModes(second.Attention):
    """As the attention of the real repository, which hands itself to whatever overrides torch's functions."""

    def forward(self, q, *args):
        if torch.overrides.has_torch_function((q,)):
            return torch.overrides.handle_torch_function(self.forward, (q,), q, *args, unknown=True)
        return super().forward(q, *args)


def test_measure_counts_what_breaks_under_a_function_mode():
    decoder = copy.deepcopy(idea())
    with torch.no_grad():
        expected = measure.count(lambda: decoder(**inputs()))
        for layer in decoder.layers:
            layer.self_attn.__class__ = layer.cross_attn.__class__ = BreaksUnderFunctionModes
        found = measure.count(lambda: decoder(**inputs()))
    assert found.aten == expected.aten and found.syncs == expected.syncs


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_variants_do_not_step_aside_in_training(dropout):
    from tests.support.idea_models import VARIANTS, oracle

    for name, variant in VARIANTS.items():
        decoder = oracle(dropout=dropout, **variant).train()
        expected = attempt(run_idea_decoder, copy.deepcopy(decoder))
        reasons = accelerate(decoder)
        found = attempt(run_idea_decoder, decoder)
        assert not reasons(), name
        assert found.outputs["out0"].shape == (decoder.num_layers, 2, Q, D) and found.error is None
        if dropout == 0:
            assert_same_gradients(found.gradients, expected.gradients)


def test_instances_of_one_class_with_other_numbers_of_heads():
    """What is known of one instance says nothing about another."""
    first, second_ = copy.deepcopy(idea()), copy.deepcopy(idea())
    for layer in second_.layers:
        layer.nhead = layer.self_attn.num_heads = layer.cross_attn.num_heads = H // 2
    for theirs in (first, second_):
        ours = copy.deepcopy(theirs)
        dab_fast.accelerate(ours)
        assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))


def test_an_activation_that_is_exchanged_after_a_call_is_seen():
    """gelu is a builtin, and no function of Python."""
    theirs, ours = copy.deepcopy(idea(activation="gelu")), copy.deepcopy(idea(activation="gelu"))
    accelerate(ours)
    attempt(run_idea_decoder, ours)
    for decoder in (theirs, ours):
        for layer in decoder.layers:
            layer.activation = torch.nn.functional.relu
    assert_same(attempt(run_idea_decoder, ours), attempt(run_idea_decoder, theirs))
