"""IDEA-Research/DAB-DETR and DN-DETR: query-first tensors, bool masks with True = hidden, inverse sigmoid eps 1e-3.

Neither repository is a package, so a decoder is recognised by its structure, and then by what it computes: a copy
with random parameters must give on random queries what the fast forward gives. Parameter names are ours.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from dab_fast import reference
from dab_fast.adapters._fast import DropoutRates, Fast
from dab_fast.config import Activation, DecoderConfig
from dab_fast.decode import decode
from dab_fast.decoder import DabDecoder
from dab_fast.parameters import StepAside, gather

INVERSE_SIGMOID_EPS = 1e-3

_LAYER_MARKS = {"sa_qcontent_proj", "sa_kpos_proj", "ca_qpos_sine_proj", "self_attn", "cross_attn", "linear1"}
_DECODER_MARKS = {"layers", "norm", "query_scale", "ref_point_head"}
# Rounding stays below 1e-4; a temperature, a feature order, an eps or an activation that is not ours exceeds 1e-2.
_PROBE_TOLERANCE = 1e-3


def fast_class(module: nn.Module) -> type[Fast] | None:
    if not looks_like_decoder(module) or why_not(module) is not None:
        return None
    return _fast_class(type(module))  # type: ignore[arg-type]


def why_not(module: nn.Module) -> str | None:
    from dab_fast.idea_research import TransformerDecoder  # which imports this file

    if not looks_like_decoder(module):
        return None
    if isinstance(module, (DabDecoder, TransformerDecoder)):
        return f"{type(module).__qualname__} is fast already"
    try:
        if "forward" in vars(module):
            raise StepAside("its forward is patched")
        params, config = read(module)
        unknown = set(params) - set(parameter_shapes(config)) - _unused(params, config)
        if unknown:
            raise StepAside(f"the original has no {', '.join(sorted(unknown))}")
        for name, shape in parameter_shapes(config).items():
            if name not in params or tuple(params[name].shape) != shape:
                got = list(params[name].shape) if name in params else "nothing"
                raise StepAside(f"{name} must have shape {list(shape)}, got {got}")
        _probe(module)
    except StepAside as reason:
        return f"{type(module).__module__}.{type(module).__qualname__}: {reason}"
    return None


def looks_like_decoder(module: nn.Module) -> bool:
    layers = module._modules.get("layers")
    return (
        set(module._modules) >= _DECODER_MARKS
        and isinstance(layers, nn.ModuleList)
        and len(layers) > 0
        and set(layers[0]._modules) >= _LAYER_MARKS
    )


def read(decoder: nn.Module) -> tuple[dict[str, Tensor], DecoderConfig]:
    """The parameters of a decoder of this codebase, and which decoder it is.

    Raises:
        StepAside: it cannot be read; the message says why.
    """
    theirs: Any = decoder
    layers = theirs.layers
    first = layers[0]
    attentions = {type(first.self_attn), type(first.cross_attn)}

    def is_container(module: nn.Module) -> bool:
        if module._parameters and any(p is not None for p in module._parameters.values()):
            return False
        return type(module) is type(first) or type(module) in attentions or is_relu_mlp(module)

    params = gather(decoder, is_container, lambda name: name)
    try:
        rates = _dropout_rates(layers) if decoder.training else DropoutRates()
        config = DecoderConfig(
            d_model=theirs.norm.normalized_shape[0],
            nhead=_same("numbers of heads", {n for layer in layers for n in _numbers_of_heads(layer)}),
            num_layers=len(layers),
            dim_feedforward=first.linear1.out_features,
            query_dim=theirs.query_dim,
            query_scale_type=theirs.query_scale_type,
            modulate_hw_attn=bool(theirs.modulate_hw_attn),
            keep_query_pos=_same("keep_query_pos", {bool(layer.keep_query_pos) for layer in layers}),
            bbox_embed=_bbox_embed(decoder),
            activation=_same("activations", {_activation(layer.activation) for layer in layers}),
            inverse_sigmoid_eps=INVERSE_SIGMOID_EPS,
            **rates._asdict(),
        )
    except (AttributeError, ValueError) as error:
        raise StepAside(str(error)) from None
    return params, config


def run(
    decoder: nn.Module,
    tgt: Tensor,  # [Q, B, D]
    memory: Tensor,  # [S, B, D]
    tgt_mask: Tensor | None,  # bool [Q, Q] or [B * H, Q, Q], True = hidden
    memory_mask: Tensor | None,  # bool [Q, S] or [B * H, Q, S], True = hidden
    tgt_key_padding_mask: Tensor | None,  # bool [B, Q], True = padded
    memory_key_padding_mask: Tensor | None,  # bool [B, S], True = padded
    pos: Tensor,  # [S, B, D]
    refpoints_unsigmoid: Tensor,  # [Q, B, query_dim]
) -> list[Tensor]:  # [L, B, Q, D], [L or 1, B, Q, query_dim]
    """The fast forward of a decoder of this codebase."""
    params, config = read(decoder)
    output, _ = decode(
        params,
        config,
        *(x.transpose(0, 1) for x in (tgt, memory, pos, refpoints_unsigmoid)),
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        training=decoder.training,
        recompute=getattr(decoder, "dab_fast_recompute", False),
    )
    return list(output)


class FastTransformerDecoder(Fast):
    """Mixed into a subclass of the user's own `TransformerDecoder`."""

    dab_fast_settings: dict[str, Any]  # under which the two forwards were compared

    def dab_fast_begin(self) -> None:
        super().dab_fast_begin()
        self.dab_fast_settings = _settings(self)

    def forward(
        self,
        tgt: Tensor,  # [Q, B, D]
        memory: Tensor,  # [S, B, D]
        tgt_mask: Tensor | None = None,  # [Q, Q] or [B * H, Q, Q]
        memory_mask: Tensor | None = None,  # [Q, S] or [B * H, Q, S]
        tgt_key_padding_mask: Tensor | None = None,  # [B, Q]
        memory_key_padding_mask: Tensor | None = None,  # [B, S]
        pos: Tensor | None = None,  # [S, B, D]
        refpoints_unsigmoid: Tensor | None = None,  # [Q, B, query_dim]
        **more: Any,
    ) -> Any:
        """The original's arguments and results."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        try:
            if more:
                raise StepAside(f"the original takes no {', '.join(more)}")
            if changed := self.dab_fast_settings.items() ^ _settings(self).items():
                raise StepAside(f"{', '.join(sorted({name for name, _ in changed}))} was changed after accelerate")
            if pos is None or refpoints_unsigmoid is None:
                raise StepAside("pos or refpoints_unsigmoid is None")
            _check_masks(self, tgt, memory, *masks)
            return run(self, tgt, memory, *masks, pos, refpoints_unsigmoid)
        except StepAside as reason:
            self.dab_fast_step_aside(reason)
            return super().forward(tgt, memory, *masks, pos, refpoints_unsigmoid, **more)


def _check_masks(
    decoder: Any,
    tgt: Tensor,  # [Q, B, D]
    memory: Tensor,  # [S, B, D]
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
) -> None:
    """Raise StepAside where a mask is not what `run` takes: the original may broadcast it, or raises."""
    (q, b), s = tgt.shape[:2], memory.shape[0]
    for name, mask, keys, per_query in (
        ("tgt_mask", tgt_mask, q, True),
        ("memory_mask", memory_mask, s, True),
        ("tgt_key_padding_mask", tgt_key_padding_mask, q, False),
        ("memory_key_padding_mask", memory_key_padding_mask, s, False),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise StepAside(f"{name} is {mask.dtype}, not bool")
        shape: tuple[int, ...] = (q if per_query else b, keys)
        if per_query and mask.dim() == 3:
            shape = (b * decoder.layers[0].nhead, *shape)
        if mask.shape != shape:
            raise StepAside(f"{name} has shape {list(mask.shape)}, not {list(shape)}")


def _settings(decoder: nn.Module) -> dict[str, Any]:
    """The numbers, strings and flags that a decoder's forward may depend on."""
    return {
        name: x
        for name, x in vars(decoder).items()
        if type(x) in _SCALARS and name != "training" and not name.startswith(("_", "dab_fast"))
    }


