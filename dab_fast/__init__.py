"""The DAB-DETR decoder as fast as the hardware allows, without changing its answers.

    import dab_fast

    dab_fast.accelerate(model)  # undo with dab_fast.restore(model)

Importing this package imports torch, but neither triton nor transformers nor the compiled extension.
"""

from dab_fast._version import __version__
from dab_fast.accelerate import accelerate, refresh, restore
from dab_fast.checkpoint import load_checkpoint
from dab_fast.config import DecoderConfig
from dab_fast.decoder import DabDecoder
from dab_fast.info import build_info
from dab_fast.ops import box_position_embed, modulated_cross_attention, refine_boxes, sine_embed
from dab_fast.warmup import warmup

__all__ = [
    "DabDecoder",
    "DecoderConfig",
    "__version__",
    "accelerate",
    "box_position_embed",
    "build_info",
    "load_checkpoint",
    "modulated_cross_attention",
    "refine_boxes",
    "refresh",
    "restore",
    "sine_embed",
    "warmup",
]
