"""The import, `accelerate` and the first call, each in a fresh process."""

from __future__ import annotations

from dab_fast.bench import rows
from dab_fast.bench.host import measure_start
from dab_fast.bench.workloads import PAPER, TINY, Shape


def test_start(state, progress):
    progress("import, accelerate, first call")
    if state.level != "tiny":
        found = measure_start(state.device, PAPER, Shape(), repeats=3 if state.device.type == "cuda" else 1)
    else:
        found = measure_start(state.device, TINY, Shape(1, 9, 5, 7), repeats=1)
    if state.timed:
        state.rows += found
        state.refused += rows.append(state.file, found, replace=state.replace)
    assert {row["mode"] for row in found} == {"import", "accelerate", "first_call", "second_call"}
    assert all(row["p50_ms"] > 0 for row in found)
