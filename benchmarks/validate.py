"""Which kernels a run of the tests marked `gpu` has validated: what `auto` may choose on that architecture.

    pytest tests -m gpu --junitxml=tests.xml
    python -m benchmarks.validate tests.xml [--backends triton native] [--out dab_fast/ops/validated.json]

An op's backend is validated if tests of it ran on this GPU and none of them failed, nor any of the whole decoder on
that backend. Prints {op: {backend: {architecture: record}}}, or with --out adds it to that file. Where two backends are
validated `auto` takes `native`; so add it only where the timed rows show it faster than `triton`.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from dab_fast.bench import rows
from dab_fast.ops._backends import architecture

# The test files that prove a backend's kernels of an op.
PROOFS = {
    ("modulated_cross_attention", "triton"): ("test_attention_kernel", "test_attention_op", "test_triton_decoder"),
    ("box_position_embed", "triton"): ("test_box_position_embed", "test_triton_decoder"),
    ("refine_boxes", "triton"): ("test_refine_boxes", "test_triton_decoder"),
    ("box_position_embed", "native"): ("test_native", "test_native_calls"),
    ("refine_boxes", "native"): ("test_native", "test_native_calls"),
}


def outcomes(report: Path) -> dict[str, tuple[int, int]]:
    """{test file: (tests that passed, tests that did not)} of a JUnit report; skipped ones are neither."""
    found: dict[str, tuple[int, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        file = case.get("classname", "").rpartition(".")[2]
        wrong = case.find("failure") is not None or case.find("error") is not None
        passed, failed = found.get(file, (0, 0))
        found[file] = (passed + (not wrong), failed + wrong)
    return found


def validated(report: Path, backends: list[str], where: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{op: {backend: record}}; a test file that did not run validates nothing."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    by_file = outcomes(report)
    for (op, backend), files in PROOFS.items():
        results = [by_file.get(file, (0, 0)) for file in files]
        if backend in backends and all(passed and not failed for passed, failed in results):
            kept = {name: where[name] for name in ("device", "driver", "torch", "triton", "commit", "date")}
            found.setdefault(op, {})[backend] = {**kept, "tests": sum(passed for passed, _ in results)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JUnit report of the tests")
    parser.add_argument("--backends", nargs="+", choices=("triton", "native"), default=["triton"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("run it on the GPU that ran the tests: the record names it")
    device = torch.device("cuda")
    record = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    found = validated(options.report, options.backends, rows.where(device))
    for op, by_backend in found.items():
        for backend, run in by_backend.items():
            record.setdefault(op, {}).setdefault(backend, {})[architecture(device)] = run
    text = json.dumps(record, indent=1, sort_keys=True)
    if options.out:
        options.out.write_text(f"{text}\n")
    else:
        print(text)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
