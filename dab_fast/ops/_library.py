"""Schemas and fakes of the fused operations, as `torch.ops.dab_fast.*`; imports torch alone.

Each op has one schema per direction, `<op>` and `<op>_backward`; their last argument names the backend, whose module
is imported at the first call. Autograd is a `torch.autograd.Function` around the op, with `ctx` as the first argument
of `forward`: a `setup_context` costs 22 µs more per call (it binds the arguments through `inspect.signature`).

To add an op, touch these files:
  dab_fast/reference.py      its specification, in plain PyTorch
  dab_fast/ops/_library.py   its schemas and fakes
  dab_fast/ops/<op>.py       the public function: checks, `_backends.select`, the autograd.Function
  dab_fast/backends/triton/<op>.py   `forward` and `backward` with the schemas' arguments (without the backend)
  tests/test_<op>.py         both against the specification
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dab_fast.ops import _backends

_LIBRARY = torch.library.Library("dab_fast", "DEF")


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    """Registers an op for every device and returns the callable that dispatches to it."""
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        return _backends.implementation(args[-1], name)(*args[:-1])

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dab_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.dab_fast, name).default


def _box_position_embed(
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,  # [..., 2 * num_feats], [..., 1] or [2 * num_feats]
    ref_size_logits: Tensor | None,  # [..., 2]
    num_feats: int,
    temperature: float,
    order: str,
    dtype: torch.dtype,
    query: bool,  # False: the sine embedding alone
    backend: str,
) -> list[Tensor]:  # [..., n * num_feats] and, with `query`, [..., 2 * num_feats]
    widths = (boxes.shape[-1], 2) if query else (boxes.shape[-1],)
    return [boxes.new_empty((*boxes.shape[:-1], n * num_feats), dtype=dtype) for n in widths]


box_position_embed = _define(
    "box_position_embed(Tensor boxes, Tensor? scale, Tensor? ref_size_logits, int num_feats, float temperature, "
    "str order, ScalarType dtype, bool query, str backend) -> Tensor[]",
    _box_position_embed,
)


def _box_position_embed_backward(
    d_sine: Tensor | None,  # [..., n * num_feats]
    d_query_sine: Tensor | None,  # [..., 2 * num_feats]
    boxes: Tensor,  # [..., n]
    scale: Tensor | None,
    ref_size_logits: Tensor | None,
    num_feats: int,
    temperature: float,
    order: str,
    need_boxes: bool,
    need_scale: bool,
    need_logits: bool,
    backend: str,
) -> list[Tensor]:  # those needed of d_boxes, d_scale, d_ref_size_logits, as the inputs are
    needed = ((boxes, need_boxes), (scale, need_scale), (ref_size_logits, need_logits))
    return [x.new_empty(x.shape) for x, need in needed if need and x is not None]


box_position_embed_backward = _define(
    "box_position_embed_backward(Tensor? d_sine, Tensor? d_query_sine, Tensor boxes, Tensor? scale, "
    "Tensor? ref_size_logits, int num_feats, float temperature, str order, bool need_boxes, bool need_scale, "
    "bool need_logits, str backend) -> Tensor[]",
    _box_position_embed_backward,
)


def _modulated_cross_attention(
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


modulated_cross_attention = _define(
    "modulated_cross_attention(Tensor q_content, Tensor? q_pos, Tensor k_content, Tensor? k_pos, Tensor v, "
    "Tensor? key_padding_mask, Tensor? attn_mask, Tensor? rng, float scale, float dropout_p, bool keep, str backend) "
    "-> Tensor[]",
    _modulated_cross_attention,
)


def _modulated_cross_attention_backward(
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
    need_q_content: bool,
    need_q_pos: bool,
    need_k_content: bool,
    need_k_pos: bool,
    need_v: bool,
    backend: str,
) -> list[Tensor]:  # those needed of d_q_content, d_q_pos, d_k_content, d_k_pos, d_v, as the inputs are
    needs = (need_q_content, need_q_pos, need_k_content, need_k_pos, need_v)
    inputs = (q_content, q_pos, k_content, k_pos, v)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


modulated_cross_attention_backward = _define(
    "modulated_cross_attention_backward(Tensor d_out, Tensor q_content, Tensor? q_pos, Tensor k_content, "
    "Tensor? k_pos, Tensor v, Tensor? key_padding_mask, Tensor? attn_mask, Tensor? rng, Tensor out, Tensor stats, "
    "float scale, float dropout_p, bool need_q_content, bool need_q_pos, bool need_k_content, bool need_k_pos, "
    "bool need_v, str backend) -> Tensor[]",
    _modulated_cross_attention_backward,
)


def _refine_boxes(
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w1: Tensor,  # [D, D], or [L, D, D] where hidden is [L, ..., D]; the others likewise
    b1: Tensor,  # [D]
    w2: Tensor,  # [D, D]
    b2: Tensor,  # [D]
    w3: Tensor,  # [4, D]
    b3: Tensor,  # [4]
    eps: float,
    keep: bool,
    backend: str,
) -> list[Tensor]:  # [..., 4] and, with `keep`, what the two relus give, [..., D] each, all in float32
    shapes = [(*hidden.shape[:-1], 4)] + [hidden.shape] * (2 * keep)
    return [hidden.new_empty(shape, dtype=torch.float32) for shape in shapes]


refine_boxes = _define(
    "refine_boxes(Tensor hidden, Tensor boxes, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, "
    "float eps, bool keep, str backend) -> Tensor[]",
    _refine_boxes,
)


def _refine_boxes_backward(
    d_refined: Tensor,  # [..., 4]
    refined: Tensor,  # [..., 4]
    h1: Tensor,  # [..., D]
    h2: Tensor,  # [..., D]
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4]
    w1: Tensor,  # [D, D] or [L, D, D]
    w2: Tensor,  # [D, D] or [L, D, D]
    w3: Tensor,  # [4, D] or [L, 4, D]
    eps: float,
    need_hidden: bool,
    need_boxes: bool,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:  # those needed of d_hidden; d_boxes; d_w1, d_w2, [(L,) 6 * D + 4] of w3, b1, b2, b3 in float32
    results = [x.new_empty(x.shape) for x, need in ((hidden, need_hidden), (boxes, need_boxes)) if need]
    if need_weights:
        results += [x.new_empty(x.shape) for x in (w1, w2)]
        results.append(w1.new_empty((*w1.shape[:-2], 6 * hidden.shape[-1] + 4), dtype=torch.float32))
    return results


refine_boxes_backward = _define(
    "refine_boxes_backward(Tensor d_refined, Tensor refined, Tensor h1, Tensor h2, Tensor hidden, Tensor boxes, "
    "Tensor w1, Tensor w2, Tensor w3, float eps, bool need_hidden, bool need_boxes, bool need_weights, str backend) "
    "-> Tensor[]",
    _refine_boxes_backward,
)
