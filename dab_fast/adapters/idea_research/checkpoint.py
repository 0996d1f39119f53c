"""The checkpoints of IDEA-Research/DAB-DETR and DN-DETR: see `dab_fast.adapters` for what each function does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dab_fast.adapters._names import DECODER, ENCODER, below, from_the_top, prefix_before
from dab_fast.adapters.idea_research import INVERSE_SIGMOID_EPS, looks_like_decoder

__all__ = ["CODEBASE", "INVERSE_SIGMOID_EPS", "MODELS", "from_canonical", "owns", "recognise", "stated", "to_canonical"]

CODEBASE = "IDEA-Research"
MODELS = "an IDEA-Research decoder"


def recognise(names: Iterable[str]) -> str | None:
    return prefix_before("layers.0.sa_qcontent_proj.weight", names)


def owns(model: nn.Module) -> bool:
    return looks_like_decoder(model)


def to_canonical(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    result = {}
    for name, x in _patterns_for_dn(from_the_top(tensors, prefix, DECODER)).items():
        packed = re.fullmatch(rf"({re.escape(ENCODER)}layers\.\d+\.self_attn)\.in_proj_(\w+)", name)
        if packed and x.dim() and x.shape[0] % 3 == 0:
            for part, rows in zip("qkv", x.chunk(3), strict=True):
                result[f"{packed[1]}.{part}_proj.{packed[2]}"] = rows
        elif not name.endswith("num_batches_tracked"):  # which no model with frozen batch norms has
            result[name] = x
    return result


def from_canonical(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return below(DECODER, tensors)


def stated(config: dict[str, Any] | None, args: dict[str, Any]) -> dict[str, Any]:
    temperatures = args.get("pe_temperatureH"), args.get("pe_temperatureW")
    return {
        "nhead": args.get("nheads"),
        "encoder_nhead": args.get("nheads"),
        "activation": args.get("transformer_activation"),
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), args.get("dropout")),
        "position_temperatures": None if None in temperatures else temperatures,
        "dilation": args.get("dilation"),
    }


def _patterns_for_dn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DN-DETR's content at inference, the label embedding of "no class" and a zero flag, is a pattern elsewhere."""
    labels, patterns = (tensors.get(name) for name in ("label_enc.weight", "transformer.patterns.weight"))
    if labels is None or labels.dim() != 2:
        return tensors
    content = nn.functional.pad(labels[-1:], (0, 1))
    if patterns is not None:
        if patterns.shape[-1:] != content.shape[-1:]:
            return tensors
        content = patterns + content
    return {name: x for name, x in tensors.items() if name != "label_enc.weight"} | {
        "transformer.patterns.weight": content
    }
