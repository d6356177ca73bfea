"""Time and peak memory over tokens and over the vocabulary, and their exponents.

Every point is a fresh process, on policy and dense; its one call is timed cold, after a tiny call. A provider whose last point took
long or much is not asked for the larger ones, and the row says so. Everybody is checked against float64 at the smallest point.
"""

import math
import statistics
from dataclasses import replace

from . import memory, record
from .measure import Effort, failure, measure, missing
from .workloads import WORKLOADS

TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
VOCABULARIES = (32_000, 65_536, 128_256, 262_144)
WORKLOAD = "onpolicy"
_LONGEST = 60.0  # seconds of a call behind which a doubled one is not asked for


def axes(shape):
    """(axis, shapes): tokens at the shape's head, vocabularies at its tokens."""
    return ("tokens", [shape.of(n) for n in TOKENS]), ("vocab", [replace(shape, vocab=v) for v in VOCABULARIES])


def sweep(providers, over, clock, say):
    """Rows of kind `scaling`, one per point, and of kind `exponent`, one per provider and axis. ``over`` is what `axes` returns."""
    smallest = min((one for _, shapes in over for one in shapes), key=lambda one: one.tokens * one.vocab)
    checked = measure(smallest, WORKLOADS[WORKLOAD], providers, clock, Effort(1, memory=False), say)
    rows = [r | {"kind": "scaling"} for r in checked if r["status"] != "ok"]
    bad = {r["provider"] for r in rows}
    for axis, shapes in over:
        for provider in (p for p in providers if p.name not in bad):
            points = []
            for one in shapes:
                say(f"scaling over {axis}: {provider.name} {one}")
                points.append(_point(provider, one, points, clock))
            rows += [*points, exponents(provider.name, axis, points)]
    return rows


def _point(provider, shape, before, clock):
    """A row; ``before`` holds those of the smaller points."""
    status, note, found = "absent", None, {}
    needed = shape.vocab * (10 * shape.depth + provider.logits * shape.tokens)
    if before:
        last = before[-1]
        grown = shape.tokens * shape.vocab / (last["shape"]["tokens"] * last["shape"]["vocab"])
        if last["median"] is None:
            note = "a smaller point was not measured"
        elif last["median"] * grown > _LONGEST:
            note = f"would take more than {_LONGEST:.0f} s"
        elif last["peak_bytes"]:  # better than a guess
            needed = last["data_bytes"] + last["peak_bytes"] * grown
    note = note or missing(clock, needed)
    if not note:
        try:
            found, status = memory.in_fresh_process(provider.name, WORKLOAD, shape, 3 * _LONGEST), "ok"
        except memory.PointError as error:
            status, note = failure(error)
    times = [found["cold_seconds"]] if found else ()
    return record.row(provider.name, WORKLOAD, shape, times, kind="scaling", status=status, note=note, **found)


def exponents(name, axis, points):
    """Slopes on log axes: 1 is proportional, 0 is flat."""
    good = [p for p in points if p["median"] is not None and p["peak_bytes"] is not None]
    time, peak = (slope([p["shape"][axis] for p in good], [p[key] for p in good]) for key in ("median", "peak_bytes"))
    found = {"axis": axis, "points": len(good), "time_exponent": time, "memory_exponent": peak}
    return record.row(name, WORKLOAD, good[0]["shape"] if good else None, kind="exponent", **found)


def slope(x, y):
    """Of the least-squares line through (log x, log y); None without two different x, or with a y that is not positive."""
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
