"""The row kernels in C++, vectorised for the processor found at run time; and what a tile's memory needs on the CPU.

Every function takes a tile of logits ``[R, C]`` in place: float32, bfloat16 or float64, elements of a row adjacent, any
row stride. ``acc`` is float32, or float64 for a float64 tile. Importing this module never fails: `why_unavailable` says
what is missing.

Source: csrc/row_kernels_cpu.cpp (loops), csrc/row_math.h (formulas).
"""

import ctypes
import json
import math
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

_BUILD_INFO = Path(__file__).parent.parent / "_build_info.json"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_KINDS = {"clipped": 0, "cispo": 1, "sapo": 2, "linear": 3}
REBUILD = "install a C++17 compiler (g++ >= 9 or clang++) and reinstall grpo-kernels"


def build_info() -> dict:
    """What setup.py wrote down when it built the extension; empty if it never ran."""
    try:
        return json.loads(_BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}


def why_unavailable() -> str | None:
    """None, or the reason why the compiled kernels cannot be used, with the remedy."""
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


def accumulator(tile):
    return torch.float64 if tile.dtype == torch.float64 else torch.float32


def statistics(tile, stats, target, transform, *, bias=None, temperature=None, probs=False, out=None, isa=None):
    """Folds a block of columns into the running statistics of its rows.

    With ``z`` the transformed logits and ``M`` the maximum, ``stats[r]`` becomes ``(M, sum_{v != target} exp(z_v - M),
    sum_v (z_v - M) exp(z_v - M), z_target)`` over everything folded so far. Starts from ``(-inf, 0, 0, -inf)``.

    Args:
        tile: ``[R, C]`` raw logits; overwritten by ``softmax(z)`` when ``probs``.
        stats: ``[R, 4]`` acc, contiguous, updated in place.
        target: ``[R]`` int64 relative to the tile's first column; outside ``[0, C)`` means not in this tile.
        transform: has ``logit_scale``, ``softcap`` (None or float) and ``temperature``.
        bias: ``[C]`` acc, may hold -inf.
        temperature: ``[R]`` acc, overrides the transform's.
        probs: the tile holds whole rows, and p is wanted in its place.
        out: None; these kernels work in place.
        isa: one of `isas`; None means the best.
    """
    _check(tile, transform, bias, temperature, target=target, out=out)
    _expect("stats", stats, (tile.shape[0], 4), accumulator(tile))
    if tile.shape[0] == 0:
        return
    _native.statistics(
        isa or "",
        torch.get_num_threads(),
        _tile(tile),
        _transform(transform, bias, temperature),
        target.data_ptr(),
        stats.data_ptr(),
        bool(probs),
    )


def gradient(
    tile,
    target,
    lse,
    logps,
    entropy,
    g,
    g_entropy,
    transform,
    *,
    bias=None,
    temperature=None,
    from_probs=False,
    out=None,
    isa=None,
):
    """Overwrites a tile by the gradient of its raw logits.

    ``dz = (g (onehot - p) - g_entropy p (log p + entropy)) (1 - (y / softcap)^2) logit_scale / temperature``, ``y`` the
    softcapped logit. Rows with ``g == 0`` and ``g_entropy == 0`` become zeros whatever they hold.

    Args:
        tile: ``[R, C]`` raw logits, or p as `statistics` leaves it when ``from_probs``.
        target: ``[R]`` int64 relative to the tile's first column.
        lse, logps, entropy: ``[R]`` acc, of whole rows.
        g, g_entropy: ``[R]`` acc, gradients of logps and entropy; ``g_entropy`` may be None.
        transform, bias, temperature, isa: as in `statistics`.
    """
    _check(tile, transform, bias, temperature, target=target, out=out)
    for name, vector in (("lse", lse), ("logps", logps), ("entropy", entropy), ("g", g), ("g_entropy", g_entropy)):
        _expect_vector(name, vector, tile, optional=name == "g_entropy")
    if tile.shape[0] == 0:
        return
    _native.gradient(
        isa or "",
        torch.get_num_threads(),
        _tile(tile),
        _transform(transform, bias, temperature),
        target.data_ptr(),
        lse.data_ptr(),
        logps.data_ptr(),
        entropy.data_ptr(),
        g.data_ptr(),
        _address(g_entropy),
        bool(from_probs),
    )


