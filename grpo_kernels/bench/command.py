"""`grpo-kernels bench`: what is measured, in which order, and what is printed."""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

from ..extras import needs
from . import clock as clocks
from . import plot, record, scaling, step, table
from .measure import Effort, measure
from .providers import FULL, LIGER, OURS, PRODUCTS, PROVIDERS, TRL, default_names
from .shapes import MODELS, TINY, parse, unknown
from .workloads import WORKLOADS

QUICK_WORKLOADS = ("dense", "frozen", "logprobs", "realistic")
QUICK_ROUNDS = 5
QUICK_TOKENS, CPU_TOKENS, GPU_TOKENS = 512, 1024, 8192
QUICK_SECONDS, QUICK_SECONDS_PEERS = 120, 310  # nothing that may be left out is begun after them; 180 and 360 are promised
_SCALED = (OURS, FULL, TRL, LIGER)
_KEYS = {"provider", "path", "shape", "status", "note", "median", "ratio", "peak_bytes", "error", "settings", "versions", "commit",
         "device", "cpu", "threads"}  # fmt: skip
_EPILOG = f"""\
models:      {", ".join(MODELS)}
workloads:   {", ".join(WORKLOADS)}
providers:   {", ".join(PROVIDERS)}

Every provider is checked against float64 before it is timed; who is absent, fails, is too slow or computes something else is shown
with the reason. Exit status: 0; 1 if this library itself failed or was wrong; 2 if the command line was.

  grpo-kernels bench --quick                                three to six minutes on two cores
  grpo-kernels bench --shapes qwen3-8b --json here.json     one head, everybody
  grpo-kernels bench --scaling --plot pics                  how time and memory grow
  grpo-kernels bench --from here.json --plot pics           the table and the pictures again, measuring nothing
"""


