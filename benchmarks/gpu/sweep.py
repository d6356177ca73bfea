"""Part `sweep`: the one pass against its workspace, and two Triton kernels against their launch shape."""

import dataclasses
import importlib
import statistics
import time
from unittest import mock

from .context import Absent, Wrong, row
from .device import Timed
from .inputs import PATHS, make_base
from .kernels import Case
from .measure import interleaved, measure
from .paths import main_shape
from .providers import our_backends, ours

WORKSPACES = (256, 512, 768, 1536, 3072)  # MiB
# BLOCK x num_warps, the likely ones first; 4 to 32 elements a thread
LAUNCHES = (
    (8192, 32), (4096, 16), (4096, 32), (8192, 16), (2048, 8), (4096, 8), (2048, 16), (16384, 32), (2048, 4), (1024, 8), (1024, 4)
)  # fmt: skip
ROWS, ROUNDS = 1280, 9


def run(context):
    tiny = context.options.tiny
    backend, shape = our_backends(context.device)[0], main_shape(context.options)
    providers = [ours(backend, n * 2 ** (12 if tiny else 20), f"@{n}MiB") for n in WORKSPACES]
    base = make_base(shape, context.device)
    measure(context, base, PATHS["one_pass"], providers, time.monotonic() + context.left() / 3)
    del base
    context.clock.recover()
    for kernel, share in (("policy", 2), ("statistics", 1)):
        launches(context, kernel, 8 if tiny else ROWS, shape.vocab, time.monotonic() + context.left() / share)


def launches(context, kernel, rows, vocab, until):
    """A row per launch shape that there is time to compile; one that does not give the result of the shape in use is wrong."""
    path, shape = f"launch {kernel}", {"rows": rows, "vocab": vocab}
    about = row("triton", path, shape, peer=False)
    if context.already(about):
        return
    with context.attempt(about):
        module = _module(context.device)
        case = Case(module, rows, vocab, context.device, context.clock.l2_bytes)
        in_use, expected = _watched(module, lambda: case.result(kernel))
        calls = {}
        for launch in dict.fromkeys([in_use, *LAUNCHES]):
            name = _name(launch)
            of_launch = row(name, path, shape, peer=False)
            if context.already(of_launch) or time.monotonic() > until:
                continue
            with context.attempt(of_launch):
                _compare(_under(module, launch, lambda: case.result(kernel))(), expected)
                calls[name] = (of_launch, Timed(_under(module, launch, lambda: case.run(kernel)), case.refill, ahead=True))
        times = interleaved(context, calls, ROUNDS, until)
        usual = times.get(_name(in_use))
        for name, seconds in times.items():
            timed = row(name, path, shape, [s / len(case.tiles) for s in seconds], peer=False)
            ratio = statistics.median(seconds) / statistics.median(usual) if usual else None
            context.journal.row(timed | {"ratio": ratio, "in_use": seconds is usual})


def _module(device):
    if device.type != "cuda":
        raise Absent("Triton kernels are launched on a GPU")
    module = importlib.import_module("grpo_kernels.backends.triton")
    if not hasattr(module, "launch_shape"):
        raise Absent("grpo_kernels.backends.triton has no launch_shape")
    return module


def _name(launch):
    return f"{launch[0]}x{launch[1]}"


def _watched(module, call):
    """((block, warps) of the last launch inside the call, what the call returns)."""
    seen, usual = [], module.launch_shape

    def watched(*args, **kwargs):
        seen.append(usual(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(module, "launch_shape", watched):
        result = call()
    return (seen[-1].block, seen[-1].warps), result


def _under(module, launch, call):
    """``call`` as it would be if launch_shape chose this block and number of warps."""
    usual = module.launch_shape

    def varied(*args, **kwargs):
        shape, changes = usual(*args, **kwargs), {"block": launch[0], "warps": launch[1]}
        return dataclasses.replace(shape, **changes) if dataclasses.is_dataclass(shape) else shape._replace(**changes)

    def run():
        with mock.patch.object(module, "launch_shape", varied):
            return call()

    return run


def _compare(ours, expected):
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True))
    if not error <= 1e-2:
        raise Wrong(f"differs by {error:.1e} from the launch shape in use")
