"""Builds dab_fast._C where that is possible, and says what it decided and why (docs/extension.md).

DAB_FAST_BUILD=auto (default): CPU and CUDA code, CPU code alone, or pure Python, by what this machine has.
DAB_FAST_BUILD=0 | cpu | cuda: pure Python | CPU code alone | both, and an error where that cannot be.
DAB_FAST_CUDA_ARCHS="100a 120": architectures to compile for besides sm_80 and sm_90a.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CHOICES = ("auto", "0", "cpu", "cuda")
ARCHS = ("80", "90a")
OLDEST_NVCC = (11, 8)
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Compiled once each from the same source, the best one chosen at run time.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


class CannotBuild(Exception):
    """Why something cannot be built here."""


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")


@dataclasses.dataclass(frozen=True)
class Host:
    cxx: list[str]
    version: str
    includes: list[str]

    @property
    def compile(self) -> list[str]:
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wextra"]
        return [*self.cxx, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]

    @property
    def link(self) -> list[str]:
        # Hides what static libraries bring, so that no other library's symbol of that name takes its place.
        flags = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        hide = [] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"]
        return [*self.cxx, *flags, *hide, *shlex.split(os.environ.get("LDFLAGS", ""))]


@dataclasses.dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    runtime: str  # libcudart_static.a
    archs: tuple[str, ...]  # "80", "90a", ...
    ptx: str  # "90"

    @property
    def names(self) -> list[str]:
        return [*(f"sm_{arch}" for arch in self.archs), f"compute_{self.ptx}"]

    def compile(self, host: Host) -> list[str]:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        targets.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        flags = ["-std=c++17", "-O3", "-ccbin", host.cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        return [self.nvcc, *flags, "-Wno-deprecated-gpu-targets", *targets]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to build; `host` None is pure Python, `cuda` None is no CUDA part."""

    host: Host | None
    cuda: Cuda | None
    why_not: str  # what is left out, and why; empty if nothing is

    def __str__(self) -> str:
        if self.host is None:
            return f"pure Python, no compiled extension: {self.why_not}"
        if self.cuda is None:
            return f"CPU extension with {self.host.version}; no CUDA part: {self.why_not}"
        return (
            f"CPU and CUDA extension with {self.host.version} and {self.cuda.version} for {', '.join(self.cuda.names)}"
        )


def find_host() -> Host:
    if sys.platform == "win32":
        raise CannotBuild("the extension has not been ported to Windows")
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = [wanted] if wanted else [[path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    if not found:
        raise CannotBuild("no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    cxx = found[0]
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 is not installed, which a build without isolation needs") from None
    host = Host(cxx, "", [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))])
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <Python.h>\n#include <thread>\nint probe() { return PY_MAJOR_VERSION; }\n")
        try:
            result = run([*host.compile, *host.includes, "-c", str(probe), "-o", f"{probe}.o"])
        except OSError as error:
            raise CannotBuild(f"{shlex.join(cxx)} cannot be run: {error}") from error
    if result.returncode:
        raise CannotBuild(f"{shlex.join(cxx)} cannot compile for this Python: {first_error(result.stdout)}")
    version = run([*cxx, "--version"]).stdout.splitlines()[0]
    return dataclasses.replace(host, version=version)


def nvcc_candidates() -> list[str]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes]
    candidates += [path] if (path := shutil.which("nvcc")) else []
    # The nvidia-cuda-nvcc package, also where an isolated build hides the environment it installs into.
    for site in dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        candidates += [str(path) for path in sorted(Path(site or ".", "nvidia").glob("*/bin/nvcc"))]
    return [path for path in dict.fromkeys(candidates) if os.access(path, os.X_OK)]


def find_cuda(host: Host) -> Cuda:
    candidates = nvcc_candidates()
    if not candidates:
        raise CannotBuild("nvcc not found (looked in $CUDA_HOME, PATH and the nvidia-cuda-nvcc package)")
    reasons = []
    for nvcc in candidates:
        try:
            return check_nvcc(nvcc, host)
        except CannotBuild as reason:
            reasons.append(str(reason))
    raise CannotBuild("; ".join(reasons))


