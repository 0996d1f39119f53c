"""The ops among PyTorch's own machinery: opcheck, torch.compile, export, autocast, checkpointing, torch.func."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dab_fast import ops, reference


def embed_inputs(queries: int = 5, feats: int = 8) -> tuple[Tensor, ...]:
    boxes = torch.rand(2, queries, 4) * 0.9 + 0.05
    return boxes, torch.randn(2, queries, 2 * feats), torch.randn(2, queries, 2)


def embed(boxes, scale, logits):
    return ops.box_position_embed(boxes, scale, logits, num_feats=8)


def refine_inputs(queries: int = 5, d: int = 16) -> tuple[Tensor, ...]:
    shapes = ((d, d), (d,), (d, d), (d,), (4, d), (4,))
    return torch.randn(2, queries, d), torch.rand(2, queries, 4), *(0.3 * torch.randn(shape) for shape in shapes)


def refine(*inputs):
    return ops.refine_boxes(*inputs, eps=1e-3)


def refine_again(*inputs):
    return ops.refine_boxes(*inputs, eps=1e-3, recompute=True)


OPS = pytest.mark.parametrize(
    "function, inputs",
    [(embed, embed_inputs), (refine, refine_inputs), (refine_again, refine_inputs)],
    ids=("box_position_embed", "refine_boxes", "refine_boxes-recompute"),
)


def evaluate(function, inputs):
    """Results and gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in inputs)]


@pytest.mark.parametrize("permuted", (False, True))
def test_opcheck_box_position_embed(permuted):
    inputs = embed_inputs()
    if permuted:
        inputs = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
    boxes, scale, _ = inputs
    args = (*inputs, 8, 1e4, "yxwh", torch.float16, True, "triton")
    torch.library.opcheck(torch.ops.dab_fast.box_position_embed.default, args)
    sine, query = embed(*inputs)
    for args in (
        (sine, query, *inputs, 8, 1e4, "yxwh", [True] * 3, "triton"),
        (None, query, boxes, scale[0, 0], None, 8, 1e4, "yxwh", [False, True, False], "triton"),
        (sine, None, boxes, None, None, 8, 1e4, "xywh", [True, False, False], "triton"),
    ):
        torch.library.opcheck(torch.ops.dab_fast.box_position_embed_backward.default, args)


@pytest.mark.parametrize("permuted", (False, True))
def test_opcheck_refine_boxes(permuted):
    hidden, boxes, w1, b1, w2, b2, w3, b3 = refine_inputs()
    if permuted:
        hidden, boxes = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (hidden, boxes))
    forward = torch.ops.dab_fast.refine_boxes.default
    for keep in (False, True):
        torch.library.opcheck(forward, (hidden, boxes, w1, b1, w2, b2, w3, b3, 1e-3, keep, "triton"))
    refined, h1, h2 = forward(hidden, boxes, w1, b1, w2, b2, w3, b3, 1e-3, True, "triton")
    for needs in ([True] * 3, [False, False, True], [True, False, False]):
        args = (torch.rand_like(refined), refined, h1, h2, hidden, boxes, w1, w2, w3, 1e-3, needs, "triton")
        torch.library.opcheck(torch.ops.dab_fast.refine_boxes_backward.default, args)


@OPS
def test_compile_full_graph_with_dynamic_shapes(function, inputs):
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with ops.backend("triton"):
        for queries in (5, 9):
            given = inputs(queries)
            torch.testing.assert_close(evaluate(compiled, given), evaluate(function, given), rtol=0, atol=0)


