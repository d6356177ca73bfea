"""The row kernels in C++, vectorised for the processor found at run time; and what a tile's memory needs on the CPU.

The contract is that of `pytorch.py`, on tiles of float32, bfloat16 or float64, for results of the same dtype. ``isa`` is one of
`isas`, None means the best. Importing this module never fails: `why_unavailable` says what is missing.

Source: csrc/row_kernels_cpu.cpp, csrc/divergence_kernels_cpu.h and csrc/pair_kernels_cpu.h (loops), csrc/row_math.h and
csrc/divergence_math.h (formulas).
"""

import ctypes
import json
import mmap
import sys
from pathlib import Path

import torch  # before _native: its OpenMP runtime is then the one both use, with one pool of threads

try:
    from grpo_kernels import _native

    _import_error = None
except ImportError as error:
    _native = None
    _import_error = str(error)

from .. import build_cuda
from . import params
from .comparison import check_both
from .statistics import check, check_pairs, check_rows, described, require

_BUILD_INFO = Path(__file__).parent.parent / "_build_info.json"
_RESULTS = {dtype: (dtype,) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
_SUPPORTED = "float32, bfloat16 or float64 on the CPU"
REBUILD = "install a C++17 compiler (g++ >= 9 or clang++) and reinstall grpo-kernels"


def build_info() -> dict:
    """What setup.py wrote down when it built the extension; empty if it never ran."""
    try:
        return json.loads(_BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}


def _of_other_sources() -> bool:
    """Whether the extension was built from other sources than this package's, or than the last build's where it ships none."""
    try:
        expected = build_cuda.fingerprint(names=build_cuda.CPU_SOURCES)
    except (build_cuda.BuildError, OSError):
        expected = build_info().get("sources")
    return expected is not None and getattr(_native, "sources", None) != expected


# a struct that has changed since would be read as pointers that are none
_REFUSED = _native is not None and _of_other_sources()


def why_unavailable() -> str | None:
    """None, or the reason why the compiled kernels cannot be used, with the remedy."""
    if _REFUSED:
        return f"the compiled extension grpo_kernels._native was built from other sources than these; {REBUILD}"
    if _native is not None:
        return None
    built = any(Path(__file__).parent.parent.glob("_native*"))
    reason = build_info().get("error") or (_import_error if built else "it was not built: pip install .")
    return f"the compiled extension grpo_kernels._native is missing ({reason}); {REBUILD}"


def isas() -> list[str]:
    """Instruction sets that were built and that this processor has, best last."""
    return _native.isas()


def isa() -> str:
    """The instruction set in use."""
    return isas()[-1]


def statistics(tile, stats, isa=None):
    """Folds a tile into the running statistics [R, 4] of its rows."""
    _check(tile, stats=stats)
    _run("statistics", isa, tile.values, params.statistics(tile, stats))


def gradient(tile, out, scored, g, g_entropy=None, isa=None):
    """Writes the gradient of the raw logits."""
    _check(tile, out, g=g, g_entropy=g_entropy, **scored._asdict())
    _run("gradient", isa, tile.values, params.gradient(tile, out, scored, g, g_entropy))


def policy(tile, out, rows, terms, scored, isa=None):
    """The fused GRPO kernel: statistics, coefficient and gradient of whole rows; ``scored`` is written."""
    _check(tile, out, **scored._asdict(), **vars(rows))
    _run("policy", isa, tile.values, params.policy(tile, out, rows, terms, scored))


def divergence_statistics(student, teacher, stats, kind, isa=None):
    """Folds two tiles into the running statistics [R, 8] of their rows."""
    _check_both(student, teacher, stats=stats)
    _run("divergence_statistics", isa, student.target, params.divergence_statistics(student, teacher, stats, kind))


def jensen_shannon(student, teacher, scored, gap, sums, beta, isa=None):
    """Adds a tile's part of KL(p || m) and of the divergence to sums [R, 2]."""
    _check_both(student, teacher, sums=sums, gap=gap, **scored._asdict())
    _run("jensen_shannon", isa, student.target, params.jensen_shannon(student, teacher, scored, gap, sums, beta))


def divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g=None, g_entropy=None, isa=None):
    """Writes the gradient of the student's raw logits."""
    beside = {name: x for name, x in (("g", g), ("g_entropy", g_entropy)) if x is not None}
    _check_both(student, teacher, out, g_divergence=g_divergence, **scored._asdict(), **compared._asdict(), **beside)
    filled = params.divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g, g_entropy)
    _run("divergence_gradient", isa, student.target, filled)


