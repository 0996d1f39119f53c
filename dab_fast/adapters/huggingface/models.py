"""The fast subclasses of Hugging Face's DAB-DETR.

They carry their originals' names: transformers writes a class's name into the saved config, and looks the loss up by
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.dab_detr import modeling_dab_detr as original

from dab_fast import reference
from dab_fast._tracing import compiling
from dab_fast.adapters._fast import DropoutRates, Fast
from dab_fast.adapters.huggingface import INVERSE_SIGMOID_EPS, canonical_name
from dab_fast.config import Activation, DecoderConfig
from dab_fast.decoder import decode, predict_boxes
from dab_fast.parameters import StepAside, gather
from dab_fast.precision import autocast_on


def _is_container(module: nn.Module) -> bool:
    return type(module) in (
        original.DabDetrDecoderLayer,
        original.DabDetrDecoderLayerSelfAttention,
        original.DabDetrDecoderLayerCrossAttention,
        original.DabDetrDecoderLayerFFN,
        original.DabDetrAttention,
        original.DabDetrMLP,
        GELUActivation,
        SiLUActivation,
    )


class DabDetrDecoder(Fast, original.DabDetrDecoder):
    dab_fast_original = original.DabDetrDecoder

    def forward(
        self,
        inputs_embeds: Tensor,  # [B, Q, D]
        encoder_hidden_states: Tensor,  # [B, S, D]
        memory_key_padding_mask: Tensor | None,  # [B, S], 1 = valid; None: nothing is padded
        object_queries: Tensor,  # [B, S, D], or [1, S, D] from the fast model when nothing is padded
        query_position_embeddings: Tensor,  # [B, Q, 4]
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        spatial_shape: tuple[int, int] | None = None,  # of the feature map, when nothing is padded
        **kwargs: Any,
    ) -> Any:
        """The original's arguments and results; `spatial_shape` is the fast model's."""
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        try:
            if output_attentions:
                raise StepAside("output_attentions: the fast attention has no score matrix")
            params, config = self._read()
            mask = memory_key_padding_mask
            if mask is not None and mask.shape != encoder_hidden_states.shape[:2]:
                raise StepAside(f"memory_key_padding_mask has shape {list(mask.shape)}, not that of the memory")
            if spatial_shape is None and object_queries.shape != encoder_hidden_states.shape:
                raise StepAside(f"object_queries has shape {list(object_queries.shape)}, not that of the memory")
            # The original model makes float32 queries even where its parameters are half precision.
            content, memory, pos = (
                self._as_parameters(x) for x in (inputs_embeds, encoder_hidden_states, object_queries)
            )
            (hidden_states, reference_points), outputs = decode(
                params,
                config,
                content,
                memory,
                pos,
                query_position_embeddings,
                memory_key_padding_mask=None if mask is None else mask == 0,
                spatial_shape=spatial_shape,
                training=self.training,
                recompute=self.dab_fast_recompute
                or (self.training and any(layer.gradient_checkpointing for layer in self.layers)),
            )
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            if spatial_shape is not None:
                object_queries = object_queries.expand(encoder_hidden_states.shape[0], -1, -1)
            return super().forward(
                inputs_embeds,
                encoder_hidden_states,
                memory_key_padding_mask,
                object_queries,
                query_position_embeddings,
                output_attentions,
                output_hidden_states,
                return_dict,
                **kwargs,
            )
        result = original.DabDetrDecoderOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=(content, *outputs[:-1], hidden_states[-1]) if output_hidden_states else None,
            intermediate_hidden_states=hidden_states,
            reference_points=reference_points,  # type: ignore[arg-type]
        )
        return result if return_dict else result.to_tuple()

    def _as_parameters(self, x: Tensor) -> Tensor:
        return x if autocast_on(x) else x.to(self.layernorm.weight.dtype)

    def _read(self) -> tuple[dict[str, Tensor], DecoderConfig]:
        params = gather(self, _is_container, canonical_name)
        first: Any = self.layers[0]
        rates = DropoutRates()
        if self.training:
            every = {_dropout_rates(layer) for layer in self.layers}
            if len(every) > 1:
                raise StepAside(f"the layers' dropout rates differ: {sorted(every)}")
            rates = every.pop()
        config = DecoderConfig(
            d_model=self.hidden_size,
            nhead=first.cross_attn.decoder_attention_heads,
            num_layers=len(self.layers),
            dim_feedforward=first.mlp.fc1.out_features,
            query_dim=self.config.query_dim,
            keep_query_pos=first.cross_attn.keep_query_pos,
            bbox_embed=None if self.bbox_embed is None else "shared",
            activation=_activation(first.mlp.activation_fn),
            inverse_sigmoid_eps=INVERSE_SIGMOID_EPS,
            **rates._asdict(),
        )
        return params, config


class DabDetrModel(Fast, original.DabDetrModel):
    dab_fast_original = original.DabDetrModel

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor | None = None,  # [B, height, width], 1 = valid
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The original's arguments and results. Without padding no mask is made, and the decoder learns h and w."""
        try:
            _check_served(self, encoder_outputs, output_attentions, return_dict)
            if pixel_mask is not None and pixel_mask.shape[:1] != pixel_values.shape[:1]:
                raise StepAside("pixel_mask has another batch size than pixel_values")
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(
                pixel_values,
                pixel_mask,
                decoder_attention_mask,
                encoder_outputs,
                inputs_embeds,
                decoder_inputs_embeds,
                output_attentions,
                output_hidden_states,
                return_dict,
                **kwargs,
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        unpadded = pixel_mask is None or _is_all_valid(pixel_mask)
        feature_map, mask, pos = _features(self, pixel_values, pixel_mask)
        encoded = self.encoder(
            inputs_embeds=self.input_projection(feature_map).flatten(2).transpose(1, 2),
            attention_mask=None if unpadded else mask,
            object_queries=pos,
            output_attentions=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        memory = encoded.last_hidden_state
        content, anchors = reference.initial_queries(
            self.query_refpoint_embeddings.weight,
            self.patterns.weight if self.num_patterns > 0 else None,
            memory.shape[0],
            self.hidden_size,
        )
        decoded = self.decoder(
            inputs_embeds=content,
            query_position_embeddings=anchors,
            object_queries=pos[:1] if unpadded else pos,
            encoder_hidden_states=memory,
            memory_key_padding_mask=None if unpadded else mask,
            output_attentions=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            spatial_shape=tuple(feature_map.shape[-2:]) if unpadded else None,
        )
        return original.DabDetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            encoder_last_hidden_state=memory if output_hidden_states else None,
            encoder_hidden_states=encoded.hidden_states,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            reference_points=decoded.reference_points,
        )


class DabDetrForObjectDetection(Fast, original.DabDetrForObjectDetection):
    dab_fast_original = original.DabDetrForObjectDetection

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor | None = None,  # [B, height, width], 1 = valid
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: list[dict] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The original's arguments and results. Without labels only the last layer's boxes are computed."""
        inputs = {
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        try:
            if not (self.config.return_dict if return_dict is None else return_dict):
                raise StepAside("return_dict=False")
            params = _box_head(self)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(pixel_values, pixel_mask, labels=labels, return_dict=return_dict, **inputs, **kwargs)
        outputs = self.model(pixel_values, pixel_mask, return_dict=True, **inputs)
        hidden_states, reference_points = outputs.intermediate_hidden_states, outputs.reference_points
        logits = self.class_embed(hidden_states[-1])
        needed = slice(-1 if labels is None else None, None)  # layers
        boxes = predict_boxes(params, hidden_states[needed], reference_points[needed], eps=INVERSE_SIGMOID_EPS)

        loss = loss_dict = auxiliary_outputs = None
        if labels is not None:
            classes = self.class_embed(hidden_states) if self.config.auxiliary_loss else None
            loss, loss_dict, auxiliary_outputs = self.loss_function(
                logits, labels, self.device, boxes[-1], self.config, classes, boxes
            )
        return original.DabDetrObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=boxes[-1],
            auxiliary_outputs=auxiliary_outputs,
            **{
                key: outputs[key]
                for key in (
                    "last_hidden_state",
                    "decoder_hidden_states",
                    "decoder_attentions",
                    "cross_attentions",
                    "encoder_last_hidden_state",
                    "encoder_hidden_states",
                    "encoder_attentions",
                )
                if outputs.get(key) is not None
            },
        )


for _class in (DabDetrDecoder, DabDetrModel, DabDetrForObjectDetection):
    _class.__doc__ = f"Hugging Face's {_class.__name__} with the forward of dab_fast."


def _dropout_rates(layer: Any) -> DropoutRates:
    attentions, ffn = (layer.self_attn, layer.cross_attn), layer.mlp
    rates = {block.dropout for block in (*attentions, ffn)}
    attention_rates = {layer.self_attn.self_attn.attention_dropout, layer.cross_attn.cross_attn.attention_dropout}
    if len(rates) > 1 or len(attention_rates) > 1:
        raise StepAside(f"dropout rates inside a layer differ: {sorted(rates)}, attention {sorted(attention_rates)}")
    return DropoutRates(rates.pop(), attention_rates.pop(), ffn.activation_dropout)


def _activation(module: nn.Module) -> Activation:
    names: dict[type, Activation] = {
        nn.PReLU: "prelu",
        nn.ReLU: "relu",
        nn.GELU: "gelu",
        GELUActivation: "gelu",
        nn.SiLU: "silu",
        SiLUActivation: "silu",
        nn.SELU: "selu",
    }
    if type(module) not in names or getattr(module, "approximate", "none") != "none":
        raise StepAside(f"the activation {module} is unknown")
    return names[type(module)]


def _box_head(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of `bbox_predictor` under "bbox_embed"; nothing else of the model is read."""

    def rename(name: str) -> str | None:
        head, _, rest = name.partition(".")
        return f"bbox_embed.{rest}" if head == "bbox_predictor" else None

    return gather(model, _is_container, rename)


def _check_served(model: Any, encoder_outputs: Any, output_attentions: bool | None, return_dict: bool | None) -> None:
    """Raise StepAside where the fast model cannot serve a call."""
    if not (model.config.return_dict if return_dict is None else return_dict):
        raise StepAside("return_dict=False")
    if output_attentions or (output_attentions is None and model.config.output_attentions):
        raise StepAside("output_attentions: the fast attention has no score matrix")
    if encoder_outputs is not None:
        raise StepAside("encoder_outputs is given")
    if not isinstance(model.decoder, DabDetrDecoder):
        raise StepAside(f"the decoder is a {type(model.decoder).__module__}.{type(model.decoder).__qualname__}")
    if "forward" in vars(model.decoder):  # it may know neither `spatial_shape` nor positions of batch 1
        raise StepAside("the decoder's forward is patched")


def _features(
    model: Any,
    pixel_values: Tensor,  # [B, 3, height, width]
    pixel_mask: Tensor | None,  # [B, height, width], 1 = valid
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, h, w]; its mask [B, S], 1 = valid; the tokens' positions [B, S, D]
    if pixel_mask is None:
        batch, _, height, width = pixel_values.shape
        pixel_mask = pixel_values.new_ones((batch, height, width), dtype=torch.float32)
    features, positions = model.backbone(pixel_values, pixel_mask)
    feature_map, mask = features[-1]
    return feature_map, mask.flatten(1), positions[-1].flatten(2).transpose(1, 2)


def _is_all_valid(mask: Tensor) -> bool:
    """Whether nothing is padded, where asking is free: on the CPU, and not while tracing."""
    tracing = compiling() or torch.jit.is_tracing()
    return mask.device.type == "cpu" and not tracing and bool(mask.all())
