"""The fast forward of IDEA-Research's decoder, reading what the user's own class holds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from dab_fast import reference
from dab_fast._tracing import apart, compiling
from dab_fast.adapters._fast import DropoutRates, Fast
from dab_fast.adapters._probe import seeded_randn
from dab_fast.config import Activation, DecoderConfig
from dab_fast.decoder import DabDecoder, decode
from dab_fast.parameters import StepAside, gather

INVERSE_SIGMOID_EPS = 1e-3


def read(decoder: nn.Module) -> tuple[dict[str, Tensor], DecoderConfig]:
    """The parameters of a decoder of this codebase, and which decoder it is.

    Raises:
        StepAside: it cannot be read; the message says why.
    """
    theirs: Any = decoder
    layers = theirs.layers
    first = layers[0]
    attentions = {type(first.self_attn), type(first.cross_attn)}

    def is_container(module: nn.Module) -> bool:
        if module._parameters and any(p is not None for p in module._parameters.values()):
            return False
        return type(module) is type(first) or type(module) in attentions or is_relu_mlp(module)

    params = gather(decoder, is_container, lambda name: name)
    try:
        rates = _dropout_rates(layers) if decoder.training else DropoutRates()
        config = DecoderConfig(
            d_model=theirs.norm.normalized_shape[0],
            nhead=_same("numbers of heads", {n for layer in layers for n in _numbers_of_heads(layer)}),
            num_layers=len(layers),
            dim_feedforward=first.linear1.out_features,
            query_dim=theirs.query_dim,
            query_scale_type=theirs.query_scale_type,
            modulate_hw_attn=bool(theirs.modulate_hw_attn),
            keep_query_pos=_same("keep_query_pos", {bool(layer.keep_query_pos) for layer in layers}),
            bbox_embed=_bbox_embed(decoder),
            activation=_same("activations", {_activation(layer.activation) for layer in layers}),
            inverse_sigmoid_eps=INVERSE_SIGMOID_EPS,
            **rates._asdict(),
        )
    except (AttributeError, ValueError) as error:
        raise StepAside(str(error)) from None
    return params, config


def run(
    decoder: nn.Module,
    tgt: Tensor,  # [Q, B, D]
    memory: Tensor,  # [S, B, D]
    tgt_mask: Tensor | None,  # bool [Q, Q] or [B * H, Q, Q], True = hidden
    memory_mask: Tensor | None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    tgt_key_padding_mask: Tensor | None,  # bool [B, Q], True = padded
    memory_key_padding_mask: Tensor | None,  # bool [B, S], True = padded
    pos: Tensor,  # [S, B, D]
    refpoints_unsigmoid: Tensor,  # [Q, B, query_dim]
) -> list[Tensor]:  # [L, B, Q, D], [L or 1, B, Q, query_dim]
    """The fast forward of a decoder of this codebase."""
    params, config = read(decoder)
    output, _ = decode(
        params,
        config,
        *(x.transpose(0, 1) for x in (tgt, memory, pos, refpoints_unsigmoid)),
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        training=decoder.training,
        recompute=getattr(decoder, "dab_fast_recompute", False),
    )
    return list(output)


class FastTransformerDecoder(Fast):
    """Mixed into a subclass of the user's own `TransformerDecoder`."""

    dab_fast_settings: dict[str, Any]  # under which the two forwards were compared

    def dab_fast_begin(self) -> None:
        super().dab_fast_begin()
        self.dab_fast_settings = _settings(self)

    def forward(
        self,
        tgt: Tensor,  # [Q, B, D]
        memory: Tensor,  # [S, B, D]
        tgt_mask: Tensor | None = None,  # [Q, Q] or [B * H, Q, Q]
        memory_mask: Tensor | None = None,  # [Q, S] or [B * H, Q, S]
        tgt_key_padding_mask: Tensor | None = None,  # [B, Q]
        memory_key_padding_mask: Tensor | None = None,  # [B, S]
        pos: Tensor | None = None,  # [S, B, D]
        refpoints_unsigmoid: Tensor | None = None,  # [Q, B, query_dim]
        **more: Any,
    ) -> Any:
        """The original's arguments and results."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        try:
            if more:
                raise StepAside(f"the original takes no {', '.join(more)}")
            if changed := self.dab_fast_settings.items() ^ _settings(self).items():
                raise StepAside(f"{', '.join(sorted({name for name, _ in changed}))} was changed after accelerate")
            if pos is None or refpoints_unsigmoid is None:
                raise StepAside("pos or refpoints_unsigmoid is None")
            _check_masks(self, tgt, memory, *masks)
            return run(self, tgt, memory, *masks, pos, refpoints_unsigmoid)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(tgt, memory, *masks, pos, refpoints_unsigmoid, **more)


def _check_masks(
    decoder: Any,
    tgt: Tensor,  # [Q, B, D]
    memory: Tensor,  # [S, B, D]
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
) -> None:
    """Raise StepAside where a mask is not what `run` takes: the original may broadcast it, or raises."""
    (q, b), s = tgt.shape[:2], memory.shape[0]
    for name, mask, keys, per_query in (
        ("tgt_mask", tgt_mask, q, True),
        ("memory_mask", memory_mask, s, True),
        ("tgt_key_padding_mask", tgt_key_padding_mask, q, False),
        ("memory_key_padding_mask", memory_key_padding_mask, s, False),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise StepAside(f"{name} is {mask.dtype}, not bool")
        shape: tuple[int, ...] = (q if per_query else b, keys)
        if per_query and mask.dim() == 3:
            shape = (b * decoder.layers[0].nhead, *shape)
        if mask.shape != shape:
            raise StepAside(f"{name} has shape {list(mask.shape)}, not {list(shape)}")


def _settings(decoder: nn.Module) -> dict[str, Any]:
    """The numbers, strings and flags that a decoder's forward may depend on."""
    return {
        name: x
        for name, x in vars(decoder).items()
        if type(x) in _SCALARS and name != "training" and not name.startswith(("_", "dab_fast"))
    }


