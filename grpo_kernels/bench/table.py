"""Rows -> text: wins and losses alike, and everybody who was left out, with the reason."""

import torch

from .providers import OURS, PRODUCTS
from .shapes import named
from .workloads import WORKLOADS, over_the_vocabulary

_COLUMNS = (("median ms", 10), ("spread", 8), ("x products", 10), ("[rounds]", 13), ("x ours", 7), ("first ms", 9), ("peak MiB", 9))
_LEGEND = (
    "",
    "spread: interquartile range of the rounds. x products: median over rounds of the time over the bare products' in it,",
    "[lowest highest]. x ours: over our median. first: in a fresh process. peak: above the inputs, gradients included. error: the",
    "largest relative one of loss and gradients against float64; of log-probs alone, in nats. Wide ranges: the machine is busy.",
)


def table(rows):
    """Lines: what was measured on what, a block per shape and workload, then what else there is, a line a row."""
    if not rows:
        return
    r = rows[0]
    yield f"{r['device']}; {r['cpu']}, {r['threads']} threads; commit {r['commit']}"
    yield ", ".join(f"{name} {v}" for name, v in r["versions"].items())
    blocks, steps = {}, []
    for r in rows:
        if (kind := r.get("kind", "loss")) == "loss":
            blocks.setdefault((named(r["shape"]), r["path"]), []).append(r)
        elif kind == "step":
            steps.append(r)
        else:
            yield _line(r).rstrip()
    for (shape, path), block in blocks.items():
        yield from _block(f"{path}: {shape}", block)
        yield from _beside_the_vocabulary(block, blocks.get((shape, over_the_vocabulary(path)), ()))
    if blocks:
        yield from _LEGEND
    if steps:
        yield from _steps(steps)


def _block(title, rows):
    first = rows[0]
    yield f"\n{title}" + (f", {first['kept']} kept, {first['live']} trained" if "kept" in first else "")
    yield f"  {'provider':20}" + " ".join(f"{name:>{width}}" for name, width in _COLUMNS) + "  error"
    timed = sorted((r for r in rows if r["status"] == "ok"), key=lambda r: r["median"])
    ours = next((r for r in timed if r["provider"] == OURS), None)
    for r in timed:
        span = r.get("ratio_range")
        cells = (
            _cell(r["median"], "{:.1f}", 1e3), _cell(r["spread"], "{:.1f}", 1e3), _cell(r.get("ratio"), "{:.2f}"),
            "[{:.2f} {:.2f}]".format(*span) if span else "-", _cell(ours and r["median"] / ours["median"], "{:.2f}"),
            _cell(r.get("cold_seconds"), "{:.0f}", 1e3), _cell(r["peak_bytes"], "{:.0f}", 2**-20),
        )  # fmt: skip
        aligned = " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        note = _way(r["settings"]) if r["provider"] == PRODUCTS else r["note"]
        yield f"  {r['provider']:20}{aligned}  {_cell(r['error'], '{:.1e}')}" + (f"  ({note})" if note else "")
    for r in rows:
        if r["status"] != "ok":
            yield f"  {r['provider']:20}{_trouble(r)}"
    others = [r for r in timed if not r["provider"].startswith(OURS) and r["provider"] != PRODUCTS]
    for word, key in (("faster", "median"), ("faster in the first call", "cold_seconds"), ("smaller", "peak_bytes")):
        # said in words, so that a loss is as easy to see as a win
        names = [r["provider"] for r in others if ours and r.get(key) and ours.get(key) and r[key] < ours[key]]
        if names:
            yield f"  {word} than ours here: {', '.join(names)}"


def _beside_the_vocabulary(over_supports, whole):
    """Ours over supports beside ours without them, measured in the same run."""
    found = ([r for r in rows if r["provider"] == OURS and r["status"] == "ok"] for rows in (over_supports, whole))
    for ours, other in zip(*found, strict=False):
        beside = None if ours["peak_bytes"] is None else ours["peak_bytes"] - _gradients(ours)
        more = "" if beside is None else f"; peak less dH and dW {_cell(beside, '{:.1f}', 2**-20)} MiB"
        yield f"  ours is {other['median'] / ours['median']:.3g} x as fast as in {other['path']}{more}"


def _gradients(r):
    """Bytes of those that the workload asks for."""
    shape, asked = r["shape"], WORKLOADS[r["path"]]
    rows = asked.gradients * (shape["tokens"] + asked.trains_head * shape["vocab"])
    return rows * shape["depth"] * getattr(torch, shape["dtype"]).itemsize


def _way(settings):
    if "columns" not in settings:
        return None
    laid = ", dz^T contiguous" if settings["contiguous"] else ""
    return f"the fastest of {settings['ways']} ways: {settings['rows']} rows x {settings['columns']} columns{laid}"


def _line(r):
    start, median, peak = f"  {r['provider']:20}", r["median"], _cell(r["peak_bytes"], "{:.0f} MiB", 2**-20)
    if r["kind"] == "scaling":
        return f"{start} {named(r['shape']):32} {_cell(median, '{:.2f} s'):>10} {peak:>10}  {r['note'] or ''}"
    if r["kind"] == "exponent":
        axis, time, memory = r["axis"], _cell(r["time_exponent"], "{:.2f}"), _cell(r["memory_exponent"], "{:.2f}")
        return f"{start} over {axis:6}: seconds ~ {axis}^{time}, peak ~ {axis}^{memory}  ({r['points']} points)"
    # kinds that only the GPU's stages have; ``says`` is the row in words
    shape, median = "x".join(str(n) for n in (r["shape"] or {}).values()), _cell(median, "{:.3f} ms", 1e3)
    return f"{start} {r['path']:18} {shape:24} {median:>12} {r.get('says') or ''} {_trouble(r)}"


def _steps(rows):
    yield f"\n{'one optimiser step':20}{'tokens':>8}{'seconds':>9}{'x stock':>9}{'head':>7}{'peak MiB':>10}"
    stock = {r["shape"]["tokens"]: r["median"] for r in rows if r["provider"] == "trl stock" and r["shape"]}
    for r in rows:
        cells = ""
        if r["median"] is not None:
            tokens = r["shape"]["tokens"]
            base, share, peak = stock.get(tokens), _cell(r["head_share"], "{:.0%}"), _cell(r["peak_bytes"], "{:.0f}", 2**-20)
            cells = f"{tokens:8}{r['median']:9.2f}{_cell(base and r['median'] / base, '{:.2f}'):>9}{share:>7}{peak:>10}  "
        yield f"{r['provider']:20}{cells}{_trouble(r)}".rstrip()


def _trouble(r):
    return "" if r["status"] == "ok" else f"{r['status']}: {r['note'] or ''}"


def _cell(value, form, unit=1):
    return "-" if value is None else form.format(value * unit)
