"""A pretend CUDA device for the CPU build of PyTorch 2.13: memory on the host, math by the CPU, a GPU's manners.

Tensors of two devices do not mix; streams and graph capture refuse what a GPU refuses; the current device is each
thread's own; autograd runs in device threads; random numbers come from generators of its own. Triton's kernels run in
its interpreter, or are specialised and compiled as by a launch; csrc/cuda runs by `tests.support.cuda_on_cpu`.

    python -m tests.pretend_cuda COMMAND...     builds the device and runs the command, and its children, with it

It does not show time, asynchrony, races between streams, CUDA's rounding and gaps of dtypes, cuDNN, Inductor, NCCL.

device.cpp: guard, allocator, hooks, generators, the ops, sync counts, graphs. torch_cuda.py: `torch.cuda`.
triton_launch.py: Triton's launches. extension.py: dab_fast's extension. syncs.py: what makes the host wait.
site/sitecustomize.py installs them while `import torch` runs; nothing here imports torch before that.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = "2.13"  # whose headers device.cpp is written for
LIBRARY = f"_pretend_device{sysconfig.get_config_var('EXT_SUFFIX')}"
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def why_not() -> str | None:
    """Why there can be no pretend device here, or None."""
    import torch

    if sys.platform != "linux":
        return "the pretend CUDA device has only been written for Linux"
    if COMPILER is None:
        return "no C++ compiler on this machine"
    if torch.version.cuda is not None or not version("torch").startswith(f"{TORCH}."):
        return f"the pretend CUDA device is for the CPU build of torch {TORCH}, not for {version('torch')}"
    return None


def build(folder: Path) -> Path:
    """The device, compiled in `folder` by the first process that comes: half a minute."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    library, source = folder / LIBRARY, HERE / "device.cpp"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file() or library.stat().st_mtime < source.stat().st_mtime:
            _compile(source, library)
    return library


def _compile(source: Path, library: Path) -> None:
    import torch
    from torch.utils import cpp_extension

    unfinished = library.with_suffix(".part")
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    command = [
        *(str(COMPILER), "-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-w"),
        "-DTORCH_EXTENSION_NAME=_pretend_device",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-I{path}" for path in includes),
        str(source),
        *(flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")),
        *("-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(unfinished)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    unfinished.rename(library)  # a process that runs keeps the old one


def environment(library: Path, **variables: str) -> dict[str, str]:
    """This process's environment with the device, for a command; `variables` besides.

    PRETEND_CUDA_DEVICES (2), PRETEND_CUDA_CAPABILITY (9.0), PRETEND_CUDA_L2 (bytes) describe the GPU;
    PRETEND_CUDA_SEED chooses which numbers a seed gives; with TRITON_INTERPRET=0 PRETEND_CUDA_TRITON says how far a
    launch compiles (cubin or ttgir), and with "-only" appended nothing is run.
    """
    paths = [str(HERE / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    new = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PRETEND_CUDA": str(library)}
    return {"TRITON_INTERPRET": "1", **os.environ, **new, **variables}


def install() -> None:
    """Of site/sitecustomize.py: brings the device as soon as torch is imported, and the rest as it is."""
    from tests.pretend_cuda import extension, imports, torch_cuda, triton_launch

    library = Path(os.environ["PRETEND_CUDA"])
    imports.when_imported("torch", torch_cuda.patch, before=functools.partial(torch_cuda.preload, library))
    imports.when_imported("triton.runtime.interpreter", triton_launch.patch_interpreter)
    imports.when_imported("triton.runtime.driver", triton_launch.set_driver)
    imports.when_imported("triton.backends.nvidia.compiler", triton_launch.shorten_pipeline)
    emulation = library.parents[1] / "cuda_on_cpu"  # where the tests of the emulation keep it
    imports.when_imported("dab_fast.backends.native._call", functools.partial(extension.patch, emulation))


def device():
    """The compiled module, once torch has been imported."""
    name = "_pretend_device"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, os.environ["PRETEND_CUDA"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
