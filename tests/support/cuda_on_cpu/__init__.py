"""The CUDA kernels on a CPU: csrc/cuda, as it is, compiled by the C++ compiler against the headers in this folder.

What the kernels compute and where they read and write is then proved without a GPU; how a GPU schedules threads and
orders memory, and what nvcc and its libm make of the code, is not.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-U_FORTIFY_SOURCE",  # its check of longjmp takes a change of stacks for an error
]
# Multiply-add is fused, as by nvcc. No sanitizer's own library is linked: memory.cpp and undefined.cpp stand for them.
KERNEL_FLAGS = [
    *("-x", "c++", "-D__CUDACC__", "-include", "cuda_runtime.h", "-Wno-unknown-pragmas"),
    *(["-march=native"] if platform.machine() == "x86_64" else []),
    "-fexpensive-optimizations",  # GCC fuses with it
    *("-fsanitize=thread", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
]
DYNAMIC_SHARED_BYTES = 48 << 10


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if sys.platform != "linux":
        return "the emulation of CUDA has only been written for Linux"
    if COMPILER is None:
        return "no C++ compiler on this machine"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not CSRC.is_dir():
        return f"there are no sources at {CSRC}"
    return None


def build(folder: Path) -> Path:
    """The extension with its CUDA part, compiled in `folder` by the first process that comes."""
    import fcntl

    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "_C.so"
        newest = max(path.stat().st_mtime for path in (*CSRC.rglob("*"), *HERE.iterdir()) if path.is_file())
        if not library.is_file() or library.stat().st_mtime < newest:
            compile_to(library)
    return library


def compile_to(library: Path) -> None:
    import pybind11

    folder = library.parent
    names = ("VERSION", "SOURCES", "COMPILER", "NVCC", "CUDA_ARCHS", "WHY_NO_CUDA")
    config = [f'#define DAB_{name} "emulation"' for name in names]
    (folder / "build_config.h").write_text("\n".join([*config, "#define DAB_CUDA 1", ""]))
    paths = (HERE, folder, pybind11.get_include(), sysconfig.get_path("include"))
    compile_any = [COMPILER, *FLAGS, *(f"-I{path}" for path in paths)]
    objects = []

    def compile_one(source: Path, *flags: str) -> None:
        objects.append(str(folder / f"{source.name}.o"))
        run([*compile_any, *flags, "-c", str(source), "-o", objects[-1]])

    for source in (CSRC / "module.cpp", *sorted((CSRC / "cpu").glob("*.cpp")), *sorted(HERE.glob("*.cpp"))):
        compile_one(source, "-fopenmp-simd")
    for source in (*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cu"))):
        wrapped = folder / source.name
        wrapped.write_text(with_dynamic_shared_memory(source))
        compile_one(wrapped, *KERNEL_FLAGS)
    unfinished = library.with_suffix(".part")
    run([COMPILER, "-shared", *objects, "-lpthread", "-o", str(unfinished)])
    unfinished.rename(library)


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def with_dynamic_shared_memory(source: Path) -> str:
    """Memory for the arrays `extern __shared__` of `source`, which a launch provides on a GPU, and `source`."""
    lines = ["namespace dab_fast {", "namespace {"]
    for kind, name in sorted(set(re.findall(r"extern __shared__ (\w+) (\w+)\[\];", source.read_text()))):
        lines.append(f"thread_local {kind} {name}[{DYNAMIC_SHARED_BYTES} / sizeof({kind})];")
        address = f"[]() -> void* {{ return {name}; }}"
        lines.append(f"[[maybe_unused]] const bool {name}_told = emulation::dynamic_shared({address}, sizeof {name});")
    return "\n".join([*lines, "}", "}", f'#include "{source}"', ""])


class Emulation:
    """The library that `build` made. Its kernels run in the calling thread, before the launch returns."""

    def __init__(self, library: Path) -> None:
        spec = importlib.util.spec_from_file_location("_C", library)
        assert spec is not None and spec.loader is not None
        self.C = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.C)
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_tensor.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._library.misuse.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
        self._library.misuse.restype = ctypes.c_char_p

    def allow(self, x: Tensor, writable: bool) -> None:
        """From now on kernels may access nothing but what this was called for."""
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        self._library.emulation_tensor(x.data_ptr(), (last + 1) * x.element_size(), writable)

    def forget(self) -> None:
        self._library.emulation_forget_tensors()

    def misuse(self, kernel: str, x: Tensor, threads: int = 64) -> str:
        """Runs a kernel of misuse.cu and says what was wrong with it, or ""."""
        return self._library.misuse(kernel.encode(), x.data_ptr(), threads).decode()

    @contextmanager
    def instead_of_cpu(self, order: int = 0) -> Iterator[None]:
        """The backend `native` takes CPU tensors for CUDA tensors, and its kernels may access the operands alone.

        Args:
            order: in which the threads of a block run, and blocks: 0 upwards, -1 downwards, else shuffled by this seed.
        """
        from dab_fast.backends.native import _call

        def told(function: Callable[..., Any], writable: bool) -> Callable[..., Any]:
            def tell(x: Tensor | None) -> Any:
                if x is not None:
                    self.allow(x, writable)
                return function(x)

            return tell

        def partial_sums(*args: Any) -> Tensor:
            partial = real_partial_sums(*args)
            self.allow(partial, True)
            return partial

        real_partial_sums = _call.partial_sums
        with mock.patch.multiple(
            _call,
            C=self,
            on_cuda=lambda x: True,
            on_device_of=lambda x: nullcontext(),
            stream_of=lambda x: (0, 0),
            operand=told(_call.operand, False),
            result_operand=told(_call.result_operand, True),
            partial_sums=partial_sums,
        ):
            self._library.emulation_order(order)
            yield

    def __getattr__(self, name: str) -> Any:
        """As the extension has it; a call of a kernel ends the permissions given for it."""
        found = getattr(self.C, name)
        if not name.startswith("cuda_box"):
            return found

        def call(*args: Any) -> None:
            try:
                found(*args)
            finally:
                self.forget()

        return call
