"""The planner's documented peak against the process's own: VmHWM of a fresh process, reset after the inputs are made."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEFAULT_WORKSPACE_BYTES, Problem, default_budget, peak_bytes, plan

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
def peaks():
    """{(case, tokens): bytes}, all measured in one process."""
    keys = [(name, tokens) for name in CASES for tokens in TOKENS]
    arguments = json.dumps([V, D, BUDGET, [[tokens, *CASES[name]] for name, tokens in keys]])
    # freed memory goes back at once, so that the peak is what was held and not what malloc kept
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    out = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return dict(zip(keys, map(int, out.stdout.split()), strict=True))


def documented_peak(tokens, dtype, level, needs):
    e = getattr(torch, dtype).itemsize
    problem = Problem(tokens, 0, V, D, e, e, "weight" in needs, BUDGET)
    return peak_bytes(problem, tokens, "hidden" in needs, level == "sequence")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak mark cannot be reset here")
@pytest.mark.parametrize("case", CASES)
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


def every_plan():
    for live in (0, 1, 7, 1024, 50_000):
        for vocab, depth in ((1, 1), (33, 8), (151_936, 896), (256_000, 8192)):
            for e in (2, 4, 8):
                for budget in (1, 10_000, 10**7, DEFAULT_WORKSPACE_BYTES, 10**11):
                    for needs_weight, direct in itertools.product((False, True), repeat=2):
                        for z in {e, max(e, 4)}:
                            yield Problem(live, 5, vocab, depth, e, z, needs_weight, budget, direct)


def test_every_plan_covers_its_rows_and_keeps_its_budget():
    for p in every_plan():
        the_plan = plan(p)
        for name, value in vars(the_plan).items():
            assert isinstance(value, int) and value >= (0 if name == "stash_rows" else 1), f"{name} = {value} for {p}"
        assert the_plan.tiles * the_plan.tile_rows >= p.live and the_plan.stash_rows <= p.live
        assert max(the_plan.columns, the_plan.score_columns, the_plan.recompute_columns) <= max(p.vocab, 64)
        e, z, accumulate = p.element_size, p.tile_size, max(p.element_size, 4)
        minimum = 2 * p.vocab * z + 2 * 64 * (p.depth + 64) * accumulate
        budget = max(p.budget, minimum)
        assert the_plan.tile_rows * p.vocab * z <= budget, f"the tile of {p}"
        stash = the_plan.stash_rows * p.vocab * e
        assert stash <= budget, f"the stash of {p}"
        assert the_plan.score_rows * the_plan.score_columns * z <= max(budget, 8192 * z), f"the scoring tile of {p}"
        recomputed = the_plan.recompute_rows * the_plan.recompute_columns * z
        assert stash + recomputed <= budget or the_plan.stash_rows == p.live, f"stash and tile of {p}"
        if p.sums_directly and the_plan.stash_rows and e < z:
            beside = min(the_plan.stash_rows, the_plan.stash_tile_rows) * p.vocab * z
            assert the_plan.stash_rows < p.live or stash + beside <= budget, f"stash and its logits of {p}"
        if p.sums_directly and the_plan.stash_rows < p.live:
            sums = the_plan.stripe_rows * p.depth * accumulate
            assert stash + recomputed + sums <= budget + p.depth * accumulate, f"stash, tile and sums of dH of {p}"


def test_a_gpu_takes_whole_tiles_of_rows_and_the_vocabulary_at_once():
    """8192 tokens of a 152k vocabulary in bf16: what the default workspace of a GPU becomes."""
    p = Problem(8192, 0, 151_936, 4096, 2, 4, True, DEFAULT_GPU_WORKSPACE_BYTES, True)
    found = plan(p)
    assert (found.tile_rows, found.columns, found.stash_rows) == (1280, p.vocab, 0)
    assert found.stripe_rows == found.recompute_rows == 8192, "one product for each block of dW"
    assert found.recompute_columns % 128 == 0 and found.recompute_columns >= 4096
    assert found.recompute_rows * found.recompute_columns * 4 + 8192 * 4096 * (4 + 4) <= DEFAULT_GPU_WORKSPACE_BYTES
    stashed = plan(dataclasses.replace(p, budget=3 * 2**30))
    assert stashed.stash_rows == 8192 and stashed.stash_tile_rows % 128 == 0
    assert plan(dataclasses.replace(p, live=100)).tiles == 1


def test_what_is_recomputed_is_cut_the_same_way_whatever_would_fit_a_stash():
    """A backward that drops rows asks for a plan of the rest, which nothing has stashed."""
    for direct in (False, True):
        for live in (400, 1638, 2000, 8192):
            budget = DEFAULT_GPU_WORKSPACE_BYTES if direct else DEFAULT_WORKSPACE_BYTES
            found = plan(Problem(live, 0, 151_936, 4096, 2, 4 if direct else 2, True, budget, direct))
            assert found.stripe_rows >= live and found.recompute_rows >= min(live, 256), f"{live} {direct} {found}"


def test_a_plan_is_a_pure_function_of_its_problem():
    p = Problem(1000, 3, 5003, 64, 2, 2, True, 10**6)
    assert plan(p) == plan(p)
    assert plan(p).tiles > 1 and plan(Problem(1000, 3, 5003, 64, 2, 2, True, 10**9)).tiles == 1


def test_the_environment_sets_the_default_budget(monkeypatch):
    monkeypatch.delenv("GRPO_KERNELS_WORKSPACE_MB", raising=False)
    assert default_budget() == DEFAULT_WORKSPACE_BYTES == 384 * MIB
    monkeypatch.setenv("GRPO_KERNELS_WORKSPACE_MB", "1.5")
    assert default_budget() == 1.5 * MIB
    for wrong in ("", "much", "0", "-3", "nan", "inf"):
        monkeypatch.setenv("GRPO_KERNELS_WORKSPACE_MB", wrong)
        with pytest.raises(ValueError, match=r"GRPO_KERNELS_WORKSPACE_MB.*MiB > 0"):
            default_budget()
