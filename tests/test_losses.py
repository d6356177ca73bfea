"""verl's losses by name and the sampler's correction: fused against the reference, what a pass knows beforehand, TRL's own lines."""

import ast
import dataclasses
import importlib.util
import inspect
import math
import random
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import loss_calls
from support.cases import usually
from support.loss_calls import assert_kept_rows_and_layouts_agree, interpreted, random_needs
from support.objective_calls import (
    assert_coefficient_is_the_derivative,
    assert_masked_positions_are_ignored,
    assert_nothing_kept_is_zero,
    assert_poison_is_a_nan_loss,
    call_objective,
    draw_tokens,
    objective_tokens,
    prepared,
    rows,
)
from support.operations import operations
from support.problems import draw_config, draw_problem, make_problem, packed, policy_logps, run
from support.ranks import join, launch, leave
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, grpo_loss_from_logits, objective, reference
from grpo_kernels.losses.config import IMPORTANCE_SAMPLING_MODES, LOSS_TYPES, TRL_LOSS_TYPES
from grpo_kernels.losses.correction import sampler_correction
from grpo_kernels.losses.covariance import call_sums, lowest, marked_tokens, marking_order
from grpo_kernels.losses.objective import depends_on_its_row_alone, known_zero

NOT_TRL = tuple(name for name in LOSS_TYPES if name not in TRL_LOSS_TYPES)
OPTIONS = dict(dro_beta=0.7, clip_cov_ratio=0.2, clip_cov_lb=-0.5, clip_cov_ub=2.0, kl_cov_ratio=0.3, ppo_kl_coef=0.6)
TWO_PHASES = ("gspo", "geo_mean", "clip_cov", "kl_cov")
BACKENDS = [name for name in loss_calls.BACKENDS if not interpreted(name)]
pytestmark = pytest.mark.usefixtures("one_thread")
each_loss = pytest.mark.parametrize("loss_type", NOT_TRL)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def config_of(loss_type, **options):
    return GRPOLossConfig(**{**OPTIONS, "loss_type": loss_type, "max_completion_length": 9, **options})


def corrected(p, mode):
    """The problem with a correction that reaches all its sides, where there are log-probs of a sampler."""
    if p.sampling_logps is None or mode is None:
        return p
    p = p.with_config(importance_sampling_mode=mode, importance_sampling_clip_min=0.8, importance_sampling_clip_max=1.3)
    return dataclasses.replace(p, importance_sampling_ratio=None)


# The fused loss


@each_backend
@each_loss
@each_seed(500, 12, usual=3)
def test_float64_equals_the_reference(seed, loss_type, backend):
    """Random options, layouts, entropy quantiles, off-policy masks and corrections; one pass and two."""
    rng = random.Random(seed)
    p = draw_problem(seed, **{**OPTIONS, "loss_type": loss_type})
    p = corrected(p, rng.choice([None, *IMPORTANCE_SAMPLING_MODES]))
    needs, scale = random_needs(rng, p), rng.choice([1.0, 0.25, -3.0])
    more = dict(backend=backend, workspace_bytes=rng.choice(loss_calls.WORKSPACES))
    if rng.random() < 0.25:
        more["kept_rows"] = p.kept_rows()
    ours = run(fused_linear_grpo_loss, p, needs=needs, scale=scale, **more)
    truth = run(reference.grpo_loss, p, needs=needs, scale=scale)
    assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"{needs} {more} {p.config}")


@pytest.mark.cover("loss_type")
@each_backend
@each_loss
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_float32_is_no_worse_than_pytorch(loss_type, beta, backend):
    p = make_problem(B=6, T=13, D=32, V=401, dtype=torch.float32, config=config_of(loss_type, beta=beta), bias=True, ratio="token")
    ours, single = run(fused_linear_grpo_loss, p, backend=backend).flat(), run(reference.grpo_loss, p).flat()
    exact = run(reference.grpo_loss, p, dtype=torch.float64).flat()
    for name, truth in exact.items():
        floor = 1e-5 + 1e-7 / max(truth.double().norm().item(), 1e-30)
        assert_no_worse_than_torch(name, ours[name], single[name], truth, floor=floor)


@each_backend
@each_loss
def test_kept_rows_and_layouts_agree(loss_type, backend):
    assert_kept_rows_and_layouts_agree(config_of(loss_type), backend)


