"""The judges of compiled code: what they read off machine code, what they reckon from it, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import compiled_cuda, machine_code, occupancy  # noqa: E402

KERNEL = """
	.section	.text.copy_kernel,"ax",@progbits
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64+-0x8000] ;
        /*0020*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   ISETP.NE.U32.AND P4, PT, R41, UR12, PT ;
        /*0050*/                   LDG.E.U16 R41, desc[UR4][R2.64] ;
.L_x_1:
        /*0060*/                   MUFU.EX2 R12, R4 ;
        /*0070*/                   FADD R12, R12, R8 ;
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R12 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], RZ ;
        /*00c0*/              @!P3 BRA `(.L_x_2) ;
        /*00d0*/                   STL [R1], R12 ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4) ;
"""
RESOURCES = "Resource usage:\n Function copy_kernel:\n  REG:40 STACK:8 SHARED:0 LOCAL:0\n"
WAY = [
    "LDG.E.128 R4, desc[UR4][R2.64+-0x8000]", "LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64]", "BRA `(.L_x_1)", "MUFU.EX2 R12, R4",
    "FADD R12, R12, R8", "STG.E.64 desc[UR4][R2.64], R12", "BRA `(.L_x_0)",
]


def read(monkeypatch, code):
    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "run", lambda tool, *_: code if tool.name == "nvdisasm" else RESOURCES)
        return machine_code.read(Path("cubin"))["copy_kernel"]


@pytest.fixture
def kernel(monkeypatch):
    return read(monkeypatch, KERNEL)


def test_what_a_loop_spills_is_counted(kernel, monkeypatch):
    assert kernel.spills == 0 and "STL" in KERNEL  # outside of loops
    assert read(monkeypatch, KERNEL.replace("FADD R12, R12, R8", "@P0 LDL R12, [R1]").replace("MUFU.EX2 R12, R4", "STL.64 [R1], R4")).spills == 2


def test_a_kernel_is_read(kernel):
    """The block that a turn jumps over is in the loop but not on the way; a jump back from behind a loop into it makes none."""
    assert kernel.registers == 40
    (body, way), (zeros, _), (end, _) = kernel.loops
    assert way == WAY and len(body) == 9 and machine_code.accesses(body) == ([16, 16, 2], [8])
    assert machine_code.accesses(zeros) == ([], [16]) and machine_code.accesses(end) == ([], [])
    assert machine_code.streaming(kernel) == [way]


@pytest.mark.parametrize("strange", ["LDGSTS.E [R1], desc[UR4][R2.64]", "LD.E R1, [R2.64]", "ATOMG.E.ADD R1, [R2], R3", "RED.E.ADD [R2]"])
def test_unknown_accesses_are_refused(strange):
    assert machine_code.accesses(["LDS.128 R4, [R1]", "REDUX UR4, R1", "LDG.E.S8 R1, [R2.64]", "STG.E [R2], R1"]) == ([1], [4])
    with pytest.raises(ValueError, match="cannot judge"):
        machine_code.accesses([strange])


def assembled(*lines):
    """A text of instructions, some with a label in front of them: "3: NOP"."""
    text = ""
    for at, line in enumerate(lines):
        label, _, op = line.rpartition(": ")
        text += f".L_x_{label}:\n" * bool(label) + f"        /*{16 * at:04x}*/                   {op} ;\n"
    return text


def test_loops_of_other_shapes():
    """A loop around another is none; nothing follows a jump or an exit that has no predicate."""
    nested = assembled("0: NOP", "1: FADD R1, R1, R2", "@P0 BRA `(.L_x_1)", "NOP", "@P1 BRA `(.L_x_0)")
    assert [way for _, way in machine_code.loops(nested)] == [["FADD R1, R1, R2", "BRA `(.L_x_1)"]]
    for end in ("EXIT", "BRA `(.L_x_3)"):
        apart = assembled("0: @P0 BRA `(.L_x_1)", end, "2: BRA `(.L_x_3)", "1: NOP", "NOP", "NOP", "NOP", "3: @P0 BRA `(.L_x_0)")
        ((_, way),) = machine_code.loops(apart)
        assert len(way) == (6 if end == "EXIT" else 3)


