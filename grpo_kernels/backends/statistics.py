"""What the row kernels of every backend are handed, and the running statistics of a row of logits."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..losses.config import LogitTransform


@dataclass(frozen=True)
class Tile:
    """What one call of a row kernel sees: R rows and C columns of raw logits ``h W^T``, and how they become z.

    ``z = softcap * tanh(logit_scale * (raw + bias) / softcap) / temperature``. acc is float32, or float64 for float64 values.
    """

    values: torch.Tensor  # [R, C] raw logits, columns adjacent
    target: torch.Tensor  # [R] int64, relative to the first column; outside of [0, C): not in this tile
    transform: LogitTransform
    bias: torch.Tensor | None = None  # [C] acc, may hold -inf
    temperature: torch.Tensor | None = None  # [R] acc, overrides the transform's


class Scored(NamedTuple):
    """What is known of rows once all of their columns were seen, [R] acc each."""

    logps: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


def new_statistics(rows, dtype, device):
    """[R, 4] statistics of nothing."""
    stats = torch.zeros(rows, 4, dtype=dtype, device=device)
    stats[:, ::3] = -float("inf")
    return stats


def finalize(stats: torch.Tensor) -> Scored:
    """[R, 4] statistics -> (logps, lse, entropy), [R] each.

    logps = -softplus(log(sum of the others) + max - target's logit): near p = 1 the difference target - lse would cancel.
    """
    peak, others, weighted, target = stats.unbind(1)
    margin = peak + others.log() - target
    logps = -(margin.clamp(min=0) + torch.log1p(torch.exp(-margin.abs())))
    total = others + torch.exp(target - peak)
    lse = peak + total.log()
    return Scored(logps, lse, total.log() - weighted / total)


def merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[R, 4] statistics of two sets of columns without a common one -> those of both."""
    peak = torch.maximum(a[:, 0], b[:, 0])
    # nothing but -inf so far must not become inf - inf
    shift = peak.where(peak != -float("inf"), 0.0)
    others, moment = torch.zeros_like(peak), torch.zeros_like(peak)
    for own_peak, own_others, own_moment, target in (a.unbind(1), b.unbind(1)):
        drop = own_peak - shift
        factor, drop = drop.exp(), drop.where(own_peak != -float("inf"), 0.0)
        total = own_others + (target - own_peak.where(own_peak != -float("inf"), 0.0)).exp()
        others = others + own_others * factor
        moment = moment + ((own_moment + drop * total) * factor).where(factor != 0, 0.0)
    target = torch.where(b[:, 3] == -float("inf"), a[:, 3], b[:, 3])
    return torch.stack([peak, others, moment, target], 1)


_REQUIRED = ("target", "stats", "logps", "lse", "entropy", "g")


def check(tile: Tile, results: dict, out: torch.Tensor | None = None, **tensors):
    """Raises AssertionError before a kernel reads or writes past an end: names the tensor, what was wanted and what came.

    ``results``: {dtype of a tile: dtypes that may be written}. ``tensors`` are [R] acc, stats [R, 4]; None where it may be absent.
    """
    # `if` and `raise`: an assert would be gone under `python -O`, and text built for nothing costs more than the checks
    values = tile.values
    (rows, columns), dtype, device = values.shape, values.dtype, values.device
    if dtype not in results:
        raise AssertionError(f"tile must be one of {', '.join(map(str, results))}, got {dtype}")
    check_rows("tile", values)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensors |= {"target": tile.target, "bias": tile.bias, "temperature": tile.temperature}
    for name, x in tensors.items():
        if x is None and name not in _REQUIRED:
            continue
        shape = (rows, 4) if name == "stats" else (columns,) if name == "bias" else (rows,)
        wanted = torch.int64 if name == "target" else acc
        if x is None or x.shape != shape or x.dtype != wanted or x.device != device or not x.is_contiguous():
            raise AssertionError(f"{name} must be contiguous {shape} {wanted} on {device}, got {described(x)}")
    if out is None:
        return
    if out.shape != values.shape or out.dtype not in results[dtype] or out.device != device:
        dtypes = " or ".join(map(str, results[dtype]))
        raise AssertionError(f"out must be {tuple(values.shape)} {dtypes} on {device}, got {described(out)}")
    check_rows("out", out)
    if out.data_ptr() == values.data_ptr() and out.dtype == dtype and (rows <= 1 or out.stride(0) == values.stride(0)):
        return
    if out.data_ptr() < _end(values) and values.data_ptr() < _end(out):
        raise AssertionError("out must be the tile's own memory in its own dtype, or other memory")


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
