"""What the row and pair kernels of every backend are handed, and the running statistics of a row of logits."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..losses.config import LogitTransform


@dataclass(frozen=True)
class Tile:
    """What one call of a row kernel sees: R rows and C columns of raw logits ``h W^T``, and how they become z.

    ``z = softcap * tanh(logit_scale * (raw + bias) / softcap) / temperature``. acc is float32, or float64 for float64 values.
    With ``ranges`` the rows are of different lengths: row r is ``values[first:last]`` of values [M], (first, last) = ranges[r].
    """

    values: torch.Tensor  # [R, C] raw logits, columns adjacent; [M] acc with ranges
    target: torch.Tensor  # [R] int64, relative to the first column; outside of [0, C): not in this tile
    transform: LogitTransform
    bias: torch.Tensor | None = None  # [C] acc, may hold -inf
    temperature: torch.Tensor | None = None  # [R] acc, overrides the transform's
    ranges: torch.Tensor | None = None  # [R, 2] int64 within [0, M], none overlaps another; there is no bias then


@dataclass(frozen=True)
class Pairs:
    """What one call of a pair kernel sees: R rows of one matrix, each with a range of rows of another."""

    ids: torch.Tensor  # [M] int64, rows of the other matrix; an id outside of it is no pair
    ranges: torch.Tensor  # [R, 2] int64: row r has the pairs [first, last), which may be none
    rows: torch.Tensor | None = None  # [R] int64, where the rows are in their matrix, each once; None: row r is the r-th


class Scored(NamedTuple):
    """What is known of rows once all of their columns were seen, [R] acc each."""

    logps: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


# Columns of a fixed tile, as in csrc/params.h. A row's statistics are those of its tiles, each from nothing, merged from left to
# right: the bits do not depend on where a row is cut between two of them, nor on which rank has which.
TILE_COLUMNS = 4096


def tiles_of(columns: int) -> int:
    return -(-columns // TILE_COLUMNS)


def new_statistics(rows, dtype, device, parts=None, squares=False):
    """[R, 4] statistics of nothing, or [R, parts, 4]; with ``squares`` 5."""
    shape = (rows, 4 + squares) if parts is None else (rows, parts, 4 + squares)
    stats = torch.zeros(shape, dtype=dtype, device=device)
    stats[..., :4:3] = -float("inf")
    return stats


def has_squares(stats: torch.Tensor) -> bool:
    return stats.shape[-1] == 5


def fold(stats: torch.Tensor) -> torch.Tensor:
    """[R, parts, 4] statistics merged from left to right; [R, 4] as they are. With squares 5."""
    if stats.dim() == 2:
        return stats
    nothing = new_statistics(len(stats), stats.dtype, stats.device, squares=has_squares(stats))
    return functools.reduce(merged, stats.unbind(1), nothing)


def finalize(stats: torch.Tensor) -> Scored:
    """[R, 4] statistics, or 5 -> (logps, lse, entropy), [R] each.

    logps = -softplus(log(sum of the others) + max - target's logit): near p = 1 the difference target - lse would cancel.
    """
    peak, others, weighted, target = stats[:, :4].unbind(1)
    margin = peak + others.log() - target
    logps = -(margin.clamp(min=0) + torch.log1p(torch.exp(-margin.abs())))
    total = others + torch.exp(target - peak)
    lse = peak + total.log()
    return Scored(logps, lse, total.log() - weighted / total)


def squared_probs(stats: torch.Tensor) -> torch.Tensor:
    """[R, 5] statistics -> the sum of p^2 over all columns but the target, [R].

    Near p = 1 it leaves out the target for what the others add to it: 1 - 2 p + sum of all p^2 is (1 - p)^2 + this, and beside p^2
    this would have no digit left.
    """
    peak, others, _, target, squares = stats.unbind(1)
    return squares / (others + torch.exp(target - peak)).square()


def log_sum_of_squares(logps: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """log sum p^2 of the target's log p and what `squared_probs` found."""
    own, others = 2 * logps, squared.log()
    # torch.logaddexp has other bits at the end of a tensor
    return torch.maximum(own, others) + torch.log1p(torch.exp(-(own - others).abs()))


def merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[R, 4] statistics of two sets of columns without a common one -> those of both; with squares 5."""
    peak = torch.maximum(a[:, 0], b[:, 0])
    # nothing but -inf so far must not become inf - inf
    shift = peak.where(peak != -float("inf"), 0.0)
    others, moment = torch.zeros_like(peak), torch.zeros_like(peak)
    squares = [torch.zeros_like(peak)] if has_squares(a) else []
    for own_peak, own_others, own_moment, target, *own_squares in (a.unbind(1), b.unbind(1)):
        drop = own_peak - shift
        factor, drop = drop.exp(), drop.where(own_peak != -float("inf"), 0.0)
        total = own_others + (target - own_peak.where(own_peak != -float("inf"), 0.0)).exp()
        others = others + own_others * factor
        moment = moment + ((own_moment + drop * total) * factor).where(factor != 0, 0.0)
        squares = [x + y * factor.square() for x, y in zip(squares, own_squares, strict=True)]
    target = torch.where(b[:, 3] == -float("inf"), a[:, 3], b[:, 3])
    return torch.stack([peak, others, moment, target, *squares], 1)


_REQUIRED = ("target", "stats", "logps", "lse", "entropy", "g")


def check(tile: Tile, results: dict, out: torch.Tensor | None = None, **tensors):
    """Raises AssertionError before a kernel reads or writes past an end: names the tensor, what was wanted and what came.

    ``results``: {dtype of a tile: dtypes that may be written}. ``tensors`` are [R] acc, stats [R, 4], with squares 5; None where it
    may be absent.
    """
    # `if` and `raise`: an assert would be gone under `python -O`, and text built for nothing costs more than the checks
    values, ranges = tile.values, tile.ranges
    (rows, columns), dtype, device = _shape_of(tile), values.dtype, values.device
    if dtype not in results:
        raise AssertionError(f"tile must be one of {', '.join(map(str, results))}, got {dtype}")
    if ranges is None:
        check_rows("tile", values)
    elif tile.bias is not None or not values.is_contiguous() or dtype not in (torch.float32, torch.float64):
        raise AssertionError(f"a tile with ranges must be contiguous [M] float32 or float64 without bias, got {described(values)}")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensors |= {"target": tile.target, "bias": tile.bias, "temperature": tile.temperature, "ranges": ranges}
    shapes, stats = {"bias": (columns,), "ranges": (rows, 2)}, tensors.get("stats")
    if stats is not None:
        shapes["stats"] = (rows, *((tiles_of(columns),) if stats.dim() == 3 and ranges is None else ()), _fields_of(stats))
    for name, x in tensors.items():
        if x is None and name not in _REQUIRED:
            continue
        check_vector(name, x, shapes.get(name, (rows,)), torch.int64 if name in ("target", "ranges") else acc, device)
    if out is None:
        return
    if out.shape != values.shape or out.dtype not in results[dtype] or out.device != device:
        dtypes = " or ".join(map(str, results[dtype]))
        raise AssertionError(f"out must be {tuple(values.shape)} {dtypes} on {device}, got {described(out)}")
    if ranges is not None:
        require(out.data_ptr() == values.data_ptr() and out.dtype == dtype, "out must be the tile's own memory where it has ranges")
        return
    check_rows("out", out)
    if out.data_ptr() == values.data_ptr() and out.dtype == dtype and (rows <= 1 or out.stride(0) == values.stride(0)):
        return
    if out.data_ptr() < _end(values) and values.data_ptr() < _end(out):
        raise AssertionError("out must be the tile's own memory in its own dtype, or other memory")


def check_close(stats: torch.Tensor, scored: Scored, squared: torch.Tensor | None = None):
    """Raises AssertionError as `check` does: ``stats`` [R, 4] or [R, parts, 4] acc, with ``squared`` 5; the others [R] acc each."""
    require(stats.dtype in (torch.float32, torch.float64), f"stats must be float32 or float64, got {described(stats)}")
    rows, fields = stats.shape[0], 4 if squared is None else 5
    shape = (rows, *stats.shape[1:2], fields) if stats.dim() == 3 else (rows, fields)
    check_vector("stats", stats, shape, stats.dtype, stats.device)
    for name, x in (scored._asdict() | ({} if squared is None else {"squared": squared})).items():
        check_vector(name, x, (rows,), stats.dtype, stats.device)


def check_pairs(pairs: Pairs, dtypes, per_pair: torch.Tensor, per_row: torch.Tensor, per_id: torch.Tensor, bias=None):
    """Raises AssertionError as `check` does. ``per_pair`` [M] acc; ``per_row`` [.., K] and ``per_id`` [.., K] are the matrices."""
    dtype, device = per_id.dtype, per_id.device
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype not in dtypes:
        raise AssertionError(f"matrices must be one of {', '.join(map(str, dtypes))}, got {dtype}")
    count = pairs.ranges.shape[0]
    check_vector("ids", pairs.ids, pairs.ids.shape[:1], torch.int64, device)
    check_vector("ranges", pairs.ranges, (count, 2), torch.int64, device)
    check_vector("per_pair", per_pair, pairs.ids.shape, acc, device)
    if pairs.rows is not None:
        check_vector("rows", pairs.rows, (count,), torch.int64, device)
    if bias is not None:
        check_vector("bias", bias, per_id.shape[:1], acc, device)
    for name, x in (("per_row", per_row), ("per_id", per_id)):
        check_rows(name, x)
        if x.shape[1] != per_id.shape[1] or x.dtype not in (dtype, acc) or x.device != device:
            raise AssertionError(f"{name} must be [.., {per_id.shape[1]}] {dtype} on {device}, got {described(x)}")
    if pairs.rows is None and per_row.shape[0] < count:
        raise AssertionError(f"per_row must have {count} rows, got {described(per_row)}")


def _fields_of(stats):
    return 5 if has_squares(stats) else 4


def _shape_of(tile):
    """(rows, columns); with ranges there is no number of columns."""
    return tile.values.shape if tile.ranges is None else (tile.ranges.shape[0], None)


def check_vector(name, x, shape, dtype, device):
    if x is None or x.shape != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
        raise AssertionError(f"{name} must be contiguous {tuple(shape)} {dtype} on {device}, got {described(x)}")


def require(holds, message):
    if not holds:
        raise AssertionError(message)


def check_rows(name, x):
    if (x.shape[1] > 1 and x.stride(1) != 1) or (x.shape[0] > 1 and x.stride(0) < x.shape[1]):
        raise AssertionError(f"{name}'s columns must be adjacent and its rows apart, got {described(x)}")


def described(x):
    return None if x is None else f"{tuple(x.shape)} {x.dtype} {x.stride()} on {x.device}"


def _end(x):
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()
