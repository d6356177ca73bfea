"""The JSON of a run -> a table of at most 9,500 characters: what passed, and times and ratios, a column per path."""

LIMIT = 9500
_GIB = 2**30


def table(content, names=None):
    parts = {name: part for name, part in content["parts"].items() if names is None or name in names}
    lines = [f"{content['device']}, torch {content['torch']}, triton {content['triton']}, cuda {content['cuda']}, "
             f"driver {content['driver']}, commit {content['commit']}"]  # fmt: skip
    lines += [f"{name:10} {part['status']:8} {part['seconds']:6.0f} s  {part['message'][:90]}" for name, part in parts.items()]
    rows = lambda name: parts.get(name, {}).get("rows", [])  # noqa: E731
    for row in rows("build") + rows("test") + rows("sanitizer"):
        lines.append(f"{row['path'][-20:]:21} {row['provider']:18} {row['status']:7} {(row.get('message') or '')[:75]}")
    for name, view in (("paths", _paths), ("shapes", _shapes), ("kernels", _kernels), ("sweep", _sweep)):
        lines += view(rows(name))
    for name in ("paths", "shapes", "kernels", "sweep"):
        lines += [f"{r['path']} {r['provider']}: {r['status']}: {r.get('message', '')[:80]}" for r in _unlike(rows(name))]
    text = "\n".join(lines)
    return text if len(text) <= LIMIT else text[: LIMIT - 40] + "\n... (cut; the rest is in the JSON)"


def _paths(rows):
    shapes = {tuple(r["shape"].values()) for r in rows if r["shape"]}
    for shape in sorted(shapes, key=str):
        chosen = [r for r in rows if tuple(r["shape"].values()) == shape]
        title = "x".join(map(str, shape[:3]))
        yield from _pivot(f"{title}: ms, x floor", chosen, lambda r: f"{r['median'] * 1e3:.1f} {_number(r['ratio'], '.2f')}", 13)
        yield from _pivot("peak GiB", chosen, lambda r: _number(r["peak_bytes"], ".2f", _GIB), 8)
        yield from _pivot("error of loss and gradients", chosen, lambda r: _number(r["error"], ".0e"), 8)
        yield from _pivot("error of log-probs", chosen, lambda r: _number(r.get("errors", {}).get("logps_max"), ".0e"), 8)


def _pivot(title, rows, cell, width):
    """A line per provider, a column per path; who failed says how."""
    paths = list(dict.fromkeys(r["path"] for r in rows))
    if not any(r["status"] == "ok" and cell(r).strip("-") for r in rows):
        return
    yield ""
    yield f"{title:22.22} " + " ".join(f"{_short(path):>{width}.{width}}" for path in paths)
    found = {(r["provider"], r["path"]): r for r in rows}
    first = lambda name: 0 if name.startswith("products") else 1 if name.startswith("ours") else 2  # noqa: E731
    for provider in sorted(dict.fromkeys(r["provider"] for r in rows), key=first):
        cells = []
        for path in paths:
            row = found.get((provider, path))
            text = "" if row is None else cell(row) if row["status"] == "ok" else row["status"]
            cells.append(f"{text:>{width}.{width}}")
        if any(c.strip(" -") for c in cells) and any(found[k]["status"] == "ok" for k in found if k[0] == provider):
            yield f"{provider:22.22} " + " ".join(cells)


def _short(path):
    return path.replace("two_phase", "2ph").replace("recompute", "recomp")


def _shapes(rows):
    by_shape = {}
    for r in rows:
        if r["status"] == "ok" and r["provider"].startswith("ours"):
            key = (r["shape"]["depth"], r["shape"]["vocab"])
            by_shape.setdefault(key, []).append(f"{r['path']} {r['median'] * 1e3:.1f} ms, {_number(r['ratio'], '.2f')} x floor")
    if by_shape:
        yield "\nother heads (ours)"
    for (depth, vocab), cells in by_shape.items():
        yield f"D {depth:5} V {vocab:7}  " + "; ".join(cells)


def _kernels(rows):
    timed = [r for r in rows if r["status"] == "ok"]
    for r in timed:
        if r["path"] == "copy":
            yield f"\nkernels alone; a copy moves {r['bytes_per_second'] / 1e12:.2f} TB/s"
    by_shape = {}
    for r in timed:
        if "share" in r:
            key = (r["provider"], r["shape"]["rows"], r["shape"]["vocab"])
            by_shape.setdefault(key, []).append(f"{r['path']} {r['median'] * 1e6:.0f} us {100 * r['share']:.0f}%")
    for (provider, height, vocab), cells in by_shape.items():
        yield f"{provider:7} [{height}, {vocab}]  " + "; ".join(cells)


def _sweep(rows):
    timed = [r for r in rows if r["status"] == "ok" and r["median"]]
    work = [r for r in timed if r["path"] == "one_pass" and r["provider"].startswith("ours")]
    if work:
        yield "\none_pass by workspace: " + "; ".join(
            f"{r['provider'].split('@')[1]} {r['median'] * 1e3:.1f} ms" + _wrapped(_number(r["peak_bytes"], ".2f GiB", _GIB))
            for r in work
        )
    for path in dict.fromkeys(r["path"] for r in timed if r["path"].startswith("launch")):
        ranked = sorted((r for r in timed if r["path"] == path), key=lambda r: r["median"])
        cells = [f"{r['provider']}{'*' if r.get('in_use') else ''} {r['median'] * 1e6:.0f} us" for r in ranked]
        yield f"{path} (BLOCK x warps, * in use), best first: " + "; ".join(cells)


def _wrapped(text):
    return "" if text == "-" else f" ({text})"


def _unlike(rows):
    """What went wrong or is absent, once per provider and message."""
    seen = set()
    for r in rows:
        key = (r["provider"], r["status"], r.get("message"))
        if r["status"] != "ok" and key not in seen:
            seen.add(key)
            yield r


def _number(value, form, unit=1):
    if value is None:
        return "-"
    number, _, suffix = form.partition(" ")
    return f"{value / unit:{number}}" + (f" {suffix}" if suffix else "")
