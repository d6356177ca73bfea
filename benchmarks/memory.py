"""Peak memory: the high-water mark of a fresh process per point, reset behind the making of the data.

    python -m benchmarks.memory [--check] [--json FILE] [--tokens 4096,12288] [--providers ...] [--workloads ...]

``peak_bytes`` is how far the process grew above what it held when the data was there, gradients included. Of ours the limits are
asserted by --check: ``peak_bytes`` beyond the gradients (float32 and final dW, dH) within the workspace and 256 MiB, and the
growth of the process's mark with the number of tokens within that of hidden states and their gradient.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from grpo_kernels.plan import default_budget

from . import record
from .problem import WORKLOADS, Shape, make_problem, tiny
from .providers import FULL, LIGER, OURS, PROVIDERS, TRL

ALLOWANCE = 256 * 2**20
# full logits of more than 4096 tokens need 20 GiB and more
POINTS = (
    (OURS, "dense", (1024, 4096, 12288)),
    (OURS, "sequence", (1024, 4096, 12288)),
    (FULL, "dense", (1024, 4096)),
    (TRL, "dense", (1024, 4096)),
    (LIGER, "dense", (1024, 4096)),
)


def measure(provider, workload, shape) -> dict:
    """In this very process, which should be a fresh one."""
    problem = make_problem(shape, WORKLOADS[workload])
    call = PROVIDERS[provider].make(problem)
    if not record.reset_peak():
        raise RuntimeError("the peak mark cannot be reset here: /proc/self/clear_refs is not to be written")
    before = record.resident()
    start = time.perf_counter()
    result = call()
    seconds, peak = time.perf_counter() - start, record.resident("VmHWM")
    size = lambda x: 0 if x is None else x.numel() * x.element_size()  # noqa: E731
    d_weight = size(result.d_weight)
    gradients = size(result.d_hidden) + d_weight + (0 if result.d_weight is None else 4 * result.d_weight.numel())
    return record.row(
        provider, workload, shape, [seconds], peak_bytes=peak - before, process_bytes=peak, data_bytes=before,
        gradient_bytes=gradients, workspace_bytes=default_budget() if provider == OURS else None, rows_live=problem.live,
    )  # fmt: skip


def in_fresh_processes(provider, workload, shape, repeats) -> dict:
    """The median of several: malloc and the scratch memory of oneDNN's threads move the mark by some tens of MiB."""
    rows = sorted((in_fresh_process(provider, workload, shape) for _ in range(repeats)), key=lambda r: r["process_bytes"])
    marks = [r["process_bytes"] for r in rows]
    return {**rows[len(rows) // 2], "repeats": repeats, "peak_spread": marks[-1] - marks[0]}


def in_fresh_process(provider, workload, shape) -> dict:
    point = json.dumps([provider, workload, asdict(shape)])
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", "--point", point], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{provider} {workload} {shape}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def verdicts(rows):
    """(holds, sentence) of what is promised for ours."""
    ours = [r for r in rows if r["provider"] == OURS]
    for r in ours:
        excess, allowed = r["peak_bytes"] - r["gradient_bytes"], r["workspace_bytes"] + ALLOWANCE
        what = f"{r['path']}, {r['shape']['tokens']} tokens"
        yield excess <= allowed, f"{what}: {_mib(excess)} MiB beyond the gradients, at most {_mib(allowed)}"
    for path in dict.fromkeys(r["path"] for r in ours):
        # the smallest count may do without the float32 sum behind dW
        points = [r for r in ours if r["path"] == path and r["shape"]["tokens"] >= 4096]
        for a, b in itertools.pairwise(points):
            tokens, wide = b["shape"]["tokens"] - a["shape"]["tokens"], 2 * a["shape"]["depth"] * 2
            grown, allowed = b["process_bytes"] - a["process_bytes"], tokens * wide
            what = f"{path}, {a['shape']['tokens']} to {b['shape']['tokens']} tokens"
            yield grown <= allowed, f"{what}: the peak grows by {_mib(grown)} MiB, hidden and its gradient by {_mib(allowed)}"


def _mib(size):
    return f"{size / 2**20:.0f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Peak memory of the fused loss and of the others, a fresh process per point.")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--check", action="store_true", help="hold ours against its limits")
    parser.add_argument("--tokens", help="only these counts, by comma")
    parser.add_argument("--providers", help="only these, by comma")
    parser.add_argument("--workloads", help="only these, by comma")
    parser.add_argument("--repeats", type=int, default=3, help="processes per point of ours, whose median is kept")
    parser.add_argument("--tiny", action="store_true", help="a small vocabulary: seconds, to see that everything runs")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.point:
        provider, workload, shape = json.loads(options.point)
        print(json.dumps(measure(provider, workload, Shape(**shape))))
        return 0

    rows = []
    print(f"{'provider':13} {'workload':9} {'tokens':>7} {'peak MiB':>9} {'beyond gradients':>17} {'seconds':>8}")
    for provider, workload, counts in POINTS:
        if options.providers and provider not in options.providers.split(","):
            continue
        if options.workloads and workload not in options.workloads.split(","):
            continue
        if why := PROVIDERS[provider].missing():
            print(f"{provider:13} left out: {why}")
            continue
        for tokens in counts if options.tokens is None else map(int, options.tokens.split(",")):
            shape = Shape() if not options.tiny else tiny()
            shape = replace(shape, length=tokens // shape.sequences)
            r = in_fresh_processes(provider, workload, shape, options.repeats if provider == OURS else 1)
            rows.append(r)
            peak, excess = r["peak_bytes"], r["peak_bytes"] - r["gradient_bytes"]
            print(f"{provider:13} {workload:9} {tokens:7} {_mib(peak):>9} {_mib(excess):>17} {r['median']:8.2f}", flush=True)
    if options.json:
        record.write(options.json, rows)
    if not options.check:
        return 0
    found = list(verdicts(rows))
    for holds, sentence in found:
        print("ok  " if holds else "MISS", sentence)
    return 0 if found and all(holds for holds, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
