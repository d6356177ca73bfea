"""Rows -> light SVG pictures: time against the floor, memory against tokens, errors of the log-probs, the step."""

from pathlib import Path

from .providers import OURS, PRODUCTS
from .shapes import named

_INK, _GRID, _OWN, _OTHERS = "#333333", "#e6e6e6", "#1f5fa8", ("#b0b0b0", "#d1a15a", "#c46a5a", "#7aa37a", "#9a86b8", "#6f9fb0")


class NoMatplotlib(RuntimeError):
    """Pictures were asked for and matplotlib is not there."""


def plot(rows, folder) -> list[Path]:
    """Writes what the rows have data for into ``folder``; returns the files."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib("--plot needs matplotlib; pip install matplotlib") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    good = [r for r in rows if r["status"] == "ok"]
    loss = [r for r in good if r.get("kind", "loss") == "loss"]
    files = []
    # the same rows give the same bytes, and text stays text
    with matplotlib.rc_context({"font.size": 10.5, "svg.fonttype": "none", "svg.hashsalt": "grpo", "axes.edgecolor": "#999999"}):
        for name, draw, chosen in (
            ("time", _time, [r for r in loss if r.get("ratio") and r["provider"] != PRODUCTS]),
            ("memory", _memory, [r for r in loss + [r for r in good if r.get("kind") == "scaling"]
                                 if (r["peak_bytes"] or 0) > 0 and r["provider"] != PRODUCTS]),
            ("error", _error, [r for r in loss if "logps_max" in r.get("errors", {})]),
            ("step", _step, [r for r in good if r.get("kind") == "step" and r["median"]]),
        ):  # fmt: skip
            if not chosen:
                continue
            figure = Figure(figsize=(8, 4.2), layout="constrained")
            axis = figure.subplots()
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
            draw(axis, chosen)
            file = folder / f"{name}.svg"
            figure.savefig(file, metadata={"Date": None})
            files.append(file)
    return files


def _time(axis, rows):
    """Bars over the workloads of the shape that most rows have, with the range of the rounds."""
    shape = _commonest(rows)
    rows = [r for r in rows if named(r["shape"]) == shape]
    _bars(axis, rows, lambda r: r["ratio"], lambda r: r.get("ratio_range"))
    axis.axhline(1, color=_INK, linewidth=1, linestyle="--")
    axis.set_ylabel("time / bare matrix products")
    axis.set_yscale("log")
    axis.set_title(f"Time against the floor: {shape}", loc="left")


def _memory(axis, rows):
    depth, vocab = max({(r["shape"]["depth"], r["shape"]["vocab"]) for r in rows}, key=lambda head: len(
        [r for r in rows if (r["shape"]["depth"], r["shape"]["vocab"]) == head]))  # fmt: skip
    rows = [r for r in rows if (r["shape"]["depth"], r["shape"]["vocab"]) == (depth, vocab)]
    scaling = [r for r in rows if r.get("kind") == "scaling"]
    rows = scaling or [r for r in rows if r["path"] == rows[0]["path"]]
    for name in _names(rows):
        points = sorted({r["shape"]["tokens"]: r["peak_bytes"] for r in rows if r["provider"] == name}.items())
        x, y = zip(*[(n, size / 2**30) for n, size in points], strict=True)
        axis.plot(x, y, "o-", color=_colour(name, _names(rows)), label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.grid(color=_GRID, linewidth=0.8)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_xlabel("tokens")
    axis.set_ylabel("peak memory above the inputs, GiB")
    axis.legend(frameon=False)
    axis.set_title(f"Memory against tokens: D {depth}, V {vocab}, {rows[0]['path']}", loc="left")


def _error(axis, rows):
    """The largest error of a log-prob, and from the mean up to it as an error bar."""
    shape = _commonest(rows)
    rows = [r for r in rows if named(r["shape"]) == shape]
    middle = lambda r: r["errors"].get("logps_mean") or r["errors"]["logps_max"]  # noqa: E731
    _bars(axis, rows, middle, lambda r: (middle(r), r["errors"]["logps_max"]))
    axis.set_yscale("log")
    axis.set_ylabel("log-prob error, nats: mean, bar to the largest")
    axis.set_title(f"Log-prob error against float64: {shape}", loc="left")


def _step(axis, rows):
    lengths = list(dict.fromkeys(r["shape"]["tokens"] for r in rows))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    for i, name in enumerate(names):
        points = {r["shape"]["tokens"]: r["median"] for r in rows if r["provider"] == name}
        places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j, n in enumerate(lengths) if n in points]
        axis.bar(places, [points[n] for n in lengths if n in points], 0.8 / len(names), label=name,
                 color=_OWN if name in ("trl fused", "thin trainer") else _OTHERS[i % len(_OTHERS)])  # fmt: skip
    axis.set_xticks(range(len(lengths)), [f"{n} tokens" for n in lengths])
    axis.set_ylabel("seconds per optimiser step")
    axis.legend(frameon=False)
    axis.set_title("One optimiser step; `model` is the step without a head", loc="left")


def _bars(axis, rows, value, limits):
    paths, names = list(dict.fromkeys(r["path"] for r in rows)), _names(rows)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = {r["path"]: r for r in rows if r["provider"] == name}
        chosen = [(j + (i - (len(names) - 1) / 2) * width, own[path]) for j, path in enumerate(paths) if path in own]
        heights = [value(r) for _, r in chosen]
        spans = [limits(r) or (h, h) for (_, r), h in zip(chosen, heights, strict=True)]
        bars = [[max(0.0, h - low) for h, (low, _) in zip(heights, spans, strict=True)],
                [max(0.0, high - h) for h, (_, high) in zip(heights, spans, strict=True)]]  # fmt: skip
        axis.bar([x for x, _ in chosen], heights, width, yerr=bars, label=name, color=_colour(name, names),
                 error_kw={"elinewidth": 0.8, "ecolor": _INK})  # fmt: skip
    axis.set_xticks(range(len(paths)), paths)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.legend(frameon=False, ncols=2, fontsize=9)


def _commonest(rows):
    shapes = [named(r["shape"]) for r in rows]
    return max(dict.fromkeys(shapes), key=shapes.count)


def _names(rows):
    return sorted(dict.fromkeys(r["provider"] for r in rows), key=lambda name: not name.startswith(OURS))


def _colour(name, names):
    if name == OURS:
        return _OWN
    return _OTHERS[[n for n in names if n != OURS].index(name) % len(_OTHERS)]
