"""The counters and timers count and time what they say."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dab_fast import measure
from dab_fast.bench import host, rows
from tests.support import idea_models
from tests.support import idea_second_writing as second


def test_aten_calls_leave_out_views_and_allocations():
    x = torch.randn(4, 6)
    assert measure.aten_calls(lambda: x.view(6, 4).t()[1:].unsqueeze(0)) == 0
    assert measure.aten_calls(lambda: torch.empty(3)) == 0
    assert measure.aten_calls(lambda: x.reshape(24)) == 0
    assert measure.aten_calls(lambda: x.t().reshape(24)) == 1, "this reshape copies"
    assert measure.aten_calls(lambda: (x + 1).relu_()) == 2
    assert measure.count(lambda: F.linear(x, x, x[:, 0])).aten == {"aten.addmm": 1}


def test_backward_is_counted():
    x = torch.randn(3, requires_grad=True)
    forward = measure.aten_calls(lambda: x.sin())
    assert forward == 1
    assert measure.count(lambda: x.sin().sum().backward()).aten["aten.cos"] == 1


def test_host_syncs():
    x = torch.randn(4)
    assert measure.host_syncs(lambda: x * 2) == 0
    assert measure.host_syncs(lambda: x.sum().item()) == 1
    assert measure.host_syncs(lambda: bool(x.any())) == 1
    assert measure.host_syncs(lambda: x[x > 0]) == 1
    assert measure.host_syncs(lambda: x.cpu()) == 1
    assert measure.host_syncs(lambda: x.tolist()) == 1
    assert measure.host_syncs(lambda: x.numpy()) == 1


def test_saved_bytes_are_unique_storages_without_parameters():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    bytes_of = lambda t: t.numel() * t.element_size()  # noqa: E731
    assert measure.saved_bytes(lambda: x.exp()) == bytes_of(x)
    assert measure.saved_bytes(lambda: x @ weight) == bytes_of(x) + bytes_of(weight)
    assert measure.saved_bytes(lambda: x @ weight, exclude=[weight]) == bytes_of(x)
    assert measure.saved_bytes(lambda: x[:2] * x[2:]) == bytes_of(x), "two views of one storage"
    with torch.no_grad():
        assert measure.saved_bytes(lambda: x.exp()) == bytes_of(x), "it enables gradients itself"


def test_triton_launches_are_counted_and_need_not_run():
    pytest.importorskip("triton")
    from tests.support.triton_kernel import double

    x = torch.ones(8)
    counts = measure.count(lambda: double(x))
    assert counts.kernels == {"double_kernel": 1}
    assert not counts.aten and not counts.syncs, "the interpreter's own copies are not the kernel's"
    assert torch.equal(double(x), 2 * x)
    ran = []
    assert measure.count(lambda: ran.append(double(x)), execute_kernels=False).kernels == {"double_kernel": 1}
    assert not torch.equal(ran[0], 2 * x)


def test_peak_bytes():
    size = 4 * 1000

    def chain():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b * 2
        del b
        return (c + 1).view(10, 100)[2:]

    assert measure.peak_bytes(chain) == 2 * size
    w = torch.ones(1000, requires_grad=True)
    assert measure.peak_bytes(lambda: w.detach().mul_(1)) == 0, "nothing new is held"
    kept = measure.peak_bytes(lambda: w.exp().exp().exp())
    with torch.no_grad():
        assert kept == 3 * size > 2 * size == measure.peak_bytes(lambda: w.exp().exp().exp())


def test_interleaved_times():
    order = []
    fns = {
        "slow": lambda: (order.append("slow"), time.sleep(0.02)),
        "fast": lambda: order.append("fast"),
    }
    times = measure.interleaved_times(fns, rounds=4, warmup=1)
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert [len(t.wall) for t in times.values()] == [4, 4]
    assert times["slow"].quantile(0.5) >= 0.02 > times["fast"].quantile(0.5)
    assert times["slow"].quantile(0.5) > times["fast"].quantile(0.5)
    order.clear()
    measure.interleaved_times(fns, rounds=1000, warmup=0, seconds=0.2)
    assert order.count("slow") <= 11, "the budget of seconds holds"
    assert order.count("slow") == order.count("fast") >= 1, "no round is left half done"


def test_a_gpu_that_is_not_the_current_one_is_timed(monkeypatch):
    """Events are recorded on the given device's stream, and the host waits for that device."""
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=here):
            asked.append(("record", stream))

        def elapsed_time(self, end):
            return 1e3

    scratch = SimpleNamespace(device=there, zero_=lambda: None)
    monkeypatch.setattr(measure, "_l2_scratch", lambda device: scratch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=here: device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=here: asked.append(("synchronize", device)))
    (times,) = measure.interleaved_times({"a": lambda: None}, rounds=1, device=there).values()
    assert times.device == [1.0]
    steps = ("synchronize", "record", "record", "synchronize")
    assert asked == [(step, there) for step in steps]


@pytest.mark.parametrize("folder", ["dab_fast", "benchmarks", "examples"])
def test_no_measurement_waits_for_whichever_gpu_is_current(folder):
    """The scripts that run in processes of their own are text, and no test without a GPU runs them on one."""
    root = Path(__file__).parents[1] / folder
    current = re.compile(r"(synchronize|current_stream|\.record)\(\)")
    found = [str(path) for path in root.rglob("*.py") if current.search(path.read_text())]
    assert not found


def test_the_start_is_measured_on_the_device_that_is_given(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[3])
        return SimpleNamespace(returncode=0, stdout='{"import": 1.0}')

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(rows, "where", lambda device: {})
    host.measure_start(torch.device("cuda", 1), repeats=1)
    assert asked == ["cuda:1"]


def test_quantile():
    assert measure.quantile([3, 1, 2], 0.5) == 2
    assert measure.quantile([0, 10], 0.2) == 2
    assert measure.quantile([7], 0.8) == 7


class HandsItselfToModes(second.Attention):
    """As the attention of IDEA-Research, which hands itself, and what it does not take, to whoever overrides torch."""

    def forward(self, q, *args):
        if torch.overrides.has_torch_function((q,)):
            return torch.overrides.handle_torch_function(self.forward, (q,), q, *args, unknown=True)
        return super().forward(q, *args)


def test_what_breaks_under_a_function_mode_is_counted():
    decoder = idea_models.oracle()
    with torch.no_grad():
        expected = measure.count(lambda: decoder(**idea_models.inputs())[0].tolist())
        for layer in decoder.layers:
            layer.self_attn.__class__ = layer.cross_attn.__class__ = HandsItselfToModes
        found = measure.count(lambda: decoder(**idea_models.inputs())[0].tolist())
    assert found == expected and found.syncs["tolist"] == 1


def test_reads_by_numpy_are_counted_once():
    x = torch.ones(2)
    assert measure.count(lambda: np.asarray(x)).syncs == {"numpy": 1}
    assert "numpy" not in vars(torch.Tensor), "counting leaves torch as it was"
