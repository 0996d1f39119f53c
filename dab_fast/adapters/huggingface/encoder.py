"""The fast subclass of Hugging Face's DAB-DETR encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.dab_detr import modeling_dab_detr as original

from dab_fast.adapters._fast import UNREADABLE, DropoutRates, FastPart, same
from dab_fast.adapters._probe import Probe, Randn, check_parameters, itself
from dab_fast.adapters.huggingface import canonical_encoder_name
from dab_fast.adapters.huggingface._known import Known, activation, asked, is_all_valid
from dab_fast.parameters import StepAside, gather
from dab_fast.parts.encoder import EncoderConfig, encode, parameter_shapes


class DabDetrEncoder(Known, FastPart, original.DabDetrEncoder):
    dab_fast_original = original.DabDetrEncoder
    dab_fast_serves = ("encoder",)
    dab_fast_reads = frozenset(("dropout", "attention_dropout", "gradient_checkpointing"))

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], EncoderConfig]:
        return read(module)

    @staticmethod
    def dab_fast_settings(module: Any) -> dict[str, Any]:
        return {"config._attn_implementation": getattr(module.config, "_attn_implementation", None)}

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: EncoderConfig) -> None:
        check_parameters(tensors, parameter_shapes(reading))

        def given(randn: Randn, with_masks: bool) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
            b, s, d = 2, 6, reading.d_model
            valid = torch.arange(s).expand(b, s) < torch.tensor([[s], [s - 2]])
            return {"tokens": randn(b, s, d), "pos": randn(b, s, d)}, {"mask": valid if with_masks else None}

        outputs = {"output": itself} | {f"hidden states of layer {i}": itself for i in range(reading.num_layers)}
        Probe(read, fast_forward, original_forward, given, outputs)(module)

    def forward(
        self,
        inputs_embeds: Tensor,  # [B, S, D]
        attention_mask: Tensor | None,  # [B, S], 1 = valid; None: nothing is padded
        object_queries: Tensor,  # [B or 1, S, D]
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The original's arguments and results."""
        output_attentions, output_hidden_states, return_dict = asked(
            self.config,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        try:
            if output_attentions:
                raise StepAside("output_attentions: the fast attention has no score matrix")
            params, config = self.dab_fast_served()
            _check_shapes(config, inputs_embeds, attention_mask, object_queries)
            encoded, outputs = encode(
                params,
                config,
                inputs_embeds,
                object_queries,
                key_padding_mask=_padded(attention_mask),
                recompute=self.dab_fast_recompute
                or any(layer.gradient_checkpointing and layer.training for layer in self.layers),
            )
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(
                inputs_embeds,
                attention_mask,
                object_queries,
                output_attentions,
                output_hidden_states,
                return_dict,
                **kwargs,
            )
        states = (inputs_embeds, *outputs[:-1], encoded) if output_hidden_states else None
        if return_dict:
            return BaseModelOutput(last_hidden_state=encoded, hidden_states=states)
        return (encoded,) if states is None else (encoded, states)


def read(encoder: Any) -> tuple[dict[str, Tensor], EncoderConfig]:
    """The parameters of an encoder of theirs, and which encoder it is. Raises StepAside where it cannot be read."""
    params = gather(encoder, _is_container, canonical_encoder_name)
    try:
        layers = encoder.layers
        if not len(layers):
            raise StepAside("there are no layers")
        config = EncoderConfig(
            d_model=same("widths", {layer.self_attn.hidden_size for layer in layers}),
            nhead=same("numbers of heads", {layer.self_attn.num_heads for layer in layers}),
            num_layers=len(layers),
            dim_feedforward=layers[0].fc1.out_features,
            activation=same("activations", {activation(layer.activation_fn) for layer in layers}),
            norm=bool(encoder.norm),
            **_dropout_rates(layers)._asdict(),
        )
    except UNREADABLE as error:
        raise StepAside(str(error)) from None
    return params, config


def fast_forward(
    params: dict[str, Tensor], config: EncoderConfig, tokens: Tensor, pos: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """As `_probe.Probe.fast`."""
    encoded, outputs = encode(params, config, tokens, pos, key_padding_mask=_padded(mask))
    return [encoded, tokens, *outputs[:-1]]


def original_forward(encoder: Any, tokens: Tensor, pos: Tensor, mask: Tensor | None) -> list[Tensor]:
    """As `_probe.Probe.original`; hooks are not called."""
    out = original.DabDetrEncoder.forward(encoder, tokens, mask, pos, False, True, True)
    return [out.last_hidden_state, *out.hidden_states[:-1]]


def _is_container(module: nn.Module) -> bool:
    return type(module) in (
        original.DabDetrEncoderLayer,
        original.DetrAttention,
        original.DabDetrMLP,
        GELUActivation,
        SiLUActivation,
    )


def _dropout_rates(layers: Any) -> DropoutRates:
    """The rates in force: none where a module that drops is not in training."""
    dropout = same("dropout rates", {layer.dropout if layer.training else 0.0 for layer in layers})
    attentions = {x.attention_dropout if x.training else 0.0 for x in (layer.self_attn for layer in layers)}
    return DropoutRates(dropout, same("attention_dropout rates", attentions), activation_dropout=dropout)


def _check_shapes(config: EncoderConfig, tokens: Tensor, mask: Tensor | None, pos: Tensor) -> None:
    """Raise StepAside where the original may broadcast, or raises."""
    if tokens.dim() != 3 or tokens.shape[2] != config.d_model or 0 in tokens.shape:
        raise StepAside(f"inputs_embeds has shape {list(tokens.shape)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]):
        raise StepAside("attention_mask has not the shape of the tokens")
    if pos is None or pos.shape[1:] != tokens.shape[1:] or pos.shape[0] not in (1, tokens.shape[0]):
        raise StepAside("object_queries has not the shape of the tokens")


def _padded(mask: Tensor | None) -> Tensor | None:  # [B, S], 1 = valid; bool [B, S], True = padded
    """Of a mask of theirs, the one of ours: none where nothing is padded."""
    return None if mask is None or is_all_valid(mask) else mask == 0
