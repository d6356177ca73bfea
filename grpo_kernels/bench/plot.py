"""Rows -> light SVG pictures: time against the floor, memory against tokens."""

import statistics
from pathlib import Path

from ..extras import needs
from .providers import OURS, PRODUCTS, PROVIDERS
from .shapes import named

_INK, _GRID, _OWN = "#333333", "#e6e6e6", "#1f5fa8"
_OTHERS = ("#8c8c8c", "#d1902f", "#c4503c", "#5f9a5f", "#8a6fb5", "#3f8fa5", "#a5793f", "#d070a0")
_MARKERS = "sD^vP"  # with the colours as many looks as there are providers, and more
_ORDER = sorted(PROVIDERS, key=lambda name: name.startswith(OURS) or name == PRODUCTS)  # the others first: each has its colour


def plot(rows, folder) -> list[Path]:
    """Writes what the rows have data for into ``folder``; returns the files."""
    with needs("bench", "bench --plot"):
        import matplotlib
        from matplotlib.figure import Figure

    good = [r for r in rows if r["status"] == "ok" and r["provider"] != PRODUCTS]
    pictures = {
        "time": (_time, [r for r in good if r.get("kind", "loss") == "loss" and r["ratio"]]),
        "memory": (_memory, [r for r in good if r.get("kind") == "scaling" and (r["peak_bytes"] or 0) > 0]),
    }
    files = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    # the same rows give the same bytes, and text stays text
    with matplotlib.rc_context({"font.size": 10.5, "svg.fonttype": "none", "svg.hashsalt": "grpo", "axes.edgecolor": "#999999"}):
        for name, (draw, chosen) in pictures.items():
            if chosen:
                figure = Figure(figsize=(8, 4.2), layout="constrained")
                axis = figure.subplots()
                axis.spines[["top", "right"]].set_visible(False)
                axis.set_axisbelow(True)
                draw(axis, chosen)
                files.append(Path(folder, f"{name}.svg"))
                figure.savefig(files[-1], metadata={"Date": None})
    return files


def _time(axis, rows):
    """Medians over the workloads of the shape that most rows have, with the range of the rounds."""
    shape, rows = _most(rows, lambda r: named(r["shape"]))
    paths, names = list(dict.fromkeys(r["path"] for r in rows)), _names(rows)
    for i, name in enumerate(names):
        own = [r for r in rows if r["provider"] == name]
        at = [paths.index(r["path"]) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for r in own]
        bars = [[r["ratio"] - r["ratio_range"][0] for r in own], [r["ratio_range"][1] - r["ratio"] for r in own]]
        colour, marker = _look(name)
        axis.errorbar(at, [r["ratio"] for r in own], bars, fmt=marker, label=name, color=colour, markersize=6, elinewidth=1)
    for j in range(1, len(paths)):
        axis.axvline(j - 0.5, color=_GRID, linewidth=0.8)
    axis.set(xticks=range(len(paths)), xticklabels=paths, ylabel="time / bare matrix products", yscale="log")
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.axhline(1, color=_INK, linewidth=1, linestyle="--")
    axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(f"Time against the floor: {shape}", loc="left")


def _memory(axis, rows):
    """Over tokens, at the head that was swept most."""
    (depth, vocab), rows = _most(rows, lambda r: (r["shape"]["depth"], r["shape"]["vocab"]))
    for name in _names(rows):
        points = sorted({r["shape"]["tokens"]: r["peak_bytes"] / 2**30 for r in rows if r["provider"] == name}.items())
        colour, marker = _look(name)
        axis.plot(*zip(*points, strict=True), marker + "-", color=colour, label=name)
    axis.set(xlabel="tokens", ylabel="peak memory above the inputs, GiB")
    axis.loglog(base=2)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(lambda x, _: f"{x:g}")
    axis.grid(color=_GRID, linewidth=0.8)
    axis.legend(frameon=False)
    axis.set_title(f"Memory against tokens: D {depth}, V {vocab}, {rows[0]['path']}", loc="left")


def _most(rows, key):
    """(the commonest key, its rows)."""
    keys = [key(r) for r in rows]
    common = statistics.mode(keys)
    return common, [r for r in rows if key(r) == common]


def _names(rows):
    return sorted(dict.fromkeys(r["provider"] for r in rows), key=lambda name: not name.startswith(OURS))


def _look(name):
    """(colour, marker), the same in every picture."""
    if name == OURS:
        return _OWN, "o"
    i = _ORDER.index(name) if name in _ORDER else len(_ORDER)  # one of an older record
    return _OTHERS[i % len(_OTHERS)], _MARKERS[i % len(_MARKERS)]
