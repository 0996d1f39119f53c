"""The encoder on the fused attention: no score matrix, few products, and little kept for backward.

Per layer the position is scaled by a function of the content and added once, q and k are one product of that sum, and
v and the first layer of `query_scale`, which read the content alone, are another. Work is on rows: a row per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dab_fast import ops
from dab_fast._tracing import constant
from dab_fast.config import Activation
from dab_fast.ops.modulated_cross_attention import AttentionMask, attend, attention_mask
from dab_fast.parts.dense import dropout, ffn, views_per_layer, weights_and_biases
from dab_fast.reference import Parameters, layer_norm, linear, split_last


@dataclass(frozen=True)
class EncoderConfig:
    """The variants of the DAB-DETR encoder, named as IDEA-Research/DAB-DETR names them.

    Args:
        d_model: model width D, a multiple of `nhead`.
        nhead: attention heads H.
        num_layers: layers L.
        dim_feedforward: FFN width F.
        activation: of the FFN.
        norm: whether a LayerNorm follows the last layer.
        dropout: rate after the attention and after the FFN.
        attention_dropout: rate on the attention probabilities.
        activation_dropout: rate inside the FFN.
    """

    d_model: int = 256
    nhead: int = 8
    num_layers: int = 6
    dim_feedforward: int = 2048
    activation: Activation = "prelu"
    norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    @property
    def has_dropout(self) -> bool:
        """Whether any of the three rates is above zero."""
        return max(self.dropout, self.attention_dropout, self.activation_dropout) > 0.0


def parameter_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of such an encoder."""
    d, f = config.d_model, config.dim_feedforward
    linears = {f"query_scale.layers.{i}": (d, d) for i in range(2)}
    norms = ["norm"] if config.norm else []
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"layers.{i}" for i in range(config.num_layers)):
        linears |= {f"{layer}.self_attn.{p}_proj": (d, d) for p in ("q", "k", "v", "out")}
        linears |= {f"{layer}.linear1": (f, d), f"{layer}.linear2": (d, f)}
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        if config.activation == "prelu":
            shapes[f"{layer}.activation.weight"] = (1,)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return shapes


def encode(
    params: Parameters,
    config: EncoderConfig,
    tokens: Tensor,  # [B, S, D]
    pos: Tensor,  # [B or 1, S, D]
    *,
    key_padding_mask: Tensor | None = None,  # bool [B, S], True = padded
    recompute: bool = False,  # keep only the layers' inputs for backward, and compute the layers again there
) -> tuple[Tensor, list[Tensor]]:  # [B, S, D]; the same of every layer, before the last norm
    """The encoder's output, and every layer's.

    Where all keys of an image are padded, each token attends to all of them alike, as a softmax over equal logits does.
    """
    b, s, d = tokens.shape
    by_head = split_last(tokens, config.nhead, d // config.nhead)
    layers = _Layers(
        params=params,
        config=config,
        products=_products(params, config.num_layers),
        pos=pos,
        mask=attention_mask(key_padding_mask, None, by_head, by_head, mean=True),
        by_head=(b, s, config.nhead, d // config.nhead),
    )
    recompute = recompute and torch.is_grad_enabled()
    x = tokens.reshape(b * s, d)
    outputs = []
    for layer in range(config.num_layers):
        if recompute:
            x = checkpoint(
                layers.forward_on,
                ops.chosen_backend(),
                layer,
                x,
                use_reentrant=False,
                preserve_rng_state=config.has_dropout,
            )
        else:
            x = layers.forward(layer, x)
        outputs.append(x.view(b, s, d))
    return (layer_norm(params, "norm", outputs[-1]) if config.norm else outputs[-1]), outputs


_Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Products:
    """The products of one layer that join several weights, and the second layer of `query_scale`."""

    scale_v: _Product  # [N, D] -> [N, 2 * D]: the hidden layer of `query_scale`, v
    qk: _Product  # [N, D] -> [N, 2 * D]
    query_scale: Parameters


def _products(params: Parameters, num_layers: int) -> list[_Products]:
    shared = {name: x for name, x in params.items() if name.startswith("query_scale.")}
    views = views_per_layer(shared, num_layers)
    named = [
        {**params, **views[layer]}  # one `query_scale` per layer, of whose views the gradients are added in one sum
        for layer in range(num_layers)
    ]
    scale_v = [("query_scale.layers.0", f"layers.{i}.self_attn.v_proj") for i in range(num_layers)]
    qk = [(f"layers.{i}.self_attn.q_proj", f"layers.{i}.self_attn.k_proj") for i in range(num_layers)]
    return [_Products(*joined) for joined in zip(_joint(named, scale_v), _joint(named, qk), views, strict=True)]


def _joint(named: Sequence[Parameters], names: Sequence[tuple[str, str]]) -> list[_Product]:
    """Per layer, the product with the weights of these names; those of all layers join at once."""
    found = [weights_and_biases(params, pair) for params, pair in zip(named, names, strict=True)]
    weight, bias = (torch.cat([x for pair in found for x in pair[i]]).chunk(len(names)) for i in range(2))

    def with_joined(w: Tensor, b: Tensor) -> _Product:
        return lambda x: F.linear(x, w, b)

    return [with_joined(w, b) for w, b in zip(weight, bias, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """What every layer reads, and the layers on it."""

    params: Parameters
    config: EncoderConfig
    products: Sequence[_Products]
    pos: Tensor  # [B or 1, S, D]
    mask: AttentionMask
    by_head: tuple[int, int, int, int]  # B, S, H, D / H

    def forward(self, layer: int, x: Tensor) -> Tensor:  # [B * S, D] both
        params, config, products, name = self.params, self.config, self.products[layer], f"layers.{layer}"
        hidden, v = products.scale_v(x).chunk(2, -1)
        scale = linear(products.query_scale, "query_scale.layers.1", F.relu(hidden))
        b, s, *_ = self.by_head
        positioned = torch.addcmul(x.view(b, s, -1), self.pos, scale.view(b, s, -1)).view(x.shape)
        q, k = products.qk(positioned).chunk(2, -1)
        q, k, v = (split_last(t, *self.by_head[2:]).unflatten(0, (b, s)) for t in (q, k, v))
        attended = attend(q, None, k, None, v, self.mask, dropout_p=config.attention_dropout)
        update = linear(params, f"{name}.self_attn.out_proj", attended.reshape(x.shape))
        x = self._add_and_norm(x, update, f"{name}.norm1")
        update = ffn(params, name, x, config.activation, constant(config.activation_dropout))
        return self._add_and_norm(x, update, f"{name}.norm2")

    def forward_on(self, backend: str, layer: int, x: Tensor) -> Tensor:
        """`forward` on the backend of the first run: the second one, in backward, may find another one chosen."""
        with ops.backend(backend):
            return self.forward(layer, x)

    def _add_and_norm(self, residual: Tensor, update: Tensor, norm: str) -> Tensor:
        update = dropout(update, constant(self.config.dropout))
        return layer_norm(self.params, norm, residual + update)
