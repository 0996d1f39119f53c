"""`modulated_cross_attention` in plain PyTorch: its fused attention forward, a backward of our own.

The backwards of PyTorch's fused kernels take exp(logit - log-sum-exp) for a weight, and what those two lost to rounding
comes back as a factor: on a CPU (torch 2.13) the gradient of v is off by 2e-3 at logits of 1e4, by 1e13 at 1e8, and NaN
at 1e10; a box as narrow as 1e-6 makes such. That of the memory-efficient CUDA kernel is not deterministic either. So
the backward here computes the softmax again, as the specification does, from the inputs alone.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dab_fast import reference
from dab_fast.ops import _backends
from dab_fast.ops._first_derivative import first_derivative_only

# The scores of which the backward holds three matrices at a time: on a CPU what its cache does, elsewhere a gigabyte.
SCORES_AT_ONCE = {"cpu": 2**21, "gpu": 2**26}

# The flags that sdpa_kernel sets and puts back belong to the process; the replicas of DataParallel are threads.
_FLAGS = threading.Lock()


def attend(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor | None,  # [B, Q, H, d_pos]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor | None,  # [B or 1, S, H, d_pos]
    v: Tensor,  # [B, S, H, d_v]
    key_padding_mask: Tensor | None,  # bool [B, S]
    attn_mask: Tensor | None,  # bool [Q, S] or [B * H, Q, S]
    *,
    scale: float,
    grad: bool,
) -> Tensor:  # [B, Q, H, d_v]
    """`reference.modulated_cross_attention` of tensors of one dtype, without dropout; `grad`: a gradient is wanted."""
    b, _, h, _ = q_content.shape
    hidden = reference.hidden_keys(key_padding_mask, attn_mask, h)
    if q_pos is not None and k_pos is not None:
        q_content = torch.cat((q_content, q_pos), -1)
        k_content = torch.cat((k_content, k_pos.expand(b, -1, -1, -1)), -1)
    q, k, v = (x.transpose(1, 2) for x in (q_content, k_content, v))
    attended = (_Attention.apply if grad and not _backends.exporting() else _forward)(q, k, v, hidden, scale)
    return attended.transpose(1, 2)


def _forward(
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, S, d]
    v: Tensor,  # [B, H, S, d_v]
    hidden: Tensor | None,  # bool, broadcastable to [B, H, Q, S]
    scale: float,
) -> Tensor:  # [B, H, Q, d_v]
    """PyTorch's fused attention, with zeros where every key is hidden.

    The CPU kernel wants v as wide as q and k: padding v there takes half the time of materialised scores (S = 4200:
    17 ms against 33 ms on two cores). On CUDA the memory-efficient kernel takes unequal widths. Other devices have
    kernels of their own, of which nothing is known: there the scores are materialised, in float32 at least.
    """
    on_cpu, d_v = v.device.type == "cpu", v.shape[-1]
    if on_cpu and d_v < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - d_v))
    visible = blind = None
    if hidden is not None:
        blind = hidden.all(-1, keepdim=True)
        visible = ~hidden | blind
    if on_cpu or v.device.type == "cuda":
        alone = nullcontext() if on_cpu or torch.compiler.is_compiling() else _FLAGS
        kernels = nullcontext() if on_cpu else sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        with alone, kernels:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    else:
        with reference.autocast_off(v):
            wide_q, wide_k = reference.at_least_float32(q) * scale, reference.at_least_float32(k)
            attended = _weights(wide_q, wide_k, hidden).to(v.dtype) @ v
    if blind is not None:
        attended = attended.masked_fill(blind, 0)
    return attended[..., :d_v]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale = scale
        return _forward(q, k, v, hidden, scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden = saved
        b, h, n, _ = q.shape
        needs = ctx.needs_input_grad[:3]
        # torch.compile takes it whole: blocks would tie its graph to the number of images.
        blocks = [] if torch.compiler.is_compiling() else _blocks(b, h, n * k.shape[2], v.device.type)
        with reference.autocast_off(v):
            if len(blocks) < 2:
                return (*_backward(d_out, q, k, v, hidden, ctx.scale, needs), None, None)
            gradients = [x.new_empty(x.shape) if need else None for x, need in zip((q, k, v), needs, strict=True)]
            hidden = None if hidden is None else hidden.expand(b, h, -1, -1)
            for some in blocks:
                mask = None if hidden is None else hidden[some]
                found = _backward(d_out[some], q[some], k[some], v[some], mask, ctx.scale, needs)
                for gradient, part in zip(gradients, found, strict=True):
                    if gradient is not None:
                        gradient[some] = part
        return (*gradients, None, None)


def _blocks(b: int, h: int, scores: int, device_type: str) -> list[tuple[slice, slice]]:
    """Images and heads to compute at once, of `scores` scores a head."""
    most = SCORES_AT_ONCE["cpu" if device_type == "cpu" else "gpu"]
    images, heads = max(1, most // max(1, scores * h)), min(h, max(1, most // max(1, scores)))
    return [
        (slice(image, image + images), slice(head, head + heads))
        for image in range(0, b, images)
        for head in range(0, h, heads)
    ]


def _weights(
    q: Tensor,  # [B, H, Q, d], scaled
    k: Tensor,  # [B, H, S, d]
    hidden: Tensor | None,  # bool, broadcastable to [B, H, Q, S]
) -> Tensor:  # [B, H, Q, S]
    """The softmax; even where every key is hidden."""
    logits = q @ k.transpose(-1, -2)
    if hidden is not None:
        logits.masked_fill_(hidden, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, -1)


def _backward(
    d_out: Tensor,  # [B, H, Q, d_v]
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, S, d]
    v: Tensor,  # [B, H, S, d_v]
    hidden: Tensor | None,  # bool, broadcastable to [B, H, Q, S]
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # those needed of d_q, d_k, d_v
    need_q, need_k, need_v = needs
    wide_q, wide_k = reference.at_least_float32(q) * scale, reference.at_least_float32(k)
    weights = _weights(wide_q, wide_k, hidden)
    if hidden is not None:
        weights.masked_fill_(hidden, 0)
    d_v = weights.to(v.dtype).mT @ d_out if need_v else None
    if not (need_q or need_k):
        return None, None, d_v
    d_weights = (d_out @ v.mT).to(weights.dtype)
    d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_q = ((d_logits @ wide_k) * scale).to(q.dtype) if need_q else None
    d_k = (d_logits.mT @ wide_q).to(k.dtype) if need_k else None
    return d_q, d_k, d_v