@pytest.mark.cover("loss_type", "on_policy")
@each_backend
@each_loss
@pytest.mark.parametrize("on_policy", [False, True])
def test_six_products_in_one_pass_and_where_a_stash_is_kept_in_two(loss_type, on_policy, backend):
    p = make_problem(B=4, T=5, D=13, V=211, config=config_of(loss_type), on_policy=on_policy)
    alone = depends_on_its_row_alone(p.config, on_policy)
    assert alone == (loss_type not in TWO_PHASES or (loss_type == "gspo" and on_policy))
    positional, keywords, _ = p.arguments(needs=("hidden", "weight"))
    forward = operations(lambda: found.append(fused_linear_grpo_loss(*positional, **keywords, backend=backend).loss)) if (found := []) == [] else 0
    backward = operations(found[0].backward)
    live = int((~known_zero(prepared_of(p), p.config) & (p.mask > 0)).sum())
    assert forward == (2 * p.kept + 4 * live * alone) * 211 * 13
    assert not alone or backward == 0


def prepared_of(p):
    inputs = dict(advantages=p.advantages, mask=p.mask, old_logps=p.old_logps, importance_sampling_ratio=p.importance_sampling_ratio)
    return prepared({k: v for k, v in inputs.items() if v is not None}, p.config)


@each_loss
def test_from_logits(loss_type):
    p = make_problem(B=4, T=5, D=8, V=33, config=config_of(loss_type), confident=False)
    truth = run(reference.grpo_loss, p)
    logits = (p.hidden @ p.weight.T).requires_grad_()
    out = grpo_loss_from_logits(logits, p.completion_ids, p.advantages, p.mask, old_logps=p.old_logps, config=p.config)
    out.loss.backward()
    assert_close("loss", out.loss, truth.loss, 1e-10)
    gradient = logits.grad.flatten(0, 1).T @ p.hidden.flatten(0, 1)
    assert_close("weight", gradient, truth.gradients["weight"], 1e-10)


@pytest.mark.parametrize("loss_type", usually(["dppo_kl", "gspo", "clip_cov", "kl_cov"], "gspo", "clip_cov"))
def test_it_compiles_without_a_graph_break(loss_type):
    torch.compiler.reset()
    p = make_problem(B=4, T=5, D=8, V=33, config=config_of(loss_type), confident=False)
    truth = run(reference.grpo_loss, p)
    positional, keywords, leaves = p.arguments()
    compiled = torch.compile(fused_linear_grpo_loss, fullgraph=True, backend="aot_eager")
    compiled(*positional, **{k: v for k, v in keywords.items() if v is not None}).loss.backward()
    assert_close("compiled", leaves["weight"].grad, truth.gradients["weight"], 1e-10)


# The objective


@pytest.mark.cover("loss_type")
@each_loss
@pytest.mark.parametrize("per_token", [False, True])
def test_what_masked_positions_hold_is_ignored(loss_type, per_token):
    assert_masked_positions_are_ignored(config_of(loss_type, beta=0.5), per_token)


@pytest.mark.cover("loss_type")
@each_loss
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0)])
def test_nothing_kept_is_a_zero_loss(loss_type, shape):
    assert_nothing_kept_is_zero(config_of(loss_type, beta=0.5), shape)