_SCALARS = (bool, int, float, str)


@functools.cache
def fast_subclass(original: type[nn.Module]) -> type[Fast]:
    body = {
        "dab_fast_original": original,
        "__doc__": f"{original.__module__}.{original.__qualname__} with the forward of dab_fast.",
    }
    return type(original.__name__, (FastTransformerDecoder, original), body)


@functools.cache
def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a decoder of this codebase."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DabDecoder(config).named_parameters()}


def is_relu_mlp(module: nn.Module) -> bool:
    """Whether `module` is, whatever its class, linear layers in `layers` with a relu between."""
    layers = module._modules.get("layers")
    if set(module._modules) != {"layers"} or type(layers) is not nn.ModuleList:
        return False
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    if compiling():
        return True
    settings = frozenset((name, _hashable(x)) for name, x in vars(module).items() if not name.startswith("_"))
    key = (type(module), settings, len(layers))  # `training` is one of the settings
    if key not in _IS_RELU_MLP:
        _IS_RELU_MLP[key] = apart(lambda: _computes_relu_mlp(module))
    return _IS_RELU_MLP[key]


# By class and settings, not by instance: DataParallel makes new instances for every call.
_IS_RELU_MLP: dict[Any, bool] = {}


def _hashable(x: Any) -> Any:
    return x if isinstance(x, Hashable) else id(x)


@torch.no_grad()
def _computes_relu_mlp(module: nn.Module) -> bool:
    """Ask a twin with layers of its own, since the weights may be anywhere, or zero."""
    twin = copy.copy(module)
    twin.__dict__ = vars(module) | {"_modules": {}}
    with torch.device("meta"):
        twin.layers = nn.ModuleList(
            nn.Linear(x.in_features, x.out_features, dtype=torch.float32)  # type: ignore[arg-type]
            for x in module.layers  # type: ignore[union-attr]
        )
    twin.to_empty(device="cpu")
    randn = seeded_randn()
    for parameter in twin.parameters():
        parameter.copy_(randn(parameter.shape))
    given = randn(16, twin.layers[0].in_features)
    expected = given
    for i, layer in enumerate(twin.layers):
        expected = layer(expected.relu() if i else expected)
    try:
        with torch.random.fork_rng(devices=[]):
            return torch.allclose(type(module).forward(twin, given), expected)  # hooks are not called
    except Exception:
        return False


def _same(what: str, values: set[Any]) -> Any:
    if len(values) != 1:
        raise StepAside(f"the layers' {what} differ: {sorted(values)}")
    return values.pop()


def _numbers_of_heads(layer: Any) -> set[int]:
    return {layer.nhead, layer.self_attn.num_heads, layer.cross_attn.num_heads}


def _dropout_rates(layers: Any) -> DropoutRates:
    return DropoutRates(
        _same("dropout rates", {d.p for layer in layers for d in (layer.dropout1, layer.dropout2, layer.dropout3)}),
        _same("attention dropout rates", {a.dropout for x in layers for a in (x.self_attn, x.cross_attn)}),
        _same("FFN dropout rates", {layer.dropout.p for layer in layers}),
    )


def _activation(activation: Any) -> Activation:
    if type(activation) is nn.PReLU:
        return "prelu"
    if activation not in _ACTIVATIONS:
        raise StepAside(f"the activation {activation} is unknown")
    return _ACTIVATIONS[activation]


_ACTIVATIONS: dict[Any, Any] = {function: name for name, function in reference.ACTIVATIONS.items()}


def _bbox_embed(decoder: Any) -> Any:
    if decoder.bbox_embed is None:
        return None
    is_list = type(decoder.bbox_embed) is nn.ModuleList
    if is_list != bool(decoder.bbox_embed_diff_each_layer):
        raise StepAside(
            f"bbox_embed is a {type(decoder.bbox_embed).__name__} while bbox_embed_diff_each_layer is "
            f"{decoder.bbox_embed_diff_each_layer}"
        )
    mlps = decoder.bbox_embed if is_list else [decoder.bbox_embed]
    if len(mlps) < (len(decoder.layers) if is_list else 1) or any(len(mlp.layers) != 3 for mlp in mlps):
        raise StepAside("bbox_embed must have three linear layers, and an MLP per decoder layer if it is a list")
    return "per_layer" if is_list else "shared"


def unused(params: dict[str, Tensor], config: DecoderConfig) -> set[str]:
    """Parameters that the original has and does not read."""
    heads = {f"bbox_embed.{layer}" for layer in range(config.num_layers)}
    return {
        name
        for name in params
        if (name.startswith("bbox_embed.") and name.split(".layers.")[0] not in heads)
        or (not config.keep_query_pos and ".ca_qpos_proj." in name)
    }
