"""One shape and workload: everybody is checked, then all are timed round by round.

Checked is the very call that is timed, its loss and gradients (or log-probs), against float64 autograd of the reference; plain
PyTorch in the same dtype is the yardstick. Who fails is a row with the reason, and is not timed. Every round times every provider
once, in an order of its own, so that what is compared ran within seconds, and nobody always follows the one that leaves the caches
worst. Ratios to the bare products are taken inside of a round. Of a call of milliseconds a round takes the median of several.

On a CPU a fresh process comes first: it gives peak memory and the seconds of a first call, and ends whatever hangs or crashes.
On a GPU the allocator knows the peak of the call that is checked.
"""

import collections
import contextlib
import functools
import gc
import random
import statistics
import time
import traceback
from dataclasses import dataclass

import torch

from . import memory, record
from .errors import accept, errors, worst
from .peers import Absent, full_logits
from .problem import make_problem, serves, truth, truth_bytes
from .providers import FULL, OURS, PRODUCTS

_SLOW, _SLOW_ROUNDS = 4, 3  # who takes four times as long as the fastest is timed three times
_LONG, _MOST_CALLS = 0.2, 9  # seconds of the calls of a round, where so many are enough for it
_LONGEST_CALL, _LONGEST_OWN = 60.0, 600.0  # seconds of a first call behind which another library, or ours, is given up
_SHARE_OF_MEMORY = 0.85  # of what is free may be taken
_STATUS = {Absent: "absent", AssertionError: "wrong", memory.TooLong: "too slow", MemoryError: "out of memory",
           torch.OutOfMemoryError: "out of memory"}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    rounds: int = 7
    memory: bool = True  # on a CPU: in a fresh process
    until: float = float("inf")  # time.monotonic() after which no further round and no other library is begun


# what several workloads on the same data share; plain: errors of plain PyTorch in the inputs' dtype, the yardstick
Truth = collections.namedtuple("Truth", "problem exact plain")


def measure(shape, workload, providers, clock, effort=Effort(), say=lambda text: None, shared=None):
    """A row per provider, in their order. ``shared`` holds the `Truth` of the workload before, if any, and then this one's."""
    problem = make_problem(shape, workload, device=clock.device)
    title, calls, found = f"{problem.shape} {workload.name}", {}, {p.name: {} for p in providers}
    known = None
    late, alone = time.monotonic() > effort.until, effort.memory and clock.device.type == "cpu"
    for provider in providers:
        if late and not _always(provider.name):
            note = "neither checked nor timed; name it with --providers, or leave --quick out"
            found[provider.name] |= {"status": "no time", "note": note}
        if provider.name == PRODUCTS or found[provider.name]:
            continue
        with _attempt(provider, found[provider.name], clock):
            provider.make(problem)
            if short := missing(clock, provider.logits * problem.heads * problem.kept * shape.vocab):
                raise Absent(short)
            if alone:
                say(f"{title}: {provider.name} alone")
                longest = _LONGEST_OWN if _always(provider.name) else _LONGEST_CALL
                found[provider.name] |= memory.in_fresh_process(provider.name, workload.name, shape, longest)
    able = [p for p in providers if "status" not in found[p.name]]
    if any(p.name != PRODUCTS for p in able):
        say(f"{title}: float64 reference")
        known, why = find_truth(problem, clock, [] if shared is None else shared)
    for provider in able:
        say(f"{title}: {'search for the floor' if provider.name == PRODUCTS else f'check {provider.name}'}")
        with _attempt(provider, found[provider.name], clock):
            if provider.name != PRODUCTS and known is None:
                raise Absent(why)
            calls[provider.name] = checked(provider, problem, known, found[provider.name], clock)
    peaks = {name: of.get("peak_bytes") for name, of in found.items()}
    trying = {p.name: functools.partial(_attempt, p, found[p.name], clock) for p in able}
    times = rounds(calls, clock, effort, say, title, peaks, trying, problem.weight.nbytes)
    rows = []
    for provider in providers:
        name, own = provider.name, times.get(provider.name, {})
        about = {"kept": problem.kept, "live": problem.live, "note": provider.note, **found[name]}
        if own:
            about["settings"] = getattr(calls[name], "settings", provider.settings)
        ratios = record.ratios(own, times.get(PRODUCTS, {}))
        rows.append(record.row(name, workload.name, problem.shape, list(own.values()), ratios=ratios, **about))
    return rows


