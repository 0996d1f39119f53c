"""Surgery on Hugging Face's model, before and after accelerate: the original's answers, or its forward and a reason."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.dab_detr import modeling_dab_detr as original

from tests.support.surgery import (
    WHEN,
    Change,
    accelerate,
    assert_same,
    attempt,
    cases,
    check,
    enter,
    huggingface,
    huggingface_decoder,
    mlp,
    run_huggingface_decoder,
    run_model,
)
from tests.test_huggingface import VARIANTS

D, FFN = 64, 96

pytestmark = pytest.mark.usefixtures("float64")


def head(path: str, *widths: int) -> Any:
    """Replaces one of the decoder's MLPs."""
    return lambda d: setattr(d, path, mlp(getattr(d, path), *widths))


def setting(path: str, value: Any) -> Any:
    """Sets an attribute, by its dotted path from the decoder."""
    module, _, name = path.rpartition(".")
    return lambda d: setattr(d.get_submodule(module), name, value)


def layers(choose: Any) -> Any:
    return lambda d: setattr(d, "layers", nn.ModuleList(choose(list(d.layers))))


def query_position_in_layer_1(d: Any) -> None:
    d.layers[1].cross_attn.cross_attn_query_pos_proj = nn.Linear(D, D)
    d.layers[1].cross_attn.keep_query_pos = True


def two_heads(attention: str, heads: int = 2) -> Any:
    def apply(d: Any) -> None:
        module = d.get_submodule(attention)
        module.attention_heads, module.attention_head_dim = heads, module.embed_dim // heads
        module.values_head_dim, module.scaling = D // heads, (module.embed_dim // heads) ** -0.5

    return apply


def wider_ffn(d: Any) -> None:
    d.layers[1].mlp.fc1, d.layers[1].mlp.fc2 = nn.Linear(D, 128), nn.Linear(128, D)


def shared_ffn(d: Any) -> None:
    d.layers[1].mlp = d.layers[2].mlp


def sequential_head(d: Any) -> None:
    first, second = d.ref_anchor_head.layers
    d.ref_anchor_head = nn.Sequential(first, nn.Tanh(), second)


