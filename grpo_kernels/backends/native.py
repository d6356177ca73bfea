"""The row kernels in C++, vectorised for the processor found at run time; products; and what a tile needs of memory on the CPU.

The contract is that of `pytorch.py`, on tiles of float32, bfloat16 or float64, for results of the same dtype. ``isa`` is one of
`isas`, None means the best. Importing this module never fails: `why_unavailable` says what is missing.

Source: csrc/row_kernels_cpu.cpp, csrc/divergence_kernels_cpu.h and csrc/pair_kernels_cpu.h (loops), csrc/row_math.h and
csrc/divergence_math.h (formulas); csrc/products_cpu.cpp.
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
from .statistics import _end, check, check_close, check_pairs, check_rows, described, require

_BUILD_INFO = Path(__file__).parent.parent / "_build_info.json"
_RESULTS = {dtype: (dtype,) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
_SUPPORTED = "float32, bfloat16 or float64 on the CPU"
PRODUCT_DTYPES = tuple(_RESULTS)
CHAIN = 1024  # of a product's depth, at whose multiples a cut changes no bit
PRODUCT_ROWS = 32  # at whose multiples one changes none of a product that is `continued`
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
    """Merges a tile into the statistics [R, 4] of its rows, or each fixed tile into its own, [R, parts, 4]; with squares 5."""
    _check(tile, stats=stats)
    _run("statistics", isa, tile.values, params.statistics(tile, stats))


def close(stats, scored, squared=None, isa=None):
    """What is known of rows whose statistics are complete."""
    check_close(stats, scored, squared)
    _run("close", isa, stats, params.close(stats, scored, squared))


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


def product_isas() -> list[str]:
    """As `isas`, of `product`: "amx" is one more, of bfloat16 tiles."""
    return _native.product_isas()


def product(a, b, out, add=False, alpha=1.0, continued=False, isa=None):
    """``out = alpha * a @ b``, plus what out holds with ``add``; its bits depend on nothing but the numbers.

    Row i and column j alone decide out[i, j]: not M, N, i, j, strides or threads. It is rounded once, from a sum in this order:
    chains of fused multiply-adds over 1024 ascending k, each from nothing, added one after another. "amx" sums 32 k at a time in an
    order of its own. "baseline" has no fused multiply-add and rounds each product.

    Into an out of acc (float32 of bfloat16), with alpha 1, the chains are added straight to what out holds, so a cut of K at a
    multiple of 1024 changes no bit. With ``continued`` one chain runs over all of K, with ``add`` from what out holds: then no cut
    changes a bit, with "amx" none at a multiple of 32. Infinities and NaN stay in their row and column.

    Args:
        a: [M, K], b: [K, N], float32, float64 or bfloat16; of each one stride is 1.
        out: [M, N] of the inputs' dtype or acc, columns adjacent, rows apart, in memory of its own.
    """
    _check_product(a, b, out, add, alpha, continued)
    if out.numel():
        _native.product(isa or "", torch.get_num_threads(), params.product(a, b, out, add, continued, alpha))


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


def _check_product(a, b, out, add, alpha, continued):
    if why_unavailable() is not None:
        raise AssertionError(why_unavailable())
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in _RESULTS or x.dtype != a.dtype or x.device.type != "cpu" or x.dim() != 2:
            raise AssertionError(f"{name} must be a matrix of {_SUPPORTED}, a's dtype, got {described(x)}")
        if all(n > 1 and stride != 1 for n, stride in zip(x.shape, x.stride(), strict=True)):
            raise AssertionError(f"{name}'s rows or columns must be adjacent, got {described(x)}")
    require(a.shape[1] == b.shape[0], f"b must have {a.shape[1]} rows, got {described(b)}")
    acc = torch.float64 if a.dtype == torch.float64 else torch.float32
    shape = (a.shape[0], b.shape[1])
    if out.shape != shape or out.dtype not in (a.dtype, acc) or out.device != a.device:
        raise AssertionError(f"out must be {shape} {a.dtype} or {acc} on the CPU, got {described(out)}")
    check_rows("out", out)
    require(not _overlap(out, a) and not _overlap(out, b), "out must be other memory than a and b")
    if continued and (alpha != 1 or (add and out.dtype != acc)):
        raise AssertionError(f"continued goes with alpha 1, and with add with an out of {acc}, got {alpha}, {out.dtype}")


def _overlap(x, y):
    return x.data_ptr() < _end(y) and y.data_ptr() < _end(x)


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
