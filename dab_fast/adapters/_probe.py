"""Whether an original forward computes what the fast one does, values and gradients: both run on a copy."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dab_fast.accuracy import PROBE_TOLERANCE
from dab_fast.config import DecoderConfig
from dab_fast.decoder import DabDecoder, decode
from dab_fast.parameters import StepAside

# Of a gradient's norm, or of a thousandth of the largest one's: rounding stays below 1e-4; one lost path exceeds 0.1.
_GRADIENT_TOLERANCE, _NEGLIGIBLE = 1e-2, 1e-3

# Between the random numbers of one parameter and of the next: a prime, which is a multiple of no width.
_STRIDE = 1009

# Of a module: its tensors by canonical name, and whatever else its fast forward depends on, hashable. Raises StepAside
# where it cannot be read.
Read = Callable[[nn.Module], tuple[dict[str, Tensor], Any]]

Randn = Callable[..., Tensor]


class _Ran(NamedTuple):
    """What a forward gave, and the gradients of a random combination of it."""

    outputs: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Probe:
    """What both forwards of a part are given, and what of theirs is compared.

    Args:
        read: how the copy is read, in evaluation and in training.
        fast: of what `read` gave and of what `given` made, the inputs in order and the masks by name: the outputs.
        original: of the module and of what `given` made: the outputs.
        given: of a source of random numbers and of whether masks are wanted, inputs and masks by name.
        outputs: the outputs' names, and what of each is compared.
    """

    read: Read
    fast: Callable[..., Sequence[Tensor]]
    original: Callable[..., Sequence[Tensor]]
    given: Callable[[Randn, bool], tuple[dict[str, Tensor], dict[str, Tensor | None]]]
    outputs: Mapping[str, Callable[[Tensor], Tensor]]

    def __call__(self, module: nn.Module) -> None:
        """Raise StepAside unless both forwards agree on a copy with random parameters and no dropout.

        In evaluation and in training, with gradients (of inputs and parameters, and with masks) and without, and twice
        in training: what is random there, or counts its calls, is not the original's.
        """
        with neutral():
            try:
                module, randn = _randomized_copy(module)
            except Exception as error:
                raise StepAside(f"it cannot be copied: {error}") from error
            with torch.random.fork_rng(devices=[]):
                for grad in (False, True):
                    module.requires_grad_(grad)
                    given, masks = self.given(randn, grad)
                    given = {name: x.requires_grad_(grad) for name, x in given.items()}
                    with torch.set_grad_enabled(grad):
                        self._compare(module, given, masks, grad)

    def _compare(
        self, module: nn.Module, given: dict[str, Tensor], masks: dict[str, Tensor | None], grad: bool
    ) -> None:
        """Where one thing is read in evaluation and in training, so that both are one run, the fast one is."""
        leaves = given | dict(module.named_parameters())
        ran: dict[Any, _Ran] = {}
        for training in (False, True):
            module.train(training)
            when = " in training" if training else ""
            try:
                tensors, reading = self.read(module)
                if reading not in ran:
                    outputs = list(self.fast(tensors, reading, *given.values(), **masks))
                    ran[reading] = _Ran(outputs, gradients(outputs, leaves) if grad else [])
            except Exception as error:
                raise StepAside(f"the fast forward does not know it{when}: {type(error).__name__}: {error}") from error
            random_state = torch.get_rng_state()
            try:
                got = list(self.original(module, *given.values(), **masks))
            except Exception as error:
                raise StepAside(f"its forward raises {type(error).__name__} on a copy{when}: {error}") from error
            if not torch.equal(torch.get_rng_state(), random_state):
                raise StepAside(f"it draws random numbers{when} with every dropout rate at 0")
            self._compare_outputs(got, ran[reading].outputs, when)
            if grad:
                compare_gradients(list(leaves), gradients(got, leaves), ran[reading].gradients, when)

    @torch.no_grad()
    def _compare_outputs(self, theirs: list[Any], ours: list[Tensor], when: str) -> None:
        if len(theirs) != len(ours) or not all(isinstance(x, Tensor) for x in theirs):
            raise StepAside(f"its forward gives something else{when} than {' and '.join(self.outputs)}")
        for (name, seen), x, right in zip(self.outputs.items(), theirs, ours, strict=True):
            if x.shape != right.shape:
                raise StepAside(f"its {name} have shape {list(x.shape)}{when}, not {list(right.shape)}")
            difference = (seen(x) - seen(right)).abs().max().item()
            if not difference <= PROBE_TOLERANCE:
                raise StepAside(f"its {name} are not what the original computes{when}: they differ by {difference:.1e}")


def probe(
    decoder: nn.Module,
    params: dict[str, Tensor],  # of the decoder
    config: DecoderConfig,
    original: Callable[..., Sequence[Tensor]],
    read: Read,
    *,
    tgt_mask: bool,  # whether both forwards take one
) -> None:
    """Raise StepAside unless the original forward of a decoder and the fast one agree.

    They take, batch first: content [B, Q, D], memory and pos [B, S, D], anchors before the sigmoid [B, Q, query_dim],
    and by name `memory_key_padding_mask`, bool [B, S], and `tgt_mask`, bool [Q, Q], or None. They give hidden states
    [L, B, Q, D] and reference points [L or 1, B, Q, query_dim].
    """
    check_parameters(params, parameter_shapes(config), _unused(params, config))

    def fast(params: dict[str, Tensor], config: DecoderConfig, *inputs: Tensor, **masks: Tensor | None) -> Any:
        return decode(params, config, *inputs, **masks, training=config.has_dropout)[0]  # type: ignore[arg-type]

    def given(randn: Randn, with_masks: bool) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        return _random_inputs(config, randn, with_masks, tgt_mask)

    Probe(read, fast, original, given, {"hidden states": itself, "reference points": _logits})(decoder)


def itself(x: Tensor) -> Tensor:
    return x


def _logits(x: Tensor) -> Tensor:
    return x.logit(1e-7)


def check_parameters(
    params: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], unused: Collection[str] = ()
) -> None:
    """Raise StepAside unless the parameters have these shapes by name; `unused` may be there besides."""
    if unknown := params.keys() - shapes.keys() - set(unused):
        raise StepAside(f"the original has no {', '.join(sorted(unknown))}")
    for name, shape in shapes.items():
        if name not in params or tuple(params[name].shape) != shape:
            got = list(params[name].shape) if name in params else "nothing"
            raise StepAside(f"{name} must have shape {list(shape)}, got {got}")


@functools.cache
def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a decoder of this codebase."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DabDecoder(config).named_parameters()}


def _unused(params: dict[str, Tensor], config: DecoderConfig) -> set[str]:
    """Parameters that the original has and does not read."""
    heads = {f"bbox_embed.{layer}" for layer in range(config.num_layers)}
    return {
        name
        for name in params
        if (name.startswith("bbox_embed.") and name.split(".layers.")[0] not in heads)
        or (not config.keep_query_pos and ".ca_qpos_proj." in name)
    }


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Whatever dtype, device, autocast or mode the caller has made the default."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            # Only where it is another: it is a function mode, with which IDEA-Research's attention loses an argument.
            contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _random_inputs(
    config: DecoderConfig, randn: Randn, with_masks: bool, tgt_mask: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    b, q, s, d = 2, 5, 6, config.d_model
    anchors = randn(b, q, config.query_dim)
    anchors[:, 0, :2] = -9.0  # a center of 1e-4 shows the eps of the inverse sigmoid
    anchors[:, 1, :2] = -13.0
    groups = torch.arange(q) >= 3
    masks = {
        "memory_key_padding_mask": torch.arange(s).expand(b, s) >= torch.tensor([[s], [s - 2]]) if with_masks else None,
        "tgt_mask": groups[:, None] ^ groups if tgt_mask and with_masks else None,
    }
    given = {"content": randn(b, q, d), "memory": randn(b, s, d), "pos": randn(b, s, d), "anchors": anchors}
    return given, masks


def gradients(outputs: Sequence[Tensor], leaves: dict[str, Tensor]) -> list[Tensor]:
    """Of a random combination of the outputs; zeros for a leaf on which none of them depends."""
    randn = seeded_randn()
    loss = 0.0 * next(iter(leaves.values())).sum()  # which has a gradient where no output has one
    for x in outputs:
        loss = loss + (x * randn(x.shape)).sum()
    return list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))


def compare_gradients(names: list[str], theirs: list[Tensor], ours: list[Tensor], when: str) -> None:
    """Raise StepAside unless the gradients of the original and the fast forward are the same."""
    norms = torch.stack([g.norm() for g in theirs])
    least = torch.maximum(norms, _NEGLIGIBLE * norms.max())
    scratch = torch.empty(max(g.numel() for g in ours))  # new memory would take longer than the subtraction
    differences = [
        torch.sub(a, b, out=scratch[: a.numel()].view(a.shape)).norm() for a, b in zip(ours, theirs, strict=True)
    ]
    errors = torch.stack(differences) / least
    worst = int(errors.argmax())
    if not errors[worst] <= _GRADIENT_TOLERANCE:
        raise StepAside(
            f"its gradient of {names[worst]} is not what the original computes{when}: "
            f"they differ by {errors[worst]:.1%}"
        )


@torch.no_grad()
def _randomized_copy(module: nn.Module) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A float32 copy on the CPU without dropout whose parameters hide nothing, and its source of random numbers."""
    randn = seeded_randn()
    matrices = [p for p in module.parameters() if p.dim() > 1]
    # All from the same few numbers: little to draw, nothing to copy, and it stays in the cache.
    numbers = randn(max(p.numel() for p in matrices) + _STRIDE * len(matrices))
    scaled = functools.cache(lambda width: numbers * width**-0.5)
    drawn: dict[int, Any] = {
        id(p): nn.Parameter(scaled(p.shape[-1])[i * _STRIDE :][: p.numel()].view(p.shape))
        for i, p in enumerate(matrices)
    }
    module = copy.deepcopy(module, drawn).to(device="cpu", dtype=torch.float32)
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):  # an attention's rate, a block's
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    for parameter in module.parameters():
        if parameter.dim() <= 1:
            parameter.add_(0.1 * randn(parameter.shape))
    return module, randn


def seeded_randn() -> Callable[..., Tensor]:
    """Random numbers that leave the user's generator where it is."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
