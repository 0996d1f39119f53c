"""Which runs compile Triton's kernels, what they skip and report, and what `benchmarks.validate` says of the reports.

Each run is a pytest of its own over a few tests with the settings of this folder, on a machine that claims a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import validate
from tests.support import gpu_run

HERE = Path(__file__).parent
GPU = """
import os, torch
torch.cuda.is_available = lambda: os.environ["GPU"] == "1"
torch.cuda.get_device_name = lambda device=None: "a GPU"
torch.cuda.get_device_capability = lambda device=None: (9, 0)
"""
TESTS = """
import pytest, torch, triton

def precision():
    return torch.backends.cuda.matmul.fp32_precision

BEFORE = precision()

def test_interpreted():
    assert triton.knobs.runtime.interpret

@pytest.mark.gpu
@pytest.mark.parametrize("x", ("a", "b/c::d.py"))
def test_compiled(x):
    assert not triton.knobs.runtime.interpret

def test_precision_in_a_test_that_fails(fp32_precision):
    assert precision() == fp32_precision
    assert fp32_precision != "tf32", "as it should"

def test_precision_after_it():
    assert precision() == BEFORE != "tf32"
"""


@pytest.mark.parametrize(
    "expression, asks",
    [
        ("gpu", True),
        ("gpu and not sweep", True),
        ("gpu and sweep", True),
        ("", False),
        ("not gpu", False),
        ("not sweep and not gpu", False),
        ("not sweep", False),
        ("gpu or sweep", False),
        ("sweep", False),
    ],
)
def test_what_asks_for_the_tests_of_a_gpu(expression, asks):
    assert gpu_run.asked_for(expression) == asks


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """TESTS, with this folder's settings, on a machine that says by the variable GPU whether it has one."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "tests").mkdir()
    (root / "tests" / "support").mkdir()
    for name in ("__init__.py", "conftest.py", "support/__init__.py", "support/gpu_run.py"):
        shutil.copy(HERE / name, root / "tests" / name)
    (root / "tests" / "test_a.py").write_text(TESTS)
    (root / "conftest.py").write_text(GPU)
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    sweep: x\n")
    return root


@pytest.fixture
def run(checkout, monkeypatch):
    """Runs pytest with options in the checkout; returns its output and report."""
    pytest.importorskip("triton")
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", *(name for name in os.environ if "PYTEST_XDIST" in name)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent), prepend=os.pathsep)

    def pytest_run(*options, gpu="1"):
        monkeypatch.setenv("GPU", gpu)
        report = checkout / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-q", f"--junitxml={report}", *options]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        return done.stdout, ElementTree.parse(report)

    return pytest_run


# Of TESTS, as a report names them.
COLLECTED = {"tests.test_a::test_compiled[a]", "tests.test_a::test_compiled[b/c::d.py]"}


def refusal(report):
    with pytest.raises(validate.Refused) as reason:
        validate.check(report, COLLECTED)
    return str(reason.value)


def test_a_run_of_the_tests_of_a_gpu_compiles_and_can_validate(run, checkout, monkeypatch):
    said, report = run("-m", "gpu", "-n", "2")
    assert re.search(r"^2 passed", said, re.M), said
    monkeypatch.setattr(validate, "ROOT", checkout)
    assert validate.collected() == COLLECTED
    found = validate.check(report, COLLECTED)
    assert found["mode"] == "compiled" and found["architecture"] == "sm_90" and found["device"] == "a GPU"
    assert found["collected"] == "2"
    assert all(re.match(r"\d+\.\d+", found[name]) for name in ("python", "torch", "triton", "ptxas")), found


def test_a_part_of_them_is_refused(run):
    said, report = run("-m", "gpu", "-k", "b/c")
    assert re.search(r"^1 passed", said, re.M), said
    assert refusal(report) == "the report lacks 1 of the 2 tests marked gpu, such as tests.test_a::test_compiled[a]"


def test_the_interpreter_is_taken_where_it_is_asked_for_and_refused(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said, report = run("-m", "gpu")
    assert re.search(r"^2 failed", said, re.M), said
    assert refusal(report).startswith("the report is of interpreted kernels")


def test_any_other_run_interprets_and_says_what_it_skips(run):
    """And a test that fails leaves the precision as it was."""
    said, report = run()
    assert "1 failed, 3 passed, 2 skipped" in said, said
    assert "2 tests marked gpu were skipped: tests marked gpu run alone: pytest -m gpu" in said
    assert refusal(report).startswith("the report is of interpreted kernels")


def test_without_a_gpu_its_tests_are_skipped(run):
    said, report = run("-m", "gpu", gpu="0")
    assert "2 tests marked gpu were skipped: no GPU is visible" in said, said
    assert refusal(report).startswith("the report is of interpreted kernels")
