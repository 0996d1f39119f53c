"""The decoder on the fused ops: `module.py` its parameters, `forward.py` its rewritings, `dense.py` its dense parts."""

from dab_fast.decoder.forward import decode, predict_boxes
from dab_fast.decoder.module import MLP, DabDecoder

__all__ = ["MLP", "DabDecoder", "decode", "predict_boxes"]
