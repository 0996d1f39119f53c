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
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
