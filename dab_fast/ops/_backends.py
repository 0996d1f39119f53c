"""Which implementation runs an op: `torch` (plain PyTorch), `triton`, or `native` (the extension).

The choice is `auto` unless `backend(...)` or the environment variable DAB_FAST_BACKEND, which wins, says otherwise.
`auto` takes the first backend that can run these tensors, and a GPU kernel only on an architecture on which a committed
GPU run validated it (`dab_fast/validated.json`: {op: {backend: {architecture: record}}}). A backend chosen by name
never falls back. Why a backend cannot run something is said in one place, `why_not`; the error, the log line and the
reports quote it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("native", "triton", "torch")  # in the order in which `auto` tries them
PACKAGES = {"native": "dab_fast.native", "triton": "dab_fast.kernels"}  # a module per op, with `forward` and `backward`
FASTER_ON_CPU = ("box_position_embed",)  # ops whose compiled code was measured faster than PyTorch: docs/extension.md
VARIABLE = "DAB_FAST_BACKEND"

Limits = Mapping[str, Callable[..., str | None]]  # backend: what its kernels cannot do with an op's arguments, or None

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


def architecture(device: torch.device) -> str:
    """The name under which validated.json records a GPU, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _validated() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads((Path(__file__).parents[1] / "validated.json").read_text())


def _triton_why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        import triton

        if not triton.knobs.runtime.interpret:
            return "its kernels need a CUDA tensor, got cpu (TRITON_INTERPRET=1 runs them there, slowly)"
    elif device.type != "cuda":
        return f"its kernels need a CUDA tensor, got {device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need sm_80 or newer, got {architecture(device)}"
    return None


def _native_why_not(op: str, device: torch.device) -> str | None:
    package = PACKAGES["native"]
    if importlib.util.find_spec(f"{package}.{op}") is None:
        return f"it has no {op}"
    try:
        call = importlib.import_module(f"{package}._call")
    except ImportError as error:
        return str(error)
    return call.why_not(device)


def why_not(name: str, op: str, device: torch.device, *, trusted_only: bool = False) -> str | None:
    """Why backend `name` cannot run `op` on `device`, or None.

    With `trusted_only`, also None only where `auto` may choose it: on a CPU compiled code that is faster, on a GPU
    validated kernels.
    """
    if name == "torch":
        return None
    reason = _native_why_not(op, device) if name == "native" else _triton_why_not(device)
    if reason is None and trusted_only:
        if device.type == "cpu" and name == "triton":
            return "the interpreter runs on request alone"
        if device.type == "cpu" and op not in FASTER_ON_CPU:
            return "on a CPU it was not measured faster than plain PyTorch"
        if device.type == "cuda" and architecture(device) not in _validated().get(op, {}).get(name, {}):
            return f"no committed GPU run validated it on {architecture(device)}"
    return reason


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


def _functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which only plain PyTorch serves."""
    return _functorch() or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether a graph is recorded that is to run without this package: by torch.export or torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
_candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]
_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]

_known: dict[tuple[str, str, torch.device], tuple[tuple[str, ...], str]] = {}
_logged: set[tuple[str, torch.device, str]] = set()


def select(op: str, x: Tensor, limits: Limits, *args: Any) -> str:
    """The backend that runs `op` on the device of x.

    Args:
        limits: for a backend, the function that says of `args` what its kernels cannot do with them, or None.

    Raises:
        BackendUnavailable: the backend chosen by name cannot, with the reason.
    """
    if exporting():
        return "torch"  # an exported graph must not depend on this package
    compiling = torch.compiler.is_compiling()
    if compiling:
        names, why = _candidates(_choice, op, x.device.type, x.device.index)
    else:
        key = (_choice, op, x.device)
        found = _known.get(key)
        if found is None:
            found = _known[key] = _candidates(_choice, op, x.device.type, x.device.index)
        names, why = found
    if transformed():
        names, why = tuple(n for n in names if n == "torch"), "torch.func and forward-mode AD need plain PyTorch"
    for name in names:
        reason = limits[name](*args) if name in limits else None
        if reason is None:
            if why and name == "torch" and not compiling:
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
        module = importlib.import_module(f"{PACKAGES[name]}.{stem}")
        found = _implementations[name, op] = module.forward if op == stem else module.backward
    return found