@pytest.mark.cover("loss_type", "poisoned")
@each_loss
@pytest.mark.parametrize("poisoned", ["logps", "old_logps"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_at_a_kept_position_is_a_nan_loss(loss_type, poisoned, poison):
    assert_poison_is_a_nan_loss(config_of(loss_type), poisoned, poison)


@pytest.mark.cover("loss_type")
@each_loss
@pytest.mark.parametrize("shift", [-300.0, -90.0, 90.0, 300.0])
def test_far_apart_log_probs_give_finite_results(loss_type, shift):
    logps, entropy, inputs = objective_tokens()
    inputs["old_logps"] = logps - shift
    for dtype in (torch.float32, torch.float64):
        cast = {k: v.to(dtype) for k, v in inputs.items()}
        for name, value in call_objective(logps.to(dtype), entropy.to(dtype), cast, config_of(loss_type)).items():
            assert value.isfinite().all(), f"{name} {value}"


@pytest.mark.parametrize("loss_type", [name for name in NOT_TRL if name not in TWO_PHASES])
@settings(max_examples=100, deadline=None)
@given(row=rows, epsilon=st.sampled_from([0.05, 0.2, 1.5]), delta=st.sampled_from([None, 0.5, 1.25, 2.5]))
def test_coefficient_is_the_derivative_of_the_objective(loss_type, row, epsilon, delta):
    config = config_of(loss_type, beta=row["beta"], use_bias_correction_kl=row["corrected"], epsilon=epsilon, delta=delta)
    assert_coefficient_is_the_derivative(row, config)


@each_loss
@each_seed(0, 20, usual=4)
def test_known_zero_rows_have_no_gradient(seed, loss_type):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    config = draw_config(rng, **{**OPTIONS, "loss_type": loss_type})
    logps, entropy, inputs = draw_tokens(rng, g, config)
    zero = known_zero(prepared(inputs, config), config)
    out = call_objective(logps, entropy, inputs, config)
    assert not out["dlogps"][zero].any(), str(config)


@pytest.mark.parametrize("loss_type", ["geo_mean", "dppo_tv", "dppo_kl"])
def test_the_metric_counts_the_tokens_without_a_gradient(loss_type):
    g = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(6, 9, generator=g, dtype=torch.float64)
    logps = (old + torch.randn(6, 9, generator=g, dtype=torch.float64) * 0.5).clamp(max=-0.01)
    advantages = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    mask = (torch.rand(6, 9, generator=g) < 0.8).double()
    config = config_of(loss_type, epsilon=0.1, epsilon_high=0.2)
    out = call_objective(logps, -logps, dict(mask=mask, advantages=advantages, old_logps=old), config)
    cut = (out["dlogps"] == 0) & (mask > 0)
    assert all(cut[A * advantages > 0].any() for A in (1, -1)), "of both signs"
    assert_close("share", out["clip_ratio/region_mean"], cut.sum() / mask.sum(), 1e-6)


@pytest.mark.parametrize("loss_type", [name for name in NOT_TRL if name not in ("gspo", "dppo_tv", "dppo_kl", "vanilla")])
def test_gradcheck(loss_type):
    """Where no stop-gradient stands in between, and no bound is crossed."""
    logps, entropy, inputs = objective_tokens()
    config = config_of(loss_type, beta=0.2)
    leaves = logps.requires_grad_(), entropy.requires_grad_()
    assert torch.autograd.gradcheck(lambda lp, h: objective(lp, h, **inputs, config=config)[0], leaves)


def test_one_loss_a_token_adds_up_to_the_loss():
    for loss_type in NOT_TRL:
        p = make_problem(B=4, T=5, V=33, config=config_of(loss_type))
        whole, each = (run(fused_linear_grpo_loss, p).loss, fused_linear_grpo_loss(*p.arguments()[0], **p.arguments()[1], reduction="none").loss)
        m = p.mask.double()
        weights = m / m.sum(1, keepdim=True).clamp(min=1) / 4 if loss_type in ("gspo", "geo_mean") else m / m.sum()
        assert_close(loss_type, (weights * each).sum(), whole, 1e-12)


def test_the_pictures_are_drawn_by_the_script_as_it_is():
    spec = importlib.util.spec_from_file_location("loss_pictures", Path(__file__).parent.parent / "docs" / "loss_pictures.py")
    spec.loader.exec_module(drawing := importlib.util.module_from_spec(spec))
    drawn, text = drawing.pictures(), (drawing.FOLDER.parent / "losses.md").read_text()
    assert {path.stem for path in drawing.FOLDER.iterdir()} == set(drawn)
    for name, picture in drawn.items():
        assert (drawing.FOLDER / f"{name}.svg").read_text() == picture, f"{name}: run docs/loss_pictures.py"
        assert f"losses/{name}.svg" in text
    for loss_type in LOSS_TYPES:
        assert f"| `{loss_type}` | " in text


# What is another loss under another name


@pytest.mark.parametrize("ratio", [None, "sequence"])
def test_gspo_is_the_sequence_level_where_advantages_are_the_sequences(ratio):
    p = make_problem(B=24, T=7, V=41, ratio=ratio, config=GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence"))
    ours, theirs = run(fused_linear_grpo_loss, p.with_config(loss_type="gspo")), run(fused_linear_grpo_loss, p)
    assert ours.metrics["clip_ratio/region_mean"] > 0
    assert_all_close({"loss": ours.loss, **ours.gradients}, {"loss": theirs.loss, **theirs.gradients}, 1e-12)


def test_vanilla_is_two_sided_clipping_where_its_bound_is_above_the_range():
    for delta, same in ((2.2, True), (1.2, True), (1.1, False)):
        p = make_problem(B=8, T=9, V=41, per_token_advantages=True, config=GRPOLossConfig(loss_type="dapo", delta=delta))
        p.old_logps = p.old_logps.where(torch.rand(p.mask.shape, generator=torch.Generator().manual_seed(1)) > 0.3, policy_minus(p, math.log(1.15)))
        ours, theirs = run(fused_linear_grpo_loss, p.with_config(loss_type="vanilla")), run(fused_linear_grpo_loss, p)
        assert torch.allclose(ours.gradients["weight"], theirs.gradients["weight"], rtol=1e-9) == same, delta
        truth = run(reference.grpo_loss, p.with_config(loss_type="vanilla"))
        assert_close("weight", ours.gradients["weight"], truth.gradients["weight"], 1e-10)
    assert_close("default", run(fused_linear_grpo_loss, p.with_config(loss_type="vanilla", delta=None)).loss,
                 run(fused_linear_grpo_loss, p.with_config(delta=3.0)).loss, 1e-12)  # fmt: skip


def policy_minus(p, distance):
    return policy_logps(p) - distance


def test_a_ratio_per_sequence_is_for_the_losses_that_have_one():
    for loss_type in NOT_TRL:
        assert not config_of(loss_type, importance_sampling_level="sequence").sequence_level
    assert all(GRPOLossConfig(loss_type=name, importance_sampling_level="sequence", max_completion_length=1).sequence_level for name in TRL_LOSS_TYPES)


def test_dro_needs_its_weight():
    with pytest.raises(ValueError, match="dro_beta must be > 0 for loss_type='dro', got None"):
        GRPOLossConfig(loss_type="dro")


def test_clip_cov_needs_a_range():
    with pytest.raises(ValueError, match="clip_cov_lb must be below clip_cov_ub, 1.0, got 5.0"):
        GRPOLossConfig(loss_type="clip_cov", clip_cov_lb=5.0, clip_cov_ub=1.0)
    GRPOLossConfig(clip_cov_lb=5.0, clip_cov_ub=1.0)  # of another loss it is not read


# Tokens that are marked among all of a call


@each_seed(0, 40, usual=10)
def test_as_many_are_marked_as_asked_for_and_never_one_outside(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    for loss_type in ("clip_cov", "kl_cov"):
        share = rng.choice([1e-4, 0.1, 0.5, 1.0])
        config = config_of(loss_type, clip_cov_ratio=share, kl_cov_ratio=share)
        logps, _, inputs = draw_tokens(rng, g, config)
        t = prepared(inputs, config)
        marked, kept = marked_tokens(logps, t, config), t.mask > 0
        wanted = max(1, int(share * kept.sum()))
        assert not (marked & ~kept).any()
        assert marked.sum() == wanted if loss_type == "kl_cov" else marked.sum() <= wanted
        assert torch.equal(marked, marked_tokens(logps, t, config)), "the same call marks the same tokens"
        if loss_type == "kl_cov":
            A = t.advantages.expand_as(kept)
            covariance = (A - A[kept].mean()) * (logps - logps[kept].mean())
            assert covariance[marked].min() >= covariance[kept & ~marked].max() if (kept & ~marked).any() else True


@each_seed(0, 20, usual=8)
def test_clip_cov_may_cut_what_is_not_clipped_and_in_its_range(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    config = config_of("clip_cov", clip_cov_ratio=1.0, clip_cov_lb=-0.5, clip_cov_ub=0.5)
    logps, _, inputs = draw_tokens(rng, g, config)
    t = prepared(inputs, config)
    kept, A = t.mask > 0, t.advantages.expand_as(t.mask)
    covariance = (A - A[kept].mean()) * (logps - logps[kept].mean())
    w = torch.ones_like(logps) if t.old is None else (logps - t.old).exp()
    clipped = ((A > 0) & (w > 1 + config.upper_epsilon)) | ((A < 0) & (w < 1 - config.epsilon))
    assert torch.equal(marked_tokens(logps, t, config), kept & ~clipped & (covariance > -0.5) & (covariance < 0.5))
    tokens = call_sums(logps, t)
    orders = [marking_order(logps, t, tokens, config, rank) for rank in (0, 1)]
    draws = orders[0].isfinite()
    assert torch.equal(draws, orders[1].isfinite()) and (orders[0] != orders[1])[draws].all(), "ranks draw apart"


def test_what_clip_cov_cuts_is_drawn_evenly_over_the_tokens_that_it_may_cut():
    config = config_of("clip_cov", clip_cov_ratio=0.1, clip_cov_lb=-1e9, clip_cov_ub=1e9, epsilon=5.0)
    hits = torch.zeros(8, 16)
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        logps = -torch.rand(8, 16, generator=g)
        inputs = dict(mask=torch.ones(8, 16), advantages=torch.randn(8, generator=g), old_logps=logps - 0.1)
        hits += marked_tokens(logps, prepared(inputs, config), config)
    assert hits.sum() == 400 * 12  # a tenth of 128
    # each of 128 places is hit 37.5 times on average, with a standard deviation of 5.8
    assert hits.min() > 37.5 - 5 * 5.8 and hits.max() < 37.5 + 5 * 5.8 and 4 < hits.std() < 8


def test_on_policy_clip_cov_does_not_cut_the_same_places_call_after_call():
    config = config_of("clip_cov", clip_cov_ratio=0.1, clip_cov_lb=-1e9, clip_cov_ub=1e9)
    inputs = dict(mask=torch.ones(8, 16), advantages=torch.tensor([1.0, -1.0] * 4))  # a reward of 0 or 1
    hits = torch.zeros(8, 16)
    for seed in range(100):
        logps = -5 * torch.rand(8, 16, generator=torch.Generator().manual_seed(seed))
        t = prepared(inputs, config)
        hits += (marked := marked_tokens(logps, t, config))
        assert torch.equal(marked, marked_tokens(logps.double() + 1e-9, t, config)), "nor by a rounding"
    assert hits.sum() == 100 * 12 and hits.max() < 30  # 9.4 on average, with a standard deviation of 2.9


def test_ties_are_broken_by_place():
    order = torch.tensor([2.0, 1.0, math.inf, 1.0, 1.0])
    assert lowest(order, torch.tensor(2.0)).tolist() == [False, True, False, True, False]
    assert lowest(order, torch.tensor(9.0)).tolist() == [True, True, False, True, True]
    inputs = dict(mask=torch.ones(2, 5), advantages=torch.ones(2), old_logps=-torch.ones(2, 5))  # equal advantages: no covariance
    config = config_of("kl_cov", kl_cov_ratio=0.3)
    assert marked_tokens(-torch.ones(2, 5), prepared(inputs, config), config).sum() == 3


RANKS, PER_RANK, SECONDS = 2, 3, 120


def whole_batch(loss_type, shared=True):
    # clip_cov cuts all that it may: nothing is drawn
    config = config_of(loss_type, clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=1.0, kl_cov_ratio=0.1)
    p = make_problem(B=RANKS * PER_RANK, T=5, V=41, config=config, all_masked_sequence=False)
    if not shared:
        p.mask[PER_RANK:] = False
    return p


def part_of(p, rank):
    own = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    parts = {name: getattr(p, name)[own] for name in ("hidden", "completion_ids", "advantages", "mask", "old_logps", "ref_logps")}
    return dataclasses.replace(p, **parts, num_items=p.kept)  # the global count: the ranks' losses then add up


def work(rank, folder, port):
    join(rank, port, RANKS, SECONDS)
    for loss_type in ("clip_cov", "kl_cov"):
        for shared in (True, False):
            q = part_of(whole_batch(loss_type, shared), rank)
            for name, function in (("fused", fused_linear_grpo_loss), ("reference", reference.grpo_loss)):
                out = run(function, q, data_parallel_group=dist.group.WORLD)
                torch.save((out.loss, out.gradients["weight"]), f"{folder}/{name}-{loss_type}-{shared}-{rank}")
    leave()


@pytest.mark.exhaustive(reason="eight seconds: two processes")
def test_tokens_are_marked_among_those_of_all_ranks(tmp_path):
    launch(work, tmp_path, RANKS, SECONDS)
    for loss_type in ("clip_cov", "kl_cov"):
        for shared in (True, False):
            p = whole_batch(loss_type, shared)
            truth = run(reference.grpo_loss, p)
            alone = sum(run(reference.grpo_loss, part_of(p, rank)).loss for rank in range(RANKS))
            assert shared == (abs(alone - truth.loss) > 1e-4), "marks of each rank's own must not give the same"
            for name in ("fused", "reference"):
                parts = [torch.load(tmp_path / f"{name}-{loss_type}-{shared}-{rank}") for rank in range(RANKS)]
                assert_close(f"{name} loss", sum(loss for loss, _ in parts), truth.loss, 1e-10)
                assert_close(f"{name} weight", sum(grad for _, grad in parts), truth.gradients["weight"], 1e-10)


# The sampler's correction


def trl_correction(old, sampling, mask, config):
    """TRL's own statements, as installed: those that make the ratio stand in the middle of a method."""
    source = inspect.getsource(pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer._generate_and_score_completions)
    tree = ast.parse(textwrap.dedent(source))
    (branch,) = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node).startswith(
        "if self.use_vllm and self.vllm_importance_sampling_correction:\n    mask")]  # fmt: skip
    names = {f"vllm_{name}": getattr(config, name) for name in
             ("importance_sampling_mode", "importance_sampling_clip_min", "importance_sampling_clip_max")}  # fmt: skip
    space = dict(self=SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True, **names), torch=torch, math=math, tool_mask=None,
                 old_per_token_logps=old, sampling_per_token_logps=sampling, completion_mask=mask)  # fmt: skip
    exec(compile(ast.Module([branch], []), "trl", "exec"), space)
    return space["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize("mode", [mode for mode in IMPORTANCE_SAMPLING_MODES if mode.startswith(("token", "sequence"))])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.sampled_from([None, 0.3, 0.9]), high=st.sampled_from([1.1, 3.0, None]))
@example(seed=0, low=0.9, high=1.1)
def test_the_correction_is_trls(mode, seed, low, high):
    if low is None and high is None:
        high = 2.0
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, 5, generator=g) < 0.7).double()
    old = -torch.rand(4, 5, generator=g, dtype=torch.float64) * 3
    sampling = old + torch.randn(4, 5, generator=g, dtype=torch.float64) * 0.5
    for strange in (math.nan, -math.inf)[: 1 if high is None else 2]:  # without a bound an infinite ratio is TRL's weight
        sampling = sampling.where(torch.rand(4, 5, generator=g) < 0.9, strange)
    config = GRPOLossConfig(importance_sampling_mode=mode, importance_sampling_clip_min=low, importance_sampling_clip_max=high)
    ours, theirs = sampler_correction(old, sampling, mask, config), trl_correction(old, sampling, mask, config)
    assert_close(mode, ours.expand(4, 5) * mask, theirs.expand(4, 5) * mask, 1e-13)
    # and the loss is that of the ratio given by hand
    inputs = dict(mask=mask, advantages=torch.randn(4, generator=g, dtype=torch.float64), old_logps=old, sampling_logps=sampling)
    logps = old + torch.randn(4, 5, generator=g, dtype=torch.float64) * 0.1
    for loss_type in ("dapo", "vespo", "gspo"):
        ours = call_objective(logps, -logps, inputs, dataclasses.replace(config, loss_type=loss_type))
        given_ratio = {**inputs, "importance_sampling_ratio": theirs if loss_type != "vespo" else theirs.where(theirs > 0, 0.0)}
        by_hand = call_objective(logps, -logps, given_ratio, GRPOLossConfig(loss_type=loss_type))
        ours.pop("sampling/importance_sampling_ratio/mean")
        assert_all_close(ours, by_hand, 1e-12)


def test_icepop_masks_a_token_whose_ratio_is_outside():
    old = torch.full((1, 5), -2.0, dtype=torch.float64)
    ratio = torch.tensor([[0.4, 0.5001, 1.0, 4.9, 5.1]], dtype=torch.float64)
    inputs = dict(mask=torch.ones(1, 5), advantages=torch.ones(1).double(), old_logps=old, sampling_logps=old - ratio.log())
    config = GRPOLossConfig(importance_sampling_mode="icepop", importance_sampling_clip_max=5.0)
    out = call_objective(old + 0.05, -old, inputs, config)
    weight = ratio.where((ratio > 0.5) & (ratio < 5), 0.0)
    assert_close("gradient", out["dlogps"], -weight * math.exp(0.05) / 5, 1e-12)
    assert_close("metric", out["sampling/importance_sampling_ratio/mean"], weight.mean(), 1e-12)
    geometric = call_objective(old + 0.05, -old, inputs, dataclasses.replace(config, loss_type="geo_mean"))
    assert_close("metric of a loss that takes another mean of it", geometric["sampling/importance_sampling_ratio/mean"], weight.mean(), 1e-12)
    assert config.importance_sampling_range == (0.5, 5.0)
    assert GRPOLossConfig(importance_sampling_mode="icepop", importance_sampling_clip_min=0.7).importance_sampling_range == (0.7, 3.0)


@pytest.mark.cover("loss_type", "backend")
@each_backend
@pytest.mark.parametrize("mode", IMPORTANCE_SAMPLING_MODES)
@pytest.mark.parametrize("loss_type", [*TRL_LOSS_TYPES, *NOT_TRL])
def test_the_correction_of_every_loss(loss_type, mode, backend):
    """In one pass as in two; without old log-probs it is by those of the call, in two."""
    for on_policy, layout in ((False, "padded"), (False, "packed"), (True, "padded")):
        p = make_problem(4, B=5, T=6, V=29, config=config_of(loss_type, beta=0.1), sampling=True, on_policy=on_policy)
        p = corrected(packed(p) if layout == "packed" else p, mode)
        ours, truth = run(fused_linear_grpo_loss, p, backend=backend), run(reference.grpo_loss, p)
        assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"{on_policy} {layout}")
        assert not (on_policy and depends_on_its_row_alone(p.config, on_policy))
        if on_policy:
            old = dataclasses.replace(p, old_logps=truth.logps.double())
            if loss_type != "clip_cov":  # whose draw is by the old log-probs
                assert_close("old log-probs of the call", run(reference.grpo_loss, old).loss, truth.loss, 1e-10)


