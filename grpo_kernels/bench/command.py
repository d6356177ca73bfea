"""`grpo-kernels bench`: what is measured, in which order, and what is printed."""

import argparse
import difflib
import json
import math
import os
import time
from pathlib import Path

from . import clock as clocks
from . import plot, record, scaling, step, table
from .measure import Effort, measure
from .progress import Progress
from .providers import FULL, LIGER, OURS, PRODUCTS, PROVIDERS, TRL, default_names
from .shapes import MODELS, TINY, Shape, parse
from .workloads import WORKLOADS

QUICK_WORKLOADS = ("dense", "frozen", "logprobs", "realistic")
QUICK_ROUNDS = 5
QUICK_TOKENS, CPU_TOKENS, GPU_TOKENS = 512, 1024, 8192
QUICK_SECONDS, QUICK_SECONDS_PEERS = 120, 310  # nothing that may be left out is begun after them; 180 and 360 are promised
_SCALED = (OURS, FULL, TRL, LIGER)
_EPILOG = """\
models:      {models}
workloads:   {workloads}
providers:   {providers}

Every provider is checked against float64 before it is timed; who is absent, fails, is too slow or computes something else is shown
with the reason. Exit status: 0; 1 if this library itself failed or was wrong; 2 if the command line was.

  grpo-kernels bench --quick                                three to six minutes on two cores
  grpo-kernels bench --shapes qwen3-8b --json here.json     one head, everybody
  grpo-kernels bench --scaling --fit-memory 8 --plot pics   how time and memory grow, and what fits
  grpo-kernels bench --from here.json --plot pics           the table and the pictures again, measuring nothing
"""


class Refused(Exception):
    """What was asked for cannot be done; the message says why."""


class UnknownName(Refused):
    """A name that is not known; the message suggests some that are."""


def parser():
    p = argparse.ArgumentParser(
        prog="grpo-kernels bench", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time, memory and error of the loss on this machine, beside bare matrix products and other libraries.",
        epilog=_EPILOG.format(models=", ".join(MODELS), workloads=", ".join(WORKLOADS), providers=", ".join(PROVIDERS)),
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} tokens of one model, few workloads and providers, minutes")
    p.add_argument("--shapes", metavar="NAME,...", help="models from the list below, or TOKENSxDxV such as 1024x896x151936")
    p.add_argument("--workloads", metavar="NAME,...", help="what is asked of the loss, from the list below")
    p.add_argument("--providers", metavar="NAME,...", help="who computes it, from the list below; the bare products always run")
    p.add_argument("--rounds", type=int, help="timings of each provider (7; slow ones take three)")
    p.add_argument("--tokens", type=int, help=f"of a model's shape ({CPU_TOKENS}; {GPU_TOKENS} on a GPU; a multiple of 64)")
    p.add_argument("--scaling", action="store_true", help="also: time and memory over 1k to 64k tokens and 32k to 262k vocabulary")
    p.add_argument("--fit-memory", type=float, metavar="GIB", help="also: the most tokens whose peak is within this memory")
    p.add_argument("--step", action="store_true", help="also: one optimiser step of whole trainers, and the head's share of it")
    p.add_argument("--json", type=Path, metavar="FILE", help="write one JSON array of rows")
    p.add_argument("--plot", type=Path, metavar="DIR", help="write pictures (SVG)")
    p.add_argument("--from", type=Path, dest="source", metavar="FILE", help="take the rows of this JSON file, measure nothing")
    p.add_argument("--only", action="store_true", help="with --scaling, --fit-memory or --step: only these, no table of workloads")
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # seconds, to see that everything runs
    return p


def main(argv) -> int:
    """Raises `Refused` for what cannot be done."""
    options = parser().parse_args(argv)
    _check(options)
    started = time.monotonic()
    rows = read(options.source) if options.source else run(options, started, _writer(options.json))
    show(rows)
    if not options.source:
        print(f"\n{time.monotonic() - started:.0f} s" + (f", rows in {options.json}" if options.json else ""))
    if options.plot:
        for file in plot.plot(rows, options.plot):
            print(file)
    if options.source:
        return 0
    ours = [r for r in rows if _is_ours(r)]
    bad = any(r["status"] in ("wrong", "failed", "out of memory", "too slow") for r in ours)
    return 1 if bad or (ours and all(r["status"] != "ok" for r in ours)) else 0


def _check(options):
    """Before anything is measured: what would only be found out behind it."""
    given = [f"--{n}" for n in ("json", "quick", "scaling", "step", "only") if getattr(options, n)]
    if options.source and given:
        raise Refused(f"--from measures nothing, so it excludes {', '.join(given)}")
    if options.plot:
        plot.need_matplotlib()
        _make_folder("--plot", options.plot)
    if options.json:
        if options.json.is_dir():
            raise Refused(f"--json {options.json}: is a folder")
        _make_folder("--json", options.json.parent)
    for name in ("workloads", "providers", "shapes"):
        if getattr(options, name) is not None and not _split(getattr(options, name)):
            raise Refused(f"--{name} names nothing")
    if options.rounds is not None and options.rounds < 1:
        raise Refused(f"--rounds must be at least 1, got {options.rounds}")
    if options.fit_memory is not None and not 0 < options.fit_memory < math.inf:
        raise Refused(f"--fit-memory must be a number of GiB > 0, got {options.fit_memory:g}")
    if options.only and not (options.scaling or options.fit_memory or options.step):
        raise Refused("--only needs --scaling, --fit-memory or --step")
    if options.only and options.workloads:
        raise Refused("--only leaves the workloads out, so it excludes --workloads")


