"""What a user waits for once: the import, `accelerate`, the first call."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from dab_fast import measure
from dab_fast.bench import rows
from dab_fast.bench.workloads import ONE_IMAGE, PAPER, Shape, Size

# In a process of its own, since each of these happens once. transformers and the model are there already.
_SCRIPT = """
import json, sys, time
import torch
from transformers.models.dab_detr import modeling_dab_detr

device = torch.device(sys.argv[1])
seconds = {}
def timed(name, fn):
    start = time.perf_counter()
    result = fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - start
    return result

torch.zeros(1, device=device)
timed("import", lambda: __import__("dab_fast"))
import dab_fast
from dab_fast.bench import workloads
size = workloads.Size(**json.loads(sys.argv[2]))
work = workloads.Decoder(workloads.Shape(**json.loads(sys.argv[3])), device=device, size=size)
module = work._module()
timed("accelerate", lambda: dab_fast.accelerate(module))
prepared = work.ours()
with torch.no_grad():
    timed("first_call", prepared.forward)
    timed("second_call", prepared.forward)
print(json.dumps(seconds))
"""


def measure_start(
    device: torch.device, size: Size = PAPER, shape: Shape = ONE_IMAGE, repeats: int = 3
) -> list[rows.Row]:
    """Rows of the import, `accelerate`, and the first two calls of an accelerated decoder, each in a fresh process."""
    arguments = [sys.executable, "-c", _SCRIPT, str(device), json.dumps(vars(size)), json.dumps(vars(shape))]
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"the fresh process failed: {done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    place = rows.where(device)
    found: list[dict[str, Any]] = []
    for mode in runs[0]:
        p20, p50, p80 = (measure.quantile([run[mode] for run in runs], q) * 1e3 for q in (0.2, 0.5, 0.8))
        found.append(
            {
                "op": "start",
                "mode": mode,
                "provider": "auto",
                "batch": shape.batch,
                "queries": shape.queries,
                "tokens": shape.tokens,
                "padded": shape.padded,
                "dtype": "fp32",
                "p20_ms": p20,
                "p50_ms": p50,
                "p80_ms": p80,
                "wall_p50_ms": p50,
                "rounds": repeats,
                "accurate": None,
                **place,
            }
        )
    return found
