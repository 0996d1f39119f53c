"""Attention whose logits are content . content + position . position, q and k in two parts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dab_fast import reference
from dab_fast.kernels.configs import WIDEST_HEAD
from dab_fast.ops import _backends, _library
from dab_fast.ops._checks import check_tensor
from dab_fast.ops._first_derivative import first_derivative_only
from dab_fast.ops._plain_attention import attend


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
    check_tensor("q_content", q_content, ("B", "Q", "H", "d"))
    b, q, h, d = q_content.shape
    check_tensor("k_content", k_content, (b, "S", h, d), like=q_content)
    s = k_content.shape[1]
    check_tensor("v", v, (b, s, h, "d_v"), like=q_content)
    if (q_pos is None) != (k_pos is None):
        raise ValueError("q_pos and k_pos must be given together, or both be None")
    if q_pos is not None and k_pos is not None:
        check_tensor("q_pos", q_pos, (b, q, h, "d_pos"), like=q_content)
        check_tensor("k_pos", k_pos, ("B or 1", s, h, q_pos.shape[-1]), like=q_content)
        if k_pos.shape[0] not in (1, b):
            raise ValueError(f"k_pos must have shape [{b} or 1, {s}, {h}, {q_pos.shape[-1]}], got {list(k_pos.shape)}")
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask, (b, s), like=q_content, boolean=True)
    if attn_mask is not None:
        shape = (q, s) if attn_mask.dim() == 2 else (b * h, q, s)
        check_tensor("attn_mask", attn_mask, shape, like=q_content, boolean=True)
    dropout_p = _library.constant(dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    tensors = (q_content, q_pos, k_content, k_pos, v)
    given = [x for x in tensors if x is not None]
    autocast = reference.autocast_on(v)
    dtypes = [reference.compute_dtype(x) if autocast else x.dtype for x in given]
    widest = max(x.shape[-1] for x in given)
    backend = _backends.select("modulated_cross_attention", q_content, _LIMITS, dtypes, widest, scale)
    if scale is None:
        scale = 1 / math.sqrt(d + (0 if q_pos is None else q_pos.shape[-1]))
    dtype = dtypes[0]
    if backend == "torch" and (dropout_p > 0 or s == 0 or any(x != dtype for x in dtypes) or _backends.transformed()):
        return reference.modulated_cross_attention(
            q_content,
            q_pos,
            k_content,
            k_pos,
            v,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            scale=scale,
            dropout_p=dropout_p,
        )
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    casted = (x if x is None or x.dtype == dtype else reference.saturate(x, dtype) for x in tensors)
    inputs: Any = (*casted, key_padding_mask, attn_mask)
    if backend == "torch":
        return attend(*inputs, scale=scale, grad=grad)
    rng = None
    if dropout_p > 0:
        # On the device, from its default generator: seeding, checkpointing and CUDA-graph replays see it.
        rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=q_content.device)
    if grad:
        return _ModulatedCrossAttention.apply(*inputs, rng, scale, dropout_p, backend)
    return _library.modulated_cross_attention(*inputs, rng, scale, dropout_p, False, backend)[0]


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
        out, stats, *wide = _library.modulated_cross_attention(*inputs, scale, dropout_p, True, backend)
        ctx.save_for_backward(*inputs, wide[0] if wide else out, stats)
        ctx.options = scale, dropout_p
        ctx.backend = backend
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        found = iter(_library.modulated_cross_attention_backward(d_out, *saved, *ctx.options, *needs, ctx.backend))
        return (*(next(found) if need else None for need in needs), *(None,) * 6)


def _triton_limits(dtypes: list[torch.dtype], widest: int, scale: float | None) -> str | None:
    if any(dtype != dtypes[0] for dtype in dtypes):
        return f"its kernels need one dtype for all tensors, got {', '.join(map(str, dtypes))}"
    if dtypes[0] not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels compute in float32, float16 or bfloat16, got {dtypes[0]}"
    if widest > WIDEST_HEAD:
        return f"its heads are at most {WIDEST_HEAD} wide, got {widest}"
    if scale is not None and scale <= 0:
        return f"its kernels need a positive scale, got {scale}"
    return None


_LIMITS = {"triton": _triton_limits}
