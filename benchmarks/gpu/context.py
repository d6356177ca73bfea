"""What a part is given, and how a failure of one of its steps becomes a row instead of the end."""

import argparse
import contextlib
import gc
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.bench.peers import Absent
from grpo_kernels.bench.record import spread

from .journal import RESTART, Journal, key_of

__all__ = ["Absent", "Context", "Skipped", "Wrong", "row"]
_LONGEST = 300


class Wrong(Exception):
    """A provider computed something else than was asked for."""


class Skipped(Exception):
    """A part has nothing to do here; the message says why."""


@dataclass
class Context:
    options: argparse.Namespace
    clock: Any  # of device.py; None for a part that only starts other programs
    journal: Journal
    deadline: float  # time.monotonic() after which nothing new is begun

    @property
    def device(self):
        return self.clock.device

    def left(self):
        return self.deadline - time.monotonic()

    def already(self, about):
        """Whether an earlier process of this part has a verdict on it, or died of it."""
        key = key_of(about)
        if key == self.journal.crashed:
            self.journal.crashed = None
            self.journal.row({**about, "status": "crashed", "message": "the process died or hung in it"})
        return key in self.journal.seen

    @contextlib.contextmanager
    def attempt(self, about):
        """Whatever goes wrong inside is written down as a row, which ``about`` begins."""
        self.journal.begin(key_of(about))
        try:
            yield
            return
        except Absent as why:
            status, message = "absent", str(why)
        except Wrong as why:
            status, message = "wrong", str(why)
        except torch.OutOfMemoryError as error:
            status, message = "out of memory", str(error)
        except Exception as error:
            status, message = "failed", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(f"{about['path']} {about['provider']}: {status}: {message}", flush=True)
        self.journal.row({**about, "status": status, "message": " ".join(message.split())[:_LONGEST]})
        gc.collect()
        try:
            self.clock.recover()
        except Exception:
            traceback.print_exc()
            sys.exit(RESTART)


def row(provider, path, shape=None, times=(), **more) -> dict:
    """A result: ``median`` and ``spread`` (the interquartile range) in seconds, ``ratio`` to the floor."""
    return {
        "provider": provider,
        "path": path,
        "shape": shape,
        "status": "ok",
        "median": statistics.median(times) if times else None,
        "spread": spread(times),
        "rounds": len(times),
        "peak_bytes": None,
        "error": None,
        "ratio": None,
        **more,
    }
