"""What CONTRIBUTING says of the house: which files know an op."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dab_fast.ops._examples import examples

PACKAGE = Path(__file__).parents[1] / "dab_fast"
OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))
# Whoever uses or measures some op by name; a new op does without.
USERS = ("__init__.py", "info.py", "warmup.py", "ops/_trust.py", "adapters/", "bench/", "decoder/", "backends/native/")


def names(path: Path) -> set[str]:
    """Every name, attribute and string of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("op", OPS)
def test_a_new_op_touches_five_files(op):
    """Limits and a way of its own in plain PyTorch are for the ops that need them."""
    five = {
        "reference.py",
        f"ops/{op}.py",
        "ops/__init__.py",
        "ops/_examples.py",
        f"backends/triton/{op}.py",
    }
    optional = {"backends/triton/limits.py", "backends/native/limits.py", f"backends/torch/{op}.py"}
    known = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if op in names(path)}
    assert known | {f"backends/triton/{op}.py"} >= five
    assert {path for path in known if not path.startswith(USERS)} <= five | optional


def test_every_op_has_examples():
    """So that selftest and the accuracy tests run it on every backend."""
    assert {example.op for example in examples()} == set(OPS)
