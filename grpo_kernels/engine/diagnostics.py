"""What some trainers log of a token's distribution beside its entropy, from tiles of logits that are in memory anyway.

    log_sum_sq_probs   log sum_v p_v^2 = log sum_v exp(2 z_v) - 2 lse
    mean_logits        mean_v z_v
    is_top1            whether the target is the first of the most likely tokens

Each costs one more read of the tile. None has a gradient.
"""

from dataclasses import replace

import torch

from ..backends.pytorch import slabs, transformed
from ..backends.statistics import finalize, new_statistics

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")


class Diagnostics:
    """Of some rows with these targets, a block of the vocabulary after the other, from left to right."""

    def __init__(self, run, target):
        self.run, self.target, self.wanted = run, target, run.work.diagnostics
        rows, device = target.shape[0], target.device
        self.doubled = new_statistics(rows, run.accumulate, device)
        self.sum = torch.zeros(rows, dtype=run.accumulate, device=device)
        self.best = torch.full_like(self.sum, -float("inf"))
        self.where = torch.full_like(target, -1)

    def add(self, tile, rows, left):
        """Reads a tile of raw logits of some of the rows, whose first column is the vocabulary's ``left``."""
        squares, mean, top = self.wanted
        if squares:
            halved = replace(tile.transform, temperature=tile.transform.temperature / 2)
            half = None if tile.temperature is None else tile.temperature / 2
            nowhere = torch.full_like(tile.target, -1)
            self.run.kernels.statistics(replace(tile, target=nowhere, transform=halved, temperature=half), self.doubled[rows])
        if not (mean or top):
            return
        total, best, where = self.sum[rows], self.best[rows], self.where[rows]
        for s in slabs(tile.values):
            z, _ = transformed(tile, s, self.sum.dtype)
            if mean:
                total[s] += z.sum(1)
            if top:
                value, column = z.max(1)
                better = ~(value <= best[s])  # a tie is won by the first; NaN wins
                best[s] = torch.where(better, value, best[s])
                where[s] = torch.where(better, column + left, where[s])

    def finish(self, lse):
        """[R, 3] in the order of NAMES; 0 where not wanted."""
        squares, mean, top = self.wanted
        nothing = torch.zeros_like(lse)
        log_squares = finalize(self.doubled).lse - 2 * lse if squares else nothing
        is_top = (self.where == self.target) & ~self.best.isnan()
        means = self.sum / self.run.head.weight.shape[0] if mean else nothing
        return torch.stack([log_squares, means, is_top.to(lse.dtype) if top else nothing], 1)
