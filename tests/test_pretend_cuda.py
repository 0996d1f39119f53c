"""A GPU's manners, which the pretend CUDA device must have too, and the tests marked gpu that run on it in `make test`.

`make pretend` runs all of them on it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import pretend_cuda

ROOT = Path(__file__).parents[1]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible")


def cuda(*shape: int, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", **kwargs)


@pytest.mark.gpu
def test_devices_do_not_mix():
    x = cuda(3)
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.cat((x, torch.ones(3))),
        lambda: nn.functional.linear(x, torch.ones(2, 3)),
        lambda: torch.ones(3).add_(x),
        lambda: torch.add(x, x, out=torch.empty(3)),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")],
    ):
        with pytest.raises(RuntimeError, match=r"same device|on the same|indices should be"):
            mixed()
    assert (x + torch.tensor(1.0)).is_cuda, "a number of the CPU is one"
    assert x[torch.tensor([0, 2])].is_cuda, "and so are indices"


@pytest.mark.gpu
@two_devices
def test_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        cuda(3) + torch.ones(3, device="cuda:1")
    assert torch.ones(3, device="cuda:1").to("cuda:0").get_device() == 0


@pytest.mark.gpu
def test_results_lie_where_they_would():
    x = cuda(4, 6)
    before, rows = x.clone(), x[::2].t()
    rows.mul_(2)
    assert torch.equal(x[::2], before[::2] * 2) and torch.equal(x[1::2], before[1::2])
    out = torch.empty(0, device="cuda")
    torch.add(x, x, out=out)
    assert out.shape == x.shape and torch.equal(out, x + x)
    base = torch.zeros(8, device="cuda")
    base.as_strided((2, 2), (4, 1), 1).fill_(1)
    assert base.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


@pytest.mark.gpu
@two_devices
def test_the_current_device_is_each_threads_own():
    seen = []
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").get_device() == 1
        thread = threading.Thread(target=lambda: seen.append(torch.empty(1, device="cuda").get_device()))
        thread.start()
        thread.join()
    assert seen == [0] and torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_each_device_draws_its_own_numbers():
    def drawn() -> tuple[list[float], list[float]]:
        torch.manual_seed(3)
        return torch.rand(4, device="cuda").tolist(), torch.rand(4).tolist()

    first = drawn()
    assert drawn() == first
    torch.manual_seed(3)
    torch.rand(7, device="cuda")
    assert torch.rand(4).tolist() == first[1], "the CPU's generator is another"
    with pytest.raises(RuntimeError, match="'cuda'"):
        torch.rand(4, device="cuda", generator=torch.Generator())


@pytest.fixture
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_waits(waiting_is_an_error):
    x = cuda(4)
    flags = x > 0
    for wait in (
        lambda: x.sum().item(),
        lambda: x.cpu(),
        lambda: bool(flags.any()),
        lambda: x.nonzero(),
        lambda: x[flags],
        lambda: torch.ones(4).cuda(),
        lambda: x.repeat_interleave(flags.long()),
    ):
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            wait()
    pinned = torch.ones(4).pin_memory()
    for free in (
        lambda: x.exp(),
        lambda: x.masked_fill(flags, 0.0),
        lambda: x.sort(),
        lambda: pinned.to("cuda", non_blocking=True),
        lambda: x.to(torch.float16),
    ):
        free()


@pytest.mark.gpu
def test_a_graph_runs_again_on_the_same_memory():
    x = torch.ones(4, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        y = (x * 2).cumsum(0)
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert y.tolist() == [6, 12, 18, 24]


@pytest.mark.gpu
def test_autograd_runs_in_a_thread_of_the_device():
    threads = []
    x = cuda(4, requires_grad=True)
    y = x.sin()
    y.register_hook(lambda gradient: threads.append((threading.get_ident(), torch.cuda.current_device())))
    y.sum().backward()
    assert threads[0][0] != threading.get_ident() and threads[0][1] == 0
    torch.testing.assert_close(x.grad, x.detach().cos())


@pytest.mark.gpu
@two_devices
def test_data_parallel():
    module = nn.Linear(4, 3).cuda()
    x = cuda(6, 4)
    result = nn.DataParallel(module, [0, 1])(x)
    result.sum().backward()
    torch.testing.assert_close(result, module(x))
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(3, 4))


@pytest.mark.gpu
def test_state_travels(tmp_path):
    module = nn.Linear(4, 3).cuda()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert loaded["weight"].is_cuda and torch.equal(loaded["weight"], module.weight)
    assert not torch.load(tmp_path / "state.pt", map_location="cpu")["weight"].is_cuda


@pytest.mark.gpu
def test_memory_is_counted():
    before = torch.cuda.memory_allocated()
    x = cuda(1 << 20)
    assert torch.cuda.memory_allocated() - before == 4 << 20
    torch.cuda.reset_peak_memory_stats()
    del x
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + (4 << 20)


@functools.cache
def kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, y, n: tl.constexpr):
        at = tl.arange(0, n)
        tl.store(y + at, 2 * tl.load(x + at))

    return double


@pytest.mark.gpu
def test_triton_takes_tensors_of_the_device_alone():
    pytest.importorskip("triton")
    x, y = cuda(16), torch.empty(16, device="cuda")
    kernel()[(1,)](x, y, 16)
    torch.testing.assert_close(y, 2 * x)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        kernel()[(1,)](x, torch.empty(16), 16)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if problem := pretend_cuda.why_not():
        pytest.skip(problem)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers share it
    return pretend_cuda.build(folder / "pretend_cuda")


@pytest.mark.parametrize("file", ["test_pretend_cuda.py", "test_model_on_gpu.py", "test_native_calls.py"])
def test_on_the_pretend_device(file, library):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, f"tests/{file}"],
        cwd=ROOT,
        env=pretend_cuda.environment(library),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
