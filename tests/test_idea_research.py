"""The IDEA-Research decoder against a second writing of its conventions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dab_fast import idea_research, reference
from dab_fast.accuracy import HIDDEN_TOLERANCE
from dab_fast.adapters.idea_research import models
from tests.support import idea_second_writing as second
from tests.support.idea_models import (
    MASKS,
    VARIANTS,
    B,
    D,
    Gelu,
    H,
    L,
    Q,
    S,
    accelerated,
    assert_same_outputs,
    box_mlps,
    denoising_mask,
    drop_in,
    gradients,
    inputs,
    loaded_drop_in,
    oracle,
)
from tests.support.models import assert_same_gradients, perturb_


@pytest.mark.parametrize("make", [loaded_drop_in, accelerated])
@pytest.mark.parametrize(
    "variant, masks",
    [(variant, masks) for variant in VARIANTS for masks in ("none", "padded")]
    + [
        (variant, masks) for variant in ("default", "points", "keep_query_pos") for masks in ("denoising", "everything")
    ],
)
def test_parity(variant, masks, make):
    options, given_masks = VARIANTS[variant], MASKS[masks]
    query_dim = options.get("query_dim", 4)
    theirs = oracle(**options)
    ours = make(theirs, **options)
    with torch.no_grad():
        expected = theirs(**inputs(query_dim), **given_masks)
        assert_same_outputs(ours(**inputs(query_dim), **given_masks), expected)
    if len(expected[1]) > 1:
        assert (expected[1][-1] - expected[1][0]).abs().mean() > 0.01, "the boxes must move, or the test shows nothing"
    assert_same_gradients(gradients(ours, query_dim, given_masks), gradients(theirs, query_dim, given_masks))
    assert not getattr(ours, "dab_fast_reasons", None)


@pytest.mark.parametrize(
    "name", ["bbox_embed.layers.2", "norm", "layers.2.sa_qpos_proj", "layers.1.ca_kpos_proj", "layers.0.activation"]
)
def test_parity_can_fail(name):
    theirs = oracle()
    ours = loaded_drop_in(theirs)
    perturb_(ours.get_submodule(name), seed=3, std=0.05)
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_same_outputs(ours(**inputs()), theirs(**inputs()))


def test_no_box_mlp_returns_one_reference():
    ours = drop_in(bbox_embed=None)
    assert [tuple(x.shape) for x in ours(**inputs())] == [(L, B, Q, D), (1, B, Q, 4)]


def test_all_keys_masked_gives_zeros_not_nan():
    theirs = oracle()
    ours = loaded_drop_in(theirs)
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1] = True
    with torch.no_grad():
        hidden_states, references = ours(**inputs(), memory_key_padding_mask=mask)
        expected = theirs(**inputs(), memory_key_padding_mask=mask)
    assert hidden_states.isfinite().all() and references.isfinite().all()
    assert expected[0][:, 1].isnan().all()
    torch.testing.assert_close(hidden_states[:, 0], expected[0][:, 0], rtol=0, atol=HIDDEN_TOLERANCE)

    given = inputs(requires_grad=True)
    ours(**given, memory_key_padding_mask=mask)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in given.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_matching_queries_do_not_see_the_denoising_ones():
    ours = loaded_drop_in(oracle())
    given, other = inputs(), inputs()
    other["tgt"][:4] += 1
    other["refpoints_unsigmoid"][:2] -= 1
    with torch.no_grad():
        one, two = (ours(**x, tgt_mask=denoising_mask()) for x in (given, other))
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a[:, :, 4:], b[:, :, 4:], rtol=0, atol=1e-6)  # float32 sums in another order
            assert (a[:, :, :4] - b[:, :, :4]).abs().max() > 0.01
        assert (ours(**other)[0] - ours(**given)[0])[:, :, 4:].abs().max() > 0.01, "the mask must matter"


def test_parameters_come_in_the_originals_order():
    names = [name for name, _ in drop_in(bbox_embed=None).named_parameters()]
    layer = [name.removeprefix("layers.0.") for name in names if name.startswith("layers.0.") and "weight" in name]
    projections = "sa_qcontent sa_qpos sa_kcontent sa_kpos sa_v self_attn.out norm1"
    projections += " ca_qcontent ca_qpos ca_kcontent ca_kpos ca_v ca_qpos_sine cross_attn.out"
    expected = [name if name == "norm1" else f"{name}_proj" for name in projections.split()]
    assert layer == [f"{name}.weight" for name in [*expected, "linear1", "linear2", "norm2", "norm3", "activation"]]
    heads = [name for name in names if not name.startswith("layers.") and "weight" in name]
    assert [name.split(".")[0] for name in heads] == ["norm"] + [
        head for head in ("query_scale", "ref_point_head", "ref_anchor_head") for _ in range(2)
    ]
    assert "layers.1.ca_qpos_proj.weight" not in names


def test_dropout_is_the_one_rate_everywhere(monkeypatch):
    ours = drop_in(dropout=0.25).train()
    rates = []

    def recording(dropout):
        def record(x, p=0.5, training=True):
            rates.append((p, training))
            return dropout(x, p, training)

        return record

    for place, name in ((nn.functional, "dropout"), (torch, "native_dropout")):
        monkeypatch.setattr(place, name, recording(getattr(place, name)))
    ours(**inputs())
    assert set(rates) == {(0.25, True)} and len(rates) == 6 * L
    first, second_ = (ours(**inputs())[0] for _ in range(2))
    assert (first - second_).abs().max() > 0
    torch.testing.assert_close(ours.eval()(**inputs())[0], ours(**inputs())[0], rtol=0, atol=0)


def test_dropout_follows_the_modules():
    theirs = oracle(dropout=0.5)
    ours = loaded_drop_in(theirs, dropout=0.5).train()
    for layer in ours.layers:
        layer.self_attn.dropout = layer.cross_attn.dropout = 0.0
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    with torch.no_grad():
        assert_same_outputs(ours(**inputs()), theirs(**inputs()))
    ours.layers[1].dropout2.p = 0.5
    with pytest.raises(RuntimeError, match="dropout rates differ"):
        ours(**inputs())


def test_subclass_deepcopy_pickle_and_compile():
    class Mine(idea_research.TransformerDecoder):
        def forward(self, *args, **kwargs):
            return [x * 2 for x in super().forward(*args, **kwargs)]

    theirs = oracle(num_layers=2)
    ours = loaded_drop_in(theirs, num_layers=2)
    with torch.no_grad():
        expected = ours(**inputs())
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_same_outputs(other(**inputs()), expected)
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert_same_outputs(compiled(**inputs()), expected)
        ours.__class__ = Mine
        torch.testing.assert_close(ours(**inputs())[0], 2 * expected[0])


def test_half_and_autocast():
    """At most twice the specification's own error in bfloat16."""
    ours = loaded_drop_in(oracle()).requires_grad_(False)
    exact = ours(**inputs())

    def check(given):
        found = ours(**given)
        assert found[1].dtype == torch.float32
        tensors = (given[name].transpose(0, 1) for name in ("tgt", "memory", "pos", "refpoints_unsigmoid"))
        specified = reference.decode(*models.read(ours), *tensors)
        for got, theirs, want in zip(found, specified, exact, strict=True):
            assert got.isfinite().all() and got.dtype == theirs.dtype
            assert (got - want).abs().max() <= 2 * (theirs - want).abs().max()

    with torch.autocast("cpu", torch.bfloat16):
        check(inputs())
    ours.bfloat16()
    check({name: x.bfloat16() for name, x in inputs().items()})


