"""A part is a process of its own with a time limit, and everything it measured stands in one JSON file.

A part that raises, hangs, or takes the device's context with it ends neither the others nor itself: what it had begun is written
down as crashed, and a fresh process goes on behind it. This file imports no PyTorch.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .journal import RESTART, read

ROOT = Path(__file__).parents[2]
_LIVES = 5
_MARGIN, _LONGEST_MARGIN = 0.2, 15  # share of a part's time, and seconds, in which it begins nothing new
_BAD = ("wrong", "failed", "crashed", "out of memory")


@dataclass(frozen=True)
class Part:
    where: str  # module:function
    share: int  # of the time that is left, against the shares of the parts behind it
    stall: int | None = None  # seconds without a line in the journal after which the step is given up
    clock: bool = True  # whether it runs on the device itself


# In this order. Seconds out of some 570; the sanitizer comes last, since it takes whatever it is given.
PARTS = {
    "build": Part("programs:run_build", 60, clock=False),
    "test": Part("programs:run_test", 110, clock=False),
    "paths": Part("paths:run_paths", 190, stall=100),
    "kernels": Part("kernels:run", 35, stall=60),
    "sweep": Part("sweep:run", 60, stall=60),
    "shapes": Part("paths:run_shapes", 55, stall=60),
    "sanitizer": Part("programs:run_sanitizer", 70, clock=False),
}


class Record:
    """The one JSON file; parts of an earlier run on the same device that are not run again stay in it."""

    def __init__(self, path, facts):
        self.path, self.facts = Path(path), facts
        earlier = {}
        with contextlib.suppress(OSError, ValueError):
            earlier = json.loads(self.path.read_text())
        same = earlier.get("device") == facts["device"]
        self.content = {**facts, "parts": earlier.get("parts", {}) if same else {}}

    def put(self, name, part):
        self.content["parts"][name] = part | {"commit": self.facts["commit"], "date": self.facts["date"]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self.path)  # a run that is killed here leaves the last whole file


def run_parts(names, options, arguments, record, log, folder):
    """Runs the parts, one after the other; each gets its share of what time is left."""
    end = time.monotonic() + 60 * options.minutes
    for i, name in enumerate(names):
        shares = [PARTS[other].share for other in names[i:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        part = run_part(name, seconds, arguments, Path(folder, f"{name}.jsonl"), log, lambda p, name=name: record.put(name, p))
        record.put(name, part)
        print(f"{name}: {part['status']}, {part['seconds']:.0f} s{', ' + part['message'] if part['message'] else ''}", flush=True)


def run_part(name, seconds, arguments, journal, log, save=lambda part: None):
    """{status, seconds, message, rows} of a part that was given ``seconds``."""
    start = time.monotonic()
    ended = "too late"
    for _ in range(_LIVES):
        left = seconds - (time.monotonic() - start)
        if left < 1:
            break
        ended = _live(name, left, arguments, journal, log, lambda: save(_result(journal, "running", start)))
        if ended not in ("restart", "crashed", "stalled"):
            break
    return _result(journal, ended, start)


def _result(journal, ended, start):
    lines = read(journal)
    rows = [line["row"] for line in lines if "row" in line]
    note = next((line for line in reversed(lines) if "status" in line), {})
    status, message = ended, note.get("message", "")
    if ended == "ok":
        bad = [f"{r['provider']} {r['path']}: {r['status']}" for r in rows if not r.get("peer") and r["status"] in _BAD]
        status = note.get("status", "failed" if bad else "ok")
        message = message or "; ".join(bad[:3])
    elif ended != "running":
        status = "failed"
        message = message or {"too late": "its time was over"}.get(ended, ended)
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "message": message, "rows": rows}


def _live(name, seconds, arguments, journal, log, save):
    """One process: how it ended. ``save`` is called now and then while it runs."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu", *arguments, "--child", name, "--journal", str(journal)]
    command += ["--seconds", f"{seconds - min(_LONGEST_MARGIN, _MARGIN * seconds):.1f}"]
    begin = time.monotonic()
    with Path(log).open("ab") as file:
        file.write(f"\n=== {name}\n".encode())
        file.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    last, size, saved, stall = begin, 0, begin, PARTS[name].stall
    try:
        while process.poll() is None:
            time.sleep(0.1)
            now, grown = time.monotonic(), journal.stat().st_size if journal.exists() else 0
            if grown != size:
                last, size = now, grown
                if now - saved > 5:
                    save()
                    saved = now
            if now - begin > seconds:
                return "too late"
            if stall and now - last > stall:
                return "stalled"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # the first one lets it end the programs that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
    if process.returncode == RESTART:
        return "restart"
    if process.returncode < 0:
        return "crashed"
    return "ok" if process.returncode == 0 else "failed"
