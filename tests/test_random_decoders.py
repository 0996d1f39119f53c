"""Random decoders on every backend against the second writing in float64: outputs and every gradient.

Learned anchors are drawn up to twelve times as large as a model starts with, so boxes are as thin as 1e-5 and attention
as sharp as a single key.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dab_fast import DabDecoder, ops
from dab_fast.accuracy import (
    BOX_TOLERANCE,
    GRADIENT_TOLERANCE,
    HIDDEN_TOLERANCE,
    allowed,
    cotangents,
    gradient_errors,
    gradients,
    relu_flip,
)
from dab_fast.backends.triton import why_not
from dab_fast.ops import _backends
from tests.support import idea_second_writing as second
from tests.support.models import perturb_, wide

needs_triton = pytest.mark.skipif(
    bool(reason := why_not("modulated_cross_attention", torch.device("cpu"))), reason=str(reason)
)
FEW, MANY = 100, 2000
FLOORS = {"hidden_states": HIDDEN_TOLERANCE, "boxes": BOX_TOLERANCE}  # of outputs


@dataclass
class Draw:
    decoder: second.TransformerDecoder
    settings: dict[str, Any]  # of `DabDecoder`
    inputs: dict[str, Tensor]  # query-first
    masks: dict[str, Tensor]
    layout: random.Random


def draw(seed: int) -> Draw:
    r = random.Random(seed)
    torch.manual_seed(seed)
    heads = r.choice((1, 2, 3))
    d = heads * r.choice((4, 8, 12, 16, 20, 32))
    b, q, s = r.randint(1, 2), r.randint(1, 9), r.randint(1, 40)
    query_dim = r.choice((4, 4, 4, 2))
    settings = {
        "d_model": d,
        "nhead": heads,
        "num_layers": r.randint(1, 3),
        "dim_feedforward": r.randint(1, 64),
        "query_dim": query_dim,
        "query_scale_type": r.choice(("cond_elewise", "cond_elewise", "cond_scalar", "fix_elewise")),
        "modulate_hw_attn": query_dim == 4 and r.random() < 0.8,
        "keep_query_pos": r.random() < 0.3,
        "bbox_embed": r.choice(("shared", "shared", "per_layer", None)),
        "activation": r.choice(("prelu", "relu", "gelu", "silu", "selu")),
    }
    decoder = second_writing(**settings)
    perturb_(decoder, seed)
    inputs = {
        "tgt": torch.randn(q, b, d),
        "memory": torch.randn(s, b, d) * r.choice((1, 1, 3)),
        "pos": torch.randn(s, r.choice((1, b)), d),
        "refpoints_unsigmoid": torch.randn(q, b, query_dim) * r.choice((1, 1, 4, 12)),
    }
    everyone = {
        "memory_key_padding_mask": torch.rand(b, s) < 0.3,
        "tgt_mask": torch.rand(*r.choice(((), (b * heads,))), q, q) < 0.3,
        "tgt_key_padding_mask": torch.rand(b, q) < 0.2,
        "memory_mask": torch.rand(*r.choice(((), (b * heads,))), q, s) < 0.3,
    }
    masks = {name: mask for name, mask in everyone.items() if r.random() < 0.3}
    for mask in masks.values():
        mask[..., 0] = False  # where nothing is left to see the second writing is NaN
    return Draw(decoder.eval(), settings, inputs, masks, r)


def second_writing(
    *,
    d_model: int,
    nhead: int,
    num_layers: int,
    dim_feedforward: int,
    query_dim: int,
    query_scale_type: str,
    modulate_hw_attn: bool,
    keep_query_pos: bool,
    bbox_embed: str | None,
    activation: str,
) -> second.TransformerDecoder:
    layer = second.TransformerDecoderLayer(d_model, nhead, dim_feedforward, 0.0, activation, keep_query_pos)
    per_layer = bbox_embed == "per_layer"
    decoder = second.TransformerDecoder(
        layer, num_layers, d_model, query_dim, keep_query_pos, query_scale_type, modulate_hw_attn, per_layer
    )
    mlps = [second.ReluMLP(d_model, d_model, d_model, 4) for _ in range(num_layers)]
    decoder.bbox_embed = {"shared": mlps[0], "per_layer": nn.ModuleList(mlps), None: None}[bbox_embed]
    return decoder


@dataclass
class Kinks(TorchFunctionMode):
    """Notes the inputs of the functions whose derivative jumps at zero."""

    seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("relu", "prelu", "selu") or (name == "clamp" and kwargs == {"min": 0}):
            self.seen.append(args[0].detach().double())
        return function(*args, **kwargs)


@dataclass
class Ran:
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    kinks: list[Tensor]


def run(decoder: nn.Module, drawn: Draw, place: Callable[[Tensor], Tensor] | None = None) -> Ran:
    """Of the second writing, or with `place`, which lays out its inputs, of a `DabDecoder`."""
    dtype = next(decoder.parameters()).dtype
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in drawn.inputs.items()}
    with Kinks() as kinks:
        if place:
            outputs = tuple(decoder(*(place(x) for x in leaves.values()), **drawn.masks))
        else:
            whole = leaves | {"pos": leaves["pos"].expand_as(leaves["memory"])}
            outputs = tuple(decoder(**whole, **drawn.masks))
    found = gradients(outputs, leaves | dict(decoder.named_parameters()), cotangents(outputs), allow_unused=True)
    return Ran(dict(zip(("hidden_states", "boxes"), outputs, strict=True)), found, kinks.seen)


def layouts(r: random.Random) -> Callable[[Tensor], Tensor]:
    """Batch-first, each input in another layout."""
    return lambda x: r.choice(
        (
            lambda x: x.transpose(0, 1),
            lambda x: x.transpose(0, 1).contiguous(),
            lambda x: torch.stack((x, x), -1)[..., 0].transpose(0, 1),
        )
    )(x)


def nudged(drawn: Draw, seed: int) -> Draw:
    """The same with every number moved to a neighbour, as rounding would: so far may the results err."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Tensor) -> Tensor:
        return x * (1 + torch.randint(-1, 2, x.shape, generator=generator) * 2**-24)

    decoder = copy.deepcopy(drawn.decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(nudge(parameter.double()))
        inputs = {name: nudge(x.double()).float() for name, x in drawn.inputs.items()}
    return dataclasses.replace(drawn, decoder=decoder, inputs=inputs)


class Bounds:
    """What a decoder in float32 may err by: twice what the second writing does, as it is or nudged."""

    def __init__(self, drawn: Draw, nudges: int) -> None:
        self.exact = run(wide(drawn.decoder), drawn)
        own = [run(x.decoder, x) for x in (drawn, *(nudged(drawn, seed) for seed in range(nudges)))]
        self.may_flip = max(turned_over(x, self.exact) for x in own)
        errors = [self.errors(x) for x in own]
        self.own = {name: max(error[name] for error in errors) for name in errors[0]}

    def errors(self, ran: Ran) -> dict[str, float]:
        """The largest of an element of each output, the norm of each gradient's relative to that of the gradient."""
        found = {name: largest(ran.outputs[name] - x) for name, x in self.exact.outputs.items()}
        return found | gradient_errors(with_key_biases(ran.gradients), with_key_biases(self.exact.gradients))

    def wrong(self, ran: Ran) -> dict[str, str]:
        found = {}
        for name, error in self.errors(ran).items():
            floor = FLOORS.get(name, GRADIENT_TOLERANCE + self.may_flip)
            limit = allowed(self.own[name], floor)
            if not error <= limit:
                found[name] = f"{error:.1e}, allowed {limit:.1e}"
        return found


def with_key_biases(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The gradients of keys' biases as one more column of their weights'.

    They are zero but for the rounding of their terms, which the weights' gradients are made of. How much of it is left
    tells whether weights and D were computed from the same logits, or from logits rounded twice.
    """
    joined = dict(gradients)
    for name in gradients:
        if name.endswith(("kcontent_proj.bias", "kpos_proj.bias")):
            weight, bias = name.removesuffix("bias") + "weight", joined.pop(name)
            if bias is not None and joined[weight] is not None:
                joined[weight] = torch.cat((joined[weight], bias[:, None]), 1)
    return joined


def turned_over(ran: Ran, exact: Ran) -> float:
    """What a unit may move a gradient by that lies so near zero that rounding may put it on either side."""
    found = 0.0
    for mine, right in zip(ran.kinks, exact.kinks, strict=True):
        if right.abs().min() <= 2 * largest(mine - right):
            found = max(found, relu_flip(right.numel()))
    return found


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def check(seed: int, backends: tuple[str, ...]) -> None:
    drawn = draw(seed)
    bounds = Bounds(drawn, nudges=2)
    decoder = DabDecoder(**drawn.settings)
    decoder.load_state_dict(drawn.decoder.state_dict())
    for name in backends:
        with ops.backend(name):
            ran = run(decoder, drawn, layouts(drawn.layout))
        # Where a gradient hangs on a difference of near equals, two nudges may both move it little by chance.
        wrong = bounds.wrong(ran) and Bounds(drawn, nudges=16).wrong(ran)
        assert not wrong, f"draw {seed} on {name}, {drawn.settings}: {wrong}"


@pytest.fixture(autouse=True)
def native_wherever_it_has_the_op(monkeypatch):
    """`auto` leaves the extension's ops to it, small ones too."""
    monkeypatch.setattr(_backends, "why_not_faster", lambda *_: None)


@pytest.mark.parametrize("seed", range(FEW))
def test_random_decoder(seed):
    check(seed, ("torch", "auto"))


@needs_triton
@pytest.mark.parametrize("seed", range(0, FEW, 4))  # the interpreter takes seconds
def test_random_decoder_on_triton(seed):
    check(seed, ("triton",))


@pytest.mark.sweep
@pytest.mark.parametrize("first", range(FEW, MANY, 100))
def test_many_random_decoders(first):
    for seed in range(first, first + 100):
        check(seed, ("torch", "auto"))


@pytest.mark.sweep
@needs_triton
@pytest.mark.parametrize("first", range(FEW, MANY, 100))
def test_many_random_decoders_on_triton(first):
    for seed in range(first, first + 100, 4):
        check(seed, ("triton",))
