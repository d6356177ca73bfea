"""The timings: every provider on every workload, checked first, one call per timing.

No input is reused from a cache: the head and a tile of logits are 270 MB and more each, and between two calls of a provider
all the others run.
"""

import pytest

from . import record


def test_loss(benchmark, bench_session, timing):
    workload, provider = timing
    call = bench_session.call(workload, provider)
    if call is None:
        pytest.skip(f"{provider} has no {workload}")
    benchmark.group = workload
    needed = bench_session.details[timing]["peak_bytes"]
    benchmark.pedantic(call, setup=lambda: record.touch_free_memory(needed), rounds=1, iterations=1)
    bench_session.times.setdefault(timing, []).append(benchmark.stats.stats.data[0])
