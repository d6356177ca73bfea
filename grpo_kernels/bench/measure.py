"""One shape and workload: everybody is checked, peaks are measured in processes of their own, then all are timed round by round.

Checked means: loss and gradients (or log-probs) of a copy of some hundred tokens under the same head, against float64 autograd of
the reference; plain PyTorch in the same dtype is the yardstick. Who fails is a row with the reason, and is not timed.

Every round times every provider once and begins with another one, so that what is compared ran within seconds, and nobody always
follows the one that leaves the caches worst. Ratios to the bare products are taken inside of a round.
"""

import gc
import statistics
import time
import traceback
from dataclasses import dataclass

import torch

from . import memory, record
from .check import accept, errors, worst
from .clock import Timed
from .peers import Absent, full_logits
from .problem import checked_part, make_problem, truth, truth_bytes
from .providers import FULL, OURS, PRODUCTS, Provider
from .workloads import Workload

_SLOW, _SLOW_ROUNDS = 4, 3  # who takes four times as long as the fastest is timed three times
_ALWAYS = (PRODUCTS, FULL)  # whatever the time, as ours
_START_SECONDS = 5  # of a fresh process
_SHARE_OF_MEMORY = 0.85  # of what is free may be taken


@dataclass(frozen=True)
class Effort:
    rounds: int = 7
    memory: bool = True
    repeats: int = 1  # processes per point of our memory, whose median is kept
    until: float = float("inf")  # time.monotonic() after which no further round and no other library is begun
    warm: bool = True  # a full call before the rounds


def measure(shape, workload: Workload, providers: list[Provider], clock, effort: Effort, progress) -> list[dict]:
    """A row per provider, in their order."""
    problem = make_problem(shape, workload, device=clock.device)
    rows = _Rows(problem)
    checked, took = _check(problem, providers, clock, effort, rows, progress)
    peaks = _peaks(shape, workload, checked, took, effort, rows, progress) if effort.memory else {}
    calls = {}
    for provider in checked:
        with rows.attempt(provider):
            _room_for(provider, problem, clock)
            call = provider.make(problem)
            if effort.warm:
                call()
            calls[provider.name] = call
    times = rounds(calls, clock, effort, progress, f"{shape} {workload.name}", {n: p["peak_bytes"] for n, p in peaks.items()})
    floor = times.get(PRODUCTS, {})
    for provider in checked:
        name = provider.name
        if name in times and not rows.has(name):
            found = rows.errors.get(name, {})
            rows.add(
                provider, times=list(times[name].values()), ratios=record.ratios(times[name], floor),
                errors=found, error=worst(found, workload.gradients), **peaks.get(name, {}),
            )  # fmt: skip
    return [rows.by_name[p.name] for p in providers if p.name in rows.by_name]


class _Rows:
    """Rows by provider, and how a failure becomes one."""

    def __init__(self, problem):
        self.shape, self.workload = problem.shape, problem.workload
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
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            status = "out of memory"
        else:
            status = "failed"
            if self.provider.ours:
                traceback.print_exception(error)
        first = (str(error).strip() or repr(error)).splitlines()[0][:300]
        note = first if status in ("absent", "wrong") else f"{type(error).__name__}: {first}"
        self.rows.add(self.provider, status=status, note=note, errors=self.rows.errors.get(self.provider.name, {}))
        return True


def _check(problem, providers, clock, effort, rows, progress):
    """(the providers whose result was right, name -> seconds of the call); the others have a row then."""
    part = checked_part(problem)
    judged = [p for p in providers if p.name != PRODUCTS]
    exact = plain = None
    if judged:
        free, needed = clock.free(), truth_bytes(part)
        if free is not None and needed > _SHARE_OF_MEMORY * free:
            for p in judged:
                reason = f"not checked, so not timed: the float64 truth takes {_gib(needed)} GiB, {_gib(free)} are free"
                rows.add(p, status="absent", note=reason)
            return [p for p in providers if p.name == PRODUCTS], {}
        progress.say(f"{rows.shape} {rows.workload.name}: float64 reference")
        exact = truth(part)
        scale = part.advantages.abs().mean().item()
        plain = errors(full_logits(part)(), exact, scale)
    right, took = [], {}
    for provider in providers:
        if provider.name not in _ALWAYS and not provider.ours and time.monotonic() > effort.until:
            rows.add(provider, status="no time", note="neither checked nor timed; name it with --providers, or leave --quick out")
            progress.step()
            continue
        progress.say(f"{rows.shape} {rows.workload.name}: check {provider.name}")
        with rows.attempt(provider):
            call, start = provider.make(part), time.monotonic()
            result = call()
            took[provider.name] = time.monotonic() - start
            if provider.name != PRODUCTS:
                rows.errors[provider.name] = found = errors(result, exact, scale)
                accept(provider.name, found, rows.workload.gradients, plain)
            right.append(provider)
        result = call = None
        gc.collect()
        progress.step()
    return right, took


def _peaks(shape, workload, providers, took, effort, rows, progress):
    """name -> the fields of a row, each from a fresh process."""
    found = {}
    for provider in providers:
        progress.say(f"{rows.shape} {rows.workload.name}: memory of {provider.name}")
        needed = _START_SECONDS + 2 * took.get(provider.name, 0.0)
        if provider.name in _ALWAYS or provider.ours or time.monotonic() + needed < effort.until:
            try:
                repeats = effort.repeats if provider.ours else 1
                found[provider.name] = memory.in_fresh_processes(provider.name, workload.name, shape, repeats)
            except memory.PointError as error:
                found[provider.name] = {"peak_bytes": None, "peak_note": str(error)}
        else:
            found[provider.name] = {"peak_bytes": None, "peak_note": "no time was left to measure it"}
        progress.step()
    return found


def _room_for(provider, problem, clock):
    """Raises Absent where the call would take more memory than there is: the system would end the whole run."""
    free, needed = clock.free(), provider.logits * problem.shape.tokens * problem.shape.vocab
    if free is not None and needed > _SHARE_OF_MEMORY * free:
        raise Absent(f"takes some {_gib(needed)} GiB, {_gib(free)} are free")


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
            turn = i % max(1, len(names))
            fastest = min((statistics.median(t.values()) for t in times.values() if t), default=0)
            for name in names[turn:] + names[:turn]:
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

