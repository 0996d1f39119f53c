"""DabDecoder and the specification: against each other, in every dtype, and on the properties both must have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dab_fast import DabDecoder, DecoderConfig, reference
from dab_fast.accuracy import HIDDEN_TOLERANCE
from dab_fast.decoder.forward import decode, predict_boxes
from dab_fast.measure import saved_bytes
from tests.support.models import assert_same_gradients, perturb_

VARIANTS = {
    "default": {},
    "points": {"query_dim": 2, "modulate_hw_attn": False},
    "no_modulation": {"modulate_hw_attn": False},
    "cond_scalar": {"query_scale_type": "cond_scalar"},
    "fix_elewise": {"query_scale_type": "fix_elewise"},
    "keep_query_pos": {"keep_query_pos": True},
    "box_mlp_per_layer": {"bbox_embed": "per_layer"},
    "no_box_mlp": {"bbox_embed": None},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
    "selu": {"activation": "selu"},
    "temperature": {"temperature": 20.0},
}


def generator(number: int) -> torch.Generator:
    """One that gives the same numbers at every call, others for another --seed."""
    return torch.Generator().manual_seed(1000 * torch.initial_seed() + number)


def decoder(**config) -> DabDecoder:
    torch.manual_seed(torch.initial_seed())  # the same parameters at every call
    model = DabDecoder(**({"d_model": 32, "nhead": 2, "num_layers": 3, "dim_feedforward": 48} | config))
    perturb_(model, torch.initial_seed())
    return model


def arguments(config: DecoderConfig, b=2, q=5, s=12, dtype=torch.float32) -> tuple[Tensor, ...]:
    numbers = generator(1)
    d = config.d_model
    shapes = (b, q, d), (b, s, d), (b, s, d), (b, q, config.query_dim)
    return tuple(torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in shapes)


def masks(kind: str, config: DecoderConfig, b=2, q=5, s=12) -> dict[str, Tensor]:
    numbers = generator(2)
    hide = lambda *shape: torch.rand(shape, generator=numbers) < 0.3  # noqa: E731
    return {
        "none": {},
        "padding": {"memory_key_padding_mask": hide(b, s)},
        "all_padded": {"memory_key_padding_mask": torch.tensor([[False] * s, [True] * s])},
        "self_2d": {"tgt_mask": hide(q, q)},
        "self_3d": {"tgt_mask": hide(b * config.nhead, q, q), "memory_key_padding_mask": hide(b, s)},
    }[kind]


@pytest.mark.parametrize("mask", ["none", "padding", "all_padded", "self_2d", "self_3d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_specification(variant, mask):
    """In float64 the rewritings differ from the specification by rounding alone; gradients of all inputs too."""
    model = decoder(**VARIANTS[variant]).double()
    config, kwargs = model.config, masks(mask, model.config)
    params = dict(model.named_parameters())
    inputs = [x.requires_grad_() for x in arguments(config, dtype=torch.float64)]

    def gradients(out, boxes):
        loss = (
            out.hidden_states.sin().sum() + out.reference_points.square().sum() + (0 if boxes is None else boxes.sum())
        )
        leaves = {**params, **{f"input{i}": x for i, x in enumerate(inputs)}}
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))

    ours = model(*inputs, **kwargs)
    theirs = reference.decode(params, config, *inputs, **kwargs)
    has_boxes = config.bbox_embed is not None
    our_boxes = predict_boxes(params, *ours, eps=config.inverse_sigmoid_eps) if has_boxes else None
    their_boxes = reference.predict_boxes(params, *theirs, eps=config.inverse_sigmoid_eps) if has_boxes else None
    for a, b in zip((*ours, our_boxes), (*theirs, their_boxes), strict=True):
        if a is not None:
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert_same_gradients(gradients(ours, our_boxes), gradients(theirs, their_boxes))


@pytest.mark.parametrize("variant", ["default", "points", "keep_query_pos"])
def test_query_first(variant):
    model = decoder(**VARIANTS[variant])
    twin = DabDecoder(model.config, batch_first=False)
    twin.load_state_dict(model.state_dict())
    inputs = arguments(model.config)
    mask = masks("padding", model.config)
    ours = twin(*(x.transpose(0, 1) for x in inputs), **mask)
    spec = reference.decode(
        dict(model.named_parameters()), model.config, *(x.transpose(0, 1) for x in inputs), **mask, batch_first=False
    )
    for a, b, c in zip(ours, model(*inputs, **mask), spec, strict=True):
        torch.testing.assert_close(a.transpose(1, 2), b)
        torch.testing.assert_close(a, c, rtol=0, atol=HIDDEN_TOLERANCE)


def test_one_pos_for_all_images_and_spatial_shape():
    model = decoder().double()
    params = dict(model.named_parameters())
    h, w, half = 3, 4, model.config.d_model // 2
    content, memory, _, anchors = arguments(model.config, s=h * w, dtype=torch.float64)
    rows, columns = torch.randn(h, 1, half).double(), torch.randn(1, w, half).double()
    pos = torch.cat((rows.expand(h, w, half), columns.expand(h, w, half)), -1).reshape(1, h * w, 2 * half)
    expected = reference.decode(params, model.config, content, memory, pos.expand(2, -1, -1), anchors)
    for shape in (None, (h, w)):
        out, _ = decode(params, model.config, content, memory, pos, anchors, spatial_shape=shape)
        torch.testing.assert_close(out.hidden_states, expected.hidden_states, rtol=0, atol=1e-12)


def test_gradient_is_cut_between_the_layers():
    """reference_points[l] is refined by layer l - 1's box MLP, attached, from anchors that are not."""
    model = decoder(bbox_embed="per_layer", num_layers=4)
    references = model(*arguments(model.config)).reference_points
    for layer in range(4):
        for k, box_mlp in enumerate(model.bbox_embed):
            grads = torch.autograd.grad(
                references[layer].sum(), list(box_mlp.parameters()), retain_graph=True, allow_unused=True
            )
            size = max(0.0 if g is None else g.abs().max().item() for g in grads)
            assert (size > 0) == (k == layer - 1), (layer, k)


