"""Shapes of the matrix products that a call runs."""

import collections
from unittest import mock

from torch.profiler import ProfilerActivity, profile

from grpo_kernels.backends import native
from grpo_kernels.engine import fixed_order
from support.operations import PRODUCTS


def recorded(function):
    """{(m, n, k): count} of the products inside of ``function()``."""
    found = collections.Counter()

    def counting(a, b, out, **options):
        found[a.shape[0], b.shape[1], a.shape[1]] += 1
        return product(a, b, out, **options)

    product = native.product
    # nor logits whose products come in pieces
    library = mock.patch.object(fixed_order, "_is_free", lambda dtype: False)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace, mock.patch.object(native, "product", counting), library:
        function()
    for event in trace.profiler.kineto_results.events():
        if event.name() in PRODUCTS:
            first, second = event.shapes()[1:3] if event.name().startswith("aten::addmm") else event.shapes()[:2]
            found[first[0], second[1], first[1]] += 1
    return found
