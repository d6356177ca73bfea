"""The row kernels in Triton: one program owns a row of logits, arithmetic in float32 (float64 for float64 tiles).

    statistics   one read of the tile; with an output, a second one and one write of softmax(z)
    gradient     one read and one write
    policy       statistics, then the gradient: two reads and one write, the second read from the cache where the rows in
                 flight fit it. The first walk goes right to left, so that the second one, left to right, meets the
                 columns that were read last.

Per element: two exp in `policy` (and a quarter for the running maximum, kept per GROUP of columns), one elsewhere. The target's
column is left out of every sum, so that p near 1 loses no digits; only the block that holds it looks for it.

The gradient may be written in a narrower dtype over the tile's own memory (OVERLAY): block k of it lies on block k / 2 of
the logits, so a barrier stands between a block's last load and its first store, and a block is loaded one step ahead.
"""

from typing import NamedTuple

import triton
import triton.language as tl

GROUP = tl.constexpr(4)  # elements of one 16-byte load: their maximum needs no exchange between threads
CLIPPED, CISPO, SAPO, LINEAR = (tl.constexpr(kind) for kind in range(4))
FROM_LOGITS, FROM_PROBS, SOFTMAX = (tl.constexpr(mode) for mode in range(3))  # what `_write_row` makes of which
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e4)  # exp of it is 0, and 0 times it is not NaN


