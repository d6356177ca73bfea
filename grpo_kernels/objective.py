"""The GRPO loss on [B, T] log-probs: policy term, KL, reductions and metrics, as plain differentiable PyTorch.

Every reduction is a per-token weight, so with u (mask and normaliser) and a (the three factors)

    loss = sum_bt u (a s + beta k3) - entropy_coef * sum(entropy m') / max(sum m', 1)

and the closed-form slopes at the end of this file are all that a fused pass needs to know of a loss.
"""

import math
from dataclasses import dataclass

import torch

from .config import CLIPPED_LOSSES, GRPOLossConfig

_EXP_BOUND = 80.0
_LOG_RATIO_BOUND = 20.0
_LOG_RATIO_FLOOR = math.log(1e-8)


def objective(
    logps: torch.Tensor,
    entropy: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    importance_sampling_ratio: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    num_items=None,
    data_parallel_group=None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the GRPO family from the log-probs of the sampled tokens.

    Args:
        logps: [B, T] log-probs of the policy; differentiable.
        entropy: [B, T] entropies of the policy's distributions; differentiable (used by the entropy bonus only).
        advantages: [B] or [B, T].
        mask: [B, T] bool or 0/1; what any per-token input holds where it is 0 is ignored.
        old_logps: [B, T] log-probs the ratio is taken against; None = on-policy, ``logps.detach()``.
        ref_logps: [B, T] log-probs of the reference; needed when ``config.beta != 0``.
        importance_sampling_ratio: [B, T] or [B, 1] trainer / sampler correction.
        sampling_logps: [B, T], may hold nan; for the off-policy mask, falls back to ``old_logps``.
        num_items: divisor of dapo, cispo and vespo: a number, or a 0-dim tensor (clamped to >= 1); None = kept tokens.
        data_parallel_group: torch.distributed group over which the entropy quantile is taken.
        config: the options.

    Returns:
        loss: 0-dim, differentiable in ``logps`` and ``entropy``.
        metrics: name -> 0-dim detached tensor.

    Source: the papers named in README.md; equal to TRL 1.16's ``GRPOTrainer._compute_loss``.
    """
    t = prepare(advantages, mask, logps.dtype, old_logps, ref_logps, importance_sampling_ratio, sampling_logps, config)
    m = t.mask
    logps, entropy = logps.where(m > 0, 0.0), entropy.where(m > 0, 0.0)
    old = logps.detach() if t.old is None else t.old

    d = logps - old
    if config.sequence_level:
        w = _exp(_per_sequence(d * m) / _per_sequence(m).clamp(min=1))
    else:
        w = _exp(d)
    if t.ref is not None:
        r = t.ref - logps
        k3 = _exp(r) - r - 1
        if config.use_bias_correction_kl:
            k3 = k3 * w

    A = t.advantages
    phi = _gamma_weights(d.detach(), A, m, t.rho, config) if config.loss_type == "vespo" else None
    s = _policy_term(w, phi, logps, A, config)

    if config.off_policy_mask_threshold is not None:
        s = s * _off_policy_mask(A, logps.detach(), old if t.sampling is None else t.sampling, m, config)
    active = m
    if config.top_entropy_quantile < 1.0:
        active = m * _entropy_mask(entropy.detach(), m, config.top_entropy_quantile, data_parallel_group)
        s = s * active
    if t.rho is not None and config.loss_type != "vespo":
        s = s * t.rho

    u = token_weights(m, config, num_items)
    # where u is 0, so is the term: a masked token must not turn 0 * inf into NaN
    policy_loss = (u * s).where(m > 0, 0.0).sum()
    if t.ref is not None:
        policy_loss = policy_loss + config.beta * (u * k3).where(m > 0, 0.0).sum()
    loss = policy_loss
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * (entropy * active).sum() / active.sum().clamp(min=1)

    with torch.no_grad():
        metrics = {"policy_loss": policy_loss.detach(), "entropy": _token_mean(entropy, m)}
        if t.ref is not None:
            metrics["kl"] = _token_mean(k3, m)
        per_sequence = advantages.dim() == 1 and (config.sequence_level or phi is not None)
        metrics.update(_clip_metrics(w, phi, A, m, config, per_sequence))
    return loss, metrics


@dataclass(frozen=True)
class TokenInputs:
    """The detached inputs of the loss as [B, T] (or broadcasting [B, 1]) tensors, clean where the mask is 0."""

    mask: torch.Tensor  # [B, T] 0 or 1 in the compute dtype
    advantages: torch.Tensor  # [B, 1] or [B, T]
    old: torch.Tensor | None  # [B, T]
    ref: torch.Tensor | None  # [B, T], None when beta is 0
    rho: torch.Tensor | None  # [B, 1] or [B, T]
    sampling: torch.Tensor | None  # [B, T]


def prepare(advantages, mask, dtype, old_logps, ref_logps, importance_sampling_ratio, sampling_logps, config):
    """Casts the per-token inputs to the compute dtype and replaces what they hold where the mask is 0."""
    kept = mask.bool()

    def clean(x, fill=0.0):
        if x is None:
            return None
        x = x.detach().to(dtype)
        x = x.unsqueeze(1) if x.dim() == 1 else x
        if x.shape == kept.shape:
            return x.where(kept, fill)
        return x.where(kept.any(1, keepdim=True) | x.isfinite(), fill)

    return TokenInputs(
        mask=kept.to(dtype),
        advantages=clean(advantages),
        old=clean(old_logps),
        ref=clean(ref_logps) if config.beta != 0 else None,
        rho=clean(importance_sampling_ratio, 1.0),
        sampling=clean(sampling_logps) if config.off_policy_mask_threshold is not None else None,
    )


def token_weights(m, config, num_items=None):
    """u: [B, T] mask times normaliser, so that every reduction is ``(u * l).sum()``."""
    sequences = max(m.shape[0], 1)
    if config.loss_type in ("grpo", "sapo"):
        return m / (_per_sequence(m).clamp(min=1) * sequences)
    if config.loss_type == "luspo":
        return m / sequences
    if config.loss_type == "bnpo":
        return m / m.sum().clamp(min=1)
    if config.loss_type == "dr_grpo":
        return m / (sequences * config.max_completion_length)
    if num_items is None:
        num_items = m.sum().clamp(min=1)
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.detach().to(m).clamp(min=1)
    return m / num_items


def _per_sequence(x):
    return x.sum(1, keepdim=True)


def _exp(x):
    """exp of x clamped to +-80, so that finite log-probs give finite ratios; the gradient passes the clamp."""
    return torch.exp(x + (x.clamp(-_EXP_BOUND, _EXP_BOUND) - x).detach())


def _policy_term(w, phi, logps, A, config):
    """s of the specification's table."""
    if config.loss_type == "cispo":
        return -w.clamp(max=config.upper_epsilon).detach() * A * logps
    if config.loss_type == "sapo":
        tau = _sapo_temperature(A, config)
        return -4 / tau * torch.sigmoid(tau * (w - 1)) * A
    if config.loss_type == "vespo":
        return -phi * A * logps
    bounded = w if config.delta is None else w.clamp(max=config.delta)
    return -torch.min(bounded * A, w.clamp(1 - config.epsilon, 1 + config.upper_epsilon) * A)


def _sapo_temperature(A, config):
    return _choose(A > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, A)


def _choose(positive, first, second, like):
    """where() of two Python numbers would round them to float32."""
    return torch.where(positive, like.new_full((), first), like.new_full((), second))


@torch.no_grad()
def _gamma_weights(d, A, m, rho, config):
    """phi of vespo: [B, 1], or [B, T] where advantages are per token."""
    log_w = _per_sequence(d.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND) * m)
    if rho is not None:
        log_rho = rho.log().clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
        log_w = log_w + (log_rho if rho.shape[1] != m.shape[1] else _per_sequence(log_rho * m))
    log_w = log_w.clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
    k = _choose(A >= 0, config.vespo_k_pos, config.vespo_k_neg, A)
    lam = _choose(A >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, A).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    # a log-prob that is not finite must not vanish in the clamps
    return phi + 0 * _per_sequence(d * m)


