"""load_checkpoint(): IDEA-Research `.pth` and Hugging Face safetensors into a `DabDecoder` or a Hugging Face model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dab_fast._checkpoint_files import format_of, read_safetensors, some, unpickle
from dab_fast.adapters import ADAPTERS
from dab_fast.adapters._names import DECODER, below
from dab_fast.config import Activation, DecoderConfig
from dab_fast.decoder import DabDecoder

_CODEBASES = tuple(importlib.import_module(f"dab_fast.adapters.{name}.checkpoint") for name in ADAPTERS)
_ANY_CODEBASE = " or ".join(codebase.CODEBASE for codebase in _CODEBASES)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None, **overrides: Any) -> nn.Module:
    """Read a DAB-DETR checkpoint of either codebase into a model of either, converting names.

    Args:
        path: a `.pth` of IDEA-Research/DAB-DETR or DN-DETR (read with `weights_only=True`), a `.safetensors` file of
            Hugging Face transformers, or a directory that `save_pretrained` wrote, sharded or not. What a file is, its
            content tells. A `.pth` may hold the state_dict itself or inside dicts, of which "model" comes first.
        model: a `DabDecoder`, a decoder of IDEA-Research, or a Hugging Face `DabDetrForObjectDetection`,
            `DabDetrModel` or `DabDetrDecoder`, loaded in place. None builds the `DabDecoder` that the checkpoint
            describes, in eval mode.
        overrides: fields of `DecoderConfig` that the checkpoint does not state, when `model` is None.

    Returns:
        `model`, or the `DabDecoder` built. A `DabDecoder` follows the checkpoint's inverse-sigmoid eps (1e-3 of
        IDEA-Research, 1e-5 of Hugging Face); where a model's eps is fixed to the other, a warning says so. Another one
        names tensors with NaN or infinite values, which load all the same.

    Raises:
        FileNotFoundError: no such file or directory, nothing to read in it, or a shard is missing.
        PermissionError: a file may not be read.
        ValueError: not a DAB-DETR checkpoint, or keys, shapes or dtypes do not fit the model, which is left as it was.
        TypeError: `path` or `model` is none of the above.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or an os.PathLike, got {type(path).__name__}")
    return load(read(Path(path)), model, **overrides)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file holds: its tensors under their own names, and what it states beside them."""

    path: Path
    codebase: ModuleType  # its `checkpoint` module
    tensors: dict[str, Tensor]  # by their canonical names
    stated: dict[str, Any]  # what it states beside its tensors, as `dab_fast.adapters` describes it


def read(path: Path) -> Checkpoint:
    """Read a checkpoint without a model for it. Raises what `load_checkpoint` raises for its path."""
    if not path.exists():
        raise FileNotFoundError(f"path must be a file or a directory, got {path}, which does not exist")
    config: dict[str, Any] | None = None
    args: dict[str, Any] = {}
    if path.is_dir() or format_of(path) == "safetensors":
        tensors, config = read_safetensors(path)
    else:
        tensors, args = _read_torch(path)
    recognised = _recognise(tensors)
    if recognised is None:
        raise ValueError(f"{path} must be a DAB-DETR checkpoint of {_ANY_CODEBASE}, got tensors {some(tensors)}")
    for name, x in tensors.items():
        if kind := _not_dense(x):
            raise ValueError(f"{path} must hold dense tensors alone, got {name}, which is {kind}")
    codebase, prefix = recognised
    stated = {name: value for name, value in codebase.stated(config, args).items() if value is not None}
    if stated.get("activation") not in get_args(Activation):
        stated.pop("activation", None)
    return Checkpoint(path, codebase, codebase.to_canonical(tensors, prefix), stated)


def load(checkpoint: Checkpoint, model: nn.Module | None = None, **overrides: Any) -> nn.Module:
    """Load what was read: see `load_checkpoint`."""
    if model is None:
        config = decoder_config(checkpoint, **overrides)
        with torch.device("meta"):
            built = DabDecoder(config)
        model = built.to_empty(device="cpu").eval()
    elif overrides:
        raise ValueError(f"{', '.join(overrides)} must not be given with model: they describe the DabDecoder to build")
    else:
        config = None
    tensors = _tensors_for(model, checkpoint)
    _check_fit(checkpoint, tensors, model)
    if isinstance(model, DabDecoder):
        if config is None:
            _check_config(checkpoint, model.config)
            config = dataclasses.replace(model.config, inverse_sigmoid_eps=checkpoint.codebase.INVERSE_SIGMOID_EPS)
        model.config = config
    else:
        _warn_of_eps(checkpoint, model)
    if broken := [name for name, x in tensors.items() if not x.double().isfinite().all()]:
        warnings.warn(f"{checkpoint.path} has NaN or infinite values in {some(broken)}", stacklevel=3)
    model.load_state_dict(tensors)
    return model


def _recognise(names: Iterable[str]) -> tuple[ModuleType, str] | None:
    """The codebase of a state_dict with these names, and its prefix of the decoder."""
    names = list(names)
    for codebase in _CODEBASES:
        prefix = codebase.recognise(names)
        if prefix is not None:
            return codebase, prefix
    return None


def _not_dense(x: object) -> str | None:
    """What `x` is instead of a dense tensor with values."""
    if not isinstance(x, Tensor):
        return f"of type {type(x).__name__}"
    if x.is_quantized:
        return "quantised"
    if x.is_meta:
        return "on the meta device"
    if x.is_nested:
        return "nested"
    return None if x.layout == torch.strided else str(x.layout).removeprefix("torch.")


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the state_dict inside a file, and the arguments of the training script beside it."""
    content = unpickle(path)
    found = dict(_state_dicts(content))
    if not found:
        raise ValueError(f"{path} must hold a DAB-DETR state_dict of {_ANY_CODEBASE}, got {_describe(content)}")
    if len(found) > 1 and "model" not in found:
        raise ValueError(f"{path} must hold one state_dict, or one under model, got {some(found)}: save one by itself")
    tensors = found["model"] if "model" in found else next(iter(found.values()))
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    return {str(name): x for name, x in tensors.items()}, args


