"""The row kernels in plain PyTorch: any device, any float dtype, the readable ones. They state the contract of every backend:

    statistics(tile, stats)                    folds a tile into the running statistics of its rows; writes nothing else
    gradient(tile, out, scored, g, g_entropy)  d loss / d raw logits
    policy(tile, out, rows, terms, scored)     statistics, coefficient and gradient of whole rows at once, the fused GRPO kernel;
                                               not here: the engine then takes statistics, autograd of the term, gradient

``out`` [R, C] is other memory in the inputs' dtype, or the tile's own memory in its own dtype: the lane that has read an element
writes it. Rows whose g and g_entropy are 0 become zeros whatever they hold. Each kernel walks the tile in slabs of rows, so that
its float32 temporaries stay at a few tens of MiB. Per element: one exp, one read, and one write but for `statistics`.
"""

from dataclasses import replace

import torch

from .statistics import merged

_SLAB_ELEMENTS = 1 << 20


def why_unavailable():
    return None


def statistics(tile, stats):
    """Folds a tile into the running statistics [R, 4] of its rows.

    stats columns: max; sum of exp(z - max) without the target's column; sum of (z - max) exp(z - max); target's z.
    """
    for s in slabs(tile.values):
        z, _ = transformed(tile, s, stats.dtype)
        column, here = _target_column(tile.target[s], z.shape[1])
        peak = z.amax(1, keepdim=True)
        # a block of only -inf (masked vocabulary) must not become inf - inf
        shifted = z - peak.where(peak != -float("inf"), 0.0)
        e = shifted.exp()
        others = e.scatter(1, column, torch.where(here, 0.0, e.gather(1, column))).sum(1)
        moment = (shifted * e).where(e != 0, 0.0).sum(1)
        target = torch.where(here, z.gather(1, column), -float("inf"))
        stats[s] = merged(stats[s], torch.stack([peak.squeeze(1), others, moment, target.squeeze(1)], 1))


def gradient(tile, out, scored, g, g_entropy=None):
    """Writes the gradient of the raw logits.

    dz = [ g (onehot - p) - g_entropy p (log p + entropy) ] (1 - tanh^2 of the softcap) logit_scale / temperature
    """
    transform = tile.transform
    for s in slabs(tile.values):
        logps, lse, entropy = (x[s].unsqueeze(1) for x in scored)
        t, rows_g = _temperature(tile, s), g[s].unsqueeze(1)
        column, here = _target_column(tile.target[s], tile.values.shape[1])
        z, slope = transformed(tile, s, lse.dtype)
        log_p = z - lse
        # near p = 1, z - lse has lost the digits of log p
        log_p = log_p.scatter(1, column, torch.where(here, logps, log_p.gather(1, column)))
        p = log_p.exp()
        # onehot - p; near p = 1 the target's 1 - p keeps its digits
        unit = p.neg().scatter(1, column, torch.where(here, -logps.expm1(), -p.gather(1, column)))
        dz, idle = rows_g * unit, rows_g == 0
        if g_entropy is not None:
            dz = dz - g_entropy[s].unsqueeze(1) * (p * (log_p + entropy)).where(p != 0, 0.0)
            idle = idle & (g_entropy[s].unsqueeze(1) == 0)
        if slope is not None:
            dz = (dz * slope).where(dz != 0, 0.0)
        out[s] = (dz * (transform.logit_scale / t)).masked_fill(idle, 0.0).to(out.dtype)


def target_gradient(tile, scored, g, g_entropy, g_lse):
    """(column, whether it is in this tile, d loss / d raw logit) of each row's target, [R, 1] each; ``g_lse``: that of lse."""
    column, here = _target_column(tile.target, tile.values.shape[1])
    raw = tile.values.gather(1, column).to(scored.lse.dtype)
    if tile.bias is not None:
        raw = raw + tile.bias[column]
    own, rest, first = torch.empty_like(raw), torch.empty_like(raw), torch.zeros_like(tile.target)
    gradient(replace(tile, values=raw, target=first, bias=None), own, scored, g, g_entropy)
    gradient(replace(tile, values=raw, target=first - 1, bias=None), rest, scored, -g_lse)  # g_lse p: no target
    return column, here, own + rest


def slabs(tile):
    step = max(1, _SLAB_ELEMENTS // max(1, tile.shape[1]))
    return [slice(start, start + step) for start in range(0, tile.shape[0], step)]


def transformed(tile, s, dtype):
    """(z, derivative of the softcap or None) of some rows of a tile."""
    transform = tile.transform
    y = tile.values[s].to(dtype)
    if tile.bias is not None:
        y = y + tile.bias.to(dtype)
    y, slope = y * transform.logit_scale, None
    if transform.softcap is not None:
        share = y / transform.softcap
        y, slope = transform.softcap * torch.tanh(share), 1 / torch.cosh(share).square()  # 1 - tanh^2 without its cancellation
    return y / _temperature(tile, s), slope


def _temperature(tile, s):
    return tile.transform.temperature if tile.temperature is None else tile.temperature[s].unsqueeze(1)


def _target_column(target, columns):
    here = ((target >= 0) & (target < columns)).unsqueeze(1)
    return target.clamp(0, columns - 1).unsqueeze(1), here
