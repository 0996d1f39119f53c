"""The fused operations: one file per op, each with its checks and backends."""

from dab_fast.ops._backends import BackendUnavailable, backend, chosen_backend
from dab_fast.ops.box_position_embed import box_position_embed, sine_embed
from dab_fast.ops.modulated_cross_attention import modulated_cross_attention
from dab_fast.ops.refine_boxes import refine_boxes

__all__ = [
    "BackendUnavailable",
    "backend",
    "box_position_embed",
    "chosen_backend",
    "modulated_cross_attention",
    "refine_boxes",
    "sine_embed",
]
