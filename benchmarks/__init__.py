"""Time, memory and error of the fused loss beside bare matrix products, full logits and other libraries.

    problem.py    shapes and workloads -> tensors, and the truth they are held against
    providers.py  who computes the loss; another library is one function here
    check.py      errors of a result against the truth; nothing is timed before it passed
    record.py     one row of the JSON: what ran, on what, how long
    report.py     rows -> the table of ratios; --check holds them against the limits
    memory.py     peak memory, one fresh process per point
    test_loss.py  the timings, as a pytest-benchmark suite

    python -m pytest benchmarks --benchmark-only --rows benchmarks/results/cpu-loss.json
    python -m benchmarks.report --check benchmarks/results/cpu-loss.json
    python -m benchmarks.memory --json benchmarks/results/cpu-memory.json
"""