_SCALARS = (bool, int, float, str)


@functools.cache
def _fast_class(original: type[nn.Module]) -> type[Fast]:
    # `__qualname__` is what pickle looks up in this module, undotted since pickle walks dots; see `__getattr__`.
    path = f"{original.__module__}:{original.__qualname__}".replace(".", "/")
    body = {
        "dab_fast_original": original,
        "__module__": __name__,
        "__qualname__": path,
        "__doc__": f"{original.__module__}.{original.__qualname__} with the forward of dab_fast.",
    }
    return type(original.__name__, (FastTransformerDecoder, original), body)


def __getattr__(name: str) -> type[Fast]:
    """Unpickling finds a fast class here, by the path of its original."""
    module, colon, path = name.replace("/", ".").partition(":")
    if not colon:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    return _fast_class(original)  # type: ignore[arg-type]


@functools.cache
def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a decoder of this codebase."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DabDecoder(config).named_parameters()}


def is_relu_mlp(module: nn.Module) -> bool:
    """Whether `module` is, whatever its class, linear layers in `layers` with a relu between."""
    layers = module._modules.get("layers")
    if set(module._modules) != {"layers"} or type(layers) is not nn.ModuleList:
        return False
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    if torch.compiler.is_compiling():
        return True
    settings = frozenset((name, _hashable(x)) for name, x in vars(module).items() if not name.startswith("_"))
    key = (type(module), settings, len(layers))  # `training` is one of the settings
    if key not in _IS_RELU_MLP:
        _IS_RELU_MLP[key] = _computes_relu_mlp(module)
    return _IS_RELU_MLP[key]


