"""Kernels compiled without a GPU stay within their budgets. In a subprocess: here Triton is the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuxray")  # which a machine with a GPU may lack

from benchmarks.kernel_budget import INSTRUCTION, TENSOR_CORES, load_sizes, loops, tile_loads

ROOT = Path(__file__).parents[1]


def compiler(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def budgets(*arguments: str) -> list[dict]:
    done = compiler("-m", "benchmarks.kernel_budget", "--json", *arguments)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert {budget["name"]: budget["broken"] for budget in found if budget["broken"]} == {}
    assert done.returncode == 0, done.stderr
    return found


def test_default_configurations_on_sm_90():
    found = {budget["name"]: budget for budget in budgets("--default", "--jobs", "1")}
    for kernel in ("forward", "query", "key"):
        # The decoder's attention in half precision: at least three programs share an SM.
        assert found[f"attention {kernel} half 32"]["programs_per_sm"] >= 3


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ("80", "90", "100"))
def test_every_configuration(arch):
    assert len(budgets("--arch", arch, "--jobs", "2")) > 100


def test_a_broken_budget_is_noticed():
    script = """
import dataclasses
from benchmarks import kernel_budget
cases = kernel_budget.cases()
name = "attention combine 32 4"
cases[name] = dataclasses.replace(cases[name], tensor_cores=True)
print(kernel_budget.measure(90, name).broken)
"""
    done = compiler("-c", script)
    assert done.stdout.strip() == "['no tensor-core instruction']", done.stderr


def test_machine_code_is_read_right():
    code = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!UP1 HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*10030*/                  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;
"""
    found = INSTRUCTION.findall(code)
    assert found == ["LDC", "LDG.E.128", "HFMA2.MMA", "HGMMA.64x64x16.F32.BF16"]
    assert [i for i in found if TENSOR_CORES.match(i)] == ["HGMMA.64x64x16.F32.BF16"]


IR = """
#loc = loc("kernel.py":1:0)
#loc7 = loc("common.py":37:22)
#loc8 = loc("kernel.py":12:26)
#loc9 = loc("kernel.py":10:5)
#loc20 = loc("b_x"(#loc7))
#loc21 = loc("b_lse"(#loc8))
#loc30 = loc(callsite(#loc20 at #loc9))
    %b_x = tt.load %p, %m, %o : tensor<64x32x!tt.ptr<bf16>, #blocked> loc(#loc30)
    %c_x = ttg.async_copy_global_to_local %p, %q : tensor<32x32x!tt.ptr<bf16>, #b> -> <32x32xbf16, #s> loc(#loc30)
    %b_lse = tt.load %p_lse, %m_q : tensor<64x!tt.ptr<f32>, #slice> loc(#loc21)
"""

PTX = """
    .loc    3 37 22                         // common.py:37:22 @[ kernel.py:10:5 ]
    @%p27 ld.global.v4.b32 { %r30, %r31, %r32, %r33 }, [ %rd12 + 0 ];
    @%p27 ld.global.L1::evict_last.v2.b32 { %r30, %r31 }, [ %rd12 + 0 ];
    cp.async.cg.shared.global [ %r46 + 0 ], [ %rd16 + 0 ], 0x10, %r47;
    @%p1 cp.async.ca.shared.global [ %r12 + 0 ], [ %rd17 + 0 ], 0x4, %r48;
    @%p1 ld.global.b8 { %rs1 }, [ %rd12 + 0 ];
    .loc    1 12 26                         // kernel.py:12:26
    @%p1 ld.global.b32 { %r1 }, [ %rd12 + 0 ];
    .file   1 "kernel.py"
    .file   3 "common.py"
"""


def test_loads_of_tiles_are_told_from_those_of_rows_numbers():
    places = tile_loads(IR)
    assert places == {("common.py", 22)}
    assert load_sizes(PTX, places) == [16, 8, 16, 4, 1]


def test_loops_are_found():
    code = """
        /*0000*/                   STL [R1], R12 ;
.L_x_1:
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   LDL.LU R18, [R1] ;
"""
    assert INSTRUCTION.findall(loops(code)) == ["FADD", "BRA"]
