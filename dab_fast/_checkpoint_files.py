"""The files of a checkpoint: what each is, by how it begins, and its tensors; a clear error for any other file.

Reading runs no code of a file, and follows no name out of its directory.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor


def format_of(file: Path) -> str:
    """What a file begins as, whatever its name: "torch" or "safetensors"."""
    head = _head(file)
    if head.startswith(b"PK") or head.startswith(b"\x80"):
        return "torch"
    if head[8:9] == b"{":  # behind the length of this header
        return "safetensors"
    raise ValueError(f"{file} must be a file of torch.save or of safetensors, got {_beginning(head)}")


def unpickle(path: Path) -> Any:
    if _head(path).startswith(b"PK"):
        _check_archive(path)
    try:
        # The training script's arguments are a Namespace, which is a plain bag of values. The file is opened here since
        # torch.load takes a path that ends in .safetensors for such a file.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = f"holds {refused[1]}: dab_fast reads only tensors and plain values from it, and runs no code"
        elif isinstance(error, pickle.UnpicklingError):
            why = "is damaged, or holds more than tensors and plain values, which is all that dab_fast reads"
        else:
            why = f"is cut short or damaged: {_first_line(error) or type(error).__name__}"
        # Without torch's own words, which advise to run the code in the file.
        raise ValueError(f"{path} {why}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, or of a directory of them, and the config.json beside them if there is one."""
    directory, files = (path, _shards(path)) if path.is_dir() else (path.parent, [path])
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors_file(file)
    config = directory / "config.json"
    return tensors, _read_json(config) if config.exists() else None


def _read_safetensors_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _head(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} must be a readable safetensors file: {_first_line(error)}") from error


def _shards(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.exists():
        if not single.exists():
            holds = some(file.name for file in directory.iterdir()) or "nothing"
            raise FileNotFoundError(
                f"path must be a directory with {single.name} or {index.name}, got {directory}, which holds {holds}"
            )
        return [single]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index} must have a weight_map from names of tensors to names of files")
    found = []
    for name in sorted(set(weight_map.values())):
        # By name, since links lead out of the directory wherever a hub's cache keeps it.
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{index} must name files in its own directory, got {name}")
        if not (directory / name).exists():
            raise FileNotFoundError(f"{index} names {name}, which does not exist")
        found.append(directory / name)
    return found


def _read_json(file: Path) -> dict[str, Any]:
    _head(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(content).__name__}")
    return content


def some(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _head(file: Path) -> bytes:
    """How a file begins, unless that tells that it is not what it is named."""
    if not file.is_file():
        raise ValueError(f"{file} must be a file")
    with file.open("rb") as opened:
        head = opened.read(256)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # behind a byte order mark
    if not head:
        raise ValueError(f"{file} is empty")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{file} is a saved web page (HTML or XML), not the file itself: download it again")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{file} is compressed by gzip: unpack it first")
    return head


def _beginning(head: bytes) -> str:
    start = head[:32].decode(errors="replace")
    return f"text that begins {start!r}" if "\ufffd" not in start and "\0" not in start else f"bytes {head[:8]!r}"


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is cut short or damaged: it begins as a zip archive, and ends as none") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path} is a TorchScript archive: save the state_dict of the module instead")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is a zip archive, but none of torch.save: it holds {some(names, 3)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
