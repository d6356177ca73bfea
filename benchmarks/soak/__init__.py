"""What takes too long for every test run: `make soak`, or one part, `python -m benchmarks.soak kill`.

A part is a function of the command's options, which returns what it measured, ``says``, and whether the promise ``holds``.
"""