# By class and settings, not by instance: DataParallel makes new instances for every call.
_IS_RELU_MLP: dict[Any, bool] = {}


def _hashable(x: Any) -> Any:
    return x if isinstance(x, Hashable) else id(x)


@torch.no_grad()
def _computes_relu_mlp(module: nn.Module) -> bool:
    """Ask a twin with layers of its own, since the weights may be anywhere, or zero."""
    twin = copy.copy(module)
    twin.__dict__ = vars(module) | {"_modules": {}}
    with torch.device("meta"):
        twin.layers = nn.ModuleList(nn.Linear(x.in_features, x.out_features) for x in module.layers)  # type: ignore[union-attr, arg-type]
    twin.to_empty(device="cpu")
    randn = _randn()
    for parameter in twin.parameters():
        parameter.copy_(randn(parameter.shape))
    given = randn(16, twin.layers[0].in_features)
    expected = given
    for i, layer in enumerate(twin.layers):
        expected = layer(expected.relu() if i else expected)
    try:
        with torch.random.fork_rng(devices=[]):
            return torch.allclose(type(module).forward(twin, given), expected)  # hooks are not called
    except Exception:
        return False


@torch.no_grad()
def _probe(decoder: nn.Module) -> None:
    """Raise StepAside unless the original forward and the fast one agree on a copy with random parameters.

    In training without dropout too, and twice: what is random there, or counts its calls, is not the original's.
    """
    try:
        decoder, randn = _randomized_copy(decoder)
    except Exception as error:
        raise StepAside(f"it cannot be copied: {error}") from error
    given = _random_queries(read(decoder.eval())[1], randn)
    with torch.random.fork_rng(devices=[]):
        for training in (False, True, True):
            _compare(decoder.train(training), given, " in training" if training else "")


def _random_queries(config: DecoderConfig, randn: Callable[..., Tensor]) -> dict[str, Any]:
    b, q, s, d = 2, 5, 6, config.d_model
    anchors = randn(q, b, config.query_dim)
    anchors[0, :, :2] = -9.0  # a center of 1e-4 shows the eps of the inverse sigmoid
    groups = torch.arange(q) >= 3
    return {
        "tgt": randn(q, b, d),
        "memory": randn(s, b, d),
        "tgt_mask": groups[:, None] ^ groups,
        "memory_mask": None,
        "tgt_key_padding_mask": None,
        "memory_key_padding_mask": torch.arange(s).expand(b, s) >= torch.tensor([[s], [s - 2]]),
        "pos": randn(s, b, d),
        "refpoints_unsigmoid": anchors,
    }


