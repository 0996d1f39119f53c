"""The accuracy rule itself, and that tests, selftest and benchmarks all see a gradient that is wrong by 1 %."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from dab_fast import accuracy, ops, validation
from dab_fast.accuracy import outputs_and_gradients
from dab_fast.bench.cases import BenchmarkCase, measure_case
from dab_fast.bench.workloads import TINY, Shape
from dab_fast.ops import _backends
from dab_fast.ops._examples import examples
from tests.support.accuracy import assert_accurate, assert_as_specified

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXAMPLES = pytest.mark.parametrize("op, variant", [(x.op, x.variant) for x in examples()])


def the_example(op, variant, seed=0):
    return next(x for x in examples(op, seed) if x.variant == variant)


def check(example, backend, dtype):
    inputs = example.rounded(dtype)
    with ops.backend(backend):
        found = outputs_and_gradients(example.positional(example.call), inputs)
    specification = example.positional(example.specification)
    assert_as_specified(found, specification, inputs, interpreted=backend == "triton")


@EXAMPLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", _backends.BACKENDS)
def test_every_example_on_every_backend(backend, op, variant, dtype, request):
    if reason := _backends.why_not(backend, op, CPU):
        pytest.skip(reason)
    check(the_example(op, variant, request.config.getoption("seed")), backend, dtype)


@EXAMPLES
@pytest.mark.parametrize("special", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("backend", _backends.BACKENDS)
def test_what_is_not_finite_stays_so(backend, op, variant, special):
    """Or a guard that stops where a loss is not finite would pass, and a step make every parameter NaN.

    There are no masks here: what is hidden may go unread.
    """
    if reason := _backends.why_not(backend, op, CPU):
        pytest.skip(reason)
    example = the_example(op, variant)
    for name in (name for name, x in example.inputs.items() if x.is_floating_point()):
        given = example.rounded(torch.float32)
        inputs = {key: x.clone() if x.is_floating_point() else None for key, x in given.items()}
        inputs[name].view(-1)[-1] = special  # of attention a key that fills no vector
        with ops.backend(backend):
            ours = outputs_and_gradients(example.positional(example.call), inputs)
        theirs = outputs_and_gradients(example.positional(example.specification), inputs)
        for key, x in theirs.items():
            if key.startswith("d_"):
                # Infinity times zero in another order, or NaN where the specification clamps, is not hidden either.
                assert not ours[key][~x.isfinite()].isfinite().any(), f"{name}: {key}"
            else:
                same = dict(rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(*(torch.where(y.isfinite(), 0, y) for y in (ours[key], x)), **same)


OP, VARIANT = "modulated_cross_attention", "two parts, padded"
PADDED = Shape(batch=2, queries=9, height=6, width=7, padded=True)
NAMES = ("q_content", "q_pos", "k_content", "k_pos", "v")


@pytest.fixture
def verdicts(monkeypatch):
    """What the three say of the Triton backend's attention with padding, in float16: whether it is right."""

    def ask() -> dict[str, bool]:
        example = the_example(OP, VARIANT)
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(validation, "examples", lambda: [example])
            patch.setattr(validation, "DTYPES", [torch.float16])
            selftest = validation.run(CPU, said.append)
        failed = [line for line in said if line.startswith("FAIL") and OP in line]
        assert all("triton" in line for line in failed) and selftest == (not failed)
        case = BenchmarkCase(OP, "both", PADDED, "fp16", TINY, without=("compile", "compile_max", "flex", "sdpa"))
        rows = {row["provider"]: row for row in measure_case(case, CPU, rounds=1).rows}
        assert rows["torch"]["accurate"]
        return {"test": passes(example), "selftest": selftest, "benchmark": rows["triton"]["accurate"]}

    return ask


def passes(example) -> bool:
    try:
        check(example, "triton", torch.float16)
    except AssertionError:
        return False
    return True


def test_what_is_right_passes_everywhere(verdicts):
    assert verdicts() == {"test": True, "selftest": True, "benchmark": True}


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_wrong_by_a_hundredth_fails_everywhere(name, verdicts, monkeypatch):
    right = _backends.implementation("triton", f"{OP}_backward")

    def wrong(*args):
        gradients = list(right(*args))
        assert len(gradients) == len(NAMES)
        gradients[NAMES.index(name)] *= 1.01
        return gradients

    monkeypatch.setitem(_backends._implementations, ("triton", f"{OP}_backward"), wrong)
    assert verdicts() == {"test": False, "selftest": False, "benchmark": False}


@pytest.mark.parametrize("factor", (0.8, 1.2))
@pytest.mark.parametrize("terms, variance", [(100, accuracy.TERM_VARIANCE * 100**2), (1e-2, accuracy.SUM_VARIANCE)])
def test_the_floor_is_that_of_a_sum(terms, variance, factor):
    """Whose terms may cancel: what is left of a hundred is one here. Or which all have one sign. PyTorch is right."""
    truth, u = torch.ones(1, dtype=torch.float64), torch.finfo(torch.float32).eps / 2
    ours = truth + factor * u * (1 + accuracy.DEVIATIONS * math.sqrt(variance))
    with nullcontext() if factor < 1 else pytest.raises(AssertionError, match="allowed"):
        assert_accurate({"x": ours.float()}, {"x": truth}, {"x": truth.float()}, {"x": terms * truth})


def test_one_wrong_element_and_one_wrong_factor_are_both_seen():
    truth = {"x": torch.rand(300, 256, dtype=torch.float64) + 1}
    own = {"x": truth["x"].bfloat16()}
    assert_accurate(own, truth, own)
    one = {"x": own["x"].clone()}
    one["x"][17, 3] *= 1.05
    for wrong in (one, {"x": (1.01 * truth["x"]).bfloat16()}, {"x": own["x"] * torch.nan}):
        with pytest.raises(AssertionError, match="x: error"):
            assert_accurate(wrong, truth, own)


def test_the_root_of_the_squares_of_a_gradients_terms():
    weights, d_out = torch.randn(1000).double(), torch.randn(64, 1000).double()
    found = accuracy.root_of_squares(lambda x: x[:, None] * weights, {"x": torch.ones(64).double()}, [d_out])
    # Every sum of eight squares is right within some 1 / sqrt(4) of itself, and so are sixty-four within 1 / 16.
    assert found["d_x"].norm().item() == pytest.approx((d_out * weights).norm().item(), rel=0.2)


def test_random_numbers_do_not_hang_on_the_default_device():
    """Which a test on a GPU makes the GPU."""
    x = torch.ones(3, dtype=torch.float64)
    expected = accuracy.root_of_squares(torch.sin, {"x": x}), accuracy.cotangents((x,))
    with torch.device("meta"):
        found = accuracy.root_of_squares(torch.sin, {"x": x}), accuracy.cotangents((x,))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_negligible_gradient_is_compared_with_the_largest():
    exact = {"weight": torch.ones(4), "key_bias": torch.zeros(4), "unused": None}
    found = accuracy.gradient_errors({"weight": torch.ones(4), "key_bias": torch.full((4,), 1e-8)}, exact)
    assert found.keys() == {"weight", "key_bias"}
    assert found["weight"] == 0 and found["key_bias"] == pytest.approx(1e-5)
