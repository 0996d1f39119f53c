"""box_position_embed: the kernels against float64, in the interpreter, and what the public function promises."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dab_fast import ops, reference
from dab_fast.accuracy import outputs_and_gradients
from tests.support.accuracy import assert_accurate, assert_as_specified


@dataclass(frozen=True)
class EmbeddingCase:
    lead: tuple[int, ...] = (2, 7)
    coords: int = 4
    scale: str | None = "per_element"  # "per_box": one number per box; "shared": one row for all boxes; "number"
    modulate: bool = True
    num_feats: int = 16
    temperature: float = 10000.0
    order: str = "yxwh"
    dtype: torch.dtype = torch.float32  # of the scale, the logits and the results
    box_dtype: torch.dtype = torch.float32
    layout: str = "dense"

    def __str__(self) -> str:
        default = EmbeddingCase()
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "plain"

    def inputs(self) -> dict[str, Tensor | None]:
        scales = {
            "per_element": (*self.lead, 2 * self.num_feats),
            "per_box": (*self.lead, 1),
            "shared": (2 * self.num_feats,),
            "number": (1,),
        }
        inputs = {
            "boxes": (torch.rand(*self.lead, self.coords) * 0.9 + 0.05).to(self.box_dtype),
            "scale": torch.randn(scales[self.scale]).to(self.dtype) if self.scale else None,
            "logits": torch.randn(*self.lead, 2).to(self.dtype) if self.modulate else None,
        }
        return {name: None if x is None else laid_out(x, self.layout) for name, x in inputs.items()}

    def cotangents(self) -> list[Tensor]:
        widths = (self.coords * self.num_feats, 2 * self.num_feats)
        return [laid_out(torch.randn(*self.lead, width).to(self.dtype), self.layout) for width in widths]

    def call(self, function, dtype=None):
        return lambda *inputs: function(
            *inputs,
            num_feats=self.num_feats,
            temperature=self.temperature,
            order=self.order,
            dtype=dtype or self.dtype,
        )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers behind other strides."""
    if layout == "permuted":  # the leading dimensions in another order underneath
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x
    if layout == "sliced":  # part of a wider row
        return torch.cat((torch.randn(*x.shape[:-1], 3).to(x.dtype), x, x), -1)[..., 3 : 3 + x.shape[-1]]
    if layout == "columns":  # the last dimension is not dense
        return x.unsqueeze(-1).repeat(*(1,) * x.dim(), 3)[..., 1]
    return x


def check(case: EmbeddingCase) -> None:
    inputs, cotangents = case.inputs(), case.cotangents()
    with ops.backend("triton"):
        actual = outputs_and_gradients(case.call(ops.box_position_embed), inputs, cotangents)
    in_float64 = case.call(reference.box_position_embed, torch.float64)
    assert_as_specified(
        actual,
        case.call(reference.box_position_embed),
        inputs,
        cotangents,
        in_float64=in_float64,
        interpreted=inputs["boxes"].device.type == "cpu",
    )


