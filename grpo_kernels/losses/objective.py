"""The GRPO loss on [B, T] log-probs: policy term, KL, reductions and metrics, as plain differentiable PyTorch.

Every reduction is a per-token weight, so with u (mask and normaliser) and a (the three factors)

    loss = sum_bt u (a s + beta k3) - entropy_coef * sum(entropy m') / max(sum m', 1)

Its derivatives in closed form, which is what a fused pass needs, are in coefficients.py.
"""

import math
from dataclasses import dataclass

import torch

from ..traffic import count as count_bytes
from .config import GRPOLossConfig, QuantileOnly

OVER_SEQUENCES = ("grpo", "sapo", "luspo", "dr_grpo")
EXP_BOUND = 80.0
_FLOAT32_EXP_BOUND = 88.0
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
        data_parallel_group: torch.distributed group over which the entropy quantile is taken, and bnpo and the entropy bonus
            are means: the mean of the ranks' losses is then that of all their tokens. None, and `QuantileOnly`: as TRL's.
        config: the options.

    Returns:
        loss: 0-dim, differentiable in ``logps`` and ``entropy``.
        metrics: name -> 0-dim detached tensor.

    Source: the papers named in README.md; equal to TRL 1.16's ``GRPOTrainer._compute_loss``.
    """
    if config.beta != 0 and ref_logps is None:
        raise ValueError(f"ref_logps must be given when beta != 0 (beta = {config.beta}), got None")
    t = prepare(advantages, mask, logps.dtype, old_logps, ref_logps, importance_sampling_ratio, sampling_logps, config)
    m = t.mask
    logps, entropy = logps.where(m > 0, 0.0), entropy.where(m > 0, 0.0)
    old = logps.detach() if t.old is None else t.old

    d = logps - old
    log_w = sum_per_sequence(d * m / sum_per_sequence(m).clamp(min=1)) if config.sequence_level else d
    w = _exp(log_w)
    if t.ref is not None:
        r = t.ref - logps
        k3 = _exp(r, log_w) - w * (r + 1) if config.use_bias_correction_kl else _exp(r) - r - 1

    A = t.advantages
    phi = gamma_weights(d.detach(), A, m, t.rho, config) if config.loss_type == "vespo" else None
    s = _policy_term(w, phi, logps, A, config)

    if config.off_policy_mask_threshold is not None:
        s = s * _off_policy_mask(A, logps.detach(), old if t.sampling is None else t.sampling, m, config)
    active = m
    if config.top_entropy_quantile < 1.0:
        group = data_parallel_group.group if isinstance(data_parallel_group, QuantileOnly) else data_parallel_group
        active = m * _entropy_mask(entropy.detach(), m, config.top_entropy_quantile, group)
        s = s * active
    if t.rho is not None and config.loss_type != "vespo":
        s = s * t.rho

    u = token_weights(m, config, num_items, data_parallel_group)
    # where u is 0, so is the term: a masked token must not turn 0 * inf into NaN
    policy_loss = (u * s).where(m > 0, 0.0).sum()
    if t.ref is not None:
        policy_loss = policy_loss + config.beta * (u * k3).where(m > 0, 0.0).sum()
    loss = policy_loss
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * (entropy * active).sum() / token_count(active, data_parallel_group)

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


def token_weights(m, config, num_items=None, data_parallel_group=None):
    """u: [B, T] mask times normaliser, so that every reduction is ``(u * l).sum()``."""
    sequences = max(m.shape[0], 1)
    if config.loss_type in ("grpo", "sapo"):
        return m / (sum_per_sequence(m).clamp(min=1) * sequences)
    if config.loss_type == "luspo":
        return m / sequences
    if config.loss_type == "bnpo":
        return m / token_count(m, data_parallel_group)
    if config.loss_type == "dr_grpo":
        return m / (sequences * config.max_completion_length)
    if num_items is None:
        num_items = m.sum().clamp(min=1)
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.detach().to(m).clamp(min=1)
    return m / num_items


def token_count(m, data_parallel_group=None):
    """0-dim: the tokens that a mean is over, at least 1; with a group, the ranks' share of all its tokens."""
    count = m.sum()
    if data_parallel_group is None or isinstance(data_parallel_group, QuantileOnly):
        return count.clamp(min=1)
    count_bytes("means", count)
    torch.distributed.all_reduce(count, group=data_parallel_group)
    return count.clamp(min=1) / torch.distributed.get_world_size(data_parallel_group)