STRUCTURE = [
    Change("query_scale_of_3", head("query_scale", D, D, D, D), "query_scale"),
    Change("query_scale_of_1", head("query_scale", D, D), "query_scale"),
    Change("query_scale_wider", head("query_scale", D, 80, D), "query_scale"),
    Change("query_scale_of_a_scalar", head("query_scale", D, D, 1), "query_scale"),
    Change("ref_point_head_of_3", head("ref_point_head", 2 * D, D, D, D), "ref_point_head"),
    Change("ref_point_head_of_1", head("ref_point_head", 2 * D, D), "ref_point_head"),
    Change("ref_point_head_narrower", head("ref_point_head", 2 * D, 24, D), "ref_point_head"),
    Change("ref_anchor_head_of_3", head("ref_anchor_head", D, D, D, 2), "ref_anchor_head"),
    Change("ref_anchor_head_of_1", head("ref_anchor_head", D, 2), "ref_anchor_head"),
    Change("ref_anchor_head_wider", head("ref_anchor_head", D, 80, 2), "ref_anchor_head"),
    Change("ref_anchor_head_of_3_outputs", head("ref_anchor_head", D, D, 3), "ref_anchor_head"),
    Change("bbox_embed_of_2", head("bbox_embed", D, D, 4), "bbox_embed"),
    Change("bbox_embed_of_4", head("bbox_embed", D, D, D, D, 4), "bbox_embed"),
    Change("bbox_embed_narrower", head("bbox_embed", D, 32, 24, 4), "bbox_embed"),
    Change("bbox_embed_of_5_outputs", head("bbox_embed", D, D, D, 5), "bbox_embed"),
    Change("bbox_embed_absent", setting("bbox_embed", None), "bbox_embed", served=True),
    Change("head_is_a_sequential", sequential_head, "ref_anchor_head"),
    Change("mlp_without_relu", setting("query_scale.num_layers", 1), "query_scale"),
    Change("mlp_with_a_last_relu", setting("ref_anchor_head.num_layers", 3), "ref_anchor_head"),
    Change("layers_absent", setting("layers", None), "layers"),
    Change("layer_1_absent", setting("layers.1", None), "layers.1"),
    Change("ffn_absent", setting("layers.1.mlp", None), "mlp"),
    Change("layers_doubled", layers(lambda x: [*x, *copy.deepcopy(x)]), "layers"),
    Change("layers_shared", layers(lambda x: [x[0], x[1], x[1]]), "layers"),
    Change("layers_reversed", layers(lambda x: x[::-1]), "layers"),
    Change("first_layer_dropped", layers(lambda x: x[1:]), "layers"),
    Change("first_layer_twice", layers(lambda x: [x[0], x[0], x[2]]), "layers"),
    Change("last_layer_dropped", layers(lambda x: x[:-1]), "layers"),
    Change("first_is_not_first", setting("layers.0.cross_attn.is_first", False), "layers.0"),
    Change("second_is_first", setting("layers.1.cross_attn.is_first", True), "layers.1"),
    Change("keep_query_pos_of_one", query_position_in_layer_1, "layers.1"),
    Change("keep_query_pos_without_weights", setting("layers.1.cross_attn.keep_query_pos", True), "layers.1"),
    Change("keep_query_pos_of_the_first", setting("layers.0.cross_attn.keep_query_pos", True), "layers.0", False),
    Change("relu_in_one", setting("layers.1.mlp.activation_fn", nn.ReLU()), "activation"),
    Change("tanh_in_one", setting("layers.2.mlp.activation_fn", nn.Tanh()), "activation"),
    Change("tanh_gelu", setting("layers.0.mlp.activation_fn", nn.GELU(approximate="tanh")), "activation"),
    Change("prelu_per_channel", setting("layers.1.mlp.activation_fn", nn.PReLU(FFN)), "activation"),
    Change("leaky_relu", setting("layers.1.mlp.activation_fn", nn.LeakyReLU(0.3)), "activation"),
    Change("self_scaling", setting("layers.1.self_attn.self_attn.scaling", 1.0), "scaling"),
    Change("cross_scaling", setting("layers.0.cross_attn.cross_attn.scaling", 0.9), "scaling"),
    Change("self_heads", two_heads("layers.1.self_attn.self_attn"), "heads"),
    Change("cross_heads", two_heads("layers.1.cross_attn.cross_attn"), "heads"),
    Change("outer_heads", setting("layers.1.cross_attn.decoder_attention_heads", 2), "heads"),
    Change("num_layers_below", setting("num_layers", 2), "num_layers"),
    Change("num_layers_above", setting("num_layers", 5), "num_layers"),
    Change("hidden_size", setting("hidden_size", 32), "hidden_size"),
    Change("norm_eps", setting("layernorm.eps", 0.1), "layernorm"),
    Change("inner_norm_eps", setting("layers.1.cross_attn.cross_attn_layer_norm.eps", 0.1), "cross_attn_layer_norm"),
    Change("norm_without_affine", setting("layernorm", nn.LayerNorm(D, elementwise_affine=False)), "layernorm"),
    Change("norm_without_bias", setting("layers.1.mlp.final_layer_norm.bias", None), "final_layer_norm"),
    Change("linear_without_bias", setting("layers.1.mlp.fc1.bias", None), "fc1"),
    Change("ffn_wider_in_one", wider_ffn, "layers.1"),
    Change("ffn_shared", shared_ffn, "mlp"),
    Change(
        "another_mask_convention", lambda d: setattr(d.config, "_attn_implementation", "sdpa"), "config", padded=True
    ),
]


@WHEN
@cases(*STRUCTURE)
def test_structure_and_settings(change, when):
    check(huggingface_decoder(), run_huggingface_decoder, change, when)


@WHEN
@cases(
    Change("4_layers", lambda m: setattr(m, "bbox_predictor", mlp(m.bbox_predictor, D, D, D, D, 4)), "bbox_predictor"),
    Change("2_layers", lambda m: setattr(m, "bbox_predictor", mlp(m.bbox_predictor, D, D, 4)), "bbox_predictor"),
    Change("5_outputs", lambda m: setattr(m, "bbox_predictor", mlp(m.bbox_predictor, D, D, D, 5)), "bbox_predictor"),
    Change("num_layers", lambda m: setattr(m.bbox_predictor, "num_layers", 2), "bbox_predictor"),
    Change("query_dim", lambda m: setattr(m, "query_dim", 2), "query_dim"),
)
def test_structure_of_the_prediction_head(change, when):
    check(huggingface(), run_model, change, when)


