"""`grpo-kernels bench`: time, memory and error of the fused loss beside bare matrix products, full logits and other libraries.

    command.py       the command line: what is measured, in which order
    shapes.py        heads of known models; TOKENSxDxV
    workloads.py     what is asked for, and the documented distributions behind it
    problem.py       shape and workload -> tensors that look like a trained model's; the float64 truth of their loss
    providers.py     who computes the loss: ours, and the list of everybody
    floor.py         the bare matrix products, in the fastest way that is found
    peers.py         plain PyTorch, and each other library from its installed package
    check.py         errors of a result against the truth; nothing is timed before it passed
    clock.py         time and peak memory on a CPU and on a GPU
    measure.py       one shape and workload: check everybody, then time them round by round
    memory.py        peak memory on a CPU: a fresh process per point
    scaling.py       time and memory over tokens and vocabulary, their exponents, the most tokens that fit
    step.py          one optimiser step of whole trainers; its points run as step_process.py
    record.py        one row of the JSON
    table.py         rows -> text
    plot.py          rows -> pictures
"""
