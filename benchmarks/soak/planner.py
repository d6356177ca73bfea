"""A hundred random calls of the loss: what the process takes beside the formula of grpo_kernels/engine/plan.py."""

import json
import os
import random
import statistics
import subprocess
import sys

CASES, LARGEST = 100, 1.05
LEAST = 160 * 2**20  # bytes of the formula: in less, what Python and oneDNN keep for themselves is more than a twentieth
_SCRIPT = """
import json, sys
import torch
from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss
from grpo_kernels.bench.clock import reset_peak, resident

def call(n, v, d, dtype, level, needs, budget):
    dtype, config = getattr(torch, dtype), GRPOLossConfig(importance_sampling_level=level, loss_type="sapo")
    hidden = torch.randn(4, n // 4, d).to(dtype).requires_grad_("hidden" in needs)
    weight = (torch.randn(v, d) / d**0.5).to(dtype).requires_grad_("weight" in needs)
    ids, old, mask = torch.randint(0, v, (4, n // 4)), torch.full((4, n // 4), -10.0), torch.ones(4, n // 4)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    reset_peak()
    before = resident()
    loss = fused_linear_grpo_loss(hidden, weight, ids, advantages, mask, old_logps=old, config=config, workspace_bytes=budget).loss
    if loss.requires_grad:
        loss.backward()
    assert loss.isfinite()
    return resident("VmHWM") - before

for n, v, d, dtype, level, needs, budget in json.loads(sys.argv[1]):
    call(64, 256, d, dtype, level, needs, budget)
    print(call(n, v, d, dtype, level, needs, budget), flush=True)
"""


def cases(seed, count):
    from grpo_kernels.engine.plan import Problem, peak_bytes

    dice, found = random.Random(seed), []
    while len(found) < count:
        n, v, d = 4 * dice.randint(16, 1024), dice.randint(1000, 160_000), 8 * dice.randint(8, 128)
        dtype, level = dice.choice(["bfloat16", "float32"]), dice.choice(["token", "sequence"])
        needs, budget = dice.choice([["hidden", "weight"], ["hidden"], ["weight"]]), dice.randint(32, 512) * 2**20
        e = 2 if dtype == "bfloat16" else 4
        planned = peak_bytes(Problem(n, 0, v, d, e, e, "hidden" in needs, "weight" in needs, budget, level == "sequence"), n)
        if planned >= LEAST and n * v * d < 4e10:
            found.append(((n, v, d, dtype, level, needs, budget), planned))
    return found


def run(options, count=CASES):
    chosen = cases(options.seed, count)
    # freed memory goes back at once, so that the peak is what was held and not what malloc kept
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", _SCRIPT, json.dumps([case for case, _ in chosen])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    points = [
        {"case": case, "planned_bytes": planned, "peak_bytes": int(peak), "ratio": int(peak) / planned}
        for (case, planned), peak in zip(chosen, out.split(), strict=True)
    ]
    ratios = sorted(p["ratio"] for p in points)
    return {
        "holds": ratios[-1] <= LARGEST, "largest_ratio": ratios[-1], "median_ratio": statistics.median(ratios), "points": points,
        "says": f"{count} shapes: the peak is {ratios[-1]:.3f} x the formula at most, {statistics.median(ratios):.3f} x in the "
                "median",
    }  # fmt: skip