class LearnedPositions(nn.Module):
    """No half of it is a function of y or x alone."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(D, 3, 4))

    def forward(self, pixel_values, pixel_mask):
        return self.grid.expand(len(pixel_values), -1, -1, -1)


class PositionsPerImage(original.DabDetrSinePositionEmbedding):
    def forward(self, pixel_values, pixel_mask):
        return super().forward(pixel_values, pixel_mask) + pixel_values.mean((1, 2, 3))[:, None, None, None]


class XBeforeY(original.DabDetrSinePositionEmbedding):
    def forward(self, pixel_values, pixel_mask):
        return super().forward(pixel_values, pixel_mask).roll(D // 2, 1)


def positions(make: Any) -> Any:
    def apply(m: Any) -> None:
        m.model.backbone.position_embedding = make(m.config) if issubclass(make, XBeforeY.__base__) else make()

    return apply


def per_image(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * torch.linspace(1, 2, len(output))[:, None, None, None]


def backbone_hook(module: Any, args: Any, output: Any) -> Any:
    features, pos = output
    return features, [pos[-1].flip(-1) + 0.1 * features[-1][0].mean((1, 2, 3))[:, None, None, None]]


def scales_positions(module: Any, args: Any, kwargs: Any) -> Any:
    pos = kwargs["object_queries"]
    return args, kwargs | {"object_queries": pos * torch.linspace(0.5, 1, len(pos))[:, None, None]}


def reads_encoder_mask(module: Any, args: Any, kwargs: Any) -> Any:
    valid = kwargs["attention_mask"].float()
    return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"] * (1 + valid[..., None])}


def reads_decoder_mask(module: Any, args: Any, kwargs: Any) -> Any:
    valid = kwargs["memory_key_padding_mask"].float()
    return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] * (1 + valid[..., None])}


def hides_keys(module: Any, args: Any, kwargs: Any) -> Any:
    mask = kwargs["memory_key_padding_mask"].clone()
    mask[:, ::2] = 0
    return args, kwargs | {"memory_key_padding_mask": mask}


def reads_pixel_mask(module: Any, args: Any, kwargs: Any) -> Any:
    (pixels,) = args
    return (pixels * (2.0 if kwargs["pixel_mask"] is None else 1.5),), kwargs


def pre_hook(path: str, hook: Any) -> Any:
    return lambda m: m.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)


def hook(path: str, function: Any) -> Any:
    return lambda m: m.get_submodule(path).register_forward_hook(function)


def wrapped_model(m: Any) -> None:
    found = m.model.forward
    m.model.forward = lambda pixel_values, **kwargs: found(pixel_values * 1.5, **kwargs)


class MaskingEncoder(original.DabDetrEncoder):
    def forward(self, inputs_embeds, attention_mask, object_queries, **kwargs):
        inputs_embeds = inputs_embeds * (1 + attention_mask[..., None].float())
        return super().forward(inputs_embeds, attention_mask, object_queries + object_queries[:1], **kwargs)


class StrictDecoder(original.DabDetrDecoder):
    """Takes what the original's call gives, and nothing else."""

    def forward(self, inputs_embeds, encoder_hidden_states, memory_key_padding_mask, object_queries, **kwargs):
        assert not kwargs.keys() - {
            "query_position_embeddings",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
        }
        memory = encoder_hidden_states * (1 + memory_key_padding_mask[..., None].float())
        return super().forward(inputs_embeds, memory, memory_key_padding_mask, object_queries, **kwargs)


def wrapped_encoder(m: Any) -> None:
    found = m.model.encoder.forward

    def forward(inputs_embeds, attention_mask, object_queries, **kwargs):
        return found(inputs_embeds * (1 + attention_mask[..., None].float()), attention_mask, object_queries, **kwargs)

    m.model.encoder.forward = forward


