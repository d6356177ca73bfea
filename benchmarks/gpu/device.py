"""What the device is; its clock and its peak memory are those of `grpo-kernels bench`."""

import datetime
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from grpo_kernels.bench.clock import Cpu, Cuda, Timed, clock
from grpo_kernels.bench.record import PACKAGES, commit, installed

__all__ = ["Cpu", "Cuda", "Timed", "clock", "facts", "slug"]


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
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if cuda else None,
        "versions": {p: found for p in PACKAGES if (found := installed(p))} | {"python": platform.python_version()},
        "commit": given_commit or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device):
    """NVIDIA H200 -> h200: the beginning of the file's name."""
    name = device.lower()
    if "h200" in name:
        return "h200"
    return re.sub(r"[^a-z0-9]+", "-", name.removeprefix("nvidia ")).strip("-")


def _driver():
    if tool := shutil.which("nvidia-smi"):
        done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
    return found.group() if found else None
