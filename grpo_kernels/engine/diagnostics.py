"""What some trainers log of a token's distribution beside its entropy, from tiles of logits that are in memory anyway.

    log_sum_sq_probs   log sum_v p_v^2
    mean_logits        mean_v z_v
    is_top1            whether the target is the first of the most likely tokens
    score_sq_norm      sum_v (onehot_v - p_v)^2, the squared norm of d log p / d z: 1 - 2 p + sum_v p_v^2, which cancels near p = 1,
                       as (1 - p)^2 + the others' p_v^2, which does not. The weight of an optimal token baseline
    (variance)         sum_v p_v (log p_v + entropy)^2, from which `temperature.py` makes the gradient of an entropy

The two with squares come of a fifth statistic of the row kernels, without a read of their own. Each of the others costs one more
read of the tile. None has a gradient.
"""

import functools

import torch

from ..backends.pytorch import slabs, transformed
from ..backends.statistics import log_sum_of_squares

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1", "score_sq_norm")


class Diagnostics:
    """Of some rows with these targets, a block of the vocabulary after the other, from left to right."""

    def __init__(self, run, target):
        self.run, self.target, self.wanted = run, target, run.work.diagnostics
        rows, device = target.shape[0], target.device
        self.sum = torch.zeros(rows, dtype=run.accumulate, device=device)
        self.best = torch.full_like(self.sum, -float("inf"))
        self.where = torch.full_like(target, -1)
        self.moments = new_moments(rows, run.accumulate, device)

    def add(self, tile, rows, left):
        """Reads a tile of raw logits of some of the rows, whose first column is the vocabulary's ``left``."""
        _, mean, top, _, variance = self.wanted
        if variance:
            self.moments[rows] = with_tile(self.moments[rows], tile)
        if not (mean or top) or not tile.values.shape[1]:
            return
        total, best, where = self.sum[rows], self.best[rows], self.where[rows]
        for s in slabs(tile):
            z, _ = transformed(tile, s, self.sum.dtype)
            if mean:
                total[s] += z.sum(1)
            if top:
                value, column = z.max(1)
                better = _better(value, best[s])
                best[s] = torch.where(better, value, best[s])
                where[s] = torch.where(better, column + left, where[s])

    def finish(self, scored, s):
        """[R, 5] in the order of NAMES, then the variance; 0 where not wanted. The rows are the run's ``s``."""
        squares, mean, top, norm, variance = self.wanted
        nothing = torch.zeros_like(scored.lse)
        log_squares = log_sum_of_squares(scored.logps, self.run.squared[s]) if squares else nothing
        norms = scored.logps.expm1().square() + self.run.squared[s] if norm else nothing
        shard, vocab = self.run.work.shard, self.run.head.weight.shape[0]
        if shard is not None:
            vocab = shard.total
            if mean or top:
                self._of_all(shard)
            if variance:
                self.moments = functools.reduce(merged, shard.gathered(self.moments))
        is_top = (self.where == self.target) & ~self.best.isnan()
        means = self.sum / vocab if mean else nothing
        return torch.stack([log_squares, means, is_top.to(nothing.dtype) if top else nothing, norms,
                            variance_of(self.moments) if variance else nothing], 1)  # fmt: skip

    def _of_all(self, shard):
        """Sums and best tokens of all ranks' columns; the places are relative to this rank's first column, as its targets are."""
        place = (self.where + shard.offset).to(self.sum.dtype)  # exact below 2**24
        own = torch.stack([self.sum, self.best, place], 1)
        first, *others = shard.gathered(own)
        total, best, where = first.unbind(1)
        for part in others:
            total = total + part[:, 0]
            better = _better(part[:, 1], best)
            best, where = torch.where(better, part[:, 1], best), torch.where(better, part[:, 2], where)
        self.sum, self.best, self.where = total, best, where.long() - shard.offset


def _better(value, best):
    """Whether the best so far is to be replaced: a tie is won by the first, NaN wins for ever."""
    return ~(value <= best) & ~best.isnan()


# The variance of log p, which is that of z: sums relative to the running maximum, so that an offset of all logits costs no digits


def new_moments(rows, dtype, device):
    """[R, 4] of nothing: the maximum m, and the sums of exp(z - m) times 1, z - m and (z - m)^2."""
    moments = torch.zeros(rows, 4, dtype=dtype, device=device)
    moments[:, 0] = -float("inf")
    return moments


def with_tile(moments, tile):
    """The moments of some columns and those of a tile together."""
    if tile.ranges is None and not tile.values.shape[1]:
        return moments
    out = torch.empty_like(moments)
    for s in slabs(tile):
        z, _ = transformed(tile, s, moments.dtype)
        peak = z.amax(1)
        z = z - peak.where(peak != -float("inf"), 0.0).unsqueeze(1)
        e = z.exp()
        first, second = ((x * e).where(e != 0, 0.0).sum(1) for x in (z, z.square()))
        out[s] = merged(moments[s], torch.stack([peak, e.sum(1), first, second], 1))
    return out


def merged(a, b):
    """[R, 4] moments of two sets of columns without a common one -> those of both."""
    peak = torch.maximum(a[:, 0], b[:, 0])
    shift = peak.where(peak != -float("inf"), 0.0)
    sums = torch.zeros_like(a[:, 1:])
    for own_peak, total, first, second in (a.unbind(1), b.unbind(1)):
        drop = own_peak - shift
        factor, drop = drop.exp(), drop.where(own_peak != -float("inf"), 0.0)
        parts = torch.stack([total, first + drop * total, second + 2 * drop * first + drop.square() * total], 1)
        sums = sums + (parts * factor.unsqueeze(1)).where(factor.unsqueeze(1) != 0, 0.0)
    return torch.cat([peak.unsqueeze(1), sums], 1)


def variance_of(moments):
    """[R]."""
    _, total, first, second = moments.unbind(1)
    return (second / total - (first / total).square()).clamp(min=0)
