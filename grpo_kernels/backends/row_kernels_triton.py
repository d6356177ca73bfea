"""The row kernels in Triton: one program owns a row of logits, arithmetic in float32 (float64 for float64 tiles).

    statistics   one read of the tile
    close        reads the statistics alone
    gradient     one read and one write
    policy       statistics, then the gradient: two reads and one write, the second read from the cache where the rows in
                 flight fit it. The second walk goes right to left, so that it begins with the columns that were read last.

Per element: two exp in `policy` (and an eighth for the running maximum, kept per GROUP of columns), one elsewhere. The target's
column is left out of every sum, so that p near 1 loses no digits; only the step that holds it looks for it.

The bits of a row's statistics depend on its columns alone. A fixed tile of TILE columns is folded in steps of as many of them as
the dtype says; its groups are then added by pairs, two numbers at a time, so that it does not matter which thread holds them; and
the tiles are merged from left to right. The kernels are launched without contraction of products and sums: two of them that inline
one function could round it differently. What is fused is written so.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..losses.terms import KINDS
from .statistics import TILE_COLUMNS, Scored

TILE = tl.constexpr(TILE_COLUMNS)
GROUP = tl.constexpr(4)  # elements of one 16-byte load: their maximum needs no exchange between threads
CLIPPED, CISPO, SAPO, LINEAR = (tl.constexpr(KINDS.index(kind)) for kind in ("clipped", "cispo", "sapo", "linear"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e4)  # exp of it is 0, and 0 times it is not NaN


class Matrix(NamedTuple):
    """[R, C], columns adjacent."""

    pointer: object
    stride: object  # elements from row to row


class Rows(NamedTuple):
    """Per-row inputs of `policy`, pointers to acc [R] or None: the fields of `terms.PolicyRows`."""

    w_policy: object
    advantages: object
    old: object
    ref: object
    w_kl: object
    w_entropy: object


class Statistics(NamedTuple):
    """Of a set of columns."""

    peak: object  # max
    others: object  # sum of exp(z - max) without the target's column
    moment: object  # sum of (z - max) exp(z - max)
    target: object  # target's z; -inf: not in the set
    squares: object  # sum of exp(2 (z - max)) without the target's column; where it is not wanted, another name of `others`


class Groups(NamedTuple):
    """`Statistics` of groups of columns, none of them the target's."""

    peak: object
    others: object
    moment: object
    squares: object


class Transform(NamedTuple):
    """How raw logits become z; numbers in acc."""

    bias: object  # pointer or None
    logit_scale: object
    softcap: object  # None: none
    temperature: object


@triton.jit
def _finite(peak):
    """0 for the maximum of nothing: a block of only -inf (masked vocabulary) must not become inf - inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _exp(x):
    """exp(x), 0 where it would be subnormal: tl.exp spends three more instructions on those. Differences come in, not logits:
    their product with log2(e) is rounded."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _log1p(x):
    """log(1 + x) for -0.5 <= x <= 1, to the last digits; the hardware's logarithm has none left where x is small."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8  # s^2 <= 1/9
    s = x / (2.0 + x)
    square = s * s
    series = s * 0.0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = tl.fma(series, square, tl.full(x.shape, 1.0 / (2 * TERMS - 1 - 2 * k), x.dtype))
    return 2.0 * s * series


@triton.jit
def _expm1(x):
    """exp(x) - 1, by its series where they would cancel."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 9
    series = x * 0.0 + 1.0
    for k in tl.static_range(TERMS - 1):
        series = 1.0 + series * x * (1.0 / (TERMS - k))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _clamped_exp(x):
    return tl.exp(tl.where(x > 80.0, 80.0, tl.where(x < -80.0, -80.0, x)))  # NaN stays NaN


