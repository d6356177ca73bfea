"""Peak memory on a CPU: a fresh process per point, its high-water mark reset behind the making of the data.

``peak_bytes`` is how far the process grew above what it held when the data was there, gradients included. A tiny call before that
has loaded what libraries load on first use. On a GPU the same process asks the allocator.

    python -m grpo_kernels.bench.memory '["grpo_kernels", "dense", {"sequences": 8, ...}]'
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from . import clock as clocks
from .problem import make_problem
from .providers import PROVIDERS
from .shapes import TINY, Shape
from .workloads import WORKLOADS

_ANSWER = "answer: "
_ROOT = str(Path(__file__).resolve().parents[2])


class PointError(RuntimeError):
    """The process of a point did not end well; the message says how."""


class TooLong(PointError):
    """It had not ended when its time was over."""


def measure(provider, workload, shape) -> dict:
    """In this very process, which should be a fresh one."""
    clock, provider, workload = clocks.here(), PROVIDERS[provider], WORKLOADS[workload]
    provider.make(make_problem(TINY, workload, device=clock.device))()
    problem = make_problem(shape, workload, device=clock.device)
    call = provider.make(problem)
    logits = max(provider.logits, 2) * problem.heads * problem.kept
    wanted = shape.vocab * (shape.depth * (problem.weight.element_size() + 4) + logits)
    clock.ready(min(wanted, int(0.7 * (clock.free() or wanted))))  # so that no first call waits for the machine
    held, start = clocks.resident(), time.perf_counter()
    _, peak = clock.peak(call)
    seconds = time.perf_counter() - start
    return {"peak_bytes": peak, "data_bytes": held, "cold_seconds": seconds}


def in_fresh_process(provider, workload, shape, longest) -> dict:
    """``longest``: seconds for the call; making its data is allowed as much again, and a minute."""
    point = run("grpo_kernels.bench.memory", [provider, workload, asdict(shape)], 2 * longest + 60)
    if point["cold_seconds"] > longest:
        raise TooLong(f"its first call took {point['cold_seconds']:.0f} s, more than {longest:.0f}")
    return point


def run(module, point, limit=None) -> dict:
    """What a module of ours prints last, run as a program with a point as JSON."""
    # this very package, whatever the working directory holds
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    command = [sys.executable, "-m", module, json.dumps(point)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise TooLong(f"its process had not ended after {limit:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        killed = "the system ended it, for want of memory" if done.returncode == -9 else f"exit status {done.returncode}"
        raise PointError(lines[-1][:300] if lines and done.returncode > 0 else killed)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_ANSWER):
            return json.loads(line.removeprefix(_ANSWER))
    raise PointError(f"its process printed no answer: {done.stdout.strip()[-200:]!r}")


def answer(fields):
    """Prints what `run` reads; a library may print before and after it."""
    print(_ANSWER + json.dumps(fields), flush=True)


if __name__ == "__main__":
    name, path, fields = json.loads(sys.argv[1])
    answer(measure(name, path, Shape(**fields)))
