"""The backend `torch`: plain PyTorch on any device.

An op runs by its specification in `dab_fast.reference` unless a file here has something faster that is as right.
"""

from __future__ import annotations

import torch


def why_not(op: str, device: torch.device) -> str | None:
    """Nothing keeps plain PyTorch from running `op` on `device`."""
    return None