def inputs_of_submodules(padded: bool) -> list[Change]:
    name = "_padded" if padded else ""
    return [
        Change(f"learned_positions{name}", positions(LearnedPositions), "position_embedding", padded=padded),
        Change(f"positions_per_image{name}", positions(PositionsPerImage), "position_embedding", padded=padded),
        Change(f"x_before_y{name}", positions(XBeforeY), "position_embedding", padded=padded),
        Change(
            f"hooked_positions{name}",
            hook("model.backbone.position_embedding", per_image),
            "position_embedding",
            padded=padded,
        ),
        Change(f"hooked_backbone{name}", hook("model.backbone", backbone_hook), "backbone", padded=padded),
        Change(f"decoder_positions{name}", pre_hook("model.decoder", scales_positions), "decoder", padded=padded),
        Change(f"encoder_positions{name}", pre_hook("model.encoder", scales_positions), "encoder", padded=padded),
        Change(f"encoder_mask{name}", pre_hook("model.encoder", reads_encoder_mask), "encoder", padded=padded),
        Change(f"decoder_mask{name}", pre_hook("model.decoder", reads_decoder_mask), "decoder", padded=padded),
        Change(f"decoder_hides_keys{name}", pre_hook("model.decoder", hides_keys), "decoder", padded=padded),
        Change(f"model_pixel_mask{name}", pre_hook("model", reads_pixel_mask), "model", padded=padded),
        Change(f"wrapped_model{name}", wrapped_model, "model", padded=padded),
        Change(f"wrapped_encoder{name}", wrapped_encoder, "encoder", padded=padded),
        Change(
            f"another_encoder{name}",
            lambda m: setattr(m.model.encoder, "__class__", MaskingEncoder),
            "encoder",
            padded=padded,
        ),
    ]


@WHEN
@cases(*inputs_of_submodules(False), *(c for c in inputs_of_submodules(True) if "positions" in c.name))
def test_submodules_get_what_the_original_gives_them(change, when):
    check(huggingface(), run_model, change, when)


def test_another_decoder_class_gets_what_the_original_gives_it():
    change = Change("", lambda m: setattr(m.model.decoder, "__class__", StrictDecoder), "decoder")
    check(huggingface(), run_model, change, "before")


def cooler_positions(model: Any) -> None:
    embedding = model.model.backbone.position_embedding
    embedding.temperature_width = embedding.temperature_height = 9


@WHEN
@cases(
    Change("scale", lambda m: setattr(m.model.backbone.position_embedding, "scale", 1.0), "", served=True),
    Change(
        "temperature", lambda m: setattr(m.model.backbone.position_embedding, "temperature_width", 9), "", served=True
    ),
    *(
        Change(f"temperatures{'_padded' if padded else ''}", cooler_positions, "", served=True, padded=padded)
        for padded in (False, True)
    ),
    Change("num_queries", lambda m: setattr(m.model, "num_queries", 9), "", matters=False, served=True),
)
def test_settings_that_the_fast_path_serves(change, when):
    check(huggingface(), run_model, change, when)


def temperature_20(pos_tensor, num_pos_feats=128, temperature=20, found=original.encode_sinusoidal_position_embedding):
    return found(pos_tensor, num_pos_feats, 20)


def eps_1e_3(x, eps=1e-3, found=original.inverse_sigmoid):
    return found(x, 1e-3)


CREATE_MASK = vars(original)["create_bidirectional_mask"]


def shorter_masks(*args, found=CREATE_MASK, **kwargs):
    kwargs["attention_mask"] = kwargs["attention_mask"] & (torch.arange(kwargs["attention_mask"].shape[1]) > 0)
    return found(*args, **kwargs)


