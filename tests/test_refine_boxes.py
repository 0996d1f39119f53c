"""refine_boxes: the kernels against float64, in the interpreter, and what the public function promises."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dab_fast import ops, reference
from dab_fast.accuracy import outputs_and_gradients
from tests.support.accuracy import assert_accurate, assert_as_specified

WEIGHTS = ("w1", "b1", "w2", "b2", "w3", "b3")


@dataclass(frozen=True)
class RefinementCase:
    lead: tuple[int, ...] = (2, 7)
    d: int = 32
    coords: int = 4
    eps: float = 1e-3
    layered: bool = False  # a box MLP for each index of lead[0]
    dtype: torch.dtype = torch.float32  # of hidden and the weights
    weight_dtype: torch.dtype | None = None
    recompute: bool = False
    layout: str = "dense"

    def __str__(self) -> str:
        default = RefinementCase()
        return "-".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "plain"

    def inputs(self) -> dict[str, Tensor]:
        layers, d = self.lead[:1] if self.layered else (), self.d
        boxes = torch.rand(*self.lead, self.coords)
        if boxes.numel():  # on, below and beyond the clamps of the inverse sigmoid
            special = torch.tensor([0.0, 1.0, self.eps / 3, 1 - self.eps / 3, -0.1, 1.1])
            boxes.view(-1)[:6] = special[: boxes.numel()]
        inputs = {"hidden": torch.randn(*self.lead, d).to(self.dtype), "boxes": boxes}
        for name, shape in zip(WEIGHTS, ((d, d), (d,), (d, d), (d,), (4, d), (4,)), strict=True):
            gain = d**-0.5 if name.startswith("w") else 0.3
            inputs[name] = (gain * torch.randn(*layers, *shape)).to(self.weight_dtype or self.dtype)
        self.keep_from_kinks(inputs)
        if self.layout == "permuted":
            inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("hidden", "boxes")}
        if self.layout == "sliced":
            inputs |= {name: torch.cat((inputs[name],) * 2, -1)[..., : inputs[name].shape[-1]] for name in inputs}
        if self.layout == "columns":
            inputs |= {name: x.unsqueeze(-1).repeat(*(1,) * x.dim(), 2)[..., 0] for name, x in inputs.items()}
        return inputs

    def keep_from_kinks(self, inputs: dict[str, Tensor]) -> None:
        """Draws rows of hidden again until no relu is so near zero that rounding decides on its derivative."""
        d = self.d
        hidden = inputs["hidden"].view(self.lead[0] if self.layered else 1, -1, d)
        w1, b1, w2, b2 = (inputs[name].double() for name in WEIGHTS[:4])
        while hidden.numel():
            first = hidden.double() @ w1.view(-1, d, d).mT + b1.view(-1, 1, d)
            second = first.relu() @ w2.view(-1, d, d).mT + b2.view(-1, 1, d)
            near = (torch.cat((first, second), -1).abs() < 4e-6).any(-1)
            if not near.any():
                return
            hidden[near] = torch.randn_like(hidden[near])

    def cotangent(self) -> list[Tensor]:
        if self.layout == "permuted":
            return [torch.randn(*self.lead[1::-1], *self.lead[2:], 4).transpose(0, 1)]
        if self.layout == "columns":
            return [torch.randn(4).expand(*self.lead, 4)]
        return [torch.randn(*self.lead, 4)]

    def ours(self, *inputs: Tensor) -> Tensor:
        return ops.refine_boxes(*inputs, eps=self.eps, recompute=self.recompute)

    def specification(self, *inputs: Tensor) -> Tensor:
        if self.layered:
            return torch.stack([reference.refine_boxes(*xs, eps=self.eps) for xs in zip(*inputs, strict=True)])
        return reference.refine_boxes(*inputs, eps=self.eps)


def check(case: RefinementCase) -> None:
    inputs, cotangent = case.inputs(), case.cotangent()
    with ops.backend("triton"):
        actual = outputs_and_gradients(case.ours, inputs, cotangent)
    assert actual["out0"].dtype == torch.float32
    assert_as_specified(actual, case.specification, inputs, cotangent, interpreted=inputs["boxes"].device.type == "cpu")


HALVES = (torch.float16, torch.bfloat16)
CASES = [
    RefinementCase(),
    *(RefinementCase(lead=(q,)) for q in (0, 1, 37, 301)),
    RefinementCase(lead=(2, 300), d=256),
    RefinementCase(lead=(0, 7)),
    RefinementCase(lead=()),
    RefinementCase(lead=(3, 2, 5)),
    *(RefinementCase(d=d) for d in (1, 8, 37, 96, 300)),
    RefinementCase(coords=2),
    RefinementCase(coords=2, eps=1e-5, lead=(37,)),
    RefinementCase(layered=True, lead=(3, 2, 19)),
    RefinementCase(layered=True, lead=(2, 0)),
    RefinementCase(layered=True, lead=(3, 7), coords=2, recompute=True),
    RefinementCase(recompute=True),
    *(RefinementCase(layout=layout, lead=(3, 5)) for layout in ("permuted", "sliced", "columns")),
    *(RefinementCase(dtype=dtype) for dtype in HALVES),
    *(RefinementCase(dtype=dtype, weight_dtype=torch.float32, recompute=True) for dtype in HALVES),
    RefinementCase(weight_dtype=torch.bfloat16, layered=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("case", [*CASES, RefinementCase(lead=(6, 8, 300), d=256)], ids=str)
def test_forward_and_gradients_on_a_gpu(case, dtype, fp32_precision):
    with torch.device("cuda"):
        check(replace(case, dtype=dtype))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("d", (16, 37, 96, 256, 512))
@pytest.mark.parametrize("queries", (0, 1, 7, 37, 300, 301))
def test_forward_and_gradients_over_the_matrix(queries, d, dtype):
    variants = itertools.cycle(((4, 1e-3, False), (2, 1e-5, True), (4, 1e-5, True), (2, 1e-3, False)))
    for layout, (coords, eps, layered) in zip(("dense", "permuted", "sliced", "columns"), variants, strict=False):
        check(RefinementCase((2, queries), d, coords, eps, layered, dtype, recompute=coords == 2, layout=layout))


@pytest.mark.sweep
def test_large_call():
    """More rows per program than a small call gives it."""
    check(RefinementCase(lead=(2100,), d=16))


@pytest.mark.parametrize("names", (["hidden"], ["boxes"], ["w1"], ["b3"], ["hidden", "w2"], ["boxes", "b1", "w3"]))
def test_only_what_is_needed(names):
    case = RefinementCase()
    inputs, cotangent = case.inputs(), case.cotangent()[0]

    def gradients(function, dtype=None):
        leaves = {k: x.detach().to(dtype or x.dtype).requires_grad_(k in names) for k, x in inputs.items()}
        out = function(*leaves.values())
        return dict(zip(names, torch.autograd.grad(out, [leaves[k] for k in names], cotangent.to(out)), strict=True))

    with ops.backend("triton"):
        actual = gradients(case.ours)
    assert_accurate(actual, gradients(case.specification, torch.float64), gradients(case.specification))


def test_directional_finite_difference():
    case = RefinementCase(d=16, lead=(5,))
    inputs, (cotangent,) = case.inputs(), case.cotangent()
    inputs["boxes"] = torch.rand(5, 4) * 0.8 + 0.1
    step = 1e-4  # so small that no relu changes sides
    with ops.backend("triton"):
        gradients = outputs_and_gradients(case.ours, inputs, [cotangent])
        for name, x in inputs.items():
            direction = torch.randn_like(x)
            up, down = (
                (case.ours(*{**inputs, name: x + h * direction}.values()).double() * cotangent).sum()
                for h in (step, -step)
            )
            # 20 float32 results near 0.5, each 3e-8 off, over a step of 2e-4.
            expected = (gradients[f"d_{name}"] * direction).sum().double()
            torch.testing.assert_close((up - down) / (2 * step), expected, rtol=1e-2, atol=1e-2)


def test_same_bits_in_every_run():
    case = RefinementCase(lead=(2, 37))
    inputs, cotangent = case.inputs(), case.cotangent()
    with ops.backend("triton"):
        first, second = (outputs_and_gradients(case.ours, inputs, cotangent) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recompute_changes_no_bit_and_keeps_no_activation():
    inputs, cotangent = RefinementCase().inputs(), RefinementCase().cotangent()

    def kept(case: RefinementCase) -> tuple[dict[str, Tensor], int]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
            results = outputs_and_gradients(case.ours, inputs, cotangent)
        return results, shapes.count(inputs["hidden"].shape)

    with ops.backend("triton"):
        (first, kept_first), (second, kept_second) = kept(RefinementCase()), kept(RefinementCase(recompute=True))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (kept_first, kept_second) == (3, 1)  # hidden itself and what the two relus give; hidden


@pytest.mark.parametrize("layered", (False, True))
def test_recompute_in_plain_pytorch(layered):
    case = RefinementCase(recompute=True, layered=layered)
    inputs, cotangent = case.inputs(), case.cotangent()
    with ops.backend("torch"):
        first = outputs_and_gradients(case.ours, inputs, cotangent)
    second = outputs_and_gradients(case.specification, inputs, cotangent)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", HALVES)
def test_anchors_stay_exact_in_half_precision(dtype):
    """With weights of zero the refined box is the old one, to float32's accuracy whatever the dtype of hidden."""
    inputs = RefinementCase(d=16, dtype=dtype).inputs()
    boxes = torch.rand(2, 7, 4) * 0.9 + 0.05
    with ops.backend("triton"):
        refined = ops.refine_boxes(inputs["hidden"], boxes, *(0 * inputs[name] for name in WEIGHTS), eps=1e-3)
    torch.testing.assert_close(refined, boxes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ("hidden", "boxes", "w1", "w2", "b3"))
