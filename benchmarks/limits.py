"""A record of `grpo-kernels bench` against what the library promises on a quiet machine of two cores; exit status 1 if it misses.

    python -m benchmarks.limits benchmarks/results/cpu.json
    python -m benchmarks.limits ONE.json --again OTHER.json       # two runs: do the ranges of their ratios meet?

Time at 1024 tokens, D 896, V 151,936, bf16. Memory of ours beyond the gradients: what the planner's formula says of the buffer
and of the float32 sum behind dW, and 64 MiB; and from 4096 tokens on the process may grow by their hidden states and gradient only.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from grpo_kernels.bench.providers import FULL, LIGER, OURS, PRODUCTS, TRL
from grpo_kernels.engine import plan

ALLOWANCE = 64 * 2**20
SHAPE = {"tokens": 1024, "depth": 896, "vocab": 151_936, "dtype": "bfloat16"}
# at most this many times the bare products, and at least this many times faster than the others
LIMITS = {
    "dense": (1.10, {FULL: 1.8, TRL: 5, LIGER: 3}),
    "realistic": (1.20, {FULL: 1.6, TRL: 5, LIGER: 3}),
    "frozen": (1.10, {FULL: 1.6, TRL: 4}),
    "logprobs": (1.10, {FULL: 1.3}),
    "sequence": (1.20, {FULL: 1.6}),
}


def verdicts(rows):
    """(holds, sentence) for every limit whose rows are there."""
    good = [r for r in rows if r["status"] == "ok"]
    timed = {(r["path"], r["provider"]): r for r in good if r["shape"] == SHAPE and "kind" not in r}
    for workload, (ceiling, faster) in LIMITS.items():
        ours = timed.get((workload, OURS))
        if ours is None:
            continue
        if (workload, PRODUCTS) in timed:
            yield ours["ratio"] <= ceiling, f"{workload}: {ours['ratio']:.2f} x the products that remain, at most {ceiling:.2f}"
        for name, factor in faster.items():
            if other := timed.get((workload, name)):
                gain = other["median"] / ours["median"]
                yield gain >= factor, f"{workload}: {gain:.2f} x faster than {name}, at least {factor:g}"
    yield from _memory([r for r in good if r["provider"] == OURS and r["peak_bytes"] and "gradient_bytes" in r])


def _memory(ours):
    for r in ours:
        excess, allowed = r["peak_bytes"] - r["gradient_bytes"], planned(r) + ALLOWANCE
        what = f"{r['path']}, {r['shape']['tokens']} tokens x {r['shape']['vocab']}"
        yield excess <= allowed, f"{what}: {_mib(excess)} MiB beyond the gradients, at most {_mib(allowed)}"
    # the smallest count may do without the float32 sum behind dW
    head = (SHAPE["depth"], SHAPE["vocab"])
    points = [r for r in ours if r.get("kind") == "scaling" and (r["shape"]["depth"], r["shape"]["vocab"]) == head]
    for a, b in itertools.pairwise([r for r in points if r["shape"]["tokens"] >= 4096]):
        allowed = (b["shape"]["tokens"] - a["shape"]["tokens"]) * 2 * a["shape"]["depth"] * 2 + ALLOWANCE // 8
        grown = b["peak_bytes"] + b["data_bytes"] - a["peak_bytes"] - a["data_bytes"]
        what = f"{a['shape']['tokens']} to {b['shape']['tokens']} tokens"
        yield grown <= allowed, f"{what}: the process grows by {_mib(grown)} MiB, at most {_mib(allowed)}"


def planned(r):
    """Bytes beyond the gradients, by the formula of plan.py."""
    V, D, tokens = r["shape"]["vocab"], r["shape"]["depth"], r["shape"]["tokens"]
    if r["path"] == "logprobs":
        return 0
    scored_first = r["path"] == "entropy"  # all rows leave their softmax behind before it is known which are trained
    live = r.get("kept" if scored_first else "live", tokens)
    two_phases = r["path"] in ("sequence", "entropy")
    problem = plan.Problem(live, 0, V, D, 2, 2, True, r["path"] != "frozen", r["workspace_bytes"], two_phases)
    whole = plan.peak_bytes(problem, tokens)
    return whole - tokens * D * 2 - (V * D * 2 if problem.needs_weight else 0)


def _mib(size):
    return f"{size / 2**20:.0f}"


def repeats(one, other):
    """(holds, sentence) for every ratio that both records have, of two rounds or more: whether their ranges, as printed, meet."""
    key = lambda r: (r["path"], r["provider"], json.dumps(r["shape"], sort_keys=True))  # noqa: E731
    ranged = lambda rows: [r for r in rows if r["status"] == "ok" and r.get("ratio_range") and r["rounds"] > 1]  # noqa: E731
    again = {key(r): r for r in ranged(other)}
    for r in ranged(one):
        if twin := again.get(key(r)):
            (low, high), (least, most) = r["ratio_range"], twin["ratio_range"]
            said = " and ".join(f"{x['ratio']:.2f} [{x['ratio_range'][0]:.2f} {x['ratio_range'][1]:.2f}]" for x in (r, twin))
            yield low <= most and least <= high, f"{r['path']}, {r['provider']}: {said}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--again", type=Path, metavar="FILE", help="compare with a second run instead")
    options = parser.parse_args(argv)
    rows = json.loads(options.file.read_text())
    found = list(repeats(rows, json.loads(options.again.read_text())) if options.again else verdicts(rows))
    for holds, sentence in found:
        print("ok  " if holds else "MISS", sentence)
    return 0 if found and all(holds for holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
