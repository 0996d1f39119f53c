"""Which kernels a run of the tests marked `gpu` has validated: what `auto` may choose on that architecture.

    pytest tests -m gpu --junitxml=tests.xml
    python -m benchmarks.validate tests.xml [--backends triton native] [--out dab_fast/ops/validated.json]

An op's backend is validated if tests of it ran on the GPU and none of them failed, nor any of the whole decoder on
that backend. A report of interpreted kernels is refused, and one that lacks any of this checkout's tests marked `gpu`.
Prints {op: {backend: {architecture: record}}}, or with --out adds it to that file. Where two backends are validated
`auto` takes `native`; so add it only where the timed rows show it faster than `triton`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _proofs() -> dict[tuple[str, str], tuple[str, ...]]:
    """{(op, backend): the test files that prove its kernels}."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for op in sorted(path.stem for path in (ROOT / "dab_fast" / "ops").glob("[!_]*.py")):
        named = sorted(path.stem for path in (ROOT / "tests").glob(f"test_{op}*.py"))
        for backend, files in (
            ("triton", (*named, "test_triton_decoder")),
            ("native", ("test_native", "test_native_calls")),
        ):
            if (ROOT / "dab_fast" / "backends" / backend / f"{op}.py").exists():
                found[op, backend] = files
    return found


PROOFS = _proofs()
# What a record keeps of the report's properties.
KEPT = ("device", "driver", "python", "torch", "triton", "ptxas", "commit", "date")


class Refused(Exception):
    """Why a report validates nothing."""


def read(path: Path) -> Any:
    try:
        return ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise Refused(f"{path} is no JUnit report of a run that came to its end: {error}") from error


def collected() -> set[str]:
    """The tests marked `gpu` of this checkout, each as (class name, name) in a JUnit report, joined by "::"."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise Refused(f"pytest cannot collect this checkout's tests marked gpu: {said[-1]}")
    return {reported(line) for line in done.stdout.splitlines() if "::" in line}


def reported(test_id: str) -> str:
    """A pytest id, such as tests/test_a.py::test_b[1], as a JUnit report names the test: tests.test_a::test_b[1]."""
    path, bracket, parameters = test_id.partition("[")
    file, *names = path.split("::")
    *classes, name = names
    return f"{'.'.join([file.removesuffix('.py').replace('/', '.'), *classes])}::{name}{bracket}{parameters}"


def check(report: ElementTree.ElementTree, tests: set[str]) -> dict[str, str]:
    """The properties of a report, which must be of compiled kernels on a GPU and hold all of `tests`."""
    found = {p.get("name", ""): p.get("value", "") for p in report.iterfind(".//testsuite/properties/property")}
    if "mode" not in found:
        raise Refused("the report does not say how Triton's kernels ran, as one of `pytest tests -m gpu` does")
    if found["mode"] == "interpreted":
        raise Refused("the report is of interpreted kernels (no GPU was visible, or TRITON_INTERPRET was set)")
    if "architecture" not in found:
        raise Refused(f"the report is of a run without a GPU, on {found.get('device')}")
    ran = {f"{case.get('classname')}::{case.get('name')}" for case in report.iter("testcase")}
    if missing := sorted(tests - ran):
        raise Refused(f"the report lacks {len(missing)} of the {len(tests)} tests marked gpu, such as {missing[0]}")
    return found


def outcomes(report: ElementTree.ElementTree) -> dict[str, tuple[int, int]]:
    """{test file: (tests that passed, tests that did not)} of a JUnit report; skipped ones are neither."""
    found: dict[str, tuple[int, int]] = {}
    for case in report.iter("testcase"):
        if case.find("skipped") is not None:
            continue
        file = case.get("classname", "").rpartition(".")[2]
        wrong = case.find("failure") is not None or case.find("error") is not None
        passed, failed = found.get(file, (0, 0))
        found[file] = (passed + (not wrong), failed + wrong)
    return found


def validated(
    report: ElementTree.ElementTree,
    backends: list[str],
    where: dict[str, str],  # the report's properties
) -> dict[str, dict[str, dict[str, Any]]]:
    """{op: {backend: record}}; a test file that did not run validates nothing."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    by_file = outcomes(report)
    for (op, backend), files in PROOFS.items():
        results = [by_file.get(file, (0, 0)) for file in files]
        if backend in backends and all(passed and not failed for passed, failed in results):
            kept = {name: where.get(name, "") for name in KEPT}
            found.setdefault(op, {})[backend] = {**kept, "tests": sum(passed for passed, _ in results)}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JUnit report of the tests")
    parser.add_argument("--backends", nargs="+", choices=("triton", "native"), default=["triton"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    try:
        report = read(options.report)
        where = check(report, collected())
        found = validated(report, options.backends, where)
        if not found:
            raise Refused("of every op a test failed, or none ran")
    except Refused as reason:
        sys.exit(f"nothing is validated: {reason}")
    record = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for op, by_backend in found.items():
        for backend, run in by_backend.items():
            record.setdefault(op, {}).setdefault(backend, {})[where["architecture"]] = run
    text = json.dumps(record, indent=1, sort_keys=True)
    if options.out:
        options.out.write_text(f"{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
