"""Peak memory: a fresh process per point, its high-water mark reset behind the making of the data.

``peak_bytes`` is how far the process grew above what it held when the data was there, gradients included (on a GPU: the allocator's
most above what was allocated). A tiny call before that has loaded what libraries load on first use.

    python -m grpo_kernels.bench.memory '["grpo_kernels", "dense", {"sequences": 8, ...}]'
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ..plan import default_budget
from . import clock as clocks
from .problem import make_problem
from .providers import PROVIDERS
from .shapes import TINY, Shape
from .workloads import WORKLOADS

_ROOT = str(Path(__file__).resolve().parents[2])


class PointError(RuntimeError):
    """The process of a point did not end well; the message says how."""


def measure(provider, workload, shape) -> dict:
    """In this very process, which should be a fresh one."""
    clock, provider, workload = clocks.here(), PROVIDERS[provider], WORKLOADS[workload]
    provider.make(make_problem(TINY, workload, device=clock.device))()
    problem = make_problem(shape, workload, device=clock.device)
    call = provider.make(problem)
    held = clocks.resident()
    start = time.perf_counter()
    result, peak = clock.peak(call)
    seconds = time.perf_counter() - start
    if peak is None:
        raise PointError("the peak mark cannot be reset here: /proc/self/clear_refs is not to be written")
    size = lambda x: 0 if x is None else x.numel() * x.element_size()  # noqa: E731
    sums = 0 if result.d_weight is None else 4 * result.d_weight.numel()
    return {
        "peak_bytes": peak, "data_bytes": held, "gradient_bytes": size(result.d_hidden) + size(result.d_weight) + sums,
        "workspace_bytes": default_budget(clock.device.type) if provider.ours else None, "cold_seconds": seconds,
    }  # fmt: skip


def in_fresh_processes(provider, workload, shape, repeats=1) -> dict:
    """The median of several: malloc and the scratch memory of oneDNN's threads move the mark by some tens of MiB."""
    found = sorted((in_fresh_process(provider, workload, shape) for _ in range(repeats)), key=lambda r: r["peak_bytes"])
    marks = [r["peak_bytes"] for r in found]
    return {**found[len(found) // 2], "peak_repeats": repeats, "peak_spread": marks[-1] - marks[0]}


def in_fresh_process(provider, workload, shape) -> dict:
    return run("grpo_kernels.bench.memory", [provider, workload, asdict(shape)])


def run(module, point, limit=None) -> dict:
    """What a module of ours prints last, run as a program with a point as JSON."""
    # this very package, whatever the working directory holds
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    command = [sys.executable, "-m", module, json.dumps(point)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise PointError(f"took more than {limit:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        killed = "the system ended it, for want of memory" if done.returncode == -9 else f"exit status {done.returncode}"
        raise PointError(lines[-1][:300] if lines and done.returncode > 0 else killed)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    name, path, fields = json.loads(sys.argv[1])
    print(json.dumps(measure(name, path, Shape(**fields))))
