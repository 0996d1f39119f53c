"""Whether a run of the tests compiles Triton's kernels or interprets them, and what its JUnit report says of that.

A process does one of the two: kernels on a CPU's tensors need the interpreter, and only compiled ones prove anything
about a GPU. So the tests marked `gpu` run alone: `pytest -m gpu` compiles where a GPU is visible, and every other run
interprets and skips them, saying so. Where TRITON_INTERPRET is set already, it decides between the two.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from _pytest.mark.expression import Expression

ALONE = "tests marked gpu run alone: pytest -m gpu"
NO_GPU = "no GPU is visible"


def asked_for(expression: str) -> bool:
    """Whether `-m expression` selects tests marked gpu, and no others."""
    if not expression:
        return False
    compiled = Expression.compile(expression)

    def selects(*marks: str) -> bool:
        return compiled.evaluate(lambda name, **_: name in marks)

    return (selects("gpu") or selects("gpu", "sweep")) and not (selects() or selects("sweep"))


def why_not(expression: str) -> str | None:
    """Why a run with `-m expression` skips the tests marked gpu, or None."""
    if not asked_for(expression):
        return ALONE
    return None if torch.cuda.is_available() else NO_GPU


def choose(expression: str) -> None:
    """Sets TRITON_INTERPRET, which Triton reads when it is imported, unless it is set."""
    os.environ.setdefault("TRITON_INTERPRET", "1" if why_not(expression) else "0")


def mode() -> str:
    """How Triton's kernels run in this process: "compiled", "interpreted", or "absent" without Triton."""
    try:
        import triton
    except ImportError:
        return "absent"
    return "interpreted" if triton.knobs.runtime.interpret else "compiled"


def properties(expression: str, collected: int) -> dict[str, Any]:
    """What a JUnit report says of its run: the mode, where it ran on which versions, and how many tests it collected.

    On a GPU also its architecture, and the release of the ptxas that Triton compiles with for it.
    """
    from dab_fast.bench import rows
    from dab_fast.ops._trust import architecture

    device = torch.device("cpu" if why_not(expression) else "cuda")
    found = {"mode": mode(), "collected": collected, **rows.where(device)}
    if device.type == "cuda":
        found["architecture"] = architecture(device)
        if found["mode"] != "absent":
            from triton.backends.nvidia.compiler import get_ptxas

            found["ptxas"] = get_ptxas(int(found["architecture"].removeprefix("sm_"))).version
    return found


def mark(expression: str, items: list[pytest.Item]) -> None:
    """Has the tests marked gpu skipped where they cannot run."""
    if reason := why_not(expression):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