def scaled(function: Any) -> Any:
    """A forward whose first result is 1.5 times that of `function`."""

    def forward(self, *args, **kwargs):
        out = function(self, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 1.5
        if isinstance(out, tuple):
            return (out[0] * 1.5, *out[1:])
        for key in out:
            if isinstance(out[key], torch.Tensor):
                out[key] = out[key] * 1.5
        return out

    return forward


CLASSES = [
    *(f"DabDetrDecoderLayer{part}" for part in ("", "SelfAttention", "CrossAttention", "FFN")),
    *("DabDetrAttention", "DabDetrMLP", "DabDetrDecoder"),
]


@WHEN
@pytest.mark.parametrize(
    "owner, name, value",
    [
        (original, "encode_sinusoidal_position_embedding", temperature_20),
        (original, "inverse_sigmoid", eps_1e_3),
        (original, "create_bidirectional_mask", shorter_masks),
        *((getattr(original, c), "forward", scaled(getattr(original, c).forward)) for c in CLASSES),
        *((c, "forward", scaled(c.forward)) for c in (nn.Linear, nn.LayerNorm, nn.PReLU)),
        (original.DabDetrMLP, "__call__", scaled(nn.Module.__call__)),
    ],
    ids=lambda x: getattr(x, "__name__", x).rpartition(".")[2] if not callable(x) or isinstance(x, type) else "",
)
def test_patched_classes_and_functions(owner, name, value, when, monkeypatch):
    named = name if owner is original else owner.__name__
    base = huggingface_decoder()
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    before = attempt(run_huggingface_decoder, theirs, padded=True)
    reasons = enter(ours, run_huggingface_decoder, when, padded=True)
    monkeypatch.setattr(owner, name, value)
    reasons = reasons or accelerate(ours)
    expected = attempt(run_huggingface_decoder, theirs, padded=True)
    assert not torch.allclose(expected.outputs["reference_points"], before.outputs["reference_points"], atol=1e-4)
    assert_same(attempt(run_huggingface_decoder, ours, padded=True), expected)
    assert named in reasons()
    monkeypatch.undo()
    if when != "before":
        seen = reasons()
        assert_same(attempt(run_huggingface_decoder, ours, padded=True), before)
        assert reasons() == seen, "without the patch it is fast again"


POSITIONS = ["DabDetrConvModel", "DabDetrSinePositionEmbedding"]


@WHEN
@pytest.mark.parametrize("name", [*POSITIONS, "DabDetrModel", "DabDetrForObjectDetection"])
def test_patched_models(name, when, monkeypatch):
    owner = getattr(original, name)
    theirs, ours = copy.deepcopy(huggingface()), copy.deepcopy(huggingface())
    reasons = enter(ours, run_model, when)
    monkeypatch.setattr(owner, "forward", scaled(owner.forward))
    reasons = reasons or accelerate(ours)
    assert_same(attempt(run_model, ours), attempt(run_model, theirs))
    assert name in reasons() or name in POSITIONS


def freeze(path: str) -> Any:
    return lambda m: m.get_submodule(path).requires_grad_(False)


def merged_lora(m: Any) -> None:
    """What remains of an adapter after `merge_and_unload`: plain modules with other weights."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(target_modules=["fc1", "cross_attn_value_proj"], init_lora_weights=False)
    decoder = inject_adapter_in_model(config, m.model.decoder)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            decoder.set_submodule(name, module.get_base_layer())
    m.requires_grad_(True)


def tied_boxes(m: Any) -> None:
    m.model.decoder.bbox_embed = m.bbox_predictor


UNMODIFIED = [
    *(Change(f"frozen_{path}", freeze(path), "", False) for path in ("model.backbone", "model.encoder")),
    *(Change(f"frozen_{path}", freeze(path), "", False) for path in ("model.decoder.layers.0", "bbox_predictor")),
    Change("merged_lora", merged_lora, ""),
    Change("one_box_head", tied_boxes, "", False),
    Change("training", lambda m: m.train(), "", False),
    Change("zeroed_gradients", lambda m: m.zero_grad(), "", False),
    Change("channels_last", lambda m: m.to(memory_format=torch.channels_last), "", False),
]


@pytest.mark.parametrize("padded", [False, True])
@WHEN
@cases(*UNMODIFIED)
def test_a_usual_model_does_not_step_aside(change, when, padded):
    served = Change(change.name, change.apply, "", change.matters, padded=padded, served=True)
    check(huggingface(), run_model, served, when)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_do_not_step_aside_in_training(variant):
    from tests.support.models import huggingface_model

    with_dropout: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1}
    variant_of: Any = VARIANTS[variant]
    model = huggingface_model(**with_dropout, **variant_of).train()
    reasons = accelerate(model)
    assert math.isfinite(sum(x.sum() for x in run_model(model, True).values()))
    assert not reasons()


def test_a_setting_that_counts_calls_is_not_probed_for_ever():
    theirs, ours = copy.deepcopy(huggingface_decoder()), copy.deepcopy(huggingface_decoder())
    reasons = accelerate(ours)
    for calls in range(20):
        ours.layers[1].calls = calls
        assert_same(attempt(run_huggingface_decoder, ours), attempt(run_huggingface_decoder, theirs))
        assert bool(reasons()) == (calls >= 15)
    assert "layers.1.calls keeps changing" in reasons()
    assert len(ours.dab_fast_verdicts) == 16
