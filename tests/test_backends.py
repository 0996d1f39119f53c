"""Which backend runs an op, and what is said when it cannot."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from dab_fast import ops
from dab_fast.ops import _backends, _trust

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OP = "box_position_embed"


@pytest.fixture
def forget(monkeypatch):
    """As in a fresh process: nothing resolved, nothing logged."""
    monkeypatch.setattr(_backends, "_known", {})
    monkeypatch.setattr(_backends, "_logged", set())


@pytest.fixture
def h100(monkeypatch, forget):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_choice_nests_and_returns():
    assert ops.chosen_backend() == "auto"
    with ops.backend("triton"):
        assert ops.chosen_backend() == "triton"
        with ops.backend("torch"):
            assert ops.chosen_backend() == "torch"
        assert ops.chosen_backend() == "triton"
    assert ops.chosen_backend() == "auto"
    ops.backend("torch")
    assert ops.chosen_backend() == "torch"
    ops.backend("auto")


def test_unknown_choice():
    with pytest.raises(ValueError, match='backend must be "auto", "torch", "triton" or "native", got \'cuda\''):
        ops.backend("cuda")
    assert ops.chosen_backend() == "auto"


def test_named_backend_raises_with_the_reason_of_the_predicate(forget, monkeypatch):
    boxes = torch.rand(3, 4)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    reason = _backends.why_not("triton", OP, CPU)
    assert reason == "its kernels need a CUDA tensor, got cpu (TRITON_INTERPRET=1 runs them there, slowly)"
    with ops.backend("triton"), pytest.raises(ops.BackendUnavailable) as error:
        ops.box_position_embed(boxes)
    assert str(error.value) == f"box_position_embed on cpu: triton: {reason}"


def test_named_backend_raises_where_its_kernels_do_not_do_the_dtype(forget):
    with ops.backend("triton"), pytest.raises(ops.BackendUnavailable, match=r"triton: .* got float64"):
        ops.box_position_embed(torch.rand(3, 4, dtype=torch.float64))


def test_old_gpu(forget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert _backends.why_not("triton", OP, GPU) == "its kernels need sm_80 or newer, got sm_75"


def test_auto_trusts_only_validated_architectures(h100, monkeypatch):
    monkeypatch.setattr(_trust, "_validated", dict)
    names, why = _backends._candidates("auto", OP, "cuda", 0)
    assert names == ("torch",)
    assert "triton: no committed GPU run validated it on sm_90" in why
    assert _backends._candidates("triton", OP, "cuda", 0) == (("triton",), "")
    monkeypatch.setattr(_trust, "_validated", lambda: {OP: {"triton": {"sm_90": {}}}})
    assert _backends._candidates("auto", OP, "cuda", 0)[0] == ("triton", "torch")
    assert _backends._candidates("auto", "refine_boxes", "cuda", 0)[0] == ("torch",)


def test_auto_takes_no_kernel_that_was_measured_slower(h100, monkeypatch):
    op = "modulated_cross_attention"
    monkeypatch.setattr(_trust, "_validated", lambda: {op: {"triton": {"sm_90": {}}}})
    x = torch.empty(0, device="meta")
    monkeypatch.setattr(
        _backends, "_choose", lambda op, device: _backends._candidates(_backends._choice, op, "cuda", 0)
    )
    chosen = {dtype: _backends.select(op, x, [dtype], 32, None) for dtype in (torch.float32, torch.bfloat16)}
    assert chosen == {torch.float32: "torch", torch.bfloat16: "triton"}
    with ops.backend("triton"):
        assert _backends.select(op, x, [torch.float32], 32, None) == "triton"


def test_auto_does_not_interpret(forget):
    assert "triton" not in _backends._candidates("auto", OP, "cpu", None)[0]


def test_one_log_line_with_the_same_words(forget, caplog):
    no_native = "modulated_cross_attention"
    with caplog.at_level(logging.INFO, "dab_fast"):
        for _ in range(3):
            _backends.select(no_native, torch.rand(1), [torch.float32], 8, None)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.message.startswith(f"{no_native} on cpu runs in plain PyTorch (native: it has no {no_native}; ")
    assert f"triton: {_backends.why_not('triton', no_native, CPU, trusted_only=True)}" in record.message


def test_gpu_fallback_is_a_warning(forget, caplog):
    _backends._log_fallback(OP, GPU, "why")
    assert caplog.records[0].levelno == logging.WARNING


def test_validated_record_is_well_formed():
    record = _trust._validated()
    assert set(record) <= {OP, "refine_boxes", "modulated_cross_attention"}
    for by_backend in record.values():
        assert set(by_backend) <= {"triton", "native"}
        for by_architecture in by_backend.values():
            assert all(name.startswith("sm_") for name in by_architecture)


def run(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_environment_variable_wins():
    code = "from dab_fast import ops; ops.backend('auto'); print(ops.chosen_backend())"
    assert run(code, DAB_FAST_BACKEND="torch").stdout == "torch\n"


def test_environment_variable_is_checked():
    assert "DAB_FAST_BACKEND must be" in run("import dab_fast.ops", DAB_FAST_BACKEND="fast").stderr


def test_import_loads_no_backend():
    code = (
        "import sys, json, dab_fast.ops; print(json.dumps([m for m in ('triton', 'dab_fast._C') if m in sys.modules]))"
    )
    assert json.loads(run(code).stdout) == []
