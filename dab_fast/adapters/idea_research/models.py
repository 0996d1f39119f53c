"""The fast forward of IDEA-Research's decoder, reading what the user's own class holds."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from dab_fast import reference
from dab_fast._tracing import apart, compiling
from dab_fast.adapters._fast import UNREADABLE, DropoutRates, FastPart, same
from dab_fast.adapters._probe import probe, seeded_randn
from dab_fast.adapters.idea_research._recognised import Recognised
from dab_fast.config import Activation, DecoderConfig
from dab_fast.decoder import decode
from dab_fast.parameters import StepAside, gather

INVERSE_SIGMOID_EPS = 1e-3


def read(decoder: nn.Module) -> tuple[dict[str, Tensor], DecoderConfig]:
    """The parameters of a decoder of this codebase, and which decoder it is.

    Raises:
        StepAside: it cannot be read; the message says why.
    """
    theirs: Any = decoder
    try:
        layers = theirs.layers
        first = layers[0]
        same("classes", {type(layer) for layer in layers})
        attentions = {type(first.self_attn), type(first.cross_attn)}

        def is_container(module: nn.Module) -> bool:
            if module._parameters and any(p is not None for p in module._parameters.values()):
                return False
            return type(module) is type(first) or type(module) in attentions or is_relu_mlp(module)

        params = gather(decoder, is_container, lambda name: name)
        rates = _dropout_rates(layers)
        config = DecoderConfig(
            d_model=theirs.norm.normalized_shape[0],
            nhead=same("numbers of heads", {n for layer in layers for n in _numbers_of_heads(layer)}),
            num_layers=len(layers),
            dim_feedforward=first.linear1.out_features,
            query_dim=theirs.query_dim,
            query_scale_type=theirs.query_scale_type,
            modulate_hw_attn=bool(theirs.modulate_hw_attn),
            keep_query_pos=same("keep_query_pos", {bool(layer.keep_query_pos) for layer in layers}),
            bbox_embed=_bbox_embed(decoder),
            activation=same("activations", {activation_name(layer.activation) for layer in layers}),
            inverse_sigmoid_eps=INVERSE_SIGMOID_EPS,
            **rates._asdict(),
        )
    except UNREADABLE as error:
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
    params, config = decoder.dab_fast_served() if isinstance(decoder, FastPart) else read(decoder)
    output, _ = decode(
        params,
        config,
        *(x.transpose(0, 1) for x in (tgt, memory, pos, refpoints_unsigmoid)),
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        training=config.has_dropout,
        recompute=getattr(decoder, "dab_fast_recompute", False),
    )
    return list(output)


def original_forward(
    decoder: nn.Module, content: Tensor, memory: Tensor, pos: Tensor, anchors: Tensor, **masks: Tensor | None
) -> list[Tensor]:
    """As `_probe.probe` takes it; hooks are not called."""
    kind = decoder.dab_fast_original if isinstance(decoder, FastPart) else type(decoder)
    tgt, memory, pos, anchors = (x.transpose(0, 1) for x in (content, memory, pos, anchors))
    output = kind.forward(decoder, tgt, memory, pos=pos, refpoints_unsigmoid=anchors, **masks)
    return list(output)


class FastTransformerDecoder(Recognised):
    """Mixed into a subclass of the user's own `TransformerDecoder`."""

    dab_fast_serves = ("decoder",)
    dab_fast_reads = frozenset(("dropout", "p"))

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], DecoderConfig]:
        return read(module)

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: DecoderConfig) -> None:
        probe(module, tensors, reading, original_forward, read, tgt_mask=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and results."""
        try:
            given = self.dab_fast_given(args, kwargs, _ARGUMENTS, _NEEDED)
            _check_masks(self, *given[:6])
            return run(self, *given)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(*args, **kwargs)


_ARGUMENTS = (
    "tgt",
    "memory",
    "tgt_mask",
    "memory_mask",
    "tgt_key_padding_mask",
    "memory_key_padding_mask",
    "pos",
    "refpoints_unsigmoid",
)
_NEEDED = ("tgt", "memory", "pos", "refpoints_unsigmoid")


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


def is_relu_mlp(module: nn.Module) -> bool:
    """Whether `module` is, whatever its class, linear layers in `layers` with a relu between."""
    layers = module._modules.get("layers")
    if set(module._modules) != {"layers"} or type(layers) is not nn.ModuleList:
        return False
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    if compiling():
        return True
    key = (type(module), type(module).forward, hashable_settings(module), len(layers))
    if key not in _IS_RELU_MLP:
        _IS_RELU_MLP[key] = computes_relu_mlp(module)
    return _IS_RELU_MLP[key]


# By class and settings, not by instance: DataParallel makes new instances for every call.
_IS_RELU_MLP: dict[Any, bool] = {}


def hashable_settings(module: nn.Module) -> frozenset[tuple[str, Any]]:
    """The attributes of a module beside what torch keeps there; `training` is one of them."""
    return frozenset(
        (name, x if isinstance(x, Hashable) else id(x)) for name, x in vars(module).items() if not name.startswith("_")
    )


def computes_relu_mlp(module: nn.Module) -> bool:
    """Ask a twin with layers of its own, since the weights may be anywhere, or zero."""
    return apart(lambda: _computes_relu_mlp(module))


@torch.no_grad()
def _computes_relu_mlp(module: nn.Module) -> bool:
    twin = copy.copy(module)
    twin.__dict__ = vars(module) | {"_modules": {}}
    with torch.device("meta"):
        twin.layers = nn.ModuleList(
            nn.Linear(x.in_features, x.out_features, dtype=torch.float32)
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


def _numbers_of_heads(layer: Any) -> set[int]:
    return {layer.nhead, layer.self_attn.num_heads, layer.cross_attn.num_heads}


def _dropout_rates(layers: Any) -> DropoutRates:
    """The rates in force: none where a module that drops is not in training."""
    return DropoutRates(
        same("dropout rates", {rate_in_force(d, d.p) for x in layers for d in (x.dropout1, x.dropout2, x.dropout3)}),
        same(
            "attention dropout rates",
            {rate_in_force(a, a.dropout) for x in layers for a in (x.self_attn, x.cross_attn)},
        ),
        same("FFN dropout rates", {rate_in_force(x.dropout, x.dropout.p) for x in layers}),
    )


def rate_in_force(module: Any, rate: float) -> float:
    return rate if module.training else 0.0


def activation_name(activation: Any) -> Activation:
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
    if is_list != bool(getattr(decoder, "bbox_embed_diff_each_layer", is_list)):
        raise StepAside(
            f"bbox_embed is a {type(decoder.bbox_embed).__name__} while bbox_embed_diff_each_layer is "
            f"{decoder.bbox_embed_diff_each_layer}"
        )
    mlps = decoder.bbox_embed if is_list else [decoder.bbox_embed]
    if len(mlps) < (len(decoder.layers) if is_list else 1) or any(len(mlp.layers) != 3 for mlp in mlps):
        raise StepAside("bbox_embed must have three linear layers, and an MLP per decoder layer if it is a list")
    return "per_layer" if is_list else "shared"
