"""What distinguishes one DAB-DETR decoder from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["prelu", "relu", "gelu", "silu", "selu"]
QueryScaleType = Literal["cond_elewise", "cond_scalar", "fix_elewise"]
BoxEmbed = Literal["shared", "per_layer"]


@dataclass(frozen=True)
class DecoderConfig:
    """The variants of the DAB-DETR decoder (arXiv 2201.12329), named as IDEA-Research/DAB-DETR names them.

    Args:
        d_model: model width D, a multiple of 4 and of `nhead`.
        nhead: attention heads H.
        num_layers: decoder layers L.
        dim_feedforward: FFN width F.
        query_dim: 4 for anchor boxes (cx, cy, w, h), 2 for points (cx, cy).
        query_scale_type: the content-dependent scale of the query's sine embedding: `query_scale`(x) per
            feature, one number per query, or a learned row per layer.
        modulate_hw_attn: modulate the sine embedding by width and height; needs `query_dim` 4.
        keep_query_pos: every layer's cross-attention reads the query position, not only the first layer's.
        bbox_embed: the box MLP is shared by the layers, one per layer, or absent (no refinement).
        activation: of the FFN.
        dropout: rate after each attention and after the FFN.
        attention_dropout: rate on the attention probabilities.
        activation_dropout: rate inside the FFN.
        inverse_sigmoid_eps: 1e-3 in IDEA-Research and detrex, 1e-5 in Hugging Face.
        temperature: of the sine embedding of the anchors.

    Raises:
        ValueError: for a value outside the above.
    """

    d_model: int = 256
    nhead: int = 8
    num_layers: int = 6
    dim_feedforward: int = 2048
    query_dim: int = 4
    query_scale_type: QueryScaleType = "cond_elewise"
    modulate_hw_attn: bool = True
    keep_query_pos: bool = False
    bbox_embed: BoxEmbed | None = "shared"
    activation: Activation = "prelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    inverse_sigmoid_eps: float = 1e-3
    temperature: float = 10000.0

    @property
    def has_dropout(self) -> bool:
        """Whether any of the three rates is above zero."""
        return max(self.dropout, self.attention_dropout, self.activation_dropout) > 0.0

    def __post_init__(self) -> None:
        for name in ("d_model", "nhead", "num_layers", "dim_feedforward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % 4 or self.d_model % self.nhead:
            raise ValueError(f"d_model must be a multiple of 4 and of nhead={self.nhead}, got {self.d_model}")
        if self.query_dim not in (2, 4):
            raise ValueError(f"query_dim must be 2 or 4, got {self.query_dim}")
        if self.modulate_hw_attn and self.query_dim != 4:
            raise ValueError("modulate_hw_attn must be False with query_dim=2: points have no width and height")
        for name, allowed in (
            ("query_scale_type", get_args(QueryScaleType)),
            ("activation", get_args(Activation)),
            ("bbox_embed", (*get_args(BoxEmbed), None)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.inverse_sigmoid_eps < 0.5:
            raise ValueError(f"inverse_sigmoid_eps must be in (0, 0.5), got {self.inverse_sigmoid_eps}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