def _off_policy_mask(A, logps, sampling, m, config):
    drift = _per_sequence((sampling - logps).nan_to_num(nan=0.0) * m) / _per_sequence(m).clamp(min=1)
    return ((A >= 0) | (drift <= config.off_policy_mask_threshold)).to(m.dtype)


def _entropy_mask(entropy, m, quantile, group):
    """1 where a kept token's entropy reaches the (1 - quantile) quantile of all kept tokens, of all ranks of the group.

    Sorts with the masked tokens last instead of selecting the kept ones: shapes do not depend on data, nothing syncs.
    """
    values = entropy.masked_fill(m == 0, float("inf")).flatten()
    count = m.sum()
    if group is not None:
        values = _gather_ragged(values, group)
        torch.distributed.all_reduce(count, group=group)
    if values.numel() == 0:
        return torch.zeros_like(m)
    values = values.sort().values
    rank = (1 - quantile) * (count.to(values.dtype) - 1).clamp(min=0)
    below = rank.floor()
    # gather: an index that is a 0-dim tensor would be read back to the host
    lower, upper = values.gather(0, torch.stack([below, rank.ceil()]).long()).unbind()
    threshold = torch.lerp(lower, upper, rank - below)
    return ((entropy >= threshold) & (m > 0)).to(m.dtype)


