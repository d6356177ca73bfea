"""The quick set under pytest-benchmark, for its comparisons: `python -m pytest benchmarks --benchmark-only -k dense`.

Checked first, one call a timing. `grpo-kernels bench --quick` is the same with interleaved rounds, ratios and memory.
GRPO_KERNELS_BENCH_TINY=1 takes a small vocabulary: seconds, to see that everything runs.
"""

import functools
import os

import pytest
import torch

from grpo_kernels.bench import clock as clocks
from grpo_kernels.bench.command import QUICK_TOKENS, QUICK_WORKLOADS
from grpo_kernels.bench.measure import checked, find_truth
from grpo_kernels.bench.peers import Absent
from grpo_kernels.bench.problem import make_problem
from grpo_kernels.bench.providers import PROVIDERS, default_names
from grpo_kernels.bench.shapes import TINY, Shape
from grpo_kernels.bench.workloads import WORKLOADS

CLOCK, TRUTHS = clocks.here(), []


@functools.lru_cache(maxsize=1)
def problem(workload):
    shape = TINY if os.environ.get("GRPO_KERNELS_BENCH_TINY") else Shape().of(QUICK_TOKENS)
    return make_problem(shape, WORKLOADS[workload], device=CLOCK.device)


@pytest.mark.parametrize("provider", default_names(True, CLOCK.device))
@pytest.mark.parametrize("workload", QUICK_WORKLOADS)
def test_loss(benchmark, workload, provider):
    p = problem(workload)
    known, why = find_truth(p, CLOCK, TRUTHS)
    if known is None:
        pytest.skip(why)
    try:
        call = checked(PROVIDERS[provider], p, known, {}, CLOCK)
    except Absent as why:
        pytest.skip(str(why))
    benchmark.group = workload
    benchmark.pedantic(lambda: (call(), CLOCK.device.type == "cpu" or torch.cuda.synchronize()), rounds=3, warmup_rounds=1)
