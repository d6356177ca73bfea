"""The constants of the cost model from what was measured on a GPU.

Bandwidth, float32's rate, the seconds of a launch and the share of the L2 cache come from the rate that shows each alone. The rate
of 16-bit products and the exposed share of their output are fitted to all products: the sum of |log(predicted / measured)| is made
least, which one product that is far off moves little.
"""

import itertools
import math
from dataclasses import replace

from grpo_kernels.engine.cost import Device, Problem, Tally, seconds, steps
from grpo_kernels.engine.plan import plan

WAYS = {"16-bit": (2, False), "float32": (4, False), "sum": (4, True)}  # bytes of an element that is written, or added to
SHARES = {f"{i}/8 of L2": i / 8 for i in range(1, 9)}  # that source and result of a repeated kernel fill
_HOT = 1.5  # times the bandwidth of memory is the cache's
_LEAST, _MOST = 50, 130  # percent of the data sheet's rate that are looked at


def products_of(problem: Problem) -> list:
    """(what, m, n, k, way) of every product of 16-bit matrices that the plan makes."""
    made = [s for s in steps(problem, plan(problem)) if s.k]
    size = lambda s: (s.written + s.cached) // (s.m * s.n)  # noqa: E731
    adds = lambda s: s.read > problem.element_size * (s.m + s.n) * s.k  # noqa: E731
    names = {way: name for name, way in WAYS.items()}
    return [(s.what, s.m, s.n, s.k, names[size(s), adds(s)]) for s in made]


def product(device: Device, what: str, m: int, n: int, k: int, way: str):
    """(problem, step) of one product."""
    tally, (size, adds) = Tally(Problem(0, 0, n, k, 2, 4, True, True, 1, device=device)), WAYS[way]
    tally.product(1, what, m, n, k, size, adds, what != "dW" and tally.in_cache(m, n, size))
    return tally.p, tally.steps()[0]


def fit(device: Device, rates: dict, products: list) -> Device:
    """The device with measured constants.

    Args:
        rates: a second: "copy" and `SHARES` in bytes, "cube float32" in operations, "launch" in kernels.
        products: (arguments of `product` but the device, seconds).
    """
    launch, l2 = 1 / rates["launch"], device.l2
    in_cache = lambda item: item[1] * l2 / rates[item[0]] - launch < item[1] * l2 / rates["copy"] / _HOT  # noqa: E731
    hot = [share for _, share in itertools.takewhile(in_cache, SHARES.items())]
    known = {"bandwidth": rates["copy"], "launch": launch, "float32_tflops": rates["cube float32"] / 1e12}
    device = replace(device, **known, l2_share=max(hot, default=1 / 8))
    steps = [(product(device, *arguments)[1], measured) for arguments, measured in products if measured > 0]
    if len(steps) < 3:
        raise ValueError(f"{len(steps)} products are too few to fit two constants")

    def off(d):
        p = Problem(0, 0, 1, 1, 2, 4, True, True, 1, device=d)
        return sum(abs(math.log(seconds(p, step) / measured)) for step, measured in steps)

    rates = range(_LEAST, _MOST + 1)
    return min((replace(device, tflops=device.tflops * i / 100, exposed=j / 50) for i in rates for j in range(51)), key=off)


def inside(sheet: Device, found: Device) -> bool:
    """Whether the fit ended between the rates that it looked at, and not at one of their ends."""
    return _LEAST < round(100 * found.tflops / sheet.tflops) < _MOST