def divergence(student, teacher, out, g_divergence, divergence, scored, compared, isa=None):
    """Divergence and gradient of whole rows at once; ``scored`` and ``compared`` are written."""
    _check_both(student, teacher, out, g_divergence=g_divergence, **scored._asdict(), **compared._asdict())
    filled = params.divergence(student, teacher, out, g_divergence, divergence, scored, compared)
    _run("divergence", isa, student.target, filled)


def pair_logits(pairs, hidden, weight, out, scale=1.0, bias=None, add=False, isa=None):
    """out[j] = scale * hidden[rows[r]] . weight[ids[j]] + bias[ids[j]] for each pair j of each row r, added to out with ``add``."""
    _check_pairs(pairs, out, hidden, weight, bias)
    require(hidden.dtype == weight.dtype, "hidden and weight must share a dtype")
    _run("pair_logits", isa, pairs.ranges, params.pair_logits(pairs, hidden, weight, out, scale, bias, add))


def pair_sums(pairs, g, source, out, scale=1.0, add=False, isa=None):
    """out[rows[r]] = scale * sum of g[j] source[ids[j]] over the pairs j of row r, added to out with ``add``."""
    _check_pairs(pairs, g, out, source)
    _run("pair_sums", isa, pairs.ranges, params.pair_sums(pairs, g, source, out, scale, add))


def transpose(matrix, out, isa=None):
    """``out.copy_(matrix.T)``: ``[R, C]`` of any row stride into contiguous ``[C, R]`` of the same dtype."""
    if matrix.dtype not in _RESULTS or matrix.device.type != "cpu":
        raise AssertionError(f"matrix must be {_SUPPORTED}, got {described(matrix)}")
    check_rows("matrix", matrix)
    shape = matrix.shape[::-1]
    if out.shape != shape or out.dtype != matrix.dtype or out.device != matrix.device or not out.is_contiguous():
        raise AssertionError(f"out must be contiguous {tuple(shape)} {matrix.dtype} on the CPU, got {described(out)}")
    _run("transpose", isa, matrix, params.transpose(matrix, out))


def _check(tile, out=None, **tensors):
    _check_here(tile)
    check(tile, _RESULTS, out, **tensors)


def _check_both(student, teacher, out=None, stats=None, sums=None, **tensors):
    _check_here(student)
    absent = [name for name, x in tensors.items() if x is None]
    require(not absent, f"{', '.join(absent)} must be given")
    check_both(student, teacher, _RESULTS, out, stats, sums, **tensors)


def _check_here(tile):
    if why_unavailable() is not None:
        raise AssertionError(why_unavailable())
    if tile.values.device.type != "cpu":
        raise AssertionError(f"tile must be {_SUPPORTED}, got {described(tile.values)}")


def _check_pairs(pairs, per_pair, per_row, per_id, bias=None):
    if why_unavailable() is not None:
        raise AssertionError(why_unavailable())
    if per_id.device.type != "cpu":
        raise AssertionError(f"matrices must be {_SUPPORTED}, got {described(per_id)}")
    check_pairs(pairs, _RESULTS, per_pair, per_row, per_id, bias)


def _run(kernel, isa, values, filled):
    if values.shape[0]:
        getattr(_native, kernel)(isa or "", torch.get_num_threads(), filled)


def advise_huge_pages(tensor) -> None:
    """Asks the kernel to back a fresh tensor with huge pages; does nothing where that is not to be had."""
    _advise(tensor, getattr(mmap, "MADV_HUGEPAGE", None))


def release_pages(tensor) -> None:
    """Gives the memory of a tensor back to the system; its contents are lost, the tensor stays usable."""
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))


def _advise(tensor, advice):
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise AssertionError(f"wanted a contiguous CPU tensor, got {described(tensor)}")
    if advice is None or not sys.platform.startswith("linux"):
        return
    # Whole pages only: the rest of the first and last one may belong to somebody else.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, end - start, advice)