def test_a_correction_costs_no_pass():
    p = make_problem(B=4, T=5, D=13, V=211, config=config_of("dapo"), sampling=True)
    p = corrected(p, "sequence_mask")
    live = int((~known_zero(prepared({"advantages": p.advantages, "mask": p.mask, "old_logps": p.old_logps, "sampling_logps": p.sampling_logps},
                                     p.config), p.config) & (p.mask > 0)).sum())  # fmt: skip
    positional, keywords, _ = p.arguments(needs=("hidden", "weight"))
    assert 0 < live < p.kept
    assert operations(lambda: fused_linear_grpo_loss(*positional, **keywords, backend="torch").loss.backward()) == (2 * p.kept + 4 * live) * 211 * 13


def test_what_a_correction_needs_is_said():
    p = make_problem(B=2, T=3, V=9, config=GRPOLossConfig(importance_sampling_mode="token_mask"), sampling=True)
    positional, keywords, _ = p.arguments()
    for function in (fused_linear_grpo_loss, reference.grpo_loss):
        with pytest.raises(ValueError, match="sampling_logps must be given with importance_sampling_mode='token_mask', got None"):
            function(*positional, **{**keywords, "sampling_logps": None})
        with pytest.raises(ValueError, match="importance_sampling_ratio must be None with importance_sampling_mode='token_mask'"):
            function(*positional, **{**keywords, "importance_sampling_ratio": torch.ones(2, 3)})
        with pytest.raises(ValueError, match="sampling_logps must not require a gradient"):
            function(*positional, **{**keywords, "sampling_logps": keywords["sampling_logps"].clone().requires_grad_()})
    with pytest.raises(ValueError, match="sampling_logps must be given"):
        objective(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), config=p.config)
    with pytest.raises(ValueError, match="importance_sampling_clip_min must be below importance_sampling_clip_max, 3.0, got 3.5"):
        GRPOLossConfig(importance_sampling_mode="icepop", importance_sampling_clip_min=3.5)
    with pytest.raises(ValueError, match="importance_sampling_clip_max must be a number without importance_sampling_clip_min, got None"):
        GRPOLossConfig(importance_sampling_mode="token_mask", importance_sampling_clip_max=None)
    GRPOLossConfig(importance_sampling_clip_min=9.0)  # without a mode it is not read


def test_geo_mean_weighs_a_sequence_with_the_geometric_mean_of_its_corrections():
    logps = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    inputs = dict(mask=torch.tensor([[1, 1, 0]]), advantages=torch.ones(1, dtype=torch.float64), old_logps=logps,
                  importance_sampling_ratio=torch.tensor([[8.0, 0.5, 99.0]], dtype=torch.float64))  # fmt: skip
    out = call_objective(logps, logps * 0, inputs, config_of("geo_mean"))
    assert out["loss"].item() == pytest.approx(-2.0, rel=1e-9)  # (8 x 0.5)^(1/2)
    assert out["dlogps"].tolist() == [pytest.approx([-1.0, -1.0, 0.0], rel=1e-9)]