def _compare(decoder: nn.Module, given: dict[str, Any], when: str) -> None:
    expected_states, expected_references = run(decoder, **given)
    random_state = torch.get_rng_state()
    try:
        hidden_states, references = type(decoder).forward(decoder, **given)  # hooks are not called
    except Exception as error:
        raise StepAside(f"its forward raises {type(error).__name__} on a copy{when}: {error}") from error
    if not torch.equal(torch.get_rng_state(), random_state):
        raise StepAside(f"it draws random numbers{when} with every dropout rate at 0")
    for name, got, expected in (
        ("hidden states", hidden_states, expected_states),
        ("reference points", references.logit(1e-7), expected_references.logit(1e-7)),
    ):
        if got.shape != expected.shape:
            raise StepAside(f"its {name} have shape {list(got.shape)}{when}, not {list(expected.shape)}")
        difference = (got - expected).abs().max().item()
        if not difference <= _PROBE_TOLERANCE:
            raise StepAside(f"its {name} are not what the original computes{when}: they differ by {difference:.1e}")


def _randomized_copy(module: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A float32 copy on the CPU without dropout whose parameters hide nothing, and its source of random numbers."""
    randn = _randn()
    module = copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):  # an attention's rate
            part.dropout = 0.0  # type: ignore[assignment]
    for parameter in module.parameters():
        noise = randn(parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)
    return module, randn


def _randn() -> Callable[..., Tensor]:
    """Random numbers that leave the user's generator where it is."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))


def _same(what: str, values: set[Any]) -> Any:
    if len(values) != 1:
        raise StepAside(f"the layers' {what} differ: {sorted(values)}")
    return values.pop()


def _numbers_of_heads(layer: Any) -> set[int]:
    return {layer.nhead, layer.self_attn.num_heads, layer.cross_attn.num_heads}


def _dropout_rates(layers: Any) -> DropoutRates:
    return DropoutRates(
        _same("dropout rates", {d.p for layer in layers for d in (layer.dropout1, layer.dropout2, layer.dropout3)}),
        _same("attention dropout rates", {a.dropout for x in layers for a in (x.self_attn, x.cross_attn)}),
        _same("FFN dropout rates", {layer.dropout.p for layer in layers}),
    )


def _activation(activation: Any) -> Activation:
    if type(activation) is nn.PReLU:
        return "prelu"
    if activation not in _ACTIVATIONS:
        raise StepAside(f"the activation {activation} is unknown")
    return _ACTIVATIONS[activation]


_ACTIVATIONS: dict[Any, Any] = {function: name for name, function in reference.ACTIVATIONS.items()}


def _bbox_embed(decoder: Any) -> Any:
    if decoder.bbox_embed is None:
        return None
    is_list = type(decoder.bbox_embed) is nn.ModuleList
    if is_list != bool(decoder.bbox_embed_diff_each_layer):
        raise StepAside(
            f"bbox_embed is a {type(decoder.bbox_embed).__name__} while bbox_embed_diff_each_layer is "
            f"{decoder.bbox_embed_diff_each_layer}"
        )
    mlps = decoder.bbox_embed if is_list else [decoder.bbox_embed]
    if len(mlps) < (len(decoder.layers) if is_list else 1) or any(len(mlp.layers) != 3 for mlp in mlps):
        raise StepAside("bbox_embed must have three linear layers, and an MLP per decoder layer if it is a list")
    return "per_layer" if is_list else "shared"


def _unused(params: dict[str, Tensor], config: DecoderConfig) -> set[str]:
    """Parameters that the original has and does not read."""
    heads = {f"bbox_embed.{layer}" for layer in range(config.num_layers)}
    return {
        name
        for name in params
        if (name.startswith("bbox_embed.") and name.split(".layers.")[0] not in heads)
        or (not config.keep_query_pos and ".ca_qpos_proj." in name)
    }
