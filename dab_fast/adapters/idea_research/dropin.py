"""The two decoder classes of IDEA-Research/DAB-DETR and DN-DETR, by changing one import.

In their `transformer.py`, delete the classes `TransformerDecoderLayer` and `TransformerDecoder` and write

    from dab_fast.idea_research import TransformerDecoder, TransformerDecoderLayer

Constructor arguments, parameter names and order, initial weights for a given seed, arguments and results of the
forward are theirs. One difference: a query whose keys are all masked gets zeros from that attention, not NaN.
"""

from __future__ import annotations

import copy
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dab_fast import reference
from dab_fast.adapters.idea_research.models import read, run
from dab_fast.config import Activation
from dab_fast.decoder import MLP
from dab_fast.ops._checks import check_tensor
from dab_fast.parameters import StepAside
from dab_fast.precision import autocast_on


class TransformerDecoderLayer(nn.Module):
    """One layer's parameters and rates; `TransformerDecoder` computes all its layers together.

    Args:
        d_model: model width D.
        nhead: attention heads H.
        dim_feedforward: FFN width.
        dropout: rate everywhere: attention probabilities, after each attention, inside and after the FFN.
        activation: "prelu", "relu", "gelu", "silu" or "selu".
        normalize_before: without effect, as in the original.
        keep_query_pos: the cross-attention reads the query position in every layer, not only in the first.
        rm_self_attn_decoder: must be False.

    Raises:
        ValueError: an argument is not one of these.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
        keep_query_pos: bool = False,
        rm_self_attn_decoder: bool = False,
    ) -> None:
        super().__init__()
        if rm_self_attn_decoder:
            raise ValueError("rm_self_attn_decoder must be False, got True")
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)}, got {activation!r}")
        if d_model % 4 or d_model % nhead:
            raise ValueError(f"d_model must be a multiple of 4 and of nhead={nhead}, got {d_model}")
        # The order is that of an optimizer's saved state, and of the random numbers of the initial weights.
        for name in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"):
            self.add_module(f"{name}_proj", nn.Linear(d_model, d_model))
        self.self_attn = AttentionOutput(d_model, nhead, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        for name in ("ca_qcontent", "ca_qpos", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"):
            self.add_module(f"{name}_proj", nn.Linear(d_model, d_model))
        self.cross_attn = AttentionOutput(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = nn.PReLU() if activation == "prelu" else reference.ACTIVATIONS[activation]
        self.nhead, self.normalize_before, self.keep_query_pos = nhead, normalize_before, keep_query_pos
        self.rm_self_attn_decoder = rm_self_attn_decoder

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("TransformerDecoder computes all its layers together; a layer alone has no forward")


class AttentionOutput(nn.Module):
    """What an attention owns beside its q, k and v projections."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.out_proj.bias)
        self.num_heads, self.dropout = num_heads, dropout