@triton.jit
def policy_coefficient(logps, old, ref, advantage, w_policy, w_kl, epsilon_low, epsilon_high, delta,
                       sapo_temperature_pos, sapo_temperature_neg,
                       KIND: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
                       BIAS_CORRECTION: tl.constexpr):  # fmt: skip
    """c = d loss / d logps of a row: the only place on the device where the policy terms and the KL stand."""
    w = logps * 0.0 + 1.0
    if HAS_OLD:
        w = _clamped_exp(logps - old)
    if KIND == LINEAR:
        c = w_policy
    elif KIND == CISPO:
        c = -w_policy * tl.where(w > epsilon_high, epsilon_high, w) * advantage
    elif KIND == SAPO:
        # sigmoid' = e / (1 + e)^2 does not overflow with e = exp(-|x|)
        tau = tl.where(advantage > 0.0, sapo_temperature_pos, sapo_temperature_neg)
        e = tl.exp(-tl.abs(tau * (w - 1.0)))
        c = -4.0 * w_policy * (e / ((1.0 + e) * (1.0 + e))) * w * advantage
    else:
        # outside its bounds one branch of the minimum is constant; which one is the minimum, the sign of A decides
        high = 1.0 + epsilon_high
        gains = w <= tl.minimum(high, delta)
        loses = (w >= 1.0 - epsilon_low) & (w <= tl.maximum(high, delta))
        passes = tl.where(advantage > 0.0, gains, loses)
        c = w_policy * (tl.where(passes, -advantage * w, 0.0) + 0.0 * (w + advantage))  # NaN must not vanish in a branch
    if HAS_REF:
        r = ref - logps
        # d (w k3) = w (1 - e) + w (e - r - 1), where e cancels
        if BIAS_CORRECTION:
            c += w_kl * (-w * r)
        else:
            c -= w_kl * _expm1(tl.where(r > 80.0, 80.0, tl.where(r < -80.0, -80.0, r)))
    return c


@triton.jit
def _row_at(tile, row, ranges_ptr, columns):
    """(pointer to a row of a tile, its number of columns)."""
    row_ptr = tile.pointer + row * tile.stride
    if ranges_ptr is not None:
        first = tl.load(ranges_ptr + 2 * row)
        row_ptr, columns = tile.pointer + first, (tl.load(ranges_ptr + 2 * row + 1) - first).to(tl.int32)
    return row_ptr, columns


@triton.jit
def _row_temperature(temperature_ptr, row, temperature, ACC: tl.constexpr):
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    return tl.full((), temperature, ACC)


@triton.jit
def _transformed(x, columns, end, transform):
    """(z, d z / d x temperature / logit_scale) of raw logits: bias, logit scale, softcap, temperature.

    ``end`` is the first column behind the row, or None where all columns are known to lie in it.
    """
    y = x.to(transform.temperature.dtype)
    if transform.bias is not None:
        if end is None:
            y += tl.load(transform.bias + columns)
        else:
            y += tl.load(transform.bias + columns, mask=columns < end, other=0.0)
    return _scaled(y, transform)


@triton.jit
def _scaled(y, transform):
    """As `_transformed`, of logits that have their bias."""
    slope = 1.0
    if transform.softcap is not None:
        u = y * (transform.logit_scale / transform.softcap)
        e = _exp(-2.0 * tl.abs(u))
        tanh = (1.0 - e) / (1.0 + e)
        z = tl.where(u < 0.0, -tanh, tanh) * (transform.softcap / transform.temperature)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        z = y * (transform.logit_scale / transform.temperature)
    return z, slope


@triton.jit
def _against(peak, others, moment, seen, new_peak):
    """(others, moment) of columns with this peak and sum of all exp, beside a maximum that is no less than theirs."""
    drop = peak - _finite(new_peak)
    carry = _exp(drop)
    return carry * others, carry * tl.fma(tl.maximum(drop, _LOWEST), seen, moment)


@triton.jit
def _squares_against(peak, squares, new_peak):
    """As `_against`."""
    carry = _exp(peak - _finite(new_peak))
    return carry * carry * squares


