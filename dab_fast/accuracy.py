"""When a result counts as right: the only tolerances of tests, selftest, demo and benchmarks, each with its reason.

The rule: against float64 a result errs at most twice as much as plain PyTorch in the same dtype, plus a floor for where
PyTorch's own error is small by chance. Two errors of each tensor are held to it: the largest of an element, which shows
what is wrong in one place, and the norm of all, which shows a factor that is wrong by about a rounding of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 2.0

# A term of a sum passes some 16 operations, the tree of the sum among them, each off by at most u, half an eps, and by
# any amount up to that alike: by a standard deviation of sqrt(16 / 3) u. Errors of terms add as their squares do. Where
# terms have one sign, the last additions of the tree err by more: that of all, of two halves, of four quarters, by
# sqrt((1 + 1/2 + 1/4 + ...) / 3) u of the result. Of the some ten thousand results of an op, the largest error is one
# of four standard deviations.
TERM_VARIANCE = 16 / 3
SUM_VARIANCE = 2 / 3
DEVIATIONS = 4

# Where forward keeps a result in its dtype, backward reads it rounded. In a single element that rounding and the one of
# the stored gradient may add up; over a norm they do not.
ELEMENT_ROUNDINGS = 2

# In attention the gradient of a score holds dP - D, a difference of two sums over d_v whose terms are of size one and
# which with a single key cancels to nothing: in units of the largest result, at least of 1, a few roundings of these
# sums; in half precision, one of the stored result and of D's.
ATTENTION_FLOOR = {torch.float32: 16 * 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# Attention with logits of some hundreds, of the norm: in float32 the logits of both are rounded to about 1e-5, and not
# alike; in float16 a result is, once.
SHARP_FLOOR = {torch.float32: 2e-5, torch.float16: 2**-12}

# A gradient of a decoder is compared by its norm. That of a key bias is zero analytically and holds rounding alone, so
# a negligible gradient is compared with the largest one. Sums of thousands of float32 terms in another order stay below
# the tolerance.
NEGLIGIBLE = 1e-3  # of the largest gradient's norm
GRADIENT_TOLERANCE = 1e-4

# A whole decoder in float32 against the original: the largest differences that sums in another order make on perturbed
# weights, of hidden states, which are of size one, and of boxes in [0, 1].
HIDDEN_TOLERANCE = 2e-5
BOX_TOLERANCE = 5e-6

# In benchmarks, the rounding of the last sum alone, in boxes in [0, 1] or of the largest element: two providers may
# differ by it where both are right. It is wider than an op's floor, since it serves whole decoders too.
BENCHMARK_FLOOR = {torch.float32: BOX_TOLERANCE, torch.float16: 2e-4, torch.bfloat16: 1e-3}

# The demo compares whole models on one photo. `BOX_TOLERANCE` is 0.007 px at 1333, and seven times that still passes; a
# thousandth of the noise in one projection, or a wrong eps, moves a box further. A logit that is off by the second
# changes a score by at most a quarter of it, the steepest slope of the sigmoid.
DEMO_BOX_PX = 0.05
DEMO_LOGIT = 1e-3

# The probe of an unknown decoder: rounding stays below 1e-4, and a temperature, a feature order, an eps or an
# activation that is not ours exceeds 1e-2.
PROBE_TOLERANCE = 1e-3


def allowed(own_error: float, floor: float) -> float:
    """How far a result may be off where plain PyTorch in its dtype is off by `own_error`."""
    return RATIO * own_error + floor


def floor(
    dtype: torch.dtype,  # of the result
    size: float,  # of the exact result: its largest element or its norm
    terms: float | None = None,  # the same of the root of its terms' squares; None: of sums that do not cancel
    *,
    roundings: int = 1,  # of the dtype of the result, each by u
    truncated: bool = False,  # a result in bfloat16 is cut off and not rounded, as Triton's interpreter stores it
) -> float:
    """What rounding leaves of an op computed in float32, or float64: that of the stored result, and that of its terms.

    In float64 the exact result is rounded as much as the one that is compared with it.
    """
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    stored, term = (torch.finfo(x).eps / 2 for x in (dtype, computed))
    stored *= roundings * (2 if truncated and dtype == torch.bfloat16 else 1)
    rounded = 2 if dtype == torch.float64 else 1
    variance = TERM_VARIANCE * (size if terms is None else terms) ** 2 + SUM_VARIANCE * size**2
    return rounded * (stored * size + DEVIATIONS * term * math.sqrt(variance))


def relu_flip(units: float) -> float:
    """What one unit of relu on the other side of zero, in one query, may move a gradient of a box MLP by.

    Args:
        units: of all queries in the layer. The gradient of its bias sums a term, all of a size, for each that is not
            zero, some half of them. One of these comes or goes: 1 / sqrt(units / 2), 5e-3 for 300 queries of width 256.

    Returns:
        Twice that, of the gradient's norm.
    """
    return 2 / math.sqrt(units / 2)


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Random gradients of the outputs, the same in every call, on every device, and in every dtype but for rounding; 1
    for a scalar loss."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(x)
        if x.dim() == 0
        else torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype)
        for x in outputs
    ]


def gradients(
    outputs: tuple[Tensor, ...],
    leaves: Mapping[str, Tensor],
    d_outputs: list[Tensor],
    *,
    allow_unused: bool = False,
    retain_graph: bool = False,
) -> dict[str, Tensor | None]:
    """Of every leaf, by name; None where it has none, which is an error unless `allow_unused`."""
    pairs = [(x, d.to(x)) for x, d in zip(outputs, d_outputs, strict=True) if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in pairs],
        list(leaves.values()),
        [d for _, d in pairs],
        allow_unused=allow_unused,
        retain_graph=retain_graph,
    )
    return dict(zip(leaves, found, strict=True))


Call = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = Mapping[str, Tensor | None]


def outputs_and_gradients(
    call: Call,
    inputs: Inputs,  # the arguments of `call` in order
    d_outputs: list[Tensor] | None = None,  # one per output; None: `cotangents`
    *,
    dtype: torch.dtype | None = None,  # of the inputs; None leaves them as they are
    place: Callable[[Tensor], Tensor] | None = None,  # lays out the gradients of the outputs, which have their dtypes
) -> dict[str, Tensor]:
    """The outputs "out0", "out1" ... and the gradient "d_<input>" of every input of floating point."""
    arguments, leaves = _leaves(inputs, dtype)
    outputs = _outputs(call, arguments)
    d_outputs = cotangents(outputs) if d_outputs is None else d_outputs
    if place is not None:
        d_outputs = [place(d.to(x)) for d, x in zip(d_outputs, outputs, strict=True)]
    found = gradients(outputs, leaves, d_outputs)
    named = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    return named | {f"d_{name}": g for name, g in found.items() if g is not None}


def root_of_squares(specification: Call, inputs: Inputs, d_outputs: list[Tensor] | None = None) -> dict[str, Tensor]:
    """In float64, the outputs, and of each gradient, a sum of one term per element of `d_outputs`, the root of its
    terms' squares: with random signs of the terms it is the root mean square of their sum."""
    arguments, leaves = _leaves(inputs, torch.float64)
    outputs = _outputs(specification, arguments)
    d_outputs = cotangents(outputs) if d_outputs is None else d_outputs
    generator = torch.Generator().manual_seed(2)
    squares = {name: torch.zeros_like(x) for name, x in leaves.items()}
    draws = 8
    for _ in range(draws):
        signs = [torch.randint(2, d.shape, generator=generator, device="cpu").to(d) * 2 - 1 for d in d_outputs]
        signed = [d * sign for d, sign in zip(d_outputs, signs, strict=True)]
        for name, g in gradients(outputs, leaves, signed, retain_graph=True).items():
            assert g is not None
            squares[name] += g.square() / draws
    named = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    return named | {f"d_{name}": x.sqrt() for name, x in squares.items()}


