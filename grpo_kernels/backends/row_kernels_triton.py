"""The row kernels in Triton: one program owns a row of logits, arithmetic in float32 (float64 for float64 tiles).

    statistics   one read of the tile
    gradient     one read and one write
    policy       statistics, then the gradient: two reads and one write, the second read from the cache where the rows in
                 flight fit it. The first walk goes right to left, so that the second one, left to right, meets the
                 columns that were read last.

Per element: two exp in `policy` (and a quarter for the running maximum, kept per GROUP of columns), one elsewhere. The target's
column is left out of every sum, so that p near 1 loses no digits; only the block that holds it looks for it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..losses.terms import KINDS
from .statistics import Scored

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
    shift = _finite(new_peak)
    carry, drop = _exp(peak - shift), tl.where(peak == float("-inf"), 0.0, peak - shift)
    return carry * others, carry * (moment + drop * seen)


@triton.jit
def _merged(a, b):
    """The statistics of two sets of columns without a common one."""
    peak = tl.maximum(a.peak, b.peak)
    others_a, moment_a = _against(a.peak, a.others, a.moment, a.others + _exp(a.target - _finite(a.peak)), peak)
    others_b, moment_b = _against(b.peak, b.others, b.moment, b.others + _exp(b.target - _finite(b.peak)), peak)
    return Statistics(peak, others_a + others_b, moment_a + moment_b, tl.where(b.target == float("-inf"), a.target, b.target))


@triton.jit
def _fold(x, start, end, target, peak, others, moment, transform, BLOCK: tl.constexpr):
    """A block of logits folded into (peak, others, moment) without the target, one of each for every GROUP of lanes."""
    columns = start + tl.arange(0, BLOCK)
    z, _ = _transformed(x, columns, end, transform)
    if end is not None:
        z = tl.where(columns < end, z, float("-inf"))
    if (target >= start) & (target < start + BLOCK):  # one block of a row: the others need not look for it
        z = tl.where(columns == target, float("-inf"), z)
    z = tl.reshape(z, (BLOCK // GROUP, GROUP))
    new_peak = tl.maximum(peak, tl.max(z, 1))
    others, moment = _against(peak, others, moment, others, new_peak)
    d = z - tl.expand_dims(_finite(new_peak), 1)
    e = _exp(d)
    return new_peak, others + tl.sum(e, 1), moment + tl.sum(tl.maximum(d, _LOWEST) * e, 1)


@triton.jit
def _row_statistics(row_ptr, columns, target, transform, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK // GROUP,), transform.temperature.dtype)
    peak, others, moment = nothing + float("-inf"), nothing, nothing
    full = columns // BLOCK
    if full * BLOCK < columns:
        x = tl.load(row_ptr + full * BLOCK + lanes, mask=full * BLOCK + lanes < columns, other=0.0)
        peak, others, moment = _fold(x, full * BLOCK, columns, target, peak, others, moment, transform, BLOCK)
    x = tl.load(row_ptr + (full - 1) * BLOCK + lanes, mask=lanes < full * BLOCK, other=0.0)
    for k in range(full):
        start = (full - 1 - k) * BLOCK
        ahead = tl.load(row_ptr + start - BLOCK + lanes, mask=lanes < start, other=0.0)
        peak, others, moment = _fold(x, start, None, target, peak, others, moment, transform, BLOCK)
        x = ahead
    row_peak = tl.max(peak, 0)
    others, moment = _against(peak, others, moment, others, row_peak)

    here = (target >= 0) & (target < columns)
    at = tl.where(here, target, 0)
    z, _ = _transformed(tl.load(row_ptr + at, mask=here, other=0.0), at, None, transform)
    z, nowhere, zero = tl.where(here, z, float("-inf")), tl.full((), float("-inf"), z.dtype), tl.zeros((), z.dtype)
    return _merged(Statistics(row_peak, tl.sum(others, 0), tl.sum(moment, 0), nowhere), Statistics(z, zero, zero, z))


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
    """Writes dz, left to right; zeros where nothing flows back, whatever the row holds."""
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
        x = tl.load(row_ptr + lanes, mask=lanes < full * BLOCK, other=0.0)
        for k in range(full):
            start = k * BLOCK
            ahead = tl.load(row_ptr + start + BLOCK + lanes, mask=lanes < (full - 1 - k) * BLOCK, other=0.0)
            result = _result_block(x, start, None, target, at_target, scored, g, g_entropy, transform, BLOCK)
            tl.store(out_ptr + start + lanes, result.to(dtype))
            x = ahead
        if full * BLOCK < columns:
            start = full * BLOCK
            x = tl.load(row_ptr + start + lanes, mask=start + lanes < columns, other=0.0)
            result = _result_block(x, start, columns, target, at_target, scored, g, g_entropy, transform, BLOCK)
            tl.store(out_ptr + start + lanes, result.to(dtype), mask=start + lanes < columns)


@triton.jit(do_not_specialize_on_alignment=["stats_ptr", "target_ptr", "temperature_ptr", "ranges_ptr"])  # slices start anywhere
def statistics_kernel(
    tile,  # Matrix of raw logits
    stats_ptr,  # [R, 4] acc, the fields of Statistics
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
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 14k rows of 152k
    stats_ptr += row * 4
    scale, temperature = tl.full((), logit_scale, ACC), _row_temperature(temperature_ptr, row, temperature, ACC)
    transform = Transform(bias_ptr, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    target = tl.load(target_ptr + row).to(tl.int32)
    before = Statistics(tl.load(stats_ptr), tl.load(stats_ptr + 1), tl.load(stats_ptr + 2), tl.load(stats_ptr + 3))
    row_ptr, columns = _row_at(tile, row, ranges_ptr, columns)
    after = _merged(before, _row_statistics(row_ptr, columns, target, transform, BLOCK))
    tl.debug_barrier()  # every thread has read what the first ones overwrite now
    tl.store(stats_ptr, after.peak)
    tl.store(stats_ptr + 1, after.others)
    tl.store(stats_ptr + 2, after.moment)
    tl.store(stats_ptr + 3, after.target)


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
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = scored.lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile.pointer + row * tile.stride
    scale, temperature = tl.full((), logit_scale, ACC), _row_temperature(temperature_ptr, row, temperature, ACC)
    transform = Transform(bias_ptr, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    target = tl.load(target_ptr + row).to(tl.int32)
    scores = _finalized(_row_statistics(row_ptr, columns, target, transform, BLOCK))
    tl.store(scored.logps + row, scores.logps)
    tl.store(scored.lse + row, scores.lse)
    tl.store(scored.entropy + row, scores.entropy)

    HAS_OLD: tl.constexpr = rows.old is not None
    HAS_REF: tl.constexpr = rows.ref is not None
    zero = tl.zeros((), ACC)
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
