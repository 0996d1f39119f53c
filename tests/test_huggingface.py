"""Parity of the accelerated Hugging Face model with the original: outputs, loss, every parameter's gradient."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DabDetrForObjectDetection

import dab_fast
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from tests.support.models import (
    accelerated_copy,
    assert_same_gradients,
    assert_same_outputs,
    huggingface_model,
    images,
    labels,
    perturb_,
    replicate,
)

VARIANTS = {
    "default": {},
    "patterns": {"num_patterns": 2},
    "keep_query_pos": {"keep_query_pos": True},
    "relu": {"activation_function": "relu"},
    "gelu": {"activation_function": "gelu"},
    "silu": {"activation_function": "silu"},
    "no_aux": {"auxiliary_loss": False},
    "one_layer": {"decoder_layers": 1},
    "three_heads": {"hidden_size": 60, "decoder_attention_heads": 3, "encoder_attention_heads": 3},
    "wide_heads": {"hidden_size": 64, "decoder_attention_heads": 1},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_stack_and_references(variant, padded):
    model = huggingface_model(**VARIANTS[variant])
    fast = accelerated_copy(model)
    inputs = images(padded=padded)
    with torch.no_grad():
        assert_same_outputs(fast(**inputs), model(**inputs))
        ours, theirs = fast.model(**inputs), model.model(**inputs)
    torch.testing.assert_close(
        ours.intermediate_hidden_states, theirs.intermediate_hidden_states, rtol=0, atol=HIDDEN_TOLERANCE
    )
    torch.testing.assert_close(ours.reference_points, theirs.reference_points, rtol=0, atol=BOX_TOLERANCE)
    moved = (theirs.reference_points[-1] - theirs.reference_points[0]).abs().mean()
    assert variant == "one_layer" or moved > 0.01, "the boxes must move, or the test shows nothing"
    assert not any(m.dab_fast_reasons for m in (fast, fast.model, fast.model.decoder))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(variant, padded):
    model = huggingface_model(**VARIANTS[variant]).train()
    fast = accelerated_copy(model)
    inputs = images(padded=padded) | {"labels": labels()}
    ours, theirs = fast(**inputs), model(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert ours.loss_dict.keys() == theirs.loss_dict.keys()
    assert (ours.auxiliary_outputs is None) == (theirs.auxiliary_outputs is None)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(
        {name: p.grad for name, p in fast.named_parameters()},
        {name: p.grad for name, p in model.named_parameters()},
    )


def test_gradient_comparison_can_fail():
    grads = {"a": torch.ones(3), "b": torch.ones(3)}
    with pytest.raises(AssertionError):
        assert_same_gradients(grads, grads | {"b": torch.tensor([1.0, 1.0, 1.001])})


@pytest.mark.parametrize("break_it", ["box", "norm", "pos"])
def test_parity_can_fail(break_it):
    model = huggingface_model()
    fast = accelerated_copy(model)
    name = {"box": "bbox_embed.layers.2", "norm": "layernorm", "pos": "layers.1.cross_attn.cross_attn_key_pos_proj"}
    perturb_(fast.model.decoder.get_submodule(name[break_it]), seed=3, std=0.01)
    inputs = images()
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_same_outputs(fast(**inputs), model(**inputs))


def test_hidden_states_and_tuples():
    model = huggingface_model()
    fast = accelerated_copy(model)
    inputs = images(padded=True)
    with torch.no_grad():
        ours, theirs = (m(**inputs, output_hidden_states=True) for m in (fast, model))
        for key in ("decoder_hidden_states", "encoder_hidden_states"):
            assert len(ours[key]) == len(theirs[key])
            for a, b in zip(ours[key], theirs[key], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=HIDDEN_TOLERANCE)
        for a, b in zip(*(m(**inputs, return_dict=False) for m in (fast, model)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=HIDDEN_TOLERANCE)
    assert "return_dict=False" in fast.dab_fast_reasons


def test_bare_model_and_bare_decoder():
    model = huggingface_model()
    inputs = images(padded=True)
    for part in (model.model, model.model.decoder):
        fast = accelerated_copy(part)
        assert isinstance(fast, type(part)) and type(fast) is not type(part)
    fast = accelerated_copy(model.model)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state, rtol=0, atol=HIDDEN_TOLERANCE
        )


def test_restore_and_twice():
    model = huggingface_model()
    classes = [type(m) for m in model.modules()]
    first = dab_fast.accelerate(model)
    parts = {"model.backbone.conv_encoder", "model.encoder", "model.decoder"}
    assert set(first.replaced) == {"", "model", *parts}
    assert str(dab_fast.accelerate(model)) == str(first)
    dab_fast.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("dab_fast" in key for m in model.modules() for key in vars(m))


def test_other_instances_stay():
    model, other = huggingface_model(), huggingface_model()
    keys = list(model.state_dict())
    dab_fast.accelerate(model)
    assert type(other) is DabDetrForObjectDetection
    assert list(model.state_dict()) == keys
    assert isinstance(model, DabDetrForObjectDetection)


def test_save_pretrained(tmp_path):
    fast = accelerated_copy(huggingface_model())
    fast.save_pretrained(tmp_path)
    assert '"DabDetrForObjectDetection"' in (tmp_path / "config.json").read_text()
    loaded = DabDetrForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(loaded) is DabDetrForObjectDetection
    with torch.no_grad():
        assert_same_outputs(fast(**images()), loaded(**images()))


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy])
def test_copies_stay_fast(clone):
    fast = accelerated_copy(huggingface_model())
    twin = clone(fast)
    assert type(twin) is type(fast) and type(twin.model.decoder) is type(fast.model.decoder)
    with torch.no_grad():
        torch.testing.assert_close(twin(**images()).pred_boxes, fast(**images()).pred_boxes)


def test_data_parallel_replicas():
    """What `DataParallel` runs: replicas whose parameters are plain tensor attributes."""
    model = huggingface_model()
    fast = accelerated_copy(model)
    replica = replicate(fast)
    assert not list(replica.parameters())
    with torch.no_grad():
        assert_same_outputs(replica(**images()), model(**images()))
    assert not replica.model.decoder.dab_fast_reasons


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "recompute"])
def test_recompute(switch):
    """transformers 5.23 offers no switch for DAB-DETR's checkpointing, but its layers know how."""
    model = huggingface_model(dropout=0.3).train()
    fast = accelerated_copy(model)
    inputs = images() | {"labels": labels()}

    def run() -> tuple[dict, int]:
        kept = {}
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(lambda x: _keep(kept, x), lambda x: x):
            loss = fast(**inputs).loss
        fast.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in fast.named_parameters()}, sum(kept.values())

    plain, plain_bytes = run()
    if switch == "recompute":
        dab_fast.accelerate(fast, recompute=True)
    else:
        for layer in fast.model.decoder.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    recomputed, recomputed_bytes = run()
    assert_same_gradients(recomputed, plain)
    assert recomputed_bytes < 0.8 * plain_bytes
    assert not fast.model.decoder.dab_fast_reasons


