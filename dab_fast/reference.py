"""The DAB-DETR decoder in plain PyTorch: the specification of everything else here, and its fallback.

A decoder is its parameters, a mapping from the names of IDEA-Research/DAB-DETR's `TransformerDecoder` to tensors
("layers.0.sa_qcontent_proj.weight", "query_scale.layers.0.bias", ...), and a `DecoderConfig`. B images, Q queries,
model width D, H heads of width d = D/H, S memory tokens, L layers.

Boxes, sine arguments, sigmoids and softmax are computed in at least float32 whatever the dtype of the content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dab_fast.config import DecoderConfig
from dab_fast.precision import at_least_float32, autocast_off, compute_dtype, saturate

Parameters = Mapping[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "selu": F.selu}


class DecoderOutput(NamedTuple):
    """What the decoder returns."""

    hidden_states: Tensor  # [L, B, Q, D]: every layer's output, normed by the decoder's LayerNorm
    reference_points: Tensor  # [L, B, Q, query_dim]: the anchors each layer read; [1, ...] without a box MLP


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """x.unflatten(-1, sizes), all of whose sizes PyTorch's older ONNX exporter would take for constants."""
    return x.view(*x.shape[:-1], *sizes)


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """log(x / (1 - x)) with x in [0, 1], numerator and denominator kept at least `eps` separately."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine_embed(
    coordinates: Tensor,  # [..., n] in (0, 1)
    num_feats: int,
    temperature: float = 10000.0,
    order: str = "yxwh",
) -> Tensor:  # [..., n * num_feats]
    """Sine features of normalized coordinates: sin and cos of 2*pi*c / temperature^(2*floor(i/2) / num_feats).

    Even features are sines, odd ones cosines. `order` "yxwh" puts the features of the second coordinate first, as
    DETR does; "xywh" keeps the order of the coordinates.
    """
    dtype, coordinates = coordinates.dtype, at_least_float32(coordinates)
    if order == "yxwh":
        x, y, *size = coordinates.unbind(-1)
        coordinates = torch.stack((y, x, *size), -1)
    pairs = (num_feats + 1) // 2
    exponent = torch.linspace(
        0, -2 * (pairs - 1) / num_feats, pairs, dtype=coordinates.dtype, device=coordinates.device
    )
    # A literal: torch.compile with dynamic shapes takes math.pi for a variable, which no checkpoint may contain.
    angle = coordinates.unsqueeze(-1) * 6.283185307179586 * temperature**exponent
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-3).to(dtype)


def box_position_embed(
    boxes: Tensor,  # [..., 2 or 4]: cx, cy(, w, h) in (0, 1)
    scale: Tensor | None = None,  # broadcastable to [..., 2 * num_feats]; None is 1
    ref_size_logits: Tensor | None = None,  # [..., 2]: w, h; needs 4-d boxes
    *,
    num_feats: int = 128,
    temperature: float = 10000.0,
    order: str = "yxwh",
    dtype: torch.dtype | None = None,  # of the results; None is that of boxes
) -> tuple[Tensor, Tensor]:  # [..., n * num_feats], [..., 2 * num_feats]
    """The sine embedding g of boxes, and g's center half times `scale` times sigmoid(ref_size_logits) / (w, h).

    The y features are modulated by the height's ratio, the x features by the width's. w and h have no epsilon.
    What float16 cannot hold saturates at its largest number.
    """
    dtype = dtype or boxes.dtype
    boxes = at_least_float32(boxes)
    sine = sine_embed(boxes, num_feats, temperature, order)
    center = sine[..., : 2 * num_feats]
    if scale is not None:
        center = center * at_least_float32(scale)
    if ref_size_logits is not None:
        ratio = at_least_float32(ref_size_logits).sigmoid() / boxes[..., 2:]
        if order == "yxwh":
            ratio = ratio.flip(-1)
        center = (split_last(center, 2, num_feats) * ratio.unsqueeze(-1)).flatten(-2)
    return sine.to(dtype), saturate(center, dtype)


def hidden_keys(
    key_padding_mask: Tensor | None,  # bool [B, S], True = padded
    attn_mask: Tensor | None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    heads: int,
) -> Tensor | None:  # bool, broadcastable to [B, H, Q, S]
    """Both masks in one."""
    hidden = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        mask = attn_mask
        if mask.dim() == 3:
            mask = mask.view(mask.shape[0] // heads, heads, *mask.shape[1:])
        hidden = mask if hidden is None else hidden | mask
    return hidden


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
    """softmax(scale * (q_content . k_content + q_pos . k_pos)) v, with zeros where every key is masked.

    `scale` defaults to 1 / sqrt(d + d_pos), that of the concatenated query.
    """
    b, _, h, d = q_content.shape
    if scale is None:
        scale = 1 / math.sqrt(d + (0 if q_pos is None else q_pos.shape[-1]))

    def part(query: Tensor, key: Tensor) -> Tensor:  # [B, H, Q, S]
        # Half-precision logits would overflow where w or h is tiny; the products are exact in float32.
        query, key = at_least_float32(query) * scale, at_least_float32(key)
        return torch.einsum("bqhd,bshd->bhqs", query, key.expand(b, -1, -1, -1))

    with autocast_off(v):
        logits = part(q_content, k_content)
        if q_pos is not None and k_pos is not None:
            logits = logits + part(q_pos, k_pos)
    hidden = hidden_keys(key_padding_mask, attn_mask, h)
    if hidden is not None:
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    probabilities = logits.softmax(-1)
    if hidden is not None:
        probabilities = probabilities.masked_fill(hidden, 0)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return torch.einsum("bhqs,bshd->bqhd", probabilities.to(v.dtype), v)


def refine_boxes(
    hidden: Tensor,  # [..., D]
    boxes: Tensor,  # [..., 2 or 4] in [0, 1]
    w1: Tensor,  # [D, D]
    b1: Tensor,  # [D]
    w2: Tensor,  # [D, D]
    b2: Tensor,  # [D]
    w3: Tensor,  # [4, D]
    b3: Tensor,  # [4]
    *,
    eps: float,
) -> Tensor:  # [..., 4], at least float32
    """sigmoid(W3 relu(W2 relu(W1 hidden + b1) + b2) + b3 + inverse_sigmoid(boxes)): the refined boxes.

    The inverse sigmoid is added to the first `boxes.shape[-1]` outputs.
    """
    x = at_least_float32(hidden)
    with autocast_off(x):
        for weight, bias in ((w1, b1), (w2, b2)):
            x = F.relu(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))
        delta = F.linear(x, w3.to(x.dtype), b3.to(x.dtype))
    old = inverse_sigmoid(at_least_float32(boxes), eps).to(delta.dtype)
    if old.shape[-1] < delta.shape[-1]:
        old = F.pad(old, (0, delta.shape[-1] - old.shape[-1]))
    return (delta + old).sigmoid()


def initial_queries(
    anchors_unsigmoid: Tensor,  # [Q, query_dim]: the learned anchors before the sigmoid
    patterns: Tensor | None,  # [P, D]: learned content vectors, each paired with every anchor; None: zeros
    batch: int,
    d_model: int,
) -> tuple[Tensor, Tensor]:  # [B, P * Q, D], [B, P * Q, query_dim]
    """The content and the anchors that the first layer reads."""
    num_queries = anchors_unsigmoid.shape[0]
    if patterns is None:
        content = anchors_unsigmoid.new_zeros(batch, num_queries, d_model)
    else:
        content = patterns.repeat_interleave(num_queries, 0).expand(batch, -1, -1)
        anchors_unsigmoid = anchors_unsigmoid.repeat(patterns.shape[0], 1)
    return content, anchors_unsigmoid.expand(batch, -1, -1)


def linear(params: Parameters, name: str, x: Tensor) -> Tensor:
    """The linear layer whose parameters are called `name`."""
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def layer_norm(params: Parameters, name: str, x: Tensor) -> Tensor:
    """The LayerNorm whose parameters are called `name`."""
    weight = params[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, params[f"{name}.bias"])


def mlp(params: Parameters, name: str, x: Tensor) -> Tensor:
    """Two linear layers with a relu between."""
    return linear(params, f"{name}.layers.1", F.relu(linear(params, f"{name}.layers.0", x)))


def has_shared_box_mlp(params: Parameters) -> bool:
    """Whether one box MLP serves all layers, rather than one each."""
    return "bbox_embed.layers.0.weight" in params


def box_mlp(params: Parameters, layer: int) -> tuple[Tensor, ...]:
    """w1, b1, w2, b2, w3, b3 of the box MLP that refines the anchors after `layer`."""
    name = "bbox_embed" if has_shared_box_mlp(params) else f"bbox_embed.{layer}"
    return tuple(params[f"{name}.layers.{i}.{kind}"] for i in range(3) for kind in ("weight", "bias"))


def content_scale(params: Parameters, config: DecoderConfig, layer: int, x: Tensor) -> Tensor | None:
    """t of layer `layer`: [..., D], [..., 1], a row [D], or None for 1."""
    if config.query_scale_type == "fix_elewise":
        return params["query_scale.weight"][layer]
    return None if layer == 0 else mlp(params, "query_scale", x)


def decoder_layer(
    params: Parameters,
    config: DecoderConfig,
    layer: int,
    x: Tensor,  # [B, Q, D]: the content
    memory: Tensor,  # [B, S, D]
    pos: Tensor,  # [B or 1, S, D]: the sine embedding of the memory tokens' positions
    query_pos: Tensor,  # [B, Q, D]
    query_sine: Tensor,  # [B, Q, D]
    *,
    memory_key_padding_mask: Tensor | None,  # bool [B, S]
    tgt_mask: Tensor | None,  # bool [Q, Q] or [B * H, Q, Q]
    training: bool,
) -> Tensor:  # [B, Q, D]
    """Self-attention, cross-attention, FFN; each with its residual and LayerNorm."""
    name = f"layers.{layer}"
    dropout_p = config.dropout if training else 0.0
    attention_dropout_p = config.attention_dropout if training else 0.0

    def project(kind: str, t: Tensor) -> Tensor:
        return linear(params, f"{name}.{kind}_proj", t)

    def heads(t: Tensor) -> Tensor:  # [B, N, D] -> [B, N, H, d]
        return t.unflatten(-1, (config.nhead, -1))

    def add_and_norm(residual: Tensor, update: Tensor, norm: str) -> Tensor:
        return layer_norm(params, f"{name}.{norm}", residual + F.dropout(update, dropout_p, training))

    attended = modulated_cross_attention(
        heads(project("sa_qcontent", x) + project("sa_qpos", query_pos)),
        None,
        heads(project("sa_kcontent", x) + project("sa_kpos", query_pos)),
        None,
        heads(project("sa_v", x)),
        attn_mask=tgt_mask,
        dropout_p=attention_dropout_p,
    )
    x = add_and_norm(x, linear(params, f"{name}.self_attn.out_proj", attended.flatten(-2)), "norm1")

    q_content, k_content, k_pos = (
        project("ca_qcontent", x),
        project("ca_kcontent", memory),
        project("ca_kpos", pos),
    )
    if layer == 0 or config.keep_query_pos:
        q_content, k_content = q_content + project("ca_qpos", query_pos), k_content + k_pos
    q_pos = project("ca_qpos_sine", query_sine)
    attended = modulated_cross_attention(
        heads(q_content),
        heads(saturate(q_pos, q_pos.dtype)),
        heads(k_content),
        heads(k_pos),
        heads(project("ca_v", memory)),
        key_padding_mask=memory_key_padding_mask,
        dropout_p=attention_dropout_p,
    )
    x = add_and_norm(x, linear(params, f"{name}.cross_attn.out_proj", attended.flatten(-2)), "norm2")

    inner = linear(params, f"{name}.linear1", x)
    if config.activation == "prelu":
        inner = F.prelu(inner, params[f"{name}.activation.weight"])
    else:
        inner = ACTIVATIONS[config.activation](inner)
    inner = F.dropout(inner, config.activation_dropout, training)
    return add_and_norm(x, linear(params, f"{name}.linear2", inner), "norm3")


def decode(
    params: Parameters,
    config: DecoderConfig,
    content: Tensor,  # [B, Q, D]
    memory: Tensor,  # [B, S, D]
    pos: Tensor,  # [B or 1, S, D]
    anchors_unsigmoid: Tensor,  # [B, Q, query_dim]
    *,
    memory_key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
    tgt_mask: Tensor | None = None,  # bool [Q, Q] or [B * H, Q, Q], True = hidden
    training: bool = False,
    batch_first: bool = True,  # False: query-first tensors in and out, [Q, B, ...]
) -> DecoderOutput:
    """The whole decoder: refine the anchors layer by layer, with the gradient cut between the layers.

    Layer l reads anchors a_l; a_0 = sigmoid(anchors_unsigmoid), a_{l+1} refines a_l by the box MLP. Layer l + 1
    reads a_{l+1} detached; the returned stack a_0 ... a_{L-1} is attached. The last layer's refinement is left to
    the prediction head (`predict_boxes`).
    """
    if not batch_first:
        content, memory, pos = content.transpose(0, 1), memory.transpose(0, 1), pos.transpose(0, 1)
        anchors_unsigmoid = anchors_unsigmoid.transpose(0, 1)
    x = content
    anchors = at_least_float32(anchors_unsigmoid).sigmoid()
    references, outputs = [anchors], []
    for layer in range(config.num_layers):
        sine, query_sine = box_position_embed(
            anchors,
            content_scale(params, config, layer, x),
            mlp(params, "ref_anchor_head", x) if config.modulate_hw_attn else None,
            num_feats=config.d_model // 2,
            temperature=config.temperature,
            dtype=compute_dtype(x),
        )
        x = decoder_layer(
            params,
            config,
            layer,
            x,
            memory,
            pos,
            mlp(params, "ref_point_head", sine),
            query_sine,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_mask=tgt_mask,
            training=training,
        )
        outputs.append(layer_norm(params, "norm", x))
        if config.bbox_embed is not None and layer < config.num_layers - 1:
            refined = refine_boxes(x, anchors, *box_mlp(params, layer), eps=config.inverse_sigmoid_eps)
            references.append(refined[..., : config.query_dim])
            anchors = references[-1].detach()
    hidden_states, reference_points = torch.stack(outputs), torch.stack(references)
    if not batch_first:
        hidden_states, reference_points = hidden_states.transpose(1, 2), reference_points.transpose(1, 2)
    return DecoderOutput(hidden_states, reference_points)


def predict_boxes(
    params: Parameters,  # of the box MLP(s), under "bbox_embed"
    hidden_states: Tensor,  # [L, B, Q, D]: normed
    reference_points: Tensor,  # [L, B, Q, query_dim], attached; [1, ...] when nothing refined them
    *,
    eps: float,  # of the inverse sigmoid
) -> Tensor:  # [L, B, Q, 4]
    """The head outside the decoder: the same box MLP on the normed stack refines the stack of reference points."""
    reference_points = reference_points.expand(hidden_states.shape[0], -1, -1, -1)
    return torch.stack(
        [
            refine_boxes(x, anchors, *box_mlp(params, layer), eps=eps)
            for layer, (x, anchors) in enumerate(zip(hidden_states, reference_points, strict=True))
        ]
    )
