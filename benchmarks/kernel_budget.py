"""Compiles every Triton kernel in every configuration that is shipped, without a GPU, and reads the machine code.

    python -m benchmarks.kernel_budget [--arch 80,90,100] [--default] [--match TEXT] [--json] [--jobs 2]

Exit code 1 when a kernel breaks its budget: an instruction in a loop spills registers, or more than eight outside do;
dots meant for tensor cores are not on them; less of the bytes of its tiles are loaded by 16-byte instructions than the
case asks for; more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from unittest import mock

import triton
from cuxray import compute, lookup
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dab_fast.backends import triton as kernels
from dab_fast.backends.triton._cases import CompileCase

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
TENSOR_CORES = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"(STL|LDL)\b")
LABEL = re.compile(r"^\.(\w+):")
BRANCH = re.compile(r"\bBRA\b.*`\(\.(\w+)\)")
# Triton's own IR: the shape that a load reads, and the name of its location.
TILE_LOAD = re.compile(r"(?:tt\.load|async_copy_global_to_local) .*?: tensor<(?:\d+x){2,}.* loc\((#loc\d*)\)")
LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
PLACE = re.compile(r'"([^"]+)":(\d+):(\d+)')
# PTX: files, locations, loads of 8 · N bits and asynchronous copies of N bytes.
PTX_FILE = re.compile(r'^\s*\.file\s+(\d+) "([^"]+)"', re.MULTILINE)
PTX_LOCATION = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)")
PTX_LOAD = re.compile(
    r"\bld\.global(?:\.(?!v\d|[bfus]\d)[\w:]+)*(?:\.v(\d))?\.[bfus](\d+)\b|\bcp\.async\.c[ag]\..*\], 0x(\w+)"
)

# File and column. Without the line, which triton 3.9 moves by some on its way to PTX; a load of a row's number in the
# same column as one of a tile is judged as that, too.
Place = tuple[str, int]


@dataclass(frozen=True)
class Budget:
    """What became of one case on one architecture."""

    name: str
    arch: int
    registers: int
    spills: int  # instructions that write or read local memory
    spills_in_loops: int
    shared: int  # bytes
    programs_per_sm: int
    instructions: int
    tensor_cores: int  # instructions
    wide_load_share: float  # of the bytes of tiles that the code loads, masks aside, those in 16-byte loads
    broken: list[str]


@cache
def cases() -> dict[str, CompileCase]:
    found: dict[str, CompileCase] = {}
    for module in pkgutil.iter_modules(kernels.__path__, "dab_fast.backends.triton."):
        listed: list[CompileCase] = getattr(importlib.import_module(module.name), "compile_cases", list)()
        for case in listed:
            if case.name in found:
                raise ValueError(f"two cases are named {case.name!r}")
            found[case.name] = case
    return found


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def tile_loads(ir: str) -> set[Place]:
    """Where the source loads tiles of two dimensions, from Triton's IR."""
    names = dict(LOCATION.findall(ir))

    def place(text: str) -> Place:
        if found := PLACE.search(text):
            return found[1], int(found[3])
        # "name"(#loc1), or callsite(#loc1 at #loc2) of an inlined function: the first is the inner one
        return place(names[re.findall(r"#loc\d*", text)[0]])

    return {place(names[name]) for name in TILE_LOAD.findall(ir)}


def load_sizes(ptx: str, places: set[Place]) -> list[int]:
    """Bytes per thread of each load instruction at `places`."""
    files = dict(PTX_FILE.findall(ptx))
    sizes: list[int] = []
    here: Place | None = None
    for line in ptx.splitlines():
        if found := PTX_LOCATION.search(line):
            here = files.get(found[1], ""), int(found[3])
        elif here in places and (found := PTX_LOAD.search(line)):
            count, bits, copied = found.groups()
            sizes.append(int(copied, 16) if copied else int(count or 1) * int(bits) // 8)
    return sizes


def loops(code: str) -> str:
    """The lines of a disassembly between a label and a later branch to it."""
    lines = code.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := LABEL.match(line.strip()))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        if found := BRANCH.search(line):
            inside.update(range(labels.get(found[1], i), i))
    return "\n".join(lines[i] for i in sorted(inside))


