"""Hugging Face transformers (>= 5.17): batch-first, masks with 1 = valid, inverse sigmoid eps 1e-5.

This file needs no transformers; models.py, which does, is imported once a model of theirs has come.
"""

from __future__ import annotations

from torch import nn

from dab_fast.adapters._fast import Fast

INVERSE_SIGMOID_EPS = 1e-5

# Module names inside a layer, here and (value) in Hugging Face.
LAYER_NAMES = {
    **{
        f"{short}_{ours}_proj": f"{block}.{block}_{theirs}_proj"
        for short, block in (("sa", "self_attn"), ("ca", "cross_attn"))
        for ours, theirs in (
            ("qcontent", "query_content"),
            ("qpos", "query_pos"),
            ("kcontent", "key_content"),
            ("kpos", "key_pos"),
            ("v", "value"),
            ("qpos_sine", "query_pos_sine"),
        )
    },
    "self_attn.out_proj": "self_attn.self_attn.output_proj",
    "cross_attn.out_proj": "cross_attn.cross_attn.output_proj",
    "norm1": "self_attn.self_attn_layer_norm",
    "norm2": "cross_attn.cross_attn_layer_norm",
    "norm3": "mlp.final_layer_norm",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
    "activation": "mlp.activation_fn",
}
_CANONICAL_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
# The same of an encoder's layer.
_ENCODER_LAYER_NAMES = {
    "linear1": "fc1",
    "linear2": "fc2",
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
    "activation": "activation_fn",
}
_CANONICAL_ENCODER_LAYER_NAMES = {theirs: ours for ours, theirs in _ENCODER_LAYER_NAMES.items()}


def canonical_name(name: str) -> str:
    """The IDEA-Research name of a module below Hugging Face's `DabDetrDecoder`."""
    if name.startswith("layers."):
        return _renamed_in_layer(name, _CANONICAL_LAYER_NAMES)
    return "norm" if name == "layernorm" else name


def original_name(name: str) -> str:
    """The inverse of `canonical_name`."""
    if name.startswith("layers."):
        return _renamed_in_layer(name, LAYER_NAMES)
    return "layernorm" if name == "norm" else name


def canonical_encoder_name(name: str) -> str:
    """The canonical name of a module below Hugging Face's `DabDetrEncoder`."""
    return _renamed_in_layer(name, _CANONICAL_ENCODER_LAYER_NAMES) if name.startswith("layers.") else name


def original_encoder_name(name: str) -> str:
    """The inverse of `canonical_encoder_name`."""
    return _renamed_in_layer(name, _ENCODER_LAYER_NAMES) if name.startswith("layers.") else name


def _renamed_in_layer(name: str, names: dict[str, str]) -> str:
    layers, index, *inside = name.split(".", 2)
    return ".".join((layers, index, *(names.get(module, module) for module in inside)))


def fast_class(module: nn.Module) -> type[Fast] | None:
    if not is_theirs(module):
        return None
    from dab_fast.adapters.huggingface import models

    return next((models.FAST_CLASSES[c] for c in type(module).__mro__ if c in models.FAST_CLASSES), None)


def is_theirs(module: nn.Module) -> bool:
    return any(c.__module__ == "transformers.models.dab_detr.modeling_dab_detr" for c in type(module).__mro__)