def _state_dicts(content: object, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every state_dict of a DAB-DETR inside nested dicts, and the keys on the way there."""
    if not isinstance(content, dict):
        return
    if _recognise(map(str, content)) is not None:
        yield at, content
        return
    for name, x in content.items():
        yield from _state_dicts(x, f"{at}.{name}" if at else str(name))


def decoder_config(checkpoint: Checkpoint, **overrides: Any) -> DecoderConfig:
    """Which decoder the checkpoint holds: from its shapes, from what it states, from the overrides.

    Raises:
        ValueError: it holds no whole decoder, or no one that there is, or does not state the activation.
    """
    tensors = below(DECODER, checkpoint.tensors)
    try:
        d_model = tensors["norm.weight"].shape[0]
        shapes: dict[str, Any] = {
            "d_model": d_model,
            "num_layers": 1 + max(int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))),
            "dim_feedforward": tensors["layers.0.linear1.weight"].shape[0],
            "query_dim": 2 * tensors["ref_point_head.layers.0.weight"].shape[1] // d_model,
            "query_scale_type": _query_scale_type(tensors),
        }
    except KeyError as missing:
        raise ValueError(f"{checkpoint.path} must hold a whole decoder, but {missing} is missing") from None
    shapes |= {
        "modulate_hw_attn": "ref_anchor_head.layers.0.weight" in tensors,
        "keep_query_pos": "layers.1.ca_qpos_proj.weight" in tensors,
        "bbox_embed": _bbox_embed(tensors),
        "inverse_sigmoid_eps": checkpoint.codebase.INVERSE_SIGMOID_EPS,
    }
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    fields = shapes | {name: value for name, value in checkpoint.stated.items() if name in known}
    if "layers.0.activation.weight" in tensors:
        fields["activation"] = "prelu"
    fields |= overrides
    if "activation" not in fields:
        raise ValueError(f"activation must be given: {checkpoint.path} does not state which one its FFN has")
    if "nhead" not in fields:
        fields["nhead"] = 8
        warnings.warn(f"{checkpoint.path} does not state nhead: taking 8, the published default", stacklevel=4)
    try:
        return DecoderConfig(**fields)
    except (TypeError, ValueError) as error:
        if overrides:
            raise
        raise ValueError(f"{checkpoint.path} must describe a decoder that there is: {error}") from error


def _query_scale_type(tensors: dict[str, Tensor]) -> str:
    if "query_scale.weight" in tensors:
        return "fix_elewise"
    return "cond_scalar" if tensors["query_scale.layers.1.weight"].shape[0] == 1 else "cond_elewise"


def _bbox_embed(tensors: dict[str, Tensor]) -> str | None:
    if "bbox_embed.layers.0.weight" in tensors:
        return "shared"
    return "per_layer" if "bbox_embed.0.layers.0.weight" in tensors else None


def _tensors_for(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of `model`."""
    if isinstance(model, DabDecoder):
        return below(DECODER, checkpoint.tensors)
    codebase = _codebase_of(model)
    if codebase is None:
        models = ", or ".join(codebase.MODELS for codebase in _CODEBASES)
        raise TypeError(
            f"model must be a DabDecoder, {models}, got {type(model).__module__}.{type(model).__qualname__}"
        )
    return codebase.from_canonical(checkpoint.tensors, model)


def _codebase_of(model: nn.Module) -> ModuleType | None:
    return next((codebase for codebase in _CODEBASES if codebase.owns(model)), None)


def _check_fit(checkpoint: Checkpoint, tensors: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    complaints = []
    if missing := expected.keys() - tensors.keys():
        complaints.append(f"missing {some(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        complaints.append(f"unexpected {some(unexpected)}")
    wrong = [
        f"{name} must have shape {list(expected[name].shape)}, got {list(tensors[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if expected[name].shape != tensors[name].shape
    ]
    wrong += [
        f"{name} must be {'floating point' if expected[name].is_floating_point() else 'integers'}, got {x.dtype}"
        for name, x in sorted(tensors.items())
        if name in expected and expected[name].is_floating_point() != x.is_floating_point()
    ]
    if wrong:
        complaints.append(some(wrong))
    if complaints:
        raise ValueError(
            f"{checkpoint.path} ({checkpoint.codebase.CODEBASE}) does not fit the {type(model).__name__}: "
            + "; ".join(complaints)
        )
    if any(x.is_meta for x in expected.values()):
        raise ValueError("model must not have parameters on the meta device")


def _check_config(checkpoint: Checkpoint, config: DecoderConfig) -> None:
    for name in ("nhead", "activation"):
        stated = checkpoint.stated.get(name, getattr(config, name))
        if stated != getattr(config, name):
            raise ValueError(f"model must have {name}={stated!r} as {checkpoint.path} states, got {config!r}")


def _warn_of_eps(checkpoint: Checkpoint, model: nn.Module) -> None:
    codebase = _codebase_of(model)
    assert codebase is not None  # `_tensors_for` has refused any other model
    ours, theirs = codebase.INVERSE_SIGMOID_EPS, checkpoint.codebase.INVERSE_SIGMOID_EPS
    if ours != theirs:
        warnings.warn(
            f"{checkpoint.path} was trained with an inverse-sigmoid eps of {theirs}, and {type(model).__name__} has "
            f"{ours}: boxes differ where a coordinate is below {max(ours, theirs)} or above {1 - max(ours, theirs)}",
            stacklevel=4,
        )


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return f"a dict with keys {some(map(str, content))}" if content else "an empty dict"
