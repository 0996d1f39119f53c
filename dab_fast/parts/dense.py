"""The dense parts of encoder and decoder as autograd Functions that keep for backward what is already there.

A product with several joined weights keeps the parameters, not their joined copy; the FFN keeps its input and computes
its wide inner activation again. Under torch.compile, torch.export, torch.jit.trace and torch.func the plain
compositions run, which those tools partition themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dab_fast._first_derivative import first_derivative_only
from dab_fast._tracing import compiling, transformed
from dab_fast.reference import ACTIVATIONS, Parameters

Activation = Callable[..., Tensor]  # of the inner tensor and, for PReLU, its slope


def weights_and_biases(params: Parameters, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the linear layers of these names."""
    return [params[f"{name}.weight"] for name in names], [params[f"{name}.bias"] for name in names]


def views_per_layer(shared: Parameters, num_layers: int) -> list[Parameters]:
    """Per layer, the weights that the layers share; where gradients are to be added, through views, so in one sum."""
    if not torch.is_grad_enabled():
        return [shared] * num_layers
    views = {name: x.expand(num_layers, *x.shape).unbind() for name, x in shared.items()}
    return [{name: x[layer] for name, x in views.items()} for layer in range(num_layers)]


def joint_linear(
    x: Tensor,  # [..., D]
    weights: Sequence[Tensor],  # each [n_i, D]
    biases: Sequence[Tensor],  # each [n_i]
) -> Tensor:  # [..., sum of n_i]
    """x cat(weights)^T + cat(biases)."""
    if _plain(x, *weights, *biases):
        return F.linear(x, torch.cat(tuple(weights)), torch.cat(tuple(biases)))
    return _JointLinear.apply(x, *weights, *biases)


def self_attention_projection(
    x: Tensor,  # [N, D]: the content
    pos: Tensor,  # [N, D]: the query position
    weights: Sequence[Tensor],  # q, k, v of the content, q, k of the position; each [D, D]
    bias: Tensor,  # [3 * D]: of q, k (content and position added) and v
) -> Tensor:  # [N, 3 * D]: q, k, v
    """q and k are projections of the content plus projections of the position, v is one of the content."""
    if not _plain(x, pos, *weights, bias):
        return _SelfAttentionProjection.apply(x, pos, bias, *weights)
    if _traced():
        content, position = _by_input(torch.cat(tuple(weights)))
        qk, v = F.linear(x, content, bias).split((2 * x.shape[-1], x.shape[-1]), -1)
        return torch.cat((torch.addmm(qk, pos, position.t()), v), -1)
    return _project(x, pos, bias, weights)


def ffn(
    params: Parameters,
    name: str,  # of a layer, whose f"{name}.linear1" is [F, D], f"{name}.linear2" [D, F]
    x: Tensor,  # [N, D]
    activation: str,  # one of `config.Activation`
    dropout_p: float,  # on the inner activation
) -> Tensor:  # [N, D]
    """W2 activation(W1 x + b1) + b2."""
    (w1, w2), (b1, b2) = weights_and_biases(params, (f"{name}.linear1", f"{name}.linear2"))
    slopes = (params[f"{name}.activation.weight"],) if activation == "prelu" else ()
    inner_activation = F.prelu if activation == "prelu" else ACTIVATIONS[activation]
    if dropout_p == 1 or _plain(x, w1, b1, w2, b2, *slopes):
        return F.linear(dropout(inner_activation(F.linear(x, w1, b1), *slopes), dropout_p), w2, b2)
    return _FFN.apply(inner_activation, dropout_p, x, w1, b1, w2, b2, *slopes)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout with its random numbers, which keeps a mask for backward where F.dropout on a CPU keeps x's noise."""
    if not 0 < p < 1 or not x.numel() or _traced():
        return F.dropout(x, p)
    return torch.native_dropout(x, p, True)[0]


def _plain(*tensors: Tensor) -> bool:
    """Whether the plain composition serves: no gradient is asked for, or a tracer sees to memory itself."""
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or _traced()


def _traced() -> bool:
    return compiling() or torch.jit.is_tracing() or transformed()


def _project(x: Tensor, pos: Tensor, bias: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Of `self_attention_projection`, in place."""
    content, position = _by_input(torch.cat(tuple(weights)))
    qkv = F.linear(x, content, bias)
    qkv[:, : 2 * x.shape[-1]].addmm_(pos.to(qkv.dtype), position.to(qkv.dtype).mT)
    return qkv


def _by_input(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of the joined weights of `self_attention_projection`, those that read the content and the position."""
    d = weights.shape[1]
    return weights[: 3 * d], weights[3 * d :]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _join(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(tuple(weights)).to(dtype)


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        weights, biases = params[: len(params) // 2], params[len(params) // 2 :]
        ctx.save_for_backward(x, *weights)
        return F.linear(x, torch.cat(weights), torch.cat(biases))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = saved
        d_y = _rows(d_y, d_y.dtype)
        sizes = [w.shape[0] for w in weights]
        d_x: Tensor | None = None
        d_weights: Sequence[Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            d_x = (d_y @ _join(weights, d_y.dtype)).view(x.shape)
        if any(ctx.needs_input_grad[1 : 1 + len(weights)]):
            d_weights = (d_y.mT @ _rows(x, d_y.dtype)).split(sizes)
        return (d_x, *d_weights, *d_y.sum(0).split(sizes))


class _SelfAttentionProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pos: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, pos, *weights)
        return _project(x, pos, bias, weights)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_qkv: Tensor) -> tuple[Tensor | None, ...]:
        x, pos, *weights = saved
        d, dtype = x.shape[-1], d_qkv.dtype
        d_qk = d_qkv[:, : 2 * d]
        d_x = d_pos = None
        if any(ctx.needs_input_grad[:2]):
            content, position = _by_input(_join(weights, dtype))
            d_x = d_qkv @ content if ctx.needs_input_grad[0] else None
            d_pos = d_qk @ position if ctx.needs_input_grad[1] else None
        d_weights: list[Tensor | None] = [None] * 5
        if any(ctx.needs_input_grad[3:]):
            d_weights = [*(d_qkv.mT @ x.to(dtype)).split(d), *(d_qk.mT @ pos.to(dtype)).split(d)]
        return (d_x, d_pos, d_qkv.sum(0), *d_weights)


class _FFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        dropout_p: float,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        *slope: Tensor,
    ) -> Tensor:
        inner = activation(F.linear(x, w1, b1), *slope)
        inner, kept = torch.native_dropout(inner, dropout_p, True) if dropout_p > 0 else (inner, None)
        ctx.save_for_backward(kept, x, w1, b1, w2, *slope)
        ctx.activation = activation
        ctx.scale = 1 / (1 - dropout_p)  # of what is kept
        return F.linear(inner, w2, b2)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Any, ...], d_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, *tensors = saved
        x, w1, b1, w2, *slope = (t.to(d_y.dtype) for t in tensors)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (F.linear(x, w1, b1), *slope)]
            activated = ctx.activation(*leaves)
            if kept is not None:
                activated = torch.ops.aten.native_dropout_backward(activated, kept, ctx.scale)
        d_inner, *d_slope = torch.autograd.grad(activated, leaves, d_y @ w2)
        _, _, need_x, need_w1, _, need_w2, *_ = ctx.needs_input_grad
        d_x = d_inner @ w1 if need_x else None
        d_w1 = d_inner.mT @ x if need_w1 else None
        d_w2 = d_y.mT @ activated.detach() if need_w2 else None
        return (None, None, d_x, d_w1, d_inner.sum(0), d_w2, d_y.sum(0), *d_slope)
