"""What is measured: the decoder, the whole model, and each op, on the shapes of real images.

Hugging Face's implementation is the original everywhere; transformers is needed for the decoder and the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import dab_fast
from dab_fast import ops, reference
from dab_fast.adapters.huggingface import INVERSE_SIGMOID_EPS, canonical_name
from dab_fast.bench import peers
from dab_fast.config import DecoderConfig
from dab_fast.ops._examples import attention_inputs, embedding_inputs, refinement_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Size:
    """The widths of a model."""

    d_model: int = 256
    nhead: int = 8
    layers: int = 6
    ffn: int = 2048


PAPER = Size()
TINY = Size(d_model=64, nhead=2, layers=2, ffn=96)


@dataclass(frozen=True)
class Shape:
    """B images of a feature map of height x width tokens, Q queries; `padded`: every image but the first is smaller."""

    batch: int = 1
    queries: int = 300
    height: int = 25
    width: int = 42
    padded: bool = False

    @property
    def tokens(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        return f"B{self.batch} Q{self.queries} S{self.tokens}{' padded' * self.padded}"


ONE_IMAGE = Shape()
FEATURE_MAPS = {1050: (25, 42), 4200: (50, 84)}  # of an 800 x 1333 image at stride 32, and 16 (DC5)


@dataclass(frozen=True)
class Prepared:
    """A provider's side of a workload."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor]  # what gets a gradient in training
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # forward and backward run in it

    def parameters(self) -> list[Tensor]:
        return [x for x in self.leaves.values() if isinstance(x, nn.Parameter)]


def within(prepared: Prepared, around: Callable[[], AbstractContextManager[Any]]) -> Prepared:
    """The same, with `around()` entered for each forward and each backward: what is recomputed there belongs to it."""

    def forward() -> tuple[Tensor, ...]:
        with around():
            return prepared.forward()

    return Prepared(forward, prepared.leaves, around)


