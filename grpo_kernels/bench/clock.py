"""Time and peak memory on a CPU and on a GPU.

On a GPU a timed call starts with a cold L2 cache: between two calls four times its size is written. The head alone is larger than
the cache by an order of magnitude, and so is every tile.
"""

import contextlib
import ctypes
import gc
import mmap
import re
import time
from pathlib import Path

import torch

_AHEAD_CYCLES = 4_000_000  # 2 ms at 2 GHz: the host has then enqueued a batch before the device begins it


class Cuda:
    """CUDA events; memory from PyTorch's allocator."""

    def __init__(self):
        self.device = torch.device("cuda")
        l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
        self._cold = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call, before=None, ahead=False):
        """From the device's first work to its last, behind ``before``; with ``ahead`` without what the host takes to enqueue it."""
        if before:
            before()
        self._cold.zero_()
        if ahead:
            torch.cuda._sleep(_AHEAD_CYCLES)
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3

    def peak(self, call):
        """(result, bytes allocated at most during the call above what was there, its result included)."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def free(self):
        """What the device has, and what the allocator keeps for us."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def ready(self, size):
        """The caching allocator has it already."""

    def recover(self):
        """Frees what a failed step left behind; raises if the device no longer answers."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    """The process's wall clock, and the system's mark of the most memory it held."""

    device = torch.device("cpu")

    def seconds(self, call, before=None, ahead=False):
        if before:
            before()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result  # behind the clock: the system takes 10 ms for the pages of a large gradient
        return seconds

    def peak(self, call):
        """(result, bytes the process grew by at most); None where the system does not tell."""
        self.recover()  # what malloc kept of earlier temporaries is no part of the call
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
        except OSError:
            return call(), None
        before = resident()
        result = call()
        return result, resident("VmHWM") - before

    def free(self):
        """Bytes that processes can still take; None where the system does not tell."""
        try:
            return resident("MemAvailable", "/proc/meminfo")
        except OSError:
            return None

    def ready(self, size):
        """Writes and frees ``size`` bytes, so that a call which follows finds memory that the machine really has.

        A virtual machine may hand pages that were free for two seconds back to its host; who touches them next waits 0.5 s for
        270 MB, where zeroing takes 0.03 s. Only whole huge pages are handed back, so it is those that are asked for.
        """
        if not size or size < 0:
            return
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            view = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
            del view  # a mapping that is still exported cannot be closed

    def recover(self):
        gc.collect()
        with contextlib.suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def of(name):
    """The clock of ``cpu`` or ``cuda``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU; --device cpu --tiny only shows that everything runs")
    return {"cpu": Cpu, "cuda": Cuda}[name]()


def here():
    """The clock of the GPU where there is one."""
    return of("cuda" if torch.cuda.is_available() else "cpu")


def resident(field="VmRSS", file="/proc/self/status"):
    """Bytes the process holds, or held at most (VmHWM) since the mark was reset."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path(file).read_text(), re.MULTILINE)
    return int(found[1]) * 1024
