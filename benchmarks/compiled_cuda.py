"""What nvcc makes of the CUDA C++ kernels, for three architectures, without a GPU: registers, spills, stack, blocks at once.

``python -m benchmarks.compiled_cuda`` (part of ``make kernels``) takes a minute or two of nvcc, and fails on a spill or a stack
frame, which is where an array in local memory would be. Where there is no nvcc it says so and passes.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_kernels import build_cuda

from .occupancy import blocks_at_once

ARCHITECTURES = ("80", "90a", "100a")
# launch_bounds of the kernels: the most threads of a block, 512 where a tile is float64
_THREADS = 1024


def report(architecture: str) -> list[dict]:
    """A row for each kernel in the machine code of one architecture. Raises BuildError where nvcc fails."""
    compiler = build_cuda.nvcc()
    source = build_cuda.sources() / build_cuda.SOURCES[0]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [compiler, "-cubin", "-O3", "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v",
             f"-I{source.parent}", str(source), "-o", str(Path(folder, "kernels.cubin"))], capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise build_cuda.BuildError(done.stderr[-2000:])
    return parsed(done.stderr, architecture)


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
        with ThreadPoolExecutor(2) as pool:
            rows = [row for rows in pool.map(report, ARCHITECTURES) for row in rows]
    except build_cuda.BuildError as error:
        print(f"make kernels: {error}", file=sys.stderr)
        return 1
    bad = [row for row in rows if row["stack"] or row["spills"]]
    for row in rows:
        blocks = blocks_at_once(row["registers"], _THREADS // 2 // 32)
        print(f"{short(row['kernel']):<60} {row['arch']:>8} {row['registers']:>4} registers, {row['spills']} spilled, "
              f"stack {row['stack']}, {blocks} blocks of 512 at once")  # fmt: skip
    print(f"{len(rows)} kernels, {len(bad)} with a spill or a stack frame")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
