"""load_checkpoint(): IDEA-Research `.pth` and Hugging Face safetensors into a `DabDecoder` or a Hugging Face model."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dab_fast._checkpoint_files import format_of, read_json, read_safetensors, shards, some, unpickle
from dab_fast.adapters import huggingface, idea_research
from dab_fast.config import Activation, DecoderConfig
from dab_fast.decoder import DabDecoder

_IDEA_DECODER = "transformer.decoder."
_HF_DECODER = "model.decoder."
# A tensor's name that tells the codebase, behind any prefix, and the prefix that it has in the whole model.
_MARKS = (
    ("IDEA-Research", _IDEA_DECODER, "layers.0.sa_qcontent_proj.weight"),
    ("Hugging Face", _HF_DECODER, "layers.0.self_attn.self_attn_query_content_proj.weight"),
)
_EPS = {"IDEA-Research": idea_research.INVERSE_SIGMOID_EPS, "Hugging Face": huggingface.INVERSE_SIGMOID_EPS}

_ENCODER_LAYER_NAMES = {
    "linear1": "fc1",
    "linear2": "fc2",
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
    "activation": "activation_fn",
}
_HF_BACKBONE = "model.backbone.conv_encoder.model."
# IDEA-Research to Hugging Face, outside the layers.
_TO_HUGGINGFACE = (
    (r"input_proj\.", "model.input_projection."),
    (r"refpoint_embed\.", "model.query_refpoint_embeddings."),
    (r"bbox_embed\.", "bbox_predictor."),
    (r"transformer\.", "model."),
)
# torchvision's ResNet, which is timm's, to that of transformers.
_TO_TRANSFORMERS_RESNET = (
    (r"conv1\.", "embedder.embedder.convolution."),
    (r"bn1\.", "embedder.embedder.normalization."),
    (r"layer(\d)\.(\d+)\.conv(\d)\.", lambda m: _resnet_block(m, "convolution")),
    (r"layer(\d)\.(\d+)\.bn(\d)\.", lambda m: _resnet_block(m, "normalization")),
    (r"layer(\d)\.(\d+)\.downsample\.0\.", lambda m: _resnet_shortcut(m, "convolution")),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", lambda m: _resnet_shortcut(m, "normalization")),
)


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
    checkpoint = _read(Path(path))
    if model is None:
        config = _decoder_config(checkpoint, overrides)
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
            config = dataclasses.replace(model.config, inverse_sigmoid_eps=_EPS[checkpoint.codebase])
        model.config = config
    else:
        _warn_of_eps(checkpoint, model)
    if broken := [name for name, x in tensors.items() if not x.double().isfinite().all()]:
        warnings.warn(f"{checkpoint.path} has NaN or infinite values in {some(broken)}", stacklevel=2)
    model.load_state_dict(tensors)
    return model


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    path: Path
    codebase: str
    tensors: dict[str, Tensor]  # named from the whole model down, as the codebase names them
    stated: dict[str, Any]  # the fields of DecoderConfig that it states beside its tensors


def _read(path: Path) -> _Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"path must be a file or a directory, got {path}, which does not exist")
    if path.is_dir() or format_of(path) == "safetensors":
        tensors, stated = _read_safetensors(path)
    else:
        tensors, stated = _read_torch(path)
    codebase = _codebase(tensors)
    if codebase is None:
        raise ValueError(f"{path} must be a DAB-DETR checkpoint of {_CODEBASES}, got tensors {some(tensors)}")
    for name, x in tensors.items():
        if kind := _not_dense(x):
            raise ValueError(f"{path} must hold dense tensors alone, got {name}, which is {kind}")
    name, decoder, prefix = codebase
    return _Checkpoint(path, name, _from_the_top(tensors, prefix, decoder), stated)


_CODEBASES = " or ".join(codebase for codebase, _, _ in _MARKS)


def _codebase(names: Iterable[str]) -> tuple[str, str, str] | None:
    """The codebase of a state_dict with these names, its prefix of the decoder, and the one that is there instead."""
    for name in names:
        for codebase, decoder, mark in _MARKS:
            if f".{name}".endswith(f".{mark}"):
                return codebase, decoder, name[: -len(mark)]
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
    content = unpickle(path)
    found = dict(_state_dicts(content))
    if not found:
        raise ValueError(f"{path} must hold a DAB-DETR state_dict of {_CODEBASES}, got {_describe(content)}")
    if len(found) > 1 and "model" not in found:
        raise ValueError(f"{path} must hold one state_dict, or one under model, got {some(found)}: save one by itself")
    tensors = found["model"] if "model" in found else next(iter(found.values()))
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    stated = {"nhead": args.get("nheads"), "activation": args.get("transformer_activation")}
    stated |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), args.get("dropout"))
    return dict(tensors), _known(stated)


def _state_dicts(content: object, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every state_dict of a DAB-DETR inside nested dicts, and the keys on the way there."""
    if not isinstance(content, dict):
        return
    if _codebase(map(str, content)) is not None:
        yield at, content
        return
    for name, x in content.items():
        yield from _state_dicts(x, f"{at}.{name}" if at else str(name))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    directory, files = (path, shards(path)) if path.is_dir() else (path.parent, [path])
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    stated: dict[str, Any] = {}
    if (directory / "config.json").exists():
        config = read_json(directory / "config.json")
        # What save_pretrained leaves out is the default of transformers' DabDetrConfig.
        stated = {"nhead": config.get("decoder_attention_heads", 8)}
        stated |= {"activation": config.get("activation_function", "prelu"), "dropout": config.get("dropout", 0.1)}
        stated |= {name: config.get(name, 0.0) for name in ("attention_dropout", "activation_dropout")}
    return _fill_tied({_current_name(name): x for name, x in tensors.items()}), _known(stated)


