"""The compiled extension `dab_fast._C`: loading it, and telling what it is or why it is not there.

Imports nothing but the standard library at the top, so that setup.py can read `sources_stamp` from this file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
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
    from dab_fast import __version__

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


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What is installed, and what can run here. `print()` shows one line per field."""

    version: str
    extension: str  # where dab_fast._C lies, or why it cannot be used
    compiler: str | None
    cpu_isa: str | None  # instruction set the CPU loops were chosen for on this machine
    nvcc: str | None  # or why the CUDA part was not built
    cuda_archs: tuple[str, ...]  # "sm_80", ... and "compute_90" for PTX
    cuda_runtime: str | None  # linked statically
    backends: dict[str, str]  # "available", or why not

    def __str__(self) -> str:
        lines = [f"dab_fast {self.version}"]
        for field in dataclasses.fields(self)[1:-1]:
            value = getattr(self, field.name)
            lines.append(f"  {field.name}: {', '.join(value) if isinstance(value, tuple) else value}")
        lines += [f"  backend {name}: {state}" for name, state in self.backends.items()]
        return "\n".join(lines)


def build_info() -> BuildInfo:
    """Version, compilers, architectures, CUDA runtime, and the backends available here or why not."""
    from dab_fast import __version__

    module, reason, _ = _load()
    if module is None:
        return BuildInfo(__version__, reason, None, None, None, (), None, _backends(None))
    runtime = None
    if module.HAS_CUDA:
        number = module.cuda_runtime_version()
        runtime = f"{number // 1000}.{number % 1000 // 10}"
    return BuildInfo(
        version=__version__,
        extension=str(module.__file__),
        compiler=module.COMPILER,
        cpu_isa=module.cpu_isa(),
        nvcc=module.NVCC or f"not built: {module.WHY_NO_CUDA}",
        cuda_archs=tuple(module.CUDA_ARCHS.split()),
        cuda_runtime=runtime,
        backends=_backends(module),
    )


def _backends(module: ModuleType | None) -> dict[str, str]:
    """What can run here on request, in the words of the backends themselves."""
    import torch

    from dab_fast.ops._backends import why_not

    op = "box_position_embed"  # the op that every backend has
    states = {"torch": None, "native (CPU)": why_not("native", op, torch.device("cpu"))}
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        states["native (CUDA)"] = why_not("native", op, gpu)
        states["triton"] = why_not("triton", op, gpu)
    else:
        no_gpu = "torch finds no GPU"
        states["native (CUDA)"] = states["triton"] = no_gpu
        if module is None:
            states["native (CUDA)"] = extension_problem()
        elif not module.HAS_CUDA:
            states["native (CUDA)"] = f"not built: {module.WHY_NO_CUDA}"
        elif error := module.cuda_devices()[1]:
            states["native (CUDA)"] = f"{no_gpu} ({error})"
    return {name: reason or "available" for name, reason in states.items()}
