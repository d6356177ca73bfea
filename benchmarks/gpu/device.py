"""Clocks and peak memory of a device, and what it is.

A timed call starts with a cold L2 cache: between two calls four times its size is written. The head alone is larger than the
cache by an order of magnitude, and so is every tile.
"""

import datetime
import gc
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..record import commit

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "nvidia-cutlass-dsl", "verl", "cut-cross-entropy", "numpy")
_AHEAD_CYCLES = 4_000_000  # 2 ms at 2 GHz: the host has then enqueued a batch before the device begins it


@dataclass(frozen=True)
class Timed:
    """What is timed, what is done before it outside of the timing, and whether the host may enqueue it ahead of the device."""

    call: Callable
    before: Callable | None = None
    ahead: bool = False


class Cuda:
    """CUDA events; memory from PyTorch's allocator."""

    def __init__(self):
        self.device = torch.device("cuda")
        self.l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
        self._cold = torch.empty(4 * self.l2_bytes, dtype=torch.uint8, device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, timed):
        """From the device's first work for the call to its last; with ``ahead`` without what the host takes to enqueue it."""
        if timed.before:
            timed.before()
        self._cold.zero_()
        if timed.ahead:
            torch.cuda._sleep(_AHEAD_CYCLES)
        self._start.record()
        timed.call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3

    def peak(self, call):
        """(result, bytes that the call had allocated at most, its result included)."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def recover(self):
        """Frees what a failed step left behind; raises if the device no longer answers."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    """To see that everything runs; its figures mean nothing."""

    def __init__(self):
        self.device, self.l2_bytes = torch.device("cpu"), 0

    def seconds(self, timed):
        if timed.before:
            timed.before()
        start = time.perf_counter()
        timed.call()
        return time.perf_counter() - start

    def peak(self, call):
        return call(), None

    def recover(self):
        pass


def clock(name):
    if name == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU; --device cpu --tiny only shows that everything runs")
    return Cuda()


def facts(name, given_commit=None) -> dict:
    """What the figures were measured on."""
    cuda = name == "cuda"
    device = clock(name)
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "l2_bytes": device.l2_bytes,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if cuda else None,
        "versions": {p: found for p in PACKAGES if (found := _version(p))} | {"python": platform.python_version()},
        "commit": given_commit or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device):
    """NVIDIA H200 -> h200: the beginning of the file's name."""
    name = device.lower()
    if "h200" in name:
        return "h200"
    return re.sub(r"[^a-z0-9]+", "-", name.removeprefix("nvidia ")).strip("-")


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver():
    if tool := shutil.which("nvidia-smi"):
        done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
    return found.group() if found else None
