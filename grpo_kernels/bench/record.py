"""One row of the JSON: who, what, on which shape, how long, how much memory, how far from the truth, on what."""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "verl", "cut-cross-entropy", "numpy")
_PACKAGE = Path(__file__).resolve().parents[1]


def row(provider, path, shape, times=(), *, status="ok", note=None, ratios=(), **more) -> dict:
    """``median`` and ``spread`` (the interquartile range) in seconds; ``ratio`` to the bare products, likewise, over the rounds."""
    return {
        "provider": provider, "path": path, "shape": shape if shape is None or isinstance(shape, dict) else shape.fields(),
        "status": status, "note": note,
        "median": statistics.median(times) if times else None, "spread": spread(times), "rounds": len(times),
        "times": [round(t, 6) for t in times],
        "ratio": statistics.median(ratios) if ratios else None, "ratio_spread": spread(ratios),
        "ratio_range": [min(ratios), max(ratios)] if ratios else None,
        "peak_bytes": None, "error": None, "settings": {},
        **more, **environment(),
    }  # fmt: skip


def ratios(times, floor):
    """Per round: ``times`` over those of the floor in the same round. Both are {round: seconds}."""
    return [times[i] / floor[i] for i in times if i in floor]


def spread(times):
    if len(times) < 2:
        return None
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


@functools.cache
def environment() -> dict:
    """On what, and with what, the figures of a row were found."""
    cpu = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    gpu, device = {}, "cpu"
    if torch.cuda.is_available():
        driver = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _text("/proc/driver/nvidia/version"))
        gpu = {"capability": list(torch.cuda.get_device_capability()), "driver": driver and driver[1], "cuda": torch.version.cuda}
        device = torch.cuda.get_device_name()
    return {
        "versions": {"grpo-kernels": __version__, **_installed(), "python": platform.python_version()}, "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "device": device, **gpu,
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


@functools.cache
def commit():
    """The short hash of the source tree; behind a + a fingerprint of sources that were changed since, or have no history here.

    GRPO_KERNELS_COMMIT names the commit of a copy without its history.
    """
    git = lambda *a: subprocess.run(["git", *a], cwd=_PACKAGE, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
    head, top = os.environ.get("GRPO_KERNELS_COMMIT", ""), _PACKAGE.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # an environment inside of somebody's repository is no checkout of this one; what a GPU's constants are changes no source
        if Path(git("rev-parse", "--show-toplevel"), _PACKAGE.name).resolve() == _PACKAGE:
            head = git("rev-parse", "--short", "HEAD")
            if not git("status", "--porcelain", "--", ".", ":!devices.json", "../csrc", "../benchmarks/*.py"):
                return head
    files = [file for folder in (_PACKAGE, top / "csrc", top / "benchmarks") for file in folder.rglob("*.*")]
    text = [file.read_bytes() for file in sorted(files) if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")]
    return f"{head}+{hashlib.sha256(b''.join(text)).hexdigest()[:8]}"


def write(path, rows):
    """A JSON array, one row per line, put in the place of the file when it is whole; what is not finite is null there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    finite = [json.loads(json.dumps(r), parse_constant=lambda _: None) for r in rows]
    new = path.with_name(path.name + ".new")
    new.write_text("[\n" + ",\n".join(map(json.dumps, finite)) + "\n]\n")
    new.replace(path)


def _installed():
    """The version of each package that is there."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _text(file):
    try:
        return Path(file).read_text()
    except OSError:
        return ""
