"""The judge of the compiled kernels: what it reads off assembler text, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
CHECK = """
from benchmarks import compiled
ptx = '''
	ld.global.b32 %r1, [%rd1];
$L__BB0_1:
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	ld.global.L1::evict_last.v2.b64 {%rd2, %rd3}, [%rd1];
	@%p2 st.global.v2.b32 [ %rd4 + 0 ], { %r1, %r2 };
	@%p5 bra 	$L__BB0_1;
	st.global.b16 [%rd4], %rs1;
	bra.uni $L__BB0_2;
$L__BB0_2:
	ld.global.b16 %rs1, [%rd1];
'''
assert [compiled.accesses(loop) for loop in compiled.loops(ptx)] == [{"ld": [16, 16], "st": [8]}]
assert compiled.narrowest(ptx, "ld") == 16 and compiled.narrowest(ptx, "st") == 8 and compiled.narrowest("", "st") == 0
assert compiled.accesses(["ld.global.bf16x2 %r; st.relaxed.gpu.global.b32 [%r];", "ld.shared.b32 %r;"]) == {"ld": [4], "st": [4]}
for strange in ("cp.async.ca.shared.global [%r], 4;", "ld.b32 %r, [%rd];", "atom.global.add.f32 %r;", "red.global.add.f32 [%r];"):
    try:
        compiled.accesses([strange])
    except ValueError:
        continue
    raise AssertionError(strange)
good = {"spills": 0, "local": 0, "load": 16, "store": 16}
assert compiled.faults(good) == [] == compiled.faults(good | {"store": 0})
for bad in ({"spills": 4}, {"local": 8}, {"load": 8}, {"store": 4}, {"load": 0}):
    assert len(compiled.faults(good | bad)) == 1, bad
assert compiled.blocks_at_once(64, 32) == 1 and compiled.blocks_at_once(32, 32) == 2 and compiled.blocks_at_once(33, 8) == 6
assert compiled.blocks_at_once(64, 16, 86048, "90a") == 2 and compiled.blocks_at_once(64, 16, 86048, "120a") == 1

# an odd row stride cannot be read 16 bytes at a time: it must show
compiled.CASES["odd"] = compiled.statistics(5001, stride=5001)
found = compiled.row("odd", 90)
assert found["load"] == 4 and compiled.faults(found), found
found = compiled.row("policy, clipped, KL", 90)
assert not compiled.faults(found) and found["store"] == 16 and 0 < found["registers"] <= 64, found
"""


def test_the_judge():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_what_ptxas_prints_is_read(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import compiled_cuda

    text = """ptxas info    : Compiling entry function '_Zone' for 'sm_90a'
ptxas info    : Function properties for _Zone
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers
ptxas info    : Compiling entry function '_Ztwo' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, 1056 bytes smem"""
    first, second = compiled_cuda.parsed(text, "90a")
    assert first == {"kernel": "_Zone", "arch": "sm_90a", "registers": 48, "stack": 0, "spills": 0, "shared": 0}
    assert second == {"kernel": "_Ztwo", "arch": "sm_90a", "registers": 64, "stack": 16, "spills": 12, "shared": 1056}
