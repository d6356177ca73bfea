"""Who computes the loss: a function problem -> a call without arguments that returns a `Result`.

What is made in the function is not timed; everything the call does is.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from grpo_kernels import backends
from grpo_kernels.bench import peers
from grpo_kernels.bench.problem import Problem, Result
from grpo_kernels.bench.providers import ours as make_ours
from grpo_kernels.engine.plan import default_budget

from .context import Absent


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Problem], Callable[[], Result]]
    peer: bool = True  # another library: what goes wrong in it is its own
    settings: dict = field(default_factory=dict)


def ours(backend, workspace_bytes=None, suffix=""):
    of = make_ours(backend)

    def make(p):
        return of(p if workspace_bytes is None else replace(p, workspace=workspace_bytes))

    return Provider(f"ours-{backend}{suffix}", make, peer=False, settings={"workspace_bytes": workspace_bytes})


def ours_doubled(backend, device):
    provider = ours(backend, 2 * default_budget(device.type), "-2x")

    def make(p):
        if p.workspace is not None:
            raise Absent("the workspace of this path is given")
        return provider.make(p)

    return Provider(provider.name, make, peer=False, settings=provider.settings)


def our_backends(device):
    """The backends to time, the one to look at first."""
    if device.type == "cpu":
        return ["auto", "torch"]
    found = backends.available_backends()
    return [name for name in ("triton", "cuda", "torch") if found[name] is None]


def tile_rows(call, device):
    """The most rows that any row kernel of ours is handed during a call."""
    seen = []

    def watched(kernel):
        def run(tile, *args, **kwargs):
            seen.append(tile.values.shape[0])
            return kernel(tile, *args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name in our_backends(device):
            module = backends.kernels(backends.resolve(name, device, torch.bfloat16))
            for kernel in {"statistics", "gradient", "stash", "policy"} & vars(module).keys():
                stack.enter_context(mock.patch.object(module, kernel, watched(getattr(module, kernel))))
        call()
    return max(seen)


def everybody(device):
    """Ours first, since the products take the height of their chunks from it; our plain PyTorch last, if time permits."""
    first, *others = our_backends(device)
    return [
        ours(first),
        ours_doubled(first, device),
        *(ours(name) for name in others if name != "torch"),
        Provider("full-logits", peers.full_logits),
        Provider("full-logits-compiled", lambda p: peers.full_logits(p, compiled=True)),
        Provider("trl", peers.trl, settings=peers.TRL_SETTINGS),
        Provider("liger", peers.liger, settings={"compiled": False, "chunk_rows": peers.LIGER_ROWS}),
        Provider("liger-logits", peers.liger_from_logits),
        Provider("liger-scaled-ce", peers.liger_scaled_cross_entropy),
        Provider("verl", peers.verl),
        Provider("verl-torch", peers.verl_torch),
        Provider("cut-cross-entropy", peers.cut_cross_entropy, settings={"filter_eps": "default"}),
        Provider("torch-lce", peers.torch_linear_cross_entropy),
        *(ours(name) for name in others if name == "torch"),
    ]
