"""The row kernels in plain PyTorch: any device, any float dtype, the readable ones. They state the contract of every backend:

    statistics(tile, stats)                    merges a tile into the statistics of its rows; writes nothing else
    close(stats, scored, squared)              what is known of rows whose statistics are complete
    gradient(tile, out, scored, g, g_entropy)  d loss / d raw logits
    policy(tile, out, rows, terms, scored)     statistics, coefficient and gradient of whole rows at once, the fused GRPO kernel;
                                               not here: the engine then takes statistics, autograd of the term, gradient
    pair_logits(pairs, hidden, weight, out)    z of pairs (row of hidden, row of weight)
    pair_sums(pairs, g, source, out)           sums over a row's pairs: dH of them, and with rows and ids exchanged dW

and over two tiles of the same rows and columns, a student's and a teacher's logits (`comparison.py`):

    divergence_statistics(student, teacher, stats, kind)          folds both into the running statistics of their rows
    jensen_shannon(student, teacher, scored, gap, sums, beta)     adds a tile's part of KL(p || m) and of the divergence to sums
    divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g, g_entropy)
                                               d loss / d raw logits of the student, g and g_entropy as in `gradient`
    divergence(student, teacher, out, g_divergence, divergence, scored, compared)
                                               all of it for whole rows at once; not here either

``out`` [R, C] is other memory in the inputs' dtype, or the tile's own memory in its own dtype: the lane that has read an element
writes it. `statistics` and `gradient` take a tile with ranges too. Rows whose g and g_entropy are 0 become zeros whatever they
hold. Each kernel walks the tile in slabs of rows, so that its float32 temporaries stay at a few tens of MiB. Per element: one exp,
one read, and one write but for `statistics`.
"""

from dataclasses import replace

import torch

from .comparison import NEAR, bend, merged_comparisons
from .statistics import (
    TILE_COLUMNS,
    Pairs,
    Tile,
    check_close,
    check_pairs,
    finalize,
    fold,
    has_squares,
    merged,
    squared_probs,
)

_SLAB_ELEMENTS = 1 << 20
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_unavailable():
    return None


def statistics(tile, stats):
    """Merges a tile into the statistics [R, 4] of its rows, its fixed tiles of columns one after another from the left, or each of
    them into its own, [R, parts, 4].

    stats columns: max, up to rounding; sum of exp(z - max) without the target's column; sum of (z - max) exp(z - max); target's z.
    A fifth, where there is one: sum of exp(2 (z - max)) without the target's column. It changes no bit of the others.
    """
    for s in slabs(tile):
        z, _ = transformed(tile, s, stats.dtype)
        for i, part in enumerate(z.split(TILE_COLUMNS, 1)):
            into = stats[s] if stats.dim() == 2 else stats[s, i]
            into.copy_(merged(into, _of_columns(part, tile.target[s] - i * TILE_COLUMNS, *_relative(part), has_squares(stats))))


def close(stats, scored, squared=None):
    """What is known of rows whose statistics are complete, their parts merged from the left.

    ``squared`` [R], wanted where there is a fifth statistic: sum of p^2 over all columns but the target.
    """
    check_close(stats, scored, squared)
    stats = fold(stats)
    for vector, value in zip(scored, finalize(stats), strict=True):
        vector.copy_(value)
    if squared is not None:
        squared.copy_(squared_probs(stats))


def _relative(z):
    """(max [R, 1], z - max, exp(z - max)) of each row."""
    peak = z.amax(1, keepdim=True)
    # a block of only -inf (masked vocabulary) must not become inf - inf
    shifted = z - peak.where(peak != -float("inf"), 0.0)
    return peak, shifted, shifted.exp()


def _of_columns(z, target, peak, shifted, e, squares=False):
    """[R, 4] statistics of some columns; with ``squares`` 5."""
    column, here = _target_column(target, z.shape[1])
    others = e.scatter(1, column, torch.where(here, 0.0, e.gather(1, column)))
    moment = (shifted * e).where(e != 0, 0.0).sum(1)
    target = torch.where(here, z.gather(1, column), -float("inf"))
    more = [others.square().sum(1)] if squares else []
    return torch.stack([peak.squeeze(1), others.sum(1), moment, target.squeeze(1), *more], 1)


def gradient(tile, out, scored, g, g_entropy=None):
    """Writes the gradient of the raw logits.

    dz = [ g (onehot - p) - g_entropy p (log p + entropy) ] (1 - tanh^2 of the softcap) logit_scale / temperature
    """
    for s in slabs(tile):
        _, dz, idle, slope = _row_gradient(tile, s, scored, g, g_entropy)
        _write(tile, s, out, dz, idle, slope)