class TransformerDecoder(nn.Module):
    """The decoder. Assign `bbox_embed` afterwards: None, a three-layer relu MLP, or a ModuleList of one per layer.

    Args:
        decoder_layer: copied `num_layers` times.
        num_layers: decoder layers L.
        norm: a LayerNorm, applied to every layer's output for the returned stack.
        return_intermediate: must be True.
        d_model: model width D.
        query_dim: 4 for anchor boxes, 2 for points.
        keep_query_pos: as in `decoder_layer`.
        query_scale_type: "cond_elewise", "cond_scalar" or "fix_elewise".
        modulate_hw_attn: modulate the sine embedding by width and height; needs `query_dim` 4.
        bbox_embed_diff_each_layer: `bbox_embed` will be a ModuleList.

    Raises:
        ValueError: an argument is not one of these, or does not fit `decoder_layer`.
    """

    bbox_embed: nn.Module | None

    def __init__(
        self,
        decoder_layer: TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        return_intermediate: bool = False,
        d_model: int = 256,
        query_dim: int = 2,
        keep_query_pos: bool = False,
        query_scale_type: str = "cond_elewise",
        modulate_hw_attn: bool = False,
        bbox_embed_diff_each_layer: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(decoder_layer, TransformerDecoderLayer):
            kind = type(decoder_layer)
            raise TypeError(
                "decoder_layer must be a dab_fast.idea_research.TransformerDecoderLayer, "
                f"got {kind.__module__}.{kind.__qualname__}"
            )
        if type(decoder_layer).forward is not TransformerDecoderLayer.forward:
            raise ValueError(f"{type(decoder_layer).__qualname__} has a forward of its own, which would not be called")
        if not return_intermediate:
            raise ValueError("return_intermediate must be True: the original asserts it")
        if type(norm) is not nn.LayerNorm or norm.normalized_shape != (d_model,):
            raise ValueError(f"norm must be a LayerNorm of d_model={d_model} features, got {norm}")
        if decoder_layer.linear1.in_features != d_model:
            raise ValueError(f"d_model must be {decoder_layer.linear1.in_features} as in decoder_layer, got {d_model}")
        if decoder_layer.keep_query_pos and not keep_query_pos:
            raise ValueError("keep_query_pos must be True as in decoder_layer, got False")
        self.layers = nn.ModuleList(copy.deepcopy(decoder_layer) for _ in range(num_layers))
        self.norm = norm
        self.query_scale: nn.Module
        if query_scale_type == "fix_elewise":
            self.query_scale = nn.Embedding(num_layers, d_model)
        else:
            self.query_scale = MLP(d_model, d_model, 1 if query_scale_type == "cond_scalar" else d_model, 2)
        self.ref_point_head = MLP(query_dim // 2 * d_model, d_model, d_model, 2)
        self.bbox_embed = None
        if modulate_hw_attn:
            self.ref_anchor_head = MLP(d_model, d_model, 2, 2)
        if not keep_query_pos:
            for layer in self.layers[1:]:
                layer.register_module("ca_qpos_proj", None)
        self.num_layers, self.d_model, self.query_dim = num_layers, d_model, query_dim
        self.nhead = decoder_layer.nhead
        self.return_intermediate = return_intermediate
        self.query_scale_type, self.modulate_hw_attn = query_scale_type, modulate_hw_attn
        self.bbox_embed_diff_each_layer = bbox_embed_diff_each_layer
        try:
            read(self)
        except StepAside as reason:
            raise ValueError(str(reason)) from None

    def forward(
        self,
        tgt: Tensor,  # [Q, B, D]: the queries' content
        memory: Tensor,  # [S, B, D]: the encoder's output
        tgt_mask: Tensor | None = None,  # bool [Q, Q] or [B * H, Q, Q], True = hidden
        memory_mask: Tensor | None = None,  # bool [Q, S] or [B * H, Q, S], True = hidden
        tgt_key_padding_mask: Tensor | None = None,  # bool [B, Q], True = padded
        memory_key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
        pos: Tensor | None = None,  # [S, B, D]: the sine embedding of the memory tokens' positions
        refpoints_unsigmoid: Tensor | None = None,  # [Q, B, query_dim]: the anchors before the sigmoid
    ) -> list[Tensor]:
        """[hidden states [L, B, Q, D], reference points [L, B, Q, query_dim]]; [1, ...] without `bbox_embed`.

        The reference points are float32 at least whatever the dtype of the content.

        Raises:
            ValueError, TypeError: a tensor's shape, dtype or device does not fit.
            RuntimeError: a submodule was replaced, hooked or sharded, so that its weight alone is not what it computes.
        """
        self._check(tgt, memory, pos, refpoints_unsigmoid)
        q, b, _ = tgt.shape
        s, h = memory.shape[0], self.nhead
        _check_mask("tgt_mask", tgt_mask, (q, q), (b * h, q, q), tgt)
        _check_mask("memory_mask", memory_mask, (q, s), (b * h, q, s), tgt)
        _check_mask("tgt_key_padding_mask", tgt_key_padding_mask, (b, q), None, tgt)
        _check_mask("memory_key_padding_mask", memory_key_padding_mask, (b, s), None, tgt)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        try:
            return run(self, tgt, memory, *masks, pos, refpoints_unsigmoid)  # type: ignore[arg-type]
        except StepAside as reason:
            raise RuntimeError(f"TransformerDecoder reads its parameters directly, and cannot: {reason}") from None

    def _check(self, tgt: Tensor, memory: Tensor, pos: Tensor | None, refpoints_unsigmoid: Tensor | None) -> None:
        d, weight = self.d_model, self.norm.weight
        check_tensor("tgt", tgt, ("Q", "B", d), like=weight)
        q, b, _ = tgt.shape
        check_tensor("memory", memory, ("S", b, d), like=weight)
        check_tensor("pos", pos, (memory.shape[0], b, d), like=weight)
        check_tensor("refpoints_unsigmoid", refpoints_unsigmoid, (q, b, self.query_dim), like=weight)
        if not autocast_on(weight):
            for name, x in (("tgt", tgt), ("memory", memory), ("pos", pos)):
                if x is not None and x.dtype != weight.dtype:
                    raise TypeError(f"{name} must be {weight.dtype} as the parameters are, got {x.dtype}")


def _check_mask(
    name: str, mask: Tensor | None, shape: tuple[int, ...], per_head: tuple[int, ...] | None, like: Tensor
) -> None:
    if mask is None:
        return
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, True = hidden, got {mask.dtype}")
    three = per_head is not None and isinstance(mask, Tensor) and mask.dim() == 3
    check_tensor(name, mask, per_head if three and per_head else shape, like=like, boolean=True)
