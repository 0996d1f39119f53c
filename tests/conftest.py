"""Settings for every test: Triton kernels run in the interpreter, and uninitialised memory is NaN."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; workers share the cores, tensors are tiny

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Deterministic mode fills `torch.empty` with NaN, so that an element that nothing wrote shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
