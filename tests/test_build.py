"""What setup.py decides and says, what the extension it built holds, and what is said when that cannot be used."""

import ctypes.util
import importlib.machinery
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dab_fast
from dab_fast.backends.native import _extension

ROOT = Path(__file__).parents[1]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
NVCC = shutil.which("nvcc")
VARIABLES = ("DAB_FAST_BUILD", "DAB_FAST_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "LDFLAGS")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def built():
    if problem := _extension.extension_problem():
        if "is not built" not in problem:
            raise ImportError(problem)
        pytest.skip(problem)
    return _extension.extension()


@pytest.fixture
def setup_py(monkeypatch, tmp_path):
    """The functions of setup.py, on a machine with nothing but what a test puts on PATH."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    found = runpy.run_path(str(ROOT / "setup.py"))
    # It looks for packages that bring nvcc where these two say. What it imports, such as pybind11, stays importable.
    found["decide"].__globals__["sysconfig"] = SimpleNamespace(get_path=_no_site_packages)
    found["decide"].__globals__["sys"] = SimpleNamespace(**{**vars(sys), "path": []})
    return found


def _no_site_packages(name):
    import sysconfig

    return sysconfig.get_path(name) if name == "include" else "/nonexistent"


REAL_PATH = os.environ.get("PATH", "")


def on_path(folder, name, script=None):
    """Puts a tool of this machine, or a script that stands for one, on a PATH that has nothing else."""
    # A wrapper and not a link: a compiler finds its other parts on the real PATH.
    script = script or f'PATH="{REAL_PATH}" exec {shutil.which(name)} "$@"'
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_pure_python_is_said(setup_py):
    assert str(setup_py["decide"]("0")) == "pure Python, no compiled extension: asked for"
    assert str(setup_py["decide"]("auto")) == (
        "pure Python, no compiled extension: no C++ compiler found (looked for $CXX, c++, g++, clang++)"
    )


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_a_choice_that_cannot_be_met_is_an_error(setup_py, choice):
    with pytest.raises(SystemExit, match=f"DAB_FAST_BUILD={choice}, but no C\\+\\+ compiler found"):
        setup_py["decide"](choice)


def test_an_unknown_choice_is_an_error(setup_py, monkeypatch):
    monkeypatch.setenv("DAB_FAST_BUILD", "gpu")
    with pytest.raises(SystemExit, match="DAB_FAST_BUILD must be one of auto, 0, cpu, cuda, got 'gpu'"):
        setup_py["plan"]()


def test_a_compiler_that_fails_is_said(setup_py, monkeypatch, tmp_path):
    on_path(tmp_path, "c++", "echo 'probe.cpp:1:10: fatal error: Python.h: No such file or directory'; exit 1")
    assert "c++ cannot compile for this Python: probe.cpp:1:10: fatal error: Python.h" in str(
        setup_py["decide"]("auto")
    )
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "/nonexistent/c++ cannot be run" in str(setup_py["decide"]("auto"))


@needs_compiler
def test_no_pybind11_is_said(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "pybind11 is not installed, which a build without isolation needs" in str(setup_py["decide"]("auto"))


@needs_compiler
def test_cpu_part_without_nvcc(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = setup_py["decide"]("auto")
    assert re.fullmatch(r"CPU extension with .*; no CUDA part: nvcc not found \(looked in .*\)", str(found))
    assert setup_py["decide"]("cpu").why_not == "DAB_FAST_BUILD=cpu"
    with pytest.raises(SystemExit, match="DAB_FAST_BUILD=cuda, but nvcc not found"):
        setup_py["decide"]("cuda")
    on_path(tmp_path, "nvcc", "echo 'Cuda compilation tools, release 11.2, V11.2.152'")
    assert "nvcc is CUDA 11.2, at least 11.8 is needed" in str(setup_py["decide"]("auto"))
    on_path(tmp_path, "nvcc", "echo 'nvcc error: no license'; exit 1")
    assert "nvcc cannot be run: nvcc error: no license" in str(setup_py["decide"]("auto"))


@pytest.fixture
def nvidia_packages(monkeypatch, tmp_path):
    """This environment as it is where packages of NVIDIA's lie beside pybind11, one with an nvcc among them."""
    pybind11 = pytest.importorskip("pybind11")
    monkeypatch.delitem(sys.modules, "pybind11")  # the next import looks for it on the path
    real = Path(pybind11.__file__).parents[1]
    site = tmp_path / "site"
    nvcc = site / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    on_path(nvcc.parent, "nvcc", "echo 'Cuda compilation tools, release 11.2, V11.2.152'")
    for path in real.iterdir():
        if path.name != "nvidia":
            (site / path.name).symlink_to(path)
    monkeypatch.setattr(sys, "path", [str(site) if Path(p) == real else p for p in sys.path])
    return nvcc


@needs_compiler
def test_packages_of_nvidia_hide_nothing_else(nvidia_packages, setup_py, monkeypatch):
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert re.fullmatch("CPU extension with .*; no CUDA part: nvcc not found .*", str(setup_py["decide"]("auto")))


def test_nvcc_of_a_package_is_found(nvidia_packages, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    assert str(nvidia_packages) in runpy.run_path(str(ROOT / "setup.py"))["nvcc_candidates"]()


@needs_compiler
@needs_nvcc
def test_architectures(setup_py, monkeypatch):
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setenv("PATH", REAL_PATH)
    monkeypatch.setenv("DAB_FAST_CUDA_ARCHS", "sm_86")
    assert setup_py["decide"]("cuda").cuda.names == ["sm_80", "sm_90a", "sm_86", "compute_90"]
    monkeypatch.setenv("DAB_FAST_CUDA_ARCHS", "90a, 13")
    with pytest.raises(SystemExit, match=r"DAB_FAST_CUDA_ARCHS names 13, .* knows sm_"):
        setup_py["decide"]("auto")


def test_a_machine_that_can_compile_has_compiled():
    """Where the package was installed by pip; a bare checkout on PYTHONPATH may be unbuilt."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("dab_fast")
    except PackageNotFoundError:
        pytest.skip("dab_fast is not installed here")
    if os.environ.get("DAB_FAST_BUILD") == "0" or COMPILER is None:
        pytest.skip("nothing to compile with, or asked not to")
    module = _extension.extension()
    if NVCC and os.environ.get("DAB_FAST_BUILD") != "cpu":
        assert {"sm_80", "sm_90a", "compute_90"} <= set(module.CUDA_ARCHS.split())


def test_build_info():
    built()
    info = dab_fast.build_info()
    assert info.version == dab_fast.__version__
    assert Path(info.extension).name.startswith("_C.")
    assert info.cpu_isa in ("avx512", "avx2", "portable")
    assert info.backends["torch"] == info.backends["native (CPU)"] == "available"
    if not torch.cuda.is_available():
        assert info.backends["triton"] == "torch finds no GPU"
    shown = str(info)
    assert all(arch in shown for arch in info.cuda_archs) and info.compiler in shown


def test_only_the_module_is_exported():
    """A CUDA runtime that others could bind to, or that others' could replace, would mix two versions."""
    nm = shutil.which("nm")
    if nm is None or sys.platform != "linux":
        pytest.skip("no nm")
    output = subprocess.run([nm, "-D", "--defined-only", built().__file__], capture_output=True, text=True, check=True)
    symbols = [line.split() for line in output.stdout.splitlines()]
    # Weak symbols are the C++ library's templates.
    assert [name for _, kind, name in symbols if kind not in "WVu"] == ["PyInit__C"]
    assert not [name for *_, name in symbols if "cuda" in name.lower() or "dab_fast" in name]


def disassembler():
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            pytest.skip("no cuobjdump: neither the CUDA toolkit nor triton is installed")
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found)


def cuda_built():
    module = built()
    if not module.HAS_CUDA:
        pytest.skip(module.WHY_NO_CUDA)
    return module


def dump(option, module):
    done = subprocess.run([disassembler(), option, module.__file__], capture_output=True, text=True, check=True)
    architecture = None
    kernels = {}
    for line in done.stdout.splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif match := re.match(r"\s*Function\s*:?\s*(\S+?):?$", line):
            kernels[architecture, match[1]] = current = []
        elif kernels:
            current.append(line)
    return kernels


KERNELS = ("box_position_embed_forward", "box_position_embed_backward", "box_tail_forward", "box_tail_backward")
MOST_REGISTERS = 96  # of 128 threads: five blocks on an SM


def test_registers_and_spills():
    found = dump("-res-usage", cuda_built())
    for arch in ("sm_80", "sm_90a"):
        names = [name for a, name in found if a == arch]
        assert all(any(kernel in name for name in names) for kernel in (*KERNELS, "sum_partials"))
    for key, (usage, *_) in found.items():
        values = {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", usage)}
        assert values["STACK"] == 0 and values["LOCAL"] == 0, key  # a spill would lie there
        assert values["REG"] <= MOST_REGISTERS, key


def test_sixteen_byte_accesses():
    """The vector kernels read and write 16 bytes at a time, in the wide tensors of either width of dtype."""
    found = dump("-sass", cuda_built())
    checked = 0
    for (_, name), lines in found.items():
        # Template arguments: elements of a lane; vector; in one kernel, the sum over rows.
        if not re.search(r"ILi[48]ELb1E", name):
            continue
        code = "\n".join(lines)
        if "box_tail_forward" not in name and "ELb1ELb1E" not in name:
            assert re.search(r"STG\.E(\.\w+)*\.128", code), name
        if "position_embed_forward" not in name or "ILi4" in name:
            assert re.search(r"LDG\.E(\.\w+)*\.128", code), name
        checked += 1
    assert checked >= 2 * (2 + 3 + 2 + 2)


def package_copy(folder, extension=None):
    """The package in a folder of its own, with another extension or none."""
    shutil.copytree(
        ROOT / "dab_fast", folder / "dab_fast", ignore=shutil.ignore_patterns("_C.*", "__pycache__"), dirs_exist_ok=True
    )
    if extension is not None:
        (folder / "dab_fast" / f"_C{SUFFIX}").write_bytes(extension)
    return folder


# An editable installation's finder would answer for a submodule that the copy lacks.
NO_EDITABLE_FINDER = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def run_with(folder, code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    code = NO_EDITABLE_FINDER + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)


ASK = """
import torch, dab_fast
from dab_fast import ops
info = dab_fast.build_info()
with ops.backend("native"):
    try:
        ops.box_position_embed(torch.rand(2, 4))
    except ops.BackendUnavailable as error:
        assert info.extension in str(error)
        print(error)
ops.box_position_embed(torch.rand(2, 4))  # auto goes on without it
"""


@pytest.mark.parametrize("state", ["missing", "broken", "stale"])
def test_an_extension_that_cannot_be_used_is_one_error_with_the_cause(tmp_path, state):
    if state == "missing":
        folder, cause = package_copy(tmp_path), "dab_fast._C is not built"
    elif state == "broken":
        folder, cause = package_copy(tmp_path, b"not a library"), "dab_fast._C is broken, it cannot be loaded: /.*_C"
    else:
        folder = package_copy(tmp_path, Path(built().__file__).read_bytes())
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        shutil.copy(ROOT / "setup.py", tmp_path)
        with open(tmp_path / "csrc" / "geometry.h", "a") as file:
            file.write("// changed\n")
        cause = r"dab_fast._C is stale: built from sources \w+, /.*/csrc now holds \w+; `pip install"
    done = run_with(folder, ASK)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"box_position_embed on cpu: native: {cause}", done.stdout), done.stdout


def test_an_extension_of_another_python_or_version_is_named(tmp_path):
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    why = _extension._why_not_importable(tmp_path, ImportError("No module named dab_fast._C"))
    assert why.startswith(f"dab_fast._C was built as _C.cpython-39-x86_64-linux-gnu.so, this Python loads _C{SUFFIX}")
    old = type("", (), {"VERSION": "0.0.1"})
    assert _extension._why_stale(old, tmp_path).startswith("dab_fast._C is stale: built as version 0.0.1, the package")


# The long matrix: real builds.


def build(python, folder, *options, sources=ROOT, **environment):
    """Makes a wheel; the log is what `pip install -v .` shows."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, *options, sources]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**clean, **environment})
    log = done.stdout + done.stderr
    return next(Path(folder).glob("*.whl"), None) if done.returncode == 0 else None, log


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree, as a checkout or an unpacked sdist would be."""
    target = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    for name in ("csrc", "dab_fast"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory):
    """A virtual environment with pip alone."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def only(folder, *names):
    """A PATH with these tools and what a shell needs, but no compiler besides."""
    folder.mkdir()
    for name in names:
        on_path(folder, name)
    return str(folder)


def embed_with(wheel, folder):
    """Runs the native backend from an unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(folder)
    code = "import torch; from dab_fast import ops; ops.backend('native'); ops.box_position_embed(torch.rand(2, 4))"
    return run_with(folder, f"{code}; import dab_fast; print(dab_fast.build_info())")


@needs_compiler
@pytest.mark.sweep
@pytest.mark.parametrize("choice", ["auto", "cpu", "0", "cuda"])
def test_isolated_wheels(choice, fresh_python, source, tmp_path):
    if choice == "cuda" and NVCC is None:
        pytest.skip("no nvcc on this machine")
    wheel, log = build(fresh_python, tmp_path / "wheel", sources=source, DAB_FAST_BUILD=choice)
    assert wheel is not None, log
    assert f"(DAB_FAST_BUILD={choice})" in log
    if choice == "0":
        assert wheel.name.endswith("-py3-none-any.whl")
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_C." in name or "csrc" in name]
        return
    done = embed_with(wheel, tmp_path / "unpacked")
    assert done.returncode == 0, done.stderr
    assert ("sm_90a" in done.stdout) == (choice in ("auto", "cuda") and NVCC is not None)


@needs_compiler
@pytest.mark.sweep
def test_without_isolation_and_offline(fresh_python, source, tmp_path):
    needs = ["setuptools>=77", "pybind11", "ninja"]
    subprocess.run([fresh_python, "-m", "pip", "install", "-q", *needs], check=True)
    options = ("--no-build-isolation", "--no-index")
    wheel, log = build(fresh_python, tmp_path / "wheel", *options, sources=source, DAB_FAST_BUILD="cpu")
    assert wheel is not None, log
    assert embed_with(wheel, tmp_path / "unpacked").returncode == 0
    # Without ninja: one file after the other.
    subprocess.run([fresh_python, "-m", "pip", "uninstall", "-q", "-y", "ninja"], check=True)
    path = only(tmp_path / "bin", "c++")
    wheel, log = build(fresh_python, tmp_path / "slow", *options, sources=source, DAB_FAST_BUILD="cpu", PATH=path)
    assert wheel is not None, log
    assert "no ninja, compiling one file after the other" in log
    assert embed_with(wheel, tmp_path / "slow_unpacked").returncode == 0


@pytest.mark.sweep
def test_machines_with_less(fresh_python, source, tmp_path):
    wheel, log = build(fresh_python, tmp_path / "none", sources=source, PATH=only(tmp_path / "empty"))
    assert wheel is not None and wheel.name.endswith("-py3-none-any.whl"), log
    assert "pure Python, no compiled extension: no C++ compiler found" in log
    wheel, log = build(
        fresh_python, tmp_path / "refused", sources=source, DAB_FAST_BUILD="cpu", PATH=only(tmp_path / "bare")
    )
    assert wheel is None and "DAB_FAST_BUILD=cpu, but no C++ compiler found" in log
    if COMPILER is not None:
        path = only(tmp_path / "bin", "c++")
        wheel, log = build(fresh_python, tmp_path / "cpu", sources=source, PATH=path)
        assert wheel is not None and "no CUDA part: nvcc not found" in log, log
        assert embed_with(wheel, tmp_path / "unpacked").returncode == 0


@needs_compiler
@pytest.mark.sweep
def test_sdist_builds(fresh_python, source, tmp_path):
    subprocess.run([fresh_python, "-m", "pip", "install", "-q", "build"], check=True)
    subprocess.run([fresh_python, "-m", "build", "--sdist", "-o", tmp_path, source], check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    wheel, log = build(fresh_python, tmp_path / "wheel", sources=sdist, DAB_FAST_BUILD="cpu")
    assert wheel is not None, log
    assert embed_with(wheel, tmp_path / "unpacked").returncode == 0


@needs_compiler
@pytest.mark.sweep
def test_editable_install_says_what_it_decided(fresh_python, tmp_path, source):
    tree = shutil.copytree(source, tmp_path / "tree")
    command = [fresh_python, "-m", "pip", "install", "-v", "--no-deps", "-e", tree]
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**clean, "DAB_FAST_BUILD": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    assert "dab_fast: CPU extension with" in done.stdout + done.stderr
    code = "import dab_fast; print(dab_fast.build_info())"
    assert str(tree) in run_with(tree, code).stdout


@needs_compiler
@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a runtime as Linux does")
@pytest.mark.parametrize("sanitizer, library", [("address,undefined", "libasan.so"), ("undefined", "libubsan.so")])
def test_cpu_part_under_a_sanitizer(sanitizer, library, fresh_python, source, tmp_path):
    """The tests of the kernels with a build that stops at the first bad access or undefined operation."""
    found = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{COMPILER} has no {library}")
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -O2 -g"  # -O2: fused multiply-add, as shipped
    wheel, log = build(
        fresh_python, tmp_path / "wheel", sources=source, DAB_FAST_BUILD="cpu", CXXFLAGS=flags, LDFLAGS=flags
    )
    assert wheel is not None, log
    folder = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    # The runtime comes before everything else; its C++ library too, whose exceptions it intercepts.
    preload = f"{found}:{ctypes.util.find_library('stdc++')}"
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "tests/test_native.py", "tests/test_native_calls.py"]
    code = f"import sys, pytest; sys.exit(pytest.main({options}))"
    done = run_with(folder, code, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 150, said[-5000:]
