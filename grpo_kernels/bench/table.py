"""Rows -> text: wins and losses alike, and everybody who was left out, with the reason."""

from .providers import OURS, PRODUCTS
from .shapes import named

_COLUMNS = (("median ms", 10), ("spread", 8), ("x products", 10), ("[rounds]", 13), ("x ours", 7), ("first ms", 9), ("peak MiB", 9))
_LEGEND = (
    "",
    "spread: interquartile range of the rounds. x products: median over rounds of the time over the bare products' in it,",
    "[lowest highest]. x ours: over our median. first: in a fresh process. peak: above the inputs, gradients included. error: the",
    "largest relative one of loss and gradients against float64; of log-probs alone, in nats. Wide ranges: the machine is busy.",
)


def table(rows):
    """Lines, one block per shape and workload."""
    blocks = {}
    for r in rows:
        if r.get("kind", "loss") == "loss":
            blocks.setdefault((named(r["shape"]), r["path"]), []).append(r)
    for (shape, path), block in blocks.items():
        first = block[0]
        counts = f", {first['kept']} kept, {first['live']} trained" if "kept" in first else ""
        yield f"\n{path}: {shape}{counts}"
        yield f"  {'provider':20}" + " ".join(f"{name:>{width}}" for name, width in _COLUMNS) + "  error"
        ours = next((r["median"] for r in block if r["provider"] == OURS), None)
        timed = [r for r in block if r["status"] == "ok"]
        for r in sorted(timed, key=lambda r: r["median"]):
            yield _line(r, ours)
        for r in block:
            if r["status"] != "ok":
                yield f"  {r['provider']:20}{r['status']}: {r['note']}"
        yield from _verdict(timed)
    if blocks:
        yield from _LEGEND


def _line(r, ours):
    span = r.get("ratio_range")
    cells = (
        _cell(r["median"], lambda x: f"{x * 1e3:.1f}"),
        _cell(r["spread"], lambda x: f"{x * 1e3:.1f}"),
        _cell(r.get("ratio"), lambda x: f"{x:.2f}"),
        _cell(span, lambda x: f"[{x[0]:.2f} {x[1]:.2f}]"),
        _cell(ours, lambda x: f"{r['median'] / x:.2f}"),
        _cell(r.get("cold_seconds"), lambda x: f"{x * 1e3:.0f}"),
        _cell(r["peak_bytes"], lambda x: f"{x / 2**20:.0f}"),
    )
    aligned = " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    notes = "; ".join(filter(None, (r.get("note"), r.get("peak_note"))))
    return f"  {r['provider']:20}{aligned}  {_cell(r['error'], lambda x: f'{x:.1e}')}" + (f"  ({notes})" if notes else "")


def _verdict(timed):
    """Who was faster, or smaller, than ours: said in words, so that a loss is as easy to see as a win."""
    ours = next((r for r in timed if r["provider"] == OURS), None)
    if ours is None:
        return
    others = [r for r in timed if not r["provider"].startswith(OURS) and r["provider"] != PRODUCTS]
    for word, key in (("faster", "median"), ("faster in the first call", "cold_seconds"), ("smaller", "peak_bytes")):
        names = [r["provider"] for r in others if None not in (r.get(key), ours.get(key)) and r[key] < ours[key]]
        if names:
            yield f"  {word} than ours here: {', '.join(names)}"


def scaling_table(rows):
    """Lines: points and the fitted exponents."""
    rows = [r for r in rows if r.get("kind") in ("scaling", "exponent", "fit")]
    for r in rows:
        if r["kind"] == "exponent":
            yield (f"  {r['provider']:20} over {r['axis']:6}: seconds ~ {r['axis']}^{_cell(r['time_exponent'], '{:.2f}'.format)}, "
                   f"peak ~ {r['axis']}^{_cell(r['memory_exponent'], '{:.2f}'.format)}  ({r['points']} points)")  # fmt: skip
        elif r["kind"] == "fit":
            yield f"  {r['provider']:20} within {r['memory_gib']:g} GiB: {_cell(r['largest'], '{} tokens'.format)}  ({r['note']})"
        else:
            seconds, peak = _cell(r["median"], "{:.2f} s".format), _cell(r["peak_bytes"], lambda x: f"{x / 2**20:.0f} MiB")
            yield f"  {r['provider']:20} {named(r['shape']):32} {seconds:>10} {peak:>10}  {r['note'] or ''}".rstrip()


def step_table(rows):
    rows = [r for r in rows if r.get("kind") == "step"]
    if rows:
        yield f"\n{'one optimiser step':20}{'tokens':>8}{'seconds':>9}{'x stock':>9}{'head':>7}{'peak MiB':>10}"
    stock = {r["shape"]["tokens"]: r["median"] for r in rows if r["provider"] == "trl stock" and r["shape"]}
    for r in rows:
        base = stock.get(r["shape"]["tokens"] if r["shape"] else None)
        if r["median"] is None:
            yield f"{r['provider']:20}{r['status']}: {r['note']}"
            continue
        ratio = "-" if base is None else f"{r['median'] / base:.2f}"
        yield (f"{r['provider']:20}{r['shape']['tokens']:8}{r['median']:9.2f}{ratio:>9}"
               f"{_cell(r['head_share'], '{:.0%}'.format):>7}{_cell(r['peak_bytes'], lambda x: f'{x / 2**20:.0f}'):>10}"
               + (f"  {r['status']}: {r['note']}" if r["status"] != "ok" else ""))  # fmt: skip


def _cell(value, form):
    return "-" if value is None else form(value)
