"""Calling the extension: threads, fork, other instruction sets, errors, streams. Its numbers: `test_native`."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from dab_fast import ops
from dab_fast.accuracy import outputs_and_gradients
from dab_fast.ops import _backends
from tests.test_native import C, Tail, native_embed, numbered, some_boxes


def many():
    """Enough rows for several threads."""
    return some_boxes(3, 500, 4), torch.randn(256), torch.randn(3, 500, 2)


def every_bit(threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = many()
        with ops.backend("native"):
            embedded = outputs_and_gradients(
                ops.box_position_embed, numbered(inputs), [torch.randn(3, 500, 512), torch.randn(3, 500, 256)]
            )
        h2, boxes, w3, b3 = torch.randn(1500, 256), some_boxes(1500, 4), torch.randn(4, 256), torch.randn(4)
        refined = outputs_and_gradients(Tail.apply, numbered((h2, boxes, w3, b3)), [torch.randn(1500, 4)])
        return [*embedded.values(), *refined.values()]
    finally:
        torch.set_num_threads(before)


def test_same_bits_for_any_number_of_threads():
    one = every_bit(1)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, one, every_bit(threads)))


def _digest(inputs, gradients):
    """Of what the kernels alone compute, with several threads of their own."""
    results = native_embed.forward(*inputs, 128, 1e4, "yxwh", torch.float32, True)
    results += native_embed.backward(*gradients, *inputs, 128, 1e4, "yxwh", [True] * 3)
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in results)).hexdigest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_after_fork(monkeypatch):
    """As in a DataLoader's worker, where torch's own threads would hang: so no op of torch runs in the child."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    inputs, gradients = many(), (torch.randn(3, 500, 512), torch.randn(3, 500, 256))
    want = _digest(inputs, gradients)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(_digest(inputs, gradients)))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == want


def test_other_python_threads_run_meanwhile():
    boxes = torch.rand(1_000_000, 2)
    ticks, done = [0], threading.Event()

    def count():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(1e-4)

    before = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    try:
        counter.start()
        sys.setswitchinterval(100)  # only a released GIL lets the other thread in
        start = ticks[0]
        native_embed.forward(boxes, None, None, 2, 1e4, "xywh", torch.float32, True)
        during = ticks[0] - start
    finally:
        sys.setswitchinterval(before)
        done.set()
        counter.join()
    assert during > 0


@pytest.mark.skipif(C.cpu_isa() == "portable", reason="this machine has the portable loops only")
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_every_instruction_set(isa):
    """The loops chosen for older machines, on this one."""
    code = (
        "import torch; from dab_fast.backends.native._call import C; from tests import test_native as t\n"
        f"assert C.cpu_isa() == {isa!r}\n"
        "torch.manual_seed(0)\n"
        "t.test_accuracy_of_sin_and_cos('cpu')\n"
        "for d in (torch.float16, torch.bfloat16):\n"
        "    t.test_every_half_precision_number_is_read_and_rounded_as_torch_does(d, 'cpu')\n"
        "f = torch.float32\n"
        "for kind in (None, 'per_element', 'per_box', 'shared'):\n"
        "    t.test_box_position_embed((f, f, f), kind, 'yxwh', 4, 'cpu')\n"
        "t.test_refine_boxes_kernels((f, f), 32, 4, 0, 'cpu')\n"
    )
    environment = {**os.environ, "DAB_FAST_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_what_the_kernels_cannot_do_is_said():
    boxes = some_boxes(2, 4)
    with ops.backend("native"):
        for reason, arguments in (
            ("num_feats up to 512, got 514", (boxes, None, None, 514)),
            ("as precisely as boxes, torch.float32, got float64", (boxes, torch.randn(2, 8).double(), None, 4)),
        ):
            with pytest.raises(ops.BackendUnavailable, match=f"box_position_embed on cpu: native: .*{reason}"):
                ops.box_position_embed(*arguments[:3], num_feats=arguments[3])
        with pytest.raises(ops.BackendUnavailable, match="1, 2 or 4 coordinates, got 3"):
            ops.sine_embed(boxes[:, :3])
    assert C.MAX_FEATS == 512
    assert (
        _backends.why_not("native", "modulated_cross_attention", torch.device("cpu"))
        == "it has no modulated_cross_attention"
    )
    assert _backends.why_not("native", "box_position_embed", torch.device("meta")).endswith("got meta")


def test_bad_calls_of_the_extension_raise():
    rows, x = (1, 1, 2), (torch.zeros(2, 4).data_ptr(), 0, 0, 0, 4)
    with pytest.raises(ValueError, match="num_feats must be even, from 2 to 512, got 3"):
        C.cpu_box_position_embed(rows, 4, 3, 1e4, False, 0, x, None, None, x, None, 1)
    with pytest.raises(ValueError, match="1, 2 or 4 coordinates, got 3"):
        C.cpu_box_position_embed(rows, 3, 4, 1e4, False, 0, x, None, None, x, None, 1)
    with pytest.raises(ValueError, match="dtype must be an index into DTYPES, got 9"):
        C.cpu_box_position_embed(rows, 4, 4, 1e4, False, 0, (x[0], 9, 0, 0, 4), None, None, x, None, 1)
    with pytest.raises(TypeError):
        C.cpu_box_position_embed(rows, 4, 4, 1e4, False, 0, (x[0], 0), None, None, x, None, 1)


def test_auto_on_the_cpu():
    assert _backends._candidates("auto", "box_position_embed", "cpu", None)[0][0] == "native"


@pytest.mark.skipif(not C.HAS_CUDA, reason="built without CUDA code")
def test_without_a_driver_the_error_names_cuda_and_the_call():
    count, why = C.cuda_devices()
    if count:
        pytest.skip("this machine has a GPU, whether this torch can use it or not")
    assert count == 0 and why.startswith("cudaError")
    x = (torch.zeros(2, 64).data_ptr(), 0, 0, 0, 4)
    with pytest.raises(RuntimeError, match=r"dab_fast: \w+ on cuda:0: cudaError\w+: "):
        C.cuda_box_position_embed((1, 1, 2), 4, 4, 1e4, False, 0, x, None, None, x, None, 0, 0)


@pytest.mark.gpu
def test_a_failed_launch_names_the_kernel_and_leaves_no_error_behind():
    x = torch.rand(2, 4, device="cuda")
    good = (x.data_ptr(), 0, 0, 0, 4)
    with pytest.raises(RuntimeError, match=r"dab_fast: .* on cuda:99: cudaErrorInvalidDevice"):
        C.cuda_box_position_embed((1, 1, 2), 4, 4, 1e4, False, 0, good, None, None, good, None, 99, 0)
    assert torch.equal(x + 1, x + 1)


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph():
    boxes, scale, logits = some_boxes(2, 300, 4, device="cuda"), torch.randn(2, 300, 256).cuda(), torch.randn(2, 300, 2)
    logits = logits.cuda()
    with ops.backend("native"):
        want = ops.box_position_embed(boxes, scale, logits)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = boxes + 0
            aside = ops.box_position_embed(late, scale, logits)
        stream.synchronize()
        assert all(map(torch.equal, aside, want))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.box_position_embed(boxes, scale, logits)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, want))
