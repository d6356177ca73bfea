"""What nvcc makes of the CUDA C++ kernels, for every architecture and without a GPU, judged by the machine code.

``python -m benchmarks.compiled_cuda`` (part of ``make kernels``) fails on the faults of `occupancy.py`; with numbers, 80 90, it
compiles for these architectures alone. Threads, cluster and shared memory are those of a launch on rows of 151,936 columns, on
ranges and on pairs, as csrc/launch_shape.h picks them. Without nvcc it says so and passes.
"""

import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from grpo_kernels import build_cuda

from . import machine_code, occupancy

COLUMNS = 151_936
_SHAPE = """
#include <cstdio>
#include <cstdlib>
#include "launch_shape.h"
int main(int, char** v) {
  const int64_t columns = std::atoll(v[1]);
  const int size = std::atoi(v[2]), capability = std::atoi(v[3]), visits = std::atoi(v[4]), kept = std::atoi(v[5]);
  const int cluster = kept ? grpo_kernels::cluster_size(columns, size, capability) : 0;
  using namespace grpo_kernels;
  std::printf("%d %d %d %d %d %d ", kThreadsOfRange, kScratchBytes, kLogitsThreads, 0, kSumsThreads, kSumsSharedBytes);
  std::printf("%d %d %d ", threads_of_two_tiles(columns, size), scratch_of_two_tiles(size), kThreadsOfClose);
  std::printf("%d ", kScratchBytesOfSquares);
  std::printf("%d %d %lld", cluster, grpo_kernels::threads_of(columns, size, visits, cluster ? cluster : 1),
              (long long)grpo_kernels::block_memory(columns, size, cluster));
}
"""


def compiled(folder: Path, architecture: str) -> list[dict | None]:
    """A `row` for each kernel of an architecture; RuntimeError where nvcc fails."""
    source, cubin = build_cuda.sources() / build_cuda.SOURCES[0], folder / f"{architecture}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    machine_code.run(build_cuda.nvcc(), "-cubin", "-O3", "-std=c++17", target, f"-I{source.parent}", source, "-o", cubin)
    kernels = machine_code.read(cubin)
    return [row(folder / "shape", architecture, *each) for each in zip(short(list(kernels)), kernels.values(), strict=True)]


def short(names: list[str]) -> list[str]:
    """Of mangled names: policy<float, __half, true, 1>."""
    text = re.sub(r"grpo_kernels::|\(anonymous namespace\)::|void |_kernel(?=<)", "", machine_code.run("c++filt", *names))
    return re.sub(r"\(\w+\)", "", text).splitlines()


def row(shape: Path, architecture: str, name: str, code: machine_code.Kernel) -> dict | None:
    """A kernel at the launch that rows of COLUMNS get; None where they never get it: no cluster can keep one."""
    of_name = r"(\w+)<(\w+)(?:, (\w+))??(?:, (true|false))?(?:, (\d))?(?:, (true|false))?>"
    kernel, dtype, out, _, mode, squares = re.fullmatch(of_name, name).groups()
    size, out_size = ({"double": 8, "float": 4}.get(each, 2) for each in (dtype, out or dtype))
    kept = kernel == "policy" and mode == "1"
    visits = 2 if kernel == "policy" and not kept else 1
    found = machine_code.run(shape, COLUMNS, size, architecture.rstrip("a"), visits, int(kept))
    *others, cluster, threads, shared = map(int, found.split())
    of_kernel = {"pair_logits": others[2:4], "pair_sums": others[4:6], "close": (others[8], 0)}
    two_tiles = kernel in ("divergence_statistics", "jensen_shannon", "divergence_gradient")
    if mode == "2" or kernel in of_kernel:
        threads, shared = of_kernel.get(kernel, others[:2])
    if two_tiles:
        threads, shared = threads if mode == "2" else others[6], others[7]
    if squares == "true":
        shared = others[9]
    if kept and not cluster:
        return None
    judged = occupancy.judged(code, threads // 32, shared, architecture, size, out_size, tiles=1 + two_tiles)
    judged["must_stream"] &= mode != "2"  # most ranges are of less than 20 columns
    return {"kernel": name, "arch": f"sm_{architecture}", "threads": threads, "cluster": cluster or 1, **judged}


def main() -> int:
    if build_cuda.nvcc() is None:
        print("CUDA C++ kernels: not compiled, nvcc was not found")
        return 0
    known, wanted = build_cuda.architectures(build_cuda.nvcc()), sys.argv[1:]
    architectures = [name for name in known if not wanted or name.rstrip("a") in wanted]
    if not architectures:
        print(f"make kernels: {' '.join(wanted)} is none of {' '.join(known)}", file=sys.stderr)
        return 1
    with ProcessPoolExecutor(os.cpu_count()) as pool, tempfile.TemporaryDirectory() as made:
        source = Path(made, "shape.cpp")
        source.write_text(_SHAPE)
        machine_code.run(build_cuda.nvcc(), f"-I{build_cuda.sources()}", source, "-o", source.with_suffix(""))
        rows = [found for rows in pool.map(partial(compiled, Path(made)), architectures) for found in rows]
    return occupancy.report(list(filter(None, rows)), f"nvcc, V {COLUMNS}, {rows.count(None)} never launched")


if __name__ == "__main__":
    sys.exit(main())
