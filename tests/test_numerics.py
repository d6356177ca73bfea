"""Extreme numbers: confident rows, large offsets, logits of 1e4, a vocabulary of one, NaN."""

import dataclasses
import math

import pytest
import torch
from support.loss_calls import PATHS, every_backend, every_path, on_the_cpu
from support.problems import HEAD_LEAVES, make_problem, policy_logps, run
from support.tolerance import assert_close, assert_no_worse_than_torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, reference


@pytest.mark.cover("backend")
@on_the_cpu
@every_backend
@pytest.mark.parametrize(
    "options",
    [dict(loss_type="sapo"), dict(loss_type="cispo"), dict(loss_type="sapo", importance_sampling_level="sequence"),
     dict(loss_type="sapo", off_policy_mask_threshold=9.0)],
    ids=["one pass", "one pass, cispo", "two phases", "two phases, token level"],
)  # fmt: skip
@pytest.mark.parametrize("workspace", [1, None])
def test_confident_rows_keep_three_digits_of_gradient(options, workspace, backend):
    """p within 1e-6 of 1: `target - lse` cancels in float32, -softplus does not. Off-policy and on, hidden and weight."""
    for on_policy in (False, True):
        p = make_problem(B=4, T=5, D=24, V=61, dtype=torch.float32, config=GRPOLossConfig(**options), sampling=True,
                         zero_advantages=False, on_policy=on_policy, masked=0.0)  # fmt: skip
        exact = run(reference.grpo_loss, p, dtype=torch.float64)
        confident = p.mask & (-torch.expm1(exact.logps) < 1e-6)
        assert confident.sum() >= 2 and (exact.gradients["hidden"][confident].norm(dim=-1) > 0).all()
        for needs in (HEAD_LEAVES, ("hidden",)):
            ours = run(fused_linear_grpo_loss, p, needs=needs, backend=backend, workspace_bytes=workspace)
            got, want = (r.gradients["hidden"][confident].double() for r in (ours, exact))
            assert ((got - want).norm(dim=-1) <= 1e-3 * want.norm(dim=-1)).all(), needs
            lp, truth = ours.logps[confident].double(), exact.logps[confident]
            assert ((lp - truth).abs() <= 1e-3 * truth.abs()).all()
        # only the confident rows train: the head's gradient has nothing else to hide behind
        alone = dataclasses.replace(p, mask=confident)
        got = run(fused_linear_grpo_loss, alone, backend=backend, workspace_bytes=workspace).gradients["weight"]
        want = run(reference.grpo_loss, alone, dtype=torch.float64).gradients["weight"]
        assert_close("weight", got, want, 1e-3, floor=0.0)


@every_backend
@pytest.mark.parametrize("offset", [0.0, 3e4, -3e4])
def test_logits_with_a_common_offset(offset, backend):
    """`lse - sum p z` would lose every digit of the entropy."""
    p = make_problem(dtype=torch.float32, bias=True, config=GRPOLossConfig(entropy_coef=0.1))
    p.bias = (p.bias + offset).float().double()
    theirs, exact = run(reference.grpo_loss, p).flat(), run(reference.grpo_loss, p, dtype=torch.float64).flat()
    ours = run(fused_linear_grpo_loss, p, backend=backend).flat()
    for name in ("logps", "entropy", "gradient of hidden", "gradient of weight"):
        assert_no_worse_than_torch(name, ours[name], theirs[name], exact[name], floor=1e-5)


@every_backend
@every_path
def test_extreme_logits_give_finite_results(config, backend):
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (0.0, 1e-20, 1e2, 1e4):
            p = make_problem(B=3, T=4, D=8, V=21, confident=False, on_policy=True, config=config, dtype=dtype)
            p.hidden = (p.hidden * scale).to(dtype).double()
            p.sampling_logps = p.ref_logps = policy_logps(p).float().double()
            for workspace in (1, None):
                out = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace)
                for name, value in out.flat().items():
                    assert value.isfinite().all(), f"{name} at scale {scale}, {dtype}"
                    assert name != "logps" or (value <= 0).all()
                    assert name != "entropy" or (value >= -1e-6).all()


@every_backend
@every_path
def test_a_vocabulary_of_one_and_a_banned_rest(config, backend):
    one = make_problem(B=2, T=3, V=1, config=config)
    banned = make_problem(B=2, T=3, V=300, bias=True, config=config)
    banned.bias[1:] = -math.inf
    banned.bias[0], banned.completion_ids[:] = 0.3, 0
    for p in (one, banned):
        for dtype in (torch.float32, torch.float64):
            for workspace in (1, None):
                ours = run(fused_linear_grpo_loss, p, dtype=dtype, backend=backend, workspace_bytes=workspace)
                assert not ours.logps.any() and not ours.entropy.any()
                for name, gradient in ours.gradients.items():
                    assert not gradient.any(), f"{name} {gradient}"


@pytest.mark.cover("backend", "poisoned")
@every_backend
@pytest.mark.parametrize("poisoned", ["hidden", "weight", "old_logps", "ref_logps"])
@every_path
def test_nan_is_kept_in_rows_that_train_nothing(config, poisoned, backend):
    """Rows without a gradient are scored only; their NaN must reach the loss, and with it the gradients."""
    if poisoned == "ref_logps" and config.beta == 0:
        pytest.skip("not used")
    p = make_problem(B=4, T=5, V=33, config=config, sampling=True)
    t = int(p.mask[0].int().argmax())
    assert p.advantages[0] == 0
    getattr(p, poisoned)[(3, 2) if poisoned == "weight" else (0, t)] = math.nan
    ours, truth = run(fused_linear_grpo_loss, p, backend=backend), run(reference.grpo_loss, p)
    assert ours.loss.isnan() and truth.loss.isnan()
    assert ours.gradients["weight"].isnan().any() and ours.gradients["hidden"].isnan().any()


def test_a_nan_stays_in_its_row_where_live_rows_were_moved_to_the_front():
    """Of two sequences the second trains alone; the first one's NaN must not reach its gradient of hidden."""
    p = make_problem(B=2, T=3, D=8, V=33, dtype=torch.float64, config=PATHS["sequence"], masked=0.0)
    p = p.with_config(beta=0.0)
    p.advantages = torch.tensor([0.0, 1.0], dtype=torch.float64)
    p.hidden[0, 0] = torch.nan
    for workspace in (1, None):
        ours = run(fused_linear_grpo_loss, p, workspace_bytes=workspace).gradients["hidden"].isnan().any(-1)
        assert torch.equal(ours, run(reference.grpo_loss, p).gradients["hidden"].isnan().any(-1))
