"""One path: everybody is checked, then all are timed round by round, then the rows are written.

Checked means: loss and gradients of a copy of some 500 tokens under the same head against float64 autograd of the reference, and
log-probs and entropy of 256 rows of the full problem against float64. Who fails is recorded and not timed. Peak memory is that
of the first full call.
"""

import gc
import statistics
import time

from grpo_kernels.bench.check import accept, errors, worst
from grpo_kernels.engine.plan import default_budget

from . import products
from .context import Wrong, row
from .device import Timed
from .inputs import make_problem, smaller, truth
from .journal import key_of
from .providers import tile_rows

_SLOW, _SLOW_ROUNDS = 4, 3  # who takes four times as long as the fastest is timed three times
_WITHOUT_OURS = 1024  # rows of a chunk of products where no call of ours could be watched


def measure(context, base, path, providers, until):
    """Appends a row per provider, and per kind of products, to the journal; rounds end at ``until``, checks do not."""
    shape = shape_of(base.shape)
    done = f"{path.name}|{shape}"
    if done in context.journal.done:
        return
    problem = make_problem(base, path)
    part = smaller(problem)
    exact = truth(part)
    calls, found, peaks, heights = {}, {}, {}, {}
    about = {name: row(name, path.name, shape, peer=False) for name in products.NAMES}
    about |= {p.name: row(p.name, path.name, shape, peer=p.peer) for p in providers}

    for provider in providers:
        name = provider.name
        if _passed_over(context, about[name]):
            continue
        with context.attempt(about[name]):
            found[name] = _checked(name, provider.make(part)(), exact, part)
            call = provider.make(problem)
            if not provider.peer:
                heights[name] = tile_rows(call, context.device)
            result, peaks[name] = context.clock.peak(call)
            found[name] |= _scores(name, result, base)
            result = None
            calls[name] = call
    del exact, part
    context.clock.recover()

    height = next(iter(heights.values()), _WITHOUT_OURS)
    for name in products.NAMES:
        if _passed_over(context, about[name]):
            continue
        with context.attempt(about[name]):
            calls[name] = products.make(name, problem, height)
            heights[name] = problem.kept if name == products.WHOLE else height

    times = interleaved(context, {name: (about[name], Timed(call)) for name, call in calls.items()}, context.options.rounds, until)
    floor = min((statistics.median(times[name]) for name in products.FLOORS if times.get(name)), default=None)
    needed = path.products(problem.kept, problem.kept if path.beta else problem.live)
    settings = {p.name: dict(p.settings) for p in providers}
    for p in providers:
        if not p.peer and p.settings.get("workspace_bytes") is None:
            settings[p.name]["workspace_bytes"] = problem.workspace or default_budget(context.device.type)
    for name, seconds in times.items():
        errors_found = found.get(name, {})
        timed = row(name, path.name, shape, seconds, peer=about[name]["peer"])
        context.journal.row(timed | {
            "peak_bytes": peaks.get(name),
            "error": worst(errors_found, path.gradients),
            "errors": errors_found,
            "ratio": timed["median"] / floor if floor else None,
            "products": needed,
            "settings": settings.get(name, {}) | ({"tile_rows": heights[name]} if name in heights else {}),
        })  # fmt: skip
    context.journal.finish(done)


def interleaved(context, calls, rounds, until):
    """name -> seconds of its calls, from name -> (the beginning of its row, `Timed`); each round begins with another one."""
    times = {name: [] for name in calls}
    for about, timed in calls.values():  # the allocator's blocks are there then, and the clocks are up
        with context.attempt(about):
            context.clock.seconds(timed)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            names = [name for name in calls if key_of(calls[name][0]) not in context.journal.seen]
            turn = i % max(1, len(names))
            fastest = min((statistics.median(s) for s in times.values() if s), default=0)
            for name in names[turn:] + names[:turn]:
                slow = len(times[name]) >= _SLOW_ROUNDS and statistics.median(times[name]) > _SLOW * fastest
                if slow or (times[name] and time.monotonic() > until):
                    continue
                about, timed = calls[name]
                with context.attempt(about):
                    times[name].append(context.clock.seconds(timed))
    finally:
        gc.enable()
    return {name: s for name, s in times.items() if s and key_of(calls[name][0]) not in context.journal.seen}


def _passed_over(context, about):
    if context.already(about):
        return True
    if context.left() < 0:
        context.journal.row({**about, "status": "no time", "message": "the part's time was over"})
        return True
    return False


def _checked(name, result, exact, problem):
    found = errors(result, exact, problem.advantages.abs().mean().item(), problem.mask)
    try:
        accept(name, found, problem.workload)
    except AssertionError as error:
        raise Wrong(str(error)) from error
    return {k: v for k, v in found.items() if not k.startswith("logps")}


def _scores(name, result, base):
    """Largest errors of the sampled rows."""
    found = {}
    for quantity, exact in (("logps", base.exact_logps), ("entropy", base.exact_entropy)):
        ours = getattr(result, quantity)
        if ours is not None:
            found[f"{quantity}_max"] = (ours.flatten()[base.sample].double() - exact).abs().max().item()
    if not all(error <= 0.5 for error in found.values()):
        raise Wrong(f"{name}: {found} at full size")
    return found


def shape_of(shape):
    return shape.fields()
