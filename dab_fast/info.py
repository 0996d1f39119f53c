"""What is installed, and what can run here."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch

from dab_fast._version import __version__
from dab_fast.backends.native._extension import extension, extension_problem
from dab_fast.ops._backends import why_not


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
    reason = extension_problem()
    module = None if reason else extension()
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
