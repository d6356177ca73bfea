"""The inputs of the row kernels over two tiles: logits of a student and of a teacher, over the same rows and columns.

p = softmax(z) of the student, q = softmax(y) of the teacher. A KL is a sum of terms of both signs, which cancel where p and q
agree; so it is summed over terms that have one sign. With bend(x) = exp(-x) - 1 + x >= 0, for any eta and x = log(p / q) + eta,

    KL(p || q) = sum p log(p / q) = sum p bend(x) - bend(eta),        eta = -log(1 + sum p (exp(-x) - 1))

The running sums take x = (z - max z) - (y - max y): exp(z - max z) exp(-x) is then exp(y - max y), an exponential that is there
already. KL(q || p) is the same with the two exchanged. The divergence of Jensen and Shannon is no such sum before eta is known: it
takes a walk of its own behind the first.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .statistics import Scored, Tile, check, check_vector, finalize, merged, new_statistics, require

KINDS = ("forward_kl", "reverse_kl", "jsd")
NEAR = 0.125  # |x| below which bend is a series
_TERMS = {torch.float32: 5, torch.float64: 10}  # of it, up to 1e-8 and 1e-16 of the sum


@dataclass(frozen=True)
class DivergenceKind:
    """``forward_kl`` KL(q || p), ``reverse_kl`` KL(p || q), ``jsd`` beta KL(q || m) + (1 - beta) KL(p || m)."""

    kind: str
    beta: float = 0.5  # of jsd, in (0, 1): m = (1 - beta) p + beta q


class Compared(NamedTuple):
    """What is known of rows of both once all of their columns were seen, [R] acc each."""

    gap: torch.Tensor  # lse of the student - lse of the teacher: log p - log q = z - y - gap
    own: torch.Tensor  # what the gradient subtracts: KL(p || q) for reverse_kl, KL(p || m) for jsd; unused for forward_kl
    value: torch.Tensor  # the divergence


def new_comparison(rows, dtype, device):
    """[R, 8] statistics of nothing.

    The student's four (`statistics.new_statistics`); the teacher's max y and sum of exp(y - max y); the sums of weight x and of
    weight bend(x). weight = exp(z - max z), x = (z - max z) - (y - max y); for forward_kl z and y are exchanged in both.
    """
    stats = torch.zeros(rows, 8, dtype=dtype, device=device)
    stats[:, :4] = new_statistics(rows, dtype, device)
    stats[:, 4] = -float("inf")
    return stats


def bend(x, weight, other):
    """weight (exp(-x) - 1 + x), given other = weight exp(-x): not by its cancelling terms near 0; other where the weight is 0."""
    series = torch.zeros_like(x)
    for n in reversed(range(_TERMS[x.dtype])):
        series = 1 / math.factorial(n + 2) - series * x
    found = torch.where(x.abs() < NEAR, weight * x * x * series, other - weight + weight * x)
    return found.where(weight != 0, other)


def merged_comparisons(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    """[R, 8] statistics of two sets of columns without a common one -> those of both."""
    student, peak = merged(a[:, :4], b[:, :4]), torch.maximum(a[:, 4], b[:, 4])
    total, tilt, bent = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
    for part in (a, b):
        drops = _drop(part[:, 0], student[:, 0]), _drop(part[:, 4], peak)
        sums = _total(part), part[:, 5]
        total = total + sums[1] * drops[1].exp()
        (drop, other_drop), weight = (drops[::-1], sums[1]) if kind == "forward_kl" else (drops, sums[0])
        factor, other, some = drop.exp(), other_drop.exp(), weight != 0
        t = (drop - other_drop).where(some, 0.0)  # what is added to x
        # bend(x + t) exp(-drop of x's weight) = bend(x) exp(-t) + bend(t) + x (1 - exp(-t))
        bent_t, slant = bend(t, factor, other), (factor * t).where(factor != 0, 0.0)
        tilt = tilt + factor * part[:, 6] + slant * weight
        moved = other * part[:, 7] + bent_t * weight - (bent_t - slant) * part[:, 6]
        moved = torch.where(some, moved, (other * part[:, 7]).where(part[:, 7] != 0, 0.0))
        bent = bent + torch.where(part[:, 7].isinf(), part[:, 7], moved)
    return torch.cat([student, torch.stack([peak, total, tilt, bent], 1)], 1)


def compare(stats: torch.Tensor, kind: str) -> tuple[Scored, Compared]:
    """[R, 8] statistics -> what is known of the rows; for jsd without ``own`` and ``value``, which `jensen_shannon` sums."""
    wide = stats.double()
    peak, teacher_peak, weight, other = wide[:, 0], wide[:, 4], _total(wide), wide[:, 5]
    sign = 1.0
    if kind == "forward_kl":
        weight, other, sign = other, weight, -1.0
    tilt, bent = wide[:, 6], wide[:, 7]
    difference = (bent - tilt) / weight  # sum of p (exp(-x) - 1)
    near = bent < 0.5 * weight  # or both sums may be far larger than their difference
    eta = torch.where(near, -torch.log1p(difference), (weight / other).log())
    value = torch.where(near, bent / weight - bend(eta, torch.ones_like(eta), (-eta).exp()), tilt / weight - eta)
    value = torch.where(bent.isinf(), bent, value.clamp(min=0))
    gap = peak - teacher_peak + sign * eta
    value, gap = value.to(stats.dtype), gap.to(stats.dtype)
    return finalize(stats[:, :4]), Compared(gap, value, value)


def mixed(stats, scored: Scored, compared: Compared, sums, beta) -> Compared:
    """`Compared` of jsd, from what `jensen_shannon` summed.

    Its p = exp(z - lse) and q = exp(y - (lse - gap)) add up to 1 but for the rounding of lse and of lse - gap; divided by what they
    add up to, the terms of a row's gradient add up to 0.
    """
    wide = stats.double()
    peaks, totals, rounded = (wide[:, 0], wide[:, 4]), (_total(wide), wide[:, 5]), (scored.lse, scored.lse - compared.gap)
    of_p, of_q = (torch.exp(lse.double() - peak) / total for peak, total, lse in zip(peaks, totals, rounded, strict=True))
    raw, value = sums.double().unbind(1)
    own = raw * of_p
    value = (1 - beta) * own + (value - (1 - beta) * raw) * of_q
    return Compared(compared.gap, own.to(sums.dtype), value.to(sums.dtype))


def check_both(student: Tile, teacher: Tile, results: dict, out: torch.Tensor | None = None, stats=None, sums=None, **tensors):
    """Raises AssertionError as `statistics.check` does. ``stats`` [R, 8], ``sums`` [R, 2], ``tensors`` [R] acc."""
    values = student.values
    check(student, results, out, **tensors)
    check(teacher, results)
    alike = all(getattr(teacher.values, name) == getattr(values, name) for name in ("shape", "dtype", "device"))
    require(alike, "both tiles must have one shape, dtype and device")
    same = (student.temperature is None) == (teacher.temperature is None)
    require(same and student.ranges is teacher.ranges, "both tiles must have the same temperature and ranges")
    rows = len(student.target)
    acc = torch.float64 if values.dtype == torch.float64 else torch.float32
    for name, x, columns in (("stats", stats, 8), ("sums", sums, 2)):
        if x is not None:
            check_vector(name, x, (rows, columns), acc, values.device)


def _drop(own, peak):
    """own - peak, -inf of nothing."""
    return (own - peak).where(own != -float("inf"), -float("inf"))


def _total(stats):
    """Sum of exp(z - max z) over all columns."""
    return stats[:, 1] + torch.exp(stats[:, 3] - stats[:, 0].where(stats[:, 0] != -float("inf"), 0.0))
