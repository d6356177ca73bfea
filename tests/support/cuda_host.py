"""The CUDA kernels on the host: csrc/row_kernels_cuda.cu compiled by g++ with the cuda_shim beside this file, behind backends/cuda.py."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from grpo_kernels.backends import cuda

CSRC = Path(__file__).parents[2] / "csrc"
SHIM = Path(__file__).parent / "cuda_shim"
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
TWICE, KEPT = 1, 2  # variants: two reads of the tile, or the row kept by a cluster


def why_unavailable() -> str | None:
    return None if shutil.which("g++") else "the CUDA kernels run on the host when g++ has compiled them, and there is none"


@functools.cache
def built(flags=(), sources=None):
    """Path of the compiled kernels; built once per content of the sources. GRPO_KERNELS_SHIM_FLAGS adds to the flags."""
    flags = (*flags, *os.environ.get("GRPO_KERNELS_SHIM_FLAGS", "").split())
    csrc = Path(sources or CSRC)
    files = sorted([*csrc.glob("*.h"), *csrc.glob("*.cu*"), *SHIM.iterdir()])
    content = hashlib.sha256(b"\0".join([" ".join(flags).encode(), *(f.read_bytes() for f in files)])).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"grpo-kernels-shim-{os.getuid()}", f"{content}.so")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        mine = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", *flags, f"-I{SHIM}", f"-I{csrc}"]
        subprocess.run([*command, "-x", "c++", csrc / "row_kernels_cuda.cu", SHIM / "shim.cpp", "-o", mine], check=True)
        mine.replace(path)  # at once: other workers build the same
    return path


def _function(name, *arguments, result=ctypes.c_int):
    """One of csrc/launch_shape.h's."""
    function = getattr(cuda.loaded(str(built())), name)
    function.argtypes, function.restype = [ctypes.c_int64, *(ctypes.c_int,) * (len(arguments) - 1)], result
    return function(*arguments)


def shared_memory(capability):
    return _function("most_shared_memory", capability)


def cluster_size(columns, element_size, capability):
    return _function("cluster_size", columns, element_size, capability)


def block_memory(columns, element_size, cluster):
    return _function("block_memory", columns, element_size, cluster, result=ctypes.c_int64)


def threads_of_two_tiles(columns, element_size):
    return _function("threads_of_two_tiles", columns, element_size)


def threads_of(columns, element_size, visits, cluster=1):
    return _function("threads_of", columns, element_size, visits, cluster)


def _on_the_host(name):
    """One of the backend's functions, with the launch and the shim's schedule as further keywords."""

    def call(*args, seed=1, capability=90, yield_one_in=16, largest_cluster=8, flags=(), sources=None, device=0, variant=0, cluster=0,
             threads=0, **more):  # fmt: skip
        kernels = cuda.Kernels(built(flags, sources), variant=variant, cluster=cluster, threads=threads, device=device)
        kernels.library.shim_set(seed, capability, yield_one_in, largest_cluster)
        getattr(kernels, name)(*args, **more)

    return call


statistics, close, gradient, policy = map(_on_the_host, ("statistics", "close", "gradient", "policy"))
divergence_statistics, jensen_shannon, divergence_gradient = map(
    _on_the_host, ("divergence_statistics", "jensen_shannon", "divergence_gradient")
)
pair_logits, pair_sums = map(_on_the_host, ("pair_logits", "pair_sums"))


def sanitizer_libraries():
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in ("libasan.so", "libubsan.so")]
    return found if all(Path(path).is_absolute() for path in found) else None
