"""What the user gave on the command line: the device, the dtype, the files to write."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line."""


def choose_device(name: str) -> torch.device:
    """A device of that name that is here; "auto" is a GPU if there is one. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"--device {name} is not here: torch finds {count} GPUs")
    return device


def choose_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"--dtype must be {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def check_output(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise InputError(f"--output must end with .png, .jpg, .pdf or .svg, got {path}")
    check_folder("--output", path)


def check_folder(name: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise InputError(f"{name} must lie in a directory that exists, got {path}")