def check_nvcc(nvcc: str, host: Host) -> Cuda:
    version = run([nvcc, "--version"])
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", version.stdout)
    if version.returncode or not release:
        raise CannotBuild(f"{nvcc} cannot be run: {first_error(version.stdout)}")
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        raise CannotBuild(
            f"{nvcc} is CUDA {release[1]}.{release[2]}, at least {'.'.join(map(str, OLDEST_NVCC))} is needed"
        )
    extra = [
        arch.removeprefix("sm_") for arch in re.split(r"[\s,;]+", os.environ.get("DAB_FAST_CUDA_ARCHS", "")) if arch
    ]
    known = run([nvcc, "--list-gpu-code"]).stdout.split()
    # `--list-gpu-code` leaves out the "a" and "f" variants.
    unknown = [arch for arch in extra if f"sm_{arch.rstrip('af')}" not in known]
    if unknown:
        raise SystemExit(f"dab_fast: DAB_FAST_CUDA_ARCHS names {', '.join(unknown)}, {nvcc} knows {', '.join(known)}")
    archs = tuple(dict.fromkeys([arch for arch in ARCHS if f"sm_{arch.rstrip('a')}" in known] + extra))
    ptx = max((arch.rstrip("af") for arch in archs), key=int)
    runtime = find_static_runtime(nvcc)
    cuda = Cuda(nvcc, f"nvcc {release[3]}", runtime, archs, ptx)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text(
            "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n__global__ void probe(__half* x) { *x = 0; }\n"
        )
        result = run([*cuda.compile(host), "-c", str(probe), "-o", f"{probe}.o"])
    if result.returncode:
        raise CannotBuild(f"{nvcc} with {host.cxx[0]} cannot compile: {first_error(result.stdout)}")
    return cuda


def find_static_runtime(nvcc: str) -> str:
    # nvcc knows its own root, where a wrapper script on PATH tells nothing.
    described = run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]).stdout
    top = re.search(r"TOP=(.+)", described)
    root = Path(top[1].strip() if top else Path(nvcc).resolve().parent.parent)
    # Of the packages, nvidia/cu13 holds both; nvidia/cuda_nvcc has nvidia/cuda_runtime next to it.
    for base in (root, root.parent / "cuda_runtime"):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (path := base / folder / "libcudart_static.a").is_file():
                return str(path.resolve())
    raise CannotBuild(f"{nvcc} has no libcudart_static.a under {root} (the nvidia-cuda-runtime package holds it)")