@pytest.mark.parametrize("loop, clocks", [
    (["FADD R1, R1, R2"], 1),
    (["LDG.E.128 R4, [R2]", "LDG.E.128 R8, [R2]", "FADD R1, R7, R11"], 1002),
    (["LDG.E.128 R4, [R2]", "FADD R1, R7, R1", "LDG.E.128 R8, [R2]", "FADD R1, R11, R1"], 2002),
    (["FADD R1, R4, R1", "LDG.E R4, [R2]"], 1001),  # a turn ahead
    (["FADD R1, R4, R1", "MOV R4, R8", "LDG.E R8, [R2]"], 1001),  # the move waits
    (["FADD R1, R4, R1", "LDG.E R4, [R2]", "FADD R1, R8, R1", "LDG.E R8, [R2]"], 1001),
    (["LDG.E R4, [R2]", "LDG.E R4, [R2]"], 2000),  # into the same register
])
def test_the_clocks_of_a_turn(loop, clocks):
    """An instruction a clock, 1000 for a load, and what is issued meanwhile is hidden."""
    assert machine_code.turn(loop, 1000) == clocks


def test_what_a_multiprocessor_takes():
    assert occupancy.blocks_at_once(64, 32) == 1 and occupancy.blocks_at_once(32, 32) == 2 and occupancy.blocks_at_once(33, 8) == 6
    assert occupancy.blocks_at_once(64, 16, 86048, "90a") == 2 and occupancy.blocks_at_once(64, 16, 86048, "120a") == 1
    assert occupancy.blocks_at_once(32, 4, 77_400, "90") == 2 and occupancy.blocks_at_once(32, 1, 0, "86") == 16
    assert {arch: round(gpu.bandwidth * occupancy.LATENCY / gpu.multiprocessors / 1e3) for arch, gpu in occupancy.GPUS.items()
            if arch in ("80", "90", "100")} == {"80": 13, "90": 25, "100": 38}


def test_the_clocks_of_a_logit(kernel):
    """Eight logits of float32 and as many bytes out in a turn of seven instructions, one of which is a special function."""
    found = occupancy.judged(kernel, 16, 0, "90", 4, 1)
    h200, turn = occupancy.GPUS["90"], machine_code.turn(WAY, 700e-9 * 1.98e9)
    assert found["blocks"] == 3 and found["binds"] == "memory" and found["must_stream"]
    assert found["memory"] == round(1000 * 5 / (h200.bandwidth / h200.multiprocessors / h200.clock))
    assert found["latency"] == round(1000 * turn / (8 * 32 * 48)) and found["issue"] == round(1000 * 7 / 8 / 128)
    assert found["mufu"] == round(1000 / 8 / 16)
    assert found["flight"] == round(32 * 48 * 32 * 700e-9 * 1.98e9 / turn)
    both = occupancy.judged(kernel, 16, 0, "90", 4, 1, tiles=2)  # the results say how many logits there are
    assert both["memory"] == round(1000 * 9 / (h200.bandwidth / h200.multiprocessors / h200.clock)) and both["issue"] == found["issue"]
    few = occupancy.judged(kernel, 4, 170 << 10, "90", 4, 1)  # one block at once, of four warps
    assert few["binds"] == "latency" and f"{few['flight']} bytes in flight" in occupancy.faults(few | {"spills": 0})[0]
    assert few["flight"] == pytest.approx(32 * 4 * 32, rel=0.01)
    both = occupancy.judged(kernel, 16, 0, "90", 4, 2, tiles=2)  # four logits of two tiles
    assert both["memory"] == round(1000 * 10 / (h200.bandwidth / h200.multiprocessors / h200.clock)) and both["flight"] == found["flight"]
    assert both["issue"] == round(1000 * 7 / 4 / 128)
    for architecture, size, bias in (("100", 4, False), ("90", 2, False), ("90", 4, True)):
        assert not occupancy.judged(kernel, 4, 170 << 10, architecture, size, 1, bias)["must_stream"]


