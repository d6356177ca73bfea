"""Time and peak memory over tokens and over the vocabulary, their exponents, and the most tokens that fit a memory.

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
_LONGEST = 200.0  # seconds of a call behind which a doubled one is not asked for
_SHARE = 0.85


def axes(shape):
    """(axis, shapes): tokens at the shape's head, vocabularies at its tokens."""
    return (
        ("tokens", [shape.of(n) for n in TOKENS]),
        ("vocab", [replace(shape, vocab=v) for v in VOCABULARIES]),
    )


def sweep(providers, shape, clock, progress, seconds=_LONGEST, only=None):
    """Rows of kind `scaling`, one per point, and of kind `exponent`, one per provider and axis."""
    rows, able = [], []
    axes_of = only or axes(shape)
    smallest = min((one for _, shapes in axes_of for one in shapes), key=lambda one: one.tokens * one.vocab)
    problem = make_problem(smallest, WORKLOADS[WORKLOAD], device=clock.device)
    progress.say(f"scaling: float64 reference of {smallest}")
    known, why = find_truth(problem, clock)
    for provider in providers:
        try:
            if known is None:
                raise Absent(why)
            checked(provider, problem, known, {})
            able.append(provider)
        except Exception as error:
            status = {Absent: "absent", AssertionError: "wrong"}.get(type(error), "failed")
            rows.append(record.row(provider.name, WORKLOAD, smallest, status=status, note=str(error)[:300], kind="scaling"))
    del problem, known
    clock.recover()
    progress.more(len(able) * sum(len(shapes) for _, shapes in axes_of))
    for axis, shapes in axes_of:
        for provider in able:
            points = []
            for one in shapes:
                progress.say(f"scaling over {axis}: {provider.name} {one}")
                points.append(_point(provider, one, points, clock, seconds))
                progress.step()
            rows += [*points, exponents(provider.name, axis, points)]
    return rows


def _point(provider, shape, before, clock, seconds):
    about = {"kind": "scaling"}
    last = before[-1] if before else None
    if last is not None and last["median"] is None:
        return record.row(provider.name, WORKLOAD, shape, status="absent", note="a smaller point was not measured", **about)
    if last is not None:
        grown = shape.tokens * shape.vocab / (last["shape"]["tokens"] * last["shape"]["vocab"])
        if last["median"] * grown > seconds:
            note = f"would take more than {seconds:.0f} s"
            return record.row(provider.name, WORKLOAD, shape, status="absent", note=note, **about)
    needed = shape.vocab * (3 * 2 * shape.depth + 4 * shape.depth + provider.logits * shape.tokens)
    if last is not None and last["peak_bytes"]:  # better than a guess
        needed = last["data_bytes"] + last["peak_bytes"] * grown
    free = clock.free()
    if free is not None and needed > _SHARE * free:
        note = f"takes some {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return record.row(provider.name, WORKLOAD, shape, status="absent", note=note, **about)
    try:
        found = memory.in_fresh_process(provider.name, WORKLOAD, shape, 3 * seconds)
    except memory.PointError as error:
        status = "too slow" if isinstance(error, memory.TooLong) else "failed"
        return record.row(provider.name, WORKLOAD, shape, status=status, note=str(error), **about)
    return record.row(provider.name, WORKLOAD, shape, [found["cold_seconds"]], **about, **found)


def exponents(name, axis, points):
    """Slopes on log axes: 1 is proportional, 0 is flat."""
    good = [p for p in points if p["median"] is not None and p["peak_bytes"] is not None]
    x = [p["shape"][axis] for p in good]
    shape = good[0]["shape"] if good else None
    return record.row(
        name, WORKLOAD, shape, kind="exponent", axis=axis, points=len(good),
        time_exponent=slope(x, [p["median"] for p in good]), memory_exponent=slope(x, [p["peak_bytes"] for p in good]),
    )  # fmt: skip


def slope(x, y):
    """Of the least-squares line through (log x, log y); None without two different x, or with a y that is not positive."""
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / sum((p - mean_a) ** 2 for p in a)


def largest(name, points, gib):
    """The most tokens whose peak is within ``gib`` GiB, on the line through the two largest points on either side of it."""
    limit = gib * 2**30
    good = [(p["shape"]["tokens"], p["peak_bytes"]) for p in points if p["peak_bytes"] is not None]
    shape = points[0]["shape"] if points else None
    about = {"kind": "fit", "memory_gib": gib}
    if not good:
        return record.row(name, WORKLOAD, shape, status="absent", note="no point was measured", largest=None, **about)
    if good[0][1] > limit:
        return record.row(name, WORKLOAD, shape, note=f"{good[0][0]} tokens already take more", largest=None, **about)
    over = next((i for i, (_, peak) in enumerate(good) if peak > limit), None)
    if over is None and len(good) < 2:
        return record.row(name, WORKLOAD, shape, note="at least: no larger point was measured", largest=good[-1][0], **about)
    if over is None and _flat(good):
        return record.row(name, WORKLOAD, shape, note="and more: the peak does not grow", largest=good[-1][0], **about)
    (n0, m0), (n1, m1) = good[over - 1 : over + 1] if over else good[-2:]
    tokens = int(n0 + (n1 - n0) * (limit - m0) / max(1, m1 - m0))
    note = "between two measured points" if over else "by the line through the two largest points"
    return record.row(name, WORKLOAD, shape, note=note, largest=tokens, **about)


def _flat(good):
    """Grows by less than a twentieth while the tokens double: what malloc and oneDNN move by themselves."""
    (_, before), (_, last) = good[-2:]
    return last < 1.05 * before
