"""verl's policy losses by name against verl's own functions, as installed: loss and gradients in float64."""

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.objective_calls import call_objective
from support.tolerance import assert_close

from grpo_kernels import GRPOLossConfig
from grpo_kernels.losses.correction import sampler_correction
from grpo_kernels.losses.covariance import call_sums, marking_order
from grpo_kernels.losses.objective import prepare

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
rollout_corr_helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
verl_config = pytest.importorskip("verl.workers.config")

# (our loss_type, verl's name, verl's way of adding tokens up)
LOSSES = {
    name: (name, "token-mean") for name in ("vanilla", "dppo_tv", "dppo_kl", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro")
} | {"gspo": ("gspo", "seq-mean-token-mean"), "sapo": ("sapo", "seq-mean-token-mean"), "cispo": ("cispo", "token-mean")}
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def their_config(config):
    upper = config.upper_epsilon
    policy_loss = verl_config.PolicyLossConfig(
        clip_cov_ratio=config.clip_cov_ratio, clip_cov_lb=config.clip_cov_lb, clip_cov_ub=config.clip_cov_ub,
        kl_cov_ratio=config.kl_cov_ratio, ppo_kl_coef=config.ppo_kl_coef, dro_beta=config.dro_beta,
    )  # fmt: skip
    if config.loss_type == "cispo":  # TRL's, which ours is, has no lower bound and is given the upper one itself
        lower, upper = 1.0, upper - 1
    else:
        lower = config.epsilon
    return verl_config.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=lower, clip_ratio_low=lower, clip_ratio_high=upper,
        clip_ratio_c=config.ratio_bound or 3.0, tau_pos=config.sapo_temperature_pos, tau_neg=config.sapo_temperature_neg,
        policy_loss=policy_loss,
    )  # fmt: skip


def call_verl(logps, inputs, config):
    name, mode = LOSSES[config.loss_type]
    logps, mask = logps.clone().requires_grad_(), inputs["mask"]
    A = inputs["advantages"]
    A = (A.unsqueeze(1) if A.dim() == 1 else A).expand_as(mask).clone()
    rho = inputs.get("importance_sampling_ratio")
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=inputs["old_logps"], log_prob=logps, advantages=A, response_mask=mask, loss_agg_mode=mode,
        config=their_config(config), rollout_is_weights=None if rho is None else rho.expand_as(mask),
    )  # fmt: skip
    return {"loss": loss.detach(), "dlogps": torch.autograd.grad(loss, logps)[0]}


@st.composite
def batches(draw, loss_type):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64) * (high - low) + low

    mask = uniform(0, 1, B, T) < draw(st.sampled_from([0.3, 0.7, 2.0]))
    mask[0, 0] = True
    if loss_type in ("gspo", "sapo"):
        mask[:, 0] = True  # where a sequence keeps nothing verl divides by the others, TRL and we by all
    # a sequence's own advantage, or one a token
    A = uniform(-2, 2, B, T) if draw(st.booleans()) else uniform(-2, 2, B)
    A = A.where(uniform(0, 1, *A.shape) > 0.2, 0.0)
    logps = -uniform(0.01, 5, B, T) * draw(st.sampled_from([1.0, 0.01]))
    spread = draw(st.sampled_from([0.2, 1.0, 4.0]))
    inputs = dict(mask=mask.double(), advantages=A, old_logps=(logps + uniform(-spread, spread, B, T)).clamp(max=-1e-4))
    if draw(st.booleans()):
        rho = uniform(0, 2, B, T)
        inputs["importance_sampling_ratio"] = rho.where(rho > 0.3, 0.0)
    config = GRPOLossConfig(
        loss_type=loss_type, epsilon=draw(st.sampled_from([0.05, 0.2, 0.4])), epsilon_high=draw(st.sampled_from([None, 0.3, 1.7])),
        delta=draw(st.sampled_from([None, 1.1, 2.0])), sapo_temperature_neg=1.25, dro_beta=draw(st.sampled_from([0.1, 2.0])),
        clip_cov_ratio=draw(st.sampled_from([0.0002, 0.3, 1.0])), clip_cov_lb=draw(st.sampled_from([-1.0, 0.1])),
        clip_cov_ub=draw(st.sampled_from([0.6, 5.0])), kl_cov_ratio=draw(st.sampled_from([0.0002, 0.4, 1.0])),
        ppo_kl_coef=draw(st.sampled_from([0.1, 1.5])),
    )  # fmt: skip
    if loss_type == "cispo":
        config = GRPOLossConfig(loss_type="cispo", epsilon_high=draw(st.sampled_from([1.2, 5.0])))
    return logps, inputs, config


