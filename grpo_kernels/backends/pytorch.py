"""The three row kernels in plain PyTorch: any device, any float dtype, the readable ones.

A tile is [R, C] raw logits ``h W^T`` (or stashed probabilities), overwritten in place, or in ``out``: the tile's memory seen
in a narrower dtype (rows on rows), or memory of its own. Each kernel walks the tile in slabs of
rows, so that its float32 temporaries stay at a few tens of MiB whatever the tile's size. Work per element: one exp (two
in `policy`), one read and one write of the tile per kernel.
"""

import torch

from ..losses.coefficients import coefficient
from .statistics import finalize

_SLAB_ELEMENTS = 1 << 20


def why_unavailable():
    return None


def statistics(tile, stats, target, transform, *, bias=None, temperature=None, probs=False, out=None):
    """Folds a tile into the running statistics [R, 4]; with probs (whole rows) writes its softmax.

    stats columns: max; sum of exp(z - max) without the target's column; sum of (z - max) exp(z - max); target's logit.
    target [R]: index relative to the tile's first column; outside [0, C) it is not in this tile.
    """
    out = tile if out is None else out
    for s in slabs(tile):
        temp = None if temperature is None else temperature[s]
        z, _ = transformed(tile[s], transform, bias, temp, stats.dtype)
        stats[s] = _folded(z, stats[s], target[s])
        if probs:
            _, lse, _ = finalize(stats[s])
            out[s] = (z - lse.unsqueeze(1)).exp().to(out.dtype)


def gradient(tile, target, lse, logps, entropy, g, g_entropy, transform, *, bias=None, temperature=None, from_probs=False,
             out=None):  # fmt: skip
    """Writes the gradient of the raw logits, from a tile of logits or of stashed probabilities.

    dz = [ g (onehot - p) - g_entropy p (log p + entropy) ] (1 - (y / softcap)^2) logit_scale / temperature
    """
    out = tile if out is None else out
    for s in slabs(tile):
        temp = None if temperature is None else temperature[s]
        t = transform.temperature if temp is None else temp.unsqueeze(1)
        column, here = _target_column(target[s], tile.shape[1])
        if from_probs:
            p = tile[s].to(lse.dtype)
            log_p = p.log().scatter(1, column, torch.where(here, logps[s].unsqueeze(1), p.gather(1, column).log()))
            y = t * (log_p + lse[s].unsqueeze(1))
        else:
            z, y = transformed(tile[s], transform, bias, temp, lse.dtype)
            log_p = z - lse[s].unsqueeze(1)
            p = log_p.exp()
        rows_g = g[s].unsqueeze(1)
        dz = -rows_g * p
        at_target = torch.where(here, -rows_g * logps[s].unsqueeze(1).expm1(), dz.gather(1, column))
        dz = dz.scatter(1, column, at_target)
        idle = rows_g == 0
        if g_entropy is not None:
            bonus = (p * (log_p + entropy[s].unsqueeze(1))).where(p != 0, 0.0)
            dz = dz - g_entropy[s].unsqueeze(1) * bonus
            idle = idle & (g_entropy[s].unsqueeze(1) == 0)
        if transform.softcap is not None:
            dz = (dz * (1 - (y / transform.softcap).square())).where(dz != 0, 0.0)
        out[s] = (dz * (transform.logit_scale / t)).masked_fill(idle, 0.0).to(out.dtype)


def policy(tile, target, rows, terms, transform, logps, entropy, *, bias=None, temperature=None, out=None):
    """The fused GRPO kernel: statistics, log-prob, entropy, coefficient and gradient of whole rows."""
    stats = new_statistics(tile.shape[0], logps.dtype, tile.device)
    statistics(tile, stats, target, transform, bias=bias, temperature=temperature)
    lp, lse, ent = finalize(stats)
    logps.copy_(lp)
    entropy.copy_(ent)
    g = coefficient(lp, rows, terms)
    gradient(tile, target, lse, lp, ent, g, rows.w_entropy, transform, bias=bias, temperature=temperature, out=out)


def new_statistics(rows, dtype, device):
    """[R, 4] statistics of nothing."""
    stats = torch.zeros(rows, 4, dtype=dtype, device=device)
    stats[:, ::3] = -float("inf")
    return stats


def slabs(tile):
    step = max(1, _SLAB_ELEMENTS // max(1, tile.shape[1]))
    return [slice(start, start + step) for start in range(0, tile.shape[0], step)]


def transformed(tile, transform, bias, temperature, dtype):
    """(z, y): the transformed logits, and the softcapped ones before the temperature."""
    y = tile.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    y = y * transform.logit_scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    return y / (transform.temperature if temperature is None else temperature.unsqueeze(1)), y


def _target_column(target, columns):
    here = ((target >= 0) & (target < columns)).unsqueeze(1)
    return target.clamp(0, columns - 1).unsqueeze(1), here


def _folded(z, stats, target):
    peak, others, weighted, target_logit = stats.unbind(1)
    column, here = _target_column(target, z.shape[1])
    target_logit = torch.where(here, z.gather(1, column), target_logit.unsqueeze(1)).squeeze(1)
    seen = others + (stats[:, 3] - _finite(peak)).exp()

    new_peak = torch.maximum(peak, z.amax(1))
    # a block of only -inf (masked vocabulary) must not become inf - inf
    shift = _finite(new_peak)
    shifted = z - shift.unsqueeze(1)
    e = shifted.exp()
    block_weighted = (shifted * e).where(e != 0, 0.0).sum(1)
    block_others = e.scatter(1, column, torch.where(here, 0.0, e.gather(1, column))).sum(1)

    carry = (peak - shift).exp()
    drop = (peak - shift).where(peak > -float("inf"), 0.0)
    return torch.stack(
        [new_peak, others * carry + block_others, (weighted + drop * seen) * carry + block_weighted, target_logit], dim=1
    )


def _finite(peak):
    return peak.where(peak != -float("inf"), 0.0)
