"""Time and peak memory over tokens and over the vocabulary, and their exponents.

Every point is a fresh process, on policy and dense; its one call is timed cold, after a tiny call. A provider whose last point took
long or much is not asked for the larger ones, and the row says so. Everybody is checked against float64 at the smallest point.
"""

import math
from dataclasses import replace

from . import memory, record
from .measure import checked, find_truth
from .peers import Absent
from .problem import make_problem
from .workloads import WORKLOADS

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
VOCABULARIES = (32_000, 65_536, 128_256, 262_144)
WORKLOAD = "onpolicy"
_LONGEST = 60.0  # seconds of a call behind which a doubled one is not asked for
_SHARE = 0.85


def axes(shape):
    """(axis, shapes): tokens at the shape's head, vocabularies at its tokens."""
    return ("tokens", [shape.of(n) for n in TOKENS]), ("vocab", [replace(shape, vocab=v) for v in VOCABULARIES])


def sweep(providers, over, clock, say, seconds=_LONGEST):
    """Rows of kind `scaling`, one per point, and of kind `exponent`, one per provider and axis. ``over`` is what `axes` returns."""
    smallest = min((one for _, shapes in over for one in shapes), key=lambda one: one.tokens * one.vocab)
    say(f"scaling: float64 reference of {smallest}")
    rows, able = _check(providers, smallest, clock)
    clock.recover()
    for axis, shapes in over:
        for provider in able:
            points = []
            for one in shapes:
                say(f"scaling over {axis}: {provider.name} {one}")
                points.append(_point(provider, one, points, clock, seconds))
            rows += [*points, exponents(provider.name, axis, points)]
    return rows


def _row(name, shape, times=(), kind="scaling", **fields):
    return record.row(name, WORKLOAD, shape, times, kind=kind, **fields)


def _check(providers, shape, clock):
    """(rows of who cannot or is wrong, the others)."""
    rows, able, problem = [], [], make_problem(shape, WORKLOADS[WORKLOAD], device=clock.device)
    known, why = find_truth(problem, clock, [])
    for provider in providers:
        try:
            if known is None:
                raise Absent(why)
            checked(provider, problem, known, {}, clock)
            able.append(provider)
        except Exception as error:
            status = {Absent: "absent", AssertionError: "wrong"}.get(type(error), "failed")
            rows.append(_row(provider.name, shape, status=status, note=str(error)[:300]))
    return rows, able


def _point(provider, shape, before, clock, seconds):
    absent = lambda note: _row(provider.name, shape, status="absent", note=note)  # noqa: E731
    needed = shape.vocab * (10 * shape.depth + provider.logits * shape.tokens)
    if before:
        last = before[-1]
        if last["median"] is None:
            return absent("a smaller point was not measured")
        grown = shape.tokens * shape.vocab / (last["shape"]["tokens"] * last["shape"]["vocab"])
        if last["median"] * grown > seconds:
            return absent(f"would take more than {seconds:.0f} s")
        if last["peak_bytes"]:  # better than a guess
            needed = last["data_bytes"] + last["peak_bytes"] * grown
    free = clock.free()
    if free is not None and needed > _SHARE * free:
        return absent(f"takes some {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    try:
        found = memory.in_fresh_process(provider.name, WORKLOAD, shape, 3 * seconds)
    except memory.PointError as error:
        return _row(provider.name, shape, status="too slow" if isinstance(error, memory.TooLong) else "failed", note=str(error))
    return _row(provider.name, shape, [found["cold_seconds"]], **found)


def exponents(name, axis, points):
    """Slopes on log axes: 1 is proportional, 0 is flat."""
    good = [p for p in points if p["median"] is not None and p["peak_bytes"] is not None]
    x = [p["shape"][axis] for p in good]
    time, peak = (slope(x, [p[key] for p in good]) for key in ("median", "peak_bytes"))
    shape = good[0]["shape"] if good else None
    return _row(name, shape, kind="exponent", axis=axis, points=len(good), time_exponent=time, memory_exponent=peak)


def slope(x, y):
    """Of the least-squares line through (log x, log y); None without two different x, or with a y that is not positive."""
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / sum((p - mean_a) ** 2 for p in a)
