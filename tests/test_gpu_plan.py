"""The chunk loops as a GPU takes them, on the CPU: float32 tiles with the gradient over them, products that add to float32
sums, the whole vocabulary in one product, everything recomputed together. Only the products themselves are emulated."""

import random

import pytest
import torch
from problems import DEVICE, draw_problem, make_problem, run
from test_parity import PATHS, random_needs
from tolerance import assert_all_close, assert_no_worse_than_torch

from grpo_kernels import fused_linear_grpo_loss, linear_logprobs, reference
from grpo_kernels.engine import products, tiles

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does this by itself")
every_path = pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    seen = []

    def plan_call(*args, plan_call=tiles.plan_call, **more):
        seen.append(plan_call(*args, **more))
        return seen[-1]

    for module in (products, tiles):
        monkeypatch.setattr(module, "sums_directly", lambda like: True)
    monkeypatch.setattr(products, "FLOAT32_TILES", ("torch", "triton"))
    monkeypatch.setattr(tiles, "plan_call", plan_call)
    return seen


def workspaces(vocab, depth):
    """One row, a few rows, everything."""
    row = vocab * 4 + depth * 8
    return (1, 3 * row, 9 * row, None)


@pytest.mark.parametrize("block", range(8))
def test_float64_equals_the_reference(block):
    for seed in range(12 * block, 12 * block + 12):
        rng = random.Random(seed)
        p = draw_problem(seed)
        needs = random_needs(rng, p)
        more = dict(backend="torch", workspace_bytes=rng.choice(workspaces(*p.weight.shape)))
        if rng.random() < 0.3:
            more["kept_rows"] = p.kept_rows()
        ours = run(fused_linear_grpo_loss, p, needs=needs, scale=-0.5, **more)
        truth = run(reference.grpo_loss, p, needs=needs, scale=-0.5)
        assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"seed {seed} {needs} {more}")


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_no_worse_than_pytorch(config, dtype, as_on_a_gpu):
    p = make_problem(B=7, T=9, D=24, V=203, dtype=dtype, config=config, bias=True, lora=True, temperature=True)
    exact = run(reference.grpo_loss, p, dtype=torch.float64).flat()
    plain = run(reference.grpo_loss, p).flat()
    for workspace in workspaces(203, 24):
        ours = run(fused_linear_grpo_loss, p, backend="torch", workspace_bytes=workspace)
        for name, value in ours.gradients.items():
            key = f"gradient of {name}"
            assert_no_worse_than_torch(f"{key} {workspace}", value, plain[key], exact[key], floor=2e-3)
    tiles_seen = {plan.tiles > 1 for plan in as_on_a_gpu}
    assert tiles_seen == {False, True}


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight", "bias")])
def test_every_way_of_two_phases(needs, as_on_a_gpu):
    """All rows stashed, a part of them, none."""
    p = make_problem(B=8, T=16, D=16, V=1009, dtype=torch.bfloat16, config=PATHS["sequence"], bias=True)
    exact = run(reference.grpo_loss, p, dtype=torch.float64, needs=needs)
    shares = set()
    for workspace in (1, 100_000, 300_000, 2_000_000):
        del as_on_a_gpu[:]
        ours = run(fused_linear_grpo_loss, p, needs=needs, backend="torch", workspace_bytes=workspace)
        assert_all_close(ours.gradients, exact.gradients, 1e-2)
        stashed = as_on_a_gpu[0].stash_rows
        shares.add("all" if stashed == p.kept else "some" if stashed else "none")
    assert needs == ("hidden",) or shares == {"all", "some", "none"}, shares


def test_log_probs_are_those_of_float32_logits():
    p = make_problem(B=3, T=8, D=16, V=9001, dtype=torch.bfloat16, spread=4.0, confident=False)
    hidden, weight = p.hidden.bfloat16(), p.weight.bfloat16()
    for workspace in (1, 200_000, None):
        out = linear_logprobs(hidden, weight, p.completion_ids, backend="torch", workspace_bytes=workspace)
        log_p = (p.hidden @ p.weight.T).log_softmax(-1)
        exact = log_p.gather(-1, p.completion_ids.unsqueeze(-1)).squeeze(-1)
        assert (out.logps - exact).abs().max() < 1e-5
        assert (out.entropy + (log_p.exp() * log_p).sum(-1)).abs().max() < 1e-4


@every_path
def test_triton_kernels_in_these_loops(config):
    p = make_problem(B=3, T=4, D=8, V=67, dtype=torch.float64, config=config, bias=True, temperature=True)
    truth = run(reference.grpo_loss, p).flat()
    for workspace in (1, 3000, None):
        assert_all_close(run(fused_linear_grpo_loss, p, backend="triton", workspace_bytes=workspace).flat(), truth, 1e-10)
