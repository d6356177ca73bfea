"""Every public function over drawn shapes, strides, dtypes, options and workspaces: the reference's answer, whatever the memory looks like.

The reference gets contiguous float64 copies of what the functions get strided, expanded, sliced, misaligned or empty.
How far a result may be from the reference's is measured on each call's own numbers (support/rounding_bounds.py). A case is a seed:
support/drawn_calls.py says what is drawn of it.
"""

import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import loss_calls, rounding_bounds
from support.cases import SAMPLED
from support.drawn_calls import (
    DEGENERATE,
    DTYPES,
    USUAL,
    Memory,
    drawn,
    exact_loss,
    logps_and_truth,
    loss_and_truth,
    named,
    total,
    with_gradients,
)
from support.problems import DEVICE
from support.seeds import each_seed

from grpo_kernels import (
    FusedLinearGRPOLoss,
    fused_linear_grpo_loss,
    group_advantages,
    grpo_loss_from_logits,
    linear_logprobs,
    objective,
)
from grpo_kernels.losses.config import LOSS_TYPES

BACKENDS = [*loss_calls.BACKENDS, "auto"] if DEVICE == "cpu" else ["torch", "auto"]  # the tensors are on the CPU
SEEDS = 4 * USUAL  # of which a fifth run in Triton's interpreter, every loss among them
WORKSPACES = (None, 1, 3000, 50_000)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.usefixtures("one_thread")


def loss_of(seed, backend):
    p, truth = loss_and_truth(seed)
    memory = Memory(seed, backend)
    leaves, (positional, keywords) = memory.of_leaves(p), memory.of_tokens(p)
    call = fused_linear_grpo_loss
    if memory.rng.random() < 0.5:
        call = FusedLinearGRPOLoss(**vars(keywords.pop("config")))
    out = call(*leaves, *positional, **keywords, workspace_bytes=memory.rng.choice(WORKSPACES), backend=backend)
    return p, results(named(out), leaves, p), truth


def loss_from_logits_of(seed, backend):
    p, truth = loss_and_truth(seed, with_logits=True)
    memory = Memory(seed, backend)
    (logits,), (positional, keywords) = memory.of_leaves(p), memory.of_tokens(p)
    inplace = memory.rng.random() < 0.5 and 0 not in logits.stride()
    out = grpo_loss_from_logits(logits, *positional, **keywords, backend=backend, inplace_backward=inplace)
    return p, results(named(out), [logits], p), truth


def log_probs_of(seed, backend):
    p, truth = logps_and_truth(seed)
    memory, c = Memory(seed, backend), p.config
    leaves, ((ids, _, mask), _) = memory.of_leaves(p), memory.of_tokens(p)
    options = dict(temperature=c.temperature, logit_scale=c.logit_scale, softcap=c.softcap)
    ours = linear_logprobs(*leaves, ids, mask=mask, **options, workspace_bytes=memory.rng.choice(WORKSPACES), backend=backend)
    assert ours.logps.requires_grad == any(p.needs)
    return p, results(dict(loss=total(*ours)[0], logps=ours.logps, entropy=ours.entropy), leaves, p), truth


def results(found, leaves, p):
    found = with_gradients(found, leaves, p)
    for x in leaves:
        assert not x.requires_grad or (x.grad.dtype == x.dtype and x.grad.shape == x.shape)
    return found


def assert_is_the_truth(p, ours, truth):
    rounding_bounds.assert_within_rounding(ours, truth.results, truth.rounded, p.narrow, truth.sizes)


@each_backend
@each_seed(0, SEEDS, usual=USUAL)
def test_the_loss(seed, backend):
    assert_is_the_truth(*loss_of(seed, backend))


@each_backend
@each_seed(0, SEEDS, usual=USUAL)
def test_the_loss_from_logits(seed, backend):
    assert_is_the_truth(*loss_from_logits_of(seed, backend))


