"""DabDecoder: the parameters, and the checks at the door."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dab_fast.config import DecoderConfig
from dab_fast.decoder.forward import decode
from dab_fast.ops._checks import check_tensor
from dab_fast.parameters import StepAside, gather
from dab_fast.precision import autocast_on
from dab_fast.reference import DecoderOutput


class DabDecoder(nn.Module):
    """The DAB-DETR decoder (arXiv 2201.12329), with the parameter names of IDEA-Research/DAB-DETR's.

    Args:
        config: which decoder; keyword arguments override its fields (`DabDecoder(num_layers=3, query_dim=2)`).
        batch_first: tensors are [B, N, ...], else [N, B, ...].
        recompute: keep only the layers' inputs for backward, and compute the layers again there.

    Raises:
        ValueError: from `DecoderConfig`.
    """

    def __init__(
        self,
        config: DecoderConfig | None = None,
        *,
        batch_first: bool = True,
        recompute: bool = False,
        **overrides: Any,
    ) -> None:
        super().__init__()
        config = dataclasses.replace(config or DecoderConfig(), **overrides)
        self.config, self.batch_first, self.recompute = config, batch_first, recompute
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
            recompute=self.recompute,
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
        if not autocast_on(weight):
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
        """Linear layers with a relu between each two."""
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
