"""The trainable decoder on the fused ops: the specification of reference.py after the exact rewritings that hold
in training.

memory and pos are the same for every layer, so all their key and value projections are one product each; so are
q, k and v of self-attention, and the first layers of `query_scale` and `ref_anchor_head`. Where the query position
enters the cross-attention, q . (k + k_pos) + s . k_pos = q . k + (q + s) . k_pos, so the keys stay as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dab_fast import ops, reference
from dab_fast.config import DecoderConfig
from dab_fast.linear import ffn, joint_linear, self_attention_projection
from dab_fast.ops._checks import check_tensor
from dab_fast.parameters import StepAside, gather
from dab_fast.reference import DecoderOutput, Parameters, box_mlp, layer_norm, linear


def decode(
    params: Parameters,
    config: DecoderConfig,
    content: Tensor,  # [B, Q, D]
    memory: Tensor,  # [B, S, D]
    pos: Tensor,  # [B or 1, S, D]; 1 when nothing is padded
    anchors_unsigmoid: Tensor,  # [B, Q, query_dim]
    *,
    memory_key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
    tgt_mask: Tensor | None = None,  # bool [Q, Q] or [B * H, Q, Q], True = hidden
    tgt_key_padding_mask: Tensor | None = None,  # bool [B, Q], True = padded
    memory_mask: Tensor | None = None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    spatial_shape: tuple[int, int] | None = None,  # (h, w): pos is [h, w, D], half a function of y, half of x
    training: bool = False,
) -> tuple[DecoderOutput, list[Tensor]]:
    """`reference.decode` on the fused ops. Also returns every layer's output before the norm, [B, Q, D] each."""
    b, q, d = content.shape
    dropout_p = config.dropout if training else 0.0
    attention_dropout_p = config.attention_dropout if training else 0.0
    activation = F.prelu if config.activation == "prelu" else reference.ACTIVATIONS[config.activation]
    joint = _joint_weights(params, config)
    by_head = (config.nhead, d // config.nhead)
    # unbind and split, not indexing: their backward is one concatenation instead of a zero-filled whole per slice.
    keys_values = joint_linear(memory, *joint.memory).unflatten(-1, (2 * config.num_layers, *by_head)).unbind(-3)
    keys_pos = _project_pos(pos, *joint.pos, spatial_shape)
    keys_pos = keys_pos.unflatten(-1, (config.num_layers, *by_head)).unbind(-3)

    def heads(x: Tensor) -> Tensor:  # [B * Q, D] -> [B, Q, H, d]
        return x.view(b, q, *by_head)

    def add_and_norm(residual: Tensor, update: Tensor, norm: str) -> Tensor:
        return layer_norm(params, norm, residual + F.dropout(update, dropout_p, training))

    # Everything that belongs to a query is a row here: [B * Q, ...].
    x = content.reshape(b * q, d)
    anchors = reference.at_least_float32(anchors_unsigmoid).sigmoid().reshape(b * q, config.query_dim)
    references, outputs = [anchors], []
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        scale, ref_size_logits = _content_heads(params, config, joint, layer, x)
        sine, query_sine = ops.box_position_embed(
            anchors,
            scale,
            ref_size_logits,
            num_feats=d // 2,
            temperature=config.temperature,
            dtype=reference.compute_dtype(x),
        )
        query_pos = reference.mlp(params, "ref_point_head", sine)

        weights = _layer_weights(params, layer, *_SELF_CONTENT, *_SELF_POS)
        self_q, self_k, self_v = self_attention_projection(x, query_pos, weights, joint.self_bias[layer]).chunk(3, -1)
        attended = ops.modulated_cross_attention(
            heads(self_q),
            None,
            heads(self_k),
            None,
            heads(self_v),
            key_padding_mask=tgt_key_padding_mask,
            attn_mask=tgt_mask,
            dropout_p=attention_dropout_p,
        )
        update = linear(params, f"{name}.self_attn.out_proj", attended.reshape(b * q, d))
        x = add_and_norm(x, update, f"{name}.norm1")

        q_content = linear(params, f"{name}.ca_qcontent_proj", x)
        q_pos = linear(params, f"{name}.ca_qpos_sine_proj", query_sine)
        if layer == 0 or config.keep_query_pos:
            q_content = q_content + linear(params, f"{name}.ca_qpos_proj", query_pos)
            q_pos = q_pos + q_content
        attended = ops.modulated_cross_attention(
            heads(q_content),
            heads(reference.saturate(q_pos, q_pos.dtype)),
            keys_values[2 * layer],
            keys_pos[layer],
            keys_values[2 * layer + 1],
            key_padding_mask=memory_key_padding_mask,
            attn_mask=memory_mask,
            dropout_p=attention_dropout_p,
        )
        update = linear(params, f"{name}.cross_attn.out_proj", attended.reshape(b * q, d))
        x = add_and_norm(x, update, f"{name}.norm2")

        update = ffn(
            x,
            params[f"{name}.linear1.weight"],
            params[f"{name}.linear1.bias"],
            params[f"{name}.linear2.weight"],
            params[f"{name}.linear2.bias"],
            activation,
            params.get(f"{name}.activation.weight"),
            config.activation_dropout if training else 0.0,
        )
        x = add_and_norm(x, update, f"{name}.norm3")
        outputs.append(x)

        if config.bbox_embed is not None and layer < config.num_layers - 1:
            refined = ops.refine_boxes(x, anchors, *box_mlp(params, config, layer), eps=config.inverse_sigmoid_eps)
            references.append(refined[:, : config.query_dim])
            anchors = references[-1].detach()
    hidden_states = layer_norm(params, "norm", torch.stack(outputs))
    return (
        DecoderOutput(hidden_states.unflatten(1, (b, q)), torch.stack(references).unflatten(1, (b, q))),
        [output.view(b, q, d) for output in outputs],
    )


def predict_boxes(
    params: Parameters,  # of the box MLP(s), under "bbox_embed"
    config: DecoderConfig,
    hidden_states: Tensor,  # [L, B, Q, D]: normed
    reference_points: Tensor,  # [L, B, Q, query_dim], attached; [1, ...] when nothing refined them
) -> Tensor:  # [L, B, Q, 4]
    """`reference.predict_boxes` on the fused op: one call where the layers share the box MLP."""
    reference_points = reference_points.expand(hidden_states.shape[0], -1, -1, -1)
    eps = config.inverse_sigmoid_eps
    if config.bbox_embed == "shared":
        return ops.refine_boxes(hidden_states, reference_points, *box_mlp(params, config, 0), eps=eps)
    return torch.stack(
        [
            ops.refine_boxes(x, anchors, *box_mlp(params, config, layer), eps=eps)
            for layer, (x, anchors) in enumerate(zip(hidden_states, reference_points, strict=True))
        ]
    )


class DabDecoder(nn.Module):
    """The DAB-DETR decoder (arXiv 2201.12329), with the parameter names of IDEA-Research/DAB-DETR's.

    Args:
        config: which decoder; keyword arguments override its fields (`DabDecoder(num_layers=3, query_dim=2)`).
        batch_first: tensors are [B, N, ...], else [N, B, ...].

    Raises:
        ValueError: from `DecoderConfig`.
    """

    def __init__(self, config: DecoderConfig | None = None, *, batch_first: bool = True, **overrides: Any) -> None:
        super().__init__()
        config = dataclasses.replace(config or DecoderConfig(), **overrides)
        self.config, self.batch_first = config, batch_first
        d = config.d_model
        self.layers = nn.ModuleList(
            DabDecoderLayer(config, query_pos=layer == 0 or config.keep_query_pos) for layer in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.query_scale: nn.Module
        if config.query_scale_type == "fix_elewise":
            self.query_scale = nn.Embedding(config.num_layers, d)
        else:
            self.query_scale = MLP(d, d, d if config.query_scale_type == "cond_elewise" else 1, 2)
        self.ref_point_head = MLP(config.query_dim // 2 * d, d, d, 2)
        if config.modulate_hw_attn:
            self.ref_anchor_head = MLP(d, d, 2, 2)
        self.bbox_embed: nn.Module | None = None
        if config.bbox_embed == "shared":
            self.bbox_embed = MLP(d, d, 4, 3)
        elif config.bbox_embed == "per_layer":
            self.bbox_embed = nn.ModuleList(MLP(d, d, 4, 3) for _ in range(config.num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the original: Xavier for matrices; box MLPs start by moving no box."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for name, parameter in self.named_parameters():
            if name.startswith("bbox_embed.") and ".layers.2." in f".{name}":
                nn.init.zeros_(parameter)

    def forward(
        self,
        content: Tensor,  # [B, Q, D]: the queries' content; zeros or patterns
        memory: Tensor,  # [B, S, D]: the encoder's output
        pos: Tensor,  # [B or 1, S, D]: the sine embedding of its tokens' positions; 1 when nothing is padded
        anchors_unsigmoid: Tensor,  # [B, Q, query_dim]: the learned anchors before the sigmoid
        *,
        memory_key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
        tgt_mask: Tensor | None = None,  # bool [Q, Q] or [B * H, Q, Q], True = hidden
        tgt_key_padding_mask: Tensor | None = None,  # bool [B, Q], True = padded
        memory_mask: Tensor | None = None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    ) -> DecoderOutput:
        """Every layer's normed output [L, B, Q, D] and the anchors it read [L, B, Q, query_dim].

        With `batch_first=False` all tensors but the masks are query-first, in and out. A query whose keys are all
        masked gets zeros from that attention. The anchors are float32 at least whatever the dtype of the content.

        Raises:
            ValueError, TypeError: a tensor's shape, dtype or device does not fit.
            RuntimeError: a submodule was replaced, hooked or sharded, so that its weight alone is not what it computes.
        """
        tensors: tuple[Tensor, ...] = (content, memory, pos, anchors_unsigmoid)
        if not self.batch_first:
            tensors = tuple(x.transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 1 else x for x in tensors)
        self._check(*tensors)
        try:
            params = gather(self, lambda module: type(module) in _CONTAINERS, lambda name: name)
        except StepAside as reason:
            raise RuntimeError(f"DabDecoder reads its parameters directly, and cannot: {reason}") from None
        (hidden_states, reference_points), _ = decode(
            params,
            self.config,
            *tensors,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_mask=tgt_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_mask=memory_mask,
            training=self.training,
        )
        if not self.batch_first:
            hidden_states, reference_points = hidden_states.transpose(1, 2), reference_points.transpose(1, 2)
        return DecoderOutput(hidden_states, reference_points)

    def _check(self, content: Tensor, memory: Tensor, pos: Tensor, anchors_unsigmoid: Tensor) -> None:
        d, weight = self.config.d_model, self.norm.weight
        check_tensor("content", content, ("B", "Q", d), like=weight)
        b, q, _ = content.shape
        check_tensor("memory", memory, (b, "S", d), like=weight)
        check_tensor("pos", pos, ("B or 1", memory.shape[1], d), like=weight)
        if pos.shape[0] not in (1, b):
            raise ValueError(f"pos must have shape [{b} or 1, {memory.shape[1]}, {d}], got {list(pos.shape)}")
        check_tensor("anchors_unsigmoid", anchors_unsigmoid, (b, q, self.config.query_dim), like=weight)
        if not torch.is_autocast_enabled(weight.device.type):
            for name, x in (("content", content), ("memory", memory), ("pos", pos)):
                if x.dtype != weight.dtype:
                    raise TypeError(f"{name} must be {weight.dtype} as the parameters are, got {x.dtype}")


class MLP(nn.Module):
    """Linear layers with a relu between."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(n, k) for n, k in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:  # [..., input_dim] -> [..., output_dim]
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DabDecoderLayer(nn.Module):
    """One layer's parameters; `decode` is its forward."""

    def __init__(self, config: DecoderConfig, *, query_pos: bool) -> None:
        super().__init__()
        d = config.d_model
        for kind in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"):
            self.add_module(f"{kind}_proj", nn.Linear(d, d))
        self.self_attn = OutProj(d)
        self.norm1 = nn.LayerNorm(d)
        for kind in ("ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine", *["ca_qpos"] * query_pos):
            self.add_module(f"{kind}_proj", nn.Linear(d, d))
        self.cross_attn = OutProj(d)
        self.norm2 = nn.LayerNorm(d)
        self.linear1 = nn.Linear(d, config.dim_feedforward)
        if config.activation == "prelu":
            self.activation = nn.PReLU()
        self.linear2 = nn.Linear(config.dim_feedforward, d)
        self.norm3 = nn.LayerNorm(d)


class OutProj(nn.Module):
    """An attention's only parameters in the original."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(d_model, d_model)


_CONTAINERS = {DabDecoderLayer, MLP, OutProj}


_SELF_CONTENT = ("sa_qcontent", "sa_kcontent", "sa_v")
_SELF_POS = ("sa_qpos", "sa_kpos")

_Weights = tuple[list[Tensor], list[Tensor]]  # weights and biases to be joined


class _JointWeights(NamedTuple):
    memory: _Weights  # per layer k_content, v
    pos: _Weights  # per layer k_pos
    self_bias: tuple[Tensor, ...]  # L times [3 * D]: of q, k (content and position added) and v
    content_heads: _Weights | None  # first layers of query_scale and ref_anchor_head, if both exist


def _layer_weights(params: Parameters, layer: int, *projections: str, kind: str = "weight") -> list[Tensor]:
    return [params[f"layers.{layer}.{p}_proj.{kind}"] for p in projections]


def _joint_weights(params: Parameters, config: DecoderConfig) -> _JointWeights:
    def every_layer(kind: str, *projections: str) -> list[Tensor]:
        return [w for layer in range(config.num_layers) for w in _layer_weights(params, layer, *projections, kind=kind)]

    def bias(*projections: str) -> Tensor:  # [L, number of projections * D]
        return torch.cat(every_layer("bias", *projections)).unflatten(0, (config.num_layers, -1))

    heads = [head for head in ("query_scale", "ref_anchor_head") if f"{head}.layers.0.weight" in params]
    return _JointWeights(
        memory=(every_layer("weight", "ca_kcontent", "ca_v"), every_layer("bias", "ca_kcontent", "ca_v")),
        pos=(every_layer("weight", "ca_kpos"), every_layer("bias", "ca_kpos")),
        self_bias=(bias(*_SELF_CONTENT) + F.pad(bias(*_SELF_POS), (0, config.d_model))).unbind(),
        content_heads=(
            [params[f"{head}.layers.0.weight"] for head in heads],
            [params[f"{head}.layers.0.bias"] for head in heads],
        )
        if len(heads) == 2
        else None,
    )


def _project_pos(
    pos: Tensor,  # [B or 1, S, D]
    weights: list[Tensor],  # each [n_i, D]
    biases: list[Tensor],  # each [n_i]
    spatial_shape: tuple[int, int] | None,
) -> Tensor:  # [B or 1, S, sum of n_i]
    """pos cat(weights)^T + cat(biases); from h + w rows where pos is a function of y joined to one of x."""
    if spatial_shape is None:
        return joint_linear(pos, weights, biases)
    weight, bias = torch.cat(weights), torch.cat(biases)
    h, w = spatial_shape
    half = pos.shape[-1] // 2
    grid = pos[:1].unflatten(1, (h, w))
    rows = F.linear(grid[:, :, :1, :half], weight[:, :half], bias)  # [1, h, 1, N]
    columns = F.linear(grid[:, :1, :, half:], weight[:, half:])  # [1, 1, w, N]
    return (rows + columns).flatten(1, 2)


def _content_heads(
    params: Parameters, config: DecoderConfig, joint: _JointWeights, layer: int, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The scale of the query's sine embedding and the logits of its reference size, both read from the content."""
    if joint.content_heads is not None and layer > 0:
        scale, size = F.relu(joint_linear(x, *joint.content_heads)).chunk(2, -1)
        return linear(params, "query_scale.layers.1", scale), linear(params, "ref_anchor_head.layers.1", size)
    return (
        reference.content_scale(params, config, layer, x),
        reference.mlp(params, "ref_anchor_head", x) if config.modulate_hw_attn else None,
    )
