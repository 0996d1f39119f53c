"""The fast subclass of Hugging Face's backbone: a ResNet of transformers or timm with frozen batch norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.dab_detr import modeling_dab_detr as original
from transformers.models.resnet import modeling_resnet as resnet

from dab_fast._tracing import compiling, exporting, transformed
from dab_fast.adapters._backbone import NORM_TENSORS, FastBackbone, check_relu, check_shapes, convolution, pool, probe
from dab_fast.adapters.huggingface import timm_resnet
from dab_fast.adapters.huggingface._known import Known
from dab_fast.parameters import PARAMETERS, StepAside, gather
from dab_fast.parts.resnet import Block, Convolution, Plan, forward

_CONTAINERS = (
    nn.Sequential,
    nn.Identity,
    nn.MaxPool2d,
    resnet.ResNetBackbone,
    resnet.ResNetEmbeddings,
    resnet.ResNetEncoder,
    resnet.ResNetStage,
    resnet.ResNetBasicLayer,
    resnet.ResNetBottleNeckLayer,
    resnet.ResNetConvLayer,
    resnet.ResNetShortCut,
)
_PARAMETERS = {**PARAMETERS, nn.Conv2d: ("weight",), original.DabDetrFrozenBatchNorm2d: NORM_TENSORS}
_EPS = 1e-5  # in the forward of their frozen norm


class Reading(NamedTuple):
    plan: Plan
    outputs: tuple[int, ...]  # as `parts.resnet.forward` numbers them
    channels: int  # of the images


class DabDetrConvEncoder(Known, FastBackbone, original.DabDetrConvEncoder):
    dab_fast_original = original.DabDetrConvEncoder
    dab_fast_serves = ("backbone",)
    dab_fast_reads = frozenset()

    @classmethod
    def dab_fast_why_not(cls, module: Any) -> str | None:
        return _unknown(module) or super().dab_fast_why_not(module)

    @staticmethod
    def dab_fast_read(module: Any) -> tuple[dict[str, Tensor], Reading]:
        return read(module)

    @staticmethod
    def dab_fast_settings(module: Any) -> dict[str, Any]:
        backbone = module.model
        found: dict[str, Any] = {
            name: tuple(getattr(backbone, name, None) or ()) for name in ("stage_names", "out_features")
        }
        return found | (timm_resnet.settings(backbone) if timm_resnet.is_known(backbone) else {})

    @staticmethod
    def dab_fast_probe(module: Any, tensors: dict[str, Tensor], reading: Reading) -> None:
        probe(module, original_forward, fast_forward, reading.channels)

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, height, width]
        pixel_mask: Tensor,  # [B, height, width], 1 = valid
    ) -> list[tuple[Tensor, Tensor]]:  # feature map [B, C, h, w], and its mask [B, h, w]
        """The original's arguments and results."""
        if compiling() or exporting():  # a compiler joins the small calls itself, and a graph outlives what is kept
            return super().forward(pixel_values, pixel_mask)
        try:
            if transformed():
                raise StepAside("torch.func or forward-mode AD is at work")
            tensors, reading = self.dab_fast_served()
            if pixel_values.dim() == 4 and pixel_values.shape[1] != reading.channels:
                raise StepAside(f"pixel_values has {pixel_values.shape[1]} channels, not {reading.channels}")
            features = forward(reading.plan, tensors, pixel_values, reading.outputs, self)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(pixel_values, pixel_mask)
        valid = pixel_mask[None].float()
        return [(x, nn.functional.interpolate(valid, size=x.shape[-2:]).to(torch.bool)[0]) for x in features]


def original_forward(encoder: Any, images: Tensor) -> list[Tensor]:
    """As `_backbone.Forward`."""
    mask = images.new_ones(images.shape[0], *images.shape[2:])
    return [x for x, _ in original.DabDetrConvEncoder.forward(encoder, images, mask)]


def fast_forward(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """As `_backbone.Forward`."""
    tensors, reading = read(encoder)
    return forward(reading.plan, tensors, images, reading.outputs, encoder)


def _unknown(encoder: Any) -> str | None:
    """Why a backbone is not one that this file reads."""
    kind = type(encoder.model)
    if kind is resnet.ResNetBackbone or timm_resnet.is_known(encoder.model):
        return None
    inner = type(getattr(encoder.model, "_backbone", encoder.model))
    return f"its backbone is a {inner.__module__}.{inner.__qualname__}, not a ResNet that this package knows"


def read(encoder: Any) -> tuple[dict[str, Tensor], Reading]:
    """The tensors of a backbone by their names below `encoder`. Raises StepAside where it cannot be read."""
    if reason := _unknown(encoder):
        raise StepAside(reason)
    backbone = encoder.model
    is_timm = type(backbone) is not resnet.ResNetBackbone
    containers = timm_resnet.containers() if is_timm else _CONTAINERS
    tensors = gather(encoder, lambda module: type(module) in containers, lambda name: name, _PARAMETERS)
    try:
        plan = timm_resnet.plan(backbone, _EPS) if is_timm else _plan(backbone)
        outputs = timm_resnet.outputs(backbone) if is_timm else _outputs(backbone)
        check_shapes(plan, tensors)
    except (AttributeError, KeyError) as error:
        raise StepAside(f"the backbone is not as its library builds it: {error}") from None
    return tensors, Reading(plan, outputs, tensors[f"{plan.stem.name}.weight"].shape[1] * plan.stem.groups)


def _outputs(backbone: Any) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(backbone.stage_names) if name in backbone.out_features)


def _plan(backbone: Any) -> Plan:
    embedder = backbone.embedder
    return Plan(
        _convolution(embedder.embedder, "model.embedder.embedder", relu=True),
        pool(embedder.pooler, "model.embedder.pooler"),
        tuple(
            tuple(_block(block, f"model.encoder.stages.{i}.layers.{j}") for j, block in enumerate(stage.layers))
            for i, stage in enumerate(backbone.encoder.stages)
        ),
        _EPS,
    )


def _block(block: Any, name: str) -> Block:
    check_relu(block.activation, f"{name}.activation")
    last = len(block.layer) - 1
    branch = tuple(_convolution(x, f"{name}.layer.{i}", relu=i < last) for i, x in enumerate(block.layer))
    plain = type(block.shortcut) is nn.Identity
    return Block(branch, None if plain else _convolution(block.shortcut, f"{name}.shortcut", relu=False))


def _convolution(layer: Any, name: str, *, relu: bool) -> Convolution:
    if relu:
        check_relu(layer.activation, f"{name}.activation")
    elif type(getattr(layer, "activation", None)) not in (nn.Identity, type(None)):
        raise StepAside(f"{name}.activation is {layer.activation}")
    return convolution(layer.convolution, f"{name}.convolution", f"{name}.normalization")
