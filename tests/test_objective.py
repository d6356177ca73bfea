"""The objective against TRL's own `_compute_loss`, against the specification where they part, and what one pass knows beforehand."""

import dataclasses
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.objective_calls import (
    assert_coefficient_is_the_derivative,
    assert_masked_positions_are_ignored,
    assert_nothing_kept_is_zero,
    assert_poison_is_a_nan_loss,
    call_objective,
    draw_tokens,
    objective_tokens,
    of_rows,
    prepared,
    rows,
)
from support.problems import draw_config
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close

from grpo_kernels import GRPOLossConfig, objective
from grpo_kernels.losses.config import TRL_LOSS_TYPES
from grpo_kernels.losses.objective import known_zero
from grpo_kernels.losses.terms import TERMS

CLIPPED = tuple(name for name in TRL_LOSS_TYPES if TERMS[name].kind == "clipped")


class StandInTrainer:
    """As much of a GRPOTrainer as `_compute_loss` touches; one process, one step per generation."""

    def __init__(self, trainer_class, logps, entropy, config, ratio_given):
        self.logps_and_entropy = logps, entropy, None
        for name in ("get_off_policy_mask", "get_gamma_weights"):
            setattr(self, name, getattr(trainer_class, name))
        self.get_high_entropy_mask = lambda *a: trainer_class.get_high_entropy_mask(self, *a)
        for name in ("loss_type", "importance_sampling_level", "beta", "entropy_coef", "top_entropy_quantile",
                     "off_policy_mask_threshold", "max_completion_length"):  # fmt: skip
            setattr(self, name, getattr(config, name))
        self.epsilon_low = config.epsilon
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.args = SimpleNamespace(steps_per_generation=1, **vars(config))
        self.model = SimpleNamespace(training=True)
        self.current_gradient_accumulation_steps = 1
        self.use_vllm = self.vllm_importance_sampling_correction = ratio_given
        self.aux_loss_enabled = self.use_adaptive_entropy = False
        self._entropy_bonus_enabled = config.entropy_coef != 0
        self._metrics = {"train": defaultdict(list)}
        self.accelerator = SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x, pad_across_processes=lambda x, **_: x,
        )  # fmt: skip

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logps_and_entropy


def call_trl(logps, entropy, inputs, config):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logps, entropy = logps.clone().requires_grad_(), entropy.clone().requires_grad_()
    stand_in = StandInTrainer(trainer, logps, entropy, config, "importance_sampling_ratio" in inputs)
    mask = inputs["mask"]
    names = {"old_logps": "old_per_token_logps", "ref_logps": "ref_per_token_logps",
             "sampling_logps": "sampling_per_token_logps", "importance_sampling_ratio": "importance_sampling_ratio",
             "advantages": "advantages"}  # fmt: skip
    batch = {theirs: inputs[ours] for ours, theirs in names.items() if ours in inputs}
    if config.loss_type == "vespo" and "importance_sampling_ratio" in batch:
        rho = batch["importance_sampling_ratio"]  # TRL sums it over padding too, where its sampler's value is 1
        batch["importance_sampling_ratio"] = rho.where(mask > 0, 1.0) if rho.shape == mask.shape else rho
    no_tokens = torch.zeros(mask.shape[0], 0)
    batch.update(
        prompt_ids=no_tokens, prompt_mask=no_tokens, completion_ids=torch.zeros(mask.shape), completion_mask=mask,
        num_items_in_batch=inputs.get("num_items", mask.sum()),
    )  # fmt: skip
    loss = trainer._compute_loss(stand_in, None, batch)
    gradients = torch.autograd.grad(loss, (logps, entropy), materialize_grads=True)
    metrics = {name: torch.tensor(values[0], dtype=torch.float64) for name, values in stand_in._metrics["train"].items()}
    metrics.pop("entropy_coef", None)
    metrics.setdefault("policy_loss", loss.detach())
    return {"loss": loss.detach(), "dlogps": gradients[0], "dentropy": gradients[1], **metrics}


