"""The command line: runs the parts, each in its own process, and prints a short table last.

    python -m benchmarks.gpu [--part paths,kernels] [--tokens 8192] [--minutes 9.5] ...
    python -m benchmarks.gpu --device cpu --tiny        everything but build and sanitizer, in a minute, to see that it runs
    python -m benchmarks.gpu --show FILE                the table of an earlier run
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from . import fastest
from .journal import Journal
from .parts import PARTS, ROOT, Record, run_parts
from .table import table


def parser():
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Proves and times what a GPU can, part by part.")
    p.add_argument("--part", help=f"only these, by comma: {', '.join(PARTS)}")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="small shapes: seconds, to see that everything runs")
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--sequences", type=int, default=32)
    p.add_argument("--depth", type=int, default=4096)
    p.add_argument("--vocab", type=int, default=151_936)
    p.add_argument("--paths", help="only these paths, by comma")
    p.add_argument("--providers", help="only these providers beside the products, by comma")
    p.add_argument("--tests", help="only these test files, by comma")
    p.add_argument("--rounds", type=int, default=9, help="timings per provider; who is slow takes three")
    p.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    p.add_argument("--commit", help="recorded as the commit where git does not know it")
    p.add_argument("--show", type=Path, help="print the table of this JSON file, measure nothing")
    for hidden in ("--child", "--journal", "--seconds", "--facts"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    return p


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return 0
    if options.facts:
        return write_facts(options)
    if options.child:
        return child(options)
    names = options.part.split(",") if options.part else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser().error(f"--part must be of {', '.join(PARTS)}, got {', '.join(unknown)}")

    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").absolute()
    with tempfile.TemporaryDirectory() as scratch:
        facts = ask_facts(arguments, Path(scratch, "facts.json"))
        if facts is None:
            return 2
        name = f"{facts['slug']}-gpu"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name}.log"
        log.unlink(missing_ok=True)
        record = Record(folder / f"{name}.json", facts)
        run_parts(names, options, arguments, record, log, scratch)
    if options.device == "cuda" and fastest.write(record.content):
        print(f"backend='auto' now follows {fastest.backends.FASTEST}")
    print(f"\n{record.path}, and what the parts printed: {log}")
    print(table(record.content, names))
    return 1 if any(record.content["parts"][name]["status"] not in ("ok", "skipped") for name in names) else 0


def ask_facts(arguments, file):
    """From a process of its own: this one never touches the device."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *arguments, "--facts", str(file)], cwd=ROOT)
    return json.loads(file.read_text()) if done.returncode == 0 and file.exists() else None


def write_facts(options):
    from . import device

    try:
        facts = device.facts(options.device, options.commit)
    except RuntimeError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    Path(options.facts).write_text(json.dumps({**facts, "slug": device.slug(facts["device"])}))
    return 0


def child(options):
    """The process of one part."""
    from . import context, device

    deadline = time.monotonic() + float(options.seconds)
    journal = Journal(options.journal)
    try:
        part = PARTS[options.child]
        module, function = part.where.split(":")
        run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        clock = device.clock(options.device) if part.clock else None
        run(context.Context(options, clock, journal, deadline))
    except context.Skipped as why:
        journal.note("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        journal.note("failed", f"{type(error).__name__}: {error}"[:300])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