def test_not_a_number_stays_one(name):
    """The boxes of a diverged model must not look sound, nor must its gradients."""
    inputs = RefinementCase(lead=(3,), d=16).inputs()
    inputs[name].view(-1)[0] = float("nan")
    results = []
    for backend in ("torch", "triton"):
        with ops.backend(backend):
            results.append(outputs_and_gradients(RefinementCase(d=16).ours, inputs, [torch.ones(3, 4)]))
    theirs, ours = results
    for key, x in theirs.items():
        assert ours[key][x.isnan()].isnan().all(), key


def test_too_wide_for_the_kernels():
    case = RefinementCase(d=513, lead=(1,))
    inputs = case.inputs()
    with ops.backend("triton"), pytest.raises(ops.BackendUnavailable, match="at most 512 wide, got 513"):
        case.ours(*inputs.values())
    assert case.ours(*inputs.values()).shape == (1, 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": None}, TypeError, "hidden must be a Tensor, got NoneType"),
        (
            {"boxes": torch.rand(2, 7, 3)},
            ValueError,
            r"boxes must have shape \[..., 2\] or \[..., 4\], got \[2, 7, 3\]",
        ),
        ({"boxes": torch.rand(7, 4)}, ValueError, r"boxes must have shape \[2, 7, ...\], got \[7, 4\]"),
        ({"w2": torch.rand(32, 16)}, ValueError, r"w2 must have shape \[32, 32\], got \[32, 16\]"),
        ({"w1": torch.rand(3, 32, 32)}, ValueError, r"w1 must have shape \[2, 32, 32\], got \[3, 32, 32\]"),
        ({"b3": torch.rand(2)}, ValueError, r"b3 must have shape \[4\], got \[2\]"),
        ({"b1": torch.zeros(32).int()}, TypeError, "b1 must be floating point, got torch.int32"),
    ],
)
def test_errors_say_what_must_hold_and_what_came(change, error, message):
    with pytest.raises(error, match=message):
        RefinementCase().ours(*{**RefinementCase().inputs(), **change}.values())


def test_eps_out_of_range():
    with pytest.raises(ValueError, match=r"eps must be in \(0, 0.5\), got 0.5"):
        ops.refine_boxes(*RefinementCase().inputs().values(), eps=0.5)