@dataclass(eq=False)
class Workload:
    """What is measured, at one shape, dtype and device. Inputs and weights are the same in every instance."""

    shape: Shape = ONE_IMAGE
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    size: Size = PAPER

    kind: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("inference", "training")
    baseline: ClassVar[str] = "huggingface"

    def original(self) -> Prepared:
        raise NotImplementedError

    def sdpa(self) -> Prepared:
        raise NotImplementedError

    def ours(self, **options: Any) -> Prepared:
        """`options` are those of `accelerate`."""
        raise NotImplementedError

    def truth(self) -> Prepared:
        """The same computation in float64."""
        raise NotImplementedError

    def comparable(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Of the outputs, what the accuracy of a row is about, in float64."""
        return torch.cat([x.detach().double().flatten() for x in outputs])

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def place(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return x.to(self.device, dtype or self.dtype)


def perturb_(module: nn.Module, std: float = 0.02) -> None:
    """Adds noise to every parameter: freshly initialised, the last box layer and all biases are zero, so no box moves
    and errors do not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def _config(size: Size, queries: int, **more: Any) -> Any:
    from transformers import DabDetrConfig, ResNetConfig

    more["out_features"] = ["stage4"]
    labels: dict[str, Any] = {"num_labels": 91}
    return DabDetrConfig(
        **labels,
        backbone_config=ResNetConfig(**more),
        hidden_size=size.d_model,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.nhead,
        decoder_attention_heads=size.nhead,
        encoder_ffn_dim=size.ffn,
        decoder_ffn_dim=size.ffn,
        num_queries=queries,
        dropout=0.0,
    )


@functools.cache
def _huggingface_decoder(size: Size) -> Any:
    from transformers.models.dab_detr import modeling_dab_detr as theirs

    torch.manual_seed(0)
    config = _config(size, 300)
    decoder: Any = theirs.DabDetrDecoder(config)
    decoder.bbox_embed = theirs.DabDetrMLP(config.hidden_size, config.hidden_size, 4, 3)
    perturb_(decoder)
    return decoder.eval()


def anchors(queries: int, generator: torch.Generator) -> Tensor:  # [Q, 4] before the sigmoid
    """Boxes spread over the image, of 5 to 50 percent of its sides."""
    center = 1.5 * torch.randn(queries, 2, generator=generator)
    return torch.cat((center, torch.randn(queries, 2, generator=generator) - 1.5), -1)


def valid_mask(shape: Shape) -> Tensor:  # bool [B, h, w], True = valid
    mask = torch.zeros(shape.batch, shape.height, shape.width, dtype=torch.bool)
    for i in range(shape.batch):
        cut = shape.padded * (i % 3)
        mask[i, : shape.height - cut * shape.height // 6, : shape.width - (cut + 1) // 2 * shape.width // 6] = True
    return mask


class Decoder(Workload):
    """The decoder as the model around it calls it: the original always with a mask, ours with one where there is
    padding. Half precision means half-precision parameters and inputs."""

    kind = "decoder"

    def _module(self) -> nn.Module:
        return copy.deepcopy(_huggingface_decoder(self.size)).to(self.device, self.dtype)

    def _inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        from transformers.models.dab_detr.modeling_dab_detr import DabDetrSinePositionEmbedding

        shape, d, generator = self.shape, self.size.d_model, self.generator()
        mask = valid_mask(shape)
        pos = DabDetrSinePositionEmbedding(_config(self.size, shape.queries))(mask.unsqueeze(1), mask)
        inputs = {
            "inputs_embeds": torch.zeros(shape.batch, shape.queries, d),
            "encoder_hidden_states": torch.randn(shape.batch, shape.tokens, d, generator=generator),
            "object_queries": pos.flatten(2).transpose(1, 2).contiguous(),
            "query_position_embeddings": anchors(shape.queries, generator).expand(shape.batch, -1, -1).clone(),
        }
        # Rounded to the dtype first, so that every provider and the truth read the same numbers.
        return {name: self.place(x.to(self.dtype), dtype) for name, x in inputs.items()}

    def _leaves(self, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in ("encoder_hidden_states", "query_position_embeddings"):
            inputs[name].requires_grad_()
        return dict(module.named_parameters()) | {name: x for name, x in inputs.items() if x.requires_grad}

    def _call(self, module: nn.Module, mask: Tensor | None, **more: Any) -> Prepared:
        inputs = self._inputs()
        leaves = self._leaves(module, inputs)

        def forward() -> tuple[Tensor, ...]:
            out = module(**inputs, memory_key_padding_mask=mask, **more)
            return out.intermediate_hidden_states, out.reference_points

        return Prepared(forward, leaves)

    def original(self) -> Prepared:
        return self._call(self._module(), valid_mask(self.shape).flatten(1).to(self.device))

    def sdpa(self) -> Prepared:
        module = self._module()
        peers.use_sdpa(module)
        return self._call(module, valid_mask(self.shape).flatten(1).to(self.device))

    def ours(self, **options: Any) -> Prepared:
        module = self._module()
        dab_fast.accelerate(module, **options)
        if self.shape.padded:
            return self._call(module, valid_mask(self.shape).flatten(1).to(self.device))
        return self._call(module, None, spatial_shape=(self.shape.height, self.shape.width))

    def truth(self) -> Prepared:
        module, inputs = self._module().double(), self._inputs(torch.float64)
        leaves = self._leaves(module, inputs)
        params = _canonical(leaves)
        config = _decoder_config(self.size)
        mask = ~valid_mask(self.shape).flatten(1).to(self.device)

        def forward() -> tuple[Tensor, ...]:
            return reference.decode(
                params,
                config,
                inputs["inputs_embeds"],
                inputs["encoder_hidden_states"],
                inputs["object_queries"],
                inputs["query_position_embeddings"],
                memory_key_padding_mask=mask,
            )

        return Prepared(forward, leaves)

    def comparable(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """The boxes that the head predicts from the last layer, [B, Q, 4]."""
        hidden_states, reference_points = (x.detach().double() for x in outputs)
        head = {
            f"bbox_embed.{name}": p.detach().to(self.device, torch.float64)
            for name, p in _huggingface_decoder(self.size).bbox_embed.named_parameters()
        }
        return reference.refine_boxes(
            hidden_states[-1],
            reference_points[-1],
            *reference.box_mlp(head, 0),
            eps=INVERSE_SIGMOID_EPS,
        )


def _canonical(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's parameters under the names of `reference`."""
    split = ((*name.rpartition("."), x) for name, x in parameters.items() if "." in name)
    return {f"{canonical_name(module)}.{leaf}": x for module, _, leaf, x in split}


def _decoder_config(size: Size) -> DecoderConfig:
    return DecoderConfig(
        d_model=size.d_model,
        nhead=size.nhead,
        num_layers=size.layers,
        dim_feedforward=size.ffn,
        inverse_sigmoid_eps=INVERSE_SIGMOID_EPS,
    )


@functools.cache
def _huggingface_model(size: Size, queries: int) -> Any:
    from transformers import DabDetrForObjectDetection

    small = {} if size == PAPER else {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    torch.manual_seed(0)
    config = _config(size, queries, **small)
    config.auxiliary_loss = True
    model: Any = DabDetrForObjectDetection(config)
    with torch.no_grad():
        model.model.query_refpoint_embeddings.weight.copy_(anchors(queries, torch.Generator().manual_seed(0)))
    perturb_(model.model.encoder)
    perturb_(model.model.decoder)
    perturb_(model.class_embed)
    # A random ResNet doubles the variance in each block; the decoder would see features of a thousand.
    with torch.no_grad():
        model.model.input_projection.weight.mul_(1e-2)
    return model.eval()


class Model(Workload):
    """The whole detector with a ResNet-50, on images of 32 x the feature map. Half precision means autocast, since
    the original's zero queries are float32 whatever its parameters are. Training computes the loss."""

    kind = "model"

    def _module(self) -> nn.Module:
        return copy.deepcopy(_huggingface_model(self.size, self.shape.queries)).to(self.device)

    def _call(self, module: nn.Module, dtype: torch.dtype) -> Prepared:
        shape, generator = self.shape, self.generator()
        mask = valid_mask(shape).repeat_interleave(32, 1).repeat_interleave(32, 2)
        pixels = torch.randn(shape.batch, 3, *mask.shape[1:], generator=generator) * mask.unsqueeze(1)
        exact = dtype == torch.float64
        inputs: dict[str, Any] = {"pixel_values": self.place(pixels, dtype if exact else torch.float32)}
        if shape.padded:
            inputs["pixel_mask"] = mask.to(self.device, torch.long)
        boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.25, 0.6, 0.1, 0.4], [0.7, 0.7, 0.4, 0.3]])
        labels = [
            {
                "class_labels": torch.tensor([1, 3, 17], device=self.device),
                "boxes": self.place(boxes + 0.01 * i, inputs["pixel_values"].dtype),
            }
            for i in range(shape.batch)
        ]
        half = dtype in (torch.float16, torch.bfloat16)

        def forward() -> tuple[Tensor, ...]:
            with torch.autocast(self.device.type, dtype, enabled=half):
                if torch.is_grad_enabled():
                    return (module(**inputs, labels=labels).loss,)
                out = module(**inputs)
                return out.logits, out.pred_boxes

        return Prepared(forward, {n: p for n, p in module.named_parameters() if p.requires_grad})

    def original(self) -> Prepared:
        return self._call(self._module(), self.dtype)

    def sdpa(self) -> Prepared:
        module = self._module()
        peers.use_sdpa(module)
        return self._call(module, self.dtype)

    def ours(self, **options: Any) -> Prepared:
        module = self._module()
        dab_fast.accelerate(module, **options)
        return self._call(module, self.dtype)

    def truth(self) -> Prepared:
        """Ours, since the original's queries are float32."""
        module = self._module().double()
        dab_fast.accelerate(module)
        return within(self._call(module, torch.float64), lambda: ops.backend("torch"))

    def comparable(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """The predicted boxes [B, Q, 4], or the loss."""
        return outputs[-1].detach().double()


class Op(Workload):
    """One public op; the baseline is its specification, which launches what the original's eager code does."""

    modes = ("forward", "backward", "both")
    baseline = "eager"

    def _tensors(self) -> dict[str, Tensor]:
        """Arguments by name, float32; those of floating point get a gradient."""
        raise NotImplementedError

    def randn(self, generator: torch.Generator | None = None) -> Callable[..., Tensor]:
        return functools.partial(torch.randn, generator=generator or self.generator())

    def _options(self) -> dict[str, Any]:
        return {}

    def _call(self, fn: Callable[..., Any], dtype: torch.dtype | None = None) -> Prepared:
        tensors = {
            name: x.to(self.device) if x.dtype == torch.bool else self.place(x.to(self.dtype), dtype)
            for name, x in self._tensors().items()
        }
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.dtype != torch.bool}
        options = self._options()

        def forward() -> tuple[Tensor, ...]:
            out = fn(**tensors, **options)
            return out if isinstance(out, tuple) else (out,)

        return Prepared(forward, leaves)

    def original(self) -> Prepared:
        return self._call(getattr(reference, self.kind))

    def ours(self, **options: Any) -> Prepared:
        return self._call(getattr(ops, self.kind))

    def truth(self) -> Prepared:
        return self._call(getattr(reference, self.kind), torch.float64)


class CrossAttention(Op):
    """`modulated_cross_attention` of one layer."""

    kind = "modulated_cross_attention"

    def _tensors(self) -> dict[str, Tensor]:
        shape, h = self.shape, self.size.nhead
        tensors = attention_inputs(
            self.randn(),
            shape.batch,
            shape.queries,
            shape.tokens,
            heads=h,
            width=self.size.d_model // h,
            shared_k_pos=not shape.padded,
        )
        if shape.padded:
            tensors["key_padding_mask"] = ~valid_mask(shape).flatten(1)
        return tensors

    def sdpa(self) -> Prepared:
        return self._call(peers.sdpa_two_part)

    def flex(self) -> Prepared:
        return self._call(peers.flex_two_part)


class BoxPositionEmbed(Op):
    """`box_position_embed` of one layer."""

    kind = "box_position_embed"

    def _tensors(self) -> dict[str, Tensor]:
        generator = self.generator()
        boxes = anchors(self.shape.batch * self.shape.queries, generator).sigmoid()
        return embedding_inputs(self.randn(generator), boxes, self.size.d_model // 2)

    def _options(self) -> dict[str, Any]:
        return {"num_feats": self.size.d_model // 2}


class RefineBoxes(Op):
    """`refine_boxes` of one layer."""

    kind = "refine_boxes"

    def _tensors(self) -> dict[str, Tensor]:
        generator = self.generator()
        boxes = anchors(self.shape.batch * self.shape.queries, generator).sigmoid()
        return refinement_inputs(self.randn(generator), boxes, self.size.d_model)

    def _options(self) -> dict[str, Any]:
        return {"eps": INVERSE_SIGMOID_EPS}


WORKLOADS: dict[str, type[Workload]] = {
    c.kind: c for c in (Decoder, Model, CrossAttention, BoxPositionEmbed, RefineBoxes)
}