def _row_gradient(tile, s, scored, g, g_entropy):
    """(z, gradient of z, rows without one, derivative of the softcap or None) of some rows."""
    logps, lse, entropy = (x[s].unsqueeze(1) for x in scored)
    z, slope = transformed(tile, s, lse.dtype)
    if g is None and g_entropy is None:
        return z, torch.zeros_like(z), torch.ones_like(lse, dtype=torch.bool), slope
    rows_g = torch.zeros_like(lse) if g is None else g[s].unsqueeze(1)
    column, here = _target_column(tile.target[s], z.shape[1])
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
    return z, dz, idle, slope


def _write(tile, s, out, dz, idle, slope):
    """dz as the gradient of some rows of raw logits."""
    if slope is not None:
        dz = (dz * slope).where(dz != 0, 0.0)
    dz = (dz * (tile.transform.logit_scale / _temperature(tile, s))).masked_fill(idle, 0.0).to(out.dtype)
    if tile.ranges is None:
        out[s] = dz
    else:
        at, inside = _places(tile.ranges[s])
        out[at[inside]] = dz[inside]


def divergence_statistics(student, teacher, stats, kind):
    """Folds two tiles into the running statistics [R, 8] of their rows (`comparison.new_comparison`)."""
    for s in slabs(student):
        z, y = (transformed(tile, s, stats.dtype)[0] for tile in (student, teacher))
        of_z, of_y = _relative(z), _relative(y)
        (_, a, weight), (_, b, other) = (of_y, of_z) if kind == "forward_kl" else (of_z, of_y)
        x = a - b
        tilt = (weight * x).where(weight != 0, 0.0).sum(1)
        teachers = torch.stack([of_y[0].squeeze(1), of_y[2].sum(1), tilt, bend(x, weight, other).sum(1)], 1)
        stats[s] = merged_comparisons(stats[s], torch.cat([_of_columns(z, student.target[s], *of_z), teachers], 1), kind)


def jensen_shannon(student, teacher, scored, gap, sums, beta):
    """Adds a tile's part of (KL(p || m), beta KL(q || m) + (1 - beta) KL(p || m)) to sums [R, 2], m = (1 - beta) p + beta q.

    The first as the gradient has its terms, so that these add up to 0; the second as terms that do not cancel.
    """
    for s in slabs(student):
        p, q, _, to_p, to_q = _mixed(student, teacher, s, scored.lse, gap, beta)
        m = p + beta * (q - p)
        parts = (to_p * p).where(p != 0, 0.0), (1 - beta) * bend(to_p, p, m) + beta * bend(to_q, q, m)
        sums[s] += torch.stack([x.sum(1) for x in parts], 1)


def _both(student, teacher, s, lse, gap):
    """(p, q, log p - log q) of some rows; the last is nan where both are 0."""
    z, y = (transformed(tile, s, lse.dtype)[0] for tile in (student, teacher))
    lse, gap = lse[s].unsqueeze(1), gap[s].unsqueeze(1)
    return (z - lse).exp(), (y - (lse - gap)).exp(), (z - y) - gap


def _mixed(student, teacher, s, lse, gap, beta):
    """(p, q, log p - log q, log p - log m, log q - log m)."""
    p, q, d = _both(student, teacher, s, lse, gap)
    # of exp the argument is never positive
    over = -torch.log1p(beta * torch.expm1(-d.clamp(min=0)))
    under = -torch.log1p((1 - beta) * torch.expm1(d.clamp(max=0)))
    return p, q, d, torch.where(d >= 0, over, under + d), torch.where(d >= 0, over - d, under)


def divergence_gradient(student, teacher, out, scored, compared, g_divergence, divergence, g=None, g_entropy=None):
    """Writes the gradient of the student's raw logits: what `gradient` writes of g and g_entropy, and with u of comparison.py

    dz += g_divergence u;  u = p - q,  p (log p - log q - own)  or  (1 - beta) p (log p - log m - own)
    """
    for s in slabs(student):
        _, dz, idle, slope = _row_gradient(student, s, scored, g, g_entropy)
        if divergence.kind == "jsd":
            p, q, d, ratio, _ = _mixed(student, teacher, s, scored.lse, compared.gap, divergence.beta)
            factor = 1 - divergence.beta
        else:
            p, q, d = _both(student, teacher, s, scored.lse, compared.gap)
            ratio, factor = d, 1.0
        if divergence.kind == "forward_kl":  # p - q = p (1 - exp(-d))
            u = torch.where(d.abs() < NEAR, p * d - bend(d, p, q), p - q)
        else:
            u = (factor * p * (ratio - compared.own[s].unsqueeze(1))).where(p != 0, 0.0)
        rows_g = g_divergence[s].unsqueeze(1)
        _write(student, s, out, dz + (rows_g * u).where(rows_g != 0, 0.0), idle & (rows_g == 0), slope)


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