def layer(**options):
    return idea_research.TransformerDecoderLayer(D, H, 48, **options)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: layer(rm_self_attn_decoder=True), "rm_self_attn_decoder must be False"),
        (lambda: layer(activation="glu"), "activation must be one of"),
        (lambda: idea_research.TransformerDecoderLayer(30, 4), "d_model must be a multiple of 4"),
        (lambda: idea_research.TransformerDecoder(layer(), L, nn.LayerNorm(D), d_model=D), "return_intermediate"),
        (lambda: idea_research.TransformerDecoder(layer(), L, None, True, d_model=D), "norm must be a LayerNorm"),
        (lambda: idea_research.TransformerDecoder(layer(), L, nn.LayerNorm(64), True, d_model=64), "d_model must be"),
        (
            lambda: idea_research.TransformerDecoder(layer(), L, nn.LayerNorm(D), True, D, 2, modulate_hw_attn=True),
            "modulate_hw_attn must be False",
        ),
        (lambda: drop_in(query_scale_type="cond"), "query_scale_type must be one of"),
        (lambda: drop_in(query_dim=3), "query_dim must be 2 or 4"),
        (
            lambda: idea_research.TransformerDecoder(layer(keep_query_pos=True), L, nn.LayerNorm(D), True, D),
            "keep_query_pos must be True",
        ),
    ],
)
def test_unsupported_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tgt": torch.zeros(Q, B, D + 4)}, ValueError, r"tgt must have shape \[Q, B, 32\], got \[7, 2, 36\]"),
        ({"memory": torch.zeros(S, B + 1, D)}, ValueError, r"memory must have shape \[S, 2, 32\]"),
        ({"pos": None}, TypeError, "pos must be a Tensor, got NoneType"),
        ({"pos": torch.zeros(S, 1, D)}, ValueError, "pos must have shape"),
        ({"refpoints_unsigmoid": torch.zeros(Q, B, 2)}, ValueError, "refpoints_unsigmoid must have shape"),
        ({"tgt_mask": torch.zeros(Q, Q)}, ValueError, "tgt_mask must be bool, True = hidden, got torch.float32"),
        ({"tgt_mask": torch.zeros(B, Q, Q).bool()}, ValueError, r"tgt_mask must have shape \[8, 7, 7\]"),
        ({"memory_key_padding_mask": torch.zeros(S, B).bool()}, ValueError, "memory_key_padding_mask must have shape"),
        ({"memory": torch.zeros(S, B, D).double()}, TypeError, "memory must be torch.float32"),
    ],
)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        drop_in()(**(inputs() | change))


def test_drop_in_refuses_what_it_cannot_read():
    ours = drop_in()
    ours.bbox_embed = Gelu(D, D, D, 4)
    with pytest.raises(RuntimeError, match=r"bbox_embed is a .*Gelu"):
        ours(**inputs())
    ours.bbox_embed = second.ReluMLP(D, D, 4)
    with pytest.raises(RuntimeError, match="three linear layers"):
        ours(**inputs())
    ours.bbox_embed = box_mlps("per_layer", L)
    with pytest.raises(RuntimeError, match="bbox_embed_diff_each_layer is False"):
        ours(**inputs())
    ours.bbox_embed = None
    ours.layers[1].linear1.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"layers\.1\.linear1 has a hook"):
        ours(**inputs())
