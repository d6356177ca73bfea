"""What takes too long for every test run: `make soak`, or one part, `python -m benchmarks.soak kill`.

    growth.py    a thousand optimiser steps: the process does not grow
    planner.py   a hundred random shapes: the planner's formula holds the measured peak
    kill.py      a run that is killed ten times at random moments ends in the weights of one that was not
    drift.py     300 steps in bf16 through the fused loss beside 300 in float64 through the reference
    fuzz.py      random calls of the compiled kernels and of the public functions, with atheris

Each part has `run(options) -> dict` with what it measured and `holds`, whether the promise was kept.
"""
