"""The backends: each is a few row kernels on a tile of logits (`pytorch.py` states the contract), chosen by name."""

import os

import torch

from .. import devices
from ..tracing import constant
from . import cuda, native, pytorch, triton

FLOAT32_TILES = ("triton", "cuda")  # take float32 logits and write a 16-bit gradient elsewhere
_MODULES = {"torch": pytorch, "cpu": native, "triton": triton, "cuda": cuda}
_NAMES = tuple(_MODULES)
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def available_backends() -> dict[str, str | None]:
    """name -> None if the backend can be used on this machine, or the reason why not, with the remedy."""
    return {name: _why_unavailable(name) for name in _NAMES}


def resolve(name: str, device: torch.device, dtype: torch.dtype, vocab: int | None = None) -> str:
    """The backend that a call with these tensors uses; ``auto`` follows GRPO_KERNELS_BACKEND, then the device.

    On a GPU that is whose fused kernel was the faster at the nearest vocabulary (`devices.py`), else Triton, then CUDA C++.

    Raises RuntimeError if a backend that was asked for by name cannot be used.
    """
    if name == "auto":
        name = os.environ.get("GRPO_KERNELS_BACKEND") or "auto"
        if name not in (*_NAMES, "auto"):
            raise ValueError(f"GRPO_KERNELS_BACKEND must be one of auto, {', '.join(_NAMES)}, got {name!r}")
    if name == "auto":
        if device.type == "cuda":
            return _on_a_gpu(device, vocab)
        usable = device.type == "cpu" and dtype in _CPU_DTYPES and native.why_unavailable() is None
        return "cpu" if usable else "torch"
    reason = _why_unavailable(name)
    if name == "cpu" and reason is None:
        if device.type != "cpu":
            reason = f"its kernels need tensors on the CPU, got {device}; use backend='auto'"
        elif dtype not in _CPU_DTYPES:
            reason = f"its kernels take float32, bfloat16 and float64, got {dtype}; use backend='torch'"
    if name == "triton" and reason is None:
        if _interpreted() and device.type != "cpu":
            reason = f"TRITON_INTERPRET=1 runs its kernels on CPU tensors, got {device}; unset it"
        elif not _interpreted() and device.type != "cuda":
            reason = f"its kernels need tensors on a GPU, got {device}; use backend='auto'"
    if name == "cuda" and reason is None and device.type != "cuda":
        reason = f"its kernels need tensors on a GPU, got {device}; use backend='auto'"
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    return name


def _on_a_gpu(device, vocab):
    usable = [name for name in ("triton", "cuda") if _why_unavailable(name) is None]
    if _interpreted() and "triton" in usable:
        usable.remove("triton")
    if vocab and len(usable) == 2 and (measured := _measured(device)):
        return min(measured, key=lambda row: abs(row[0] - vocab))[1]
    return usable[0] if usable else "torch"


@constant
def _measured(device):
    """((V, the fastest backend), ...) on a GPU of this kind."""
    return tuple(devices.fastest(torch.cuda.get_device_name(device)).items())


def kernels(name: str):
    """The module that holds the row kernels of a resolved backend."""
    return _MODULES[name]


def scale_(tensor: torch.Tensor, scale: torch.Tensor, backend: str) -> None:
    """``tensor *= scale`` in place with a 0-dim scale; a GPU is not waited for to learn it.

    A scale of 1 costs nothing, but for a GPU's other backends than Triton: who asked for those has no compiler at run time.
    """
    if tensor.is_cuda and tensor.is_contiguous() and backend == "triton":
        triton.scale_(tensor, scale)
    elif tensor.is_cuda or scale.item() != 1.0:
        tensor.mul_(scale)


@constant
def _interpreted():
    return triton.interpreted()


@constant
def _why_unavailable(name):
    """Asks the file system and the driver: once, before torch.compile traces."""
    return _MODULES[name].why_unavailable()
