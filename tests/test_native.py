"""The kernels of the extension against the specification in float64, with every gradient."""

import itertools

import pytest
import torch

from dab_fast import ops, precision, reference
from dab_fast.accuracy import outputs_and_gradients
from dab_fast.backends.native._extension import extension_problem

if problem := extension_problem():
    if "is not built" not in problem:
        raise ImportError(problem)
    pytest.skip(problem, allow_module_level=True)

from dab_fast.backends.native import _call
from dab_fast.backends.native import box_position_embed as native_embed
from dab_fast.backends.native import refine_boxes as native_refine
from dab_fast.backends.native._call import C
from tests.support.accuracy import assert_as_specified


@pytest.fixture(params=["cpu", "cuda emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Of the tensors; for "cuda emulated" the CPU, where the CUDA kernels run instead of the loops."""
    if request.param != "cuda emulated":
        yield request.param
        return
    with request.getfixturevalue("cuda_on_cpu").instead_of_cpu():
        yield "cpu"


def shifted(x):
    """x at an address that no vector access can use."""
    return torch.nn.functional.pad(x, (1, 15))[..., 1:-15]


def wider(x):
    """x with strides that no vector access can use."""
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


def as_it_is(x):
    return x


def numbered(inputs):
    return {str(i): x for i, x in enumerate(inputs)}


def compare(function, specification, inputs, shapes, double_arguments=None, place=as_it_is):
    """`place` lays out the gradients of the results."""
    d_results = [torch.randn(shape, dtype=torch.float64, device=inputs[0].device) for shape in shapes]
    ours = outputs_and_gradients(function, numbered(inputs), d_results, place=place)
    assert all(torch.isfinite(x).all() for x in ours.values())
    assert_as_specified(ours, specification, numbered(inputs), d_results, in_float64=double_arguments)


def some_boxes(*shape, dtype=torch.float32, device="cpu"):
    return (torch.rand(shape) * 0.9 + 0.05).to(device, dtype)


LAYOUTS = {
    "contiguous": lambda make: make(2, 7),
    "query_first": lambda make: make(7, 2).transpose(0, 1),
    "one_row": lambda make: make(1, 1),
    "no_leading_dimension": lambda make: make(),
    "expanded": lambda make: make(1, 7).expand(3, 7, -1),
    "five_dimensions": lambda make: make(2, 1, 3, 2, 2).transpose(1, 3),
    "apart_columns": lambda make: make(2, 7).mT.contiguous().mT,
    "sliced": lambda make: torch.cat((make(2, 14), make(2, 14)), -1)[:, ::2, : make(1, 1).shape[-1]],
    "shifted": lambda make: shifted(make(2, 7)),
    "wider": lambda make: wider(make(2, 7)),
}
OF_GRADIENTS = {"shifted": shifted, "wider": wider}


@pytest.mark.parametrize("order, n", [("yxwh", 4), ("xywh", 4), ("yxwh", 2), ("xywh", 2)])
@pytest.mark.parametrize("kind", [None, "per_element", "per_box", "shared", "number"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),  # as under autocast
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_box_position_embed(dtypes, kind, order, n, device):
    boxes_dtype, scale_dtype, dtype = dtypes
    feats = 24  # 3 vectors of 8, less than a warp has lanes
    shapes = {"per_element": (2, 7, 2 * feats), "per_box": (2, 7, 1), "shared": (2 * feats,), "number": (1,)}
    scale = torch.randn(shapes[kind], device=device).to(scale_dtype) if kind else None
    logits = torch.randn(2, 7, 2, device=device).to(scale_dtype) if n == 4 else None
    boxes = some_boxes(2, 7, n, dtype=boxes_dtype, device=device)
    if dtype == torch.float64 and _call.on_cuda(boxes):
        pytest.skip("the CUDA kernels compute in float32")

    def run(function, dtype):
        return lambda *tensors: function(*tensors, num_feats=feats, order=order, dtype=dtype)

    with ops.backend("native"):
        compare(
            run(ops.box_position_embed, dtype),
            run(reference.box_position_embed, dtype),
            (boxes, scale, logits),
            ((2, 7, n * feats), (2, 7, 2 * feats)),
            run(reference.box_position_embed, torch.float64),
        )


@pytest.mark.parametrize("feats", [2, 6, 128, 510, 512])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_width(layout, feats, device):
    if feats != 128 and layout not in ("contiguous", "query_first", "sliced", "shifted", "wider"):
        pytest.skip("once is enough")
    boxes = LAYOUTS[layout](lambda *shape: some_boxes(*shape, 4, device=device))
    scale = LAYOUTS[layout](lambda *shape: torch.randn(*shape, 2 * feats, device=device))
    logits = LAYOUTS[layout](lambda *shape: torch.randn(*shape, 2, device=device))
    for temperature in (10000.0, 20.0):
        options = {"num_feats": feats, "temperature": temperature}
        sine, query = reference.box_position_embed(boxes, scale, logits, **options)
        with ops.backend("native"):
            compare(
                lambda *tensors, o=options: ops.box_position_embed(*tensors, **o),
                lambda *tensors, o=options: reference.box_position_embed(*tensors, **o),
                (boxes, scale, logits),
                (sine.shape, query.shape),
                place=OF_GRADIENTS.get(layout, as_it_is),
            )


@pytest.mark.parametrize("n", [1, 2, 4])
def test_sine_embed(n, device):
    boxes = some_boxes(3, 5, n, device=device)
    options = {"num_feats": 16, "temperature": 20.0, "order": "xywh"}
    with ops.backend("native"):
        compare(
            lambda x: ops.sine_embed(x, **options),
            lambda x: reference.sine_embed(x, **options),
            (boxes,),
            ((3, 5, 16 * n),),
        )


@pytest.mark.parametrize("used", ["sine", "query_sine"])
def test_one_result_unused(used, device):
    boxes, scale, logits = some_boxes(2, 3, 4), torch.randn(2, 3, 16), torch.randn(2, 3, 2)
    pick = 0 if used == "sine" else 1
    grads = []
    for name in ("native", "torch"):
        leaves = [x.to(device).requires_grad_() for x in (boxes.clone(), scale.clone(), logits.clone())]
        with ops.backend(name):
            ops.box_position_embed(*leaves, num_feats=8)[pick].square().sum().backward()
        grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    torch.testing.assert_close(*grads)


def test_a_size_of_zero_spoils_no_gradient_where_the_modulation_is_not_used(device):
    boxes = some_boxes(2, 3, 4, device=device)
    boxes[..., 2] = 0
    scale, logits = torch.randn(2, 3, 16, device=device), torch.randn(2, 3, 2, device=device)
    found = native_embed.backward(
        torch.randn(2, 3, 32, device=device), None, boxes, scale, logits, 8, 1e4, "yxwh", [True] * 3
    )
    assert torch.isfinite(found[0]).all() and not found[1].any() and not found[2].any()


def subsets(count):
    return itertools.product((False, True), repeat=count)


@pytest.mark.parametrize("kind", ["per_element", "per_box", "shared"])
def test_any_choice_of_gradients_of_the_embedding(kind, device):
    shape = {"per_element": (2, 3, 24), "per_box": (2, 3, 1), "shared": (24,)}[kind]
    boxes, scale, logits = some_boxes(2, 3, 4, device=device), torch.randn(shape, device=device), torch.randn(2, 3, 2)
    inputs = (torch.randn(2, 3, 48).to(device), torch.randn(2, 3, 24).to(device), boxes, scale, logits.to(device))
    every = native_embed.backward(*inputs, 12, 1e4, "yxwh", [True] * 3)
    for needs in subsets(3):
        some = native_embed.backward(*inputs, 12, 1e4, "yxwh", list(needs))
        assert all(map(torch.equal, some, itertools.compress(every, needs))) and len(some) == sum(needs)


def test_no_rows(device):
    boxes, row = torch.empty(0, 3, 4, device=device), torch.randn(16, device=device)
    leaves = [x.requires_grad_() for x in (boxes, row)]
    with ops.backend("native"):
        sine, query = ops.box_position_embed(*leaves, num_feats=8)
        (sine.sum() + query.sum()).backward()
    assert sine.shape == (0, 3, 32) and query.shape == (0, 3, 16)
    assert boxes.grad.shape == (0, 3, 4) and torch.equal(row.grad, torch.zeros_like(row))


def test_half_precision_saturates_where_float32_is_finite(device):
    boxes = torch.full((1, 4, 4), 0.3, device=device)
    boxes[..., 2:] = torch.tensor([1e-6, 1e-20, 1e-30, 0.5], device=device)[:, None]
    scale, logits = torch.randn(1, 4, 16, device=device), torch.randn(1, 4, 2, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in (boxes, scale, logits)]
        theirs = [x.clone().requires_grad_() for x in (boxes, scale, logits)]
        with ops.backend("native"):
            _, query = ops.box_position_embed(*leaves, num_feats=8, dtype=dtype)
        _, spec = reference.box_position_embed(*theirs, num_feats=8, dtype=dtype)
        assert torch.isfinite(query).all()
        torch.testing.assert_close(query, spec)
        query[:, ::3].sum().backward()
        spec[:, ::3].sum().backward()
        # Where a result saturates its gradient is zero, as through the clamp of the specification; there 1 / size^2
        # overflows on the way to the gradient of size.
        for x, y in zip(leaves, theirs, strict=True):
            finite = torch.isfinite(y.grad)
            assert finite[..., :2].all()
            torch.testing.assert_close(x.grad[finite], y.grad[finite], rtol=1e-4, atol=1e-6)
            assert torch.isfinite(x.grad).all() or dtype != torch.float16


def test_accuracy_of_sin_and_cos(device):
    """Of the exact function of the coordinate, far outside (0, 1) too; the first wavelength is 1."""
    bound = 1.7 if C.cpu_isa() == "portable" else 1.2  # geometry.h
    spread = torch.cat((torch.linspace(-1, 2, 200_001), torch.randn(50_000) * 1e4, torch.logspace(-30, 6, 50_000)))
    spread = spread.to(device)
    sine = native_embed.forward(spread[:, None], None, None, 2, 1e4, "xywh", torch.float32, False)[0]
    turn = spread.double() - spread.double().round()  # exact
    for ours, exact in ((sine[:, 0], (turn * 2 * torch.pi).sin()), (sine[:, 1], (turn * 2 * torch.pi).cos())):
        # sin and cos of float64 2*pi*turn are off by up to 4e-16: where that matters, compare absolutely.
        ulp = 2.0 ** (exact.abs().clamp_min(1e-9).log2().floor() - 23)
        assert ((ours.double() - exact).abs() / ulp).max() < bound
        assert (ours.abs() <= 1).all()
    special = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], device=device)
    assert native_embed.forward(special, None, None, 2, 1e4, "xywh", torch.float32, False)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read_and_rounded_as_torch_does(dtype, device):
    """With a coordinate of 0 the cosine is 1, and the query's embedding is the scale itself."""
    boxes = torch.zeros(1 << 16, 2, device=device)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).to(device)

    def through(scale, result):
        scale = scale[:, None].expand(-1, 4).contiguous()
        return native_embed.forward(boxes[: len(scale)], scale, None, 2, 1e4, "xywh", result, True)[1][:, 1]

    torch.testing.assert_close(through(every, torch.float32), every.float(), rtol=0, atol=0, equal_nan=True)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).to(device, torch.int32).view(torch.float32)
    halfway = ((every[:-1].double() + every[1:].double()) / 2).float()
    numbers = torch.cat((bits, halfway, halfway.nextafter(torch.tensor(torch.inf, device=device))))
    expected = numbers
    if dtype == torch.float16:
        expected = expected.clamp(-65504, 65504)  # results saturate
    for chunk, want in zip(numbers.split(1 << 15), expected.split(1 << 15), strict=True):
        torch.testing.assert_close(through(chunk, dtype), want.to(dtype), rtol=0, atol=0, equal_nan=True)