class Refused(Exception):
    """What was asked for cannot be done; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"bench: {message}; `bench --help` lists the options")


def parser():
    p = _Parser(
        prog="grpo-kernels bench", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_EPILOG,
        description="Time, memory and error of the loss on this machine, beside bare matrix products and other libraries.",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help=f"{QUICK_TOKENS} tokens of one model, few workloads and providers, minutes")
    p.add_argument("--shapes", metavar="NAME,...", help="models from the list below, or TOKENSxDxV such as 1024x896x151936")
    p.add_argument("--workloads", metavar="NAME,...", help="what is asked of the loss, from the list below")
    p.add_argument("--providers", metavar="NAME,...", help="who computes it, from the list below; the bare products always run")
    p.add_argument("--rounds", type=int, help="timings of each provider (7; slow ones take three)")
    p.add_argument("--tokens", type=int, help=f"of a model's shape ({CPU_TOKENS}; {GPU_TOKENS} on a GPU; a multiple of 64)")
    p.add_argument("--scaling", action="store_true", help="instead: time and memory over 1k to 64k tokens, 32k to 262k vocabulary")
    p.add_argument("--step", action="store_true", help="instead: one optimiser step of whole trainers, and the head's share of it")
    p.add_argument("--json", type=Path, metavar="FILE", help="write one JSON array of rows")
    p.add_argument("--plot", type=Path, metavar="DIR", help="write pictures (SVG)")
    p.add_argument("--from", type=Path, dest="source", metavar="FILE", help="take the rows of this JSON file, measure nothing")
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # seconds, to see that everything runs
    return p


def main(argv) -> int:
    """Raises `Refused` for what cannot be done."""
    options = parser().parse_args(argv)
    _check(options)
    started = time.monotonic()
    rows = read(options.source) if options.source else run(options, started)
    print(*table.table(rows), sep="\n")
    if options.plot:
        for file in plot.plot(rows, options.plot):
            print(file)
    if options.source:
        return 0
    print(f"\n{time.monotonic() - started:.0f} s" + (f", rows in {options.json}" if options.json else ""))
    ours = {r["status"] for r in rows if r["provider"].startswith(OURS) or r["provider"] in step.OURS}
    return int(bool(ours & {"wrong", "failed", "out of memory", "too slow"}) or (bool(ours) and "ok" not in ours))


def _check(options):
    """Before anything is measured: what would only be found out behind it."""
    if options.plot:
        with needs("bench", "bench --plot"):
            import matplotlib  # noqa: F401
    given = [f"--{n}" for n in ("json", "quick", "scaling", "step") if getattr(options, n)]
    for wrong, why in (
        (options.source and given, f"--from measures nothing, so it excludes {', '.join(given)}"),
        (options.json and options.json.is_dir(), f"--json {options.json}: is a folder"),
        (options.rounds is not None and options.rounds < 1, f"--rounds must be at least 1, got {options.rounds}"),
        ((options.scaling or options.step) and options.workloads, "--scaling and --step have a workload of their own"),
    ):
        if wrong:
            raise Refused(why)
    for option, folder in (("--plot", options.plot), ("--json", options.json and options.json.parent)):
        if folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise Refused(f"{option} {folder}: {error.strerror}") from error


def _say(text):
    """A line on stderr, in the place of the last one on a terminal."""
    on_terminal = sys.stderr.isatty()
    print(f"\r\033[K{text[:100]}" if on_terminal else text, end="" if on_terminal else "\n", file=sys.stderr, flush=True)


def run(options, started, say=_say):
    """The rows of everything that was asked for. They are written as they are found: a run that is broken off was not in vain."""
    clock, rows = clocks.here(), []
    shapes, workloads, providers = chosen(options, clock)

    def found(more):
        rows.extend(more)
        if options.json:
            record.write(options.json, rows)

    rounds = options.rounds or (QUICK_ROUNDS if options.quick else 7)
    peers = any(p.name in (TRL, LIGER) for p in providers)
    seconds = (QUICK_SECONDS_PEERS if peers else QUICK_SECONDS) if options.quick else math.inf
    left = len(shapes) * len(workloads)
    for shape in () if options.scaling or options.step else shapes:
        slow, shared = {}, []
        for workload in workloads:
            now = time.monotonic()
            effort = Effort(rounds, until=now + max(0.0, started + seconds - now) / left)
            more = measure(shape, workload, [p for p in providers if p.name not in slow], clock, effort, say, shared)
            # who was too slow for one workload of a head is not asked for the others
            found(more + [record.row(n, workload.name, workload.laid_out(shape), **row) for n, row in slow.items()])
            late = [r for r in more if r["status"] == "too slow"]
            slow |= {r["provider"]: {"status": "too slow", "note": f"{r['note']}, in {workload.name}"} for r in late}
            left -= 1
    if options.scaling:
        scaled = [p for p in providers if p.name in _SCALED or (options.providers and p.name != PRODUCTS)]
        over = [("tokens", scaling.axes(TINY)[0][1][:3])] if options.tiny else scaling.axes(shapes[0])
        found(scaling.sweep(scaled, over, clock, say))
    if options.step:
        lengths, layers = ((16,), 0) if options.tiny else (step.LENGTHS, 24)
        found(step.measure(lengths, layers, options.rounds or 3, say))
    return rows


def chosen(options, clock):
    """(shapes, workloads, providers) by the options' names."""
    on_gpu = clock.device.type == "cuda"
    tokens = options.tokens or (QUICK_TOKENS if options.quick else GPU_TOKENS if on_gpu else CPU_TOKENS)
    if tokens < 64 or tokens % 64:
        raise Refused(f"--tokens must be a multiple of 64, got {tokens}")
    names = _split("--shapes", options.shapes) or list(MODELS)[: 1 if options.quick or not on_gpu else None]
    try:
        shapes = [TINY] if options.tiny else [parse(name, tokens) for name in names]
    except ValueError as error:
        raise Refused(f"--shapes: {error}") from error
    workloads = _split("--workloads", options.workloads, WORKLOADS) or (QUICK_WORKLOADS if options.quick else WORKLOADS)
    named = _split("--providers", options.providers, PROVIDERS)
    providers = default_names(options.quick, clock.device) if named is None else dict.fromkeys([PRODUCTS, *named])
    return shapes, [WORKLOADS[n] for n in workloads], [PROVIDERS[n] for n in providers]


def _split(option, text, known=()):
    """The names in a list by comma, or None where the option was not given."""
    if text is None:
        return None
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise Refused(f"{option} names nothing")
    for name in names if known else ():
        if name not in known:
            raise Refused(f"{option}: {unknown(name, known)}")
    return names


def read(path):
    """The rows of a JSON file that `--json` wrote; raises `Refused` for anything else."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"--from {path}: not a file of JSON ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and r.keys() >= _KEYS for r in rows):
        raise Refused(f"--from {path}: wanted the array of rows that --json writes")
    return rows
