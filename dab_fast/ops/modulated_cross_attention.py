"""Attention whose logits are content . content + position . position, q and k in two parts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dab_fast import reference
from dab_fast._first_derivative import first_derivative_only
from dab_fast._tracing import constant
from dab_fast.backends.torch import modulated_cross_attention as in_pytorch
from dab_fast.ops import _backends
from dab_fast.ops._checks import check_tensor
from dab_fast.ops._library import define
from dab_fast.precision import autocast_on, compute_dtype, saturate


def modulated_cross_attention(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor | None,  # [B, Q, H, d_pos]; None with k_pos: one-part attention
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor | None,  # [B or 1, S, H, d_pos]
    v: Tensor,  # [B, S, H, d_v]
    *,
    key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
    attn_mask: Tensor | None = None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:  # [B, Q, H, d_v]
    """softmax(scale * (q_content . k_content + q_pos . k_pos)) v: attention with q and k in two parts, per head.

    Args:
        q_content: Tensor[B, Q, H, d], as a view of its projection: any strides.
        q_pos: Tensor[B, Q, H, d_pos], the projected modulated sine embedding of the anchors; None together with k_pos
            is ordinary attention.
        k_content: Tensor[B, S, H, d].
        k_pos: Tensor[B or 1, S, H, d_pos]; 1 where all images share it.
        v: Tensor[B, S, H, d_v].
        key_padding_mask: bool Tensor[B, S], True = padded: no query sees that key, which must be finite all the same.
        attn_mask: bool Tensor[Q, S], or [B * H, Q, S] as `nn.MultiheadAttention` takes it; True = hidden.
        scale: of the logits; the default is 1 / sqrt(d + d_pos), that of the concatenated query.
        dropout_p: of the attention weights, in [0, 1); drawn from the device's default generator.

    Returns:
        Tensor[B, Q, H, d_v] in the dtype of v (autocast's, where that is on). A query that sees no key gets zeros.

    Logits, softmax and sums are float32 at least. Backward is deterministic, and computes the weights again instead of
    keeping them.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
        BackendUnavailable: the backend chosen by name cannot run this.

    Source: conditional cross-attention of IDEA-Research/DAB-DETR, `TransformerDecoderLayer.forward` and `attention.py`.
    """
    mask = attention_mask(key_padding_mask, attn_mask, q_content, k_content)
    return attend(q_content, q_pos, k_content, k_pos, v, mask, scale=scale, dropout_p=dropout_p)


class AttentionMask(NamedTuple):
    """Which keys a query must not see, for any number of calls of `attend`."""

    key_padding_mask: Tensor | None  # bool [B, S], True = padded
    attn_mask: Tensor | None  # bool [Q, S] or [B * H, Q, S], True = hidden
    merged: in_pytorch.Merged | None  # both in one, where plain PyTorch is the first choice
    mean: bool = False  # a query that sees no key gets the mean of v, and not zeros


def attention_mask(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    queries: Tensor,  # [B, Q, H, ...]
    keys: Tensor,  # [B, S, H, ...]
    *,
    mean: bool = False,  # a query that sees no key gets the mean of v, as from a softmax over equal logits, not zeros
) -> AttentionMask:
    """The masks of `modulated_cross_attention`, checked; merged here once, where each layer would do it again."""
    check_tensor("q_content", queries, ("B", "Q", "H", "d"))
    b, q, h, _ = queries.shape
    check_tensor("k_content", keys, (b, "S", h, "d"), like=queries)
    s = keys.shape[1]
    if key_padding_mask is None and attn_mask is None:
        return AttentionMask(None, None, None)
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask, (b, s), like=queries, boolean=True)
    if attn_mask is not None:
        shape = (q, s) if attn_mask.dim() == 2 else (b * h, q, s)
        check_tensor("attn_mask", attn_mask, shape, like=queries, boolean=True)
    in_turn = _backends.candidates("modulated_cross_attention", queries.device)
    merged = None
    if in_turn[:1] == ("torch",):
        merged = in_pytorch.merge(key_padding_mask, attn_mask, h, compute_dtype(queries), mean)
    return AttentionMask(key_padding_mask, attn_mask, merged, mean)


def attend(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor | None,  # [B, Q, H, d_pos]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor | None,  # [B or 1, S, H, d_pos]
    v: Tensor,  # [B, S, H, d_v]
    mask: AttentionMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:  # [B, Q, H, d_v]
    """`modulated_cross_attention` with its masks made ready by `attention_mask`."""
    b, q, h, d = q_content.shape
    s = k_content.shape[1]
    check_tensor("k_content", k_content, (b, s, h, d), like=q_content)
    check_tensor("v", v, (b, s, h, "d_v"), like=q_content)
    if (q_pos is None) != (k_pos is None):
        raise ValueError("q_pos and k_pos must be given together, or both be None")
    if q_pos is not None and k_pos is not None:
        check_tensor("q_pos", q_pos, (b, q, h, "d_pos"), like=q_content)
        check_tensor("k_pos", k_pos, ("B or 1", s, h, q_pos.shape[-1]), like=q_content)
        if k_pos.shape[0] not in (1, b):
            raise ValueError(f"k_pos must have shape [{b} or 1, {s}, {h}, {q_pos.shape[-1]}], got {list(k_pos.shape)}")
    dropout_p = constant(dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    tensors = (q_content, q_pos, k_content, k_pos, v)
    given = [x for x in tensors if x is not None]
    autocast = autocast_on(v)
    dtypes = [compute_dtype(x) if autocast else x.dtype for x in given]
    widest = max(x.shape[-1] for x in given)
    backend = _backends.select("modulated_cross_attention", q_content, dtypes, widest, scale)
    if scale is None:
        scale = 1 / math.sqrt(d + (0 if q_pos is None else q_pos.shape[-1]))
    masks = mask.key_padding_mask, mask.attn_mask
    if backend == "torch" and in_pytorch.why_not_fused(dtypes, s, dropout_p) is not None:
        attended = reference.modulated_cross_attention(
            *tensors, key_padding_mask=masks[0], attn_mask=masks[1], scale=scale, dropout_p=dropout_p
        )
        return _with_means(attended, v, mask)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    casted: Any = (x if x is None or x.dtype == dtypes[0] else saturate(x, dtypes[0]) for x in tensors)
    if backend == "torch":
        merged = mask.merged or in_pytorch.merge(*masks, h, dtypes[0], mask.mean)
        return in_pytorch.attend(*casted, mask=merged, scale=scale, grad=grad)
    rng = None
    if dropout_p > 0:
        # On the device, from its default generator: seeding, checkpointing and CUDA-graph replays see it.
        rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=q_content.device)
    if grad:
        attended = _ModulatedCrossAttention.apply(*casted, *masks, rng, scale, dropout_p, backend)
    else:
        attended = _forward(*casted, *masks, rng, scale, dropout_p, False, backend)[0]
    return _with_means(attended, v, mask)


def _with_means(
    attended: Tensor,  # [B, Q, H, d_v], with zeros where a query sees no key
    v: Tensor,  # [B, S, H, d_v]
    mask: AttentionMask,
) -> Tensor:  # [B, Q, H, d_v]
    """With the mean of v there instead, where the mask asks for it; no gradient of the logits."""
    hidden = reference.hidden_keys(mask.key_padding_mask, mask.attn_mask, v.shape[2]) if mask.mean else None
    if hidden is None:
        return attended
    blind = hidden.all(-1, keepdim=True).transpose(1, 2)
    return torch.where(blind, v.mean(1, keepdim=True).to(attended.dtype), attended)


def _fake_forward(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor | None,  # [B, Q, H, d_pos]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor | None,  # [B or 1, S, H, d_pos]
    v: Tensor,  # [B, S, H, d_v]
    key_padding_mask: Tensor | None,  # bool [B, S], True = padded
    attn_mask: Tensor | None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    rng: Tensor | None,  # int64 [2]: seed and offset of the dropout
    scale: float,
    dropout_p: float,
    keep: bool,
    backend: str,
) -> list[Tensor]:  # [B, Q, H, d_v]; with `keep`, in float32, the softmax [2, B, H, Q] and, unless v is that, the first
    b, q, h, _ = q_content.shape
    results = [v.new_empty(b, q, h, v.shape[3])]
    if keep:
        results.append(v.new_empty(2, b, h, q, dtype=torch.float32))
        if v.dtype != torch.float32:
            results.append(v.new_empty(b, q, h, v.shape[3], dtype=torch.float32))
    return results


def _fake_backward(
    d_out: Tensor,  # [B, Q, H, d_v]
    q_content: Tensor,
    q_pos: Tensor | None,
    k_content: Tensor,
    k_pos: Tensor | None,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    out: Tensor,  # of the forward, float32
    stats: Tensor,  # of the forward
    scale: float,
    dropout_p: float,
    needs: list[bool],  # of the five
    backend: str,
) -> list[Tensor]:  # those needed of d_q_content, d_q_pos, d_k_content, d_k_pos, d_v, as the inputs are
    inputs = (q_content, q_pos, k_content, k_pos, v)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


_forward = define("modulated_cross_attention", _fake_forward)
_backward = define("modulated_cross_attention_backward", _fake_backward)


class _ModulatedCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_content: Tensor,  # [B, Q, H, d]
        q_pos: Tensor | None,  # [B, Q, H, d_pos]
        k_content: Tensor,  # [B, S, H, d]
        k_pos: Tensor | None,  # [B or 1, S, H, d_pos]
        v: Tensor,  # [B, S, H, d_v]
        key_padding_mask: Tensor | None,  # bool [B, S]
        attn_mask: Tensor | None,  # bool [Q, S] or [B * H, Q, S]
        rng: Tensor | None,  # int64 [2]
        scale: float,
        dropout_p: float,
        backend: str,
    ) -> Tensor:  # [B, Q, H, d_v]
        inputs = (q_content, q_pos, k_content, k_pos, v, key_padding_mask, attn_mask, rng)
        out, stats, *wide = _forward(*inputs, scale, dropout_p, True, backend)
        ctx.save_for_backward(*inputs, wide[0] if wide else out, stats)
        ctx.options = scale, dropout_p
        ctx.backend = backend
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        found = iter(_backward(d_out, *saved, *ctx.options, list(needs), ctx.backend))
        return (*(next(found) if need else None for need in needs), *(None,) * 6)
