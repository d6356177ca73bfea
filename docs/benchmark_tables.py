"""Writes the tables of docs/benchmarks.md from benchmarks/results, each between the marks `<!-- name -->` and `<!-- /name -->`.

    python docs/benchmark_tables.py

Run it after a record was taken again. A test fails where the page holds another text than this script would write. Every figure of
a measurement stands between two marks; the prose around them has none. In bold: what is faster or smaller than this library.
"""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parent / "benchmarks.md"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OURS, PRODUCTS = "grpo_kernels", "products"
PROVIDERS = {  # column: how the page calls it, and the package whose version stands beside it
    OURS: ("ours", None),
    "full_logits": ("full logits", None),
    "full_logits-compiled": ("full logits, `torch.compile`", None),
    "torch-lce": ("torch's `linear_cross_entropy`", None),
    "trl": ("TRL", "trl"),
    "liger": ("Liger", "liger-kernel"),
}
WORKLOADS = {
    "dense": "dense",
    "frozen": "frozen head",
    "logprobs": "log-probs only",
    "realistic": "realistic",
    "sequence": "ratio per sequence",
    "entropy": "entropy quantile 0.2",
    "support": "dense, over supports",
    "support-frozen": "frozen head, over supports",
    "support-logprobs": "log-probs only, over supports",
    "divergence": "reverse KL to a teacher",
    "kl": "dense, KL to a reference",
    "onpolicy": "dense, on-policy",
}
MODELS = {
    (896, 151_936): "Qwen2.5-0.5B",
    (2048, 128_256): "Llama-3.2-1B",
    (4096, 151_936): "Qwen3-8B",
    (2560, 262_208): "Gemma-3-4B",
}
TRAINERS = {
    "trl stock": "TRL stock",
    "trl patched": "TRL, `patch_trl()`",
    "trl fused": "`FusedGRPOTrainer`",
    "thin trainer": "our trainer",
    "model": "our trainer without a head",
}