@functools.cache
def plan() -> Plan:
    choice = os.environ.get("DAB_FAST_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"dab_fast: DAB_FAST_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    decision = decide(choice)
    print(f"dab_fast: {decision} (DAB_FAST_BUILD={choice})", file=sys.stderr, flush=True)
    return decision


def decide(choice: str) -> Plan:
    if choice == "0":
        return Plan(None, None, "asked for")
    try:
        host = find_host()
    except CannotBuild as reason:
        if choice != "auto":
            raise SystemExit(f"dab_fast: DAB_FAST_BUILD={choice}, but {reason}") from reason
        return Plan(None, None, str(reason))
    if choice == "cpu":
        return Plan(host, None, "DAB_FAST_BUILD=cpu")
    try:
        return Plan(host, find_cuda(host), "")
    except CannotBuild as reason:
        if choice == "cuda":
            raise SystemExit(f"dab_fast: DAB_FAST_BUILD=cuda, but {reason}") from reason
        return Plan(host, None, str(reason))


class MaybeNative(Distribution):
    """A wheel without the extension is pure, and carries no platform in its name."""

    def has_ext_modules(self) -> bool:
        return plan().host is not None


@dataclasses.dataclass(frozen=True)
class Step:
    command: list[str]  # writes `output`, and for a compilation its dependencies to `output`.d
    output: Path
    inputs: list[Path]
    compiles: bool = True


class BuildNative(build_ext):
    """Compiles with ninja where it is there, in parallel and only what changed; else one file after the other."""

    def build_extension(self, ext: Extension) -> None:
        decision = plan()
        if decision.host is None:
            return
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(folder / "build_config.h", self.config(decision))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        steps = self.steps(decision, folder, target)
        ninja = find_ninja()
        if ninja:
            build_with_ninja(ninja, folder, steps)
        else:
            print("dab_fast: no ninja, compiling one file after the other", file=sys.stderr, flush=True)
            for step in steps:
                print(shlex.join(step.command), flush=True)
                subprocess.run(step.command, check=True)

    def config(self, decision: Plan) -> str:
        # Read by itself: importing dab_fast needs torch, which an isolated build does not have.
        spec = importlib.util.spec_from_file_location(
            "_extension", ROOT / "dab_fast" / "backends" / "native" / "_extension.py"
        )
        extension = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = extension  # dataclasses look their module up
        spec.loader.exec_module(extension)
        values = {
            "VERSION": self.distribution.get_version(),
            "SOURCES": extension.sources_stamp(CSRC),
            "COMPILER": decision.host.version,
            "NVCC": decision.cuda.version if decision.cuda else "",
            "CUDA_ARCHS": " ".join(decision.cuda.names) if decision.cuda else "",
            "WHY_NO_CUDA": "" if decision.cuda else decision.why_not,
        }
        lines = [f"#define DAB_{name} {quoted(value)}" for name, value in values.items()]
        if decision.cuda:
            lines.append("#define DAB_CUDA 1")
        return "\n".join([*lines, ""])

    def steps(self, decision: Plan, folder: Path, target: Path) -> list[Step]:
        host = decision.host
        steps: list[Step] = []

        def compile_step(command: list[str], source: Path, name: str) -> None:
            output = folder / f"{name}.o"
            dependencies = ["-MMD", "-MF", f"{output}.d"]
            steps.append(Step([*command, *dependencies, "-c", str(source), "-o", str(output)], output, [source]))

        x86 = ["-DDAB_X86_ISAS"] if X86 else []
        if decision.cuda:  # the slowest first
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                compile_step(decision.cuda.compile(host), source, source.stem)
        compile_step([*host.compile, *host.includes, f"-I{folder}"], CSRC / "module.cpp", "module")
        for isa, flags in (X86_ISAS if X86 else {}).items():
            compile_step([*host.compile, *flags, f"-DDAB_ISA={isa}"], CSRC / "cpu" / "loops.cpp", f"loops_{isa}")
        compile_step(host.compile, CSRC / "cpu" / "loops.cpp", "loops_portable")
        compile_step([*host.compile, *x86], CSRC / "cpu" / "cpu.cpp", "cpu")
        objects = [step.output for step in steps]
        libraries = ["-lpthread"]
        if decision.cuda:
            libraries = [decision.cuda.runtime, *libraries, "-ldl", "-lrt"]
        command = [*host.link, *map(str, objects), *libraries, "-o", str(target)]
        return [*steps, Step(command, target, objects, compiles=False)]


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def find_ninja() -> str | None:
    with contextlib.suppress(ImportError):
        import ninja

        path = Path(ninja.BIN_DIR, "ninja")
        if path.is_file():
            return str(path)
    return shutil.which("ninja")


def build_with_ninja(ninja: str, folder: Path, steps: list[Step]) -> None:
    def escaped(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = ["ninja_required_version = 1.5", "rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $cmd"]
    for step in steps:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {escaped(step.output)}: {rule} {' '.join(map(escaped, step.inputs))}")
        lines.append(f"  cmd = {shlex.join(step.command).replace('$', '$$')}")
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    subprocess.run([ninja, "-C", str(folder)], check=True)


setup(
    distclass=MaybeNative,
    ext_modules=[Extension("dab_fast._C", sources=["csrc/module.cpp"], language="c++")],
    cmdclass={"build_ext": BuildNative},
)