@each_seed(0, 400, usual=64)
def test_loss_gradients_and_metrics_equal_trl(seed):
    """Draws of every option. TRL rounds its per-sign constants and counts to float32, so the draws avoid both."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    float32_numbers = dict(sapo_temperature_neg=1.25, sapo_temperature_pos=rng.choice([1.0, 0.75]),
                           vespo_k_pos=1.5, vespo_k_neg=0.5, vespo_lambda_pos=rng.choice([3.0, 2**-13]),
                           vespo_lambda_neg=0.875)  # fmt: skip
    config = draw_config(rng, **float32_numbers, loss_type=TRL_LOSS_TYPES[seed % len(TRL_LOSS_TYPES)])
    logps, entropy, inputs = draw_tokens(rng, g, config)
    ours, theirs = call_objective(logps, entropy, inputs, config), call_trl(logps, entropy, inputs, config)
    counts = {n for n in theirs if n.startswith(("clip_ratio", "cispo"))}  # TRL adds these in float32
    exact = [{n: x for n, x in r.items() if n not in counts} for r in (ours, theirs)]
    assert_all_close(*exact, 1e-10, hint=str(config))
    assert_all_close(*({n: r[n] for n in counts} for r in (ours, theirs)), 1e-6, hint=str(config))


# Where the specification differs from TRL on purpose


CONFIGS = [
    GRPOLossConfig(loss_type=loss, importance_sampling_level=level, beta=beta, max_completion_length=5, entropy_coef=0.1 * beta)
    for loss in TRL_LOSS_TYPES
    for level in ("token", "sequence")
    for beta in (0.0, 0.5)
]


def name_of(config):
    return f"{config.loss_type}-{config.importance_sampling_level}-beta{config.beta}"


every_loss = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


@pytest.mark.cover("config")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [-300.0, -90.0, 90.0, 300.0])
@every_loss
def test_far_apart_log_probs_give_finite_results(config, shift, dtype):
    logps, entropy, inputs = objective_tokens()
    inputs["old_logps"] = logps - shift
    inputs["ref_logps"] = logps + (0.1 if shift > 0 and config.use_bias_correction_kl else shift)
    cast = {k: v.to(dtype) for k, v in inputs.items()}
    out = call_objective(logps.to(dtype), entropy.to(dtype), cast, config)
    for name, value in out.items():
        assert value.isfinite().all(), f"{name} {value}"
    if not config.sequence_level:
        # a zero advantage has no policy gradient, however large the ratio
        cast["advantages"] = torch.zeros_like(cast["advantages"])
        quiet = GRPOLossConfig(loss_type=config.loss_type, max_completion_length=5)
        assert not call_objective(logps.to(dtype), entropy.to(dtype), cast, quiet)["dlogps"].any()


def test_the_ratio_is_bounded_in_value_and_not_in_gradient():
    config = GRPOLossConfig(loss_type="bnpo")
    for d, bound in ((100.0, 80.0), (-100.0, -80.0)):
        logps = torch.full((1, 1), -1.0, dtype=torch.float64)
        inputs = dict(mask=torch.ones(1, 1), advantages=torch.tensor([-1.0 if d > 0 else 1.0]), old_logps=logps - d)
        out = call_objective(logps, torch.zeros(1, 1), inputs, config)
        assert_close("loss", out["loss"], torch.tensor(-math.exp(bound) * (-1 if d > 0 else 1), dtype=torch.float64), 1e-12)
        assert_close("gradient", out["dlogps"], out["loss"].view(1, 1), 1e-12)
    config = GRPOLossConfig(loss_type="bnpo", beta=1.0, use_bias_correction_kl=False)
    inputs = dict(mask=torch.ones(1, 1), advantages=torch.zeros(1), ref_logps=logps + 100.0)
    out = call_objective(logps, torch.zeros(1, 1), inputs, config)
    assert_close("k3", out["kl"], torch.tensor(math.exp(80.0) - 101, dtype=torch.float64), 1e-12)
    assert_close("d k3", out["dlogps"], torch.tensor([[1 - math.exp(80.0)]], dtype=torch.float64), 1e-12)


@pytest.mark.cover("config")
@every_loss
@pytest.mark.parametrize("per_token", [False, True])
def test_what_masked_positions_hold_is_ignored(config, per_token):
    assert_masked_positions_are_ignored(config, per_token)


@pytest.mark.cover("config", "poisoned")
@every_loss
@pytest.mark.parametrize("poisoned", ["logps", "old_logps", "ref_logps"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_at_a_kept_position_is_a_nan_loss(config, poisoned, poison):
    if poisoned == "ref_logps" and config.beta == 0:
        pytest.skip("not used")
    assert_poison_is_a_nan_loss(config, poisoned, poison)


@pytest.mark.cover("config")
@every_loss
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0)])
def test_nothing_kept_is_a_zero_loss_with_zero_gradients_and_metrics(config, shape):
    assert_nothing_kept_is_zero(config, shape)


def test_one_token_sequences_at_token_level_are_averaged_over_kept_tokens():
    """TRL mistakes a [B, 1] tensor of tokens for one value per sequence; the specification does not."""
    logps = torch.tensor([[-1.0], [-2.0], [-1.5]], dtype=torch.float64)
    inputs = dict(mask=torch.tensor([[1.0], [1.0], [0.0]]), advantages=torch.tensor([1.0, 1.0, 1.0]),
                  old_logps=logps - math.log(2), ref_logps=logps - 0.5)  # fmt: skip
    entropy = torch.tensor([[1.0], [3.0], [7.0]], dtype=torch.float64)
    out = call_objective(logps, entropy, inputs, GRPOLossConfig(beta=0.1))
    assert out["entropy"] == 2.0 and out["clip_ratio/high_mean"] == 1.0 and out["clip_ratio/high_max"] == 1.0
    assert_close("kl", out["kl"], torch.tensor(2 * (math.exp(-0.5) - 0.5)), 1e-7)


def test_num_items_is_the_divisor_to_the_letter():
    logps, entropy, inputs = objective_tokens()
    for loss_type in ("dapo", "cispo", "vespo"):
        config = GRPOLossConfig(loss_type=loss_type)
        whole = call_objective(logps, entropy, inputs, config)["loss"]  # 12 kept tokens
        for items, divisor in ((0.5, 0.5), (24, 24), (torch.tensor(24), 24), (torch.tensor(0.5), 1), (torch.tensor(0), 1)):
            out = call_objective(logps, entropy, {**inputs, "num_items": items}, config)["loss"]
            assert_close(f"{loss_type} {items}", out, whole * 12 / divisor, 1e-12)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "luspo", "sapo"):
        config = GRPOLossConfig(loss_type=loss_type, max_completion_length=4)
        out = [call_objective(logps, entropy, {**inputs, "num_items": n}, config)["loss"] for n in (None, 3, -1)]
        assert out[0] == out[1] == out[2], loss_type


def test_per_sign_constants_are_not_rounded_to_float32():
    """1.05 is no float32 number, and a float64 loss must not see it as one."""
    logps, entropy, inputs = objective_tokens()
    inputs["advantages"] = -torch.ones(3, dtype=torch.float64)
    w = (logps - inputs["old_logps"]).exp()
    out = call_objective(logps, entropy, inputs, GRPOLossConfig(loss_type="sapo", sapo_temperature_neg=1.05))
    assert_close("sapo", out["loss"], (4 / 1.05 * torch.sigmoid(1.05 * (w - 1))).mean(), 1e-13)
    config = GRPOLossConfig(loss_type="vespo", vespo_k_neg=0.3, vespo_lambda_neg=0.7)
    s = (logps - inputs["old_logps"]).sum(1, keepdim=True)
    phi = torch.exp(0.7 + 0.3 * s - 0.7 * s.exp())
    assert_close("vespo", call_objective(logps, entropy, inputs, config)["loss"], (phi * logps).mean(), 1e-13)
    config = GRPOLossConfig(loss_type="vespo", vespo_k_neg=0.3, vespo_lambda_neg=-5.0)
    phi = torch.exp(1e-4 + 0.3 * s - 1e-4 * s.exp())
    assert_close("lambda", call_objective(logps, entropy, inputs, config)["loss"], (phi * logps).mean(), 1e-13)
    config = GRPOLossConfig(loss_type="vespo", vespo_k_neg=-1e4)
    inputs["old_logps"] = logps + 3
    assert call_objective(logps, entropy, inputs, config)["loss"] == 0, "a phi that overflows becomes 0"


# The table of the second seed: sign of the advantage, ratio outside or inside the range


@pytest.mark.parametrize(
    "ratio, A, expected",
    [(1.1, 2.0, -2.2), (1.5, 2.0, 0.0), (0.5, 2.0, -1.0), (0.9, -2.0, 1.8), (0.5, -2.0, 0.0), (1.5, -2.0, 3.0),
     (1.0, 2.0, -2.0), (1.0, -2.0, 2.0), (3.0, -2.0, 6.0)],
)  # fmt: skip
def test_clipping_table(ratio, A, expected):
    """d loss / d lp = -A w where the unclipped branch is chosen, and 0 where the clipped one is."""
    logps = torch.tensor([[-1.0]], dtype=torch.float64)
    inputs = dict(mask=torch.ones(1, 1), advantages=torch.tensor([A], dtype=torch.float64), old_logps=logps - math.log(ratio))
    for loss_type in CLIPPED:
        out = call_objective(logps, logps * 0, inputs, GRPOLossConfig(loss_type=loss_type, max_completion_length=1))
        assert_close(loss_type, out["dlogps"], torch.tensor([[expected]], dtype=torch.float64), 1e-12)
    # two-sided clipping stops the last case
    out = call_objective(logps, logps * 0, inputs, GRPOLossConfig(delta=2.0))
    assert_close("delta", out["dlogps"], torch.tensor([[0.0 if ratio > 2 else expected]], dtype=torch.float64), 1e-12)


def test_the_clip_bounds_are_inclusive():
    for w, A in ((1.25, 1.0), (0.75, -1.0), (1.25, -1.0), (0.75, 1.0)):
        x = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        for delta in (None, w):
            s = TERMS["grpo"].function(x, x, x, torch.tensor(A), GRPOLossConfig(epsilon=0.25, delta=delta))
            assert torch.autograd.grad(s, x) == (-A,)


# What one pass makes of a row's own inputs, against autograd of the whole objective

ratios = st.one_of(
    st.floats(1e-3, 8.0), st.sampled_from([0.75, 0.8, 1.0, 1.2, 1.25, 2.0, 2.5, 1e-30, 1e30]),
    st.floats(-80, 80).map(math.exp),
)  # fmt: skip
clip_options = st.fixed_dictionaries(
    dict(
        loss_type=st.sampled_from(["grpo", "sapo"]),
        epsilon=st.sampled_from([0.0, 0.2, 0.25, 1.5]),
        epsilon_high=st.sampled_from([None, 0.0, 0.25, 1.0]),
        delta=st.sampled_from([None, 0.5, 0.75, 1.0, 1.25, 2.0, 2.5]),
        sapo_temperature_pos=st.floats(0.1, 3),
        sapo_temperature_neg=st.floats(0.1, 3),
    )
)


@settings(max_examples=400, deadline=None)
@given(row=rows, options=clip_options, loss_type=st.sampled_from([x for x in TRL_LOSS_TYPES if x != "vespo"]))
def test_coefficient_is_the_derivative_of_the_objective(row, options, loss_type):
    config = GRPOLossConfig(**{**options, "loss_type": loss_type}, beta=row["beta"], max_completion_length=3,
                            use_bias_correction_kl=row["corrected"])  # fmt: skip
    assert_coefficient_is_the_derivative(row, config)


@each_seed(0, 300, usual=60)
def test_one_pass_coefficients_over_whole_batches(seed):
    """Every case of one pass: token level but vespo off-policy; on-policy without a corrected KL."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    config = draw_config(rng, top_entropy_quantile=1.0, off_policy_mask_threshold=None)
    logps, entropy, inputs = draw_tokens(rng, g, config)
    if config.sequence_level or config.loss_type == "vespo":
        inputs.pop("old_logps", None)
    if config.sequence_level and config.beta != 0:
        config = dataclasses.replace(config, use_bias_correction_kl=False)
    truth = call_objective(logps, entropy, inputs, config)["dlogps"]
    closed, t = of_rows(logps, inputs, config)
    assert_close(str(config), closed * t.mask, truth, 1e-10, floor=1e-12)


