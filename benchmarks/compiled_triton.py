"""What Triton makes of its kernels, for three architectures and without a GPU, judged by the machine code.

``python -m benchmarks.compiled_triton`` (part of ``make kernels``) prints a row for each kernel and architecture, and fails on the
faults of `occupancy.py`; with ``--triton VERSION``, also where another Triton compiles. The backend's own functions launch: Triton
specialises and compiles as it would for a user, and stops before the launch.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget

from grpo_kernels.backends import comparison, products_triton
from grpo_kernels.backends import triton as backend
from grpo_kernels.backends.statistics import Pairs, Scored, Tile, new_statistics, tiles_of
from grpo_kernels.losses.config import LogitTransform
from grpo_kernels.losses.terms import KINDS, PolicyRows, PolicyTerms

from . import machine_code, occupancy

ARCHITECTURES = (80, 90, 100)
PRODUCTS = ("", "add", "of rows", "to bf16", "float32", "float64")  # as PRODUCT_OPTIONS
PRODUCT_OPTIONS = {"add": {"add": True}, "of rows": {"of_rows": True}, "to bf16": {"out": torch.bfloat16},
                   "float32": {"dtype": torch.float32}, "float64": {"dtype": torch.float64, "out": torch.float64}}  # fmt: skip
MULTIPLIES = {torch.bfloat16: r"[HQ]\w*MMA|UTC\w*MMA", torch.float32: "FFMA", torch.float64: "DFMA|DMMA"}
WIDE, NARROW = 151_936, 8192  # a row of Qwen's vocabulary; a column block of scoring
OPTIONS = {
    "odd V": {"columns": WIDE + 1}, "V 32k": {"columns": 32_000}, "column block": {"columns": NARROW}, "softcap": {"softcap": 30.0},
    "bias": {"bias": True}, "temperature": {"temperature": True}, "entropy": {"entropy": True}, "KL": {"kl": True},
    "bf16 tile": {"tile": torch.bfloat16}, "float32 out": {"out": torch.float32}, "fp16 out": {"out": torch.float16},
    "ranges": {"ranges": True}, **{kind: {"kind": kind} for kind in KINDS},
    "parts": {"parts": True}, "squares": {"squares": True},
    "float32": {"tile": torch.float32}, "to float32": {"out": torch.float32}, "add": {"add": True}, "K 896": {"columns": 896},
    **{kind: {"kind": kind} for kind in comparison.KINDS}, "logps": {"logps": True},
}
CASES = {
    "statistics": ("", "odd V", "column block", "column block, softcap", "bias, temperature", "column block, bf16 tile",
                   "parts", "ranges", "ranges, softcap, temperature", "squares", "column block, squares", "parts, squares",
                   "column block, bf16 tile, squares", "ranges, squares"),
    "close": ("", "squares"),
    "gradient": ("", "odd V", "column block", "softcap", "entropy", "entropy, softcap, bias", "float32 out", "bf16 tile",
                 "bf16 tile, entropy, softcap", "float32 out, ranges", "float32 out, ranges, entropy, softcap, temperature"),
    "policy": ("clipped, KL", "clipped, KL, odd V", "clipped, KL, V 32k", "clipped, KL, bias", "clipped, KL, bf16 tile",
               "clipped, KL, bias, entropy, temperature", "clipped, KL, bias, entropy, softcap", "cispo, KL, softcap", "sapo, KL",
               "linear", "linear, KL, entropy, softcap", "clipped, KL, float32 out", "clipped, KL, fp16 out",
               "clipped, KL, float32 out, entropy, softcap"),
    "divergence_statistics": ("forward_kl", "reverse_kl", "reverse_kl, odd V", "reverse_kl, column block", "forward_kl, bf16 tile",
                              "reverse_kl, softcap, bias, temperature", "reverse_kl, ranges"),
    "jensen_shannon": ("", "odd V", "column block", "bf16 tile", "softcap, bias", "ranges"),
    "divergence_gradient": ("forward_kl", "reverse_kl", "jsd", "reverse_kl, odd V", "reverse_kl, float32 out", "jsd, bf16 tile",
                            "reverse_kl, logps", "reverse_kl, logps, entropy", "jsd, logps, entropy, softcap, bias",
                            "forward_kl, float32 out, ranges", "jsd, logps, entropy, float32 out, ranges"),
    "pair_logits": ("", "bias", "add", "K 896", "float32"),
    "pair_sums": ("", "add", "K 896", "to float32, add", "float32, to float32"),
}
OF_BOTH = "divergence_statistics", "jensen_shannon", "divergence_gradient"


def start(kernel, columns=WIDE, softcap=None, tile=torch.float32, out=torch.bfloat16, stride=None, bias=False, temperature=False,
          entropy=False, kind="clipped", kl=False, ranges=False, parts=False, squares=False):
    """Calls the backend as the engine does: rows on 128 bytes unless a stride is given, results of the tile's dtype in place."""

    def matrix(dtype):
        return torch.zeros(2, stride or -(-columns // 32) * 32, dtype=dtype)[:, :columns]

    vector, transform, result = torch.zeros(2), LogitTransform(1.0, softcap, 1.0), matrix(out)
    logits, scored, g_entropy = result if out == tile else matrix(tile), Scored(vector, vector, vector), vector if entropy else None
    tile = Tile(logits, vector.long(), transform, torch.zeros(columns) if bias else None, vector if temperature else None)
    if ranges:
        result = vector
        tile = replace(tile, values=vector, ranges=torch.zeros(2, 2, dtype=torch.long))
    if kernel == "statistics":
        backend.statistics(tile, new_statistics(2, torch.float32, "cpu", tiles_of(columns) if parts else None, squares))
    elif kernel == "close":
        backend.close(new_statistics(2, torch.float32, "cpu", tiles_of(columns), squares), scored, vector if squares else None)
    elif kernel == "policy":
        inputs = [None if kind == "linear" else vector] * 2 + [vector if kl else None] * 2
        terms = PolicyTerms(kind, use_bias_correction_kl=kind != "linear")
        backend.policy(tile, result, PolicyRows(vector, *inputs, g_entropy), terms, scored)
    else:
        backend.gradient(tile, result, scored, vector, g_entropy)


def start_divergence(kernel, columns=WIDE, softcap=None, tile=torch.float32, out=torch.bfloat16, bias=False, temperature=False,
                     entropy=False, logps=False, kind="jsd", ranges=False):
    """As `start`: a student's and a teacher's logits."""
    vector, transform, width = torch.zeros(2), LogitTransform(1.0, softcap, 1.0), -(-columns // 32) * 32
    student, teacher, result = (torch.zeros(2, width, dtype=dtype)[:, :columns] for dtype in (tile, tile, out))
    result = student if out == tile else result
    added, where = torch.zeros(columns) if bias else None, None
    if ranges:
        student, teacher, result, where = vector, torch.zeros(2), vector, torch.zeros(2, 2, dtype=torch.long)
    both = [Tile(x, vector.long(), transform, added, vector if temperature else None, where) for x in (student, teacher)]
    scored, compared = Scored(vector, vector, vector), comparison.Compared(vector, vector, vector)
    if kernel == "divergence_statistics":
        backend.divergence_statistics(*both, comparison.new_comparison(2, torch.float32, "cpu"), kind)
    elif kernel == "jensen_shannon":
        backend.jensen_shannon(*both, scored, vector, torch.zeros(2, 2), 0.5)
    else:
        of_student = (vector if wanted else None for wanted in (logps, entropy))
        backend.divergence_gradient(*both, result, scored, compared, vector, comparison.DivergenceKind(kind), *of_student)


def start_pairs(kernel, columns=4096, tile=torch.bfloat16, out=torch.bfloat16, bias=False, add=False):
    """As `start`: a matrix of hidden states and one of weights."""
    vector, pairs = torch.zeros(2), Pairs(torch.zeros(2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long))
    hidden, weight = torch.zeros(2, 2, columns, dtype=tile)
    if kernel == "pair_logits":
        backend.pair_logits(pairs, hidden, weight, vector, bias=vector if bias else None, add=add)
    else:
        backend.pair_sums(pairs, vector, weight, hidden.to(out), add=add)


def launches(architecture: int, call) -> list:
    """(kernel, BLOCK) of each launch of a call, compiled by its path on a GPU of this architecture."""
    made, run = [], triton.JITFunction.run
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: architecture, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
    ))

    def compile_only(self, *args, warmup, **more):
        made.append((run(self, *args, warmup=True, **more), more.get("BLOCK") or more.get("BLOCK_N") or more["STEP"]))

    of_device = mock.patch.object(backend, "_capability", lambda device: architecture)
    with mock.patch.object(triton.JITFunction, "run", compile_only), of_device:
        call()
    return made


def row(name: str, architecture: int) -> dict:
    """A kernel and its options, compiled and judged."""
    kernel, *words = name.split(", ")
    options = {key: value for word in words for key, value in OPTIONS[word].items()}
    pairs, both, ranges = kernel in ("pair_logits", "pair_sums"), kernel in OF_BOTH, "ranges" in options
    call = start_pairs if pairs else start_divergence if both else start
    ((compiled, block),) = launches(architecture, lambda: call(kernel, **options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = machine_code.read(cubin).values()
    moved = [machine_code.accesses(loop) for loop, _ in code.loops]
    width = max if pairs else min  # a pair's id is read alone
    load, store = (min((width(each[kind]) for each in moved if each[kind]), default=0) for kind in (0, 1))
    dtypes = {"tile": torch.bfloat16 if pairs else torch.float32, "out": torch.bfloat16} | options
    warps, shared, bias = compiled.metadata.num_warps, compiled.metadata.shared, "bias" in options and not pairs
    sizes = dtypes["tile"].itemsize, 0 if "parts" in options else dtypes["out"].itemsize
    judged = occupancy.judged(code, warps, shared, str(architecture), *sizes, bias, 2 if both else 1)
    of_stats = kernel == "close" or "parts" in options  # whose loops move single numbers
    must_stream = architecture != 100 if pairs else judged["must_stream"] and not ranges and kernel != "close"
    judged |= {"must_stream": must_stream, "aligned": 4 if ranges or of_stats else 16}
    return {"kernel": name, "arch": f"sm_{architecture}", "block": block, "warps": warps, **judged, "load": load, "store": store}


def product_row(options: str, architecture: int) -> dict:
    """A product of matrices, compiled: what it takes, and how many instructions of its loops multiply."""
    given = {"dtype": torch.bfloat16, "out": torch.float32, "add": False, "of_rows": False}
    given |= {key: value for word in filter(None, options.split(", ")) for key, value in PRODUCT_OPTIONS[word].items()}
    a, b = torch.zeros(16, 2048, dtype=given["dtype"]), torch.zeros(2048, 16, dtype=given["dtype"])
    if given["of_rows"]:  # as in dz^T h; z = h W^T has the other matrix transposed
        a, b = a.view(2048, 16).T, b
    else:
        b = b.view(16, 2048).T
    out = torch.zeros(16, 16, dtype=given["out"])
    ((compiled, block),) = launches(architecture, lambda: products_triton.product(a, b, out, given["add"]))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = machine_code.read(cubin).values()
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    multiply = re.compile(MULTIPLIES[given["dtype"]])
    return {"kernel": ", ".join(filter(None, ("product", options))), "arch": f"sm_{architecture}", "block": block, "warps": warps,
            "registers": code.registers, "spills": code.spills, "shared": shared,
            "blocks": occupancy.blocks_at_once(code.registers, warps, shared, str(architecture)),
            "multiplies": max(sum(bool(multiply.match(op)) for op in loop) for loop, _ in code.loops),
            "binds": "arithmetic", "must_stream": False}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_triton")
    parser.add_argument("--triton", default=triton.__version__, metavar="VERSION", help="the version that must compile")
    parser.add_argument("architectures", nargs="*", type=int, help=f"without: {ARCHITECTURES}")
    options = parser.parse_args()
    architectures = options.architectures or ARCHITECTURES
    if options.triton != triton.__version__:
        print(f"make kernels: Triton {options.triton} was asked for, {triton.__file__} is {triton.__version__}", file=sys.stderr)
        return 1
    names = [", ".join(filter(None, (kernel, options))) for kernel, several in CASES.items() for options in several]
    jobs = [(name, architecture) for name in names for architecture in architectures]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(row, *zip(*jobs, strict=True)))
        products = list(pool.map(product_row, *zip(*itertools.product(PRODUCTS, architectures), strict=True)))
    what = f"triton {triton.__version__}"
    return occupancy.report(rows, f"{what}, V {WIDE}") | occupancy.report(products, what)


if __name__ == "__main__":
    sys.exit(main())
