"""The planner's documented peak against the process's own: VmHWM of a fresh process, reset after the inputs are made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cases import usually, values_that_run

from grpo_kernels.engine.plan import Problem, peak_bytes

MIB = 2**20
V, D, BUDGET = 16384, 256, 24 * MIB
# Python objects, [N] vectors, oneDNN's scratch
SLACK = 20 * MIB

SCRIPT = """
import json, sys
import torch
from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss

torch.set_num_threads(2)
V, D, budget, cases = json.loads(sys.argv[1])

def call(n, v, dtype, level, needs):
    dtype, config = getattr(torch, dtype), GRPOLossConfig(importance_sampling_level=level, loss_type="sapo")
    hidden = torch.randn(4, n // 4, D).to(dtype).requires_grad_("hidden" in needs)
    weight = (torch.randn(v, D) / D**0.5).to(dtype).requires_grad_("weight" in needs)
    ids, old = torch.randint(0, v, (4, n // 4)), torch.full((4, n // 4), -10.0)
    mask = torch.ones(4, n // 4)
    def peak(line):
        return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(line))
    open("/proc/self/clear_refs", "w").write("5")
    before = peak("VmRSS")
    loss = fused_linear_grpo_loss(hidden, weight, ids, torch.tensor([1.0, -1.0, 0.5, -0.5]), mask, old_logps=old,
                                  config=config, workspace_bytes=budget).loss
    if loss.requires_grad:
        loss.backward()
    assert loss.isfinite()
    return peak("VmHWM") - before

for n, *case in cases:
    call(64, 256, *case)  # libraries, threads, compiled kernels
    print(call(n, V, *case))
"""


CASES = {
    "one pass": ("bfloat16", "token", ["hidden", "weight"]),
    "one pass, float32": ("float32", "token", ["hidden", "weight"]),
    "two phases": ("bfloat16", "sequence", ["hidden", "weight"]),
    "two phases, float32": ("float32", "sequence", ["hidden", "weight"]),
    "frozen head": ("bfloat16", "token", ["hidden"]),
    "frozen head, two phases": ("bfloat16", "sequence", ["hidden"]),
    "no gradient": ("bfloat16", "token", []),
}
TOKENS = (1024, 4096)


@pytest.fixture(scope="module")
def peaks(request):
    """{(case, tokens): bytes}, all measured in one process."""
    names = values_that_run(request, "test_the_peak_is_the_documented_one_and_does_not_grow_with_tokens", "case")
    keys = [(name, tokens) for name in names for tokens in TOKENS]
    arguments = json.dumps([V, D, BUDGET, [[tokens, *CASES[name]] for name, tokens in keys]])
    # freed memory goes back at once, so that the peak is what was held and not what malloc kept
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    out = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return dict(zip(keys, map(int, out.stdout.split()), strict=True))


def documented_peak(tokens, dtype, level, needs):
    e = getattr(torch, dtype).itemsize
    return peak_bytes(Problem(tokens, 0, V, D, e, e, "hidden" in needs, "weight" in needs, BUDGET, level == "sequence"), tokens)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak mark cannot be reset here")
@pytest.mark.parametrize("case", usually(CASES, "one pass", "two phases"))
def test_the_peak_is_the_documented_one_and_does_not_grow_with_tokens(case, peaks):
    dtype, level, needs = CASES[case]
    for tokens in TOKENS:
        peak, allowed = peaks[case, tokens], documented_peak(tokens, dtype, level, needs) + SLACK
        assert peak <= allowed, f"{tokens} tokens: {peak / MIB:.1f} MiB, documented {(allowed - SLACK) / MIB:.1f}"
    few, many = TOKENS
    e = getattr(torch, dtype).itemsize
    assert peaks[case, many] < many * V * e, "the logits would have taken no more"
    growth = (many - few) * D * e * ("hidden" in needs)
    assert peaks[case, many] - peaks[case, few] <= growth + SLACK / 2