def _gather_ragged(values, group):
    """All ranks' values, padded with inf to the longest rank; the same two collectives whatever a rank holds."""
    world = torch.distributed.get_world_size(group)
    length = torch.tensor(values.numel(), device=values.device)
    torch.distributed.all_reduce(length, op=torch.distributed.ReduceOp.MAX, group=group)
    padded = values.new_full((int(length),), float("inf"))
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(gathered, padded, group=group)
    return torch.cat(gathered)


# Metrics


def _token_mean(x, m):
    return (x * m).where(m > 0, 0.0).sum() / m.sum().clamp(min=1)


def _clip_metrics(w, phi, A, m, config, per_sequence):
    def mean(x):
        """One value per sequence: over all B (0 where nothing is kept). One per token: over the kept tokens."""
        if per_sequence:
            return (x.sum() / max(x.shape[0], 1)).where((m > 0).any(), 0.0)
        return _token_mean(x, m)

    if config.loss_type == "vespo":
        return {"vespo/phi_seq_mean": mean(phi)}
    if config.loss_type == "cispo":
        return {"cispo_clip_ratio": mean(((w > config.upper_epsilon) & (A > 0)).to(m.dtype))}
    if config.loss_type == "sapo":
        return {}
    if config.delta is not None:
        w = w.clamp(max=config.delta)
    low = ((w < 1 - config.epsilon) & (A < 0)).to(m.dtype)
    high = ((w > 1 + config.upper_epsilon) & (A > 0)).to(m.dtype)

    def extreme(x, absent, reduce):
        """Minimum or maximum over sequences of the sequence means; 0 where there is no sequence to speak of."""
        if x.shape[0] == 0:
            return x.new_zeros(())
        if per_sequence:
            return reduce(x)
        kept = m.sum(1)
        means = ((x * m).sum(1) / kept.clamp(min=1)).masked_fill(kept == 0, absent)
        return reduce(means).where((kept > 0).any(), 0.0)

    return {
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/region_mean": mean(torch.maximum(low, high)),
        "clip_ratio/low_min": extreme(low, float("inf"), torch.amin),
        "clip_ratio/high_max": extreme(high, -float("inf"), torch.amax),
    }


# Closed-form slopes: what a fused pass needs


def slope(w: torch.Tensor, A: torch.Tensor, config: GRPOLossConfig) -> torch.Tensor:
    """ds/dw of the losses whose gradient runs through the ratio (clipped ones and sapo); the derivative of _policy_term."""
    if config.loss_type == "sapo":
        tau = _sapo_temperature(A, config)
        gate = torch.sigmoid(tau * (w - 1))
        return -4 * gate * torch.sigmoid(-tau * (w - 1)) * A
    low, high = 1 - config.epsilon, 1 + config.upper_epsilon
    bounded = w if config.delta is None else w.clamp(max=config.delta)
    clipped = w.clamp(low, high)
    free_slope = torch.ones_like(w) if config.delta is None else (w <= config.delta).to(w.dtype)
    clip_slope = ((w >= low) & (w <= high)).to(w.dtype)
    first, second = bounded * A, clipped * A
    chosen = torch.where(first < second, free_slope, torch.where(second < first, clip_slope, (free_slope + clip_slope) / 2))
    # a NaN ratio must not vanish in the choice of a branch
    return -A * chosen + 0 * w


