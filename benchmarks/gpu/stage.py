"""The process of a stage: its record, its time, going on behind a step that fails."""

import contextlib
import importlib
import json
import time
import traceback
from pathlib import Path

import torch

from grpo_kernels import backends, devices
from grpo_kernels.bench import clock, record, table
from grpo_kernels.bench.providers import OURS
from grpo_kernels.bench.shapes import TINY, Shape

FIRST = ("error", "device", "rate", "kernel", "height", "program", "product")  # of a table that may be cut


class Stage:
    def __init__(self, options):
        self.clock = clock.of(options.device)  # where there is none the record stays as it is
        self.options, self.tiny, self.file, self.start = options, options.tiny, Path(options.record), float(options.start)
        self.deadline = self.start + float(options.seconds) - 3  # before it is ended from outside
        self.shape, self.depths = (TINY, (32, 16)) if self.tiny else (Shape(8, 1024, 4096, 151_936), (4096, 2048, 896))
        self.verdict = record.row("stage", options.stage, None, kind="stage", status="unfinished", note="ended from outside")
        record.write(self.file, self.kept(self.file))
        self.add()

    def kept(self, file):
        """What the same commit measured on the same device: it stays until it is measured again."""
        return [r for r in read(file) if all(r[key] == self.verdict[key] for key in ("commit", "device"))]

    def run(self, module, function):
        """Returns why there was nothing to do, or None."""
        names, why_not = ("triton", "cuda") if self.options.device == "cuda" else ("cpu",), backends.available_backends()
        self.backends = [name for name in names if why_not[name] is None] or ["torch"]  # the first one decides
        self.ours = f"{OURS}-{self.backends[0]}"
        return getattr(importlib.import_module(module), function)(self)

    def add(self, *rows):
        """Into the record, in the place of rows that are about the same: a stage that is ended now leaves them behind."""
        about = lambda r: (r.get("kind"), r["provider"], r["path"], r["shape"])  # noqa: E731
        self.verdict["seconds"] = round(time.monotonic() - self.start, 1)
        gone = [about(r) for r in (self.verdict, *rows)]
        record.write(self.file, [self.verdict, *(r for r in read(self.file) if about(r) not in gone), *rows])

    def row(self, kind, provider, path, shape=None, times=(), **more):
        self.add(record.row(provider, path, shape, times, kind=kind, **more))

    def timed(self, call, rounds=5):
        """Seconds of a call without the host's, behind a first one."""
        call()
        return [self.clock.seconds(call, ahead=True) for _ in range(rounds)]

    def rate(self, path, call, amount, *arguments):
        """A row of how much there is of it a second, which is returned."""
        times = self.timed(lambda: call(*arguments))
        self.row("rate", "device", path, None, times, rate=amount / min(times), says=f"{amount / min(times):.3g} a second")
        return amount / min(times)

    def copy(self):
        """Bytes read and written a second."""
        a, b = torch.empty(2, 2**17 if self.tiny else 2**28, device=self.clock.device).normal_()
        return self.rate("copy", b.copy_, 8 * len(a), a)

    @contextlib.contextmanager
    def attempt(self, *about):
        """Whatever goes wrong inside is a row; raises only where the device no longer answers."""
        try:
            yield
            return
        except Exception as error:
            traceback.print_exc()
            status = {torch.OutOfMemoryError: "out of memory", AssertionError: "wrong"}.get(type(error), "failed")
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.row(*about, status=status, note=note)
        self.clock.recover()

    def end(self, status, note=None):
        # a row without a kind may be another library's: what goes wrong there is its own
        rows = [r for r in read(self.file) if r["provider"].startswith(OURS) or r.get("kind") not in (None, "stage")]
        bad = [f"{r['provider']} {r['path']} {r['status']}" for r in rows if r["status"] in ("wrong", "failed", "out of memory")]
        self.verdict |= {"status": "failed" if bad else status, "note": note or "; ".join(bad[:3])}
        self.add()
        return int(self.verdict["status"] == "failed")


def main(options):
    if files := options.show or options.adopt:
        rows = [r for file in files for r in read(file)]
        return show(rows) if options.show else devices.adopt(rows)
    stage = Stage(options)
    try:
        why = stage.run(*options.run.split(":"))
    except Exception as error:
        traceback.print_exc()
        return stage.end("failed", f"{type(error).__name__}: {error}"[:300])
    finally:  # also of a stage that is ended from outside
        if options.device == "cuda" and not options.tiny:
            devices.adopt(read(stage.file))
    return stage.end("skipped" if why else "ok", why)


def read(file):
    return json.loads(Path(file).read_text()) if Path(file).exists() else []


def show(rows, most=9500):
    """Verdicts, then what the harness makes of the rows, in so many characters."""
    lines = [f"{r['path']:26}{r['status']:11}{r['seconds']:4.0f} s  {r['note'] or ''}" for r in rows if r.get("kind") == "stage"]
    loss, other = [r for r in rows if "kind" not in r], [r for kind in FIRST for r in rows if r.get("kind") == kind]
    text = "\n".join(line[:132] for line in (*lines, *table.table(loss), *list(table.table(other))[2 * bool(loss) :]))
    print(text if len(text) < most else text[: most - 50] + "\n... (cut; the rest is in the records)")