def record(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def lines(head, rows):
    """A table of markdown."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def about(name, rounds=True):
    """A line on a record: where it lies, of what, and on what it was taken."""
    rows = record(name)
    first, versions = rows[0], rows[0]["versions"]
    commits = sorted({(r["date"][:10], r["commit"]) for r in rows})
    taken = ", ".join(f"{date} at commit {commit}" for date, commit in commits)
    times = sorted({r["rounds"] for r in rows if r["provider"] == OURS and r["rounds"]})
    of = f" Rounds of ours: {times[-1]}." if rounds and times else ""
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "trl", "liger-kernel") if package in versions)
    return [
        f"Record: [`{name}.json`](../benchmarks/results/{name}.json), {taken}; {first['cpu']}, {first['threads']} threads, "
        f"{first['isa']}; {packages}.{of}"
    ]


def seconds(value):
    return "-" if value is None else f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def mib(value):
    return "-" if value is None else f"{value / 2**20:,.0f}"


def times_ours(row, ours):
    """How many times as long as ours it took; bold where it was faster."""
    if row is None or row["median"] is None:
        return "-"
    found = row["median"] / ours["median"]
    text = f"{found:.0f} x" if found >= 99.5 else f"{found:.1f} x"
    return f"**{text}**" if found < 1 else text


def beside(row, ours):
    """Its peak in MiB; bold where it was smaller than ours."""
    if row is None or row["peak_bytes"] is None:
        return "-"
    text = mib(row["peak_bytes"])
    return f"**{text}**" if row["peak_bytes"] < ours["peak_bytes"] else text


def ratio(row):
    """Median over the rounds of time over the bare products', [lowest highest]."""
    return "-" if row["ratio"] is None else "{:.2f} [{:.2f} {:.2f}]".format(row["ratio"], *row["ratio_range"])


def by_workload(name):
    """{(shape's key, workload): {provider: row}} in the record's order."""
    found = {}
    for row in record(name):
        shape = row["shape"]
        found.setdefault((shape["tokens"], shape["depth"], shape["vocab"], row["path"]), {})[row["provider"]] = row
    return found


def title(key, rows, other_shapes=False):
    _, depth, vocab, path = key
    kept = f": {rows[OURS]['kept']} kept, {rows[OURS]['live']} trained" if path == "realistic" else ""
    head = f"{MODELS.get((depth, vocab), f'D {depth}, V {vocab}')}, " if other_shapes else ""
    return f"{head}{WORKLOADS.get(path, path)}{kept}"


def named(provider, rows):
    called, package = PROVIDERS[provider]
    return f"{called} {rows[0]['versions'][package]}" if package else called


def compared(name, cell, first, other_shapes=False):
    """A row per workload: ``first`` of ours, then ``cell`` of the others."""
    blocks, rows = by_workload(name), record(name)
    there = [p for p in PROVIDERS if p != OURS and any(r["provider"] == p for r in rows)]
    head = ["workload", *(called for called, _ in first), *(named(p, rows) for p in there)]
    cells = [
        [
            title(key, found, other_shapes),
            *(make(found[OURS]) for _, make in first),
            *(cell(found.get(p), found[OURS]) for p in there),
        ]
        for key, found in blocks.items()
    ]
    return lines(head, cells)


def time(name, **options):
    return compared(name, times_ours, [("ours", lambda r: seconds(r["median"])), ("x products", ratio)], **options)


def peak(name, **options):
    return compared(name, beside, [("ours, MiB", lambda r: mib(r["peak_bytes"]))], **options)


def errors(name):
    """Of log-probs, in nats: the largest and the mean one, over all workloads."""
    rows = [r for r in record(name) if "logps_max" in (r.get("errors") or {})]
    cells = []
    for p in PROVIDERS:
        if of := [r["errors"] for r in rows if r["provider"] == p]:
            mean, largest, dh = (max(e.get(key, 0.0) for e in of) for key in ("logps_mean", "logps_max", "d_hidden"))
            cells.append([named(p, rows), f"{mean:.1e} nats", f"{largest:.1e} nats", f"{dh:.1e}"])
    return lines(["", "log-probs, mean error", "largest", "dH, relative"], cells)


def runs(name):
    """The same workloads, run after run."""
    found, commits, seen = [], [], {}
    for r in record(name):
        if r["provider"] != OURS:
            continue
        n = seen[r["path"]] = seen.get(r["path"], 0) + 1
        if n > len(commits):
            commits.append(f"run {n}, commit {r['commit']}")
        found.append((r["path"], n, f"{seconds(r['median'])}, {ratio(r)}"))
    paths = list(dict.fromkeys(path for path, *_ in found))
    return lines(
        ["workload", *commits], [[WORKLOADS.get(path, path), *(text for p, _, text in found if p == path)] for path in paths]
    )


def supports():
    """Ours over supports beside ours over the vocabulary, in one run."""
    of = {path: rows for (*_, path), rows in by_workload("cpu-support").items()}
    cells = []
    for path, whole in (("support-logprobs", "logprobs"), ("support-frozen", "frozen"), ("support", "dense")):
        ours, other = of[path][OURS], of[whole][OURS]
        cells.append(
            [
                WORKLOADS[path],
                seconds(ours["median"]),
                seconds(other["median"]),
                f"{other['median'] / ours['median']:.0f} x",
                *(times_ours(of[path].get(p), ours) for p in ("full_logits", "trl")),
                mib(ours["peak_bytes"]),
            ]
        )
    return lines(
        [
            "workload",
            "ours",
            "over the vocabulary",
            "its time / ours",
            "full logits, masked",
            "TRL's log-probs, masked",
            "peak, MiB",
        ],
        cells,
    )


def points(axis):
    """{provider: {size: row}} of the sweep over tokens or over the vocabulary."""
    rows, found = [r for r in record("cpu-scaling") if r["kind"] == "scaling"], {}
    head = rows[0]["shape"]["vocab"]
    for r in rows:
        if (r["shape"]["vocab"] == head) == (axis == "tokens"):
            found.setdefault(r["provider"], {})[r["shape"][axis]] = r
    return found


def sweep(axis, key, form, unit):
    exponents = {r["provider"]: r for r in record("cpu-scaling") if r["kind"] == "exponent" and r["axis"] == axis}
    found = points(axis)
    sizes = sorted(next(iter(found.values())))
    grows = f"grows as {axis}^"
    of = "time_exponent" if key == "median" else "memory_exponent"
    rows = [
        [
            PROVIDERS[p][0],
            *("-" if at[n][key] is None else form.format(at[n][key] * unit) for n in sizes),
            f"{exponents[p][of]:.2f}",
        ]
        for p, at in found.items()
    ]
    return lines([f"{'seconds' if key == 'median' else 'peak, MiB'} at", *(f"{n:,}" for n in sizes), grows], rows)


def head_share(times, without):
    """The part of a step that the head takes, at the lowest and the highest of both times; a lowest below 0 is noise."""
    low, high = 1 - max(without) / min(times), 1 - min(without) / max(times)
    return f"{low:.0%} to {high:.0%}" if low > 0 else f"up to {max(high, 0):.0%}"


def step():
    rows = [r for r in record("cpu-step") if r["status"] == "ok"]
    cells = []
    for tokens in sorted({r["shape"]["tokens"] for r in rows}):
        of = {r["provider"]: r for r in rows if r["shape"]["tokens"] == tokens}
        for p in TRAINERS:
            r = of[p]
            low, high = min(r["times"]), max(r["times"])
            share = "-" if r["head_share"] is None else head_share(r["times"], of["model"]["times"])
            cells.append(
                [
                    f"{tokens:,}",
                    TRAINERS[p],
                    f"{r['median']:.1f} s [{low:.1f} {high:.1f}]",
                    f"{of['trl stock']['median'] / r['median']:.1f} x",
                    share,
                    f"{r['peak_bytes'] / 2**30:.1f} GiB",
                ]
            )
    return lines(["kept tokens", "", "step", "TRL stock takes", "share of the head", "peak"], cells)


def savings():
    rows = record("cpu-savings")
    return lines(
        ["micro-batch", "tokens computed", "time", "of everything"],
        [[r["provider"], f"{r['shape']['tokens']:,}", seconds(r["median"]), ratio(r)] for r in rows],
    )


def floor():
    """In how many ways the bare products were tried."""
    most = max(r["settings"]["ways"] for r in record("cpu") if r["provider"] == PRODUCTS and r["status"] == "ok")
    return [f"The search tried up to {most} ways for a workload of `cpu.json`."]


def command():
    """Which made the first record."""
    rows = record("cpu")
    paths, providers = (",".join(dict.fromkeys(r[key] for r in rows if r["provider"] != PRODUCTS)) for key in ("path", "provider"))
    rounds = max(r["rounds"] for r in rows)
    return [
        "```",
        f"grpo-kernels bench --workloads {paths} --rounds {rounds} \\",
        f"    --providers {providers} --json benchmarks/results/cpu.json",
        "grpo-kernels bench --from benchmarks/results/cpu.json --plot benchmarks/results/cpu",
        "python docs/benchmark_tables.py",
        "```",
    ]


def blocks():
    """{name: the text between its marks}."""
    found = {
        "floor": floor(),
        "time": [*about("cpu"), "", *time("cpu")],
        "peak": peak("cpu"),
        "errors": errors("cpu"),
        "runs": [*about("cpu-two-phases"), "", *runs("cpu-two-phases")],
        "quick": [*about("cpu-quick"), "", *time("cpu-quick")],
        "heads": [*about("cpu-heads"), "", *time("cpu-heads", other_shapes=True), "", *peak("cpu-heads", other_shapes=True)],
        "supports": [*about("cpu-support"), "", *supports()],
        "divergence": [*about("cpu-divergence"), "", *time("cpu-divergence"), "", *peak("cpu-divergence")],
        "tokens": [
            *about("cpu-scaling", rounds=False),
            "",
            *sweep("tokens", "peak_bytes", "{:,.0f}", 2**-20),
            "",
            *sweep("tokens", "median", "{:.1f}", 1),
        ],
        "vocabulary": [*sweep("vocab", "peak_bytes", "{:,.0f}", 2**-20), "", *sweep("vocab", "median", "{:.2f}", 1)],
        "step": [*about("cpu-step", rounds=False), "", *step()],
        "command": command(),
        "savings": [*about("cpu-savings", rounds=False), "", *savings()],
    }
    return {name: "\n".join(text) for name, text in found.items()}


def written(page):
    """The page with every block as the records say."""
    for name, text in blocks().items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"docs/benchmarks.md must have the marks of {name} once, has them {count} times")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