def _make_folder(option, path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{option} {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise Refused(f"{option} {path}: not to be written")


def _writer(path):
    """Writes the rows found so far, so that a run that is broken off has not been in vain."""
    return (lambda rows: record.write(path, rows)) if path else (lambda rows: None)


def run(options, started, save):
    """The rows of everything that was asked for."""
    clock = clocks.here()
    shapes, workloads, providers = chosen(options, clock)
    peers = any(p.name in (TRL, LIGER) for p in providers)
    count = len(shapes) * len(workloads)
    most = options.rounds or (QUICK_ROUNDS if options.quick else 7)
    extra = options.scaling or options.fit_memory
    progress = Progress(0 if options.only else count * (2 * len(providers) + most))
    rows = []
    try:
        if not options.only:
            allowed = QUICK_SECONDS_PEERS if peers else QUICK_SECONDS
            for shape in shapes:
                slow, shared = {}, []
                for workload in workloads:
                    until = float("inf")
                    if options.quick:
                        now, left = time.monotonic(), count - len({(str(r["shape"]), r["path"]) for r in rows})
                        until = now + max(0.0, started + allowed - now) / max(1, left)
                    effort = Effort(most, repeats=1 if options.quick else 3, until=until)
                    able = [p for p in providers if p.name not in slow]
                    found = measure(shape, workload, able, clock, effort, progress, shared)
                    # who was too slow for one workload of a head is not asked for the others
                    laid_out = workload.laid_out(shape)
                    found += [record.row(n, workload.name, laid_out, status="too slow", note=why) for n, why in slow.items()]
                    slow |= {r["provider"]: f"{r['note']}, in {workload.name}" for r in found
                             if r["status"] == "too slow" and r["provider"] not in slow}  # fmt: skip
                    rows += found
                    save(rows)
        if extra:
            scaled = [p for p in providers if p.name in _SCALED or (options.providers and p.name != PRODUCTS)]
            only = None if options.scaling else scaling.axes(shapes[0])[:1]
            if options.tiny:
                only = [(axis, few[:3]) for axis, few in scaling.axes(TINY)[:1]]
            found = scaling.sweep(scaled, shapes[0], clock, progress, only=only)
            rows += found
            if options.fit_memory:
                rows += fits(scaled, found, shapes[0].vocab, options)
            save(rows)
        if options.step:
            lengths, layers = ((16,), 0) if options.tiny else (step.LENGTHS, 24)
            rows += step.measure(lengths, layers, options.rounds or 3, progress)
            save(rows)
    finally:
        progress.close()
    return rows


def fits(providers, found, vocab, options):
    points = lambda name: [  # noqa: E731
        r for r in found
        if r["provider"] == name and r["kind"] == "scaling" and (options.tiny or r["shape"]["vocab"] == vocab)
    ]  # fmt: skip
    return [scaling.largest(p.name, points(p.name), options.fit_memory) for p in providers if any(map(_measured, points(p.name)))]


def _measured(r):
    return r["median"] is not None


def chosen(options, clock):
    """(shapes, workloads, providers) by the options' names."""
    on_gpu = clock.device.type == "cuda"
    tokens = options.tokens or (QUICK_TOKENS if options.quick else GPU_TOKENS if on_gpu else CPU_TOKENS)
    if tokens < 64 or tokens % 64:
        raise Refused(f"--tokens must be a multiple of 64, got {tokens}")
    names = _split(options.shapes) or (list(MODELS)[:1] if options.quick or not on_gpu else list(MODELS))
    shapes = [_shape(name, tokens) for name in names]
    if options.tiny:
        shapes = [TINY]
    workloads = _named("--workloads", options.workloads, WORKLOADS) or (
        [WORKLOADS[n] for n in QUICK_WORKLOADS] if options.quick else list(WORKLOADS.values())
    )
    providers = _named("--providers", options.providers, PROVIDERS)
    if providers is None:
        providers = [PROVIDERS[n] for n in default_names(options.quick, clock.device)]
    elif PROVIDERS[PRODUCTS] not in providers:
        providers.insert(0, PROVIDERS[PRODUCTS])
    return shapes, workloads, providers


def _shape(name, tokens) -> Shape:
    try:
        return parse(name, tokens)
    except KeyError:
        raise UnknownName(f"--shapes: unknown model {name!r}{_suggest(name, MODELS)}") from None
    except ValueError as error:
        raise Refused(f"--shapes: {error}") from error


def _named(option, text, known):
    names = _split(text)
    if names is None:
        return None
    for name in names:
        if name not in known:
            raise UnknownName(f"{option}: unknown name {name!r}{_suggest(name, known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _split(text):
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _suggest(name, known):
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(known)}, and TOKENSxDxV for a shape"


def read(path):
    """The rows of a JSON file that `--json` wrote; raises `Refused` for anything else."""
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise Refused(f"--from {path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"--from {path}: not JSON ({error})") from error
    keys = {"provider", "path", "shape", "status", "note", "median", "peak_bytes", "error", "versions", "commit", "device", "cpu",
            "threads"}  # fmt: skip
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and keys <= r.keys() for r in rows):
        raise Refused(f"--from {path}: wanted the array of rows that --json writes")
    return rows


def show(rows):
    """Everything as text."""
    if rows:
        r = rows[0]
        versions = ", ".join(f"{name} {v}" for name, v in r["versions"].items())
        print(f"{r['device']}; {r['cpu']}, {r['threads']} threads; commit {r['commit']}\n{versions}")
    for line in (*table.table(rows), *table.scaling_table(rows), *table.step_table(rows)):
        print(line)


def _is_ours(r):
    return r["provider"].startswith(OURS) or r["provider"] in ("thin trainer", "trl fused", "trl patched")