MLP_DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]


def mlp(dtype, d, *lead, device="cpu"):
    weights = [torch.randn(*lead, *shape) / d**0.5 for shape in ((d, d), (d,), (d, d), (d,), (4, d), (4,))]
    return [x.to(device, dtype) for x in weights]


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("d, n", [(32, 4), (32, 2), (20, 4), (600, 4)])
@pytest.mark.parametrize("dtypes", MLP_DTYPES, ids=str)
def test_refine_boxes_kernels(dtypes, d, n, layers, device):
    """Forward and backward as the op calls them; boxes in, at and beyond every bound of the inverse sigmoid."""
    hidden_dtype, weight_dtype = dtypes
    eps = 2**-10  # a number of every dtype, so that a box of eps is at the bound in float64, too
    shape = (*([layers] if layers else []), 2, 9)
    hidden = torch.randn(*shape, d, device=device).to(hidden_dtype)
    boxes = some_boxes(*shape, n, device=device)
    boxes.view(-1)[:9] = torch.tensor([0.0, 1.0, -0.1, 1.2, 1e-4, 1 - 1e-4, eps, 1 - eps, -0.0])
    weights = mlp(weight_dtype, d, *([layers] if layers else []), device=device)

    def specification(*tensors):
        if not layers:
            return reference.refine_boxes(*tensors, eps=eps)
        return torch.stack([reference.refine_boxes(*layer, eps=eps) for layer in zip(*tensors, strict=True)])

    inputs = (hidden, boxes, *weights)
    d_refined = torch.randn(*shape, 4, dtype=torch.float64, device=device)
    refined, h1, h2 = native_refine.forward(*inputs, eps, True)
    assert torch.equal(native_refine.forward(*inputs, eps, False)[0], refined)
    d_hidden, d_boxes, d_w1, d_w2, sums = native_refine.backward(
        d_refined.float(), refined, h1, h2, hidden, boxes, *weights[::2], eps, [True] * 3
    )
    d_w3, d_b1, d_b2, d_b3 = (
        x.reshape(w.shape).to(w.dtype)
        for x, w in zip(sums.split((4 * d, d, d, 4), -1), (weights[4], weights[1], weights[3], weights[5]), strict=True)
    )
    names = ("hidden", "boxes", "w1", "b1", "w2", "b2", "w3", "b3")
    found = dict(zip(names, (d_hidden, d_boxes, d_w1, d_b1, d_w2, d_b2, d_w3, d_b3), strict=True))
    assert_as_specified(
        {"out0": refined} | {f"d_{name}": g for name, g in found.items()},
        specification,
        dict(zip(names, inputs, strict=True)),
        [d_refined],
    )