def measure(arch: int, name: str) -> Budget:
    case = cases()[name]
    types, constants, alignments = case.signature()
    options = {name: case.options.get(name) for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    # Without Triton's cache: it knows a kernel again after its lines moved, and the places in its code are then old.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        compiled = triton.compile(
            ASTSource(case.kernel, types, constants, alignments),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        registers = int(re.findall(r"REG:(\d+)", _tool("cuobjdump", "--dump-resource-usage", cubin.name))[0])
        code = _tool("nvdisasm", "-c", cubin.name)
    counts = Counter(INSTRUCTION.findall(code))

    def count(pattern: str) -> int:
        return sum(n for instruction, n in counts.items() if re.match(pattern, instruction))

    # Single bytes are masks; numbers of a row or a column are few, and loaded in whatever layout the tile has.
    places = tile_loads(compiled.asm["ttgir"])
    loads = [size for size in load_sizes(compiled.asm["ptx"], places) if size > 1]
    share = sum(size for size in loads if size >= 16) / sum(loads) if loads else 1.0
    spills = count(SPILL.pattern)
    spills_in_loops = sum(bool(SPILL.match(instruction)) for instruction in INSTRUCTION.findall(loops(code)))
    tensor_cores = count(TENSOR_CORES.pattern)
    chip, shared = lookup(f"sm_{arch}"), compiled.metadata.shared
    broken = []
    # Outside loops ptxas parks a few values in local memory to fit one more program on an SM: a good trade.
    if spills_in_loops or spills > 8:
        broken.append(f"{spills} instructions spill registers, {spills_in_loops} of them in loops")
    if case.tensor_cores and not tensor_cores:
        broken.append("no tensor-core instruction")
    if places and not loads:
        broken.append("the PTX shows none of its loads of tiles")
    if share < case.wide_loads:
        broken.append(f"only {share:.0%} of the bytes of tiles in 16-byte loads")
    if shared > chip.smem_per_block_max:
        broken.append(f"{shared} bytes of shared memory, the chip has {chip.smem_per_block_max}")
    return Budget(
        name,
        arch,
        registers,
        spills,
        spills_in_loops,
        shared,
        compute(chip, registers, 32 * case.options["num_warps"], smem_dynamic=shared).blocks_per_sm,
        sum(counts.values()),
        tensor_cores,
        round(share, 3),
        broken,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="comma-separated, default %(default)s")
    parser.add_argument("--default", action="store_true", help="only the configurations that `make test` compiles")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    names = [name for name, case in cases().items() if options.match in name and (case.default or not options.default)]
    budgets: list[Budget] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for arch in map(int, options.arch.split(",")):
            for budget in pool.map(partial(measure, arch), names):
                budgets.append(budget)
                if not options.json:
                    _print(budget)
    if options.json:
        json.dump([asdict(budget) for budget in budgets], sys.stdout, indent=1)
    broken = [budget for budget in budgets if budget.broken]
    print(f"{len(budgets)} kernels compiled, {len(broken)} over budget", file=sys.stderr)
    return 1 if broken or not budgets else 0


def _print(budget: Budget) -> None:
    print(
        f"sm_{budget.arch} {budget.name:44} {budget.registers:3} registers {budget.spills:2} spills "
        f"{budget.shared:6} B shared "
        f"{budget.programs_per_sm:2} programs/SM {budget.instructions:5} instructions "
        f"{budget.tensor_cores:3} tensor-core {budget.wide_load_share:4.0%} wide loads"
        + "".join(f"  BROKEN: {reason}" for reason in budget.broken),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
