"""`grpo-kernels bench`: time, memory and error of the fused loss beside bare matrix products, full logits and other libraries.

`command` is the command line. `workloads` and `shapes` say what is asked for, `problem` draws its tensors and their float64 truth.
`providers` is the list of who computes it, with the bare products of `floor` and the libraries of `peers`. `measure` lets `errors`
judge them, then times them by a `clock`; `memory` gives a point a process of its own, as `scaling` and `step` do. What was found is
a `record`, and `table` and `plot` show it.
"""
