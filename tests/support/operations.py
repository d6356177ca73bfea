"""Floating-point operations of the matrix products that a call runs."""

from unittest import mock

from torch.profiler import ProfilerActivity, profile

from grpo_kernels.backends import native

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot",
            "aten::_scaled_mm", "aten::mkldnn_linear")  # fmt: skip


def operations(function):
    """Floating-point operations of all matrix products inside ``function()``, PyTorch's and ours."""
    total, product = 0, native.product

    def counted(a, b, out, **options):
        nonlocal total
        total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        product(a, b, out, **options)

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace, mock.patch.object(native, "product", counted):
        function()
    # the raw events: trace.events() builds a tree of thousands of Python objects first, which takes half a second
    for event in trace.profiler.kineto_results.events():
        if event.name() in PRODUCTS:
            shapes = event.shapes()
            first, second = shapes[1:3] if event.name().startswith("aten::addmm") else shapes[:2]
            assert len(first) == len(second) == 2 and first[1] == second[0], f"{event.name()} {shapes}"
            total += 2 * first[0] * first[1] * second[1]
    return total
