"""The fast subclasses of Hugging Face's DAB-DETR.

They carry their originals' names: transformers writes a class's name into the saved config, and looks the loss up by
it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.dab_detr import modeling_dab_detr as original

from dab_fast import reference
from dab_fast.adapters._fast import UNREADABLE, DropoutRates, Fast, FastPart, same
from dab_fast.adapters._probe import probe
from dab_fast.adapters.huggingface import INVERSE_SIGMOID_EPS, canonical_name, criterion
from dab_fast.adapters.huggingface._known import (
    Known,
    activation,
    asked,
    is_all_valid,
    is_known,
    is_theirs,
    is_unhooked,
)
from dab_fast.adapters.huggingface.backbone import DabDetrConvEncoder
from dab_fast.adapters.huggingface.encoder import DabDetrEncoder
from dab_fast.config import DecoderConfig
from dab_fast.decoder import decode, predict_boxes
from dab_fast.ops import sine_embed
from dab_fast.parameters import StepAside, gather
from dab_fast.precision import autocast_on

_POSITION_EPS = 1e-6  # in the forward of their sine embedding


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


class DabDetrDecoder(Known, FastPart, original.DabDetrDecoder):
    dab_fast_original = original.DabDetrDecoder
    dab_fast_serves = ("decoder",)
    dab_fast_reads = frozenset(("dropout", "attention_dropout", "activation_dropout", "gradient_checkpointing"))

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], DecoderConfig]:
        return read(module)

    @staticmethod
    def dab_fast_settings(module: Any) -> dict[str, Any]:
        return settings(module)

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: DecoderConfig) -> None:
        probe(module, tensors, reading, original_forward, read, tgt_mask=False)

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
                training=config.has_dropout,
                recompute=self.dab_fast_recompute
                or any(layer.gradient_checkpointing and layer.training for layer in self.layers),
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


_INVERSE_SIGMOID = original.inverse_sigmoid


def read(decoder: Any) -> tuple[dict[str, Tensor], DecoderConfig]:
    """The parameters of a decoder of theirs, and which decoder it is. Raises StepAside where it cannot be read."""
    params = gather(decoder, _is_container, canonical_name)
    try:
        if len(decoder.layers) != decoder.num_layers or not len(decoder.layers):
            raise StepAside(f"num_layers is {decoder.num_layers}, and there are {len(decoder.layers)} layers")
        first: Any = decoder.layers[0]
        config = DecoderConfig(
            d_model=decoder.hidden_size,
            nhead=first.cross_attn.decoder_attention_heads,
            num_layers=len(decoder.layers),
            dim_feedforward=first.mlp.fc1.out_features,
            query_dim=decoder.config.query_dim,
            keep_query_pos=same("keep_query_pos", _keeps_query_pos(decoder.layers)),
            bbox_embed=None if decoder.bbox_embed is None else "shared",
            activation=same("activations", {activation(layer.mlp.activation_fn) for layer in decoder.layers}),
            inverse_sigmoid_eps=INVERSE_SIGMOID_EPS,
            **_dropout_rates(decoder.layers)._asdict(),
        )
    except UNREADABLE as error:
        raise StepAside(str(error)) from None
    return params, config


def _keeps_query_pos(layers: Any) -> set[bool]:
    """Of all layers but the first, which reads the query position in any case."""
    return {bool(layer.cross_attn.keep_query_pos) for layer in layers[1:]} or {False}


def settings(decoder: Any) -> dict[str, Any]:
    """What their decoder reads from its config."""
    config = decoder.config
    return {f"config.{name}": getattr(config, name, None) for name in ("query_dim", "_attn_implementation")}


def original_forward(
    decoder: Any, content: Tensor, memory: Tensor, pos: Tensor, anchors: Tensor, **masks: Tensor | None
) -> list[Tensor]:
    """As `_probe.probe` takes it; hooks are not called."""
    padded = masks["memory_key_padding_mask"]
    mask = None if padded is None else ~padded
    out = original.DabDetrDecoder.forward(decoder, content, memory, mask, pos, anchors, False, False, True)
    return [out.intermediate_hidden_states, out.reference_points]


class DabDetrModel(Known, original.DabDetrModel):
    dab_fast_original = original.DabDetrModel
    dab_fast_serves = ("decoder",)

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
            _check_unpatched(original.DabDetrModel)
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
        unpadded = pixel_mask is None or is_all_valid(pixel_mask)
        feature_map, mask, pos = _features(self, pixel_values, pixel_mask, unpadded)
        encoded = self.encoder(
            inputs_embeds=self.input_projection(feature_map).flatten(2).transpose(1, 2),
            attention_mask=None if unpadded and is_known(self.encoder, original.DabDetrEncoder) else mask,
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
        given = {
            "inputs_embeds": content,
            "query_position_embeddings": anchors,
            "object_queries": pos,
            "encoder_hidden_states": memory,
            "memory_key_padding_mask": mask,
            "output_attentions": False,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
        }
        if unpadded and is_unhooked(self.decoder):  # whoever looks at the call sees the original's
            given["memory_key_padding_mask"] = None
            if _makes_sines(self.backbone):
                given |= {"object_queries": pos[:1], "spatial_shape": tuple(feature_map.shape[-2:])}
        decoded = self.decoder(**given)
        return original.DabDetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            encoder_last_hidden_state=memory if output_hidden_states else None,
            encoder_hidden_states=encoded.hidden_states,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            reference_points=decoded.reference_points,
        )


class DabDetrForObjectDetection(Known, original.DabDetrForObjectDetection):
    dab_fast_original = original.DabDetrForObjectDetection
    dab_fast_serves = ("head", "criterion")

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor | None = None,  # [B, height, width], 1 = valid
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
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
            if not all(asked(self.config, return_dict=return_dict)):
                raise StepAside("return_dict=False")
            _check_unpatched(original.DabDetrForObjectDetection)
            params = _box_head(self)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(pixel_values, pixel_mask, labels=labels, return_dict=return_dict, **inputs, **kwargs)
        outputs = self.model(pixel_values, pixel_mask=pixel_mask, return_dict=True, **inputs)
        hidden_states, reference_points = outputs.intermediate_hidden_states, outputs.reference_points
        auxiliary = labels is not None and self.config.auxiliary_loss
        once = auxiliary and type(self.class_embed) is nn.Linear and is_unhooked(self.class_embed)
        classes: Any = self.class_embed(hidden_states) if once else None
        logits = classes[-1] if once else self.class_embed(hidden_states[-1])
        if auxiliary and not once:
            classes = self.class_embed(hidden_states)
        needed = slice(-1 if labels is None else None, None)  # layers
        boxes = predict_boxes(params, hidden_states[needed], reference_points[needed], eps=INVERSE_SIGMOID_EPS)

        loss = loss_dict = auxiliary_outputs = None
        if labels is not None:
            losses = None
            if "criterion" in self.dab_fast_parts:
                of_layers = classes
                if not once:
                    of_layers = torch.cat((classes[:-1], logits[None])) if auxiliary else logits[None]
                losses = self._dab_fast_losses(of_layers, labels, boxes)
            if losses is None:
                losses = self.loss_function(logits, labels, self.device, boxes[-1], self.config, classes, boxes)
            loss, loss_dict, auxiliary_outputs = losses
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

    def _dab_fast_losses(self, logits: Tensor, labels: Any, boxes: Tensor) -> Any:
        """As `criterion.loss`; None where their `loss_function` is not to be fast, or cannot be."""
        try:
            return criterion.loss(self.loss_function, logits, labels, boxes, self.config)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return None


FAST_CLASSES: dict[type[nn.Module], type[Fast]] = {
    fast.dab_fast_original: fast
    for fast in (DabDetrConvEncoder, DabDetrEncoder, DabDetrDecoder, DabDetrModel, DabDetrForObjectDetection)
}
for _class in FAST_CLASSES.values():
    _class.__doc__ = f"Hugging Face's {_class.__name__} with the forward of dab_fast."


def _dropout_rates(layers: Any) -> DropoutRates:
    """The rates in force: none where a module that drops is not in training."""
    blocks = [block for layer in layers for block in (layer.self_attn, layer.cross_attn, layer.mlp)]
    attentions = [x for layer in layers for x in (layer.self_attn.self_attn, layer.cross_attn.cross_attn)]
    found = []
    for name, modules in (
        ("dropout", blocks),
        ("attention_dropout", attentions),
        ("activation_dropout", [layer.mlp for layer in layers]),
    ):
        found.append(same(f"{name} rates", {getattr(x, name) if x.training else 0.0 for x in modules}))
    return DropoutRates(*found)


def _check_unpatched(kind: type[nn.Module]) -> None:
    if not is_theirs(kind):
        raise StepAside(f"{kind.__name__}.forward was patched")


def _box_head(model: Any) -> dict[str, Tensor]:
    """The parameters of `bbox_predictor` under "bbox_embed"; nothing else of the model is read."""

    def rename(name: str) -> str | None:
        head, _, rest = name.partition(".")
        return f"bbox_embed.{rest}" if head == "bbox_predictor" else None

    params = gather(model, _is_container, rename)
    _check_unpatched(original.DabDetrMLP)
    if original.inverse_sigmoid is not _INVERSE_SIGMOID:
        raise StepAside("inverse_sigmoid was patched")
    d = model.config.hidden_size
    shapes = [tuple(x.shape) for name, x in params.items() if name.endswith(".weight")]
    if sorted(shapes) != sorted([(d, d), (d, d), (4, d)]) or model.bbox_predictor.num_layers != 3:
        raise StepAside(f"bbox_predictor is not three layers {d} wide with four outputs")
    if model.query_dim != 4:
        raise StepAside(f"query_dim is {model.query_dim}")
    return params


def _check_served(model: Any, encoder_outputs: Any, output_attentions: bool | None, return_dict: bool | None) -> None:
    """Raise StepAside where the fast model cannot serve a call."""
    output_attentions, return_dict = asked(model.config, output_attentions=output_attentions, return_dict=return_dict)
    if not return_dict:
        raise StepAside("return_dict=False")
    if output_attentions:
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
    unpadded: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, h, w]; its mask [B, S], 1 = valid; the tokens' positions [B, S, D]
    if pixel_mask is None:
        batch, _, height, width = pixel_values.shape
        pixel_mask = pixel_values.new_ones((batch, height, width), dtype=torch.float32)
    backbone = model.backbone
    if not (_makes_sines(backbone) and _is_one_sine(backbone.position_embedding)):
        features, positions = backbone(pixel_values, pixel_mask)
        feature_map, mask = features[-1]
        return feature_map, mask.flatten(1), positions[-1].flatten(2).transpose(1, 2)
    feature_map, mask = backbone.conv_encoder(pixel_values, pixel_mask)[-1]
    positions = _positions(mask[:1] if unpadded else mask, backbone.position_embedding).to(feature_map.dtype)
    return feature_map, mask.flatten(1), positions.expand(mask.shape[0], -1, -1)


def _positions(mask: Tensor, embedding: Any) -> Tensor:  # [B, h, w], 1 = valid; [B, S, D]
    """The sine embedding of where a token is among the valid ones of its column and of its row."""
    y, x = (mask.cumsum(axis, dtype=torch.float32) for axis in (1, 2))
    y, x = y / (y[:, -1:] + _POSITION_EPS), x / (x[:, :, -1:] + _POSITION_EPS)
    coordinates = torch.stack((y, x), -1).flatten(1, 2)
    return sine_embed(coordinates, int(embedding.embedding_dim), embedding.temperature_height, order="xywh")


def _is_one_sine(embedding: Any) -> bool:
    """Whether one `sine_embed` computes both halves of a position, whose settings a user may have changed."""
    dim, temperature, scale = embedding.embedding_dim, embedding.temperature_height, embedding.scale
    return (
        dim % 2 == 0
        and dim > 0
        and temperature == embedding.temperature_width
        and temperature > 0
        and scale == 2 * math.pi
    )


def _makes_sines(backbone: Any) -> bool:
    """Whether positions are half a function of y and half one of x, the same for all images that are not padded."""
    return is_known(backbone, original.DabDetrConvModel) and is_known(
        backbone.position_embedding, original.DabDetrSinePositionEmbedding
    )