@pytest.mark.parametrize("loss_type", LOSSES)
@quick
@given(data=st.data())
def test_loss_and_gradients_are_verls(loss_type, monkeypatch, data):
    logps, inputs, config = data.draw(batches(loss_type))
    if loss_type in ("clip_cov", "kl_cov"):
        order = marking(logps, inputs, config)
        assume(len(order) == len(order.unique()))  # verl takes any of tokens that tie
        permutation = order.argsort()
        monkeypatch.setattr(torch, "randperm", lambda n: permutation if n == len(order) else pytest.fail(f"{n} tokens, not {len(order)}"))
    ours = call_objective(logps, torch.zeros_like(logps), inputs, config)
    theirs = call_verl(logps, inputs, config)
    tolerance = {"gspo": 3e-8, "sapo": 3e-8, "geo_mean": 5e-7}.get(loss_type, 1e-12)  # verl adds 1e-8 to a sequence's tokens
    for name, value in theirs.items():
        assert_close(f"{name} of {config}", ours[name], value, tolerance, floor=10 * tolerance)  # of a loss that cancels, too


def marking(logps, inputs, config):
    """The order in which tokens are marked, of those that may be: verl chooses among the same ones, for clip_cov by a permutation."""
    tensors = {"old": inputs["old_logps"], "ref": None, "rho": None, "sampling": None}
    t = prepare(config, torch.float64, inputs["advantages"], inputs["mask"], tensors)
    order = marking_order(logps, t, call_sums(logps, t), config).flatten()
    return order[order.isfinite()]


@pytest.mark.parametrize("loss_type", ["vanilla", "dppo_tv", "dppo_kl"])
def test_the_defaults_of_the_bound_are_those_of_verls_functions(loss_type):
    """dppo's is the function's own; verl's ActorConfig hands it 3."""
    logps = torch.tensor([[-0.5, -1.0]], dtype=torch.float64)
    inputs = dict(mask=torch.ones(1, 2).double(), advantages=torch.tensor([-1.0]).double(), old_logps=logps - 1.5)
    config = GRPOLossConfig(loss_type=loss_type, epsilon=0.9)
    bound = {"vanilla": 3.0}.get(loss_type, 20.0)
    assert config.ratio_bound == bound and their_config(config).clip_ratio_c == bound
    assert verl_config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1).clip_ratio_c == 3.0
    theirs = call_verl(logps, inputs, config)
    for name, value in theirs.items():
        assert_close(name, call_objective(logps, logps * 0, inputs, config)[name], value, 1e-12)


MODES = {  # ours -> verl's rollout_is, and whether both bounds are told
    "token_truncate": ("token", False), "token_mask": ("token", True), "icepop": ("token", True),
    "sequence_truncate": ("sequence", False), "sequence_mask": ("sequence", True),
}  # fmt: skip


@pytest.mark.parametrize("mode", [*MODES, "geometric_mask"])
@quick
@given(seed=st.integers(0, 2**31), low=st.sampled_from([0.3, 0.5, 0.9]), high=st.sampled_from([1.1, 2.0, 5.0]))
@example(seed=0, low=0.5, high=2.0)
def test_the_correction_is_verls(mode, seed, low, high):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, 5, generator=g) < 0.7).double()
    mask[:, 0] = 1  # of none verl's means are NaN
    old = -torch.rand(4, 5, generator=g, dtype=torch.float64) * 3
    sampling = old + torch.randn(4, 5, generator=g, dtype=torch.float64) * 0.5
    both = mode.endswith(("mask", "icepop"))
    low = 0.5 if mode == "icepop" else low
    config = GRPOLossConfig(importance_sampling_mode=mode, importance_sampling_clip_max=high,
                            importance_sampling_clip_min=low if both and mode != "icepop" else None)  # fmt: skip
    ours = sampler_correction(old, sampling, mask, config).expand(4, 5) * mask
    if mode == "geometric_mask":  # verl's rejects by the ratio of sampler to trainer, and does not weigh what it keeps
        kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(old - sampling, mask, "seq_mean_k1", f"{1 / high}_{1 / low}")
        mean = ((old - sampling) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        assert_close(mode, ours, kept * mean.exp(), 1e-7)
        return
    assume(ours.any())  # or verl's metrics divide by 0
    rollout_is, range_told = MODES[mode]
    theirs, _ = rollout_corr_helper.compute_rollout_correction_weights(old - sampling, mask, rollout_is, f"{low}_{high}" if range_told else high)
    assert_close(mode, ours, theirs, 1e-12)