class Rows(NamedTuple):
    """Per-row inputs of `policy`, pointers to acc [R] or None: the fields of `coefficients.PolicyRows`."""

    w_policy: object
    advantages: object
    old: object
    ref: object
    w_kl: object
    w_entropy: object


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
    """log(1 + x) for 0 <= x <= 1, to the last digits; the hardware's logarithm has none left where x is small."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8  # s^2 <= 1/9
    s = x / (2.0 + x)
    square = s * s
    series = s * 0.0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * TERMS - 1 - 2 * k)
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
def _transformed(x, columns, end, bias_ptr, logit_scale, softcap, temperature,
                 ACC: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """(z, d z / d x temperature / logit_scale) of raw logits: bias, logit scale, softcap, temperature.

    ``end`` is the first column behind the row, or None where all columns are known to lie in it.
    """
    y = x.to(ACC)
    if bias_ptr is not None:
        if end is None:
            y += tl.load(bias_ptr + columns)
        else:
            y += tl.load(bias_ptr + columns, mask=columns < end, other=0.0)
    slope = 1.0
    if SOFTCAP:
        u = y * (logit_scale / softcap)
        e = _exp(-2.0 * tl.abs(u))
        tanh = (1.0 - e) / (1.0 + e)
        z = tl.where(u < 0.0, -tanh, tanh) * (softcap / temperature)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        z = y * (logit_scale / temperature)
    return z, slope


@triton.jit
def _fold(x, start, end, target, peak, others, moment, bias_ptr, logit_scale, softcap, temperature,
          ACC: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of logits folded into the running (max, sum of exp, sum of (z - max) exp), one of each per GROUP of lanes."""
    columns = start + tl.arange(0, BLOCK)
    z, _ = _transformed(x, columns, end, bias_ptr, logit_scale, softcap, temperature, ACC, SOFTCAP)
    if end is not None:
        z = tl.where(columns < end, z, float("-inf"))
    if (target >= start) & (target < start + BLOCK):  # one block of a row: the others need not look for it
        z = tl.where(columns == target, float("-inf"), z)
    z = tl.reshape(z, (BLOCK // GROUP, GROUP))
    new_peak = tl.maximum(peak, tl.max(z, 1))
    shift = _finite(new_peak)
    carry, drop = _exp(peak - shift), tl.where(peak == float("-inf"), 0.0, peak - shift)
    d = z - tl.expand_dims(shift, 1)
    e = _exp(d)
    moment = carry * (moment + drop * others) + tl.sum(tl.maximum(d, _LOWEST) * e, 1)
    return new_peak, carry * others + tl.sum(e, 1), moment


@triton.jit
def _row_statistics(row_ptr, columns, target, bias_ptr, logit_scale, softcap, temperature,
                    ACC: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(max, sum of exp, sum of (z - max) exp) of a row without the target's column, and the target's z; -inf if it is not here."""
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK // GROUP,), float("-inf"), ACC)
    others = tl.zeros((BLOCK // GROUP,), ACC)
    moment = tl.zeros((BLOCK // GROUP,), ACC)
    full = columns // BLOCK
    if full * BLOCK < columns:
        x = tl.load(row_ptr + full * BLOCK + lanes, mask=full * BLOCK + lanes < columns, other=0.0)
        peak, others, moment = _fold(x, full * BLOCK, columns, target, peak, others, moment,
                                     bias_ptr, logit_scale, softcap, temperature, ACC, SOFTCAP, BLOCK)  # fmt: skip
    x = tl.load(row_ptr + (full - 1) * BLOCK + lanes, mask=lanes < full * BLOCK, other=0.0)
    for k in range(full):
        start = (full - 1 - k) * BLOCK
        ahead = tl.load(row_ptr + start - BLOCK + lanes, mask=lanes < start, other=0.0)
        peak, others, moment = _fold(x, start, None, target, peak, others, moment,
                                     bias_ptr, logit_scale, softcap, temperature, ACC, SOFTCAP, BLOCK)  # fmt: skip
        x = ahead
    row_peak = tl.max(peak, 0)
    shift = _finite(row_peak)
    carry, drop = _exp(peak - shift), tl.where(peak == float("-inf"), 0.0, peak - shift)
    row_moment, row_others = tl.sum(carry * (moment + drop * others), 0), tl.sum(carry * others, 0)

    here = (target >= 0) & (target < columns)
    at = tl.where(here, target, 0)
    z, _ = _transformed(tl.load(row_ptr + at), at, None, bias_ptr, logit_scale, softcap, temperature, ACC, SOFTCAP)
    return row_peak, row_others, row_moment, tl.where(here, z, float("-inf"))


@triton.jit
def _with_target(peak, others, moment, z):
    """The statistics of `_row_statistics` with the target in the maximum and in the moment, as they are kept."""
    total = tl.maximum(peak, z)
    shift = _finite(total)
    carry, drop = tl.exp(peak - shift), tl.where(peak == float("-inf"), 0.0, peak - shift)
    own = tl.where(z == float("-inf"), 0.0, z - shift)
    return total, carry * others, carry * (moment + drop * others) + own * tl.exp(z - shift)


@triton.jit
def _closed(peak, others, moment, z):
    """(logps, lse, entropy) of whole-row statistics; others leaves out the target, so log p near 0 keeps its digits."""
    x = (peak - z) + tl.log(others)
    logps = -(tl.where(x > 0.0, x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
    total = others + tl.exp(z - peak)
    log_total = tl.log(total)
    return logps, peak + log_total, log_total - moment / total


@triton.jit
def _result_block(x, start, end, target, at_target, lse, logps, entropy, g, g_entropy, bias_ptr,
                  logit_scale, softcap, temperature,
                  ACC: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """dz of a block, or its softmax; g and g_entropy carry the factor logit_scale / temperature, at_target is dz of lp alone."""
    columns = start + tl.arange(0, BLOCK)
    slope = 1.0
    if MODE == FROM_PROBS:
        p = x.to(ACC)
        log_p = tl.where(columns == target, logps, tl.log(p))  # the target's digits are not in a p near 1
        if SOFTCAP:
            share = temperature * (log_p + lse) / softcap
            slope = tl.maximum(1.0 - share * share, 0.0)
    else:
        z, slope = _transformed(x, columns, end, bias_ptr, logit_scale, softcap, temperature, ACC, SOFTCAP)
        log_p = z - lse
        p = _exp(log_p)
    if MODE == SOFTMAX:
        result = p
    else:
        result = -g * p
        if (target >= start) & (target < start + BLOCK):
            result = tl.where(columns == target, at_target, result)
        if ENTROPY:
            result -= g_entropy * (p * (tl.maximum(log_p, _LOWEST) + entropy))
        result *= slope
    return result


@triton.jit
def _write_row(row_ptr, out_ptr, columns, target, lse, logps, entropy, g, g_entropy, bias_ptr,
               logit_scale, softcap, temperature,
               ACC: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
               OVERLAY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A row becomes dz or its softmax, left to right; a gradient is zeros where nothing flows back, whatever the row holds."""
    lanes = tl.arange(0, BLOCK)
    dtype = out_ptr.dtype.element_ty
    full = columns // BLOCK
    idle = (g == 0.0) & (MODE != SOFTMAX)
    if ENTROPY:
        idle = idle & (g_entropy == 0.0)
    tl.debug_barrier()  # every thread has read the target's logit, and whatever else the row was asked for
    if idle:
        nothing = tl.zeros((BLOCK,), dtype)
        for k in range(full):
            tl.store(out_ptr + k * BLOCK + lanes, nothing)
        if full * BLOCK < columns:
            tl.store(out_ptr + full * BLOCK + lanes, nothing, mask=full * BLOCK + lanes < columns)
    else:
        factor = logit_scale / temperature
        g, g_entropy = g * factor, g_entropy * factor
        at_target = -g * _expm1(logps)
        x = tl.load(row_ptr + lanes, mask=lanes < full * BLOCK, other=0.0)
        for k in range(full):
            start = k * BLOCK
            ahead = tl.load(row_ptr + start + BLOCK + lanes, mask=lanes < (full - 1 - k) * BLOCK, other=0.0)
            result = _result_block(x, start, None, target, at_target, lse, logps, entropy, g, g_entropy, bias_ptr,
                                   logit_scale, softcap, temperature, ACC, SOFTCAP, ENTROPY, MODE, BLOCK)  # fmt: skip
            if OVERLAY:
                tl.debug_barrier()
            tl.store(out_ptr + start + lanes, result.to(dtype))
            x = ahead
        if full * BLOCK < columns:
            start = full * BLOCK
            x = tl.load(row_ptr + start + lanes, mask=start + lanes < columns, other=0.0)
            result = _result_block(x, start, columns, target, at_target, lse, logps, entropy, g, g_entropy, bias_ptr,
                                   logit_scale, softcap, temperature, ACC, SOFTCAP, ENTROPY, MODE, BLOCK)  # fmt: skip
            if OVERLAY:
                tl.debug_barrier()
            tl.store(out_ptr + start + lanes, result.to(dtype), mask=start + lanes < columns)


@triton.jit
def _row_temperature(temperature_ptr, row, temperature, ACC: tl.constexpr):
    if temperature_ptr is not None:
        return tl.load(temperature_ptr + row)
    else:
        return tl.full((), temperature, ACC)


@triton.jit(do_not_specialize_on_alignment=["stats_ptr", "target_ptr", "temperature_ptr"])  # slices that start anywhere
def statistics_kernel(
    tile_ptr,  # [R, C] raw logits
    out_ptr,  # [R, C] or None: softmax(z) of whole rows is written here
    stats_ptr,  # [R, 4] acc: max, sum of exp(z - max) without the target, sum of (z - max) exp(z - max), target's z
    target_ptr,  # [R] int64, relative to the tile's first column
    bias_ptr,  # [C] acc or None
    temperature_ptr,  # [R] acc or None
    tile_stride,
    out_stride,
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    SOFTCAP: tl.constexpr,
    OVERLAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 14k rows of 152k
    row_ptr, stats_ptr = tile_ptr + row * tile_stride, stats_ptr + row * 4
    scale, cap = tl.full((), logit_scale, ACC), tl.full((), softcap, ACC)
    temp = _row_temperature(temperature_ptr, row, temperature, ACC)
    target = tl.load(target_ptr + row).to(tl.int32)
    peak, others, moment, z = _row_statistics(row_ptr, columns, target, bias_ptr, scale, cap, temp, ACC, SOFTCAP, BLOCK)
    peak, others, moment = _with_target(peak, others, moment, z)

    before, others_before = tl.load(stats_ptr), tl.load(stats_ptr + 1)
    moment_before, z_before = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
    total = tl.maximum(before, peak)
    shift = _finite(total)
    seen_before = others_before + tl.exp(z_before - _finite(before))
    seen = others + tl.exp(z - _finite(peak))
    carry_before, carry = tl.exp(before - shift), tl.exp(peak - shift)
    drop_before = tl.where(before == float("-inf"), 0.0, before - shift)
    drop = tl.where(peak == float("-inf"), 0.0, peak - shift)
    others = carry_before * others_before + carry * others
    moment = carry_before * (moment_before + drop_before * seen_before) + carry * (moment + drop * seen)
    z = tl.where((target >= 0) & (target < columns), z, z_before)
    tl.debug_barrier()  # every thread has read what the first ones overwrite now
    tl.store(stats_ptr, total)
    tl.store(stats_ptr + 1, others)
    tl.store(stats_ptr + 2, moment)
    tl.store(stats_ptr + 3, z)

    if out_ptr is not None:
        logps, lse, entropy = _closed(total, others, moment, z)
        _write_row(row_ptr, out_ptr + row * out_stride, columns, target, lse, logps, entropy, lse * 0.0 + 1.0, lse * 0.0,
                   bias_ptr, scale, cap, temp, ACC, SOFTCAP, False, SOFTMAX, OVERLAY, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["target_ptr", "lse_ptr", "logps_ptr", "entropy_ptr", "g_ptr", "g_entropy_ptr",
                                            "temperature_ptr"])  # fmt: skip
def gradient_kernel(
    tile_ptr,  # [R, C] raw logits, or p
    out_ptr,  # [R, C]: the tile itself, or its memory in a narrower dtype, or other memory
    target_ptr,  # [R] int64, relative to the tile's first column
    lse_ptr,  # [R] acc
    logps_ptr,  # [R] acc
    entropy_ptr,  # [R] acc
    g_ptr,  # [R] acc, d loss / d logps
    g_entropy_ptr,  # [R] acc, d loss / d entropy, or None
    bias_ptr,  # [C] acc or None
    temperature_ptr,  # [R] acc or None
    tile_stride,
    out_stride,
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    SOFTCAP: tl.constexpr,
    MODE: tl.constexpr,  # FROM_LOGITS or FROM_PROBS
    OVERLAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scale, cap = tl.full((), logit_scale, ACC), tl.full((), softcap, ACC)
    temp = _row_temperature(temperature_ptr, row, temperature, ACC)
    g = tl.load(g_ptr + row)
    ENTROPY: tl.constexpr = g_entropy_ptr is not None
    g_entropy = g * 0.0
    if ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row)
    _write_row(tile_ptr + row * tile_stride, out_ptr + row * out_stride, columns, tl.load(target_ptr + row).to(tl.int32),
                    tl.load(lse_ptr + row), tl.load(logps_ptr + row), tl.load(entropy_ptr + row), g, g_entropy,
                    bias_ptr, scale, cap, temp, ACC, SOFTCAP, ENTROPY, MODE, OVERLAY, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["rows", "logps_ptr", "entropy_ptr", "target_ptr", "temperature_ptr"])
def policy_kernel(
    tile_ptr,  # [R, C] raw logits of whole rows
    out_ptr,  # [R, C]: the tile itself, or its memory in a narrower dtype, or other memory
    rows,  # Rows
    logps_ptr,  # [R] acc, written
    entropy_ptr,  # [R] acc, written
    target_ptr,  # [R] int64 in [0, C)
    bias_ptr,  # [C] acc or None
    temperature_ptr,  # [R] acc or None
    tile_stride,
    out_stride,
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    temperature: tl.float64,
    epsilon_low: tl.float64,
    epsilon_high: tl.float64,
    delta: tl.float64,
    sapo_temperature_pos: tl.float64,
    sapo_temperature_neg: tl.float64,
    KIND: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OVERLAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = logps_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    scale, cap = tl.full((), logit_scale, ACC), tl.full((), softcap, ACC)
    temp = _row_temperature(temperature_ptr, row, temperature, ACC)
    target = tl.load(target_ptr + row).to(tl.int32)
    peak, others, moment, z = _row_statistics(row_ptr, columns, target, bias_ptr, scale, cap, temp, ACC, SOFTCAP, BLOCK)
    peak, others, moment = _with_target(peak, others, moment, z)
    logps, lse, entropy = _closed(peak, others, moment, z)
    tl.store(logps_ptr + row, logps)
    tl.store(entropy_ptr + row, entropy)

    HAS_OLD: tl.constexpr = rows.old is not None
    HAS_REF: tl.constexpr = rows.ref is not None
    ENTROPY: tl.constexpr = rows.w_entropy is not None
    zero = tl.zeros((), ACC)
    old, ref, w_kl, advantage, w_policy, g_entropy = zero, zero, zero, zero, zero, zero
    if HAS_OLD:
        old = tl.load(rows.old + row)
    if HAS_REF:
        ref, w_kl = tl.load(rows.ref + row), tl.load(rows.w_kl + row)
    if rows.advantages is not None:
        advantage = tl.load(rows.advantages + row)
    if rows.w_policy is not None:
        w_policy = tl.load(rows.w_policy + row)
    if ENTROPY:
        g_entropy = tl.load(rows.w_entropy + row)
    g = policy_coefficient(
        logps, old, ref, advantage, w_policy, w_kl, tl.full((), epsilon_low, ACC), tl.full((), epsilon_high, ACC),
        tl.full((), delta, ACC), tl.full((), sapo_temperature_pos, ACC), tl.full((), sapo_temperature_neg, ACC),
        KIND, HAS_OLD, HAS_REF, BIAS_CORRECTION,
    )  # fmt: skip
    _write_row(row_ptr, out_ptr + row * out_stride, columns, target, lse, logps, entropy, g, g_entropy,
                    bias_ptr, scale, cap, temp, ACC, SOFTCAP, ENTROPY, FROM_LOGITS, OVERLAY, BLOCK)  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, scale_ptr, elements, BLOCK: tl.constexpr):
    """x *= scale, without touching x where scale is 1: a backward of the plain loss costs no pass over dW."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < elements, other=0.0)
        tl.store(x_ptr + at, (x.to(scale.dtype) * scale).to(x_ptr.dtype.element_ty), mask=at < elements)
