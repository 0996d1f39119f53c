"""IDEA-Research/DAB-DETR and DN-DETR: query-first tensors, bool masks with True = hidden, inverse sigmoid eps 1e-3.

Neither repository is a package, so a decoder is recognised by its structure, and then by what it computes: a copy
with random parameters must give on random queries what the fast forward gives. Parameter names are ours. The box head
and the criterion have forwards that differ from fork to fork: these run, and are answered by the fast ops.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dab_fast.adapters._fast import Fast
from dab_fast.adapters.idea_research import criterion, head
from dab_fast.adapters.idea_research._recognised import fast_subclass
from dab_fast.adapters.idea_research.backbone import FastBody, looks_like_body
from dab_fast.adapters.idea_research.encoder import FastTransformerEncoder, looks_like_encoder
from dab_fast.adapters.idea_research.models import INVERSE_SIGMOID_EPS, FastTransformerDecoder

__all__ = ["INVERSE_SIGMOID_EPS", "fast_class", "looks_like_decoder"]

_LAYER_MARKS = {"sa_qcontent_proj", "sa_kpos_proj", "ca_qpos_sine_proj", "self_attn", "cross_attn", "linear1"}
_DECODER_MARKS = {"layers", "norm", "query_scale", "ref_point_head"}


def fast_class(module: nn.Module) -> type[Fast] | None:
    kind: Any = type(module)
    if criterion.looks_like_criterion(module):
        return criterion.fast_subclass(kind)
    if head.looks_like_model(module):
        return head.fast_subclass(kind)
    for looks_like, mixin in (
        (looks_like_body, FastBody),
        (looks_like_encoder, FastTransformerEncoder),
        (looks_like_decoder, FastTransformerDecoder),
    ):
        if looks_like(module):
            return fast_subclass(mixin, kind)
    return None


def looks_like_decoder(module: nn.Module) -> bool:
    layers = module._modules.get("layers")
    return (
        set(module._modules) >= _DECODER_MARKS
        and isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and set(layers[0]._modules) >= _LAYER_MARKS
    )
