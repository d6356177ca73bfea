"""What some trainers log of a token's distribution beside its entropy, from tiles of logits that are in memory anyway.

    log_sum_sq_probs   log sum_v p_v^2 = log sum_v exp(2 z_v) - 2 lse
    mean_logits        mean_v z_v
    is_top1            whether the target is the first of the most likely tokens

Each costs one more read of the tile. None has a gradient.
"""

import dataclasses

import torch

from ..backends.pytorch import new_statistics, slabs, transformed
from ..backends.statistics import finalize

NAMES = ("log_sum_sq_probs", "mean_logits", "is_top1")


class Diagnostics:
    """Of some rows, a block of the vocabulary after the other, from left to right; ``wanted`` [3] says which of NAMES."""

    def __init__(self, wanted, target, kernels, transform, accumulate, vocab):
        self.wanted, self.target, self.kernels, self.transform, self.vocab = wanted, target, kernels, transform, vocab
        rows, device = target.shape[0], target.device
        self.doubled = new_statistics(rows, accumulate, device)
        self.sum = torch.zeros(rows, dtype=accumulate, device=device)
        self.best = torch.full_like(self.sum, -float("inf"))
        self.where = torch.full_like(target, -1)

    def add(self, tile, left, bias, temperature):
        """Reads a tile of raw logits whose first column is the vocabulary's ``left``."""
        squares, mean, top = self.wanted
        if squares:
            nowhere = torch.full_like(self.target, -1)
            halved = dataclasses.replace(self.transform, temperature=self.transform.temperature / 2)
            half = None if temperature is None else temperature / 2
            self.kernels.statistics(tile, self.doubled, nowhere, halved, bias=bias, temperature=half)
        if not (mean or top):
            return
        for s in slabs(tile):
            z, _ = transformed(tile[s], self.transform, bias, None if temperature is None else temperature[s], self.sum.dtype)
            if mean:
                self.sum[s] += z.sum(1)
            if top:
                value, column = z.max(1)
                better = ~(value <= self.best[s])  # a tie is won by the first; NaN wins
                self.best[s] = torch.where(better, value, self.best[s])
                self.where[s] = torch.where(better, column + left, self.where[s])

    def finish(self, lse):
        """[R, 3] in the order of NAMES; 0 where not wanted."""
        squares, mean, top = self.wanted
        nothing = torch.zeros_like(lse)
        log_squares = finalize(self.doubled)[1] - 2 * lse if squares else nothing
        is_top = (self.where == self.target) & ~self.best.isnan()
        return torch.stack([log_squares, self.sum / self.vocab if mean else nothing, is_top.to(lse.dtype) if top else nothing], 1)