def test_gradient_cut_of_the_shared_box_mlp(monkeypatch):
    """A layer reads its anchors detached: the gradient is the specification's, and not the one without the cut."""
    model = decoder()
    params = dict(model.named_parameters())
    inputs = arguments(model.config)

    def gradient(output):
        return torch.autograd.grad(output.reference_points.sum(), params["bbox_embed.layers.2.bias"])[0]

    ours = gradient(model(*inputs))
    torch.testing.assert_close(ours, gradient(reference.decode(params, model.config, *inputs)))
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)
    uncut = gradient(reference.decode(params, model.config, *inputs))
    assert (ours - uncut).norm() > 0.01 * ours.norm()


@pytest.mark.parametrize("variant", ["default", "points", "fix_elewise", "box_mlp_per_layer"])
def test_recompute(variant):
    """The same numbers from the layers' inputs alone, dropout's included."""
    model = decoder(**VARIANTS[variant], dropout=0.2, activation_dropout=0.1, attention_dropout=0.1).train()
    grads, kept = [], []
    for model.recompute in (False, True):
        torch.manual_seed(3)
        kept.append(saved_bytes(lambda: model(*arguments(model.config, s=200)), model.parameters()))
        torch.manual_seed(3)
        out = model(*arguments(model.config, s=200))
        model.zero_grad()
        (out.hidden_states.sin().sum() + out.reference_points.sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(*grads)
    assert kept[1] < 0.5 * kept[0]


def test_learned_anchors_stay_attached_in_the_first_layer():
    model = decoder()
    content, memory, pos, anchors = arguments(model.config)
    anchors.requires_grad_()
    hidden_states = model(content, memory, pos, anchors).hidden_states
    assert torch.autograd.grad(hidden_states[-1].sum(), anchors)[0].abs().max() > 0


@pytest.mark.parametrize("variant", ["default", "points", "box_mlp_per_layer"])
def test_gradcheck(variant):
    model = decoder(**VARIANTS[variant], d_model=8, nhead=2, num_layers=2, dim_feedforward=4).double()
    inputs = [x.requires_grad_() for x in arguments(model.config, q=2, s=3, dtype=torch.float64)]
    # The gradient of the second layer's inputs is cut on purpose, so only attached outputs are checked:
    # the first layer's hidden states and the refinement of a_0.
    assert torch.autograd.gradcheck(lambda *args: model(*args).hidden_states[0], inputs, eps=1e-6)


@settings(max_examples=12, deadline=None)
@given(
    b=st.integers(0, 3),
    q=st.sampled_from([0, 1, 2, 7, 37, 300, 301]),
    hw=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    head=st.sampled_from([16, 32, 64]),
    padded=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(b, q, hw, head, padded, seed):
    """In float64: ill-conditioned draws (a tiny width, a large logit) would otherwise test rounding, not shapes."""
    model = decoder(d_model=2 * head, nhead=2, num_layers=2, dim_feedforward=16).double()
    s = hw[0] * hw[1]
    inputs = arguments(model.config, b, q, s, torch.float64)
    mask = torch.rand(b, s, generator=torch.Generator().manual_seed(seed)) < 0.5 if padded else None
    with torch.no_grad():
        ours = model(*inputs, memory_key_padding_mask=mask)
        theirs = reference.decode(dict(model.named_parameters()), model.config, *inputs, memory_key_padding_mask=mask)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.reference_points, theirs.reference_points, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = decoder()
    inputs = arguments(model.config)
    params = {name: p.to(dtype) for name, p in model.named_parameters()}
    with torch.no_grad():
        exact = reference.decode(dict(model.named_parameters()), model.config, *inputs)
        spec = reference.decode(params, model.config, *(x.to(dtype) for x in inputs))
        ours = copy.deepcopy(model).to(dtype)(*(x.to(dtype) for x in inputs))
    assert ours.hidden_states.dtype == dtype and ours.reference_points.dtype == torch.float32
    error, spec_error = ((x.reference_points - exact.reference_points).abs().mean() for x in (ours, spec))
    assert error <= 2 * spec_error


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_boxes_stay_finite(dtype, autocast):
    """1 / w reaches 1e13 here: far outside float16."""
    model = decoder().to(torch.float32 if autocast else dtype)
    inputs = [x.to(torch.float32 if autocast else dtype) for x in arguments(model.config)]
    inputs[3] = inputs[3].float() - 30
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        out = model(*inputs)
        spec = reference.decode(dict(model.named_parameters()), model.config, *inputs)
    for x in (*out, *spec):
        assert x.isfinite().all()
    out.hidden_states.float().sum().backward()
    if dtype != torch.float16:
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_export_with_dynamic_batch_and_size():
    model = decoder().eval()
    b, s = torch.export.Dim("b"), torch.export.Dim("s")
    inputs = arguments(model.config)
    dynamic = ({0: b}, {0: b, 1: s}, {0: b, 1: s}, {0: b})
    exported = torch.export.export(model, inputs, dynamic_shapes=dynamic).module()
    for shape in ((2, 5, 12), (3, 5, 35)):
        x = arguments(model.config, *shape)
        for a, e in zip(exported(*x), model(*x), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("recompute", [False, True])
def test_compile_without_graph_breaks(backend, recompute):
    model = decoder(num_layers=2)
    model.recompute = recompute
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 5, 12), (3, 7, 35)):
        inputs = arguments(model.config, *shape)
        mask = masks("padding", model.config, *shape)
        results = [m(*inputs, **mask) for m in (compiled, model)]
        torch.testing.assert_close(*(r.hidden_states for r in results), rtol=0, atol=HIDDEN_TOLERANCE)
        grads = [
            torch.autograd.grad(r.hidden_states.sum(), list(model.parameters()), allow_unused=True) for r in results
        ]
        names = [name for name, _ in model.named_parameters()]
        assert_same_gradients(*(dict(zip(names, g, strict=True)) for g in grads))


def test_pickle_deepcopy_and_state_dict():
    model = decoder()
    inputs = arguments(model.config)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(*inputs), model(*inputs))
    fresh = DabDecoder(model.config)
    fresh.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(fresh(*inputs), model(*inputs))


