"""The tests again under the oldest versions that are promised: transformers 5.17, and triton 3.6 for the kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.sweep


def install(target, *packages: str) -> dict[str, str]:
    """The environment in which `packages` come before the installed ones."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(target), *packages], check=True)
    path = os.pathsep.join(filter(None, (str(target), os.getcwd(), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_tests(environment: dict[str, str], *names: str) -> None:
    files = (f"tests/test_{name}.py" for name in names)
    run(environment, "pytest", "-q", "-m", "not sweep and not gpu", *files)


def run(environment: dict[str, str], *command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_transformers(tmp_path):
    environment = install(tmp_path, "transformers==5.17.0")
    run_tests(environment, "huggingface", "distributed")


def test_triton(tmp_path):
    environment = install(tmp_path, "--no-deps", "triton==3.6.0", "numpy<2.4")  # its interpreter needs the older numpy
    run_tests(
        environment,
        "modulated_cross_attention_kernel",
        "modulated_cross_attention",
        "box_position_embed",
        "refine_boxes",
        "triton_decoder",
    )
    environment.pop("TRITON_INTERPRET", None)
    run(environment, "benchmarks.kernel_budget", "--arch", "80,90")
