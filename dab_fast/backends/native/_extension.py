"""The compiled extension `dab_fast._C`: loading it, and telling what it is or why it is not there.

Imports nothing but the standard library at the top, so that setup.py can read `sources_stamp` from this file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[2]  # the folder of dab_fast
SOURCE_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
HOW_TO_BUILD = "`pip install -v .` (or `-e .`) compiles it and prints what it decided and why"


def sources_stamp(csrc: Path) -> str:
    """A short hash of every source of the extension: compiled into it, and compared when it is loaded."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def _load() -> tuple[ModuleType | None, str, BaseException | None]:
    """The extension, else why not and the error behind that. Kept, so that asking again costs nothing."""
    try:
        module = importlib.import_module("dab_fast._C")
    except ImportError as error:
        return None, _why_not_importable(PACKAGE, error), error
    reason = _why_stale(module, PACKAGE)
    return (None, reason, None) if reason else (module, "", None)


def _why_not_importable(package: Path, error: ImportError) -> str:
    built = sorted(p.name for p in package.glob("_C.*") if p.suffix in (".so", ".pyd", ".dylib"))
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if any(name == f"_C{suffix}" for name in built for suffix in suffixes):
        return f"dab_fast._C is broken, it cannot be loaded: {error}; {HOW_TO_BUILD}"
    if built:
        return f"dab_fast._C was built as {', '.join(built)}, this Python loads _C{suffixes[0]}; {HOW_TO_BUILD}"
    return f"dab_fast._C is not built; {HOW_TO_BUILD}"


def _why_stale(module: ModuleType, package: Path) -> str:
    from dab_fast._version import __version__

    version = getattr(module, "VERSION", "unknown")
    if version != __version__:
        return f"dab_fast._C is stale: built as version {version}, the package is {__version__}; {HOW_TO_BUILD}"
    csrc = package.parent / "csrc"
    if not (csrc / "module.cpp").is_file() or not (package.parent / "setup.py").is_file():
        return ""  # an installed package: its extension came with it
    built, now = module.SOURCES, sources_stamp(csrc)
    if built != now:
        return f"dab_fast._C is stale: built from sources {built}, {csrc} now holds {now}; {HOW_TO_BUILD}"
    return ""


def extension_problem() -> str:
    """Why `dab_fast._C` cannot be used; empty if it can."""
    return _load()[1]


def extension() -> ModuleType:
    """`dab_fast._C`. Raises ImportError with the one original cause if it is missing, broken or stale."""
    module, reason, cause = _load()
    if module is None:
        raise ImportError(reason) from cause
    return module
