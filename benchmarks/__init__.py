"""What is kept beside `grpo-kernels bench`, whose harness is the package's own `grpo_kernels/bench/`.

    test_loss.py     the quick set as a pytest-benchmark suite, checked first; conftest.py has its options
    limits.py        what a record of a quiet machine must show
    savings.py       what the trainer does not compute, and the time of it
    soak/            what takes too long for every test run, `make soak`
    compiled.py, compiled_cuda.py, occupancy.py     the compiled kernels, without a GPU
    gpu/             everything a GPU can prove, `make gpu`
    results/         records

    grpo-kernels bench --json benchmarks/results/cpu.json --scaling
    python -m benchmarks.limits benchmarks/results/cpu.json
    python -m pytest benchmarks --benchmark-only
"""