@pytest.mark.parametrize("layers", [0, 2])
def test_any_choice_of_gradients_of_refine_boxes(layers, device):
    lead = [layers] if layers else []
    hidden, boxes = torch.randn(*lead, 5, 12, device=device), some_boxes(*lead, 5, 4, device=device)
    weights = mlp(torch.float32, 12, *lead, device=device)
    kept = native_refine.forward(hidden, boxes, *weights, 1e-3, True)
    inputs = (torch.randn(*lead, 5, 4, device=device), *kept, hidden, boxes, *weights[::2], 1e-3)
    every = native_refine.backward(*inputs, [True] * 3)
    for hidden_too, boxes_too, weights_too in subsets(3):
        some = native_refine.backward(*inputs, [hidden_too, boxes_too, weights_too])
        want = [
            *every[: 1 if hidden_too else 0],
            *every[1 : 2 if boxes_too else 1],
            *every[2 : 5 if weights_too else 2],
        ]
        assert len(some) == len(want) and all(map(torch.equal, some, want))


class Tail(torch.autograd.Function):
    """The box tail alone, of inputs in any dtype; as in the op, boxes and sums are at least float32."""

    @staticmethod
    def forward(ctx, h2, boxes, w3, b3):
        refined = precision.at_least_float32(h2).new_empty((*h2.shape[:-1], 4))
        native_refine._tail(h2, boxes, w3, b3, 1e-2, refined)
        ctx.save_for_backward(h2, boxes, w3, refined)
        return refined

    @staticmethod
    def backward(ctx, d_refined):
        h2, boxes, w3, refined = ctx.saved_tensors
        d = h2.shape[-1]
        d_h2, d_boxes, sums = h2.new_empty(h2.shape), boxes.new_empty(boxes.shape), refined.new_zeros(6 * d + 4)
        native_refine._tail_backward(d_refined, refined, h2, boxes, w3, 1e-2, d_h2, d_boxes, sums)
        return d_h2, d_boxes, sums[: 4 * d].view(4, d).to(w3.dtype), sums[6 * d :].to(w3.dtype)


