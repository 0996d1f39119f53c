"""A Hugging Face model of the shapes that a checkpoint of any codebase has."""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import Tensor

from dab_fast.adapters._names import BACKBONE, ENCODER, below
from dab_fast.config import DecoderConfig


def build(
    tensors: dict[str, Tensor],  # by their canonical names
    decoder: DecoderConfig,
    stated: dict[str, Any],  # as `dab_fast.adapters` describes it
) -> transformers.DabDetrForObjectDetection:
    """A `DabDetrForObjectDetection` with new weights, into which such a checkpoint can be loaded.

    What the checkpoint does not state is as published, which are the defaults of `DabDetrConfig`.

    Raises:
        ValueError: a tensor that tells a shape is missing, or transformers has no such model.
    """
    if stated.get("dilation"):
        raise ValueError("the checkpoint must have a backbone without dilation: transformers' own ResNet has none")
    patterns = tensors.get("transformer.patterns.weight")
    try:
        options: dict[str, Any] = {
            "num_queries": tensors["refpoint_embed.weight"].shape[0],
            "num_labels": tensors["class_embed.weight"].shape[0],
            "encoder_layers": _count(below(ENCODER, tensors), r"layers\.(\d+)\."),
            "encoder_ffn_dim": tensors[f"{ENCODER}layers.0.linear1.weight"].shape[0],
        }
    except KeyError as missing:
        raise ValueError(f"the checkpoint must hold a whole model, but {missing.args[0]} is missing") from None
    options |= {
        "hidden_size": decoder.d_model,
        "decoder_layers": decoder.num_layers,
        "decoder_ffn_dim": decoder.dim_feedforward,
        "decoder_attention_heads": decoder.nhead,
        "encoder_attention_heads": stated.get("encoder_nhead", decoder.nhead),
        "keep_query_pos": decoder.keep_query_pos,
        "activation_function": decoder.activation,
        "num_patterns": 0 if patterns is None else patterns.shape[0],
        "backbone_config": _resnet_config(below(BACKBONE, tensors)),
    }
    rates = ("dropout", "attention_dropout", "activation_dropout")
    options |= {name: stated[name] for name in rates if name in stated}
    if "position_temperatures" in stated:
        options["temperature_height"], options["temperature_width"] = stated["position_temperatures"]
    return transformers.DabDetrForObjectDetection(transformers.DabDetrConfig(**options))


def _resnet_config(
    tensors: dict[str, Tensor],  # by torchvision's names
) -> transformers.ResNetConfig:
    last = 3 if "layer1.0.conv3.weight" in tensors else 2  # convolutions in a block
    stages = range(1, 5)
    resnet: Any = transformers.ResNetConfig  # its generated signature leaves out what a backbone reads
    try:
        return resnet(
            embedding_size=tensors["conv1.weight"].shape[0],
            hidden_sizes=[tensors[f"layer{stage}.0.conv{last}.weight"].shape[0] for stage in stages],
            depths=[_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in stages],
            layer_type="bottleneck" if last == 3 else "basic",
            out_features=["stage4"],
        )
    except KeyError as missing:
        name = BACKBONE + missing.args[0]
        raise ValueError(f"the checkpoint must hold a whole model with a ResNet, but {name} is missing") from None


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number in the names that begin with `pattern`; 0 without any."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)
