"""accelerate() on models with an IDEA-Research decoder, which it knows by structure and by what they compute."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import dab_fast
from dab_fast.accuracy import BOX_TOLERANCE
from tests.support import idea_second_writing as second
from tests.support.idea_models import (
    D,
    Gelu,
    L,
    Q,
    accelerated,
    assert_same_outputs,
    box_mlps,
    denoising_mask,
    drop_in,
    inputs,
    oracle,
)
from tests.support.models import replicate


class Model(nn.Module):
    """What stands around the decoder in the original: the head shares the decoder's box MLP."""

    def __init__(self, **variant):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.decoder = oracle(**variant)
        self.bbox_embed = self.transformer.decoder.bbox_embed

    def forward(self, **given):
        hidden_states, references = self.transformer.decoder(**given)
        return torch.sigmoid(self.bbox_embed(hidden_states) + second.logit_1e3(references))


def test_accelerate_model_restore_and_twice():
    model = Model()
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(**inputs())
        report = dab_fast.accelerate(model)
        assert list(report.replaced) == ["transformer.decoder"] and not report.not_replaced
        decoder = model.transformer.decoder
        assert isinstance(decoder, second.TransformerDecoder) and type(decoder) is not second.TransformerDecoder
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(**inputs()), expected, rtol=0, atol=BOX_TOLERANCE)
        fast = type(decoder)
        assert type(dab_fast.accelerate(model).replaced["transformer.decoder"]) is fast
        dab_fast.restore(model)
        assert type(decoder) is second.TransformerDecoder
        torch.testing.assert_close(model(**inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_the_originals_and_a_deepcopy_is_fast(protocol, caplog):
    theirs = oracle()
    ours = accelerated(theirs)
    pickled = pickle.dumps(ours, protocol)
    assert b"dab_fast" not in pickled and "pickled as the original" in caplog.text
    saved = io.BytesIO()
    torch.save(ours, saved, pickle_protocol=protocol)
    saved.seek(0)
    twin = copy.deepcopy(ours)
    assert type(twin) is type(ours)
    for other in (twin, pickle.loads(pickled), torch.load(saved, weights_only=False)):
        assert other is twin or type(other) is type(theirs)
        with torch.no_grad():
            assert_same_outputs(other(**inputs()), theirs(**inputs()))


def float_mask(decoder):
    mask = denoising_mask()
    return {"tgt_mask": torch.zeros(Q, Q).masked_fill(mask, -torch.inf)}


def hook(decoder):
    decoder.layers[1].ca_v_proj.register_forward_hook(lambda module, args, output: output * 0.5)
    return {}


class LowRank(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1 * x


def low_rank(decoder):
    decoder.layers[0].sa_v_proj.__class__ = LowRank
    return {}


@pytest.mark.parametrize(
    "change, reason",
    [
        (float_mask, "tgt_mask is torch.float32, not bool"),
        (hook, "layers.1.ca_v_proj has a hook or a patched forward"),
        (low_rank, "layers.0.sa_v_proj is a tests.test_idea_accelerate.LowRank"),
    ],
)
def test_steps_aside(change, reason, caplog):
    theirs = oracle()
    ours = accelerated(theirs)
    change(theirs)
    given = change(ours)
    with torch.no_grad():
        for _ in range(2):
            # Bitwise: it is the original forward that runs.
            torch.testing.assert_close(ours(**inputs(), **given), theirs(**inputs(), **given), rtol=0, atol=0)
    assert ours.dab_fast_reasons == {reason: 2}
    assert caplog.messages == [f"TransformerDecoder takes its original forward: {reason}"]


class Fork(second.TransformerDecoder):
    """A decoder with the same parameters that computes something else; `change` is a module-level patch."""

    def forward(self, *args, **kwargs):
        was = {name: getattr(second, name) for name in self.change}
        try:
            for name, value in self.change.items():
                setattr(second, name, value)
            return super().forward(*args, **kwargs)
        finally:
            for name, value in was.items():
                setattr(second, name, value)


def other_eps(p):
    return torch.logit(p, 1e-5)


def other_features(points, width, features=second.point_features):
    """x before y."""
    y, x, *size = features(points, width).split(width, -1)
    return torch.cat([x, y, *size], -1)


class Refusing(second.TransformerDecoder):
    def forward(self, tgt, memory, spatial_shapes):
        raise AssertionError


class Giving(second.TransformerDecoder):
    """Gives `give(*what the decoder gives)`."""

    def forward(self, *args, **kwargs):
        return self.give(*super().forward(*args, **kwargs))


def giving(give):
    decoder = oracle()
    decoder.__class__, decoder.give = Giving, give
    return decoder


def fork(**change):
    decoder = oracle()
    decoder.__class__, decoder.change = Fork, change
    return decoder


def edited(edit):
    decoder = oracle()
    edit(decoder)
    return decoder


@pytest.mark.parametrize(
    "decoder, reason",
    [
        (lambda: fork(logit_1e3=other_eps), "are not what the original computes"),
        (lambda: fork(point_features=other_features), "hidden states are not what the original computes"),
        (lambda: edited(lambda d: setattr(d, "__class__", Refusing)), "its forward raises TypeError"),
        (lambda: giving(lambda h, r: (h, r, h)), "gives something else than hidden states and reference points"),
        (lambda: giving(lambda h, r: (h, None)), "gives something else"),
        (lambda: giving(lambda h, r: {"hidden_states": h, "reference_points": r}), "gives something else"),
        (lambda: giving(lambda h, r: h), "gives something else"),
        (lambda: giving(lambda h, r: (h, r.detach())), "its gradient of .* is not what the original computes"),
        (lambda: giving(lambda h, r: (h.detach(), r.detach())), "its gradient of .* is not what the original computes"),
        (lambda: edited(lambda d: setattr(d, "bbox_embed", Gelu(D, D, D, 4))), "bbox_embed is a .*Gelu"),
        (lambda: edited(lambda d: d.layers[1].add_module("adapter", nn.Linear(D, D))), "has no layers.1.adapter.bias"),
        (lambda: edited(lambda d: d.layers[1].register_parameter("gate", nn.Parameter(torch.ones(D)))), "layers.1 is"),
        (lambda: edited(lambda d: setattr(d.layers[1], "activation", nn.Tanh())), "activation is a .*Tanh"),
        (lambda: edited(lambda d: setattr(d.layers[1], "linear2", nn.Linear(48, D + 4))), "linear2.weight must have"),
        (lambda: edited(lambda d: d.to("meta")), "on the meta device"),
        (lambda: edited(lambda d: setattr(d, "forward", d.forward)), "its forward is patched"),
        (lambda: drop_in(), "fast already"),
    ],
)
def test_what_accelerate_leaves_alone(decoder, reason):
    model = nn.ModuleDict({"decoder": decoder(), "good": oracle()})
    before = type(model["decoder"]), dict(model["decoder"].__dict__)
    report = dab_fast.accelerate(model)
    assert list(report.replaced) == ["good"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.not_replaced["decoder"])
    assert (type(model["decoder"]), model["decoder"].__dict__) == before


def test_accelerate_calls_no_hook():
    decoder, calls = oracle(), []
    decoder.register_forward_hook(lambda module, args, output: calls.append(output))
    decoder.bbox_embed.register_forward_pre_hook(lambda module, args: calls.append(args))
    with pytest.raises(ValueError, match="bbox_embed has a hook"):
        dab_fast.accelerate(decoder)
    decoder.bbox_embed._forward_pre_hooks.clear()
    dab_fast.accelerate(decoder)
    assert not calls
    decoder(**inputs())
    assert len(calls) == 1, "a hook on the decoder itself stays"


def test_accelerate_draws_no_random_numbers():
    decoder = oracle()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dab_fast.accelerate(decoder)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


class Overridable(second.TransformerDecoder):
    """The repository's attention tells function modes of itself, and forgets an argument on the way."""

    def forward(self, *args, **kwargs):
        if torch.overrides.has_torch_function((self.norm.weight,)):
            raise TypeError("unsupported operand type(s) for //: 'NoneType' and 'int'")
        return super().forward(*args, **kwargs)


def test_the_probe_is_no_function_mode():
    decoder = oracle()
    decoder.__class__ = Overridable
    assert list(dab_fast.accelerate(decoder).replaced) == [""]


def test_a_default_device_does_not_keep_a_decoder_from_being_probed():
    torch.set_default_device("meta")
    try:
        assert list(dab_fast.accelerate(oracle_on_the_cpu()).replaced) == [""]
    finally:
        torch.set_default_device(None)


def oracle_on_the_cpu():
    with torch.device("cpu"):
        return oracle()


def test_accelerate_reads_zeroed_box_layers_and_eval_of_a_training_model():
    """A fresh model's last box layer is zero: the probe must still see it, and leave mode and weights alone."""
    decoder = oracle(dropout=0.1).train()
    nn.init.zeros_(decoder.bbox_embed.layers[-1].weight)
    weights = {name: p.clone() for name, p in decoder.named_parameters()}
    dab_fast.accelerate(decoder)
    assert decoder.training
    for name, p in decoder.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=0, atol=0)


def test_box_mlp_assigned_after_accelerate():
    theirs = oracle(bbox_embed=None)
    ours = accelerated(theirs)
    theirs.bbox_embed = box_mlps("shared", L)
    ours.bbox_embed = copy.deepcopy(theirs.bbox_embed)
    with torch.no_grad():
        assert_same_outputs(ours(**inputs()), theirs(**inputs()))


def test_data_parallel_replicas_and_compile():
    theirs = oracle()
    ours = accelerated(theirs)
    replica = replicate(ours)
    assert not list(replica.parameters())
    with torch.no_grad():
        expected = theirs(**inputs())
        assert_same_outputs(replica(**inputs()), expected)
        assert_same_outputs(torch.compile(ours, fullgraph=True, backend="eager")(**inputs()), expected)
    assert not replica.dab_fast_reasons and not ours.dab_fast_reasons


class DroppingMLP(second.ReluMLP):
    """A relu MLP in eval mode only."""

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = nn.functional.dropout(layer(x).relu(), 0.5, self.training)
        return self.layers[-1](x)


class ScaledMemory(second.TransformerDecoder):
    def forward(self, tgt, memory, **more):
        return super().forward(tgt, memory * 0.5 if self.training else memory, **more)


class SkippingLayers(second.TransformerDecoder):
    """So seldom that no comparison of a few results would see it."""

    def forward(self, *args, **kwargs):
        states, references = super().forward(*args, **kwargs)
        return [states * 2 if self.training and torch.rand(()) < 1e-9 else states, references]


class Alternating(second.TransformerDecoder):
    def forward(self, *args, **kwargs):
        states, references = super().forward(*args, **kwargs)
        self.calls = getattr(self, "calls", 0) + self.training
        return [states * 2 if self.calls > 1 else states, references]


def test_what_only_training_does_is_seen():
    def with_class(kind):
        return edited(lambda d: setattr(d, "__class__", kind))

    for decoder, reason in (
        (with_class(ScaledMemory), "hidden states are not what the original computes in training"),
        (with_class(SkippingLayers), "draws random numbers in training with every dropout rate at 0"),
        (with_class(Alternating), "hidden states are not what the original computes in training"),
        (edited(lambda d: setattr(d.ref_point_head, "__class__", DroppingMLP)), "ref_point_head is a .*DroppingMLP"),
    ):
        for training in (False, True):
            with pytest.raises(ValueError, match=reason):
                dab_fast.accelerate(decoder.train(training))


def test_dropout_does_not_keep_a_decoder_from_being_recognised():
    theirs = oracle(dropout=0.5).train()
    ours = accelerated(theirs)
    first, second_ = (ours(**inputs())[0] for _ in range(2))
    assert (first - second_).abs().max() > 0.1 and not ours.dab_fast_reasons
    assert ours.layers[0].dropout1.p == ours.layers[0].self_attn.dropout == 0.5


def test_a_box_mlp_that_drops_only_in_training():
    """Assigned after accelerate: what differs in training is not the original's in any mode."""
    theirs = oracle()
    ours = accelerated(theirs)
    ours.bbox_embed = DroppingMLP(D, D, D, 4)
    with torch.no_grad():
        ours.eval()(**inputs())
        ours.train()(**inputs())
    assert all("bbox_embed is a tests.test_idea_accelerate.DroppingMLP" in reason for reason in ours.dab_fast_reasons)
    assert ours.dab_fast_reasons.total() == 2


class Scaling(second.TransformerDecoder):
    """Takes an argument and has a flag that the original does not have."""

    double = False

    def forward(self, *args, scale=1.0, **kwargs):
        states, references = super().forward(*args, **kwargs)
        return [states * scale * (2 if self.double else 1), references]


def scaling():
    return edited(lambda d: setattr(d, "__class__", Scaling))


def test_an_argument_of_its_own_steps_aside():
    theirs = scaling()
    ours = accelerated(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs(), scale=2.0), theirs(**inputs(), scale=2.0), rtol=0, atol=0)
    assert ours.dab_fast_reasons == {"the original takes no scale": 1}


def test_a_flag_that_changes_after_accelerate_steps_aside():
    theirs = scaling()
    ours = accelerated(theirs)
    again = copy.deepcopy(ours)
    theirs.double = True
    for decoder in (ours, again, replicate(ours)):
        decoder.double = True
        with torch.no_grad():
            torch.testing.assert_close(decoder(**inputs()), theirs(**inputs()), rtol=0, atol=0)
        assert [reason.partition(",")[0] for reason in decoder.dab_fast_reasons] == ["double changed"]
        decoder.dab_fast_reasons.clear()
    del ours.double
    ours.train()(**inputs())
    assert not ours.dab_fast_reasons
    ours.double = True
    dab_fast.accelerate(ours)
    ours(**inputs())
    assert ours.dab_fast_reasons, "accelerating twice does not ask again what was compared once"


class Switched(second.ReluMLP):
    """The same class with and without relus."""

    linear = False

    def forward(self, x):
        if not self.linear:
            return super().forward(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_one_class_with_two_behaviours():
    theirs = oracle()
    theirs.bbox_embed = Switched(D, D, D, 4)
    ours = accelerated(theirs)
    with torch.no_grad():
        ours(**inputs())
        assert not ours.dab_fast_reasons
        ours.bbox_embed.linear = theirs.bbox_embed.linear = True
        torch.testing.assert_close(ours(**inputs()), theirs(**inputs()), rtol=0, atol=0)
    (reason,) = ours.dab_fast_reasons
    assert reason == "bbox_embed is a tests.test_idea_accelerate.Switched"
