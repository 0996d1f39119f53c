"""The backend `native`: the compiled extension `dab_fast._C`, a file per op. Importing this does not load it."""

from __future__ import annotations

import importlib
import importlib.util

import torch


def why_not(op: str, device: torch.device) -> str | None:
    """Why the extension cannot run `op` on `device`, or None."""
    if importlib.util.find_spec(f"{__name__}.{op}") is None:
        return f"it has no {op}"
    try:
        call = importlib.import_module(f"{__name__}._call")
    except ImportError as error:
        return str(error)
    return call.why_not(device)
