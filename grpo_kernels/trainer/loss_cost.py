"""What the fused loss saves on one batch: extra memory and time of the loss and its gradients, beside full logits.

Memory is what a fresh process takes on top of its inputs (VmHWM), one process per way; time is the median of interleaved
repetitions in this process. Run as a module, this file is that fresh process.
"""

import subprocess
import sys
import time
from statistics import median
from typing import NamedTuple

import torch

from ..call import GRPOLossOutput
from ..loss import fused_linear_grpo_loss
from ..losses.config import GRPOLossConfig
from ..losses.objective import objective


class Shape(NamedTuple):
    """B completions of T tokens, vocabulary V, hidden size D."""

    B: int
    T: int
    V: int
    D: int


class Cost(NamedTuple):
    seconds: float
    extra_bytes: int | None  # None where the system does not tell


def full_logits_loss(hidden, weight, completion_ids, advantages, mask, *, old_logps, config):
    """The same loss as most trainers write it: logits, log_softmax, gather; the entropy without a graph."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    logps = log_p.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    loss, metrics = objective(logps, entropy, advantages, mask, old_logps=old_logps, config=config)
    return GRPOLossOutput(loss, logps.detach(), entropy, metrics)


LOSSES = {"fused": fused_linear_grpo_loss, "full": full_logits_loss}


def compare(shape: Shape, rounds: int = 9) -> dict[str, Cost]:
    """Cost of loss and both gradients in float32, fused and through full logits, after checking that they agree."""
    problem = _problem(shape)
    results = {name: _step(loss, problem) for name, loss in LOSSES.items()}
    for ours, theirs in zip(*results.values(), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), "the fused loss and full logits disagree"
    seconds = {name: [] for name in LOSSES}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            start = time.perf_counter()
            _step(loss, problem)
            seconds[name].append(time.perf_counter() - start)
    return {name: Cost(median(seconds[name]), _extra_bytes(name, shape)) for name in LOSSES}


def _problem(shape):
    generator = torch.Generator().manual_seed(0)
    B, T, V, D = shape
    hidden, weight = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator) / D**0.5
    ids = torch.randint(V, (B, T), generator=generator)
    advantages = torch.randn(B, generator=generator)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    with torch.no_grad():
        logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    old_logps = logps + 0.2 * torch.randn(B, T, generator=generator)
    return hidden, weight, ids, advantages, mask, old_logps


def _step(loss, problem):
    hidden, weight, ids, advantages, mask, old_logps = problem
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(hidden, weight, ids, advantages, mask, old_logps=old_logps, config=GRPOLossConfig()).loss
    value.backward()
    return value.detach(), hidden.grad, weight.grad


def _extra_bytes(name, shape):
    command = [sys.executable, "-m", __name__, name, *map(str, shape)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return None if answer == "unknown" else int(answer)


def _peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _main(name, *shape):
    problem = _problem(Shape(*map(int, shape)))
    _step(LOSSES[name], _problem(Shape(2, 2, 8, 4)))  # loads what loads on first use
    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # sets the peak back to what is resident now
        before = _peak_bytes()
        _step(LOSSES[name], problem)
        print(_peak_bytes() - before)
    except OSError:
        print("unknown")


if __name__ == "__main__":
    _main(*sys.argv[1:])
