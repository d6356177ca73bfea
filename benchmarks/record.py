"""One row of the JSON: who, what, on which shape, how long, how much memory, how far from the truth, on what."""

import contextlib
import ctypes
import json
import mmap
import os
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "grpo-kernels", "trl", "liger-kernel", "transformers")
_STATUS = Path("/proc/self/status")


def row(provider, workload, shape, times, *, peak_bytes=None, found=None, **more) -> dict:
    """``median`` and ``spread`` (the interquartile range) in seconds; ``error`` is the worst of ``errors``."""
    found = found or {}
    return {
        "provider": provider,
        "path": workload,
        "shape": {"tokens": shape.tokens, "depth": shape.depth, "vocab": shape.vocab, "dtype": shape.dtype},
        "median": statistics.median(times) if times else None,
        "spread": spread(times),
        "rounds": len(times),
        "peak_bytes": peak_bytes,
        "error": max((v for k, v in found.items() if k != "logps_max"), default=found.get("logps_max")),
        "errors": found,
        **more,
        **environment(),
    }


def spread(times):
    if len(times) < 2:
        return None
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def environment() -> dict:
    return {
        "versions": {name: found for name in PACKAGES if (found := _version(name))} | {"python": platform.python_version()},
        "commit": commit(),
        "device": "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def commit():
    """The short hash of the source tree, with + behind it if files were changed since; None without git."""
    run = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True)  # noqa: E731
    try:
        head, changed = run("rev-parse", "--short", "HEAD"), run("status", "--porcelain", "--", "../grpo_kernels", "../csrc")
    except OSError:
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write(path, rows):
    """A JSON array, one row per line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def reset_peak() -> bool:
    """Forgets the process's high-water mark of memory; False where the kernel does not offer it.

    What malloc kept of earlier temporaries goes back to the system first: it is no part of what follows.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field="VmRSS"):
    """Bytes the process holds, or held at most (VmHWM) since the mark was reset."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def touch_free_memory(size):
    """Writes and frees ``size`` bytes, so that a call which follows finds memory that the machine really has.

    A virtual machine may hand pages that were free for two seconds back to its host. The next one to touch them waits for the
    host: 0.5 s for 270 MB, where zeroing takes 0.03 s, and a timing would depend on what ran how long before it. Only whole
    huge pages are handed back, so it is those that are asked for.
    """
    if not size:
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        view = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
        del view  # a mapping that is still exported cannot be closed


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
