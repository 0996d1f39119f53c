"""The examples run as their first lines say."""

from __future__ import annotations

import math
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.models import huggingface_model

ROOT = Path(__file__).parents[1]
TINY = ["--tiny", "--size", "64", "96"]


def run_example(monkeypatch, capsys, name, *arguments):
    """In this process, which has imported everything already."""
    path = ROOT / "examples" / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def check_training(out):
    losses = [float(x) for x in re.findall(r"^step \d  loss ([\d.]+)$", out, re.M)]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert "5 modules accelerated" in out and "stepped aside" not in out


def test_inference(monkeypatch, capsys, tmp_path):
    model = huggingface_model()
    model.save_pretrained(tmp_path)
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "photo.png")
    arguments = [tmp_path / "photo.png", "--checkpoint", tmp_path, "--device", "cpu"]
    out = run_example(monkeypatch, capsys, "inference.py", *arguments, "--size", 128, 192, "--threshold", 0)
    assert "5 modules accelerated" in out and "stepped aside" not in out
    assert len(re.findall(r"^[01]\.\d\d  LABEL_\d", out, re.M)) == model.config.num_queries


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_training(monkeypatch, capsys, autocast):
    check_training(run_example(monkeypatch, capsys, "training.py", *TINY, "--autocast", autocast))


def test_distributed_training(monkeypatch, capsys):
    """One process of one: DistributedDataParallel's second step finds parameters that got no gradient."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    check_training(run_example(monkeypatch, capsys, "training.py", *TINY))


@pytest.mark.sweep
def test_torchrun():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/training.py", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_training(result.stdout)