def _current_name(name: str) -> str:
    """transformers' first conversions numbered a decoder layer's three blocks."""
    blocks = ("self_attn", "cross_attn", "mlp")
    return re.sub(r"(decoder\.layers\.\d+)\.layer\.([012])\.", lambda m: f"{m[1]}.{blocks[int(m[2])]}.", name)


def _fill_tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The box head and the decoder's box MLP are one module in transformers, and saved once."""
    head, decoder = "bbox_predictor.", f"{_HF_DECODER}bbox_embed."
    twins = {name.replace(a, b, 1): x for a, b in ((head, decoder), (decoder, head)) for name, x in tensors.items()}
    return twins | tensors if any(name.startswith(head) for name in tensors) else tensors


def _known(stated: dict[str, Any]) -> dict[str, Any]:
    if stated.get("activation") not in get_args(Activation):
        stated.pop("activation", None)
    return {name: value for name, value in stated.items() if value is not None}


def _from_the_top(tensors: dict[str, Tensor], prefix: str, decoder: str) -> dict[str, Tensor]:
    """Names as in the whole model, whatever part of it, or wrapper around it, was saved."""
    if prefix.endswith(decoder):
        wrapper = prefix[: -len(decoder)]
        return {name.removeprefix(wrapper): x for name, x in tensors.items()}
    if decoder.endswith(prefix):
        return {decoder[: len(decoder) - len(prefix)] + name: x for name, x in tensors.items()}
    return {decoder + name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _decoder_tensors(checkpoint: _Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors by their IDEA-Research names."""
    prefix = _IDEA_DECODER if checkpoint.codebase == "IDEA-Research" else _HF_DECODER
    tensors = {name.removeprefix(prefix): x for name, x in checkpoint.tensors.items() if name.startswith(prefix)}
    if checkpoint.codebase == "IDEA-Research":
        return tensors
    split = {name: name.rpartition(".") for name in tensors}
    return {f"{huggingface.canonical_name(split[name][0])}.{split[name][2]}": x for name, x in tensors.items()}


def _decoder_config(checkpoint: _Checkpoint, overrides: dict[str, Any]) -> DecoderConfig:
    """Which decoder the checkpoint holds: from its shapes, from what it states, from the overrides."""
    tensors = _decoder_tensors(checkpoint)
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
        "inverse_sigmoid_eps": _EPS[checkpoint.codebase],
    }
    fields = shapes | checkpoint.stated
    if "layers.0.activation.weight" in tensors:
        fields["activation"] = "prelu"
    fields |= overrides
    if "activation" not in fields:
        raise ValueError(f"activation must be given: {checkpoint.path} does not state which one its FFN has")
    if "nhead" not in fields:
        fields["nhead"] = 8
        warnings.warn(f"{checkpoint.path} does not state nhead: taking 8, the default of both codebases", stacklevel=3)
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


def _tensors_for(model: nn.Module, checkpoint: _Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of `model`."""
    if isinstance(model, DabDecoder) or idea_research.looks_like_decoder(model):
        return _decoder_tensors(checkpoint)
    if not huggingface.is_theirs(model):
        raise TypeError(
            "model must be a DabDecoder, an IDEA-Research decoder, or a Hugging Face DabDetrForObjectDetection, "
            f"DabDetrModel or DabDetrDecoder, got {type(model).__module__}.{type(model).__qualname__}"
        )
    tensors = checkpoint.tensors
    if checkpoint.codebase == "IDEA-Research":
        tensors = _to_huggingface(tensors, torchvision_names=hasattr(_backbone(model), "_backbone"))
    if hasattr(model, "bbox_predictor"):
        return tensors
    part = "model." if hasattr(model, "query_refpoint_embeddings") else _HF_DECODER
    tensors = {name.removeprefix(part): x for name, x in tensors.items() if name.startswith(part)}
    if getattr(model, "decoder", model).bbox_embed is None:
        tensors = {name: x for name, x in tensors.items() if "bbox_embed." not in name}
    return tensors


def _backbone(model: Any) -> Any:
    model = getattr(model, "model", model)
    return model.backbone.conv_encoder.model if hasattr(model, "backbone") else None


def _to_huggingface(tensors: dict[str, Tensor], *, torchvision_names: bool) -> dict[str, Tensor]:
    """A whole IDEA-Research model under the names of Hugging Face's."""
    result = {}
    for name, x in _patterns_for_dn(tensors).items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith("backbone.0.body."):
            result[_HF_BACKBONE + _backbone_name(name.removeprefix("backbone.0.body."), torchvision_names)] = x
        elif packed := re.fullmatch(r"transformer\.encoder\.layers\.(\d+)\.self_attn\.in_proj_(\w+)", name):
            for part, rows in zip("qkv", x.chunk(3), strict=True):
                result[f"model.encoder.layers.{packed[1]}.self_attn.{part}_proj.{packed[2]}"] = rows
        elif layer := re.fullmatch(r"transformer\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name):
            prefix = f"model.encoder.layers.{layer[1]}"
            result[f"{prefix}.{_ENCODER_LAYER_NAMES.get(layer[2], layer[2])}.{layer[3]}"] = x
        elif layer := re.fullmatch(r"transformer\.decoder\.layers\.(\d+)\.(.+)\.(\w+)", name):
            theirs = huggingface.LAYER_NAMES.get(layer[2], layer[2])
            result[f"{_HF_DECODER}layers.{layer[1]}.{theirs}.{layer[3]}"] = x
        elif name.startswith(f"{_IDEA_DECODER}norm."):
            result[f"{_HF_DECODER}layernorm.{name.rpartition('.')[2]}"] = x
        else:
            result[_rename(name, _TO_HUGGINGFACE)] = x
    return result


def _patterns_for_dn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DN-DETR's content at inference, the label embedding of "no class" and a zero flag, is a pattern elsewhere."""
    if "label_enc.weight" not in tensors:
        return tensors
    tensors = dict(tensors)
    content = nn.functional.pad(tensors.pop("label_enc.weight")[-1:], (0, 1))
    patterns = tensors.get("transformer.patterns.weight")
    return tensors | {"transformer.patterns.weight": content if patterns is None else patterns + content}


def _backbone_name(name: str, torchvision_names: bool) -> str:
    return f"_backbone.{name}" if torchvision_names else _rename(name, _TO_TRANSFORMERS_RESNET)


def _rename(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


def _resnet_block(match: re.Match[str], kind: str) -> str:
    return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.layer.{int(match[3]) - 1}.{kind}."


def _resnet_shortcut(match: re.Match[str], kind: str) -> str:
    return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.shortcut.{kind}."


def _check_fit(checkpoint: _Checkpoint, tensors: dict[str, Tensor], model: nn.Module) -> None:
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
            f"{checkpoint.path} ({checkpoint.codebase}) does not fit the {type(model).__name__}: "
            + "; ".join(complaints)
        )
    if any(x.is_meta for x in expected.values()):
        raise ValueError("model must not have parameters on the meta device")


def _check_config(checkpoint: _Checkpoint, config: DecoderConfig) -> None:
    for name in ("nhead", "activation"):
        stated = checkpoint.stated.get(name, getattr(config, name))
        if stated != getattr(config, name):
            raise ValueError(f"model must have {name}={stated!r} as {checkpoint.path} states, got {config!r}")


def _warn_of_eps(checkpoint: _Checkpoint, model: nn.Module) -> None:
    ours = _EPS["Hugging Face" if huggingface.is_theirs(model) else "IDEA-Research"]
    theirs = _EPS[checkpoint.codebase]
    if ours != theirs:
        warnings.warn(
            f"{checkpoint.path} was trained with an inverse-sigmoid eps of {theirs}, and {type(model).__name__} has "
            f"{ours}: boxes differ where a coordinate is below {max(ours, theirs)} or above {1 - max(ours, theirs)}",
            stacklevel=3,
        )


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return f"a dict with keys {some(map(str, content))}" if content else "an empty dict"
