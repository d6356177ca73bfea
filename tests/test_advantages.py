"""Group-relative advantages against a transcription in plain Python and against TRL's own lines."""

import ast
import functools
import inspect
import math
import random
import statistics
import textwrap
from types import SimpleNamespace

import pytest
import torch
from support.seeds import each_seed
from support.tolerance import assert_close

from grpo_kernels import group_advantages

NAN = math.nan


def by_hand(rewards, groups, scale="group", weights=None, aggregation="sum_then_normalize"):
    """Advantages with lists, dictionaries and the statistics module; rewards [B][K]."""
    weights = weights or [1.0] * len(rewards[0])

    def weighted_sum(row):
        scored = [w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r)]
        return sum(scored) if scored else NAN

    def normalized(column, groups, scale):
        members = {}
        for r, group in zip(column, groups, strict=True):
            members.setdefault(group, []).extend([] if math.isnan(r) else [r])
        everyone = [r for r in column if not math.isnan(r)]
        out = []
        for r, group in zip(column, groups, strict=True):
            peers = members[group]
            if math.isnan(r) or len(peers) < 2 or min(peers) == max(peers):
                out.append(0.0)
                continue
            spread = {"group": lambda p=peers: statistics.stdev(p), "batch": lambda: statistics.stdev(everyone)}.get(scale)
            out.append((r - statistics.fmean(peers)) / (1 if spread is None else spread() + 1e-4))
        return out

    if aggregation == "sum_then_normalize":
        return normalized([weighted_sum(row) for row in rewards], groups, scale)
    columns = [normalized(column, groups, "group") for column in zip(*rewards, strict=True)]
    columns = [[a if not math.isnan(r) else NAN for a, r in zip(c, raw, strict=True)]
               for c, raw in zip(columns, zip(*rewards, strict=True), strict=True)]  # fmt: skip
    total = [weighted_sum(row) for row in zip(*columns, strict=True)]
    return [a if t != 0 else 0.0 for a, t in zip(normalized(total, [0] * len(total), "group"), total, strict=True)]


def draw_rewards(rng, K):
    """Groups of 1 to 5, shuffled, some flat on an awkward number, some entries and whole rows not scorable."""
    rows, groups = [], []
    for group in rng.sample(range(-50, 50), rng.randint(1, 5)):
        flat = rng.choice([None, None, 0.1, 0.1 + 0.2, 1 / 3, 1e7 + 0.1])
        for _ in range(rng.randint(1, 5)):
            row = [flat if flat is not None else rng.choice([0.0, 1.0, rng.uniform(-3, 3)]) for _ in range(K)]
            row = [NAN if rng.random() < 0.1 else r for r in row]
            rows.append([NAN] * K if rng.random() < 0.1 else row)
            groups.append(group)
    order = rng.sample(range(len(rows)), len(rows))
    return [rows[i] for i in order], [groups[i] for i in order]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@each_seed(0, 150, usual=10)
