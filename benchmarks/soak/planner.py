"""A hundred random calls of the loss: what the process takes beside the formula of grpo_kernels/engine/plan.py."""

import json
import os
import random
import statistics
import sys
from unittest.mock import patch

import torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss
from grpo_kernels.bench import memory
from grpo_kernels.bench.clock import Cpu
from grpo_kernels.engine.plan import Problem, peak_bytes

LARGEST = 1.05  # times the formula
LEAST = 160 * 2**20  # bytes of the formula: in less, what Python and oneDNN keep for themselves is more than a twentieth


def cases(seed, count):
    """(arguments of `peak`, the formula's bytes), so many."""
    dice, found = random.Random(seed), []
    while len(found) < count:
        n, v, d = 4 * dice.randint(16, 1024), dice.randint(1000, 160_000), 8 * dice.randint(8, 128)
        dtype, level = dice.choice(["bfloat16", "float32"]), dice.choice(["token", "sequence"])
        needs, budget = dice.choice([["hidden", "weight"], ["hidden"], ["weight"]]), dice.randint(32, 512) * 2**20
        e = getattr(torch, dtype).itemsize
        planned = peak_bytes(Problem(n, 0, v, d, e, e, "hidden" in needs, "weight" in needs, budget, level == "sequence"), n)
        if planned >= LEAST and n * v * d < 4e10:
            found.append(((n, v, d, dtype, level, needs, budget), planned))
    return found


def peak(n, v, d, dtype, level, needs, budget):
    dtype, config = getattr(torch, dtype), GRPOLossConfig(importance_sampling_level=level, loss_type="sapo")
    hidden = torch.randn(4, n // 4, d).to(dtype).requires_grad_("hidden" in needs)
    weight = (torch.randn(v, d) / d**0.5).to(dtype).requires_grad_("weight" in needs)
    ids, old, mask = torch.randint(0, v, (4, n // 4)), torch.full((4, n // 4), -10.0), torch.ones(4, n // 4)
    given = (hidden, weight, ids, torch.tensor([1.0, -1.0, 0.5, -0.5]), mask)
    call = lambda: fused_linear_grpo_loss(*given, old_logps=old, config=config, workspace_bytes=budget).loss.backward()  # noqa: E731
    return Cpu().peak(call)[1]


def run(options, count=100):
    chosen = cases(options.seed, count)
    # freed memory goes back at once, so that the peak is what was held and not what malloc kept
    with patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_ARENA_MAX="1"):
        pairs = list(zip(memory.run(__name__, [case for case, _ in chosen]), chosen, strict=True))
    ratios = [peak / planned for peak, (_, planned) in pairs]
    most, middle = max(ratios), statistics.median(ratios)
    says = f"{count} shapes: the peak is {most:.3f} x the formula at most, {middle:.3f} x in the median"
    points = [{"case": case, "planned_bytes": planned, "peak_bytes": peak} for peak, (case, planned) in pairs]
    return {"holds": most <= LARGEST, "says": says, "largest_ratio": most, "median_ratio": middle, "points": points}


if __name__ == "__main__":
    # the small call loads what libraries load on first use
    memory.answer([(peak(64, 256, *case[2:]), peak(*case))[1] for case in json.loads(sys.argv[1])])
