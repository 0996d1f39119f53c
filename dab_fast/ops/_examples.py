"""Inputs of each op: for selftest, tests and benchmarks alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dab_fast import reference
from dab_fast.ops.box_position_embed import box_position_embed
from dab_fast.ops.modulated_cross_attention import modulated_cross_attention
from dab_fast.ops.refine_boxes import refine_boxes

Call = Callable[..., Tensor | tuple[Tensor, ...]]
Draw = Callable[..., Tensor]  # the sizes of a tensor: normal random numbers


@dataclass(frozen=True)
class Example:
    """An op on random inputs."""

    op: str
    variant: str
    call: Call
    specification: Call
    inputs: Mapping[str, Tensor]  # float64, or bool for masks
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the other arguments

    def positional(self, function: Call) -> Call:
        """`function`, which is the op or its specification, of the inputs in order."""
        return lambda *inputs: function(**dict(zip(self.inputs, inputs, strict=True)), **self.fixed)

    def rounded(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The inputs as the op gets them in `dtype`."""
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in self.inputs.items()}


def attention_inputs(
    randn: Draw, batch: int, queries: int, keys: int, *, heads: int, width: int, shared_k_pos: bool
) -> dict[str, Tensor]:
    """Both parts of `modulated_cross_attention`."""
    return {
        "q_content": randn(batch, queries, heads, width),
        "q_pos": randn(batch, queries, heads, width),
        "k_content": randn(batch, keys, heads, width),
        "k_pos": randn(1 if shared_k_pos else batch, keys, heads, width),
        "v": randn(batch, keys, heads, width),
    }


def embedding_inputs(randn: Draw, boxes: Tensor, num_feats: int) -> dict[str, Tensor]:
    """Boxes [..., 4] with a scale for each feature, and the logits of their modulation."""
    lead = boxes.shape[:-1]
    return {"boxes": boxes, "scale": randn(*lead, 2 * num_feats), "ref_size_logits": randn(*lead, 2)}


def refinement_inputs(randn: Draw, boxes: Tensor, d: int) -> dict[str, Tensor]:
    """Boxes [..., 2 or 4], and a box MLP of width d that keeps the variance of its input."""
    return {
        "hidden": randn(*boxes.shape[:-1], d),
        "boxes": boxes,
        "w1": math.sqrt(2 / d) * randn(d, d),
        "b1": 0.1 * randn(d),
        "w2": math.sqrt(2 / d) * randn(d, d),
        "b2": 0.1 * randn(d),
        "w3": math.sqrt(1 / d) * randn(4, d),
        "b3": 0.1 * randn(4),
    }


def examples(op: str | None = None, seed: int = 0) -> list[Example]:
    """Odd sizes, both masks, both numbers of coordinates; a query whose keys are all masked.

    Args:
        op: of these alone; None for every op.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def boxes(coordinates: int) -> Tensor:
        return 0.03 + 0.94 * torch.rand(2, 19, coordinates, generator=generator, dtype=torch.float64)

    padding = torch.zeros(2, 45, dtype=torch.bool)
    padding[1, 30:] = True
    groups = torch.rand(19, 19, generator=generator) < 0.3
    groups[3] = True  # sees nothing: zeros
    attention = ("modulated_cross_attention", modulated_cross_attention, reference.modulated_cross_attention)
    embedding = ("box_position_embed", box_position_embed, reference.box_position_embed)
    refinement = ("refine_boxes", refine_boxes, reference.refine_boxes)
    two_parts = attention_inputs(randn, 2, 19, 45, heads=2, width=32, shared_k_pos=True)
    one_part = attention_inputs(randn, 2, 19, 19, heads=2, width=32, shared_k_pos=False)
    one_part = {name: x for name, x in one_part.items() if not name.endswith("_pos")}
    named: list[tuple[str, tuple[str, Call, Call], dict[str, Tensor], dict[str, Any]]] = [
        ("modulated boxes", embedding, embedding_inputs(randn, boxes(4), 32), {"num_feats": 32}),
        ("points", embedding, {"boxes": boxes(2), "scale": randn(64)}, {"num_feats": 32}),
        ("two parts, padded", attention, two_parts | {"key_padding_mask": padding}, {}),
        ("one part, masked", attention, one_part | {"attn_mask": groups}, {"q_pos": None, "k_pos": None}),
        ("boxes", refinement, refinement_inputs(randn, boxes(4), 64), {"eps": 1e-3}),
    ]
    return [
        Example(name, variant, call, specification, inputs, fixed)
        for variant, (name, call, specification), inputs, fixed in named
        if op in (None, name)
    ]
