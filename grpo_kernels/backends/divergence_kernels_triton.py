"""The row kernels over two tiles in Triton, a student's and a teacher's logits; `comparison.py` says what is summed and why.

    divergence_statistics   one read of both tiles
    jensen_shannon          one read of both
    divergence_gradient     one read of both and one write

One program owns a row; arithmetic in float32 (float64 for float64 tiles). Per column: two exp, and a quarter of one for the running
maxima, which every thread keeps for itself, so that a step exchanges nothing; for the divergence of Jensen and Shannon a third exp
and a logarithm.

The kernels are launched without contraction of products and sums. Where z and y are equal, z - y must be 0; it is not where one of
two equal products is rounded and the other one goes into a fused operation. What is fused is written so.

Each kernel makes the two `Transform`s itself: up to Triton 3.6 a function cannot return what holds None.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import comparison
from .comparison import KINDS, Compared
from .row_kernels_triton import (
    _LOWEST,
    Statistics,
    Transform,
    _against,
    _exp,
    _expm1,
    _finite,
    _merged,
    _row_at,
    _row_temperature,
    _score_slope,
    _statistics_at,
    _transformed,
    _write_zeros,
)
from .statistics import Scored

FORWARD_KL, REVERSE_KL, JSD = (tl.constexpr(KINDS.index(kind)) for kind in ("forward_kl", "reverse_kl", "jsd"))
_NEAR = tl.constexpr(comparison.NEAR)


class Biases(NamedTuple):
    """[C] acc or None each."""

    student: object
    teacher: object


class Gradients(NamedTuple):
    """Of a loss, pointers to acc [R]; the last two may be None."""

    divergence: object
    logps: object
    entropy: object


class Comparison(NamedTuple):
    """What the statistics of a set of columns hold beside the student's; see `comparison.new_comparison`."""

    peak: object  # max of the teacher's
    sum: object  # of exp(y - max y)
    tilt: object  # sum of weight x
    bent: object  # sum of weight bend(x)


@triton.jit
def _bend_series(x, TERMS: tl.constexpr):
    """(exp(-x) - 1 + x) / x^2 near 0."""
    INVERSE_FACTORIALS = (
        1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800,
        1 / 479001600, 1 / 6227020800, 1 / 87178291200, 1 / 1307674368000,
    )  # fmt: skip
    series = tl.full(x.shape, INVERSE_FACTORIALS[TERMS - 1], x.dtype)
    for k in tl.static_range(TERMS - 1):
        series = tl.fma(series, -x, tl.full(x.shape, INVERSE_FACTORIALS[TERMS - 2 - k], x.dtype))
    return series


@triton.jit
def _bend(x, weight, other):
    """(weight x, weight bend(x)), given other = weight exp(-x); (0, other) where the weight is 0, whatever x is."""
    TERMS: tl.constexpr = 10 if x.dtype == tl.float64 else 5
    tilted = tl.where(weight != 0.0, weight * x, 0.0)
    return tilted, tl.where(tl.abs(x) < _NEAR, tilted * x * _bend_series(x, TERMS), other - weight + tilted)


@triton.jit
def _beside(peak, seen, c, new_peak, new_teacher_peak, FORWARD: tl.constexpr):
    """A Comparison of columns with this maximum and sum of exp of the student's, restated beside maxima no less than theirs."""
    drop, teacher_drop = peak - _finite(new_peak), c.peak - _finite(new_teacher_peak)
    factor, teacher_factor = _exp(drop), _exp(teacher_drop)
    t = drop - teacher_drop  # what is added to x
    if FORWARD:
        own, other, weight = teacher_factor, factor, c.sum
        t = -t
    else:
        own, other, weight = factor, teacher_factor, seen
    slant, bent_t = _bend(t, own, other)
    # bend(x + t) = bend(x) exp(-t) + bend(t) + x (1 - exp(-t))
    bent = tl.fma(other, c.bent, tl.fma(bent_t, weight, (slant - bent_t) * c.tilt))
    bent = tl.where(c.bent == float("inf"), c.bent, bent)
    return Comparison(new_teacher_peak, teacher_factor * c.sum, tl.fma(own, c.tilt, slant * weight), bent)


