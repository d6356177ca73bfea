"""The loops as a GPU takes them, on the CPU: float32 chunks beside a buffer in the inputs' dtype, the whole vocabulary in one
product, dW in one product or summed in float32. Only the products that write float32 are emulated.

The plan's steps are held against what really runs: every product's m, n and k, and the bytes of each row kernel's tiles.
"""

import random
from collections import Counter

import pytest
import torch
from support.gpu_loops import GPU, Recorder
from support.loss_calls import PATHS, random_needs
from support.problems import DEVICE, draw_problem, make_problem, run, with_float32_chunks
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_no_worse_than_torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs, reference
from grpo_kernels.engine import chunks, plan

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does this by itself")
every_path = pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The problems that were planned, in order."""
    seen = []

    def recorded(problem):
        seen.append(problem)
        return plan.plan(problem)

    with_float32_chunks(monkeypatch, GPU)
    monkeypatch.setattr(chunks, "plan", recorded)
    return seen


def workspaces(vocab, depth):
    """One row, a few rows, everything."""
    row = vocab * 6 + depth * 8
    return (1, 3 * row, 9 * row, None)


@each_seed(0, 96, usual=24)
def test_float64_equals_the_reference(seed):
    rng = random.Random(seed)
    p = draw_problem(seed)
    needs = random_needs(rng, p)
    more = dict(backend="torch", workspace_bytes=rng.choice(workspaces(*p.weight.shape)))
    if rng.random() < 0.3:
        more["kept_rows"] = p.kept_rows()
    ours = run(fused_linear_grpo_loss, p, needs=needs, scale=-0.5, **more)
    truth = run(reference.grpo_loss, p, needs=needs, scale=-0.5)
    assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"{needs} {more}")


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
    assert {plan.plan(problem).direct for problem in as_on_a_gpu} == {False, True}


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight", "bias")])
def test_every_way_of_two_phases(needs, as_on_a_gpu):
    """All rows stashed, a part of them, none."""
    p = make_problem(B=8, T=32, D=16, V=1009, dtype=torch.bfloat16, config=PATHS["sequence"], bias=True)
    exact = run(reference.grpo_loss, p, dtype=torch.float64, needs=needs)
    shares = set()
    for workspace in (1, 100_000, 300_000, 500_000, 2_000_000):
        del as_on_a_gpu[:]
        ours = run(fused_linear_grpo_loss, p, needs=needs, backend="torch", workspace_bytes=workspace)
        assert_all_close(ours.gradients, exact.gradients, 1e-2)
        stashed = plan.plan(as_on_a_gpu[0]).stash_rows
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


# The plan's steps against what runs


def planned(problem):
    """The same two counts, of a plan's steps. The fused kernel's two reads are one kernel of each here, as in plain PyTorch."""
    wanted, kernels, (e, z) = Counter(), Counter(), (problem.element_size, problem.tile_size)
    for step in plan.steps(problem, plan.plan(problem)):
        read, bytes_of_tile = step.read + step.cached, step.m * step.n * z
        if step.k:
            out = step.written + step.cached
            size, operands_read = out // (step.m * step.n), (step.m + step.n) * step.k * e
            assert out % (step.m * step.n) == 0 and step.read - operands_read in (0, out), step
            wanted[(step.m, step.n, step.k, size, step.read > operands_read)] += step.count
        elif step.what == "policy":
            assert read == 2 * bytes_of_tile and step.written == step.m * step.n * e, step
            kernels[("statistics", bytes_of_tile, 0)] += step.count
            kernels[("gradient", bytes_of_tile, step.written)] += step.count
        elif step.what in ("statistics", "gradient"):
            assert read == bytes_of_tile and step.written == (0 if step.what == "statistics" else step.m * step.n * e), step
            kernels[(step.what, bytes_of_tile, step.written)] += step.count
    return wanted, kernels


CASES = {
    "one pass": (("hidden", "weight"), "token", True),
    "frozen head": (("hidden",), "token", True),
    "frozen hidden states": (("weight",), "token", True),
    "log-probs": ((), "token", False),
    "two phases": (("hidden", "weight"), "sequence", True),
    "two phases, frozen hidden states": (("weight",), "sequence", True),
    "frozen head, two phases": (("hidden",), "sequence", True),
}


@pytest.mark.cover("case")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workspace", [1, 200_000, 400_000, 1_500_000, None])
def test_the_steps_of_a_plan_are_what_runs(case, workspace, as_on_a_gpu, monkeypatch):
    needs, level, trains = CASES[case]
    config = GRPOLossConfig(loss_type="sapo", importance_sampling_level=level)  # no clipping: every row has a gradient
    p = make_problem(B=3, T=131, D=40, V=509, dtype=torch.bfloat16, config=config, masked=0.0, zero_advantages=False)
    recorder = Recorder(monkeypatch)
    positional, keywords, _ = p.arguments(needs=needs)
    with torch.set_grad_enabled(trains):
        loss = fused_linear_grpo_loss(*positional, **keywords, backend="torch", workspace_bytes=workspace).loss
        if trains:
            loss.backward()
    problem = as_on_a_gpu[0]
    assert (problem.live, problem.dead) == ((p.kept, 0) if trains else (0, p.kept))
    wanted, kernels = planned(problem)
    assert recorder.products == wanted
    assert recorder.kernels == kernels
