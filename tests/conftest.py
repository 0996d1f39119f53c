"""Settings for every test: Triton compiled or interpreted (`support.gpu_run`), and uninitialised memory is NaN."""

import logging
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; workers share the cores, tensors are tiny

import pytest
import torch
from _pytest.junitxml import xml_key

from tests.support import gpu_run


def pytest_configure(config):
    gpu_run.choose(config.option.markexpr)


def pytest_collection_modifyitems(config, items):
    gpu_run.mark(config.option.markexpr, items)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """The fixture for properties of a report does nothing under xdist; this runs where the report is written."""
    report = session.config.stash.get(xml_key, None)
    if report is not None:
        for name, value in gpu_run.properties(session.config.option.markexpr, session.testscollected).items():
            report.add_global_property(name, str(value))


def pytest_terminal_summary(terminalreporter):
    for reason in (gpu_run.ALONE, gpu_run.NO_GPU):
        skipped = [r for r in terminalreporter.stats.get("skipped", ()) if r.longrepr[2] == f"Skipped: {reason}"]
        if skipped:
            terminalreporter.write_line(f"{len(skipped)} tests marked gpu were skipped: {reason}")


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Deterministic mode fills `torch.empty` with NaN, so that an element that nothing wrote shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(was)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the random inputs; accuracy hangs on none")


@pytest.fixture(autouse=True)
def heard():
    """A test of what is logged hears it, whatever another library that was tried before did to logging."""
    logging.disable(logging.NOTSET)
    logger = logging.getLogger("dab_fast")
    logger.disabled, logger.propagate = False, True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(request.config.getoption("seed"))


@pytest.fixture
def float64():
    """Gradients of models are compared in float64, for the reason that `support.models.wide` gives."""
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """torch.compile counts the recompilations of a function, whoever asked for them, and gives up at the eighth."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    """On a GPU they are in TF32 by default, whose rounding, another where a norm is folded, would hide the rest."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=("ieee", "tf32"))
def fp32_precision(request):
    """Of CUDA's matrix products. `monkeypatch` cannot undo it: torch.backends' attributes cannot be deleted."""
    matmul = torch.backends.cuda.matmul
    was = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = was


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory):
    """The CUDA kernels on the CPU: tests/support/cuda_on_cpu, compiled by the first worker that asks."""
    from tests.support import cuda_on_cpu

    if problem := cuda_on_cpu.why_not():
        pytest.skip(problem)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers share it
    return cuda_on_cpu.Emulation(cuda_on_cpu.build(folder / "cuda_on_cpu"))
