"""One shape and workload: everybody runs alone in a fresh process, is checked, then all are timed round by round.

The fresh process gives peak memory and the seconds of a first call, and ends whatever hangs or crashes before it can end this one.
Checked means: loss and gradients (or log-probs) of the very call that is timed, against float64 autograd of the reference; plain
PyTorch in the same dtype is the yardstick. Who fails is a row with the reason, and is not timed.

Every round times every provider once, in an order of its own, so that what is compared ran within seconds, and nobody always
follows the one that leaves the caches worst. Ratios to the bare products are taken inside of a round.
"""

import gc
import random
import statistics
import time
import traceback
from dataclasses import dataclass

import torch

from . import memory, record
from .check import accept, errors, worst
from .clock import Timed
from .peers import Absent, full_logits
from .problem import Problem, Result, make_problem, same_data, truth, truth_bytes
from .providers import FULL, OURS, PRODUCTS, Provider
from .workloads import Workload

_SLOW, _SLOW_ROUNDS = 4, 3  # who takes four times as long as the fastest is timed three times
_ALWAYS = (PRODUCTS, FULL)  # whatever the time, as ours
_PROCESS_SECONDS = 8  # of a fresh process, its call apart
_LONGEST_CALL = 60.0  # seconds of another library's first call behind which it is neither checked nor timed
_LONGEST_OWN = 600.0
_REPEATED = 2.0  # seconds: who is faster gets as many processes as are asked for, whoever it is; the others one
_SHARE_OF_MEMORY = 0.85  # of what is free may be taken


@dataclass(frozen=True)
class Effort:
    rounds: int = 7
    memory: bool = True
    repeats: int = 1  # processes per point of memory, whose median is kept
    until: float = float("inf")  # time.monotonic() after which no further round and no other library is begun


@dataclass
class Truth:
    """What several workloads on the same data share."""

    problem: Problem
    exact: Result
    plain: Result | None  # plain PyTorch's answer in the inputs' dtype, the yardstick


def measure(shape, workload: Workload, providers: list[Provider], clock, effort: Effort, progress, shared: list | None = None):
    """A row per provider, in their order. ``shared`` holds the `Truth` of the workload before, if any, and then this one's."""
    shared = [] if shared is None else shared
    problem = make_problem(shape, workload, device=clock.device)
    rows = _Rows(problem, clock)
    able = [p for p in providers if _can(p, problem, rows, effort, progress)]
    peaks = _peaks(shape, workload, able, effort, rows, progress) if effort.memory else {}
    able = [p for p in able if not rows.has(p.name)]
    known = None
    if any(p.name != PRODUCTS for p in able):
        progress.say(f"{rows.shape} {workload.name}: float64 reference")
        known, note = find_truth(problem, clock, shared)
        for p in able if known is None else ():
            if p.name != PRODUCTS:
                rows.add(p, status="absent", note=note)
        able = [p for p in able if not rows.has(p.name)]
    calls = {}
    for provider in able:
        progress.say(f"{rows.shape} {workload.name}: check {provider.name}")
        with rows.attempt(provider):
            rows.errors[provider.name] = {}
            calls[provider.name] = checked(provider, problem, known, rows.errors[provider.name])
        progress.step()
    ready = {name: found.get("peak_bytes") for name, found in peaks.items()}
    times = rounds(calls, clock, effort, progress, f"{shape} {workload.name}", ready)
    floor = times.get(PRODUCTS, {})
    for provider in able:
        name = provider.name
        if name in times and not rows.has(name):
            found = rows.errors[name]
            rows.add(
                provider, times=list(times[name].values()), ratios=record.ratios(times[name], floor),
                errors=found, error=worst(found, workload.gradients), **peaks.get(name, {}),
            )  # fmt: skip
    return [rows.by_name[p.name] for p in providers if p.name in rows.by_name]


def find_truth(problem, clock, shared=()):
    """(`Truth` of the problem or None, why not); the one in ``shared`` is used again if it is of the same data, else replaced."""
    w = problem.workload
    for before in shared:
        b = before.problem.workload
        if same_data(before.problem, problem) and (b.gradients or not w.gradients) and (b.trains_head or not w.trains_head):
            return before, None
    before = b = None
    if shared:
        shared.clear()
    clock.recover()
    free, needed = clock.free(), truth_bytes(problem)
    if free is not None and needed > _SHARE_OF_MEMORY * free:
        return None, f"not checked, so not timed: the float64 truth takes {_gib(needed)} GiB, {_gib(free)} are free"
    exact = truth(problem)
    try:
        plain = full_logits(problem)()
    except (MemoryError, torch.OutOfMemoryError):
        plain = None
    if isinstance(shared, list):
        shared.append(Truth(problem, exact, plain))
        return shared[0], None
    return Truth(problem, exact, plain), None


