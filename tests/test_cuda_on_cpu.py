"""The CUDA kernels, run on the CPU thread by thread: sizes and orders of threads, and what the emulation notices.

tests/test_native.py has them among its devices, with layouts, dtypes and gradients.
"""

import functools

import pytest
import torch

from dab_fast import ops, reference
from dab_fast.accuracy import outputs_and_gradients, root_of_squares
from dab_fast.backends.native import _call
from tests.support.accuracy import assert_accurate
from tests.test_native import Tail, numbered, some_boxes, tail

ORDERS = (0, -1, 7)  # upwards, downwards, shuffled
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(emulation, function, specification, make_inputs, rows, shapes):
    """Accurate, and the same bits whatever the order in which threads and blocks run."""
    draws = []
    for draw in range(max(1, 16 // rows)):  # the error of a few numbers is chance
        inputs = numbered(make_inputs())
        d_results = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        runs = []
        for order in ORDERS[: None if draw == 0 else 1]:
            with emulation.instead_of_cpu(order):
                runs.append(outputs_and_gradients(function, inputs, d_results))
        for run in runs[1:]:
            assert all(torch.equal(x, run[name]) for name, x in runs[0].items())
        own, exact = (outputs_and_gradients(specification, inputs, d_results, dtype=x) for x in (None, torch.float64))
        draws.append((runs[0], exact, own, root_of_squares(specification, inputs, d_results)))
    assert_accurate(*({name: torch.cat([x[name] for x in xs]) for name in xs[0]} for xs in zip(*draws, strict=True)))


def check_embedding(emulation, rows, feats, n, kind, dtype):
    options = {"num_feats": feats, "temperature": 20.0, "order": "xywh" if n == 1 else "yxwh"}
    scales = {"per_element": (rows, 2 * feats), "per_box": (rows, 1), "shared": (2 * feats,)}

    def make_inputs():
        # Of similar size, so that the gradient of the smallest box, with 1 / size^2, is not all that counts.
        boxes = (torch.rand(rows, n) * 0.4 + 0.3).to(dtype)
        scale = torch.randn(scales[kind]).to(dtype) if kind else None
        logits = torch.randn(rows, 2).to(dtype) if n == 4 else None
        return (boxes,) if n == 1 else (boxes, scale, logits)

    name = "sine_embed" if n == 1 else "box_position_embed"
    ours, theirs = (functools.partial(getattr(where, name), **options) for where in (ops, reference))
    shapes = ((rows, feats),) if n == 1 else ((rows, n * feats), (rows, 2 * feats))
    with ops.backend("native"):
        check(emulation, ours, theirs, make_inputs, rows, shapes)


KINDS = [(1, None), *((n, kind) for n in (2, 4) for kind in (None, "per_element", "per_box", "shared"))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, kind", KINDS)
@pytest.mark.parametrize("rows, feats", [(1, 2), (7, 6), (300, 4), (9, 24), (3, 510), (2, 512)])
def test_sizes_of_the_embedding(rows, feats, n, kind, dtype, cuda_on_cpu):
    check_embedding(cuda_on_cpu, rows, feats, n, kind, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, kind", KINDS)
@pytest.mark.parametrize("feats", [2, 6, 24, 128, 510, 512])
@pytest.mark.parametrize("rows", [1, 7, 300, 1000])
def test_every_size_of_the_embedding(rows, feats, n, kind, dtype, cuda_on_cpu):
    check_embedding(cuda_on_cpu, rows, feats, n, kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("rows, width", [(1, 4), (7, 20), (300, 33), (5, 256), (2, 600), (1000, 8)])
def test_sizes_of_the_box_tail(rows, width, n, dtype, cuda_on_cpu):
    def make_inputs():
        inputs = torch.randn(rows, width), some_boxes(rows, n), torch.randn(4, width) / width**0.5, torch.randn(4)
        return [x.to(dtype) for x in inputs]

    check(cuda_on_cpu, Tail.apply, tail, make_inputs, rows, ((rows, 4),))


GUARD = 64  # elements on either side, which keeps the alignment


def guarded(*shape):
    """NaN between two zones of NaN, and the whole."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * GUARD,), torch.nan)
    return whole[GUARD : GUARD + size].view(shape), whole


@pytest.mark.parametrize("width", [8, 10])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_nothing_around_the_operands_is_read_or_written(rows, width, cuda_on_cpu):
    wholes = []

    def given(*shape):
        x, whole = guarded(*shape)
        wholes.append(whole)
        return x.copy_(torch.rand(shape) * 0.9 + 0.05)

    def wanted(*shape):
        x, whole = guarded(*shape)
        wholes.append(whole)
        return x

    boxes, logits, d_sine, d_query = given(rows, 4), given(rows, 2), given(rows, 4 * width), given(rows, 2 * width)
    hidden, weight, bias, refined, d_refined = (
        given(*s) for s in ((rows, width), (4, width), (4,), (rows, 4), (rows, 4))
    )
    results = []
    with cuda_on_cpu.instead_of_cpu():
        for kind, shape in (("per_element", (rows, 2 * width)), ("per_box", (rows, 1)), ("shared", (2 * width,))):
            scale, options = given(*shape), (4, width, 20.0, False, _call.C.SCALES[kind])
            found = [wanted(rows, 4 * width), wanted(rows, 2 * width)]
            _call.run("box_position_embed", options, (boxes, scale, logits), found)
            grads = [wanted(rows, 4), wanted(*shape), wanted(rows, 2)]
            sums = 2 * width if kind == "shared" else 0
            inputs = (boxes, scale, logits, d_sine, d_query)
            _call.run("box_position_embed_backward", (*options, True), inputs, grads, sums)
            results += found + grads
        options, out = (4, width, 1e-2), wanted(rows, 4)
        _call.run("box_tail", options, (hidden, boxes, weight, bias), (out,))
        grads = [wanted(rows, width), wanted(rows, 4), wanted(4 * width), wanted(4)]
        inputs = (hidden, boxes, weight, None, refined, d_refined)
        _call.run("box_tail_backward", (*options, True), inputs, grads, 4 * width + 4)
        results += [out, *grads]
    assert all(torch.isfinite(x).all() for x in results)
    assert all(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all() for whole in wholes)


@pytest.mark.parametrize(
    "kernel, noticed",
    [
        ("nothing_wrong", ""),
        ("no_barrier_before_a_read", "reads shared memory that nothing has written"),
        (
            "no_barrier_before_the_next_write",
            "reads what thread (0, 0, 0) of block (0, 0, 0) writes, without a barrier",
        ),
        (
            "unwritten_shared_memory",
            "thread (0, 0, 0) of block (1, 0, 0): reads shared memory that nothing has written",
        ),
        ("blocks_write_the_same", "writes what thread (0, 0, 0) of block (0, 0, 0) writes, without a barrier"),
        ("shuffle_after_lanes_returned", "mask 0xffffffff names lane 16, which has returned"),
        ("shuffle_while_lanes_are_at_a_barrier", "mask 0xffffffff names lane 16, which waits at __syncthreads"),
        ("shuffle_from_a_lane_not_named", "mask 0x0000ffff does not name lane 16, which is read"),
        ("different_shuffles", "mask 0xffffffff names lane 1, which is at another shuffle"),
        ("barrier_after_threads_returned", "__syncthreads: other threads of the block have returned without it"),
        ("misaligned_load", "thread (1, 0, 0) of block (0, 0, 0): misaligned address"),
        ("index_out_of_bounds", "thread (63, 0, 0) of block (0, 0, 0): index out of bounds"),
        ("write_after_the_end", "writes outside of every tensor that it may write"),
        ("read_before_the_beginning", "reads outside of every tensor that it may read"),
        ("too_much_dynamic_shared_memory", "more dynamic shared memory than the launch asked for"),
    ],
)
def test_a_wrong_kernel_is_noticed(kernel, noticed, cuda_on_cpu):
    x = torch.zeros(192)
    cuda_on_cpu.allow(x[:128], writable=True)
    try:
        said = cuda_on_cpu.misuse(kernel, x)
    finally:
        cuda_on_cpu.forget()
    assert noticed in said if noticed else not said


def test_a_right_kernel_computes(cuda_on_cpu):
    x = torch.arange(128.0)
    assert not cuda_on_cpu.misuse("nothing_wrong", x)
    given = torch.arange(64.0)
    sums = [(given.flip(0) + 64 * block + given).view(2, 32).sum(-1, keepdim=True).expand(2, 32) for block in range(2)]
    assert torch.equal(x, torch.cat(sums).reshape(-1))


@pytest.mark.parametrize("threads", [0, 1025])
def test_a_launch_that_no_gpu_takes_is_refused(threads, cuda_on_cpu):
    assert cuda_on_cpu.misuse("nothing_wrong", torch.zeros(128), threads) == f"grid (2, 1, 1), block ({threads}, 1, 1)"


def test_a_failed_call_names_kernel_device_and_cause(cuda_on_cpu):
    x = torch.zeros(2, 16)
    operand = (x.data_ptr(), 0, 0, 0, 16)
    arguments = ((1, 1, 2), 4, 4, 1e4, False, 0, operand, None, None, operand, None)
    with pytest.raises(RuntimeError, match="dab_fast: cudaSetDevice on cuda:99: cudaErrorInvalidDevice: there is one"):
        cuda_on_cpu.C.cuda_box_position_embed(*arguments, 99, 0)
    cuda_on_cpu.allow(x, writable=False)
    with pytest.raises(
        RuntimeError, match=r"dab_fast: box_position_embed_forward on cuda:0: .*: thread .* writes outside"
    ):
        cuda_on_cpu.cuda_box_position_embed(*arguments, 0, 0)
