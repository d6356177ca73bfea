"""The problems reach every branch of the loss: a parity test on inputs that do not would prove nothing."""

import random

import pytest
import torch
from support.problems import BANDS, draw_config, draw_problem, make_problem, packed, policy_logps

from grpo_kernels import GRPOLossConfig, reference
from grpo_kernels.losses.config import IMPORTANCE_SAMPLING_LEVELS, TRL_LOSS_TYPES


def test_every_branch_of_the_clipped_loss_is_planted():
    p = make_problem(B=24, T=12, per_token_advantages=True, banned=2, bias=True, config=GRPOLossConfig(delta=2.2))
    kept = p.mask.bool()
    out = reference.grpo_loss(*p.arguments()[0], **p.arguments()[1])
    w, A = (out.logps - p.old_logps).exp()[kept], p.advantages[kept]
    for sign in (-1, 1):
        for name, inside in {"below": w < 0.8, "inside": (w > 0.8) & (w < 1.2), "above": (w > 1.2) & (w < 2.2),
                             "beyond delta": w > 2.2}.items():  # fmt: skip
            assert ((A * sign > 0) & inside).sum() >= 3, f"A of sign {sign} with a ratio {name}"
    assert (A == 0).any() and (p.advantages[kept] != 0).any()
    assert (~kept).any() and kept.any()
    assert not kept[-1].any(), "a sequence without kept tokens"
    assert kept.any(1).sum() > 12 and (kept.any(1) & ~kept.all(1)).any(), "partly masked sequences"
    assert (-torch.expm1(out.logps[kept]) < 1e-6).sum() >= 2, "confident rows"
    assert (p.bias == -torch.inf).sum() == 2
    assert not torch.isin(p.completion_ids[kept], (p.bias == -torch.inf).nonzero().flatten()).any()


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
def test_ratios_stay_clear_of_the_bounds(level):
    p = make_problem(B=40, T=7, config=GRPOLossConfig(importance_sampling_level=level), dtype=torch.bfloat16)
    m = p.mask.double()
    d = (policy_logps(p) - p.old_logps) * m
    w = (d.sum(1) / m.sum(1).clamp(min=1)).exp()[m.any(1)] if level == "sequence" else d.exp()[p.mask]
    reached = [((w >= low - 1e-3) & (w <= high + 1e-3)) for low, high in BANDS]
    assert torch.stack(reached).any(0).all() and all(band.any() for band in reached)


def test_random_problems_draw_every_option():
    configs = [draw_config(random.Random(seed), tokens=20) for seed in range(300)]
    assert {c.loss_type for c in configs} == set(TRL_LOSS_TYPES)
    both = {(c.loss_type, c.importance_sampling_level) for c in configs}
    assert len(both) == 2 * len(TRL_LOSS_TYPES)
    drawn = [draw_problem(seed) for seed in range(200)]
    for name in ("bias", "lora_a", "temperature", "old_logps", "importance_sampling_ratio", "sampling_logps",
                 "num_items", "cu_seqlens"):  # fmt: skip
        given = [getattr(p, name) is not None for p in drawn]
        assert 20 < sum(given) < 180, name
    assert {p.advantages.dim() for p in drawn} == {1, 2}
    assert any(p.kept == 0 for p in drawn) or any(not p.mask.bool().any(-1).all() for p in drawn)


def test_the_same_seed_gives_the_same_problem():
    a, b = draw_problem(11), draw_problem(11)
    for name in ("hidden", "weight", "completion_ids", "advantages", "mask"):
        assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num())


def test_packing_keeps_every_kept_token():
    p = make_problem(B=5, T=8, masked=0.5)
    q = packed(p)
    assert q.kept == p.kept and q.cu_seqlens[-1] == q.hidden.shape[0] < p.mask.numel()
    assert torch.equal(q.completion_ids[q.mask.bool()], p.completion_ids[p.mask.bool()])
