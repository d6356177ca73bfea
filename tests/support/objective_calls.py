"""Tokens for the objective, drawn or fixed, and what must hold of every loss on them."""

import math

import torch
from hypothesis import strategies as st

from grpo_kernels import GRPOLossConfig, objective
from grpo_kernels.losses.objective import linear_coefficients, prepare
from grpo_kernels.losses.terms import PolicyRows, row_coefficient
from support.problems import BANDS
from support.tolerance import assert_close


def draw_tokens(rng, g, config, T=None):
    """Random [B, T] inputs of the objective, float64; entropies and options are float32 numbers, as TRL rounds them."""
    B, T = rng.choice([1, 2, 3, 6]), T or rng.choice([2, 5, 8])

    def uniform(low, high, *shape):
        return (torch.rand(*shape, generator=g, dtype=torch.float64) * (high - low) + low).float().double()

    mask = uniform(0, 1, B, T) > rng.choice([-1, 0.3, 0.6])
    if B > 2:
        mask[-1] = False
    mask[0, 0] = True
    logps = -uniform(0.01, 6, B, T)
    A = uniform(-2, 2, B, T) if rng.random() < 0.4 else uniform(-2, 2, B)
    A = A.where(uniform(0, 1, *A.shape) > 0.2, 0.0)
    band = torch.tensor(BANDS, dtype=torch.float64)[torch.randint(0, len(BANDS), (B, T), generator=g)]
    d = (band[..., 0] + (band[..., 1] - band[..., 0]) * uniform(0, 1, B, T)).log()
    if rng.random() < 0.2:
        d = d * 12  # ratios from 1e-6 to 1e8, and the bounds of vespo
    inputs = dict(mask=mask.double(), advantages=A)
    if rng.random() < 0.7:
        inputs["old_logps"] = logps - d
    inputs["ref_logps"] = logps + uniform(-3, 3, B, T)
    if rng.random() < 0.5:
        inputs["sampling_logps"] = (logps + uniform(-0.7, 0.9, B, T)).where(uniform(0, 1, B, T) > 0.2, math.nan)
    if rng.random() < 0.5:
        rho = uniform(0, 2, B, 1 if rng.random() < 0.5 else T)
        inputs["importance_sampling_ratio"] = rho.where(rho > 0.2, 0.0)
    if rng.random() < 0.5:
        inputs["num_items"] = torch.tensor(rng.choice([0, 3, 17]))
    return logps, uniform(0, 4, B, T), inputs


def call_objective(logps, entropy, inputs, config, scale=1.0):
    """(loss, d logps, d entropy, metrics)."""
    logps, entropy = logps.clone().requires_grad_(), entropy.clone().requires_grad_()
    loss, metrics = objective(logps, entropy, **inputs, config=config)
    gradients = torch.autograd.grad(loss * scale, (logps, entropy), materialize_grads=True)
    return {"loss": loss.detach(), "dlogps": gradients[0], "dentropy": gradients[1], **metrics}


def objective_tokens(B=3, T=4, **more):
    g = torch.Generator().manual_seed(1)
    logps = -torch.rand(B, T, generator=g, dtype=torch.float64) * 3
    tokens = dict(
        mask=torch.ones(B, T), advantages=torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)[:B],
        old_logps=logps + torch.rand(B, T, generator=g, dtype=torch.float64) - 0.5, ref_logps=logps - 0.3,
    )  # fmt: skip
    return logps, torch.rand(B, T, generator=g, dtype=torch.float64), {**tokens, **more}


advantages = st.one_of(st.floats(-4, 4), st.sampled_from([0.0, -1.0, 1.0]))
rows = st.fixed_dictionaries(
    dict(
        lp=st.floats(-12, -1e-6), d=st.one_of(st.floats(-3, 3), st.floats(-100, 100)), r=st.floats(-4, 4), A=advantages,
        rho=st.floats(0, 2), on_policy=st.booleans(), beta=st.sampled_from([0.0, 0.3, -0.1]), corrected=st.booleans(),
    )
)  # fmt: skip