def test_compiled_code_follows_the_choice():
    given = embed_inputs()
    graphs = []

    def spy(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    compiled = torch.compile(embed, fullgraph=True, backend=spy)
    for name in ("triton", "torch"):
        with ops.backend(name), torch.no_grad():
            compiled(*given)
    assert ["dab_fast.box_position_embed.default" in graph for graph in graphs] == [True, False]


def test_compiled_code_says_what_a_named_backend_cannot():
    compiled = torch.compile(embed, fullgraph=True, backend="eager")
    with ops.backend("triton"), pytest.raises(Exception, match="its kernels compute in float32, got float64"):
        compiled(*(x.double() for x in embed_inputs()))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(refine_inputs()[2:])

    def forward(self, hidden: Tensor, boxes: Tensor) -> Tensor:  # [B, Q, 16], [B, Q, 4]
        sine, query = ops.box_position_embed(boxes, hidden, num_feats=8)
        return refine(sine[..., :16] + query, boxes, *self.weights)


def test_export_uses_plain_pytorch():
    hidden, boxes = refine_inputs()[:2]
    layer = Layer()
    with ops.backend("triton"):
        queries = torch.export.Dim("queries", max=1000)
        shapes = {"hidden": {1: queries}, "boxes": {1: queries}}
        program = torch.export.export(layer, (hidden, boxes), dynamic_shapes=shapes)
    assert all("dab_fast" not in str(node.target) for node in program.graph.nodes)
    hidden, boxes = refine_inputs(9)[:2]
    torch.testing.assert_close(program.module()(hidden, boxes), layer(hidden, boxes))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of the arguments are meant to be left out
def test_jit_trace_uses_plain_pytorch():
    hidden, boxes = refine_inputs()[:2]
    layer = Layer()
    with ops.backend("triton"):
        traced = torch.jit.trace(layer, (hidden, boxes))
    assert "dab_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(hidden, boxes), layer(hidden, boxes))


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@OPS
def test_autocast_leaves_geometry_in_float32(function, inputs, dtype, backend):
    """Under autocast the results and gradients are those without: no dot of these ops is taken to half precision."""
    given = inputs()

    def autocasted(*xs):
        with torch.autocast("cpu", dtype):
            return function(*xs)

    with ops.backend(backend):
        expected, actual = evaluate(function, given), evaluate(autocasted, given)
        if backend == "triton":  # a backward within the region, which PyTorch advises against, is the same too
            with torch.autocast("cpu", dtype):
                actual += evaluate(function, given)
                expected *= 2
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reentrant", (False, True))
@OPS
def test_checkpointing(function, inputs, reentrant):
    given = inputs()
    with ops.backend("triton"):
        expected = evaluate(function, given)
        actual = evaluate(lambda *xs: checkpoint(function, *xs, use_reentrant=reentrant), given)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@OPS
def test_backward_after_the_choice_changed(function, inputs):
    """A backward runs on the backend of its forward."""
    given = [x.requires_grad_() for x in inputs()]
    with ops.backend("triton"):
        outputs = function(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with ops.backend("torch"):
        sum(x.sum() for x in outputs).backward()
    assert all(x.grad.isfinite().all() for x in given)


def test_torch_func_in_plain_pytorch():
    boxes, scale, logits = embed_inputs()

    def loss(boxes, scale, logits):
        return embed(boxes, scale, logits)[1].sum()

    per_image = torch.vmap(torch.func.grad(loss))(boxes, scale, logits)
    boxes.requires_grad_()
    (expected,) = torch.autograd.grad(loss(boxes, scale, logits), boxes)
    torch.testing.assert_close(per_image, expected)
    with (
        ops.backend("triton"),
        pytest.raises(ops.BackendUnavailable, match=r"torch\.func and forward-mode AD need plain"),
    ):
        torch.func.grad(loss)(boxes.detach(), scale, logits)


def test_forward_mode_in_plain_pytorch():
    boxes, scale, logits = embed_inputs()
    tangent = torch.randn_like(boxes)

    def call(boxes):
        return embed(boxes, scale, logits)[1]

    with ops.backend("torch"):
        _, expected = torch.autograd.functional.jvp(call, boxes, tangent)  # by backward, twice
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(boxes, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(call(dual)).tangent, expected)
        with ops.backend("triton"), pytest.raises(ops.BackendUnavailable, match="forward-mode AD"):
            call(dual)


def test_compiled_code_notices_forward_mode():
    x, tangent = torch.rand(3, 4), torch.rand(3, 4)
    compiled = torch.compile(lambda x: ops.sine_embed(x, 16), backend="aot_eager")
    compiled(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got, want = (forward_ad.unpack_dual(f(dual, 16)).tangent for f in (lambda x, n: compiled(x), ops.sine_embed))
    torch.testing.assert_close(got, want)


def test_compiled_torch_func():
    boxes, scale, logits = embed_inputs()
    gradient = torch.func.grad(lambda boxes: embed(boxes, scale, logits)[1].sum())
    compiled = torch.compile(lambda boxes: gradient(boxes), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(boxes), gradient(boxes))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    given = embed_inputs(), refine_inputs()
    with ops.backend("triton"):
        real = [*embed(*given[0]), refine(*given[1])]
        with FakeTensorMode() as mode:
            fake = [
                *embed(*(mode.from_tensor(x) for x in given[0])),
                refine(*(mode.from_tensor(x) for x in given[1])),
            ]
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


def test_inference_mode():
    given = refine_inputs()
    with ops.backend("triton"), torch.inference_mode():
        torch.testing.assert_close(refine(*given), reference.refine_boxes(*given, eps=1e-3))


def test_modules_on_the_ops_copy_and_pickle():
    layer, inputs = Layer(), refine_inputs()[:2]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(*inputs), layer(*inputs))
