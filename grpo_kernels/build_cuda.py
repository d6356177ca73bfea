"""Builds the CUDA C++ kernels with nvcc: at install (setup.py loads this file by its path), or later, from an installed package.

Knows from which sources both compiled libraries are made, so that one of other sources is never called.

Imports nothing but the standard library, so that it runs in an isolated build environment.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = ("row_kernels_cuda.cu", "row_kernels_cuda.cuh", "row_kernels_cuda.h", "divergence_cuda.cuh", "pairs_cuda.cuh",
           "units_cuda.cuh", "launch_shape.h", "element_math.h", "divergence_math.h", "row_math.h", "params.h")  # fmt: skip
CPU_SOURCES = ("bindings.cpp", "row_kernels_cpu.cpp", "row_kernels_cpu.h", "rows_cpu.h", "pair_kernels_cpu.h",
               "divergence_kernels_cpu.h", "divergence_math.h", "row_math.h", "products_cpu.cpp", "products_cpu.h",
               "product_tiles_cpu.h", "product_vectors_cpu.h", "transpose_cpu.h", "vector.h", "params.h")  # fmt: skip
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
LIBRARY = "_cuda.so"


class BuildError(Exception):
    """What is missing, or what the compiler said."""


def nvcc() -> str | None:
    """The compiler under CUDA_HOME, or on the path, or where its installer puts it."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and Path(home, "bin", "nvcc").exists():
            return str(Path(home, "bin", "nvcc"))
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def sources() -> Path:
    """The folder of the sources: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / SOURCES[0]).exists():
            return folder
    raise BuildError("the sources of the kernels are missing from this installation")


def fingerprint(folder: Path | None = None, names: tuple[str, ...] = SOURCES) -> str:
    """Of the sources; a library carries that of those it was built from."""
    folder = sources() if folder is None else folder
    return hashlib.sha256(b"\0".join((folder / name).read_bytes() for name in names)).hexdigest()[:16]


def _run(line: list[str]) -> str:
    """What a command prints. Raises BuildError with what it says where it fails."""
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{line[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{line[0]} failed:\n{(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def present() -> tuple[int, ...]:
    """The compute capabilities of this machine's GPUs, 90 for 9.0. Raises BuildError where there is none."""
    found = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    capabilities = tuple(sorted({int(number.replace(".", "")) for number in re.findall(r"\d+\.\d", found)}))
    if not capabilities:
        raise BuildError(f"nvidia-smi names no GPU: {found.strip()}")
    return capabilities


def _known(compiler: str) -> set[int]:
    known = _run([compiler, "--list-gpu-code"]).split()
    return {int(m[1]) for m in (re.fullmatch(r"sm_(\d+)", name) for name in known) if m}


def architectures(compiler: str) -> list[str]:
    """Those of ARCHITECTURES that this compiler knows. Raises BuildError where it knows none."""
    numbers = _known(compiler)
    chosen = [arch for arch in ARCHITECTURES if int(arch.rstrip("a")) in numbers]
    if not chosen:
        raise BuildError(f"{compiler} knows none of sm_{', sm_'.join(ARCHITECTURES)}")
    return chosen


def targets(compiler: str, only: tuple[int, ...] = ()) -> list[str]:
    """The -gencode options: machine code of each architecture that this compiler knows, and PTX for those between and after them.

    Machine code of sm_100a runs on 10.0 alone: 10.3 and 11.0 take the PTX of compute_100, whatever comes later that of the newest.
    With ``only``, 90 for a compute capability of 9.0, machine code of those and nothing else.
    """
    if only:
        names = {int(arch.rstrip("a")): arch for arch in ARCHITECTURES}
        return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (names.get(number, str(number)) for number in only)]
    chosen, numbers = architectures(compiler), _known(compiler)
    portable = sorted({max(numbers)} | numbers & {100})
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return options + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable]


def command(compiler: str, source: Path, target: Path, only: tuple[int, ...] = ()) -> list[str]:
    threads = min(os.cpu_count() or 1, 8)
    return [compiler, "-shared", "-O3", "-std=c++17", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads",
            str(threads), *targets(compiler, only), f'-DGRPO_SOURCES="{fingerprint(source.parent)}"', f"-I{source.parent}",
            str(source), "-o", str(target)]  # fmt: skip


def build(target: Path | None = None, folder: Path | None = None, only: tuple[int, ...] = ()) -> str:
    """Compiles the library to ``target`` (beside this file) and returns the compiler's command.

    That takes three minutes to seven on two cores; for ``only`` one compute capability, 90 for 9.0, a quarter of a minute.

    Raises BuildError with the reason and the remedy.
    """
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc was not found; install the CUDA toolkit (12.0 or newer) or set CUDA_HOME to it")
    target = PACKAGE / LIBRARY if target is None else target
    source = (sources() if folder is None else folder) / SOURCES[0]
    unfinished = target.with_suffix(f".{os.getpid()}")
    try:
        unfinished.touch()
    except OSError as error:
        raise BuildError(f"{target.parent} cannot be written to: {error}") from error
    line = command(compiler, source, unfinished, only)
    try:
        _run(line)
        unfinished.replace(target)  # at once: a process that has the old library loaded keeps it
    finally:
        unfinished.unlink(missing_ok=True)
    return " ".join(line).replace(str(unfinished), str(target))