@triton.jit
def _merged(a, b, SQUARES: tl.constexpr = False):
    """The statistics of two sets of columns without a common one. Nothing merged with another is the other, to the bit."""
    peak = tl.maximum(a.peak, b.peak)
    others_a, moment_a = _against(a.peak, a.others, a.moment, a.others + _exp(a.target - _finite(a.peak)), peak)
    others_b, moment_b = _against(b.peak, b.others, b.moment, b.others + _exp(b.target - _finite(b.peak)), peak)
    others = others_a + others_b
    squares = others
    if SQUARES:
        squares = _squares_against(a.peak, a.squares, peak) + _squares_against(b.peak, b.squares, peak)
    return Statistics(peak, others, moment_a + moment_b, tl.where(b.target == float("-inf"), a.target, b.target), squares)


@triton.jit
def _at_step(TILES: tl.constexpr, STEP: tl.constexpr):
    """Columns [TILES, STEP] of the first step of adjacent tiles, from the first one's first."""
    return tl.expand_dims(tl.arange(0, TILES) * TILE, 1) + tl.expand_dims(tl.arange(0, STEP), 0)


@triton.jit
def _sum_of_groups(x, TILES: tl.constexpr, STEP: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(x, (TILES, STEP // GROUP, 2, 2)), 3), 2)


@triton.jit
def _fold(x, start, end, target, before, transform, TILES: tl.constexpr, STEP: tl.constexpr, SQUARES: tl.constexpr):
    """A step of adjacent tiles folded into `Groups` [TILES, STEP / GROUP]; None: of nothing."""
    columns = start + _at_step(TILES, STEP)
    z, _ = _transformed(x, columns, end, transform)
    if end is not None:
        z = tl.where(columns < end, z, float("-inf"))
    if (target >= start) & (target < start + (TILES - 1) * TILE + STEP):  # one step of a row: the others need not look for it
        z = tl.where(columns == target, float("-inf"), z)
    z = tl.reshape(z, (TILES, STEP // GROUP, GROUP))
    peak = tl.max(z, 2)
    if before is not None:
        peak = tl.maximum(before.peak, peak)
    d = z - tl.expand_dims(_finite(peak), 2)
    e = _exp(d)
    others, moment = _sum_of_groups(e, TILES, STEP), _sum_of_groups(tl.maximum(d, _LOWEST) * e, TILES, STEP)
    if before is not None:
        others_before, moment_before = _against(before.peak, before.others, before.moment, before.others, peak)
        others, moment = others_before + others, moment_before + moment
    squares = others
    if SQUARES:
        squares = _sum_of_groups(e * e, TILES, STEP)
        if before is not None:
            squares = _squares_against(before.peak, before.squares, peak) + squares
    return Groups(peak, others, moment, squares)


@triton.jit
def _of_tiles(groups, at_target, start, target, transform, TILES: tl.constexpr, GROUPS: tl.constexpr, SQUARES: tl.constexpr):
    """The statistics [TILES] of adjacent tiles, of those of their groups and the target's logit, if it is in one of them."""
    peak = tl.max(groups.peak, 1)
    x = tl.join(*_against(groups.peak, groups.others, groups.moment, groups.others, tl.expand_dims(peak, 1)))
    # a thread has several groups: the pairs that are furthest apart need no exchange, and those of one warp none through memory
    for i in tl.static_range(16):
        if GROUPS >> i > 128:
            x = tl.sum(tl.reshape(x, (TILES, 2, GROUPS >> (i + 1), 2)), 1)
        elif GROUPS >> i > 1:
            x = tl.sum(tl.reshape(x, (TILES, GROUPS >> (i + 1), 2, 2)), 2)
    others, moment = tl.split(tl.reshape(x, (TILES, 2)))
    squares = others
    if SQUARES:
        y = _squares_against(groups.peak, groups.squares, tl.expand_dims(peak, 1))
        for i in tl.static_range(16):
            if GROUPS >> i > 128:
                y = tl.sum(tl.reshape(y, (TILES, 2, GROUPS >> (i + 1))), 1)
            elif GROUPS >> i > 1:
                y = tl.sum(tl.reshape(y, (TILES, GROUPS >> (i + 1), 2)), 2)
        squares = tl.reshape(y, (TILES,))
    found = Statistics(peak, others, moment, tl.full((TILES,), float("-inf"), peak.dtype), squares)
    if (target >= start) & (target < start + TILES * TILE):
        z, _ = _scaled(at_target.to(peak.dtype), transform)
        first = start + tl.arange(0, TILES) * TILE
        z = tl.where((target >= first) & (target < first + TILE), z, float("-inf"))
        found = _merged(found, Statistics(z, tl.zeros_like(z), tl.zeros_like(z), z, tl.zeros_like(z)), SQUARES)
    return found


@triton.jit
def _in_order(s, tiles, TILES: tl.constexpr, SQUARES: tl.constexpr):
    """Scalars merged with [TILES] statistics, one after another; several have no squares."""
    if TILES == 1:
        others, target = tl.sum(tiles.others, 0), tl.sum(tiles.target, 0)
        squares = others
        if SQUARES:
            squares = tl.sum(tiles.squares, 0)
        s = _merged(s, Statistics(tl.sum(tiles.peak, 0), others, tl.sum(tiles.moment, 0), target, squares), SQUARES)
    else:
        tl.static_assert(not SQUARES)
        fields = tl.join(tl.join(tiles.peak, tiles.moment), tl.join(tiles.others, tiles.target))  # [TILES, 2, 2]
        even, odd = tl.split(tl.reshape(tl.permute(fields, (1, 2, 0)), (2 * TILES, 2)))
        if TILES == 2:
            s = _merged(_merged(s, _scalars(even)), _scalars(odd))
        else:
            first, third = tl.split(tl.reshape(even, (4, 2)))
            second, fourth = tl.split(tl.reshape(odd, (4, 2)))
            s = _merged(_merged(s, _scalars(first)), _scalars(second))
            s = _merged(_merged(s, _scalars(third)), _scalars(fourth))
    return s


@triton.jit
def _scalars(fields):
    """Statistics of [4], which are in the order of peak, others, moment, target."""
    first, second = tl.split(tl.reshape(fields, (2, 2)))
    peak, moment = tl.split(first)
    others, target = tl.split(second)
    return Statistics(peak, others, moment, target, others)


@triton.jit
def _statistics_at(pointer, SQUARES: tl.constexpr):
    others = tl.load(pointer + 1)
    squares = others
    if SQUARES:
        squares = tl.load(pointer + 4)
    return Statistics(tl.load(pointer), others, tl.load(pointer + 2), tl.load(pointer + 3), squares)


@triton.jit
def _store_statistics(pointer, s, SQUARES: tl.constexpr):
    tl.debug_barrier()  # every thread has read what the first ones overwrite now
    tl.store(pointer, s.peak)
    tl.store(pointer + 1, s.others)
    tl.store(pointer + 2, s.moment)
    tl.store(pointer + 3, s.target)
    if SQUARES:
        tl.store(pointer + 4, s.squares)


@triton.jit
def _merge_tiles(s, tiles, start, parts_ptr, TILES: tl.constexpr, SQUARES: tl.constexpr):
    """The tiles merged into s; or, with a pointer, one tile into its part there."""
    if parts_ptr is None:
        s = _in_order(s, tiles, TILES, SQUARES)
    else:
        at = parts_ptr + start // TILE * (5 if SQUARES else 4)
        _store_statistics(at, _in_order(_statistics_at(at, SQUARES), tiles, TILES, SQUARES), SQUARES)
    return s


@triton.jit
def _row_statistics(row_ptr, columns, target, before, parts_ptr, transform,
                    SHORT: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr, SQUARES: tl.constexpr):  # fmt: skip
    """The statistics of a row merged into those before, TILES side by side; a SHORT row has hardly ever a whole tile."""
    lanes, s = _at_step(TILES, STEP), before
    here = (target >= 0) & (target < columns)
    full, own = 0, tl.where(here, target, 0)
    target = tl.where(here, target, -1)  # a last tile may reach past the row's end to a target that is elsewhere
    at_target = tl.load(row_ptr + own, mask=here, other=0.0)  # nothing waits for it before its tile
    if transform.bias is not None:
        at_target = at_target.to(transform.temperature.dtype) + tl.load(transform.bias + own, mask=here, other=0.0)
    if not SHORT:
        full = columns // (TILES * TILE) * (TILES * TILE)
        x = tl.load(row_ptr + lanes, mask=lanes < full, other=0.0)
        for start in range(0, full, TILES * TILE):
            groups = None
            for k in tl.static_range(TILE // STEP):
                # of these tiles the next step, or of the next ones the first
                ahead = start + ((k + 1) * STEP if (k + 1) * STEP < TILE else TILES * TILE)
                following = tl.load(row_ptr + ahead + lanes, mask=ahead + lanes < full, other=0.0)
                groups = _fold(x, start + k * STEP, None, target, groups, transform, TILES, STEP, SQUARES)
                x = following
            tiles = _of_tiles(groups, at_target, start, target, transform, TILES, STEP // GROUP, SQUARES)
            s = _merge_tiles(s, tiles, start, parts_ptr, TILES, SQUARES)
        if full < columns:
            groups = None
            for k in tl.static_range(TILE // STEP):
                at = full + k * STEP
                x = tl.load(row_ptr + at + lanes, mask=at + lanes < columns, other=0.0)
                groups = _fold(x, at, columns, target, groups, transform, TILES, STEP, SQUARES)
            tiles = _of_tiles(groups, at_target, full, target, transform, TILES, STEP // GROUP, SQUARES)
            s = _merge_tiles(s, tiles, full, parts_ptr, TILES, SQUARES)
    else:
        nothing = tl.zeros((1, STEP // GROUP), transform.temperature.dtype)
        for start in range(0, columns, TILE):
            peak, others, moment, squares = nothing + float("-inf"), nothing, nothing, nothing
            for at in range(start, tl.minimum(start + TILE, columns), STEP):
                x = tl.load(row_ptr + at + lanes, mask=at + lanes < columns, other=0.0)
                groups = _fold(x, at, columns, target, Groups(peak, others, moment, squares), transform, 1, STEP, SQUARES)
                peak, others, moment, squares = groups.peak, groups.others, groups.moment, groups.squares
            groups = Groups(peak, others, moment, squares)
            tiles = _of_tiles(groups, at_target, start, target, transform, 1, STEP // GROUP, SQUARES)
            s = _merge_tiles(s, tiles, start, parts_ptr, 1, SQUARES)
    return s


@triton.jit
def _finalized(s):
    """The scores of whole-row statistics; others leaves out the target, so log p near 0 keeps its digits."""
    x = (s.peak - s.target) + tl.log(s.others)
    logps = -(tl.where(x > 0.0, x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
    total = s.others + tl.exp(s.target - s.peak)
    log_total = tl.log(total)
    return Scored(logps, s.peak + log_total, log_total - s.moment / total)


@triton.jit
def _score_slope(z, start, target, at_target, scored, g, g_entropy, BLOCK: tl.constexpr):
    """d loss / d z of a block, of the gradients of logps and entropy.

    at_target is what stands in the target's column, but for the gradient of the entropy.
    """
    log_p = z - scored.lse
    p = _exp(log_p)
    result = -p * g
    if (target >= start) & (target < start + BLOCK):
        here = start + tl.arange(0, BLOCK) == target
        result = tl.where(here, at_target, result)
        if g_entropy is not None:  # near p = 1, z - lse has lost the digits of log p
            log_p = tl.where(here, scored.logps, log_p)
            p = tl.where(here, tl.exp(scored.logps), p)
    if g_entropy is not None:
        result -= g_entropy * (p * (tl.maximum(log_p, _LOWEST) + scored.entropy))
    return result


@triton.jit
def _result_block(x, start, end, target, at_target, scored, g, g_entropy, transform, BLOCK: tl.constexpr):
    """dz of a block; g and g_entropy carry the factor logit_scale / temperature."""
    z, slope = _transformed(x, start + tl.arange(0, BLOCK), end, transform)
    result = _score_slope(z, start, target, at_target, scored, g, g_entropy, BLOCK)
    if transform.softcap is not None:
        result *= slope
    return result


@triton.jit
def _write_zeros(out_ptr, columns, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    full = columns // BLOCK
    nothing = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    for k in range(full):
        tl.store(out_ptr + k * BLOCK + lanes, nothing)
    if full * BLOCK < columns:
        tl.store(out_ptr + full * BLOCK + lanes, nothing, mask=full * BLOCK + lanes < columns)


@triton.jit
def _write_row(row_ptr, out_ptr, columns, target, scored, g, g_entropy, transform, BLOCK: tl.constexpr):
    """Writes dz, right to left; zeros where nothing flows back, whatever the row holds."""
    lanes = tl.arange(0, BLOCK)
    dtype = out_ptr.dtype.element_ty
    full = columns // BLOCK
    idle = g == 0.0
    if g_entropy is not None:
        idle = idle & (g_entropy == 0.0)
    if idle:
        _write_zeros(out_ptr, columns, BLOCK)
    else:
        factor = transform.logit_scale / transform.temperature
        g *= factor
        at_target = -_expm1(scored.logps) * g
        if g_entropy is not None:
            g_entropy *= factor
        if full * BLOCK < columns:
            start = full * BLOCK
            x = tl.load(row_ptr + start + lanes, mask=start + lanes < columns, other=0.0)
            result = _result_block(x, start, columns, target, at_target, scored, g, g_entropy, transform, BLOCK)
            tl.store(out_ptr + start + lanes, result.to(dtype), mask=start + lanes < columns)
        x = tl.load(row_ptr + (full - 1) * BLOCK + lanes, mask=lanes < full * BLOCK, other=0.0)
        for k in range(full):
            start = (full - 1 - k) * BLOCK
            ahead = tl.load(row_ptr + start - BLOCK + lanes, mask=lanes < start, other=0.0)
            result = _result_block(x, start, None, target, at_target, scored, g, g_entropy, transform, BLOCK)
            tl.store(out_ptr + start + lanes, result.to(dtype))
            x = ahead


@triton.jit(do_not_specialize=["parts"],
            do_not_specialize_on_alignment=["stats_ptr", "target_ptr", "temperature_ptr", "ranges_ptr"])  # slices start anywhere
def statistics_kernel(
    tile,  # Matrix of raw logits
    stats_ptr,  # [R, parts, 4] acc, the fields of Statistics; with SQUARES 5
    parts,  # 1 for all of a row's fixed tiles, or with PARTS one for each
    target_ptr,  # [R] int64, relative to the tile's first column
    bias_ptr,  # [C] acc or None
    temperature_ptr,  # [R] acc or None
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,  # columns of a fixed tile that are folded at once
    SQUARES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ranges_ptr=None,  # [R, 2] int64: where the rows are behind the tile's pointer
):
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 14k rows of 152k
    stats_ptr += row * parts * (5 if SQUARES else 4)
    scale, temperature = tl.full((), logit_scale, ACC), _row_temperature(temperature_ptr, row, temperature, ACC)
    transform = Transform(bias_ptr, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    target = tl.load(target_ptr + row).to(tl.int32)
    row_ptr, columns = _row_at(tile, row, ranges_ptr, columns)
    parts_ptr = stats_ptr if PARTS else None
    before = _statistics_at(stats_ptr, SQUARES)
    after = _row_statistics(
        row_ptr, columns, target, before, parts_ptr, transform, ranges_ptr is not None, 1, STEP, SQUARES
    )
    if not PARTS:
        _store_statistics(stats_ptr, after, SQUARES)


@triton.jit
def _part_at(stats_ptr, row, i, parts, known, SQUARES: tl.constexpr):
    """A vector of parts, of rows that have ``known`` of them; behind the last one there is nothing."""
    inside, at = i < known, stats_ptr + (row * parts + i) * (5 if SQUARES else 4)
    peak, target = tl.load(at, inside, other=float("-inf")), tl.load(at + 3, inside, other=float("-inf"))
    others = tl.load(at + 1, inside, other=0.0)
    squares = others
    if SQUARES:
        squares = tl.load(at + 4, inside, other=0.0)
    return Statistics(peak, others, tl.load(at + 2, inside, other=0.0), target, squares)


@triton.jit(do_not_specialize=["rows", "parts"], do_not_specialize_on_alignment=["stats_ptr", "scored", "squared_ptr"])
def close_kernel(
    stats_ptr,  # [R, parts, 4] acc, with squared 5
    scored,  # Scored: [R] acc each, written
    squared_ptr,  # [R] acc, written: sum of p^2 over all columns but the target; or None
    rows,
    parts,
    BLOCK: tl.constexpr,
):
    """The parts of a row merged in order, and what is known of it then; a thread has a row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, known = row < rows, tl.where(row < rows, parts, 0)
    nothing = tl.zeros((BLOCK,), stats_ptr.dtype.element_ty)
    SQUARES: tl.constexpr = squared_ptr is not None
    peak, others, moment, target, squares = nothing + float("-inf"), nothing, nothing, nothing + float("-inf"), nothing
    for i in range(0, parts, 4):
        a, b = _part_at(stats_ptr, row, i, parts, known, SQUARES), _part_at(stats_ptr, row, i + 1, parts, known, SQUARES)
        c, d = _part_at(stats_ptr, row, i + 2, parts, known, SQUARES), _part_at(stats_ptr, row, i + 3, parts, known, SQUARES)
        s = _merged(_merged(Statistics(peak, others, moment, target, squares), a, SQUARES), b, SQUARES)
        peak, others, moment, target, squares = _merged(_merged(s, c, SQUARES), d, SQUARES)
    s = Statistics(peak, others, moment, target, squares)
    scores = _finalized(s)
    tl.store(scored.logps + row, scores.logps, inside)
    tl.store(scored.lse + row, scores.lse, inside)
    tl.store(scored.entropy + row, scores.entropy, inside)
    if SQUARES:
        total = s.others + tl.exp(s.target - s.peak)
        tl.store(squared_ptr + row, s.squares / (total * total), inside)


@triton.jit(do_not_specialize_on_alignment=["scored", "g_ptr", "g_entropy_ptr", "target_ptr", "temperature_ptr", "ranges_ptr"])
def gradient_kernel(
    tile,  # Matrix of raw logits
    out,  # Matrix: the tile itself, or other memory
    scored,  # Scored: [R] acc each
    g_ptr,  # [R] acc, d loss / d logps
    g_entropy_ptr,  # [R] acc, d loss / d entropy, or None
    target_ptr,  # [R] int64, relative to the tile's first column
    bias_ptr,  # [C] acc or None
    temperature_ptr,  # [R] acc or None
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ranges_ptr=None,  # [R, 2] int64: where the rows are behind the tile's pointer
):
    ACC: tl.constexpr = scored.lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scale, temperature = tl.full((), logit_scale, ACC), _row_temperature(temperature_ptr, row, temperature, ACC)
    transform = Transform(bias_ptr, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    g, g_entropy = tl.load(g_ptr + row), None
    if g_entropy_ptr is not None:
        g_entropy = tl.load(g_entropy_ptr + row)
    scores = Scored(tl.load(scored.logps + row), tl.load(scored.lse + row), tl.load(scored.entropy + row))
    out_ptr, _ = _row_at(out, row, ranges_ptr, columns)
    row_ptr, columns = _row_at(tile, row, ranges_ptr, columns)
    target = tl.load(target_ptr + row).to(tl.int32)
    _write_row(row_ptr, out_ptr, columns, target, scores, g, g_entropy, transform, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["scored", "rows", "target_ptr", "temperature_ptr"])
def policy_kernel(
    tile,  # Matrix of raw logits, whole rows
    out,  # Matrix: the tile itself, or other memory
    scored,  # Scored: [R] acc each, written
    rows,  # Rows
    target_ptr,  # [R] int64 in [0, C)
    bias_ptr,  # [C] acc or None
    temperature_ptr,  # [R] acc or None
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    epsilon_low: tl.float64,
    epsilon_high: tl.float64,
    delta: tl.float64,
    sapo_temperature_pos: tl.float64,
    sapo_temperature_neg: tl.float64,
    KIND: tl.constexpr,  # index into KINDS
    BIAS_CORRECTION: tl.constexpr,
    TILES: tl.constexpr,  # fixed tiles of columns that are folded side by side
    STEP: tl.constexpr,  # columns of each that are folded at once
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,  # columns that are written at once
):
    ACC: tl.constexpr = scored.lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile.pointer + row * tile.stride
    scale, temperature = tl.full((), logit_scale, ACC), _row_temperature(temperature_ptr, row, temperature, ACC)
    transform = Transform(bias_ptr, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    target = tl.load(target_ptr + row).to(tl.int32)
    nowhere, zero = tl.full((), float("-inf"), ACC), tl.zeros((), ACC)
    nothing = Statistics(nowhere, zero, zero, nowhere, zero)
    scores = _finalized(_row_statistics(row_ptr, columns, target, nothing, None, transform, False, TILES, STEP, False))
    tl.store(scored.logps + row, scores.logps)
    tl.store(scored.lse + row, scores.lse)
    tl.store(scored.entropy + row, scores.entropy)

    HAS_OLD: tl.constexpr = rows.old is not None
    HAS_REF: tl.constexpr = rows.ref is not None
    old, ref, w_kl, advantage, w_policy, g_entropy = zero, zero, zero, zero, zero, None
    if HAS_OLD:
        old = tl.load(rows.old + row)
    if HAS_REF:
        ref, w_kl = tl.load(rows.ref + row), tl.load(rows.w_kl + row)
    if rows.advantages is not None:
        advantage = tl.load(rows.advantages + row)
    if rows.w_policy is not None:
        w_policy = tl.load(rows.w_policy + row)
    if rows.w_entropy is not None:
        g_entropy = tl.load(rows.w_entropy + row)
    g = policy_coefficient(
        scores.logps, old, ref, advantage, w_policy, w_kl, tl.full((), epsilon_low, ACC), tl.full((), epsilon_high, ACC),
        tl.full((), delta, ACC), tl.full((), sapo_temperature_pos, ACC), tl.full((), sapo_temperature_neg, ACC),
        KIND, HAS_OLD, HAS_REF, BIAS_CORRECTION,
    )  # fmt: skip
    tl.debug_barrier()  # in place: every thread has read the target's logit
    _write_row(row_ptr, out.pointer + row * out.stride, columns, target, scores, g, g_entropy, transform, BLOCK)


@triton.jit
def scale_kernel(x_ptr, scale_ptr, elements, BLOCK: tl.constexpr):
    """x *= scale, without touching x where scale is 1: a backward of the plain loss costs no pass over dW."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < elements, other=0.0)
        tl.store(x_ptr + at, (x.to(scale.dtype) * scale).to(x_ptr.dtype.element_ty), mask=at < elements)