def find_truth(problem, clock, shared):
    """(`Truth` of the problem or None, why not); the one in ``shared`` is used again if it is of the same data, else replaced."""
    if shared and serves(shared[0].problem, problem):
        return shared[0], None
    shared.clear()
    clock.recover()
    if short := missing(clock, truth_bytes(problem)):
        return None, f"not checked, so not timed: the float64 truth {short}"
    exact = plain = None
    try:
        exact = truth(problem)
        plain = _errors(problem, full_logits(problem)(), exact)
    except (MemoryError, torch.OutOfMemoryError) as error:
        if exact is None:
            return None, f"not checked, so not timed: {failure(error)[1]}"
    shared.append(Truth(problem, exact, plain))
    return shared[0], None


def checked(provider, problem, known, found, clock):
    """A call that computed what it shall; its errors go into ``found``. Raises AssertionError, or what the provider raises."""
    call = provider.make(problem)
    if provider.name == PRODUCTS:
        return call
    if clock.device.type == "cpu":
        result = call()
    else:
        result, found["peak_bytes"] = clock.peak(call)
    found["errors"] = _errors(problem, result, known.exact)
    found["error"] = worst(found["errors"], problem.workload.gradients)
    accept(provider.name, found["errors"], problem.workload, known.plain)
    return call


def _errors(problem, result, exact):
    return errors(result, exact, problem.loss_scale, problem.mask)


def failure(error):
    """(status, note) of a row for whatever a provider raised."""
    note = (str(error).strip() or repr(error)).splitlines()[0][:300]
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), "failed")
    named = status in ("failed", "out of memory") and not isinstance(error, memory.PointError)
    return status, f"{type(error).__name__}: {note}" if named else note


@contextlib.contextmanager
def _attempt(provider, found, clock):
    """Whatever goes wrong inside is the row's status."""
    try:
        yield
        return
    except Exception as error:
        found["status"], found["note"] = failure(error)
        if found["status"] == "failed" and provider.ours:
            traceback.print_exc()
    clock.recover()


def _always(name):
    """Of ours, full logits and the floor there is a figure, whatever the time."""
    return name in (PRODUCTS, FULL) or name.startswith(OURS)


def missing(clock, needed):
    """The reason if so many bytes are more than may be taken; None if they are not."""
    free = clock.free()
    if free is not None and needed > _SHARE_OF_MEMORY * free:
        return f"takes some {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    return None


def rounds(calls, clock, effort, say=lambda text: None, title="", peaks=None, trying=None, cold=0):
    """name -> {round: seconds}; whatever the time, at least one round of all and three of ours, the floor and full logits.

    ``peaks``: name -> bytes that the machine should have at hand; ``trying``: name -> what makes the context of each of its calls;
    ``cold``: bytes to write between the calls of one round.
    """
    times = {name: {} for name in calls}
    gc.collect()
    gc.disable()
    try:
        for i in range(effort.rounds):
            late = i and time.monotonic() > effort.until
            # a ratio without a spread cannot be believed: ours and what it is held against get three rounds
            names = [n for n in times if not late or (i < _SLOW_ROUNDS and _always(n))]
            random.Random(i).shuffle(names)
            fastest = min((statistics.median(t.values()) for t in times.values() if t), default=0)
            for name in names:
                done = times[name].values()
                if len(done) < _SLOW_ROUNDS or statistics.median(done) <= _SLOW * fastest:
                    say(f"{title}: round {i + 1} of {effort.rounds}, {name}")
                    size = (peaks or {}).get(name)
                    with trying[name]() if trying else contextlib.nullcontext():
                        times[name][i] = _typical(calls[name], clock, size or 0, cold)
    finally:
        gc.enable()
    return times


def _typical(call, clock, size, cold):
    """Seconds of one call: the median of an odd number of them, as many as fit `_LONG`.

    Behind a model's layers no row of the head is in a cache: before each call memory of the head's size is written.
    """
    done = [clock.seconds(call, before=lambda: clock.ready(size))]
    while len(done) < _MOST_CALLS and (len(done) % 2 == 0 or (len(done) + 2) * min(done) <= _LONG):
        done.append(clock.seconds(call, before=lambda: clock.ready(max(size, cold))))
    return statistics.median(done)
