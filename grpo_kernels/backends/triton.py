"""The row and pair kernels in Triton, and the row kernels over two tiles: checked launches, and the launch shapes.

On a GPU they are compiled at first use; on the CPU they run in Triton's interpreter when TRITON_INTERPRET=1 was set before
the first use, which is slow and meant for tests. The contract of the functions is that of `pytorch.py`.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass, replace

import torch

from ..losses.terms import KINDS
from . import comparison
from .statistics import check, check_close, check_pairs, has_squares, require

_REMEDY = "pip install triton (3.4 or newer)"
_SCALE_BLOCK = 8192
_CLOSE_BLOCK = 32
_RESULTS = {dtype: (dtype,) for dtype in (torch.bfloat16, torch.float16, torch.float64)}  # of each dtype of a tile
_RESULTS[torch.float32] = (torch.float32, torch.bfloat16, torch.float16)


class _Kernels:
    """A module, imported when one of its names is used: a call on the CPU does without Triton's fifth of a second."""

    def __init__(self, name):
        self._name = f"{__package__}.{name}"

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._name), name)

    @property
    def imported(self) -> bool:
        return self._name in sys.modules


kernels, pair_kernels = _Kernels("row_kernels_triton"), _Kernels("pair_kernels_triton")
divergence_kernels, product_kernels = _Kernels("divergence_kernels_triton"), _Kernels("products_triton")


@functools.cache
def _import_error():
    try:
        assert kernels.policy_kernel
        return None
    except Exception as error:  # a broken Triton, whatever it raises, must not take the other backends with it
        return f"{type(error).__name__}: {error}"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return _import_error() is None and not isinstance(kernels.policy_kernel, kernels.triton.JITFunction)


def why_unavailable() -> str | None:
    """None, or the reason why the Triton kernels cannot be used, with the remedy."""
    if not _idle():
        if _import_error():
            return f"triton cannot be imported ({_import_error()}); {_REMEDY}"
        if interpreted() or torch.cuda.is_available():
            return None
    return "there is no GPU; on the CPU use backend='cpu', or set TRITON_INTERPRET=1 before the first use to run the kernels slowly"


def _idle():
    """Whether Triton is installed, not imported yet, and has neither a GPU nor the interpreter to run on: then nobody needs it."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") or kernels.imported:
        return False
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class LaunchShape:
    block: int  # columns that a program takes in one step
    warps: int


@dataclass(frozen=True)
class PolicyShape(LaunchShape):
    tiles: int  # fixed tiles of columns that a program folds side by side


@dataclass(frozen=True)
class PairShape:
    rows: int  # of a group
    programs: int  # that share a group's pairs, or its columns: grid y
    pairs: int  # that a program takes in one step
    block: int  # columns that it takes of them


def step(ranges: bool, element_size: int) -> int:
    """Columns of a fixed tile that are folded at once: what the bits of a row's statistics depend on."""
    return 128 if ranges else 8192 // max(4, element_size)