def _leaves(inputs: Inputs, dtype: torch.dtype | None) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """The arguments, and those of them that get a gradient. No clones, which would lose strides that are not dense."""
    arguments: list[Tensor | None] = []
    leaves = {}
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            x = leaves[name] = x.detach().to(dtype or x.dtype).requires_grad_()
        arguments.append(x)
    return arguments, leaves


def _outputs(call: Call, arguments: list[Tensor | None]) -> tuple[Tensor, ...]:
    outputs = call(*arguments)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Error:
    """How far a tensor is from float64, and what is allowed, in units of the exact one's largest element or norm."""

    size: float
    allowed: float

    @property
    def fine(self) -> bool:
        """Whether the error is allowed."""
        return self.size <= self.allowed  # false for NaN

    @property
    def badness(self) -> float:
        """Above 1 it is not fine; of several errors the one with the largest is shown."""
        if math.isnan(self.size) or math.isnan(self.allowed):
            return math.inf
        if self.allowed == 0:
            return math.inf if self.size else 0.0
        return self.size / self.allowed

    def __str__(self) -> str:
        return f"error {self.size:.2e}, allowed {self.allowed:.2e}"


def errors(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],  # in float64
    own: Mapping[str, Tensor],  # plain PyTorch's, in the dtypes of `actual`
    terms: Mapping[str, Tensor] | None = None,  # of `root_of_squares`
    *,
    truncated: bool = False,  # as `floor` says
) -> dict[str, Error]:
    """The worse of its two errors for each tensor that has an element."""
    return {
        name: _error(actual[name], right, own[name], None if terms is None else terms[name], truncated)
        for name, right in exact.items()
        if right.numel()
    }


def _error(actual: Tensor, exact: Tensor, own: Tensor, terms: Tensor | None, truncated: bool) -> Error:
    found = []
    for size, roundings in ((_largest, ELEMENT_ROUNDINGS), (_norm, 1)):
        ours, plain = (size(x.double() - exact) for x in (actual, own))
        unit = size(exact)
        of_terms = None if terms is None else size(terms)
        limit = allowed(plain, floor(actual.dtype, unit, of_terms, roundings=roundings, truncated=truncated))
        found.append(Error(ours / unit, limit / unit) if unit else Error(ours, limit))
    return max(found, key=lambda error: error.badness)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _norm(x: Tensor) -> float:
    return x.norm().item()


def gradient_errors(ours: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]) -> dict[str, float]:
    """For each gradient that is not None in `exact`, |difference| / max(|g|, `NEGLIGIBLE` of the largest |g|).

    A gradient that is None in `ours` is zero. `GRADIENT_TOLERANCE` is for float32.
    """
    right = {name: g for name, g in exact.items() if g is not None}
    largest = max(_norm(g) for g in right.values())
    found = {}
    for name, g in right.items():
        mine = ours[name]
        difference = _norm(g if mine is None else mine.to(g.dtype) - g)
        unit = max(_norm(g), NEGLIGIBLE * largest)
        found[name] = difference / unit if unit else difference
    return found
