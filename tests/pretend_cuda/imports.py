"""Patches of modules that have not been imported yet."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

_waiting: dict[str, tuple[Callable[[], None], Callable[[Any], None]]] = {}


def when_imported(name: str, patch: Callable[[Any], None], before: Callable[[], None] = lambda: None) -> None:
    """Calls patch(module) right after module `name` is imported, and before() right before."""
    if name in sys.modules:
        raise RuntimeError(f"{name} was imported before the pretend CUDA device")
    if not any(isinstance(x, _Finder) for x in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting[name] = before, patch


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _waiting:
            return None
        before, patch = _waiting.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            before()
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec
