"""What others offer for the same work, so that a comparison is with the best there is."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _fused_attention(x: Tensor) -> AbstractContextManager[None]:
    """On a GPU the memory-efficient kernel or plain math: flash attention refuses a v narrower than q and k, and
    cuDNN's has given wrong gradients with a mask and failed under graph capture."""
    if x.device.type == "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _sdpa(
    query: Tensor,  # [B, H, Q, d]
    key: Tensor,  # [B, H, S, d]
    value: Tensor,  # [B, H, S, d_v]
    mask: Tensor | None,  # bool, True = visible, or added to the logits; broadcastable to [B, H, Q, S]
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:  # [B, H, Q, d_v]
    width = value.shape[-1]
    if query.device.type == "cpu":
        value = F.pad(value, (0, query.shape[-1] - width))  # else the CPU takes the unfused path
    with _fused_attention(query):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out[..., :width]


def use_sdpa(module: nn.Module) -> None:
    """Gives every attention in a Hugging Face DAB-DETR module `F.scaled_dot_product_attention`, in place."""
    classes = _sdpa_classes()
    for child in module.modules():
        if type(child) in classes:
            child.__class__ = classes[type(child)]


@functools.cache
def _sdpa_classes() -> dict[type, type]:
    from transformers.models.dab_detr import modeling_dab_detr as theirs

    class DecoderAttention(theirs.DabDetrAttention):
        def forward(
            self,
            hidden_states: Tensor,  # [B, Q, D]
            attention_mask: Tensor | None = None,
            key_states: Any = None,  # [B, S, D]
            value_states: Any = None,  # [B, S, output_dim]
            output_attentions: bool | None = None,
        ) -> Any:
            heads = (self.attention_heads, -1)
            out = _sdpa(
                hidden_states.unflatten(-1, heads).transpose(1, 2),
                key_states.unflatten(-1, heads).transpose(1, 2),
                value_states.unflatten(-1, heads).transpose(1, 2),
                attention_mask,
                self.scaling,
                self.attention_dropout if self.training else 0.0,
            )
            return self.output_proj(out.transpose(1, 2).flatten(-2)), None

    class EncoderAttention(theirs.DetrAttention):
        def forward(
            self,
            hidden_states: Tensor,  # [B, S, D]
            attention_mask: Tensor | None = None,
            object_queries: Tensor | None = None,  # [B, S, D]
            key_value_states: Tensor | None = None,
            output_attentions: bool = False,
        ) -> Any:
            heads = (self.num_heads, -1)
            with_pos = hidden_states if object_queries is None else hidden_states + object_queries
            out = _sdpa(
                self.q_proj(with_pos).unflatten(-1, heads).transpose(1, 2),
                self.k_proj(with_pos).unflatten(-1, heads).transpose(1, 2),
                self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2),
                attention_mask,
                self.scaling,
                self.attention_dropout if self.training else 0.0,
            )
            return self.out_proj(out.transpose(1, 2).flatten(-2)), None

    return {theirs.DabDetrAttention: DecoderAttention, theirs.DetrAttention: EncoderAttention}


def _concatenated(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor,  # [B, Q, H, d]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor,  # [B or 1, S, H, d]
    v: Tensor,  # [B, S, H, d]
) -> tuple[Tensor, Tensor, Tensor, float]:  # [B, H, N, ...] each, and the scale of the logits
    query = torch.cat((q_content, q_pos), -1)
    key = torch.cat((k_content, k_pos.expand_as(k_content)), -1)
    return query.transpose(1, 2), key.transpose(1, 2), v.transpose(1, 2), query.shape[-1] ** -0.5


def sdpa_two_part(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor,  # [B, Q, H, d]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor,  # [B or 1, S, H, d]
    v: Tensor,  # [B, S, H, d]
    key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
) -> Tensor:  # [B, Q, H, d]
    """`modulated_cross_attention` as F.scaled_dot_product_attention of concatenated parts."""
    query, key, value, scale = _concatenated(q_content, q_pos, k_content, k_pos, v)
    mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
    if mask is not None:
        mask = mask.expand(-1, 1, query.shape[2], -1)
    return _sdpa(query, key, value, mask, scale).transpose(1, 2)


@functools.cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_two_part(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor,  # [B, Q, H, d]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor,  # [B or 1, S, H, d]
    v: Tensor,  # [B, S, H, d]
    key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
) -> Tensor:  # [B, Q, H, d]
    """`modulated_cross_attention` as compiled FlexAttention of concatenated parts."""
    query, key, value, scale = _concatenated(q_content, q_pos, k_content, k_pos, v)
    hide = None
    if key_padding_mask is not None:

        def hide(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(key_padding_mask[b, k], -float("inf"), score)

    return _flex_attention()(query, key, value, score_mod=hide, scale=scale).transpose(1, 2)
