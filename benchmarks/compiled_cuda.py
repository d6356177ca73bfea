"""What nvcc makes of the CUDA C++ kernels, for every architecture and without a GPU: registers, spills, shared memory, occupancy.

``python -m benchmarks.compiled_cuda`` (part of ``make kernels``) takes a minute or two of nvcc, and fails on a spill, on a stack
frame, which is where an array in local memory would be, and on a launch that no multiprocessor takes. Threads, cluster and shared
memory are those of a launch on rows of 151,936 columns, as csrc/launch_shape.h picks them. Without nvcc it says so and passes.
"""

import ctypes
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_kernels import build_cuda

from .occupancy import blocks_at_once, occupancy

COLUMNS = 151_936
_SHAPES = """
#include "launch_shape.h"
extern "C" {
int cluster_size(int64_t columns, int size, int capability) { return grpo_kernels::cluster_size(columns, size, capability); }
int64_t block_memory(int64_t columns, int size, int cluster) { return grpo_kernels::block_memory(columns, size, cluster); }
int threads(int64_t columns, int size, int visits, int cluster) { return grpo_kernels::threads_of(columns, size, visits, cluster); }
int most_shared_memory(int capability) { return grpo_kernels::most_shared_memory(capability); }
}
"""


def shapes(folder: Path):
    """The pure functions of csrc/launch_shape.h as a library."""
    source, library = folder / "shapes.cpp", folder / "shapes.so"
    source.write_text(_SHAPES)
    _run([build_cuda.nvcc(), "-shared", "-Xcompiler=-fPIC", f"-I{build_cuda.sources()}", str(source), "-o", str(library)])
    found = ctypes.CDLL(str(library))
    integers, found.block_memory.restype = (ctypes.c_int64, ctypes.c_int, ctypes.c_int), ctypes.c_int64
    found.cluster_size.argtypes = found.block_memory.argtypes = integers
    found.threads.argtypes = (*integers, ctypes.c_int)
    return found


def launch(shapes, kernel: str, architecture: str) -> dict:
    """Threads, cluster and shared memory of one kernel on a row; {} where it is never launched. ``kernel`` is its `short` name."""
    name, dtype, *_, mode = re.fullmatch(r"(\w+)_kernel<(\w+), (?:\w+, )*(\w+)>?", kernel).groups()
    size, capability = {"double": 8, "float": 4}.get(dtype, 2), int(architecture.rstrip("a"))
    kept = name == "policy" and mode == "1"
    cluster = shapes.cluster_size(COLUMNS, size, capability) if kept else 0
    if kept and not cluster:
        return {}
    threads = shapes.threads(COLUMNS, size, 2 if name == "policy" and not kept else 1, cluster or 1)
    shared = shapes.block_memory(COLUMNS, size, cluster)
    return {"cluster": cluster or 1, "threads": threads, "shared": shared, "most_shared": shapes.most_shared_memory(capability)}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise build_cuda.BuildError(done.stderr[-2000:])
    return done.stderr


def report(architecture: str) -> list[dict]:
    """A row for each kernel in the machine code of one architecture. Raises BuildError where nvcc fails."""
    compiler = build_cuda.nvcc()
    source = build_cuda.sources() / build_cuda.SOURCES[0]
    with tempfile.TemporaryDirectory() as folder:
        printed = _run(
            [compiler, "-cubin", "-O3", "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v",
             f"-I{source.parent}", str(source), "-o", str(Path(folder, "kernels.cubin"))]
        )  # fmt: skip
    return parsed(printed, architecture)


def parsed(text: str, architecture: str) -> list[dict]:
    """The rows in what ``ptxas -v`` prints."""
    rows = []
    for part in re.split(r"Compiling entry function ", text)[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append({
            "kernel": re.match(r"'(\S+)'", part)[1], "arch": f"sm_{architecture}", "registers": int(registers[1]),
            "stack": int(numbers[1]), "spills": int(numbers[2]) + int(numbers[3]), "shared": int(shared[1]) if shared else 0,
        })  # fmt: skip
    return rows


def short(name: str) -> str:
    """policy<float, bf16, plain, kept> of a mangled name, as far as c++filt is there to read it."""
    try:
        name = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return name
    name = name.replace("grpo_kernels::", "").replace("(anonymous namespace)::", "").replace("void ", "").split(">(")[0]
    return re.sub(r"\((?:\w|::)+\)", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def main() -> int:
    if build_cuda.nvcc() is None:
        print("CUDA C++ kernels: not compiled, nvcc was not found")
        return 0
    try:
        with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as folder:
            rows = [row for rows in pool.map(report, build_cuda.architectures(build_cuda.nvcc())) for row in rows]
            functions = shapes(Path(folder))
    except build_cuda.BuildError as error:
        print(f"make kernels: {error}", file=sys.stderr)
        return 1
    bad = 0
    for row in rows:
        name, arch = short(row["kernel"]), row["arch"].removeprefix("sm_")
        text, shape = f"{name:<45} {row['arch']:>8} {row['registers']:>4} registers", launch(functions, name, arch)
        if row["stack"] or row["spills"]:
            bad += 1
            text += f", {row['spills']} BYTES SPILLED, STACK FRAME OF {row['stack']}"
        if not shape:
            print(f"{text}, not launched: no cluster keeps a row of {COLUMNS}")
            continue
        blocks = blocks_at_once(row["registers"], shape["threads"] // 32, shape["shared"], arch)
        if not blocks or shape["shared"] > shape["most_shared"]:
            bad += 1
            text += ", TOO LARGE FOR A MULTIPROCESSOR"
        print(f"{text}, {shape['threads']:>4} threads x {shape['cluster']} blocks a row, {shape['shared']:>6} bytes shared, "
              f"{blocks} blocks at once: {occupancy(blocks, shape['threads'], arch):.0%}")  # fmt: skip
    print(f"{len(rows)} kernels, {bad} with a spill, a stack frame or no room")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
