"""IDEA-Research/DAB-DETR and DN-DETR: query-first tensors, bool masks with True = hidden, inverse sigmoid eps 1e-3.

Neither repository is a package, so a decoder is recognised by its structure, and then by what it computes: a copy
with random parameters must give on random queries what the fast forward gives. Parameter names are ours.
"""

from __future__ import annotations

from torch import nn

from dab_fast.adapters._fast import Fast
from dab_fast.adapters._probe import check_parameters, probe
from dab_fast.adapters.idea_research.dropin import TransformerDecoder
from dab_fast.adapters.idea_research.models import (
    INVERSE_SIGMOID_EPS,
    fast_subclass,
    original_forward,
    read,
)
from dab_fast.decoder import DabDecoder
from dab_fast.parameters import StepAside

__all__ = ["INVERSE_SIGMOID_EPS", "fast_class", "looks_like_decoder", "why_not"]

_LAYER_MARKS = {"sa_qcontent_proj", "sa_kpos_proj", "ca_qpos_sine_proj", "self_attn", "cross_attn", "linear1"}
_DECODER_MARKS = {"layers", "norm", "query_scale", "ref_point_head"}


def fast_class(module: nn.Module) -> type[Fast] | None:
    if not looks_like_decoder(module) or why_not(module) is not None:
        return None
    return fast_subclass(type(module))  # type: ignore[arg-type]


def why_not(module: nn.Module) -> str | None:
    if not looks_like_decoder(module):
        return None
    if isinstance(module, (DabDecoder, TransformerDecoder)):
        return f"{type(module).__qualname__} is fast already"
    try:
        if "forward" in vars(module):
            raise StepAside("its forward is patched")
        params, config = read(module)
        check_parameters(params, config)
        probe(module, config, original_forward, read, tgt_mask=True)
    except StepAside as reason:
        return f"{type(module).__module__}.{type(module).__qualname__}: {reason}"
    return None


def looks_like_decoder(module: nn.Module) -> bool:
    layers = module._modules.get("layers")
    return (
        set(module._modules) >= _DECODER_MARKS
        and isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and set(layers[0]._modules) >= _LAYER_MARKS
    )
