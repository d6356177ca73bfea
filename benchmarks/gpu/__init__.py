"""Everything a GPU can prove, in one command and under ten minutes: `make gpu`, or `python -m benchmarks.gpu`.

    __main__.py   the command line, and the order of the parts
    fastest.py    the record -> the table behind backend="auto"
    parts.py      a part is a process of its own with a time limit; the one JSON file that all of them end up in
    journal.py    what a part has measured so far, on disk, so that it can be killed, and started again behind what killed it
    context.py    what a part is given; how a failure becomes a row
    programs.py   parts `build`, `test`, `sanitizer`: other programs
    small.py      every public path once, at small odd shapes, for compute-sanitizer
    device.py     what the device is
    inputs.py     paths -> tensors made on the device
    products.py   the floor: bare matrix products
    providers.py  who computes the loss: ours, and the list of everybody
    measure.py    one path: check everybody, then time them round by round
    paths.py      parts `paths` and `shapes`
    kernels.py    part `kernels`: row kernels alone, against the bandwidth of a copy
    sweep.py      part `sweep`: workspace, launch shapes
    table.py      the JSON -> a short table
"""