HALVES = (torch.float16, torch.bfloat16)
CASES = [
    EmbeddingCase(),
    *(EmbeddingCase(lead=(q,)) for q in (0, 1, 37)),
    EmbeddingCase(lead=(2, 300), num_feats=128),
    EmbeddingCase(lead=(0, 7)),
    EmbeddingCase(lead=()),
    EmbeddingCase(lead=(2, 3, 5)),
    EmbeddingCase(lead=(), scale="per_box", modulate=False, coords=2),
    *(
        EmbeddingCase(scale=s, modulate=m)
        for s, m in itertools.product(("per_box", "shared", "number", None), (True, False))
    ),
    EmbeddingCase(scale="shared", lead=(301,), num_feats=32),
    *(EmbeddingCase(coords=2, scale=s, modulate=False) for s in ("per_element", None)),
    *(EmbeddingCase(num_feats=f, lead=(37,)) for f in (2, 6, 22, 128)),
    EmbeddingCase(order="xywh"),
    EmbeddingCase(order="xywh", coords=2, modulate=False),
    EmbeddingCase(temperature=20.0),
    *(EmbeddingCase(layout=layout) for layout in ("permuted", "sliced", "columns")),
    *(
        EmbeddingCase(dtype=dtype, scale=s)
        for dtype, s in itertools.product(HALVES, ("per_element", "per_box", "shared"))
    ),
    *(EmbeddingCase(dtype=dtype, box_dtype=dtype, layout="sliced") for dtype in HALVES),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("case", [*CASES, EmbeddingCase(lead=(32, 300), num_feats=128)], ids=str)
def test_forward_and_gradients_on_a_gpu(case, dtype):
    with torch.device("cuda"):
        check(replace(case, dtype=dtype))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("scale", ("per_element", "per_box", "shared", "number", None))
@pytest.mark.parametrize("queries", (0, 1, 7, 37, 300, 301))
def test_forward_and_gradients_over_the_matrix(queries, scale, dtype):
    variants = itertools.cycle(itertools.product((4, 2), ("yxwh", "xywh"), (10, 128)))
    for layout, (coords, order, feats) in zip(("dense", "permuted", "sliced", "columns") * 2, variants, strict=False):
        check(EmbeddingCase((2, queries), coords, scale, coords == 4, feats, 20.0, order, dtype, layout=layout))


def test_large_call():
    """More rows per program than a small call gives it."""
    check(EmbeddingCase(lead=(2500,), num_feats=4))


@pytest.mark.parametrize("needed", [n for r in (1, 2) for n in itertools.combinations(range(3), r)], ids=str)
@pytest.mark.parametrize("used", (0, 1))
def test_only_what_is_needed(needed, used):
    """Any subset of the inputs' gradients, from either result alone."""
    case = EmbeddingCase()
    inputs, cotangent = case.inputs(), case.cotangents()[used]

    def gradients(function, dtype):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_(i in needed) for i, x in enumerate(inputs.values())]
        out = case.call(function, dtype)(*leaves)[used]
        if not out.requires_grad:
            return {}
        found = torch.autograd.grad(out, [leaves[i] for i in needed], cotangent.to(out.dtype), allow_unused=True)
        return {str(i): torch.zeros(()) if g is None else g for i, g in zip(needed, found, strict=True)}

    with ops.backend("triton"):
        actual = gradients(ops.box_position_embed, None)
    exact, own = (gradients(reference.box_position_embed, dtype) for dtype in (torch.float64, None))
    if used == 0:  # autograd says "unused" or zero of what the embedding alone does not read
        assert all(not actual.pop(str(i), torch.zeros(())).any() for i in needed if i)
        exact, own = ({k: v for k, v in d.items() if k == "0"} for d in (exact, own))
    assert_accurate(actual, exact, own)


def test_directional_finite_difference():
    case = EmbeddingCase()
    inputs, cotangents = case.inputs(), case.cotangents()
    step = 1e-3
    with ops.backend("triton"):
        gradients = outputs_and_gradients(case.call(ops.box_position_embed), inputs, cotangents)
        for name, x in inputs.items():
            direction = torch.randn_like(x)
            moved = [
                sum(
                    (out.double() * c).sum()
                    for out, c in zip(
                        case.call(ops.box_position_embed)(*{**inputs, name: x + h * direction}.values()),
                        cotangents,
                        strict=True,
                    )
                )
                for h in (step, -step)
            ]
            slope = (moved[0] - moved[1]) / (2 * step)
            # float32 differences: 2^-24 of sums near 10 over 1e-3, and the third derivative of sines, (2 pi)^3 1e-6.
            torch.testing.assert_close(slope, (gradients[f"d_{name}"] * direction).sum().double(), rtol=1e-2, atol=1e-2)


def test_same_bits_in_every_run():
    case = EmbeddingCase(lead=(2, 301), scale="shared", num_feats=32)
    inputs, cotangents = case.inputs(), case.cotangents()
    with ops.backend("triton"):
        first, second = (outputs_and_gradients(case.call(ops.box_position_embed), inputs, cotangents) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_tiny_and_out_of_range_boxes(dtype):
    """Half precision is finite where float32 is; coordinates a little outside (0, 1) are coordinates too."""
    boxes = torch.tensor([[0.3, 0.6, 1e-6, 1e-7], [-0.2, 1.2, 1e-5, 1.3], [0.0, 1.0, 1.0, 1e-8]])
    logits, scale = torch.tensor([8.0, 9.0]).expand(3, 2).to(dtype), torch.randn(3, 32).to(dtype)
    call = EmbeddingCase(dtype=dtype).call
    with ops.backend("triton"):
        actual = call(ops.box_position_embed)(boxes, scale, logits)
    own = call(reference.box_position_embed)(boxes, scale, logits)
    exact = call(reference.box_position_embed, torch.float64)(boxes.double(), scale.double(), logits.double())
    assert all(x.isfinite().all() for x in actual)
    limit = torch.finfo(dtype).max
    named = [{str(i): x.clamp(-limit, limit) for i, x in enumerate(xs)} for xs in (actual, exact, own)]
    assert_accurate(*named)


def test_what_is_saturated_has_no_gradient():
    boxes = torch.tensor([[0.3, 0.6, 1e-6, 1e-7]])
    scale, logits = torch.randn(1, 32).half(), torch.tensor([[2.0, 3.0]]).half()
    case = EmbeddingCase(dtype=torch.float16)
    gradients = []
    for backend in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in (boxes, scale, logits)]
        with ops.backend(backend):
            query_sine = case.call(ops.box_position_embed)(*leaves)[1]
        gradients.append(torch.autograd.grad(query_sine, leaves, torch.full_like(query_sine, 1e-4)))
    assert (query_sine.abs() == 65504).any() and (query_sine.abs() < 65504).any()
    for ours, theirs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)  # two roundings of float16


