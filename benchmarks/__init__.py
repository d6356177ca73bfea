"""What is kept beside `grpo-kernels bench`, whose harness is the package's own `grpo_kernels/bench/`.

    compiled.py, compiled_cuda.py, occupancy.py     judges of the compiled kernels, without a GPU: `make kernels`
    gpu/, shims.py       a GPU's first minutes: `make gpu`
    soak/                what takes too long for every test run: `make soak`
    savings.py           what the trainer does not compute, and the time of it
    cost_model.py        the arithmetic of docs/scaling.md
    rounding.py          the arithmetic of docs/precision.md
    test_loss.py         the quick set under pytest-benchmark
    results/             records
"""
