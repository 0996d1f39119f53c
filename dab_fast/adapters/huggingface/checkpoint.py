"""The checkpoints of Hugging Face transformers: see `dab_fast.adapters` for what each function does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dab_fast.adapters._names import BACKBONE, DECODER, ENCODER, below, from_the_top, prefix_before
from dab_fast.adapters.huggingface import (
    INVERSE_SIGMOID_EPS,
    canonical_encoder_name,
    canonical_name,
    is_theirs,
    original_encoder_name,
    original_name,
)

__all__ = ["CODEBASE", "INVERSE_SIGMOID_EPS", "MODELS", "from_canonical", "owns", "recognise", "stated", "to_canonical"]

CODEBASE = "Hugging Face"
MODELS = "a Hugging Face DabDetrForObjectDetection, DabDetrModel or DabDetrDecoder"

_DECODER, _ENCODER, _BACKBONE = "model.decoder.", "model.encoder.", "model.backbone.conv_encoder.model."
_TIMM = "_backbone."  # timm's ResNet has torchvision's names, behind this
_HEAD = "bbox_predictor."
# Canonical beginnings of names, and theirs. The first that fits counts, so the shortest come last.
_BEGINNINGS = (
    ("input_proj.", "model.input_projection."),
    ("refpoint_embed.", "model.query_refpoint_embeddings."),
    ("bbox_embed.", _HEAD),
    ("transformer.", "model."),
)


def recognise(names: Iterable[str]) -> str | None:
    return prefix_before("layers.0.self_attn.self_attn_query_content_proj.weight", map(_current_name, names))


def owns(model: nn.Module) -> bool:
    return is_theirs(model)


def to_canonical(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    whole = from_the_top({_current_name(name): x for name, x in tensors.items()}, prefix, _DECODER)
    return {_to_canonical(name): x for name, x in _fill_tied(whole).items()}


def from_canonical(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    timm = hasattr(_backbone(model), "_backbone")
    theirs = {_from_canonical(name, timm=timm): x for name, x in tensors.items()}
    if hasattr(model, "bbox_predictor"):
        return theirs
    theirs = below("model." if hasattr(model, "query_refpoint_embeddings") else _DECODER, theirs)
    if getattr(model, "decoder", model).bbox_embed is None:
        return {name: x for name, x in theirs.items() if "bbox_embed." not in name}
    return theirs


def stated(config: dict[str, Any] | None, args: dict[str, Any]) -> dict[str, Any]:
    if config is None:
        return {}
    # What save_pretrained leaves out is the default of transformers' DabDetrConfig.
    return {
        "nhead": config.get("decoder_attention_heads", 8),
        "encoder_nhead": config.get("encoder_attention_heads", 8),
        "activation": config.get("activation_function", "prelu"),
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "activation_dropout": config.get("activation_dropout", 0.0),
        "position_temperatures": (config.get("temperature_height", 20), config.get("temperature_width", 20)),
        "dilation": config.get("dilation", False),
    }


def _current_name(name: str) -> str:
    """transformers' first conversions numbered a decoder layer's three blocks."""
    blocks = ("self_attn", "cross_attn", "mlp")
    return re.sub(r"(decoder\.layers\.\d+)\.layer\.([012])\.", lambda m: f"{m[1]}.{blocks[int(m[2])]}.", name)


def _fill_tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The box head and the decoder's box MLP are one module in transformers, and saved once."""
    decoder = f"{_DECODER}bbox_embed."
    twins = {name.replace(a, b, 1): x for a, b in ((_HEAD, decoder), (decoder, _HEAD)) for name, x in tensors.items()}
    return twins | tensors if any(name.startswith(_HEAD) for name in tensors) else tensors


def _backbone(model: Any) -> Any:
    model = getattr(model, "model", model)
    return model.backbone.conv_encoder.model if hasattr(model, "backbone") else None


def _to_canonical(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if name.startswith(_BACKBONE):
        return BACKBONE + _to_torchvision(name.removeprefix(_BACKBONE).removeprefix(_TIMM))
    if module.startswith(_DECODER):
        return f"{DECODER}{canonical_name(module.removeprefix(_DECODER))}.{leaf}"
    if module.startswith(_ENCODER):
        return f"{ENCODER}{canonical_encoder_name(module.removeprefix(_ENCODER))}.{leaf}"
    return _exchange_beginning(name, ((theirs, ours) for ours, theirs in _BEGINNINGS))


def _from_canonical(name: str, *, timm: bool) -> str:
    module, _, leaf = name.rpartition(".")
    if name.startswith(BACKBONE):
        inside = name.removeprefix(BACKBONE)
        return _BACKBONE + (_TIMM + inside if timm else _from_torchvision(inside))
    if module.startswith(DECODER):
        return f"{_DECODER}{original_name(module.removeprefix(DECODER))}.{leaf}"
    if module.startswith(ENCODER):
        return f"{_ENCODER}{original_encoder_name(module.removeprefix(ENCODER))}.{leaf}"
    return _exchange_beginning(name, _BEGINNINGS)


def _exchange_beginning(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


# torchvision's words for the two modules of a ResNet's convolution, in a block and in a shortcut, by transformers'.
_CONVOLUTIONS = {"convolution": ("conv", "0"), "normalization": ("bn", "1")}


def _to_torchvision(name: str) -> str:
    """torchvision's name of a tensor that has this one in transformers' ResNet."""
    if stem := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"{_CONVOLUTIONS[stem[1]][0]}1.{stem[2]}"
    block = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(convolution|normalization)\.(\w+)", name
    )
    if not block:
        return name
    conv, downsample = _CONVOLUTIONS[block[4]]
    module = f"downsample.{downsample}" if block[3] is None else f"{conv}{int(block[3]) + 1}"
    return f"layer{int(block[1]) + 1}.{block[2]}.{module}.{block[5]}"


def _from_torchvision(name: str) -> str:
    """The inverse of `_to_torchvision`."""
    kinds = {word: kind for kind, words in _CONVOLUTIONS.items() for word in words}
    if stem := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{kinds[stem[1]]}.{stem[2]}"
    block = re.fullmatch(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", name)
    if not block:
        return name
    module = f"layer.{int(block[4]) - 1}" if block[3] else "shortcut"
    return f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}.{module}.{kinds[block[3] or block[5]]}.{block[6]}"