def tail(h2, boxes, w3, b3):
    """What `Tail` computes, in plain PyTorch."""
    logits = torch.nn.functional.linear(*map(precision.at_least_float32, (h2, w3, b3)))
    n = boxes.shape[-1]
    moved = logits[..., :n] + reference.inverse_sigmoid(precision.at_least_float32(boxes), 1e-2)
    return torch.cat((moved, logits[..., n:]), -1).sigmoid()


@pytest.mark.parametrize("d", [12, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_layout_of_the_box_tail(dtype, layout, d, device):
    hidden = LAYOUTS[layout](lambda *shape: torch.randn(*shape, d, device=device).to(dtype))
    boxes = LAYOUTS[layout](lambda *shape: some_boxes(*shape, 4, dtype=dtype, device=device))
    weight = torch.randn(4, d, device=device).to(dtype) / d**0.5
    for w in (weight, shifted(weight), wider(weight), torch.cat((weight, weight), -1)[:, :d]):
        inputs = (hidden, boxes, w, torch.randn(4, device=device).to(dtype))
        compare(Tail.apply, tail, inputs, ((*hidden.shape[:-1], 4),), place=OF_GRADIENTS.get(layout, as_it_is))


@pytest.mark.parametrize("n", [2, 4])
def test_gradcheck_of_the_box_tail(n):
    """Inside, near both ends, and outside [0, 1]; never within a step of a bound, where there is no derivative."""
    h2, w3, b3 = torch.randn(6, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    boxes = torch.tensor([0.3, 0.005, 0.995, -0.2, 1.3, 0.8]).double()[:, None].repeat(1, n)
    inputs = [x.requires_grad_() for x in (h2, boxes, w3, b3)]
    assert torch.autograd.gradcheck(Tail.apply, inputs)


@pytest.mark.parametrize("order", ["yxwh", "xywh"])
@pytest.mark.parametrize("kind", ["per_element", "per_box", "shared"])
def test_gradcheck_of_the_embedding(kind, order):
    feats = 6
    shape = {"per_element": (2, 3, 2 * feats), "per_box": (2, 3, 1), "shared": (2 * feats,)}[kind]
    inputs = [some_boxes(2, 3, 4), torch.randn(shape), torch.randn(2, 3, 2)]
    inputs = [x.double().requires_grad_() for x in inputs]
    with ops.backend("native"):
        assert torch.autograd.gradcheck(
            lambda *tensors: ops.box_position_embed(*tensors, num_feats=feats, order=order), inputs
        )
