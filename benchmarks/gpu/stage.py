"""The process of a stage: its record, its time, going on behind a step that fails."""

import contextlib
import gc
import importlib
import json
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from grpo_kernels import backends, devices
from grpo_kernels.bench import clock, record, table
from grpo_kernels.bench.providers import OURS
from grpo_kernels.bench.shapes import TINY, Shape

from .programs import Skipped

LIMIT = 9500  # characters of a table


class Stage:
    def __init__(self, options):
        self.options, self.tiny, self.file, self.start = options, options.tiny, Path(options.record), float(options.start)
        self.deadline = self.start + float(options.seconds)
        self.shape, self.depths = (TINY, (32, 16)) if self.tiny else (Shape(8, 1024, 4096, 151_936), (4096, 2048, 896))
        name = f"{options.stage} {options.provider or ''}".strip()
        self.verdict = record.row("stage", name, None, kind="stage", status="unfinished", note="ended from outside")
        # what the same commit measured on the same device stays until it is measured again
        same = lambda r: all(r[key] == self.verdict[key] for key in ("commit", "device"))  # noqa: E731
        record.write(self.file, list(filter(same, read(self.file))))
        self.add()

    def run(self, module, function):
        self.clock = clock.of(self.options.device)
        gpu = [name for name in ("triton", "cuda") if backends.available_backends()[name] is None]
        self.backends = gpu if self.options.device == "cuda" else [backends.resolve("auto", self.clock.device, torch.bfloat16)]
        self.ours = f"{OURS}-{self.backends[0]}"
        getattr(importlib.import_module(module), function)(self)

    def add(self, *rows):
        """Into the record, in the place of rows that are about the same: a stage that is ended now leaves them behind."""
        about = lambda r: (r.get("kind"), r["provider"], r["path"], r["shape"])  # noqa: E731
        self.verdict["seconds"] = round(time.monotonic() - self.start, 1)
        gone = [about(r) for r in (self.verdict, *rows)]
        record.write(self.file, [self.verdict, *(r for r in read(self.file) if about(r) not in gone), *rows])

    def row(self, kind, provider, path, shape=None, times=(), **more):
        self.add(record.row(provider, path, shape, times, kind=kind, **more))

    @contextlib.contextmanager
    def attempt(self, kind, provider, path, shape=None):
        """Whatever goes wrong inside is a row; raises only where the device no longer answers."""
        try:
            yield
            return
        except Exception as error:
            traceback.print_exc()
            status = {torch.OutOfMemoryError: "out of memory", AssertionError: "wrong"}.get(type(error), "failed")
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.row(kind, provider, path, shape, status=status, note=note)
        gc.collect()
        self.clock.recover()

    def end(self, status, note=None):
        # a row without a kind may be another library's: what goes wrong there is its own
        rows = [r for r in read(self.file) if r["provider"].startswith(OURS) or r.get("kind") not in (None, "stage")]
        bad = [f"{r['provider']} {r['path']} {r['status']}" for r in rows if r["status"] in ("wrong", "failed", "out of memory")]
        self.verdict |= {"status": "failed" if bad else status, "note": note or "; ".join(bad[:3])}
        self.add()
        return int(self.verdict["status"] == "failed")


def main(options):
    if options.show:
        return show(options.show)
    if options.adopt:
        return devices.adopt([r for file in options.adopt for r in read(file)])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it ends the programs that it started
    stage = Stage(options)
    try:
        stage.run(*options.run.split(":"))
    except Skipped as why:
        return stage.end("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        return stage.end("failed", f"{type(error).__name__}: {error}"[:300])
    return stage.end("ok")


def read(file):
    """The rows of a record; none where it is missing."""
    return json.loads(Path(file).read_text()) if Path(file).exists() else []


def show(files):
    """Verdicts, then what the harness makes of the rows, cut where an output of some thousand characters is."""
    rows = [r for file in files for r in read(file)]
    lines = [f"{r['path']:26}{r['status']:11}{r['seconds']:4.0f} s  {r['note'] or ''}" for r in rows if r.get("kind") == "stage"]
    text = "\n".join(line[:132] for line in (*lines, *table.table([r for r in rows if r.get("kind") != "stage"])))
    print(text if len(text) <= LIMIT else text[: LIMIT - 50] + "\n... (cut; the rest is in the records)")
