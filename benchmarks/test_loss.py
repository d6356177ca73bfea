"""The quick set under pytest-benchmark, each provider checked first: `python -m pytest benchmarks --benchmark-only -k dense`.

GRPO_KERNELS_BENCH_TINY=1 takes a small vocabulary: seconds, to see that everything runs.
"""

import functools
import os

import pytest

from grpo_kernels.bench import clock as clocks
from grpo_kernels.bench.command import QUICK_TOKENS, QUICK_WORKLOADS
from grpo_kernels.bench.measure import checked, find_truth
from grpo_kernels.bench.peers import Absent
from grpo_kernels.bench.problem import make_problem
from grpo_kernels.bench.providers import PROVIDERS, default_names
from grpo_kernels.bench.shapes import TINY, Shape
from grpo_kernels.bench.workloads import WORKLOADS

CLOCK, TRUTHS = clocks.here(), []
SHAPE = TINY if os.environ.get("GRPO_KERNELS_BENCH_TINY") else Shape().of(QUICK_TOKENS)
problem = functools.lru_cache(maxsize=1)(lambda workload: make_problem(SHAPE, WORKLOADS[workload], device=CLOCK.device))


@pytest.mark.parametrize("provider", default_names(True, CLOCK.device))
@pytest.mark.parametrize("workload", QUICK_WORKLOADS)
def test_loss(benchmark, workload, provider):
    known, why = find_truth(problem(workload), CLOCK, TRUTHS)
    try:
        call = checked(PROVIDERS[provider], problem(workload), known, {}, CLOCK) if known else pytest.skip(why)
    except Absent as absent:
        pytest.skip(str(absent))
    benchmark.group = workload
    benchmark.pedantic(lambda: CLOCK.seconds(call), rounds=3, warmup_rounds=1)
