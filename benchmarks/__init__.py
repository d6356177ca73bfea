"""What is kept beside `grpo-kernels bench`, whose harness is the package's own `grpo_kernels/bench/`.

    compiled_triton.py, compiled_cuda.py, machine_code.py, occupancy.py     judges of the compiled kernels: `make kernels`
    gpu/                 a GPU's first minutes: `make gpu`
    soak/                what takes too long for every test run: `make soak`
    savings.py           what the trainer does not compute, and the time of it
    test_loss.py         the quick set under pytest-benchmark
    results/             records
"""
