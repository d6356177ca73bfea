"""Rows -> a table of times and ratios, wins and losses alike; with --check, held against the limits.

    python -m benchmarks.report [--check] benchmarks/results/cpu-loss.json
"""

import argparse
import json
import sys
from pathlib import Path

from .providers import FULL, LIGER, OURS, PRODUCTS, TRL

# At most this many times the bare products, and at least this many times faster than the others, at 1024 tokens, D 896,
# V 151,936, bf16, on two cores.
LIMITS = {
    "dense": (1.10, {FULL: 1.8, TRL: 5, LIGER: 6}),
    "half": (1.20, {FULL: 4, TRL: 5, LIGER: 10}),
    "frozen": (1.10, {FULL: 1.6, TRL: 4}),
    "logprobs": (1.10, {FULL: 1.3}),
    "sequence": (1.20, {FULL: 1.6}),
}


def table(rows):
    yield f"{'workload':10} {'provider':13} {'median ms':>10} {'spread':>7} {'x products':>10} {'x ours':>7} {'peak MiB':>9}  error"
    times = {(r["path"], r["provider"]): r["median"] for r in rows}
    for r in rows:
        floor, ours = times.get((r["path"], PRODUCTS)), times.get((r["path"], OURS))
        yield " ".join(
            (
                f"{r['path']:10} {r['provider']:13} {r['median'] * 1e3:10.1f}",
                _cell(r["spread"], 7, lambda x: f"{x * 1e3:.1f}"),
                _cell(floor, 10, lambda x: f"{r['median'] / x:.2f}"),  # noqa: B023
                _cell(ours, 7, lambda x: f"{r['median'] / x:.2f}"),  # noqa: B023
                _cell(r["peak_bytes"], 9, lambda x: f"{x / 2**20:.0f}"),
                " " + " ".join(f"{name} {value:.1e}" for name, value in r["errors"].items()),
            )
        )


def _cell(value, width, form):
    return f"{'-' if value is None else form(value):>{width}}"


def verdicts(rows):
    """(holds, sentence) for every limit whose rows are there."""
    times = {(r["path"], r["provider"]): r["median"] for r in rows}
    for workload, (ceiling, faster) in LIMITS.items():
        ours = times.get((workload, OURS))
        if ours is None:
            continue
        if floor := times.get((workload, PRODUCTS)):
            yield ours <= ceiling * floor, f"{workload}: {ours / floor:.2f} x the products that remain, at most {ceiling:.2f}"
        for name, factor in faster.items():
            if other := times.get((workload, name)):
                yield other >= factor * ours, f"{workload}: {other / ours:.2f} x faster than {name}, at least {factor:g}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prints the figures of a JSON record; --check holds them against the limits.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(argv)
    rows = json.loads(options.file.read_text())
    print("\n".join(table(rows)))
    if not options.check:
        return 0
    found = list(verdicts(rows))
    for holds, sentence in found:
        print("ok  " if holds else "MISS", sentence)
    return 0 if found and all(holds for holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
