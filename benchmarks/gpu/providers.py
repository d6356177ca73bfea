"""Who computes the loss: a function problem -> a call without arguments that returns a `Scored`.

What is made in the function is not timed; everything the call does is.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch

import grpo_kernels
from grpo_kernels import backends
from grpo_kernels.plan import default_budget

from . import peers
from .context import Absent
from .inputs import DeviceProblem, Scored


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[DeviceProblem], Callable[[], Scored]]
    peer: bool = True  # another library: what goes wrong in it is its own
    settings: dict = field(default_factory=dict)


def ours(backend, workspace_bytes=None, suffix=""):
    def make(p):
        size = p.workspace if workspace_bytes is None else workspace_bytes
        options = {"workspace_bytes": size, "backend": backend}

        def logprobs():
            with torch.no_grad():
                out = grpo_kernels.linear_logprobs(p.hidden, p.weight, p.ids, mask=p.mask, **options)
            return Scored(logps=out.logps, entropy=out.entropy)

        def loss():
            hidden, weight = p.leaves()
            out = grpo_kernels.fused_linear_grpo_loss(
                hidden, weight, p.ids, p.advantages, p.mask, old_logps=p.old_logps, ref_logps=p.ref_logps, config=p.config,
                **options,
            )  # fmt: skip
            out.loss.backward()
            return Scored(out.loss.detach(), out.logps, hidden.grad, weight.grad, out.entropy)

        return loss if p.workload.gradients else logprobs

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
            seen.append(tile.shape[0])
            return kernel(tile, *args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name in our_backends(device):
            module = backends.kernels(backends.resolve(name, device, torch.bfloat16))
            for kernel in ("statistics", "gradient", "policy"):
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
        Provider("liger-scaled-ce", peers.liger_scaled_cross_entropy),
        Provider("verl", peers.verl),
        Provider("cut-cross-entropy", peers.cut_cross_entropy, settings={"filter_eps": "default"}),
        *(ours(name) for name in others if name == "torch"),
    ]
