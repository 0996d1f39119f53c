"""The encoder of an IDEA-Research model, written a second time."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.idea_second_writing import ReluMLP

_FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "selu": F.selu, "silu": F.silu}


class TransformerEncoderLayer(nn.Module):
    def __init__(self, d, heads, width, dropout=0.0, activation="prelu"):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(d, width), nn.Linear(width, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))
        self.activation = nn.PReLU() if activation == "prelu" else _FUNCTIONS[activation]

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        both = src + pos
        update, _ = self.self_attn(both, both, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
        src = self.norm1(src + self.dropout1(update))
        hidden = self.dropout(self.activation(self.linear1(src)))
        return self.norm2(src + self.dropout2(self.linear2(hidden)))


class TransformerEncoder(nn.Module):
    def __init__(self, layer, num_layers, norm=None, d_model=256):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.query_scale = ReluMLP(d_model, d_model, d_model)
        self.norm = norm

    def forward(self, src, mask=None, src_key_padding_mask=None, pos=None):
        for layer in self.layers:
            scaled = pos * self.query_scale(src)
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, pos=scaled)
        return src if self.norm is None else self.norm(src)


def encoder(d=32, heads=4, num_layers=3, *, norm=False, **layer):
    """With parameters that hide nothing."""
    torch.manual_seed(0)
    made = TransformerEncoder(
        TransformerEncoderLayer(d, heads, 48, **layer), num_layers, nn.LayerNorm(d) if norm else None, d
    )
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    return made