def checked(provider, problem, known, found):
    """A call that computed what it shall; its errors go into ``found``. Raises AssertionError, or what the provider raises."""
    call = provider.make(problem)
    result = call()
    if provider.name != PRODUCTS:
        scale = problem.advantages.abs().mean().item()
        found |= errors(result, known.exact, scale, problem.mask)
        plain = None if known.plain is None else errors(known.plain, known.exact, scale, problem.mask)
        accept(provider.name, found, problem.workload, plain)
    return call


class _Rows:
    """Rows by provider, and how a failure becomes one."""

    def __init__(self, problem, clock):
        self.shape, self.workload, self.clock = problem.shape, problem.workload, clock
        self.counts = {"kept": problem.kept, "live": problem.live}
        self.by_name, self.errors = {}, {}

    def has(self, name):
        return name in self.by_name

    def add(self, provider, **fields):
        fields.setdefault("note", provider.note)
        self.by_name[provider.name] = record.row(
            provider.name, self.workload.name, self.shape, settings=provider.settings, **self.counts, **fields
        )

    def attempt(self, provider):
        return _Attempt(self, provider)


class _Attempt:
    """Whatever goes wrong inside is a row."""

    def __init__(self, rows, provider):
        self.rows, self.provider = rows, provider

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return False
        if isinstance(error, Absent):
            status = "absent"
        elif isinstance(error, AssertionError):
            status = "wrong"
        elif isinstance(error, memory.TooLong):
            status = "too slow"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            status = "out of memory"
        else:
            status = "failed"
            if self.provider.ours:
                traceback.print_exception(error)
        first = (str(error).strip() or repr(error)).splitlines()[0][:300]
        plain = status in ("absent", "wrong", "too slow") or isinstance(error, memory.PointError)
        note = first if plain else f"{type(error).__name__}: {first}"
        self.rows.add(self.provider, status=status, note=note, errors=self.rows.errors.get(self.provider.name, {}))
        error = None
        gc.collect()
        self.rows.clock.recover()
        return True


def _can(provider, problem, rows, effort, progress):
    """Whether the provider exists, fits and has the time; it has a row otherwise."""
    if not _has_time(provider, effort):
        rows.add(provider, status="no time", note="neither checked nor timed; name it with --providers, or leave --quick out")
        progress.step(2)
        return False
    with rows.attempt(provider):
        provider.make(problem)
        free, needed = rows.clock.free(), provider.logits * problem.kept * problem.shape.vocab
        if free is not None and needed > _SHARE_OF_MEMORY * free:
            raise Absent(f"takes some {_gib(needed)} GiB, {_gib(free)} are free")
        return True
    progress.step(2)
    return False


def _has_time(provider, effort, more=0.0):
    return provider.name in _ALWAYS or provider.ours or time.monotonic() + more < effort.until


def _peaks(shape, workload, providers, effort, rows, progress):
    """name -> the fields of a row, each from a fresh process."""
    found = {}
    for provider in providers:
        progress.say(f"{rows.shape} {rows.workload.name}: memory of {provider.name}")
        own = provider.ours or provider.name in _ALWAYS
        with rows.attempt(provider):
            points = []
            for i in range(effort.repeats):
                if i and (points[0]["cold_seconds"] > _REPEATED or not _has_time(provider, effort, _PROCESS_SECONDS)):
                    break
                points.append(memory.in_fresh_process(provider.name, workload.name, shape, _LONGEST_OWN if own else _LONGEST_CALL))
            found[provider.name] = memory.median(points)
        progress.step()
    return found


def rounds(calls, clock, effort, progress, title, peaks):
    """name -> {round: seconds}; whatever the time, at least one round of all and three of ours, the floor and full logits."""
    times = {name: {} for name in calls}
    gc.collect()
    gc.disable()
    try:
        for i in range(effort.rounds):
            names = list(times)
            if i and time.monotonic() > effort.until:
                # a ratio without a spread cannot be believed: who is fast anyway gets three
                names = [n for n in names if i < _SLOW_ROUNDS and (n in _ALWAYS or n.startswith(OURS))]
                if not names:
                    break
            random.Random(i).shuffle(names)
            fastest = min((statistics.median(t.values()) for t in times.values() if t), default=0)
            for name in names:
                done = times[name].values()
                if len(done) >= _SLOW_ROUNDS and statistics.median(done) > _SLOW * fastest:
                    continue
                progress.say(f"{title}: round {i + 1} of {effort.rounds}, {name}")
                before = lambda name=name: clock.ready(peaks.get(name))  # noqa: E731
                times[name][i] = clock.seconds(Timed(calls[name], before))
            progress.step()
    finally:
        gc.enable()
    return times


def _gib(size):
    return f"{size / 2**30:.1f}"