@triton.jit
def _merged_comparisons(a, of_a, b, of_b, FORWARD: tl.constexpr):
    """(Statistics, Comparison) of two sets of columns without a common one."""
    merged, peak = _merged(a, b), tl.maximum(of_a.peak, of_b.peak)
    seen_a, seen_b = a.others + _exp(a.target - _finite(a.peak)), b.others + _exp(b.target - _finite(b.peak))
    of_a = _beside(a.peak, seen_a, of_a, merged.peak, peak, FORWARD)
    of_b = _beside(b.peak, seen_b, of_b, merged.peak, peak, FORWARD)
    return merged, Comparison(peak, of_a.sum + of_b.sum, of_a.tilt + of_b.tilt, of_a.bent + of_b.bent)


@triton.jit
def _logits(x, t, start, end, transform, teacher_transform, BLOCK: tl.constexpr):
    """(z, derivative of its softcap, y) of a block; -inf behind the end."""
    columns = start + tl.arange(0, BLOCK)
    z, slope = _transformed(x, columns, end, transform)
    y, _ = _transformed(t, columns, end, teacher_transform)
    if end is not None:
        z, y = tl.where(columns < end, z, float("-inf")), tl.where(columns < end, y, float("-inf"))
    return z, slope, y


@triton.jit
def _of_lanes(x, LANES: tl.constexpr, LOAD: tl.constexpr):
    """[BLOCK] -> [.., LANES, LOAD]: what a thread has loaded is one lane's."""
    return tl.reshape(x, (x.shape[0] // (LANES * LOAD), LANES, LOAD))


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _compare(x, t, start, end, target, peak, others, moment, c, transform, teacher_transform,
             FORWARD: tl.constexpr, LANES: tl.constexpr, LOAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block folded into (peak, others, moment, Comparison) of every lane, without the target's column."""
    z, _, y = _logits(x, t, start, end, transform, teacher_transform, BLOCK)
    if (target >= start) & (target < start + BLOCK):
        here = start + tl.arange(0, BLOCK) == target
        z, y = tl.where(here, float("-inf"), z), tl.where(here, float("-inf"), y)
    z, y = _of_lanes(z, LANES, LOAD), _of_lanes(y, LANES, LOAD)
    new_peak, teacher_peak = tl.maximum(peak, tl.max(tl.max(z, 2), 0)), tl.maximum(c.peak, tl.max(tl.max(y, 2), 0))
    c = _beside(peak, others, c, new_peak, teacher_peak, FORWARD)
    others, moment = _against(peak, others, moment, others, new_peak)
    a = z - tl.reshape(_finite(new_peak), (1, LANES, 1))
    b = y - tl.reshape(_finite(teacher_peak), (1, LANES, 1))
    e, f = _exp(a), _exp(b)
    if FORWARD:
        tilted, bent = _bend(b - a, f, e)
    else:
        tilted, bent = _bend(a - b, e, f)
    c = Comparison(teacher_peak, c.sum + _lane_sum(f), c.tilt + _lane_sum(tilted), c.bent + _lane_sum(bent))
    return new_peak, others + _lane_sum(e), moment + _lane_sum(tl.maximum(a, _LOWEST) * e), c


@triton.jit
def _row_comparison(row_ptr, teacher_ptr, columns, target, transform, teacher_transform,
                    FORWARD: tl.constexpr, LANES: tl.constexpr, LOAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(Statistics, Comparison) of a row."""
    lanes = tl.arange(0, BLOCK)
    nothing = tl.zeros((LANES,), transform.temperature.dtype)
    lowest = nothing + float("-inf")
    peak, others, moment, c = lowest, nothing, nothing, Comparison(lowest, nothing, nothing, nothing)
    full = columns // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x, t = tl.load(row_ptr + start + lanes), tl.load(teacher_ptr + start + lanes)
        peak, others, moment, c = _compare(x, t, start, None, target, peak, others, moment, c, transform, teacher_transform,
                                           FORWARD, LANES, LOAD, BLOCK)  # fmt: skip
    if full < columns:
        at, inside = full + lanes, full + lanes < columns
        x, t = tl.load(row_ptr + at, mask=inside, other=0.0), tl.load(teacher_ptr + at, mask=inside, other=0.0)
        peak, others, moment, c = _compare(x, t, full, columns, target, peak, others, moment, c, transform, teacher_transform,
                                           FORWARD, LANES, LOAD, BLOCK)  # fmt: skip
    row_peak, teacher_peak = tl.max(peak, 0), tl.max(c.peak, 0)
    c = _beside(peak, others, c, row_peak, teacher_peak, FORWARD)
    others, moment = _against(peak, others, moment, others, row_peak)
    row_others = tl.sum(others, 0)
    s = Statistics(row_peak, row_others, tl.sum(moment, 0), tl.full((), float("-inf"), row_peak.dtype), row_others)
    c = Comparison(teacher_peak, tl.sum(c.sum, 0), tl.sum(c.tilt, 0), tl.sum(c.bent, 0))

    here = (target >= 0) & (target < columns)
    at = tl.where(here, target, 0)
    z, _ = _transformed(tl.load(row_ptr + at, mask=here, other=0.0), at, None, transform)
    y, _ = _transformed(tl.load(teacher_ptr + at, mask=here, other=0.0), at, None, teacher_transform)
    z, y, zero = tl.where(here, z, float("-inf")), tl.where(here, y, float("-inf")), tl.zeros((), z.dtype)
    some, teacher_some = tl.where(z == float("-inf"), zero, 1.0), tl.where(y == float("-inf"), zero, 1.0)
    if FORWARD:
        weight, other = teacher_some, some
    else:
        weight, other = some, teacher_some
    bent = tl.where(weight == 0.0, other, tl.where(other == 0.0, float("inf"), zero))  # of one column, x is 0 or infinite
    return _merged_comparisons(s, c, Statistics(z, zero, zero, z, zero), Comparison(y, teacher_some, zero, bent), FORWARD)


@triton.jit
def _compared(z, y, lse, gap):
    """(p, q, log p - log q); the last is nan where both are 0."""
    return _exp(z - lse), _exp(y - (lse - gap)), (z - y) - gap


@triton.jit
def _to_mixture(d, beta):
    """(log p - log m, log q - log m) at d = log p - log q, m = (1 - beta) p + beta q. No argument of exp is positive."""
    TERMS: tl.constexpr = 14 if d.dtype == tl.float64 else 7  # of a < 0.5
    a = tl.abs(d)
    e = _exp(-a)
    below = d >= 0.0  # q is below p
    share, rest = tl.where(below, beta, 1.0 - beta), tl.where(below, 1.0 - beta, beta)
    # m is 1 - lost times the larger one of p and q; the difference of 1 - left and lost is what the rounding of left costs its log
    lost = share * tl.where(a < 0.5, tl.fma(-a * a, _bend_series(a, TERMS), a), 1.0 - e)
    left = tl.fma(share, e, rest)
    larger = -(tl.log(left) + ((1.0 - left) - lost))
    return tl.where(below, larger, larger + d), tl.where(below, larger - d, larger)


@triton.jit
def _add_jensen_shannon(x, t, start, end, own, value, lse, gap, beta, transform, teacher_transform,
                        LANES: tl.constexpr, LOAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    z, _, y = _logits(x, t, start, end, transform, teacher_transform, BLOCK)
    p, q, d = _compared(z, y, lse, gap)
    to_p, to_q = _to_mixture(d, beta)
    m = tl.fma(beta, q, (1.0 - beta) * p)
    _, bent_p = _bend(to_p, p, m)
    _, bent_q = _bend(to_q, q, m)
    bent = tl.fma(beta, bent_q, (1.0 - beta) * bent_p)
    own += _lane_sum(_of_lanes(tl.where(p == 0.0, 0.0, p * to_p), LANES, LOAD))
    return own, value + _lane_sum(_of_lanes(bent, LANES, LOAD))


@triton.jit
def _divergence_slope(z, y, lse, gap, own, beta, KIND: tl.constexpr):
    """d divergence / d z."""
    p, q, d = _compared(z, y, lse, gap)
    if KIND == FORWARD_KL:  # p - q = p (1 - exp(-d))
        tilted, bent = _bend(d, p, q)
        u = tl.where(tl.abs(d) < _NEAR, tilted - bent, p - q)
    elif KIND == REVERSE_KL:
        u = tl.where(p != 0.0, p * (d - own), 0.0)
    else:
        to_p, _ = _to_mixture(d, beta)
        u = tl.where(p != 0.0, (1.0 - beta) * p * (to_p - own), 0.0)
    return u


@triton.jit
def _divergence_block(x, t, start, end, target, at_target, scored, compared, g_divergence, g, g_entropy, beta,
                      transform, teacher_transform, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dz of a block; the gradients carry the factor logit_scale / temperature."""
    z, slope, y = _logits(x, t, start, end, transform, teacher_transform, BLOCK)
    u = _divergence_slope(z, y, scored.lse, compared.gap, compared.own, beta, KIND)
    result = tl.where(g_divergence != 0.0, g_divergence * u, 0.0)  # of a row without a gradient u may be anything
    if g is not None:
        result += _score_slope(z, start, target, at_target, scored, g, g_entropy, BLOCK)
    if transform.softcap is not None:
        result *= slope
    return result


@triton.jit(do_not_specialize_on_alignment=["stats_ptr", "target_ptr", "temperature_ptr", "ranges_ptr"])  # slices start anywhere
def divergence_statistics_kernel(
    student,  # Matrix of raw logits
    teacher,  # Matrix
    stats_ptr,  # [R, 8] acc, the fields of Statistics and Comparison
    target_ptr,  # [R] int64, relative to the first column
    biases,  # Biases
    temperature_ptr,  # [R] acc or None, of both
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    teacher_logit_scale: tl.float64,
    teacher_softcap: tl.float64,
    temperature: tl.float64,
    FORWARD: tl.constexpr,
    LANES: tl.constexpr,  # threads
    LOAD: tl.constexpr,  # elements that one of them loads at once
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ranges_ptr=None,  # [R, 2] int64: where the rows are behind the pointers of both
):
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 at 14k rows of 152k
    stats_ptr += row * 8
    temperature, scale = _row_temperature(temperature_ptr, row, temperature, ACC), tl.full((), logit_scale, ACC)
    teacher_scale = tl.full((), teacher_logit_scale, ACC)
    transform = Transform(biases.student, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    teacher_cap = tl.full((), teacher_softcap, ACC) if TEACHER_SOFTCAP else None
    teacher_transform = Transform(biases.teacher, teacher_scale, teacher_cap, temperature)
    target = tl.load(target_ptr + row).to(tl.int32)
    before = _statistics_at(stats_ptr, False)
    of_before = Comparison(tl.load(stats_ptr + 4), tl.load(stats_ptr + 5), tl.load(stats_ptr + 6), tl.load(stats_ptr + 7))
    teacher_ptr, _ = _row_at(teacher, row, ranges_ptr, columns)
    row_ptr, columns = _row_at(student, row, ranges_ptr, columns)
    found, of_found = _row_comparison(
        row_ptr, teacher_ptr, columns, target, transform, teacher_transform, FORWARD, LANES, LOAD, BLOCK
    )
    after, of_after = _merged_comparisons(before, of_before, found, of_found, FORWARD)
    tl.debug_barrier()  # every thread has read what the first ones overwrite now
    tl.store(stats_ptr, after.peak)
    tl.store(stats_ptr + 1, after.others)
    tl.store(stats_ptr + 2, after.moment)
    tl.store(stats_ptr + 3, after.target)
    tl.store(stats_ptr + 4, of_after.peak)
    tl.store(stats_ptr + 5, of_after.sum)
    tl.store(stats_ptr + 6, of_after.tilt)
    tl.store(stats_ptr + 7, of_after.bent)


@triton.jit(do_not_specialize_on_alignment=["lse_ptr", "gap_ptr", "sums_ptr", "temperature_ptr", "ranges_ptr"])
def jensen_shannon_kernel(
    student,  # Matrix of raw logits
    teacher,  # Matrix
    lse_ptr,  # [R] acc, of the student
    gap_ptr,  # [R] acc
    sums_ptr,  # [R, 2] acc: KL(p || m) and the divergence, added to
    biases,  # Biases
    temperature_ptr,  # [R] acc or None, of both
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    teacher_logit_scale: tl.float64,
    teacher_softcap: tl.float64,
    temperature: tl.float64,
    beta: tl.float64,
    LANES: tl.constexpr,  # threads
    LOAD: tl.constexpr,  # elements that one of them loads at once
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ranges_ptr=None,  # [R, 2] int64
):
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    sums_ptr += row * 2
    temperature, scale = _row_temperature(temperature_ptr, row, temperature, ACC), tl.full((), logit_scale, ACC)
    teacher_scale = tl.full((), teacher_logit_scale, ACC)
    transform = Transform(biases.student, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    teacher_cap = tl.full((), teacher_softcap, ACC) if TEACHER_SOFTCAP else None
    teacher_transform = Transform(biases.teacher, teacher_scale, teacher_cap, temperature)
    beta, lse, gap = tl.full((), beta, ACC), tl.load(lse_ptr + row), tl.load(gap_ptr + row)
    own_before, value_before = tl.load(sums_ptr), tl.load(sums_ptr + 1)
    teacher_ptr, _ = _row_at(teacher, row, ranges_ptr, columns)
    row_ptr, columns = _row_at(student, row, ranges_ptr, columns)
    lanes, own = tl.arange(0, BLOCK), tl.zeros((LANES,), ACC)
    value = own
    full = columns // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x, t = tl.load(row_ptr + start + lanes), tl.load(teacher_ptr + start + lanes)
        own, value = _add_jensen_shannon(x, t, start, None, own, value, lse, gap, beta, transform, teacher_transform,
                                         LANES, LOAD, BLOCK)  # fmt: skip
    if full < columns:
        at, inside = full + lanes, full + lanes < columns
        x, t = tl.load(row_ptr + at, mask=inside, other=0.0), tl.load(teacher_ptr + at, mask=inside, other=0.0)
        own, value = _add_jensen_shannon(x, t, full, columns, own, value, lse, gap, beta, transform, teacher_transform,
                                         LANES, LOAD, BLOCK)  # fmt: skip
    own_after, value_after = own_before + tl.sum(own, 0), value_before + tl.sum(value, 0)
    tl.debug_barrier()  # every thread has read what the first ones overwrite now
    tl.store(sums_ptr, own_after)
    tl.store(sums_ptr + 1, value_after)


@triton.jit(do_not_specialize_on_alignment=["scored", "compared", "gradients", "target_ptr", "temperature_ptr", "ranges_ptr"])
def divergence_gradient_kernel(
    student,  # Matrix of raw logits
    teacher,  # Matrix
    out,  # Matrix: the student's own memory, or other memory
    scored,  # Scored: [R] acc each, of the student
    compared,  # Compared: [R] acc each, but for value
    gradients,  # Gradients
    target_ptr,  # [R] int64, relative to the first column
    biases,  # Biases
    temperature_ptr,  # [R] acc or None, of both
    columns,
    logit_scale: tl.float64,
    softcap: tl.float64,
    teacher_logit_scale: tl.float64,
    teacher_softcap: tl.float64,
    temperature: tl.float64,
    beta: tl.float64,
    KIND: tl.constexpr,  # index into comparison.KINDS
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    ranges_ptr=None,  # [R, 2] int64
):
    ACC: tl.constexpr = scored.lse.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    temperature, scale = _row_temperature(temperature_ptr, row, temperature, ACC), tl.full((), logit_scale, ACC)
    teacher_scale = tl.full((), teacher_logit_scale, ACC)
    transform = Transform(biases.student, scale, tl.full((), softcap, ACC) if SOFTCAP else None, temperature)
    teacher_cap = tl.full((), teacher_softcap, ACC) if TEACHER_SOFTCAP else None
    teacher_transform = Transform(biases.teacher, teacher_scale, teacher_cap, temperature)
    beta, g_divergence, g, g_entropy = tl.full((), beta, ACC), tl.load(gradients.divergence + row), None, None
    idle = g_divergence == 0.0
    if gradients.logps is not None:
        g = tl.load(gradients.logps + row)
        idle = idle & (g == 0.0)
    if gradients.entropy is not None:
        g_entropy = tl.load(gradients.entropy + row)
        idle = idle & (g_entropy == 0.0)
        if g is None:
            g = tl.zeros((), ACC)
    out_ptr, _ = _row_at(out, row, ranges_ptr, columns)
    teacher_ptr, _ = _row_at(teacher, row, ranges_ptr, columns)
    row_ptr, columns = _row_at(student, row, ranges_ptr, columns)
    if idle:
        _write_zeros(out_ptr, columns, BLOCK)
    else:
        scores = Scored(tl.load(scored.logps + row), tl.load(scored.lse + row), tl.load(scored.entropy + row))
        known = Compared(tl.load(compared.gap + row), tl.load(compared.own + row), None)
        target = tl.load(target_ptr + row).to(tl.int32)
        factor, at_target = transform.logit_scale / transform.temperature, None
        g_divergence *= factor
        if g is not None:
            g *= factor
            at_target = -_expm1(scores.logps) * g
        if g_entropy is not None:
            g_entropy *= factor
        lanes = tl.arange(0, BLOCK)
        full = columns // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            x, t = tl.load(row_ptr + start + lanes), tl.load(teacher_ptr + start + lanes)
            result = _divergence_block(x, t, start, None, target, at_target, scores, known, g_divergence, g, g_entropy, beta,
                                       transform, teacher_transform, KIND, BLOCK)  # fmt: skip
            tl.store(out_ptr + start + lanes, result.to(out_ptr.dtype.element_ty))
        if full < columns:
            at, inside = full + lanes, full + lanes < columns
            x, t = tl.load(row_ptr + at, mask=inside, other=0.0), tl.load(teacher_ptr + at, mask=inside, other=0.0)
            result = _divergence_block(x, t, full, columns, target, at_target, scores, known, g_divergence, g, g_entropy, beta,
                                       transform, teacher_transform, KIND, BLOCK)  # fmt: skip
            tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=inside)