def policy(tile, target, rows, terms, transform, logps, entropy, *, bias=None, temperature=None, out=None, isa=None):
    """The fused GRPO kernel: whole rows of logits become their gradient, log-probs and entropies fall out.

    ``loss = sum_r w_policy s + w_kl k3 + w_entropy entropy`` with s and k3 of the row's log-prob; see csrc/row_math.h.

    Args:
        tile: ``[R, C]`` raw logits of whole rows, overwritten by ``d loss / d raw``.
        target: ``[R]`` int64 in ``[0, C)``.
        rows: has ``old ref advantages w_policy w_kl w_entropy``, each ``[R]`` acc or None.
        terms: has ``kind`` (clipped, cispo, sapo or linear: ``w_policy`` is then d loss / d logps itself),
            ``epsilon_low epsilon_high delta sapo_temperature_pos sapo_temperature_neg use_bias_correction_kl``.
        transform, bias, temperature, isa: as in `statistics`.
        logps, entropy: ``[R]`` acc, written.
    """
    _check(tile, transform, bias, temperature, target=target, out=out)
    for name in ("old", "ref", "advantages", "w_policy", "w_kl", "w_entropy"):
        _expect_vector(name, getattr(rows, name), tile, optional=True)
    _expect_vector("logps", logps, tile)
    _expect_vector("entropy", entropy, tile)
    _require(terms.kind in _KINDS, f"terms.kind must be one of {', '.join(_KINDS)}, got {terms.kind!r}")
    _require(terms.kind == "linear" or rows.w_policy is None or rows.advantages is not None, "advantages are missing")
    _require(rows.ref is None or rows.w_kl is not None, "w_kl is missing")
    if tile.shape[0] == 0:
        return
    compiled_terms = _native.PolicyTerms(
        kind=_KINDS[terms.kind],
        epsilon_low=terms.epsilon_low,
        epsilon_high=terms.epsilon_high,
        delta=math.inf if terms.delta is None else terms.delta,
        sapo_temperature_pos=terms.sapo_temperature_pos,
        sapo_temperature_neg=terms.sapo_temperature_neg,
        use_bias_correction_kl=bool(terms.use_bias_correction_kl),
    )
    _native.policy(
        isa or "",
        torch.get_num_threads(),
        _tile(tile),
        _transform(transform, bias, temperature),
        compiled_terms,
        target.data_ptr(),
        _address(rows.old),
        _address(rows.ref),
        _address(rows.advantages),
        _address(rows.w_policy),
        _address(rows.w_kl),
        _address(rows.w_entropy),
        logps.data_ptr(),
        entropy.data_ptr(),
    )


def transpose(tile, out, *, isa=None):
    """``out.copy_(tile.T)``: ``[R, C]`` of any row stride into contiguous ``[C, R]`` of the same dtype."""
    _expect_tile(tile)
    _expect("out", out, (tile.shape[1], tile.shape[0]), tile.dtype)
    if tile.numel():
        _native.transpose(isa or "", torch.get_num_threads(), _tile(tile), out.data_ptr())


def advise_huge_pages(tensor) -> None:
    """Asks the kernel to back a fresh tensor with huge pages; does nothing where that is not to be had."""
    _advise(tensor, getattr(mmap, "MADV_HUGEPAGE", None))


def release_pages(tensor) -> None:
    """Gives the memory of a tensor back to the system; its contents are lost, the tensor stays usable."""
    _advise(tensor, getattr(mmap, "MADV_DONTNEED", None))


def _advise(tensor, advice):
    _require(tensor.device.type == "cpu" and tensor.is_contiguous(), "wanted a contiguous CPU tensor")
    if advice is None or not sys.platform.startswith("linux"):
        return
    # Whole pages only: the rest of the first and last one may belong to somebody else.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(start, end - start, advice)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _tile(tile):
    return _native.Tile(
        data=tile.data_ptr(),
        rows=tile.shape[0],
        columns=tile.shape[1],
        row_stride=tile.stride(0),
        dtype=_DTYPES[tile.dtype],
    )


def _transform(transform, bias, temperature):
    return _native.Transform(
        logit_scale=transform.logit_scale,
        softcap=transform.softcap or 0.0,
        temperature=transform.temperature,
        bias=_address(bias),
        row_temperature=_address(temperature),
    )


def _require(holds, message):
    # Not an assert statement: `python -O` must not turn a wrong shape into a wild read.
    if not holds:
        raise AssertionError(message)


def _expect_tile(tile):
    _require(_native is not None, why_unavailable())
    rows, columns = tile.shape
    _require(
        tile.device.type == "cpu"
        and tile.dtype in _DTYPES
        and (columns <= 1 or tile.stride(1) == 1)
        and (rows <= 1 or tile.stride(0) >= columns),
        "tile must be [R, C] float32, bfloat16 or float64 on the CPU, elements of a row adjacent, rows apart, got "
        f"{tuple(tile.shape)} {tile.dtype} {tile.stride()} on {tile.device}",
    )


def _expect(name, tensor, shape, dtype):
    _require(
        tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous(),
        f"{name} must be contiguous {tuple(shape)} {dtype} on the CPU, got {tuple(tensor.shape)} {tensor.dtype} "
        f"{tensor.stride()} on {tensor.device}",
    )


def _expect_vector(name, vector, tile, optional=False):
    if vector is not None or not optional:
        _expect(name, vector, (tile.shape[0],), accumulator(tile))


def _check(tile, transform, bias, temperature, *, target, out):
    _expect_tile(tile)
    _require(out is None, "these kernels work in place")
    _expect("target", target, (tile.shape[0],), torch.int64)
    _expect_vector("temperature", temperature, tile, optional=True)
    if bias is not None:
        _expect("bias", bias, (tile.shape[1],), accumulator(tile))
