"""The backend `triton`: Triton kernels, a file per op. Importing this imports no triton."""

from __future__ import annotations

import importlib.util

import torch


def why_not(op: str, device: torch.device) -> str | None:
    """Why its kernels cannot run `op` on `device`, or None."""
    if importlib.util.find_spec(f"{__name__}.{op}") is None:
        return f"it has no {op}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        import triton

        if not triton.knobs.runtime.interpret:
            return "its kernels need a CUDA tensor, got cpu (TRITON_INTERPRET=1 runs them there, slowly)"
    elif device.type != "cuda":
        return f"its kernels need a CUDA tensor, got {device.type}"
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"its kernels need sm_80 or newer, got sm_{capability[0]}{capability[1]}"
    return None
