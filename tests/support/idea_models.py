"""Small IDEA-Research decoders, by import and by the second writing, their inputs, masks and comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import dab_fast
from dab_fast import idea_research
from dab_fast.accuracy import BOX_TOLERANCE, HIDDEN_TOLERANCE
from tests.support import idea_second_writing as second
from tests.support.models import perturb_, wide

D, H, L, B, Q, S = 32, 4, 3, 2, 7, 11

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "points": {"query_dim": 2, "modulate_hw_attn": False},
    "points_without_box_mlp": {"query_dim": 2, "modulate_hw_attn": False, "bbox_embed": None},
    "no_modulation": {"modulate_hw_attn": False},
    "cond_scalar": {"query_scale_type": "cond_scalar"},
    "fix_elewise": {"query_scale_type": "fix_elewise"},
    "keep_query_pos": {"keep_query_pos": True},
    "per_layer_boxes": {"bbox_embed": "per_layer"},
    "no_box_mlp": {"bbox_embed": None},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "selu": {"activation": "selu"},
    "silu": {"activation": "silu"},
    "one_layer": {"num_layers": 1},
}


def denoising_mask():
    """Two denoising groups of two queries that see neither each other nor are seen by the three matching ones."""
    group = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    return (group[None, :] != group[:, None]) & (group[None, :] != 2)


MASKS = {
    "none": {},
    "padded": {"memory_key_padding_mask": torch.arange(S).expand(B, S) >= torch.tensor([[S], [S - 4]])},
    "denoising": {"tgt_mask": denoising_mask()},
    "everything": {
        "tgt_mask": torch.rand(B * H, Q, Q, generator=torch.Generator().manual_seed(5)) > 0.7,
        "memory_mask": torch.rand(Q, S, generator=torch.Generator().manual_seed(6)) > 0.7,
        "tgt_key_padding_mask": torch.arange(Q).expand(B, Q) >= torch.tensor([[Q], [Q - 2]]),
        "memory_key_padding_mask": torch.arange(S).expand(B, S) >= torch.tensor([[S], [S - 4]]),
    },
}
MASKS["everything"]["tgt_mask"][:, :, 0] = False
MASKS["everything"]["memory_mask"][:, 0] = False


def box_mlps(kind, num_layers):
    def make():
        return second.ReluMLP(D, D, D, 4)

    return {None: None, "shared": make(), "per_layer": nn.ModuleList(make() for _ in range(num_layers))}[kind]


def oracle(
    *,
    activation="prelu",
    dropout=0.0,
    keep_query_pos=False,
    query_dim=4,
    num_layers=L,
    bbox_embed="shared",
    modulate_hw_attn=True,
    query_scale_type="cond_elewise",
):
    decoder = second.TransformerDecoder(
        second.TransformerDecoderLayer(D, H, 48, dropout, activation, keep_query_pos),
        num_layers,
        D,
        query_dim,
        keep_query_pos,
        query_scale_type,
        modulate_hw_attn,
        bbox_embed == "per_layer",
    )
    decoder.bbox_embed = box_mlps(bbox_embed, num_layers)
    perturb_(decoder)
    return decoder.eval()


def drop_in(
    *,
    activation="prelu",
    dropout=0.0,
    keep_query_pos=False,
    query_dim=4,
    num_layers=L,
    bbox_embed="shared",
    modulate_hw_attn=True,
    query_scale_type="cond_elewise",
):
    layer = idea_research.TransformerDecoderLayer(D, H, 48, dropout, activation, keep_query_pos=keep_query_pos)
    decoder = idea_research.TransformerDecoder(
        layer,
        num_layers,
        nn.LayerNorm(D),
        return_intermediate=True,
        d_model=D,
        query_dim=query_dim,
        keep_query_pos=keep_query_pos,
        query_scale_type=query_scale_type,
        modulate_hw_attn=modulate_hw_attn,
        bbox_embed_diff_each_layer=bbox_embed == "per_layer",
    )
    decoder.bbox_embed = box_mlps(bbox_embed, num_layers)
    return decoder.eval()


def loaded_drop_in(theirs, **variant):
    ours = drop_in(**variant)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def accelerated(theirs, **variant):
    ours = copy.deepcopy(theirs)
    dab_fast.accelerate(ours)
    return ours


def inputs(query_dim=4, requires_grad=False):
    generator = torch.Generator().manual_seed(2)
    shapes = {"tgt": (Q, B, D), "memory": (S, B, D), "pos": (S, B, D), "refpoints_unsigmoid": (Q, B, query_dim)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["refpoints_unsigmoid"][0, :, 0] = -9.0  # where the eps of the inverse sigmoid shows
    return {name: x.requires_grad_(requires_grad) for name, x in given.items()}


def assert_same_outputs(ours, theirs):
    assert isinstance(ours, list)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=HIDDEN_TOLERANCE)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=BOX_TOLERANCE)


def gradients(decoder, query_dim, masks):
    """Of a random combination of the outputs, in float64."""
    decoder = wide(decoder)
    given = {name: x.double().requires_grad_() for name, x in inputs(query_dim).items()}
    hidden_states, references = decoder(**given, **masks)
    generator = torch.Generator().manual_seed(3)
    loss = (hidden_states * torch.randn(hidden_states.shape, generator=generator)).sum()
    (loss + (references * torch.randn(references.shape, generator=generator)).sum()).backward()
    return {name: p.grad for name, p in (*decoder.named_parameters(), *given.items())}


class Gelu(second.ReluMLP):
    def forward(self, x):
        for layer in self.layers[:-1]:
            x = nn.functional.gelu(layer(x))
        return self.layers[-1](x)