def test_against_a_transcription(seed, scale, aggregation):
    rng = random.Random(seed)
    K = rng.choice([1, 1, 2, 3])
    rewards, groups = draw_rewards(rng, K)
    weights = [rng.uniform(-1, 2) for _ in range(K)] if rng.random() < 0.5 else None
    truth = torch.tensor(by_hand(rewards, groups, scale, weights, aggregation), dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        tensor = torch.tensor(rewards, dtype=dtype)
        if any(abs(r) > 1e6 for row in rewards for r in row) and (dtype == torch.float32 or K > 1):
            continue  # a number of that size has no digits left beside the others
        ours = group_advantages(
            tensor.squeeze(1) if K == 1 and seed % 2 else tensor, torch.tensor(groups), scale_rewards=scale,
            weights=None if weights is None else torch.tensor(weights, dtype=torch.float64), aggregation=aggregation,
        )  # fmt: skip
        assert ours.dtype == dtype and ours.shape == (len(rewards),)
        assert_close(str(dtype), ours, truth, tolerance)
        if dtype == torch.float64:
            assert not ours[truth == 0].any(), "not exactly 0"


@functools.cache
def trl_lines():
    """TRL's statements from the unscorable mask to the cleaned advantages, compiled out of its trainer's source."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    source = textwrap.dedent(inspect.getsource(trainer.GRPOTrainer._generate_and_score_completions))
    body = ast.parse(source).body[0].body

    def assigns(node, name):
        return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)

    first = next(i for i, node in enumerate(body) if assigns(node, "unscorable_mask"))
    last = next(i for i, node in enumerate(body) if i > first and assigns(node, "advantages"))
    return compile(ast.Module(body[first : last + 1], []), "trl", "exec"), vars(trainer)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@each_seed(0, 40, usual=6)
def test_against_trl(seed, scale, aggregation):
    code, names = trl_lines()
    rng, G, K = random.Random(seed), 4, 1 + seed % 3
    rewards = torch.tensor([[rng.choice([0.0, 1.0, rng.uniform(-2, 2)]) for _ in range(K)] for _ in range(3 * G)],
                           dtype=torch.float64)  # fmt: skip
    rewards[rng.randrange(3 * G), rng.randrange(K)] = NAN
    rewards[:G] = 0.5 if seed % 4 == 0 else rewards[:G]
    weights = torch.tensor([rng.uniform(0.5, 2) for _ in range(K)], dtype=torch.float64)
    stub = SimpleNamespace(multi_objective_aggregation=aggregation, scale_rewards=scale, reward_weights=weights,
                           reward_funcs=[None] * K)  # fmt: skip
    scope = {**names, "self": stub, "rewards_per_func": rewards, "num_generations": G, "device": "cpu"}
    exec(code, scope)
    groups = torch.arange(3).repeat_interleave(G)
    ours = group_advantages(rewards, groups, scale_rewards=scale, weights=weights, aggregation=aggregation)
    assert_close("advantages", ours, scope["advantages"], 1e-7)  # TRL's Bessel correction is a float32 quotient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, 0.1 + 0.2, 1 / 3, 1e7 / 3, -7e-9])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_zero_whatever_rounding_says(value, scale, dtype):
    rewards = torch.full((7,), value, dtype=dtype)
    assert not group_advantages(rewards, torch.zeros(7, dtype=torch.long), scale_rewards=scale).any()
    mixed = torch.cat([rewards, torch.tensor([0.0, 1.0], dtype=dtype)])
    out = group_advantages(mixed, torch.tensor([0] * 7 + [1] * 2), scale_rewards=scale)
    assert not out[:7].any() and out[7] < 0 < out[8]


def test_rows_may_arrive_shuffled():
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(24, 2, generator=g, dtype=torch.float64), torch.arange(6).repeat_interleave(4) * 17 - 40
    order = torch.randperm(24, generator=g)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        straight = group_advantages(rewards, groups, aggregation=aggregation)
        assert_close("shuffled", group_advantages(rewards[order], groups[order], aggregation=aggregation),
                     straight[order], 1e-12)  # fmt: skip


def test_what_cannot_be_scored_learns_nothing_and_disturbs_nobody():
    rewards = torch.tensor([1.0, NAN, 3.0, 5.0, NAN, NAN])
    out = group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 2]), scale_rewards="none")
    assert out.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    two = torch.tensor([[1.0, NAN], [NAN, 3.0], [NAN, NAN]])
    assert group_advantages(two, torch.zeros(3, dtype=torch.long), scale_rewards="none").tolist() == [-1.0, 1.0, 0.0]
    # a nan under a weight of 0, or beside one, stays skipped
    weights = torch.tensor([0.0, 2.0])
    out = group_advantages(two, torch.zeros(3, dtype=torch.long), scale_rewards="none", weights=weights)
    assert out.tolist() == [-3.0, 3.0, 0.0]


def test_normalize_then_sum_leaves_flat_groups_at_exactly_zero():
    rewards = torch.tensor([[0.1, 0.3]] * 4 + [[0.0, 1.0], [0.7, 0.2], [0.3, 0.9]])
    out = group_advantages(rewards, torch.tensor([0] * 4 + [1] * 3), aggregation="normalize_then_sum")
    assert not out[:4].any() and out[4:].abs().min() > 1e-3


def test_integers_and_booleans_of_scale_rewards_and_empty_batches():
    groups = torch.tensor([0, 0])
    out = group_advantages(torch.tensor([1, 3]), groups, scale_rewards=False)
    assert out.dtype == torch.float32 and out.tolist() == [-1.0, 1.0]
    assert_close("True is group", group_advantages(torch.tensor([1.0, 3.0]), groups, scale_rewards=True),
                 torch.tensor([-1.0, 1.0]) / (math.sqrt(2) + 1e-4), 1e-6)  # fmt: skip
    for scale in ("group", "batch", "none"):
        assert group_advantages(torch.zeros(0), groups[:0], scale_rewards=scale).shape == (0,)
        assert group_advantages(torch.zeros(0, 2), groups[:0], scale_rewards=scale).shape == (0,)
        assert group_advantages(torch.full((2,), NAN), groups, scale_rewards=scale).tolist() == [0.0, 0.0]


def test_no_graph_is_kept():
    assert not group_advantages(torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0, 0])).requires_grad


GOOD = dict(rewards=torch.tensor([1.0, 2.0]), group_ids=torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "error, wrong, said",
    [
        (TypeError, dict(rewards=[1.0, 2.0]), "rewards.*tensor.*list"),
        (TypeError, dict(rewards=torch.tensor([True, False])), "rewards.*bool"),
        (TypeError, dict(rewards=torch.tensor([1j, 0])), "rewards.*complex"),
        (TypeError, dict(group_ids=torch.tensor([0.0, 0.0])), "group_ids.*integer.*float32"),
        (TypeError, dict(group_ids=[0, 0]), "group_ids.*integer.*list"),
        (ValueError, dict(rewards=torch.tensor(1.0)), r"rewards.*\[B\].*\[\]"),
        (ValueError, dict(group_ids=torch.tensor([0, 0, 0])), r"group_ids.*\[2\].*\[3\]"),
        (ValueError, dict(rewards=torch.tensor([1.0, math.inf])), "rewards.*finite.*inf"),
        (ValueError, dict(group_ids=torch.tensor([0, 0], device="meta")), "group_ids.*cpu.*meta"),
        (ValueError, dict(scale_rewards="rank"), "scale_rewards.*group, batch, none.*'rank'"),
        (ValueError, dict(scale_rewards=None), "scale_rewards.*None"),
        (ValueError, dict(aggregation="sum"), "aggregation.*'sum'"),
        (ValueError, dict(weights=torch.ones(2)), r"weights.*\[1\].*\[2\]"),
        (ValueError, dict(weights=torch.tensor([NAN])), "weights.*finite.*nan"),
        (TypeError, dict(weights="heavy"), "weights.*str"),
    ],
)
def test_errors_name_the_argument_what_was_wanted_and_what_came(error, wrong, said):
    with pytest.raises(error, match=said):
        group_advantages(**{**GOOD, **wrong})
