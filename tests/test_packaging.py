"""What installing and importing the package does, and what it does not."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The extras whose packages a folder may import, and modules whose distribution has another name.
MAY_IMPORT = {
    "dab_fast": ("demo", "bench", "test"),
    "tests": ("test",),
    "benchmarks": ("bench", "test"),
    "examples": ("demo",),
}
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image"} | dict.fromkeys(
    ("tomli", "packaging", "_pytest"), "pytest"
)


def run_python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_import_is_light():
    """Neither triton nor transformers nor the extension; and no question to a GPU, which would start its driver."""
    code = """
import sys, torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError("asked the GPU")
for name in ("_lazy_init", "is_available", "device_count", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
import dab_fast
print(*sorted(set(sys.modules) - before))
"""
    found = run_python(code).split()
    assert "dab_fast.decoder" in found
    for heavy in ("triton", "transformers", "numpy", "typer", "rich", "matplotlib", "dab_fast._C", "torch._dynamo"):
        assert not [name for name in found if name == heavy or name.startswith(f"{heavy}.")], heavy


def test_import_is_fast():
    """Added to importing torch: 0.2 s at most, the best of three runs of processor time on a shared machine."""
    code = """
import time, torch
start = time.process_time()
import dab_fast
print(time.process_time() - start)
"""
    assert min(float(run_python(code)) for _ in range(3)) < 0.2


def test_version_is_the_same_everywhere():
    import dab_fast

    assert dab_fast.__version__ == importlib.metadata.version("dab_fast")


def test_the_command_exists():
    """The entry point that an installation makes."""
    module, _, function = PYPROJECT["project"]["scripts"]["dab-fast"].partition(":")
    out = run_python(f"import sys; sys.argv = ['dab-fast', '--help']; from {module} import {function}; {function}()")
    assert all(command in out for command in ("demo", "selftest", "bench"))


def test_selftest_needs_no_extra():
    code = """
import sys
for name in ("PIL", "matplotlib", "skimage", "transformers", "safetensors", "scipy"):
    sys.modules[name] = None
sys.argv = ["dab-fast", "selftest", "--device", "cpu"]
from dab_fast.cli.main import main
main()
"""
    assert "every result is within its tolerance" in run_python(code)


def extra(name):
    """The requirements of an extra, those of the extras it names included."""
    found = []
    for line in PYPROJECT["project"]["optional-dependencies"][name]:
        requirement = Requirement(line)
        if requirement.name == "dab_fast":
            found += [r for other in requirement.extras for r in extra(other)]
        else:
            found.append(requirement)
    return found


BASE = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_import_is_required(folder):
    """What the code imports is the standard library, the package, or named by an extra."""
    required = {normal(r.name) for r in [*BASE, *(r for name in MAY_IMPORT[folder] for r in extra(name))]}
    ours = {*MAY_IMPORT, "__future__"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in (name.partition(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in ours:
                    assert normal(DISTRIBUTIONS.get(name, name)) in required, f"{path.relative_to(ROOT)}: {name}"


def test_constraints_name_every_requirement():
    """Each once per Python version; triton is left to torch, whose GPU wheels pin another than the newest."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    for version in ("3.10", "3.11", "3.13"):
        here = [normal(r.name) for r in pins if r.marker is None or r.marker.evaluate({"python_version": version})]
        assert len(here) == len(set(here))
        wanted = {normal(r.name) for r in [*BASE, *extra("test")]} - {"triton", "setuptools"}
        assert set(here) == wanted
    assert all(str(r.specifier).startswith("==") for r in pins)


def test_installed_package_is_whole(tmp_path):
    """Every module and data file of the source tree is in what setuptools would install."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    tracked = [path for path in (ROOT / "dab_fast").rglob("*") if path.suffix in (".py", ".json", ".typed")]
    missing = [path for path in tracked if not (tmp_path / path.relative_to(ROOT)).is_file()]
    assert len(tracked) > 20 and not missing


def test_source_distribution_is_whole(tmp_path):
    """Every file that the tests read, or that a reader of the checkout would miss, is in what an sdist packs."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    packed = set((tmp_path / "dab_fast.egg-info" / "SOURCES.txt").read_text().split())
    at_the_top = [p for p in ROOT.iterdir() if p.suffix in (".md", ".txt", ".toml", ".py") or p.name == "Makefile"]
    folders = ("benchmarks", "csrc", "dab_fast", "docs", "examples", "tests")
    below = [
        p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    files = [path for path in [*at_the_top, *below] if path.suffix != ".so"]
    missing = sorted({path.relative_to(ROOT).as_posix() for path in files} - packed)
    assert len(files) > 100 and not missing


@pytest.mark.sweep
def test_tests_run_from_an_unpacked_source_distribution(tmp_path):
    """The build backend packs a copy of this tree, offline; all tests can be collected there, and some run."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_C.*")
    shutil.copytree(ROOT, tree, ignore=ignored)

    def run(folder, *command):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run(tree, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})")
    (archive,) = tmp_path.glob("dab_fast-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert run(unpacked, "-c", "import dab_fast; print(dab_fast.__file__)").startswith(str(unpacked))
    run(unpacked, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests", "benchmarks")
    some = ["tests/test_examples.py", "tests/test_packaging.py", "tests/test_refine_boxes.py"]
    run(unpacked, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not sweep and not gpu", *some)


@pytest.mark.sweep
@pytest.mark.parametrize("isolation", [True, False])
def test_editable_installation(tmp_path, isolation):
    """pip install -e ., with and without build isolation, beside the torch and the build tools that are here."""
    copy, venv = tmp_path / "source", tmp_path / "venv"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run("git", "clone", "-q", ROOT, copy)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (next((venv / "lib").glob("python3*")) / "site-packages" / "here.pth").write_text(f"{here}\n")
    flags = [] if isolation else ["--no-build-isolation"]
    run(venv / "bin/python", "-m", "pip", "install", "-q", "--no-deps", *flags, "-e", copy)
    assert Path(run(venv / "bin/python", "-c", "import dab_fast; print(dab_fast.__file__)").strip()).is_relative_to(
        copy
    )
    assert "selftest" in run(venv / "bin/dab-fast", "--help")


def test_what_the_readme_says_exists():
    """Links into the repository lead somewhere, and commands named there are targets."""
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert (ROOT / link).exists(), f"{name}: {link}"
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        for target in re.findall(r"\bmake (\w+)\b(?!=)", "\n".join(re.findall(r"`[^`]+`|^    .+$", text, re.M))):
            assert target in targets, f"{name}: make {target}"


def test_figures_of_the_readme_are_the_baseline():
    """Its table of counts says what `python -m benchmarks.counts` committed."""
    counts = json.loads((ROOT / "benchmarks/counts.json").read_text())["counts"]
    rows = {
        "decoder: ATen calls, forward": ("1050", "inference", "aten_calls", 1),
        "decoder: ATen calls, forward and backward": ("1050", "training", "aten_calls", 1),
        "decoder: waits of the host for the GPU, forward": ("1050", "inference", "host_syncs", 1),
        "decoder: kept for backward, MB": ("1050", "training", "saved_bytes", 1e6),
        "model: ATen calls, forward": ("model", "inference", "aten_calls", 1),
        "model: ATen calls, training step": ("model", "training", "aten_calls", 1),
        "model: waits of the host, training step": ("model", "training", "host_syncs", 1),
    }
    text = (ROOT / "README.md").read_text()
    for row, (subject, mode, metric, unit) in rows.items():
        found = [counts[subject][who][mode] for who in ("huggingface", "torch", "triton")]
        cells = [f"{numbers[metric] / unit:,.0f}" for numbers in found]
        if metric == "aten_calls":
            cells[-1] += f" + {found[-1]['kernel_launches']}"
        assert f"| {row} | {' | '.join(cells)} |" in text, f"README.md must say {cells} for {row!r}"