@each_backend
@each_seed(0, SEEDS // 2, usual=24)
def test_the_log_probs(seed, backend):
    assert_is_the_truth(*log_probs_of(seed, backend))


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("seeds, least", [(USUAL, 1), pytest.param(SEEDS, 3, marks=pytest.mark.exhaustive)])
def test_the_draws_train_every_loss_in_every_dtype(seeds, least, with_logits):
    """Where no gradient of the truth is 0 the tests above can see a wrong one. Every backend gets these draws, Triton's one in five."""
    trained, in_the_interpreter, kinds = Counter(), Counter(), Counter()
    for seed in range(seeds):
        p = drawn(seed, with_logits)
        kinds[p.kind] += 1
        gradients = [x for name, x in exact_loss(p).items() if name.startswith("gradient")]
        if p.kind == "regular" and gradients and all(x.any() for x in gradients):
            trained[p.config.loss_type, p.dtype] += 1
            in_the_interpreter.update([p.config.loss_type, p.dtype] if seed % SAMPLED == 0 else [])
    assert kinds["regular"] == seeds - seeds // 8 and all(kinds[kind] >= least for kind in DEGENERATE)
    assert all(trained[loss_type, dtype] >= least for loss_type in LOSS_TYPES for dtype in DTYPES), trained
    assert all(in_the_interpreter[dtype] >= 3 for dtype in DTYPES), in_the_interpreter
    found = sum(in_the_interpreter[loss_type] > 0 for loss_type in LOSS_TYPES)
    assert found == len(LOSS_TYPES) if seeds == SEEDS else found >= 7, in_the_interpreter


def five_percent_off(g, exact):
    return g * 1.05


def all_zeros(g, exact):
    return g * 0


def a_value_where_the_truth_is_zero(g, exact):
    """The first such element becomes a thousandth of the largest, or a thousandth."""
    g, at = g.clone(), (exact == 0).flatten().nonzero()
    if len(at):
        g.view(-1)[at[0]] = max(1e-3 * g.abs().max().item(), 1e-3)
    return g


WRONG = (five_percent_off, all_zeros, a_value_where_the_truth_is_zero)


@pytest.mark.parametrize("results_of", [loss_of, loss_from_logits_of, log_probs_of])
def test_wrong_gradients_are_refused(results_of):
    """Any one of them, of any draw. In bfloat16 a gradient may cancel until 5 % is its rounding."""
    refused = {(dtype, wrong): [] for dtype in DTYPES for wrong in WRONG}
    losses = set()
    for seed in range(USUAL):
        p, ours, truth = results_of(seed, "auto")
        for name in [name for name in ours if name.startswith("gradient")]:
            for wrong in WRONG:
                other = wrong(ours[name].contiguous(), truth.results[name])
                if torch.equal(other, ours[name]):
                    continue
                losses.add((p.config.loss_type, p.dtype))
                try:
                    assert_is_the_truth(p, ours | {name: other}, truth)
                except AssertionError as error:
                    assert name in str(error)
                    refused[p.dtype, wrong].append(True)
                else:
                    refused[p.dtype, wrong].append(False)
    assert len(losses) == len(LOSS_TYPES) * len(DTYPES)
    for (dtype, wrong), found in refused.items():
        least = 0.9 if (dtype, wrong) == (torch.bfloat16, five_percent_off) else 1.0
        assert len(found) >= 5 and sum(found) >= least * len(found), f"{wrong.__name__} in {dtype}: {sum(found)} of {len(found)}"


@each_seed(0, SEEDS, usual=USUAL)
def test_the_objective_does_not_care_how_its_tensors_lie(seed):
    p, memory = drawn(seed), Memory(seed, "objective")
    (_, advantages, mask), keywords = memory.of_tokens(p)
    _, exact_advantages, exact_mask = p.tokens[0]
    lp, entropy = p.ref.clone(), p.ref.abs()
    ours, metrics = objective(memory.of(lp), memory.of(entropy), advantages, mask, **keywords)
    exact, exact_metrics = objective(lp, entropy, exact_advantages, exact_mask, **p.tokens[1])
    assert metrics.keys() == exact_metrics.keys()
    for name, truth in {"loss": exact, **exact_metrics}.items():
        torch.testing.assert_close({"loss": ours, **metrics}[name], truth, rtol=1e-12, atol=0, equal_nan=True, msg=name)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(math.nan), st.floats(-1e3, 1e3)), st.floats(-10, 10)), min_size=0, max_size=12),
    st.sampled_from(["group", "batch", "none"]), st.sampled_from(["sum_then_normalize", "normalize_then_sum"]), st.booleans(),
)  # fmt: skip
def test_the_advantages_of_a_group_do_not_depend_on_the_order_of_its_rows(rows, scale, aggregation, several):
    groups = torch.tensor([r[0] for r in rows], dtype=torch.long)
    rewards = torch.tensor([[r[1], r[2]] if several else [r[1]] for r in rows], dtype=torch.float64).reshape(len(rows), 1 + several)
    options = dict(scale_rewards=scale, aggregation=aggregation)
    found = group_advantages(rewards, groups, **options)
    assert found.shape == (len(rows),) and found.isfinite().all()
    order = torch.randperm(len(rows))
    # rewards up to 1e3 are centred; what rounding leaves of that is divided by a standard deviation, 1e-4 at least
    torch.testing.assert_close(group_advantages(rewards[order], groups[order], **options), found[order], atol=1e-7, rtol=1e-12)
    unscored = rewards.isnan().all(1)
    assert (found[unscored] == 0).all()
