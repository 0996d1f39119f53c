"""The fast forward of IDEA-Research's encoder, reading what the user's own class holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dab_fast.adapters._fast import UNREADABLE, DropoutRates, FastPart, same
from dab_fast.adapters._probe import Probe, Randn, check_parameters, itself
from dab_fast.adapters.idea_research._recognised import Recognised
from dab_fast.adapters.idea_research.models import activation_name, is_relu_mlp, rate_in_force
from dab_fast.parameters import PARAMETERS, StepAside, gather
from dab_fast.parts.encoder import EncoderConfig, encode, parameter_shapes

_MARKS = {"layers", "query_scale"}
_LAYER_MARKS = {"self_attn", "linear1", "linear2", "norm1", "norm2"}
_PARAMETERS = {
    **PARAMETERS,
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias"),
    NonDynamicallyQuantizableLinear: ("weight", "bias"),  # its output projection
}


def looks_like_encoder(module: nn.Module) -> bool:
    layers = module._modules.get("layers")
    return (
        _MARKS <= set(module._modules) <= _MARKS | {"norm"}
        and isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and set(layers[0]._modules) >= _LAYER_MARKS
        and isinstance(layers[0].self_attn, nn.MultiheadAttention)
    )


class FastTransformerEncoder(Recognised):
    """Mixed into a subclass of the user's own `TransformerEncoder`."""

    dab_fast_serves = ("encoder",)
    dab_fast_reads = frozenset(("dropout", "p"))

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], EncoderConfig]:
        return read(module)

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: EncoderConfig) -> None:
        check_parameters(_canonical(tensors), parameter_shapes(reading))

        def given(randn: Randn, with_masks: bool) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
            b, s, d = 2, 6, reading.d_model
            padded = torch.arange(s).expand(b, s) >= torch.tensor([[s], [s - 2]])
            return {"src": randn(s, b, d), "pos": randn(s, b, d)}, {"padded": padded if with_masks else None}

        def fast(
            tensors: dict[str, Tensor], config: EncoderConfig, src: Tensor, pos: Tensor, padded: Tensor | None
        ) -> list[Tensor]:
            return [_run(tensors, config, src, padded, pos)]

        Probe(read, fast, original_forward, given, {"output": itself})(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and results."""
        try:
            src, mask, padded, pos = self.dab_fast_given(args, kwargs, _ARGUMENTS, ("src", "pos"))
            if mask is not None:
                raise StepAside("mask is given")
            tensors, config = self.dab_fast_served()
            _check_shapes(config, src, padded, pos)
            return _run(tensors, config, src, padded, pos, recompute=self.dab_fast_recompute)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(*args, **kwargs)


_ARGUMENTS = ("src", "mask", "src_key_padding_mask", "pos")


def original_forward(encoder: nn.Module, src: Tensor, pos: Tensor, padded: Tensor | None) -> list[Tensor]:
    """As `_probe.Probe.original`; hooks are not called."""
    kind = encoder.dab_fast_original if isinstance(encoder, FastPart) else type(encoder)
    return [kind.forward(encoder, src, src_key_padding_mask=padded, pos=pos)]


def read(encoder: nn.Module) -> tuple[dict[str, Tensor], EncoderConfig]:
    """The parameters of an encoder of this codebase, and which encoder it is. Raises StepAside."""
    theirs: Any = encoder
    try:
        layers = theirs.layers
        kind = same("classes", {type(layer) for layer in layers})

        def is_container(module: nn.Module) -> bool:
            return (type(module) is kind and not module._parameters) or is_relu_mlp(module)

        params = gather(encoder, is_container, lambda name: name, _PARAMETERS)
        attentions = [layer.self_attn for layer in layers]
        if unknown := [x for x in attentions if x.batch_first or x.add_zero_attn or x.bias_k is not None]:
            raise StepAside(f"its attention is {unknown[0]}, batch first or with keys of its own")
        config = EncoderConfig(
            d_model=same("widths", {x.embed_dim for x in attentions}),
            nhead=same("numbers of heads", {x.num_heads for x in attentions}),
            num_layers=len(layers),
            dim_feedforward=layers[0].linear1.out_features,
            activation=same("activations", {activation_name(layer.activation) for layer in layers}),
            norm=getattr(theirs, "norm", None) is not None,
            **_dropout_rates(layers)._asdict(),
        )
    except UNREADABLE as error:
        raise StepAside(str(error)) from None
    return params, config


def _dropout_rates(layers: Any) -> DropoutRates:
    """The rates in force: none where a module that drops is not in training."""
    return DropoutRates(
        same("dropout rates", {rate_in_force(d, d.p) for x in layers for d in (x.dropout1, x.dropout2)}),
        same("attention dropout rates", {rate_in_force(x.self_attn, x.self_attn.dropout) for x in layers}),
        same("FFN dropout rates", {rate_in_force(x.dropout, x.dropout.p) for x in layers}),
    )


def _run(
    tensors: dict[str, Tensor],
    config: EncoderConfig,
    src: Tensor,  # [S, B, D]
    padded: Tensor | None,  # bool [B, S], True = padded
    pos: Tensor,  # [S, B, D]
    *,
    recompute: bool = False,
) -> Tensor:  # [S, B, D]
    encoded, _ = encode(
        _canonical(tensors),
        config,
        src.transpose(0, 1),
        pos.transpose(0, 1),
        key_padding_mask=padded,
        recompute=recompute,
    )
    return encoded.transpose(0, 1)


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the projections that `nn.MultiheadAttention` keeps in one tensor apart."""
    result: dict[str, Tensor] = {}
    for name, x in tensors.items():
        attention, packed, which = name.partition(".in_proj_")
        if packed:
            result |= {f"{attention}.{i}_proj.{which}": part for i, part in zip("qkv", x.chunk(3), strict=True)}
        else:
            result[name] = x
    return result


def _check_shapes(config: EncoderConfig, src: Tensor, padded: Tensor | None, pos: Tensor) -> None:
    """Raise StepAside where the original may broadcast, or raises."""
    if src.dim() != 3 or src.shape[2] != config.d_model or 0 in src.shape:
        raise StepAside(f"src has shape {list(src.shape)}")
    if pos.shape != src.shape:
        raise StepAside(f"pos has shape {list(pos.shape)}, not {list(src.shape)}")
    if padded is not None and (padded.dtype != torch.bool or padded.shape != (src.shape[1], src.shape[0])):
        raise StepAside(f"src_key_padding_mask is {padded.dtype} of shape {list(padded.shape)}")
