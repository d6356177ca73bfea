"""`grpo-kernels doctor`: what is installed, which backends work here and why not, how the extension was built.

`--build-cuda` first builds the CUDA C++ kernels, which an installation comes without: for the GPUs of this machine, or for every
architecture where it has none.
"""

import importlib.metadata
import platform
import sys

import torch

from . import build_cuda
from .backends import available_backends, cuda, native

_PACKAGES = ("grpo-kernels", "torch", "triton", "transformers", "accelerate", "numpy")
_PEERS = ("trl", "liger-kernel", "peft")


def report() -> str:
    """The whole report as text, one fact per line."""
    sections = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES + _PEERS}},
        "machine": _machine(),
        "devices": _devices(),
        "backends": {name: reason or "usable" for name, reason in available_backends().items()},
        "extension": _extension(),
    }
    width = max(len(key) for facts in sections.values() for key in facts)
    lines = []
    for title, facts in sections.items():
        lines += [title, *(f"  {key:<{width}}  {value}" for key, value in facts.items()), ""]
    return "\n".join(lines).rstrip()


def main(argv=()) -> int:
    if list(argv) == ["--build-cuda"]:
        try:
            _build_cuda()
        except build_cuda.BuildError as error:
            print(f"grpo-kernels doctor --build-cuda: {error}", file=sys.stderr)
            return 1
    print(report())
    return 0


def _build_cuda():
    try:
        only = build_cuda.present()
        print(f"building the CUDA C++ kernels for compute capability {', '.join(f'{n / 10:.1f}' for n in only)}", flush=True)
    except build_cuda.BuildError as error:
        only = ()
        print(f"building the CUDA C++ kernels for every architecture, some minutes: no GPU found ({error})", flush=True)
    print(build_cuda.build(only=only))


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine():
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "torch threads": f"{torch.get_num_threads()}",
    }


def _processor():
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo") as lines:
                names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
            if names:
                return f"{names[0]}, {len(names)} cores"
        except OSError:
            pass
    return platform.processor() or "unknown"


def _devices():
    devices = {"cpu": "present"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    else:
        built = torch.version.cuda or torch.version.hip
        devices["cuda"] = "none found" if built else "this torch was built without CUDA"
    return devices


def _extension():
    info = native.build_info()
    reason = native.why_unavailable()
    facts = {"state": reason or "loaded"}
    if info:
        facts["compiler"] = info.get("compiler") or "none found"
        facts["flags"] = " ".join(info.get("flags") or [])
        facts["built for"] = ", ".join(info.get("isas") or []) or "nothing"
        facts["OpenMP"] = "yes" if info.get("openmp") else "no: one thread; a compiler with -fopenmp brings the others"
        at_install = info.get("cuda_error")
        wrong = cuda.why_unusable(cuda.LIBRARY) if cuda.LIBRARY.exists() else None
        built = f"built, but they {wrong}; {cuda.BUILD}" if wrong else "built"
        facts["CUDA C++"] = built if cuda.LIBRARY.exists() else f"not built: {at_install or 'no record why'}; {cuda.BUILD}"
    else:
        facts["build record"] = "none: the package was not installed by pip from source"
    if reason is None:
        facts["in use"] = native.isa()
        best = native.product_isas()[-1]
        facts["same bits"] = f"with batch_invariant{', and by default in bfloat16' if best == 'amx' else ''} (products: {best})"
    return facts