def test_loops_are_added_up():
    """One reads, one writes what shared memory holds, and shorter ones do not count; a narrow load brings no logits."""
    reads, writes = ["LDG.E.128 R4, [R2]", "LDG.E R8, [R2]", "FADD R1, R4, R8"], ["LDS.128 R4, [R1]", "MUFU.EX2 R4, R4", "STG.E.128 [R2], R4"]
    kernel = machine_code.Kernel(32, 0, [(loop, loop) for loop in (["STG.E.128 [R2], RZ"], reads, writes, ["LDG.E R1, [R2]", "NOP"])])
    found, clocks = occupancy.judged(kernel, 4, 0, "90", 4, 4), 1000 / (4.8e12 / 132 / 1.98e9)
    assert found["memory"] == round(4 * clocks + 4 * clocks) and found["issue"] == round(1000 * (3 + 3) / 4 / 128)
    assert found["mufu"] == round(1000 / 4 / 16) and found["flight"] == pytest.approx(16 * 64 * 32, rel=0.01)


def test_faults_are_found(capsys):
    good = {"kernel": "k", "arch": "sm_90", "spills": 0, "blocks": 1, "load": 16, "store": 16, "binds": "memory", "must_stream": True,
            "flight": 1, "memory": 2, "latency": 3}
    assert occupancy.faults(good) == [] == occupancy.faults(good | {"store": 0, "binds": "issue"})
    assert occupancy.faults(good | {"binds": "latency", "must_stream": False}) == []
    assert occupancy.faults(good | {"load": 4, "store": 4, "aligned": 4}) == []
    assert occupancy.report([good], "all") == 0 and capsys.readouterr().out.endswith("all: 1 compiled, bound 1 by memory; no fault\n")
    for bad in ({"spills": 4}, {"blocks": 0}, {"load": 8}, {"store": 4}, {"load": 0}, {"binds": "latency"}):
        assert len(occupancy.faults(good | bad)) == 1, bad
        assert occupancy.report([good, good | bad], "all") == 1 and capsys.readouterr().err.startswith("k on sm_90: ")


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("c++filt")), reason="there is no g++")
def test_cuda_kernels_are_judged_at_their_launch(tmp_path, kernel):
    shape = tmp_path / "shape"
    shape.with_suffix(".cpp").write_text(compiled_cuda._SHAPE)
    subprocess.run(["g++", f"-I{ROOT / 'csrc'}", shape.with_suffix(".cpp"), "-o", shape], check=True)
    names = compiled_cuda.short([
        "_ZN12grpo_kernels54_GLOBAL__N__1_2_c13policy_kernelIf13__nv_bfloat16Lb1ELNS_4RowsE1EEEvNS_12PolicyParamsE",
        "_ZN12grpo_kernels17statistics_kernelIfLb0ELNS_4RowsE0EEEvNS_16StatisticsParamsE",
    ])
    assert names[1] == "statistics<float, false, 0>"
    found = compiled_cuda.row(shape, "90a", "policy<float, __nv_bfloat16, true, 1>", kernel)
    assert (found["threads"], found["cluster"], found["blocks"]) == (320, 8, 2) and found["must_stream"]
    assert compiled_cuda.row(shape, "80", "policy<float, __nv_bfloat16, true, 1>", kernel) is None
    found = compiled_cuda.row(shape, "80", "policy<float, __nv_bfloat16, true, 0>", kernel)
    assert (found["threads"], found["cluster"], found["blocks"]) == (960, 1, 1)
    assert compiled_cuda.row(shape, "90a", "gradient<double, double, false, 0>", kernel)["threads"] == 448
    names = ("divergence_statistics<float, true, 0>", "jensen_shannon<double, false, 2>", "divergence_gradient<float, __half, true, 0>")
    for name, threads in zip(names, (512, 32, 512), strict=True):
        found = compiled_cuda.row(shape, "90a", name, kernel)
        assert found["threads"] == threads and found["must_stream"] == ("double" not in name), name
    for name, threads in ("gradient<float, float, true, 2>", 32), ("pair_logits<float, true>", 128), ("pair_sums<float, float, true>", 256):
        assert compiled_cuda.row(shape, "90a", name, kernel)["threads"] == threads


