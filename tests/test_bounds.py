"""Gradients where a clamp's input is exactly a bound: the installed torch's rule, and both rules that torch has had."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dab_fast import ops, precision
from dab_fast.accuracy import outputs_and_gradients
from dab_fast.backends.native._extension import extension_problem

FLOAT16_MAX = torch.finfo(torch.float16).max
NATIVE = pytest.mark.skipif(bool(extension_problem()), reason=extension_problem())
PASSES = {"this torch": None, "bounds pass": True, "bounds do not pass": False}
PLACES = (
    pytest.param(("native", "cpu"), marks=NATIVE, id="native"),
    pytest.param(("native", "cuda emulated"), marks=NATIVE, id="native-cuda emulated"),
    pytest.param(("native", "cuda"), marks=(NATIVE, pytest.mark.gpu), id="native-cuda"),
    pytest.param(("triton", "cpu"), id="triton"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="triton-cuda"),
)


@pytest.fixture(params=list(PASSES.values()), ids=list(PASSES))
def passes(request, monkeypatch):
    """Whether bounds pass the gradient, with the kernels told so where it is not for the installed torch to say."""
    if request.param is None:
        return precision.clamp_passes_at_bounds()
    monkeypatch.setattr(precision, "clamp_passes_at_bounds", lambda: request.param)
    return request.param


@pytest.fixture(params=PLACES)
def device(request):
    """Of the tensors, where the kernels are the backend."""
    backend, device = request.param
    emulated = device == "cuda emulated"
    with (
        request.getfixturevalue("cuda_on_cpu").instead_of_cpu() if emulated else nullcontext(),
        ops.backend(backend),
    ):
        yield "cpu" if emulated else device


def clamp(x: Tensor, low: float, high: float, passes: bool) -> Tensor:
    """x.clamp(low, high), whose gradient at the bounds is as `passes` says."""
    inside = (low <= x) & (x <= high) if passes else (low < x) & (x < high)
    return torch.where(inside, x, x.detach().clamp(low, high))


def inverse_sigmoid(x: Tensor, eps: float, passes: bool) -> Tensor:
    x = clamp(x, 0, 1, passes)
    return torch.log(clamp(x, eps, torch.inf, passes) / clamp(1 - x, eps, torch.inf, passes))


def around(*bounds: float, device: str) -> Tensor:
    """The bounds, and the nearest float32 numbers on both sides of each."""
    x = torch.tensor([-0.0, *bounds], device=device)
    infinity = torch.full_like(x, torch.inf)
    return torch.cat((x, x.nextafter(infinity), x.nextafter(-infinity)))


def refined_without_mlp(boxes: Tensor, eps: float) -> Tensor:
    hidden = torch.zeros(len(boxes), 16, device=boxes.device)
    weights = [hidden.new_zeros(shape) for shape in ((16, 16), (16,), (16, 16), (16,), (4, 16), (4,))]
    return ops.refine_boxes(hidden, boxes, *weights, eps=eps)


def check_boxes(eps: float, passes: bool, device: str) -> None:
    boxes = around(0, 1, eps, 1 - eps, device=device)[:, None].repeat(1, 4)
    cotangent = [torch.rand(len(boxes), 4, device=device) + 0.5]
    ours = outputs_and_gradients(lambda boxes: refined_without_mlp(boxes, eps), {"boxes": boxes}, cotangent)
    expected = outputs_and_gradients(
        lambda boxes: inverse_sigmoid(boxes, eps, passes).sigmoid(), {"boxes": boxes}, cotangent
    )
    # d sigmoid is y (1 - y), and y, which is off by a rounding of log and one of its own, may be as near to 1 as eps.
    torch.testing.assert_close(ours["d_boxes"], expected["d_boxes"], rtol=4 * 2**-24 / eps, atol=0)


@pytest.mark.parametrize("eps", (2**-10, 1e-3, 1e-5))
def test_a_box_at_a_bound_of_the_inverse_sigmoid(eps, passes, device):
    check_boxes(eps, passes, device)


def check_saturation(passes: bool, device: str) -> None:
    """With a coordinate of 0 the cosine is 1, and that half of the query's embedding is the scale itself."""
    values = around(FLOAT16_MAX, -FLOAT16_MAX, 1.0, device=device)
    scale = values[:, None].repeat(1, 4)
    boxes = torch.zeros(len(scale), 2, device=device)
    cotangent = torch.rand(len(scale), 4, device=device).half()
    ours = outputs_and_gradients(
        lambda scale: ops.box_position_embed(boxes, scale, num_feats=2, dtype=torch.float16)[1],
        {"scale": scale},
        [cotangent],
    )
    of_ones = outputs_and_gradients(
        lambda x: clamp(x, -FLOAT16_MAX, FLOAT16_MAX, passes), {"x": scale}, [torch.ones_like(scale)]
    )
    expected = of_ones["d_x"] * cotangent.float()
    assert torch.equal(ours["d_scale"][:, 1::2], expected[:, 1::2])


def test_a_result_at_the_largest_number_of_float16(passes, device):
    check_saturation(passes, device)


@pytest.mark.parametrize("eps", (2**-10, 1e-3, 1e-5))
def test_plain_pytorch_follows_the_installed_torch(eps):
    """One answer of the probe serves every bound: of a clamp with one bound and with two, low and high."""
    passes = precision.clamp_passes_at_bounds()
    with ops.backend("torch"):
        check_boxes(eps, passes, "cpu")
        check_saturation(passes, "cpu")


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Nothing(TorchDispatchMode):
    """No op runs here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(func)


@pytest.mark.parametrize(
    "mode",
    (
        torch.no_grad,
        torch.inference_mode,
        FakeTensorMode,
        Nothing,
        lambda: torch.device("meta"),
        lambda: default_device("meta"),
        lambda: default_dtype(torch.float16),
    ),
)
def test_no_mode_of_the_caller_changes_the_answer(mode):
    expected = precision.clamp_passes_at_bounds()
    with mode():
        assert precision.clamp_passes_at_bounds.__wrapped__() == expected


@pytest.mark.parametrize("transform", (torch.func.vmap, torch.func.grad))
def test_no_transform_changes_the_answer(transform):
    expected, found = precision.clamp_passes_at_bounds(), []

    def function(x: Tensor) -> Tensor:
        found.append(precision.clamp_passes_at_bounds.__wrapped__())
        return x.sum()

    transform(function)(torch.zeros(2))
    assert found == [expected]


def test_the_first_question_may_come_from_compiled_code(device):
    precision.clamp_passes_at_bounds.cache_clear()
    boxes = torch.tensor([[0.0, 1.0, 2**-10, 1 - 2**-10]], device=device)

    def function(boxes):
        return refined_without_mlp(boxes, 2**-10)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    d_boxes, expected = (
        outputs_and_gradients(f, {"boxes": boxes}, [torch.ones(1, 4, device=device)])["d_boxes"]
        for f in (compiled, function)
    )
    assert torch.equal(d_boxes, expected) and d_boxes.any()


def test_compiled_code_does_not_ask_whether_a_device_has_autocast(monkeypatch):
    """torch 2.11 cannot trace the question; here it is one that no torch can."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: os.getpid() > 0)
    function = torch.compile(lambda x: x + precision.autocast_on(x), backend="eager", fullgraph=True)
    assert function(torch.zeros(2)).tolist() == [0, 0]
    with torch.autocast("cpu"):
        assert function(torch.zeros(2)).tolist() == [1, 1]