def test_a_fresh_box_mlp_moves_no_box():
    references = DabDecoder(num_layers=3, d_model=32, nhead=2)(*arguments(decoder().config)).reference_points
    torch.testing.assert_close(references[2], references[0])


def test_replaced_submodule_is_refused():
    model = decoder()
    model.layers[1].linear1 = nn.Sequential(model.layers[1].linear1)
    with pytest.raises(RuntimeError, match=r"layers\.1\.linear1 is a torch\.nn\.modules\.container\.Sequential"):
        model(*arguments(model.config))


@pytest.mark.parametrize(
    "field, value",
    [
        ("d_model", 30),
        ("nhead", 3),
        ("num_layers", 0),
        ("query_dim", 3),
        ("query_dim", 2),
        ("query_scale_type", "cond"),
        ("activation", "glu"),
        ("bbox_embed", "both"),
        ("dropout", 1.0),
        ("inverse_sigmoid_eps", 0.0),
        ("temperature", -1.0),
    ],
)
def test_bad_config(field, value):
    with pytest.raises(ValueError, match=r"query_dim=2" if value == 2 else field):
        DecoderConfig(**{field: value})


@pytest.mark.parametrize(
    "index, name, change, error",
    [
        (0, "content", lambda x: x[0], ValueError),
        (0, "content", lambda x: x[..., :-1], ValueError),
        (1, "memory", lambda x: x[:1], ValueError),
        (1, "memory", lambda x: x.double(), TypeError),
        (2, "pos", lambda x: x[:, :-1], ValueError),
        (2, "pos", lambda x: x.repeat(2, 1, 1), ValueError),
        (3, "anchors_unsigmoid", lambda x: x[..., :2], ValueError),
        (3, "anchors_unsigmoid", lambda x: x.long(), TypeError),
        (3, "anchors_unsigmoid", lambda x: x.tolist(), TypeError),
        (1, "memory", lambda x: x.to("meta"), ValueError),
    ],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_bad_arguments(index, name, change, error, batch_first):
    model = decoder()
    model.batch_first = batch_first
    inputs = list(arguments(model.config))
    inputs[index] = change(inputs[index])
    if not batch_first:
        inputs = [x.transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 2 else x for x in inputs]
    with pytest.raises(error, match=f"{name} must"):
        model(*inputs)


@pytest.mark.parametrize("mask", [torch.zeros(2, 11, dtype=torch.bool), torch.zeros(2, 12)])
def test_bad_mask(mask):
    model = decoder()
    with pytest.raises((ValueError, TypeError), match="key_padding_mask must"):
        model(*arguments(model.config), memory_key_padding_mask=mask)