def test_the_last_recompute_holds():
    model = huggingface_model()
    decoder = model.model.decoder
    for recompute in (True, False, True):
        dab_fast.accelerate(model, recompute=recompute)
        assert decoder.dab_fast_recompute is recompute
    dab_fast.accelerate(model)
    assert decoder.dab_fast_recompute is False


def test_a_second_derivative_raises_and_restore_gives_it_back():
    model = huggingface_model()

    def second_derivative():
        pixels = images()["pixel_values"].requires_grad_()
        (slope,) = torch.autograd.grad(model(pixels).pred_boxes.sum(), pixels, create_graph=True)
        slope.square().sum().backward()

    dab_fast.accelerate(model)
    with pytest.raises(RuntimeError, match=r"dab_fast.* call dab_fast\.restore\(model\) before"):
        second_derivative()
    dab_fast.restore(model)
    second_derivative()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode():
    model = huggingface_model()
    pixels = images()["pixel_values"]

    def jvp():
        return torch.func.jvp(lambda x: model(x).pred_boxes, (pixels,), (torch.ones_like(pixels),))[1]

    expected = jvp()
    dab_fast.accelerate(model)
    torch.testing.assert_close(jvp(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert not model.model.decoder.dab_fast_reasons


def _keep(kept: dict[int, int], x: torch.Tensor) -> torch.Tensor:
    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_applied(rate):
    fast = accelerated_copy(huggingface_model(**{rate: 0.5}))
    inputs = images()
    with torch.no_grad():
        calm = fast.model(**inputs).last_hidden_state
        fast.model.decoder.train()
        first, second = (fast.model(**inputs).last_hidden_state for _ in range(2))
    assert (first - second).abs().max() > 1e-3 and (first - calm).abs().max() > 1e-3
    assert not fast.model.decoder.dab_fast_reasons


def test_autocast_bfloat16():
    """Compared in the metric of the boxes: ours, whose box MLP stays float32, must be closer to float32."""
    model = huggingface_model()
    fast = accelerated_copy(model)
    with torch.no_grad():
        exact = model(**images())
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = fast(**images()), model(**images())
    assert ours.pred_boxes.dtype == torch.float32
    assert _mean_error(ours.pred_boxes, exact.pred_boxes) <= _mean_error(theirs.pred_boxes, exact.pred_boxes)
    assert _mean_error(ours.logits, exact.logits) <= 2 * _mean_error(theirs.logits, exact.logits)


def _mean_error(found, exact):
    return (found.float() - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_work(dtype):
    """The original refuses them, since it makes float32 queries: its own error is that under autocast."""
    model = huggingface_model()
    inputs = images()
    with torch.no_grad():
        exact = model(**inputs).pred_boxes
        with torch.autocast("cpu", dtype):
            theirs = model(**inputs).pred_boxes
        half = accelerated_copy(model).to(dtype)
        result = half(pixel_values=inputs["pixel_values"].to(dtype))
        with pytest.raises(RuntimeError):
            copy.deepcopy(model).to(dtype)(pixel_values=inputs["pixel_values"].to(dtype))
    assert result.logits.dtype == dtype and result.pred_boxes.dtype == torch.float32
    assert _mean_error(result.pred_boxes, exact) <= 2 * _mean_error(theirs, exact)


class Boxes(nn.Module):
    """What torch.jit.trace takes: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask):
        return self.model(pixel_values=pixel_values, pixel_mask=pixel_mask).pred_boxes


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_with_nothing_padded_serves_padded_images():
    model = huggingface_model()
    padded = images(padded=True)
    example = (padded["pixel_values"], torch.ones_like(padded["pixel_mask"]))
    traced = torch.jit.trace(Boxes(accelerated_copy(model)), example, check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(*padded.values()), model(**padded).pred_boxes, rtol=0, atol=BOX_TOLERANCE)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_class_head_is_called_as_the_original_calls_it(auxiliary_loss):
    model = huggingface_model(auxiliary_loss=auxiliary_loss)
    shapes = {}
    for name, m in (("theirs", model), ("ours", accelerated_copy(model))):
        seen = shapes.setdefault(name, [])
        m.class_embed.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0].shape))
        with torch.no_grad():
            m(**images())
            m(**images(), labels=labels())
    assert shapes["ours"] == shapes["theirs"]


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_a_loss_of_ones_own_gets_what_the_original_gives_it(auxiliary_loss):
    model = huggingface_model(auxiliary_loss=auxiliary_loss)
    given = {}
    for name, m in (("theirs", model), ("ours", accelerated_copy(model))):

        def loss(logits, labels, device, boxes, config, classes=None, coordinates=None, name=name):
            given[name] = (logits, boxes, classes, coordinates)
            return coordinates.square().mean(), {}, None

        m.loss_function = loss
        m(**images(), labels=labels()).loss.backward()
    for ours, theirs in zip(given["ours"], given["theirs"], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=HIDDEN_TOLERANCE)


def test_everything_padded_is_finite():
    fast = accelerated_copy(huggingface_model())
    decoder = fast.model.decoder
    b, q, s, d = 2, 5, 12, 64
    arguments = dict(
        inputs_embeds=torch.randn(b, q, d),
        encoder_hidden_states=torch.randn(b, s, d),
        memory_key_padding_mask=torch.tensor([[1] * s, [0] * s]),
        object_queries=torch.randn(b, s, d),
        query_position_embeddings=torch.randn(b, q, 4),
    )
    out = decoder(**arguments)
    assert out.last_hidden_state.isfinite().all()
    out.last_hidden_state.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def test_subclass_is_reported():
    class Mine(DabDetrForObjectDetection):
        pass

    model = huggingface_model()
    model.__class__ = Mine
    report = dab_fast.accelerate(model)
    parts = {"model.backbone.conv_encoder", "model.encoder", "model.decoder"}
    assert set(report.replaced) == {"model", *parts} and "subclass" in report.not_replaced[""]


@pytest.mark.parametrize("model, error", [(nn.Linear(2, 2), ValueError), ("checkpoint.pth", TypeError)])
def test_not_a_dab_detr(model, error):
    with pytest.raises(error, match="model must"):
        dab_fast.accelerate(model)
