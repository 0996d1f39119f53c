"""Which implementation runs an op: `torch` (plain PyTorch), `triton`, or `native` (the extension).

The choice is `auto` unless `backend(...)` or the environment variable DAB_FAST_BACKEND, which wins, says otherwise.
`auto` takes the first backend that can run these tensors and is trusted with them (`_trust.py`). A backend chosen by
name never falls back. Each backend says for itself why it cannot run something, by `why_not` and its `limits`; the
error, the log line and the reports quote it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dab_fast._tracing import compiling, constant_of_a_graph, exporting, transformed
from dab_fast.backends.native import limits as native_limits
from dab_fast.backends.triton import limits as triton_limits
from dab_fast.ops._trust import why_not_faster, why_not_trusted

BACKENDS = ("native", "triton", "torch")  # in the order in which `auto` tries them
VARIABLE = "DAB_FAST_BACKEND"

# What a backend's kernels cannot do with an op's arguments: a function of the op's name, if there is one.
_LIMITS: dict[str, ModuleType] = {"native": native_limits, "triton": triton_limits}

logger = logging.getLogger("dab_fast")


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run this call."""


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f'{source} must be "auto", "torch", "triton" or "native", got {name!r}')
    return name


_choice = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
_environment_wins = VARIABLE in os.environ


class backend:
    """Chooses the backend of every op in this process: `backend("triton")`, or for a while: `with backend("triton"):`.

    "auto" takes, per op, the best backend that can run its tensors; another one never falls back.

    Args:
        name: "auto", "torch", "triton" or "native". Without effect where DAB_FAST_BACKEND is set.

    Returns:
        What as a context manager puts the choice before it back; a call alone leaves the new one in force.

    Raises:
        ValueError: `name` is none of these.
    """

    def __init__(self, name: str) -> None:
        global _choice
        self._before = _choice
        _checked(name, "backend")
        if not _environment_wins:
            _choice = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._before


def chosen_backend() -> str:
    """The choice in force: "auto", "torch", "triton" or "native"."""
    return _choice


def why_not(name: str, op: str, device: torch.device, *, trusted_only: bool = False) -> str | None:
    """Why backend `name` cannot run `op` on `device`, or None. With `trusted_only` also why `auto` must not take it."""
    reason = importlib.import_module(f"dab_fast.backends.{name}").why_not(op, device)
    return why_not_trusted(name, op, device) if reason is None and trusted_only else reason


@constant_of_a_graph
def _candidates(choice: str, op: str, device_type: str, device_index: int | None) -> tuple[tuple[str, ...], str]:
    """The backends to try in turn for `op` on a device, and why the others cannot."""
    device = torch.device(device_type, device_index) if device_index is not None else torch.device(device_type)
    if choice != "auto":
        reason = why_not(choice, op, device)
        return ((choice,), "") if reason is None else ((), f"{choice}: {reason}")
    reasons = {name: why_not(name, op, device, trusted_only=True) for name in BACKENDS}
    return (
        tuple(name for name, reason in reasons.items() if reason is None),
        "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None),
    )


_known: dict[tuple[str, str, torch.device], tuple[tuple[str, ...], str]] = {}
_logged: set[tuple[str, torch.device, str]] = set()


def _choose(op: str, device: torch.device) -> tuple[tuple[str, ...], str]:
    if compiling():
        return _candidates(_choice, op, device.type, device.index)
    key = (_choice, op, device)
    found = _known.get(key)
    if found is None:
        found = _known[key] = _candidates(_choice, op, device.type, device.index)
    return found


def candidates(op: str, device: torch.device) -> tuple[str, ...]:
    """The backends that may run `op` on a device, the first choice first; none where the one chosen by name cannot."""
    return ("torch",) if exporting() else _choose(op, device)[0]


def select(op: str, x: Tensor, *args: Any) -> str:
    """The backend that runs `op` on the device of x.

    Args:
        args: what the backends' `limits.<op>` look at.

    Raises:
        BackendUnavailable: the backend chosen by name cannot, with the reason.
    """
    if exporting():
        return "torch"  # an exported graph must not depend on this package
    names, why = _choose(op, x.device)
    if transformed():
        names, why = tuple(n for n in names if n == "torch"), "torch.func and forward-mode AD need plain PyTorch"
    for name in names:
        limit = getattr(_LIMITS.get(name), op, None)
        reason = None if limit is None else limit(*args)
        if reason is None and _choice == "auto":
            reason = why_not_faster(name, op, *args)
        if reason is None:
            if why and name == "torch" and not compiling():
                _log_fallback(op, x.device, why)
            return name
        why = f"{why}; {name}: {reason}" if why else f"{name}: {reason}"
    raise BackendUnavailable(f"{op} on {x.device}: {why}")


def _log_fallback(op: str, device: torch.device, why: str) -> None:
    """One line per op and reason; a warning where a GPU is left to plain PyTorch."""
    if (op, device, why) not in _logged:
        _logged.add((op, device, why))
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        logger.log(level, "%s on %s runs in plain PyTorch (%s)", op, device, why)


_implementations: dict[tuple[str, str], Callable[..., Any]] = {}


def implementation(name: str, op: str) -> Callable[..., Any]:
    """The function of backend `name` behind torch.ops.dab_fast.<op>."""
    found = _implementations.get((name, op))
    if found is None:
        stem = op.removesuffix("_backward")
        module = importlib.import_module(f"dab_fast.backends.{name}.{stem}")
        found = _implementations[name, op] = module.forward if op == stem else module.backward
    return found