def assert_coefficient_is_the_derivative(row, config):
    """The closed form of one token's gradient is what autograd finds; ``row`` is drawn from `rows`."""
    logps = torch.tensor([[row["lp"]]], dtype=torch.float64)
    inputs = dict(
        mask=torch.ones(1, 1), advantages=torch.tensor([row["A"]], dtype=torch.float64), ref_logps=logps + row["r"],
        importance_sampling_ratio=torch.tensor([[row["rho"]]], dtype=torch.float64), num_items=3,
    )  # fmt: skip
    if not row["on_policy"]:
        inputs["old_logps"] = logps - row["d"]
    truth = call_objective(logps, logps * 0, inputs, config)["dlogps"]
    closed, _ = of_rows(logps, inputs, config)
    size = math.exp(max(-80, min(80, 0 if row["on_policy"] else row["d"])))  # autograd's own rounding grows with w
    assert_close("coefficient", closed, truth, 1e-10, floor=1e-12 * (1 + size * math.exp(abs(row["r"]))))


def prepared(inputs, config):
    names = {"old": "old_logps", "ref": "ref_logps", "rho": "importance_sampling_ratio", "sampling": "sampling_logps"}
    tensors = {name: inputs.get(given) for name, given in names.items()}
    return prepare(config, inputs["advantages"].dtype, inputs["advantages"], inputs["mask"], tensors, inputs.get("num_items"))


def of_rows(logps, inputs, config):
    """d loss / d logps, [B, T], from each row's own inputs, as the one-pass functions assemble it; and the inputs as prepared."""
    t = prepared(inputs, config)
    linear = linear_coefficients(t, config)
    weights = t.weights if t.rho is None or config.loss_type == "vespo" else t.weights * t.rho
    rows = PolicyRows(weights if linear is None else linear, t.advantages.expand_as(logps), t.old, t.ref,
                      None if t.ref is None else t.weights * config.beta)  # fmt: skip
    return row_coefficient(logps, rows, config, linear is not None), t


def assert_masked_positions_are_ignored(config, per_token):
    """NaN, inf and large numbers at masked positions change no bit."""
    logps, entropy, inputs = objective_tokens()
    B, T = logps.shape
    inputs["mask"][0, 1:3] = 0
    inputs["mask"][2] = 0
    inputs.update(importance_sampling_ratio=torch.full((B, T), 0.7), sampling_logps=logps - 0.2)
    if per_token:
        inputs["advantages"] = inputs["advantages"].unsqueeze(1).repeat(1, T)
    options = {**vars(config), "off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.6}
    config = GRPOLossConfig(**options)
    clean = call_objective(logps, entropy, inputs, config)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        dirty = {k: v.clone() for k, v in inputs.items()}
        out = inputs["mask"] == 0
        for name, value in dirty.items():
            if name != "mask" and value.shape == out.shape:
                value[out] = garbage
        result = call_objective(logps.masked_fill(out, garbage), entropy.masked_fill(out, garbage), dirty, config)
        for name, value in clean.items():
            assert torch.equal(result[name], value), f"{name} with {garbage}"
        assert not result["dlogps"][out].any() and not result["dentropy"][out].any()
    inputs["mask"] = inputs["mask"].bool()
    assert torch.equal(call_objective(logps, entropy, inputs, config)["loss"], clean["loss"])


def assert_poison_is_a_nan_loss(config, poisoned, poison):
    """A NaN or inf at a kept position of any row is a NaN loss."""
    logps, entropy, inputs = objective_tokens()
    inputs["advantages"][1] = 0.0
    for row in range(3):
        dirty = {k: v.clone() for k, v in inputs.items()}
        bad = logps.clone()
        (bad if poisoned == "logps" else dirty[poisoned])[row, 2] = poison
        assert call_objective(bad, entropy, dirty, config)["loss"].isnan(), f"row {row}"


def assert_nothing_kept_is_zero(config, shape):
    """Without kept positions loss, gradients and metrics are 0."""
    logps, entropy = torch.full(shape, -2.0), torch.ones(shape)
    options = dict(vars(config), off_policy_mask_threshold=0.1, top_entropy_quantile=0.5)
    inputs = dict(mask=torch.zeros(shape), advantages=torch.ones(shape[0]), old_logps=logps - 3, ref_logps=logps + 1,
                  importance_sampling_ratio=torch.full((shape[0], 1), 0.5))  # fmt: skip
    for c in (config, GRPOLossConfig(**options)):
        logps.requires_grad_(), entropy.requires_grad_()
        loss, metrics = objective(logps, entropy, **inputs, config=c)
        assert loss == 0 and loss.requires_grad
        for gradient in torch.autograd.grad(loss, (logps, entropy), allow_unused=True):
            assert gradient is None or not gradient.any()
        assert {"entropy", "policy_loss"} <= set(metrics)
        for name, value in metrics.items():
            assert value == 0 and value.dim() == 0, f"{name} = {value}"
        logps, entropy = logps.detach(), entropy.detach()
