"""What `auto` may choose: on a CPU compiled code that was measured faster, on a GPU kernels that a GPU run validated.

`python -m benchmarks.validate` writes `validated.json`, {op: {backend: {architecture: record}}}, from a green run.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

FASTER_ON_CPU = {"native": ("box_position_embed",)}  # ops by backend, against plain PyTorch: docs/extension.md


def architecture(device: torch.device) -> str:
    """The name under which validated.json records a GPU, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _validated() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads((Path(__file__).with_name("validated.json")).read_text())


def why_not_trusted(name: str, op: str, device: torch.device) -> str | None:
    """Why `auto` must not choose backend `name` for `op` on `device`, where it can run, or None."""
    if name == "torch":
        return None
    if device.type == "cpu" and name == "triton":
        return "the interpreter runs on request alone"
    if device.type == "cpu" and op not in FASTER_ON_CPU.get(name, ()):
        return "on a CPU it was not measured faster than plain PyTorch"
    if device.type == "cuda" and architecture(device) not in _validated().get(op, {}).get(name, {}):
        return f"no committed GPU run validated it on {architecture(device)}"
    return None


def why_not_faster(name: str, op: str, *args: Any) -> str | None:
    """Why `auto` must not choose backend `name` for these arguments, of which its `limits.<op>` tell; or None."""
    if (name, op) == ("triton", "modulated_cross_attention") and args[0][0] == torch.float32:
        return "in float32 plain PyTorch was measured twice as fast at batch 8"
    return None
