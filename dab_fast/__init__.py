"""Faster DAB-DETR: `dab_fast.accelerate(model)`."""

__version__ = "0.1.0"