def on_policy_coefficients(t: TokenInputs, u: torch.Tensor, config: GRPOLossConfig) -> torch.Tensor:
    """d (policy part of the loss) / d logps, [B, T], where old is logps.detach(): w is 1, so it is known beforehand."""
    A, m = t.advantages.expand_as(t.mask), t.mask
    weight = u if t.rho is None or config.loss_type == "vespo" else u * t.rho
    if config.loss_type == "cispo":
        return -min(1.0, config.upper_epsilon) * A * weight
    if config.loss_type == "vespo":
        return -_gamma_weights(torch.zeros_like(m), t.advantages, m, t.rho, config) * A * weight
    dw = weight * slope(torch.ones_like(m), A, config)
    if config.sequence_level:
        return m / _per_sequence(m).clamp(min=1) * _per_sequence(dw)
    return dw


def known_zero(t: TokenInputs, u: torch.Tensor, config: GRPOLossConfig) -> torch.Tensor:
    """[B, T] bool: kept tokens whose gradient is zero whatever their log-probs will be. NaN inputs are never called zero."""
    if t.ref is not None or config.entropy_coef != 0:
        return torch.zeros_like(t.mask, dtype=torch.bool)
    weight = u * t.advantages
    if t.rho is not None and config.loss_type != "vespo":
        weight = weight * t.rho
    zero = weight == 0
    if t.old is not None:
        zero = zero & ~t.old.isnan()
    if config.sequence_level and config.loss_type not in ("cispo", "vespo"):
        zero = zero.all(1, keepdim=True).expand_as(zero)
    return zero


def row_terms(config: GRPOLossConfig, on_policy: bool) -> "PolicyTerms":
    """The options that the fused row kernel sees."""
    kind = "linear" if on_policy else "clipped" if config.loss_type in CLIPPED_LOSSES else config.loss_type
    return PolicyTerms(
        kind=kind,
        epsilon_low=float(config.epsilon),
        epsilon_high=float(config.upper_epsilon),
        delta=None if config.delta is None else float(config.delta),
        sapo_temperature_pos=float(config.sapo_temperature_pos),
        sapo_temperature_neg=float(config.sapo_temperature_neg),
        use_bias_correction_kl=config.use_bias_correction_kl and not config.sequence_level,
    )


@dataclass(frozen=True)
class PolicyTerms:
    """Scalars of the row kernel: which of the four policy terms, and its constants."""

    kind: str  # clipped | cispo | sapo | linear (the coefficient is w_policy itself)
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    use_bias_correction_kl: bool = True


@dataclass(frozen=True)
class PolicyRows:
    """Per-row inputs of the row kernel, [R] each in the compute dtype; None where a loss has no such part."""

    w_policy: torch.Tensor  # weight of s; for kind "linear" d loss / d logps itself
    advantages: torch.Tensor | None = None
    old: torch.Tensor | None = None  # None: the ratio is 1, with gradient
    ref: torch.Tensor | None = None
    w_kl: torch.Tensor | None = None
    w_entropy: torch.Tensor | None = None  # d loss / d entropy


def coefficient(logps: torch.Tensor, rows: PolicyRows, terms: PolicyTerms) -> torch.Tensor:
    """d loss / d logps of one-pass rows, [R]: the closed form of autograd through `objective` at token level."""
    w = torch.ones_like(logps) if rows.old is None else (logps - rows.old).clamp(-_EXP_BOUND, _EXP_BOUND).exp()
    A = rows.advantages
    if terms.kind == "linear":
        c = rows.w_policy
    elif terms.kind == "cispo":
        c = -rows.w_policy * w.clamp(max=terms.epsilon_high) * A
    else:
        options = GRPOLossConfig(
            loss_type="sapo" if terms.kind == "sapo" else "grpo",
            epsilon=terms.epsilon_low,
            epsilon_high=terms.epsilon_high,
            delta=terms.delta,
            sapo_temperature_pos=terms.sapo_temperature_pos,
            sapo_temperature_neg=terms.sapo_temperature_neg,
        )
        c = rows.w_policy * slope(w, A, options) * w
    if rows.ref is not None:
        r = rows.ref - logps
        # d (w k3) = w (1 - e) + w (e - r - 1), where e cancels
        dk3 = -w * r if terms.use_bias_correction_kl else 1 - r.clamp(-_EXP_BOUND, _EXP_BOUND).exp()
        c = c + rows.w_kl * dk3
    return c