def launch_shape(columns: int | None, element_size: int, plain: bool = True) -> LaunchShape:
    """Of `gradient`: a pure function of the width of a tile and of whether its arithmetic is plain.

    Ranges, ``columns`` None, are mostly of less than 20 columns: a warp and one step do.

    Eight elements a thread: two 16-byte loads in flight and two ahead. With a softcap, a bias or a gradient of the entropy,
    arithmetic sets the pace; several programs share a multiprocessor. Reasoned from the compiled code (``make kernels``), not
    measured yet: ``make gpu STAGE=kernels`` holds each kernel against the bandwidth of a copy.
    """
    if columns is None:
        return LaunchShape(128, 1)
    for least, block, warps in ((16384, 4096, 16), (2048, 2048, 8), (0, 1024, 4)):
        if columns >= least and (warps < 16 or plain):
            return LaunchShape(block // 2, warps) if element_size == 8 else LaunchShape(block, warps)
    raise AssertionError(columns)


def policy_shape(columns: int, element_size: int, plain: bool = True, capability: int = 90, biased: bool = False) -> PolicyShape:
    """A pure function as `launch_shape`: four warps for each fixed tile of those side by side, sixteen elements a thread.

    A long row, which is read twice, has several, so that few rows are in flight and the second read finds as much as can be of its
    row in the L2 cache: one row on each multiprocessor, or two. Every warp merges the statistics of every tile in some 30
    instructions; with more than four tiles these would not hide behind the loads. Before compute capability 9.0 four take more than
    the 128 registers that they leave a thread. ``biased``: a bias is all that is not plain; written in steps of twice the columns,
    such a row waits 285 clocks for 304, and spills nothing. Reasoned from the compiled code, not measured yet.
    """
    tiles = 1 if columns < 16384 or not plain else 2 if columns < 65536 or capability < 90 else 4
    return PolicyShape(tiles * step(False, element_size) << biased, 4 * tiles, tiles)


def logits_shape(rows: int, pairs: int, element_size: int) -> PairShape:
    """A pure function of how many rows and pairs there are. A few ranges hold thousands of pairs: a group's programs share them.

    A block of columns is one 16-byte load of each thread for each of 8 pairs. Not measured yet, as of `launch_shape`.
    """
    most = 32 if rows >= 8192 else 128  # some thousands of programs, or more
    return PairShape(32, min(most, 1 + pairs // 8), 8, 512 // element_size)


def sums_shape(rows: int, columns: int, element_size: int) -> PairShape:
    """A pure function of how many rows and columns there are. Most rows of a dW have no pair: a program looks at several.

    A block of columns is two 16-byte loads of each thread for each of 4 pairs. Half of the ranges have no more than 2 pairs, and
    with 8 at a time fewer programs fit a multiprocessor. Not measured yet, as of `launch_shape`.
    """
    block = 1024 // element_size
    programs = -(-columns // block)
    return PairShape(max(1, min(32, rows * programs // 32768)), programs, 4, block)


def divergence_shape(columns: int | None, element_size: int) -> LaunchShape:
    """A pure function of whether two tiles have a width, or ranges, and of their dtype.

    Eight elements a thread of each tile: two 16-byte loads of each in flight. None is ahead: that would take 20 to 40 registers,
    and the loads of the warps that these leave room for are more. Four warps, since eight leave more registers unused. Reasoned
    from the compiled code (``make kernels``), not measured yet.
    """
    if columns is None:
        return LaunchShape(128, 1)
    return LaunchShape(512 if element_size == 8 else 1024, 4)


def statistics(tile, stats):
    """Merges a tile into the statistics [R, 4] of its rows, or each fixed tile into its own, [R, parts, 4]; with squares 5."""
    check(tile, _RESULTS, stats=stats)
    parts, of_ranges = stats.shape[1] if stats.dim() == 3 else 1, tile.ranges is not None
    _launch(kernels.statistics_kernel, tile, None, stats, parts, warps=1 if of_ranges else 4, PARTS=parts > 1,
            STEP=step(of_ranges, tile.values.element_size()), SQUARES=has_squares(stats), ranges_ptr=tile.ranges)  # fmt: skip


def close(stats, scored, squared=None):
    """What is known of rows whose statistics are complete, their parts merged in order."""
    check_close(stats, scored, squared)
    rows, parts = stats.shape[0], stats.shape[1] if stats.dim() == 3 else 1
    if rows:
        with _device(stats):
            kernels.close_kernel[(-(-rows // _CLOSE_BLOCK),)](
                stats, kernels.Scored(*scored), squared, rows, parts, BLOCK=_CLOSE_BLOCK, num_warps=1, enable_fp_fusion=False
            )


def gradient(tile, out, scored, g, g_entropy=None):
    """Writes the gradient of the raw logits."""
    check(tile, _RESULTS, out, g=g, g_entropy=g_entropy, **scored._asdict())
    shape = launch_shape(tile.values.shape[1] if tile.ranges is None else None, tile.values.element_size(), _plain(tile, g_entropy))
    _launch(kernels.gradient_kernel, tile, out, scored, g, g_entropy, warps=shape.warps, BLOCK=shape.block, ranges_ptr=tile.ranges)


def policy(tile, out, rows, terms, scored):
    """The fused GRPO kernel: statistics, scores, coefficient and gradient of whole rows in one launch."""
    check(tile, _RESULTS, out, **scored._asdict(), **vars(rows))
    require(tile.ranges is None, "a tile of whole rows was wanted, got one with ranges")
    require(terms.kind == "linear" or rows.w_policy is None or rows.advantages is not None, "advantages are missing")
    require(rows.ref is None or rows.w_kl is not None, "w_kl is missing")
    numbers = terms.epsilon_low, terms.epsilon_high, terms.delta, terms.sapo_temperature_pos, terms.sapo_temperature_neg
    element_size = tile.values.element_size()
    plain, biased = _plain(tile, rows.w_entropy), _plain(replace(tile, bias=None), rows.w_entropy) and tile.bias is not None
    shape = policy_shape(tile.values.shape[1], element_size, plain, _capability(tile.values.device), biased)
    _launch(kernels.policy_kernel, tile, out, scored, kernels.Rows(**vars(rows)), numbers=numbers, warps=shape.warps,
            TILES=shape.tiles, STEP=step(False, element_size), BLOCK=shape.block, KIND=KINDS.index(terms.kind),
            BIAS_CORRECTION=bool(terms.use_bias_correction_kl))  # fmt: skip


def divergence_statistics(student, teacher, stats, kind):
    """Folds two tiles into the running statistics [R, 8] of their rows."""
    comparison.check_both(student, teacher, _RESULTS, stats=stats)
    _launch_both(divergence_kernels.divergence_statistics_kernel, student, teacher, None, stats, student.target,
                 FORWARD=kind == "forward_kl", **_lanes(student))  # fmt: skip


def jensen_shannon(student, teacher, scored, gap, sums, beta):
    """Adds a tile's part of KL(p || m) and of the divergence to sums [R, 2]."""
    comparison.check_both(student, teacher, _RESULTS, sums=sums, gap=gap, **scored._asdict())
    _launch_both(divergence_kernels.jensen_shannon_kernel, student, teacher, None, scored.lse, gap, sums, numbers=(beta,),
                 **_lanes(student))  # fmt: skip


def divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g=None, g_entropy=None):
    """Writes the gradient of the student's raw logits."""
    comparison.check_both(student, teacher, _RESULTS, out, gap=compared.gap, own=compared.own, g=g_divergence, g_logps=g,
                          g_entropy=g_entropy, **scored._asdict())  # fmt: skip
    _launch_both(divergence_kernels.divergence_gradient_kernel, student, teacher, out, scored, compared._replace(value=None),
                 divergence_kernels.Gradients(g_divergence, g, g_entropy), student.target, numbers=(divergence.beta,),
                 KIND=comparison.KINDS.index(divergence.kind))  # fmt: skip


def pair_logits(pairs, hidden, weight, out, scale=1.0, bias=None, add=False):
    """Writes z of pairs (row of hidden, row of weight)."""
    check_pairs(pairs, _RESULTS, out, hidden, weight, bias)
    shape = logits_shape(pairs.ranges.shape[0], out.shape[0], weight.element_size())
    _launch_pairs(pair_kernels.pair_logits_kernel, pairs, hidden, weight, bias, out, scale=scale, add=add,
                  shape=shape, ROWS=shape.rows)  # fmt: skip


def pair_sums(pairs, g, source, out, scale=1.0, add=False):
    """Writes sums over a row's pairs, in the order of the pairs."""
    check_pairs(pairs, _RESULTS, g, out, source)
    shape = sums_shape(pairs.ranges.shape[0], *source.shape[1:], source.element_size())
    _launch_pairs(pair_kernels.pair_sums_kernel, pairs, out, source, g, shape.rows, out.shape[0], scale=scale, add=add,
                  shape=shape)  # fmt: skip


def scale_(tensor, scale):
    """``tensor *= scale`` in place; the 0-dim scale stays on the device, and where it is 1 nothing is read or written."""
    good = tensor.is_contiguous() and scale.numel() == 1 and scale.device == tensor.device
    require(good, "wanted a contiguous tensor and one number on its device")
    if tensor.numel():
        with _device(tensor):
            kernels.scale_kernel[(-(-tensor.numel() // _SCALE_BLOCK),)](
                tensor, scale, tensor.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
            )


def _launch(kernel, tile, out, *args, warps, numbers=(), **constants):
    ranges, transform = tile.ranges, tile.transform
    rows, columns = tile.values.shape if ranges is None else (ranges.shape[0], 0)
    if rows == 0:
        return
    numbers = transform.logit_scale, transform.softcap or 0.0, transform.temperature, *numbers
    matrices = [kernels.Matrix(x, x.stride(0) if ranges is None else 0) for x in (tile.values, out) if x is not None]
    with _device(tile.values):
        kernel[(rows,)](
            *matrices, *args, tile.target, tile.bias, tile.temperature, columns, *map(float, numbers), **constants,
            SOFTCAP=transform.softcap is not None, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _launch_both(kernel, student, teacher, out, *args, numbers=(), **constants):
    ranges, of_student, of_teacher = student.ranges, student.transform, teacher.transform
    require(of_student.temperature == of_teacher.temperature, "both tiles must have the same temperature")
    rows, columns = student.values.shape if ranges is None else (ranges.shape[0], 0)
    if rows == 0:
        return
    tiles = (x for x in (student.values, teacher.values, out) if x is not None)
    matrices = [kernels.Matrix(x, x.stride(0) if ranges is None else 0) for x in tiles]
    shape, caps = _both_shape(student), (of_student.softcap, of_teacher.softcap)
    numbers = (of_student.logit_scale, caps[0] or 0.0, of_teacher.logit_scale, caps[1] or 0.0, of_student.temperature, *numbers)
    with _device(student.values):
        kernel[(rows,)](
            *matrices, *args, divergence_kernels.Biases(student.bias, teacher.bias), student.temperature, columns,
            *map(float, numbers), **constants, SOFTCAP=caps[0] is not None, TEACHER_SOFTCAP=caps[1] is not None, BLOCK=shape.block,
            num_warps=shape.warps, enable_fp_fusion=False, ranges_ptr=ranges,
        )  # fmt: skip


def _launch_pairs(kernel, pairs, per_row, per_id, *args, scale, add, shape, **constants):
    count, (rows, columns) = pairs.ranges.shape[0], per_id.shape
    if count == 0 or shape.programs == 0:
        return
    matrices = [kernels.Matrix(x, x.stride(0)) for x in (per_row, per_id)]
    with _device(per_id):
        kernel[-(-count // shape.rows), shape.programs](
            pairs.ids, pairs.ranges, pairs.rows, *matrices, *args, count, rows, columns, float(scale), **constants,
            ADD=add, PAIRS=shape.pairs, BLOCK=shape.block, num_warps=1,
        )  # fmt: skip


@functools.cache
def _capability(device):
    """90 is 9.0, and what the interpreter is taken for."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _plain(tile, g_entropy):
    return g_entropy is None and tile.bias is None and tile.transform.softcap is None


def _lanes(tile):
    """Each thread keeps sums of what it loads: 16 bytes at once, or single elements of ranges, which start anywhere."""
    return {"LANES": 32 * _both_shape(tile).warps, "LOAD": 16 // tile.values.element_size() if tile.ranges is None else 1}


def _both_shape(tile):
    return divergence_shape(tile.values.shape[1] if tile.ranges is None else None, tile.values.element_size())


def _device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