CHECK = """
from benchmarks import compiled_triton, machine_code, occupancy

found = compiled_triton.row("policy, clipped, KL", 90)
assert not occupancy.faults(found) and found["must_stream"] and found["binds"] == "memory", found
assert (found["load"], found["store"]) == (16, 16) and 0 < found["registers"] <= 128 and found["flight"] > 30_000, found

# a load that few turns make counts as well
way = ["LDG.E.128 R4, [R2]", "FADD R1, R1, R4"]
read, machine_code.read = machine_code.read, lambda cubin: {"": machine_code.Kernel(32, 0, [(["LDG.E.U8 R1, [R2]", *way], way)])}
assert compiled_triton.row("policy, clipped, KL", 90)["load"] == 1
machine_code.read = read

# an odd row stride cannot be read 16 bytes at a time: it must show
compiled_triton.OPTIONS["odd stride"] = {"columns": 5001, "stride": 5001}
found = compiled_triton.row("statistics, odd stride", 90)
assert found["load"] == 4 and "loads of 4 bytes in a loop" in occupancy.faults(found), found

# four elements of a thread are written at once: a third of the bytes in flight
compiled_triton.backend.policy_shape = lambda *_: compiled_triton.backend.PolicyShape(512, 4, 1)
found = compiled_triton.row("policy, clipped, KL, float32 out", 90)
assert found["binds"] == "latency" and len(occupancy.faults(found)) == 1 and found["flight"] < 16_384, found
"""


VARIANTS = """
import torch
from benchmarks import compiled_triton
from grpo_kernels.backends import triton
from grpo_kernels.backends.statistics import Pairs, Tile, new_statistics
from grpo_kernels.losses.config import LogitTransform


def some(*shape, start=0, dtype=torch.float32):
    return torch.zeros(start + shape[0], *shape[1:], dtype=dtype)[start:]


def pairs(rows, count, start):
    return Pairs(some(count, start=start, dtype=torch.int64), some(rows, 2, start=start, dtype=torch.int64),
                 some(rows, start=start, dtype=torch.int64))


def logits(rows, count, vocab, start):
    hidden, weight = (torch.zeros(n, 64, dtype=torch.bfloat16) for n in (rows, vocab))
    triton.pair_logits(pairs(rows, count, start), hidden, weight, some(count, start=start), bias=some(vocab, start=start))


def sums(rows, count, vocab, start):
    out, source = (torch.zeros(n, 64, dtype=torch.bfloat16) for n in (rows, vocab))
    triton.pair_sums(pairs(rows, count, start), some(count, start=start), source, out)


def statistics(rows, count, vocab, start):
    target, ranges = some(rows, start=start, dtype=torch.int64), some(rows, 2, start=start, dtype=torch.int64)
    triton.statistics(Tile(some(count), target, LogitTransform(), ranges=ranges), new_statistics(rows, torch.float32, "cpu"))


for call in (logits, sums, statistics):
    shapes = [(1, 1, 1, 0), (2, 16, 32, 1), (16, 7, 1000, 0), (9000, 5, 17, 1), (40_000, 12_345, 16, 2)]
    made = {kernel.hash for shape in shapes for kernel, _ in compiled_triton.launches(90, lambda: call(*shape))}
    assert len(made) == 1, (call, len(made))
"""


def outside(*arguments):
    """In a process without the interpreter, whose functions cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_triton_kernels_are_compiled_and_judged():
    done = outside("-c", CHECK)
    assert done.returncode == 0, done.stderr


def test_neither_lengths_nor_starts_compile_a_pair_kernel_again():
    done = outside("-c", VARIANTS)
    assert done.returncode == 0, done.stderr


def test_another_triton_than_was_asked_for_is_refused():
    done = outside("-m", "benchmarks.compiled_triton", "--triton", "0.0.0")
    assert done.returncode == 1 and "Triton 0.0.0 was asked for" in done.stderr and not done.stdout