@each_seed(0, 300, usual=60)
def test_known_zero_rows_have_no_gradient(seed):
    """Never a wrong zero, and every zero that the specification knows beforehand."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    config = draw_config(rng)
    logps, entropy, inputs = draw_tokens(rng, g, config)
    t = prepared(inputs, config)
    zero = known_zero(t, config)
    out = call_objective(logps, entropy, inputs, config)
    assert not out["dlogps"][zero].any(), str(config)
    assert not out["dentropy"][zero].any()
    if config.beta == 0 and config.entropy_coef == 0:
        nothing = (t.advantages == 0).expand_as(t.mask) | (t.mask == 0)
        if t.rho is not None and config.loss_type != "vespo":
            nothing = nothing | (t.rho == 0)
        if config.sequence_level and config.loss_type not in ("cispo", "vespo"):
            nothing = nothing.all(1, keepdim=True).expand_as(nothing)
        assert zero[nothing].all(), str(config)


def test_a_nan_is_never_called_zero():
    for poisoned in ("old_logps", "importance_sampling_ratio"):
        logps, _, inputs = objective_tokens(importance_sampling_ratio=torch.ones(3, 4, dtype=torch.float64))
        inputs["advantages"][:] = 0
        inputs[poisoned][1, 2] = math.nan
        for loss_type in TRL_LOSS_TYPES:
            if loss_type == "vespo" and poisoned != "old_logps":
                continue
            config = GRPOLossConfig(loss_type=loss_type, max_completion_length=4)
            zero = known_zero(prepared(inputs, config), config)
            assert not zero[1, 2] and zero.sum() == 11, loss_type


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(loss_type, level):
    """Against finite differences, where no stop-gradient stands in between."""
    if loss_type in ("cispo", "vespo"):
        pytest.skip("their ratio is detached")
    logps, entropy, inputs = objective_tokens()
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.2, entropy_coef=0.1,
                            max_completion_length=5)  # fmt: skip
    leaves = logps.requires_grad_(), entropy.requires_grad_()
    assert torch.autograd.gradcheck(lambda lp, h: objective(lp, h, **inputs, config=config)[0], leaves)


def test_the_objective_does_not_write_into_its_inputs():
    logps, entropy, inputs = objective_tokens()
    before = [x.clone() for x in (logps, entropy, *inputs.values())]
    for config in CONFIGS:
        call_objective(logps, entropy, inputs, config)
    assert all(torch.equal(a, b) for a, b in zip(before, (logps, entropy, *inputs.values()), strict=True))
