"""The quick set: every provider on every workload, checked first, one call per timing.

`grpo-kernels bench --quick` is the same with rounds interleaved, ratios and memory; this is for pytest-benchmark's own comparisons.
"""


def test_loss(benchmark, calls, workload, provider):
    call = calls.make(workload, provider)
    benchmark.group = workload
    benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=1)
