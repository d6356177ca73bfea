"""The loops as a GPU takes them, on the CPU: the device that is planned for, and the products that run."""

from collections import Counter
from dataclasses import replace

from grpo_kernels.backends import pytorch
from grpo_kernels.engine import chunks, plan, products

GPU = replace(plan.DEVICES["h200"], l2=1 << 20)  # whose cache some chunks of these small problems fit and others do not


class Recorder:
    """Counts the products (m, n, k, bytes of an element written, whether it adds) and the row kernels (what, bytes) of a call."""

    def __init__(self, monkeypatch):
        self.products, self.kernels = Counter(), Counter()
        self.of_engine = products.multiply
        for module in (chunks, products):
            monkeypatch.setattr(module, "multiply", self.multiply)
        for name in ("statistics", "gradient"):
            monkeypatch.setattr(pytorch, name, self.kernel(name, getattr(pytorch, name)))

    def multiply(self, a, b, out, add=False, alpha=1.0, **order):
        self.products[(a.shape[0], b.shape[1], a.shape[1], out.element_size(), add)] += 1
        self.of_engine(a, b, out, add, alpha, **order)

    def kernel(self, name, function):
        def call(tile, out, *more, **options):
            written = 0 if name == "statistics" else out.numel() * out.element_size()
            self.kernels[(name, tile.values.numel() * tile.values.element_size(), written)] += 1
            return function(tile, out, *more, **options)

        return call