def group_in_use(config, data_parallel_group):
    """The group where the loss has collectives over it, else None."""
    if data_parallel_group is None or not isinstance(config, GRPOLossConfig):
        return None
    only_quantile = isinstance(data_parallel_group, QuantileOnly)
    means = config.loss_type == "bnpo" or config.entropy_coef != 0
    if config.top_entropy_quantile == 1 and (only_quantile or not means):
        return None
    return data_parallel_group.group if only_quantile else data_parallel_group


def sum_per_sequence(x):
    return x.sum(1, keepdim=True)


def _exp(*arguments):
    """exp of a sum of arguments, each clamped to +-80, so that finite log-probs give finite ratios; the gradient passes.

    A product of two such exps, w exp(r), would overflow float32: the sum stops at 88 there.
    """
    value = sum(x.detach().clamp(-EXP_BOUND, EXP_BOUND) for x in arguments)
    if value.dtype == torch.float32:
        value = value.clamp(max=_FLOAT32_EXP_BOUND)
    # adds exactly 0, or NaN where an argument is not finite
    return torch.exp(value + sum(x - x.detach() for x in arguments))


def _policy_term(w, phi, logps, A, config):
    """s of the specification's table."""
    if config.loss_type == "cispo":
        return -w.clamp(max=config.upper_epsilon).detach() * A * logps
    if config.loss_type == "sapo":
        tau = sapo_temperature(A, config)
        return -4 / tau * torch.sigmoid(tau * (w - 1)) * A
    if config.loss_type == "vespo":
        return -phi * A * logps
    bounded = w if config.delta is None else w.clamp(max=config.delta)
    return -torch.min(bounded * A, w.clamp(1 - config.epsilon, 1 + config.upper_epsilon) * A)


def sapo_temperature(A, config):
    return _choose(A > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, A)


def _choose(positive, first, second, like):
    """where() of two Python numbers would round them to float32."""
    return torch.where(positive, like.new_full((), first), like.new_full((), second))


@torch.no_grad()
def gamma_weights(d, A, m, rho, config):
    """phi of vespo: [B, 1], or [B, T] where advantages are per token."""
    log_w = sum_per_sequence(d.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND) * m)
    if rho is not None:
        log_rho = rho.log().clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
        log_w = log_w + (log_rho if rho.shape[1] != m.shape[1] else sum_per_sequence(log_rho * m))
    log_w = log_w.clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
    k = _choose(A >= 0, config.vespo_k_pos, config.vespo_k_neg, A)
    lam = _choose(A >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, A).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    # a log-prob that is not finite must not vanish in the clamps
    return phi + 0 * sum_per_sequence(d * m)


def _off_policy_mask(A, logps, sampling, m, config):
    drift = sum_per_sequence((sampling - logps).nan_to_num(nan=0.0) * m) / sum_per_sequence(m).clamp(min=1)
    return ((A >= 0) | (drift <= config.off_policy_mask_threshold)).to(m.dtype)


def _entropy_mask(entropy, m, quantile, group):
    """1 where a kept token's entropy reaches the (1 - quantile) quantile of all kept tokens, of all ranks of the group.

    Sorts with the masked tokens last instead of selecting the kept ones: shapes do not depend on data, nothing syncs.
    """
    values = entropy.masked_fill(m == 0, float("inf")).flatten()
    count = m.sum()
    if group is not None:
        values = _gather_ragged(values, group)
        count_bytes("quantile", count)
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
    length = torch.full((), values.numel(), device=values.device)
    count_bytes("quantile", length)
    torch.distributed.all_reduce(length, op=torch.distributed.ReduceOp.MAX, group=group)
    padded = values.new_full((int(length),), float("inf"))
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in range(world)]
    count_bytes("quantile", padded)
    torch.distributed.all_gather(gathered, padded, group=group)
    return torch.cat(gathered)


# Metrics


def metric_weight(name, config, tokens, sequences, shares=False, per_sequence=True):
    """What a metric of a part of a batch counts for in the whole: ``tokens``, ``sequences``, or 1.

    ``shares``: the parts' losses, divided by a part of a common count, average to the whole's. ``per_sequence``: so are advantages.
    """
    if name in ("loss", "policy_loss", "aux_loss"):
        return sequences if config.loss_type in OVER_SEQUENCES else 1 if shares else tokens
    over_tokens = name in ("entropy", "kl") or not (per_sequence and (config.sequence_level or config.loss_type == "vespo"))
    return tokens if over_tokens else sequences


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
