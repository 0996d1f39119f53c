"""The forward on the fused ops: the specification of reference.py after the exact rewritings that hold in training.

memory and pos are the same for every layer, so all their key and value projections are one product each; so are
q, k and v of self-attention, and the first layers of `query_scale` and `ref_anchor_head`. Where the query position
enters the cross-attention, q . (k + k_pos) + s . k_pos = q . k + (q + s) . k_pos, so the keys stay as they are.

Backward is kept short and small too. A layer reads its anchors detached, so the loop refines them without a graph and
one call over all layers gives the attached stack. Weights that the layers share are read through one view per layer,
whose gradients are added in one sum. Slices are made by unbind and chunk, whose backward is one concatenation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dab_fast import ops, reference
from dab_fast._tracing import compiling, constant
from dab_fast.config import DecoderConfig
from dab_fast.ops.modulated_cross_attention import AttentionMask, attend, attention_mask
from dab_fast.parts.dense import (
    dropout,
    ffn,
    joint_linear,
    self_attention_projection,
    views_per_layer,
    weights_and_biases,
)
from dab_fast.precision import at_least_float32, compute_dtype, saturate
from dab_fast.reference import (
    DecoderOutput,
    Parameters,
    box_mlp,
    has_shared_box_mlp,
    layer_norm,
    linear,
    split_last,
)

_SELF_CONTENT = ("sa_qcontent", "sa_kcontent", "sa_v")
_SELF_POS = ("sa_qpos", "sa_kpos")
_CONTENT_HEADS = "content_heads"  # the first layers of `query_scale` and `ref_anchor_head`, in one


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
    recompute: bool = False,  # keep only the layers' inputs for backward, and compute the layers again there
) -> tuple[DecoderOutput, list[Tensor]]:
    """`reference.decode` on the fused ops. Also returns every layer's output before the norm, [B, Q, D] each."""
    b, q, d = content.shape
    config = _with_constants(config)
    queries, tokens = (split_last(x, config.nhead, d // config.nhead) for x in (content, memory))
    layers = _Layers(
        params=params,
        config=config,
        views=_views_per_layer(params, config.num_layers),
        self_biases=_self_attention_biases(params, config),
        memory=memory,
        pos=pos,
        self_mask=attention_mask(tgt_key_padding_mask, tgt_mask, queries, queries),
        cross_mask=attention_mask(memory_key_padding_mask, memory_mask, queries, tokens),
        spatial_shape=spatial_shape,
        training=training,
        queries=(b, q),
    )
    recompute = recompute and torch.is_grad_enabled()
    keys = None if recompute else layers.keys(range(config.num_layers))
    refine_later = config.bbox_embed == "shared" and torch.is_grad_enabled()

    def refine(x: Tensor, anchors: Tensor, layer: int) -> Tensor:  # the refined anchors, [..., query_dim]
        refined = ops.refine_boxes(x, anchors, *box_mlp(params, layer), eps=config.inverse_sigmoid_eps)
        return refined if config.query_dim == 4 else refined[..., : config.query_dim]

    # Everything that belongs to a query is a row here: [B * Q, ...].
    x = content.reshape(b * q, d)
    anchors = at_least_float32(anchors_unsigmoid).sigmoid().reshape(b * q, config.query_dim)
    references, outputs = [anchors], []
    for layer in range(config.num_layers):
        if keys is None:
            x = checkpoint(
                layers.forward_on,
                ops.chosen_backend(),
                layer,
                x,
                anchors,
                use_reentrant=False,
                preserve_rng_state=training and config.has_dropout,
            )
        else:
            x = layers.forward(layer, x, anchors, keys[layer])
        outputs.append(x)
        if config.bbox_embed is not None and layer < config.num_layers - 1:
            if refine_later:
                with torch.no_grad():
                    anchors = refine(x, anchors, layer).detach()  # of forward-mode tangents, too
                references.append(anchors)
            else:
                references.append(refine(x, anchors, layer))
                anchors = references[-1].detach()
    stack, reference_points = torch.stack(outputs), torch.stack(references)
    if refine_later and config.num_layers > 1:
        # references[0] is attached, so that the first refinement reaches the learned anchors.
        reference_points = torch.cat((references[0][None], refine(stack[:-1], reference_points[:-1], 0)))
    hidden_states = layer_norm(params, "norm", stack)
    return (
        DecoderOutput(
            hidden_states.view(len(outputs), b, q, d), reference_points.view(len(references), b, q, config.query_dim)
        ),
        [output.view(b, q, d) for output in outputs],
    )


def predict_boxes(
    params: Parameters,  # of the box MLP(s), under "bbox_embed"
    hidden_states: Tensor,  # [L, B, Q, D]: normed
    reference_points: Tensor,  # [L, B, Q, query_dim], attached; [1, ...] when nothing refined them
    *,
    eps: float,  # of the inverse sigmoid
) -> Tensor:  # [L, B, Q, 4]
    """`reference.predict_boxes` on the fused op: one call where the layers share the box MLP."""
    reference_points = reference_points.expand(hidden_states.shape[0], -1, -1, -1)
    if has_shared_box_mlp(params):
        return ops.refine_boxes(hidden_states, reference_points, *box_mlp(params, 0), eps=eps)
    return torch.stack(
        [
            ops.refine_boxes(x, anchors, *box_mlp(params, layer), eps=eps)
            for layer, (x, anchors) in enumerate(zip(hidden_states, reference_points, strict=True))
        ]
    )


def _with_constants(config: DecoderConfig) -> DecoderConfig:
    """The config itself; under torch.compile a copy whose numbers may enter the subgraph of a checkpoint."""
    if not compiling():
        return config
    floats: dict[str, Any] = {name: constant(x) for name, x in vars(config).items() if isinstance(x, float)}
    return dataclasses.replace(config, **floats)


_Keys = tuple[Tensor, Tensor, Tensor]  # k_content, v: [B, S, H, d]; k_pos: [B or 1, S, H, d]


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """What every layer reads, and the layers on it."""

    params: Parameters
    config: DecoderConfig
    views: Sequence[Parameters]  # per layer, of the weights that the layers share
    self_biases: Sequence[Tensor]  # per layer, [3 * D]
    memory: Tensor  # [B, S, D]
    pos: Tensor  # [B or 1, S, D]
    self_mask: AttentionMask
    cross_mask: AttentionMask
    spatial_shape: tuple[int, int] | None
    training: bool
    queries: tuple[int, int]  # B, Q

    def keys(self, layers: Sequence[int]) -> list[_Keys]:
        """Keys and values of some layers' cross-attention, in one product each for memory and pos."""
        names = [f"layers.{layer}.{p}_proj" for layer in layers for p in ("ca_kcontent", "ca_v")]
        from_memory = self._heads(joint_linear(self.memory, *weights_and_biases(self.params, names)), 2 * len(layers))
        weights, biases = weights_and_biases(self.params, [f"layers.{layer}.ca_kpos_proj" for layer in layers])
        from_pos = self._heads(_project_pos(self.pos, weights, biases, self.spatial_shape), len(layers))
        return list(zip(from_memory[::2], from_memory[1::2], from_pos, strict=True))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:  # [B, N, parts * D] -> parts times [B, N, H, d]
        heads = self.config.nhead
        return split_last(x, parts, heads, self.config.d_model // heads).unbind(-3)

    def forward(
        self,
        layer: int,
        x: Tensor,  # [B * Q, D]: the content
        anchors: Tensor,  # [B * Q, query_dim]
        keys: _Keys | None = None,  # None: computed here
    ) -> Tensor:  # [B * Q, D]
        params, config, name = self.params, self.config, f"layers.{layer}"
        d = config.d_model
        k_content, cross_v, k_pos = keys or self.keys((layer,))[0]
        scale, ref_size_logits = self._content_heads(layer, x)
        sine, query_sine = ops.box_position_embed(
            anchors,
            scale,
            ref_size_logits,
            num_feats=d // 2,
            temperature=config.temperature,
            dtype=compute_dtype(x),
        )
        query_pos = reference.mlp(self.views[layer], "ref_point_head", sine)

        weights = [params[f"{name}.{p}_proj.weight"] for p in (*_SELF_CONTENT, *_SELF_POS)]
        qkv = self_attention_projection(x, query_pos, weights, self.self_biases[layer])
        q, k, v = self._heads(qkv.view(*self.queries, 3 * d), 3)
        by_head = q.shape
        x = self._attend(f"{name}.self_attn", f"{name}.norm1", x, (q, None, k, None, v), self.self_mask)

        q_content = linear(params, f"{name}.ca_qcontent_proj", x)
        q_pos = linear(params, f"{name}.ca_qpos_sine_proj", query_sine)
        if layer == 0 or config.keep_query_pos:
            q_content = q_content + linear(params, f"{name}.ca_qpos_proj", query_pos)
            q_pos = q_pos + q_content
        q, q_pos = q_content.view(by_head), saturate(q_pos, q_pos.dtype).view(by_head)
        tensors = q, q_pos, k_content, k_pos, cross_v
        x = self._attend(f"{name}.cross_attn", f"{name}.norm2", x, tensors, self.cross_mask)

        update = ffn(params, name, x, config.activation, self._rate(config.activation_dropout))
        return self._add_and_norm(x, update, f"{name}.norm3")

    def forward_on(self, backend: str, layer: int, x: Tensor, anchors: Tensor) -> Tensor:
        """`forward` on the backend of the first run: the second one, in backward, may find another one chosen."""
        with ops.backend(backend):
            return self.forward(layer, x, anchors)

    def _attend(
        self,
        attention: str,
        norm: str,
        x: Tensor,  # [B * Q, D]
        tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor],  # q, q_pos, k, k_pos, v; by head
        mask: AttentionMask,
    ) -> Tensor:  # [B * Q, D]
        attended = attend(*tensors, mask, dropout_p=self._rate(self.config.attention_dropout))
        return self._add_and_norm(x, linear(self.params, f"{attention}.out_proj", attended.reshape(x.shape)), norm)

    def _rate(self, dropout: float) -> float:
        return dropout if self.training else 0.0

    def _add_and_norm(self, residual: Tensor, update: Tensor, norm: str) -> Tensor:
        return layer_norm(self.params, norm, residual + dropout(update, self._rate(self.config.dropout)))

    def _content_heads(self, layer: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The scale of the query's sine embedding and the logits of its reference size, both read from the content."""
        views, config = self.views[layer], self.config
        if layer > 0 and f"{_CONTENT_HEADS}.weight" in views:
            scale, size = F.relu(linear(views, _CONTENT_HEADS, x)).chunk(2, -1)
            return linear(views, "query_scale.layers.1", scale), linear(views, "ref_anchor_head.layers.1", size)
        return (
            reference.content_scale(views, config, layer, x),
            reference.mlp(views, "ref_anchor_head", x) if config.modulate_hw_attn else None,
        )


def _views_per_layer(params: Parameters, num_layers: int) -> list[Parameters]:
    """Per layer, the weights that the layers share; the first reads no scale from the content, the others read scale
    and size by one product."""
    every = {name: x for name, x in params.items() if name.startswith(("ref_anchor_head.", "ref_point_head."))}
    later = {name: x for name, x in params.items() if name.startswith("query_scale.layers.")}
    first = {name: x for name, x in every.items() if later and name.startswith("ref_anchor_head.layers.0.")}
    for name in first:
        kind = name.rpartition(".")[2]
        later[f"{_CONTENT_HEADS}.{kind}"] = torch.cat((later.pop(f"query_scale.layers.0.{kind}"), every.pop(name)))
    others = [first, *views_per_layer(later, num_layers - 1)]
    views: list[Parameters] = [{**a, **b} for a, b in zip(views_per_layer(every, num_layers), others, strict=True)]
    if "query_scale.weight" in params:  # a row per layer
        views = [{**view, "query_scale.weight": params["query_scale.weight"]} for view in views]
    return views


def _self_attention_biases(params: Parameters, config: DecoderConfig) -> tuple[Tensor, ...]:
    """Per layer [3 * D]: the biases of q and k, content's and position's added, and of v."""

    def biases(projections: Sequence[str]) -> Tensor:  # [L, number of projections * D]
        every = [params[f"layers.{layer}.{p}_proj.bias"] for layer in range(config.num_layers) for p in projections]
        return torch.cat(every).unflatten(0, (config.num_layers, -1))

    return (biases(_SELF_CONTENT) + F.pad(biases(_SELF_POS), (0, config.d_model))).unbind()


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
    of_y, of_x = weight.chunk(2, 1)
    h, w = spatial_shape
    half = pos.shape[-1] // 2
    grid = pos[:1].view(1, h, w, pos.shape[-1])
    rows = F.linear(grid[:, :, :1, :half], of_y, bias)  # [1, h, 1, N]
    columns = F.linear(grid[:, :1, :, half:], of_x)  # [1, 1, w, N]
    return (rows + columns).flatten(1, 2)
