"""`modulated_cross_attention` in plain PyTorch: its fused attention forward, a backward of our own.

The backwards of PyTorch's fused kernels take exp(logit - log-sum-exp) for a weight, and what those two lost to rounding
comes back as a factor: on a CPU (torch 2.13) the gradient of v is off by 2e-3 at logits of 1e4, by 1e13 at 1e8, and NaN
at 1e10; a box as narrow as 1e-6 makes such. That of the memory-efficient CUDA kernel is not deterministic either. So
the backward here computes the softmax again, as the specification does, from the inputs alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dab_fast import reference
from dab_fast._first_derivative import first_derivative_only
from dab_fast._tracing import compiling, exporting, transformed
from dab_fast.precision import at_least_float32, autocast_off

# The scores of which the backward holds three matrices at a time: on a CPU what its cache does, elsewhere a gigabyte.
SCORES_AT_ONCE = {"cpu": 2**21, "gpu": 2**26}

_ON_CUDA = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_VECTOR = 16  # float32 numbers in the widest vector of a CPU that PyTorch is compiled for

# The flags that sdpa_kernel sets and puts back belong to the process; the replicas of DataParallel are threads.
_FLAGS = threading.Lock()


class Merged(NamedTuple):
    """Both masks in one, broadcastable to [B, H, Q, S]; all None where nothing is hidden."""

    hidden: Tensor | None = None  # bool
    visible: Tensor | None = None  # as the fused attention takes it; no query sees no key there
    blind: Tensor | None = None  # bool, broadcastable to [B, H, Q, 1]: queries whose result is yet to be corrected
    mean: bool = False  # a query that sees no key gets the mean of v, and not zeros


def merge(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    heads: int,
    dtype: torch.dtype,  # of the queries
    mean: bool,  # as in `Merged`
) -> Merged:
    hidden = reference.hidden_keys(key_padding_mask, attn_mask, heads)
    if hidden is None:
        return Merged()
    if hidden.device.type != "cpu":
        blind = hidden.all(-1, keepdim=True)
        return Merged(hidden, ~hidden | blind, blind, mean)
    # The kernel reads a bias of another dtype as if it were of its own, float32 beside half precision excepted. It is
    # finite, as in the specification, for the reason that `_fused_on_cpu` gives.
    # With it a query that sees no key weighs all keys alike.
    bias = torch.zeros_like(hidden, dtype=torch.promote_types(dtype, torch.float32))
    bias.masked_fill_(hidden, torch.finfo(bias.dtype).min)
    return Merged(hidden, bias, None if mean else hidden.all(-1, keepdim=True), mean)


def why_not_fused(dtypes: Sequence[torch.dtype], keys: int, dropout_p: float) -> str | None:
    """Why the specification runs, which keeps every score, and not `attend`; None where `attend` serves."""
    if dropout_p > 0:
        return "dropout needs the weights"
    if keys == 0:
        return "there are no keys"
    if any(dtype != dtypes[0] for dtype in dtypes):
        return f"it needs one dtype for all tensors, got {', '.join(map(str, dtypes))}"
    if transformed():
        return "torch.func and forward-mode AD need the specification"
    return None


def attend(
    q_content: Tensor,  # [B, Q, H, d]
    q_pos: Tensor | None,  # [B, Q, H, d_pos]
    k_content: Tensor,  # [B, S, H, d]
    k_pos: Tensor | None,  # [B or 1, S, H, d_pos]
    v: Tensor,  # [B, S, H, d_v]
    *,
    mask: Merged,
    scale: float,
    grad: bool,  # whether a gradient is wanted
) -> Tensor:  # [B, Q, H, d_v]
    """`reference.modulated_cross_attention` of tensors of one dtype, without dropout."""
    q, k, v = (x.transpose(1, 2) for x in (q_content, k_content, v))
    if q_pos is not None and k_pos is not None:  # joined head by head, as every product wants them
        k_pos = k_pos.transpose(1, 2).expand(k.shape[0], -1, -1, -1)
        q, k = torch.cat((q, q_pos.transpose(1, 2)), -1), torch.cat((k, k_pos), -1)
    attended = (_Attention.apply if grad and not exporting() else _forward)(q, k, v, *mask, scale)
    return attended.transpose(1, 2)


def _forward(
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, S, d]
    v: Tensor,  # [B, H, S, d_v]
    hidden: Tensor | None,  # as in `Merged`
    visible: Tensor | None,
    blind: Tensor | None,
    mean: bool,
    scale: float,
) -> Tensor:  # [B, H, Q, d_v]
    """PyTorch's fused attention; zeros, or the mean of v, where every key is hidden.

    On CUDA the memory-efficient kernel takes v of another width than q and k. Other devices have kernels of their own,
    of which nothing is known: there the scores are materialised, in float32 at least, and on a CPU for few keys and
    for v wider than they are.
    """
    device = v.device.type
    if device == "cuda":
        with nullcontext() if compiling() else _FLAGS, sdpa_kernel(_ON_CUDA):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    elif device == "cpu" and exporting():  # the program that runs the graph has kernels of its own
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    elif device == "cpu" and q.numel() > 0 and k.shape[2] >= _VECTOR and v.shape[-1] <= q.shape[-1]:
        attended = _fused_on_cpu(q, k, v, visible, scale)
    else:
        with autocast_off(v):
            attended = _weights(at_least_float32(q), at_least_float32(k), scale, hidden).to(v.dtype) @ v
    if blind is None:
        return attended
    return torch.where(blind, v.mean(-2, keepdim=True), attended) if mean else attended.masked_fill(blind, 0)


def _fused_on_cpu(
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, S, d]
    v: Tensor,  # [B, H, S, d_v]
    visible: Tensor | None,  # as in `Merged`
    scale: float,
) -> Tensor:  # [B, H, Q, d_v]
    """The kernel of `F.scaled_dot_product_attention` on a CPU, held to the specification where that is NaN.

    It wants v as wide as q and k: padding v takes half the time of materialised scores (S = 4200: 17 ms against 33 ms
    on two cores). As of torch 2.13 its row maximum passes over NaN in the last keys, those that fill no vector, and a
    row whose maximum is then -inf becomes zeros: so there must be `_VECTOR` keys, and hidden ones get a finite bias, as
    in the specification. In half precision its exp makes a number of NaN where a logit is infinite, but the log-sum-exp
    is then not finite, and zero times it is NaN.
    """
    d_v = v.shape[-1]
    if d_v < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - d_v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attended, log_sum_exp = kernel(q, k, v, attn_mask=visible, scale=scale)
    attended = attended[..., :d_v]
    if attended.dtype in (torch.float16, torch.bfloat16):
        attended += (0 * log_sum_exp).to(attended.dtype).unsqueeze(-1)
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        visible: Tensor | None,
        blind: Tensor | None,
        mean: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, hidden)
        ctx.options = mean, scale
        return _forward(q, k, v, hidden, visible, blind, mean, scale)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden = saved
        mean, scale = ctx.options
        b, h, n, _ = q.shape
        needs = ctx.needs_input_grad[:3]
        # torch.compile takes it whole: blocks would tie its graph to the number of images.
        blocks = [] if compiling() else _blocks(b, h, n * k.shape[2], v.device.type)
        with autocast_off(v):
            if len(blocks) < 2:
                return (*_backward(d_out, q, k, v, hidden, mean, scale, needs), *(None,) * 5)
            gradients = [x.new_empty(x.shape) if need else None for x, need in zip((q, k, v), needs, strict=True)]
            hidden = None if hidden is None else hidden.expand(b, h, -1, -1)
            for some in blocks:
                mask = None if hidden is None else hidden[some]
                found = _backward(d_out[some], q[some], k[some], v[some], mask, mean, scale, needs)
                for gradient, part in zip(gradients, found, strict=True):
                    if gradient is not None:
                        gradient[some] = part
        return (*gradients, *(None,) * 5)


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
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, S, d]
    scale: float,
    hidden: Tensor | None,  # bool, broadcastable to [B, H, Q, S]
) -> Tensor:  # [B, H, Q, S]
    """The softmax; even where every key is hidden."""
    logits = _scaled(q, k.mT, scale)
    if hidden is not None:
        logits.masked_fill_(hidden, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, -1)


def _backward(
    d_out: Tensor,  # [B, H, Q, d_v]
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, S, d]
    v: Tensor,  # [B, H, S, d_v]
    hidden: Tensor | None,  # bool, broadcastable to [B, H, Q, S]
    mean: bool,  # as in `Merged`
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # those needed of d_q, d_k, d_v
    need_q, need_k, need_v = needs
    # Heads are strided, and every product would copy them again.
    d_out, k, v = d_out.contiguous(), k.contiguous(), v.contiguous()
    wide_q, wide_k = at_least_float32(q.contiguous()), at_least_float32(k)
    weights = _weights(wide_q, wide_k, scale, hidden)
    if hidden is not None and not mean:
        weights.masked_fill_(hidden, 0)
    d_v = weights.to(v.dtype).mT @ d_out if need_v else None
    if not (need_q or need_k):
        return None, None, d_v
    d_weights = (d_out @ v.mT).to(weights.dtype)
    d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_q = _scaled(d_logits, wide_k, scale).to(q.dtype) if need_q else None
    d_k = _scaled(d_logits.mT, wide_q, scale).to(k.dtype) if need_k else None
    return d_q, d_k, d_v


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:  # [B, H, n, m], [B, H, m, l]; [B, H, n, l]
    """scale * (a @ b) in one call."""
    a_, b_ = a.flatten(0, 1), b.flatten(0, 1)
    nothing = a_.new_empty(1)  # not read
    return torch.baddbmm(nothing, a_, b_, beta=0, alpha=scale).unflatten(0, a.shape[:2])