def test_not_a_number_stays_one():
    boxes = torch.tensor([[0.3, float("nan"), 0.2, 0.2], [0.3, 0.2, float("nan"), 0.2]])
    logits = torch.zeros(2, 2)
    with ops.backend("triton"):
        actual = ops.box_position_embed(boxes, None, logits, num_feats=4)
    expected = reference.box_position_embed(boxes, None, logits, num_feats=4)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("coords, order", [(1, "xywh"), (2, "yxwh"), (3, "yxwh"), (5, "xywh")])
def test_sine_embed(coords, order):
    x = torch.rand(3, 5, coords)
    cotangent = [torch.randn(3, 5, coords * 6)]
    inputs = {"coordinates": x}
    with ops.backend("triton"):
        actual = outputs_and_gradients(lambda x: ops.sine_embed(x, 6, 20.0, order), inputs, cotangent)
    own, exact = (
        outputs_and_gradients(lambda x: reference.sine_embed(x, 6, 20.0, order), inputs, cotangent, dtype=dtype)
        for dtype in (None, torch.float64)
    )
    assert_accurate(actual, exact, own)
    with ops.backend("torch"):
        assert torch.equal(ops.sine_embed(x, 6, 20.0, order), own["out0"])


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_angles_are_float32_at_least(backend):
    x = torch.rand(5, 2).bfloat16()
    with ops.backend(backend):
        embedded = ops.sine_embed(x, 64)
    # one rounding of the result; angles in bfloat16 would err by 2^-7 of 2 pi
    torch.testing.assert_close(embedded.double(), reference.sine_embed(x.double(), 64), rtol=0, atol=2**-7)


def test_sine_embed_without_gradients():
    x = torch.rand(5, 2)
    with ops.backend("triton"):
        torch.testing.assert_close(ops.sine_embed(x, 6), reference.sine_embed(x, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (([0.5] * 4,), {}, TypeError, "boxes must be a Tensor, got list"),
        ((torch.rand(3, 3),), {}, ValueError, r"boxes must have shape \[..., 2\] or \[..., 4\], got \[3, 3\]"),
        ((torch.ones(3, 4).long(),), {}, TypeError, "boxes must be floating point, got torch.int64"),
        ((torch.rand(3, 4), torch.rand(2, 8)), {}, ValueError, r"scale must have shape \[3, 8\], got \[2, 8\]"),
        ((torch.rand(3, 4), 2.0), {}, TypeError, "scale must be a Tensor, got float"),
        ((torch.rand(3, 4),), {"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
        ((torch.rand(3, 4), None, torch.rand(3, 4)), {}, ValueError, r"ref_size_logits must have shape \[3, 2\]"),
        ((torch.rand(3, 2), None, torch.rand(3, 2)), {}, ValueError, r"boxes must have shape \[..., 4\] for ref_size"),
        ((torch.rand(3, 4),), {"num_feats": 5}, ValueError, "num_feats must be even and at least 2, got 5"),
        ((torch.rand(3, 4),), {"order": "whxy"}, ValueError, 'order must be "yxwh" or "xywh", got \'whxy\''),
    ],
)
def test_errors_say_what_must_hold_and_what_came(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.box_position_embed(*arguments, **{"num_feats": 4, **options})


def test_sine_embed_of_one_coordinate_has_no_y():
    with pytest.raises(ValueError, match=r'coordinates must have shape \[..., 2 or more\] for order "yxwh"'):
        ops.sine_embed(torch.rand(3, 1))


def test_features_follow_the_paper():
    """Feature 2j of x is sin(2 pi x / 10000^(2j/F)), of the second half of the yx part."""
    x, feats, j = 0.3, 8, 1
    with ops.backend("triton"):
        sine, _ = ops.box_position_embed(torch.tensor([[x, 0.6, 0.1, 0.2]]), num_feats=feats)
    angle = 2 * math.pi * x / 10000 ** (2 * j / feats)
    torch.testing.assert_close(
        sine[0, feats + 2 * j : feats + 2 * j + 2], torch.tensor([math.sin(angle), math.cos(angle)])
    )