def slabs(tile: Tile):
    """The tile's rows, some at a time."""
    rows, columns = tile.values.shape if tile.ranges is None else (len(tile.ranges), _longest(tile.ranges))
    step = max(1, _SLAB_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def transformed(tile, s, dtype):
    """(z, derivative of the softcap or None) of some rows of a tile; behind the end of a range z is -inf."""
    transform, inside = tile.transform, None
    if tile.ranges is None:
        y = tile.values[s].to(dtype)
    else:
        at, inside = _places(tile.ranges[s])
        values = tile.values if len(tile.values) else tile.values.new_zeros(1)
        y = values[at].where(inside, 0.0)
    if tile.bias is not None:
        y = y + tile.bias.to(dtype)
    y, slope = y * transform.logit_scale, None
    if transform.softcap is not None:
        share = y / transform.softcap
        q = torch.exp(-2 * share.abs())  # of torch's functions that have the same bits wherever in a tensor a number stands
        y, slope = transform.softcap * torch.tanh(share), 4 * q / (1 + q).square()  # 1 - tanh^2 without its cancellation
    z = y / _temperature(tile, s)
    return (z if inside is None else z.where(inside, -float("inf"))), slope


def pair_logits(pairs, hidden, weight, out, scale=1.0, bias=None, add=False):
    """out[j] = scale * hidden[rows[r]] . weight[ids[j]] + bias[ids[j]] for each pair j of each row r, added to out with ``add``.

    hidden [.., K] and weight [V, K] share a dtype, out [M] and bias [V] are acc; rows lie inside of hidden. An id outside of [0, V)
    gives -inf, or with ``add`` nothing. What belongs to no range is left alone.
    """
    check_pairs(pairs, _DTYPES, out, hidden, weight, bias)
    row, at = _flat(pairs)
    ids, row = pairs.ids[at], row if pairs.rows is None else pairs.rows[row]
    here = (ids >= 0) & (ids < weight.shape[0])
    if not add:
        out[at[~here]] = -float("inf")
    ids, row, at = ids[here], row[here], at[here]
    for s in _pieces(len(at), weight.shape[1]):
        z = scale * (hidden[row[s]].to(out.dtype) * weight[ids[s]].to(out.dtype)).sum(1)
        z = z if bias is None else z + bias[ids[s]]
        out[at[s]] = out[at[s]] + z if add else z


def pair_sums(pairs, g, source, out, scale=1.0, add=False):
    """out[rows[r]] = scale * sum of g[j] source[ids[j]] over the pairs j of row r, in a fixed order; added to out with ``add``.

    source [.., K]; out [.., K] in its dtype or in acc, rounded once; g [M] acc. Ids outside of source count nothing, whatever
    their g; rows outside of out, and rows without a pair, are left alone.
    """
    check_pairs(pairs, _DTYPES, g, out, source)
    first, last = pairs.ranges.unbind(1)
    rows = torch.arange(len(first), device=first.device) if pairs.rows is None else pairs.rows
    chosen = ((first < last) & (rows >= 0) & (rows < out.shape[0])).nonzero().squeeze(1)
    width, known = _longest(pairs.ranges), source.shape[0]
    source = source if known else source.new_zeros(1, source.shape[1])
    for s in _pieces(len(chosen), width * source.shape[1]):
        at, inside = _places(pairs.ranges[chosen[s]])
        ids, to = pairs.ids[at], rows[chosen[s]]
        inside = inside & (ids >= 0) & (ids < known)
        total = out.new_zeros(len(at), source.shape[1], dtype=g.dtype)
        for c in _pieces(at.shape[1], len(at) * source.shape[1]):
            factors = g[at[:, c]].where(inside[:, c], 0.0).unsqueeze(1)
            values = source[ids[:, c].where(inside[:, c], 0)].to(g.dtype)
            total += scale * torch.bmm(factors, values.where(inside[:, c].unsqueeze(2), 0.0)).squeeze(1)
        out[to] = (out[to].to(g.dtype) + total if add else total).to(out.dtype)


def _flat(pairs: Pairs):
    """(row r, place j) of every pair."""
    first, last = pairs.ranges.unbind(1)
    lengths = last - first
    row = torch.repeat_interleave(torch.arange(len(first), device=first.device), lengths)
    before = lengths.cumsum(0) - lengths
    return row, first[row] + torch.arange(len(row), device=row.device) - before[row]


def _places(ranges):
    """(places [R, C], which of them lie inside), each range from its first on, padded to the longest."""
    first, last = ranges.unbind(1)
    at = first.unsqueeze(1) + torch.arange(max(1, _longest(ranges)), device=ranges.device)
    inside = at < last.unsqueeze(1)
    return at.where(inside, 0), inside


def _longest(ranges):
    return int((ranges[:, 1] - ranges[:, 0]).max()) if len(ranges) else 0


def _pieces(count, size):
    step = max(1, _SLAB_ELEMENTS // max(1, size))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _temperature(tile, s):
    return tile.transform.temperature if tile.temperature is None else tile.temperature[s].unsqueeze(1)


def _target_column(target, columns):
    here = ((target >= 0) & (target < columns)).unsqueeze(1)
    return target.clamp(0, columns - 1).unsqueeze(1), here
