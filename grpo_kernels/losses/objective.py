"""The GRPO loss on [B, T] log-probs: policy term, KL, reductions and metrics, as plain differentiable PyTorch.

Every reduction is a per-token weight, so with u (mask and normaliser) and a (the three factors)

    loss = sum_bt u (a s + beta k3) - entropy_coef * sum(entropy m') / max(sum m', 1)

Nothing here knows a process group: what depends on other ranks comes in as numbers.
"""

import math
from dataclasses import dataclass, replace

import torch

from .config import DIVIDED_BY_ITEMS, GRPOLossConfig
from .correction import check_correction, reads_sampling, sampler_correction
from .covariance import marked_tokens
from .terms import TERMS, beyond_trust_region, choose, clamped_exp, k3, mean_per_sequence, sum_per_sequence

CUTS = ("geo_mean", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov")  # of whose metrics one is the share of tokens that they cut
OVER_SEQUENCES = ("grpo", "sapo", "luspo", "dr_grpo")  # aggregations
SAMPLING_METRIC = "sampling/importance_sampling_ratio/mean"  # TRL's name
_LOG_RATIO_BOUND = 20.0
_LOG_RATIO_FLOOR = math.log(1e-8)
_SMALLEST_WEIGHT = 1e-10  # verl's, under the logarithm of geo_mean's weights


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
    kl: torch.Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the GRPO family from the log-probs of the sampled tokens.

    Args:
        logps: [B, T] log-probs of the policy; differentiable.
        entropy: [B, T] entropies of the policy's distributions; differentiable (used by the entropy bonus only).
        advantages: [B] or [B, T].
        mask: [B, T] bool or 0/1; what any per-token input holds where it is 0 is ignored.
        old_logps: [B, T] log-probs the ratio is taken against; None = on-policy, ``logps.detach()``.
        ref_logps: [B, T] log-probs of the reference; needed when ``config.beta != 0``, but for ``kl_estimator="exact"``.
        importance_sampling_ratio: [B, T] or [B, 1] trainer / sampler correction.
        sampling_logps: [B, T], may hold nan; for ``config.importance_sampling_mode``, which needs it, and for the off-policy mask,
            where it falls back to ``old_logps``.
        num_items: divisor of dapo, cispo, vespo and of verl's losses but gspo and geo_mean: a number, or a 0-dim tensor (clamped
            to >= 1); None = kept tokens.
        kl: [B, T] KL of the policy from the reference over the vocabulary, for ``kl_estimator="exact"``; differentiable.
        config: the options.

    Returns:
        loss: 0-dim, differentiable in ``logps``, ``entropy`` and ``kl``.
        metrics: name -> 0-dim detached tensor.

    Source: the papers named in docs/losses.md; equal to TRL 1.16's ``GRPOTrainer._compute_loss`` and verl 0.9.1's ``core_algos``.
    """
    needed, given = ("kl", kl) if config.exact_kl else ("ref_logps", ref_logps)
    if config.beta != 0 and given is None:
        raise ValueError(f"{needed} must be given when beta != 0 (beta = {config.beta}), got None")
    check_correction(config, importance_sampling_ratio, sampling_logps)
    refuse_lost_gradients(
        config, advantages=advantages, mask=mask, old_logps=old_logps, ref_logps=ref_logps, num_items=num_items,
        importance_sampling_ratio=importance_sampling_ratio, sampling_logps=sampling_logps,
    )  # fmt: skip
    tensors = {"old": old_logps, "ref": ref_logps, "rho": importance_sampling_ratio, "sampling": sampling_logps}
    return evaluate(prepare(config, logps.dtype, advantages, mask, tensors, num_items), logps, entropy, config, kl=kl)


def refuse_lost_gradients(config, **given):
    """What the loss reads beside log-probs and entropies is a constant of it; what it does not read is ignored."""
    unread = {
        "ref_logps": config.beta == 0 or config.exact_kl, "sampling_logps": not reads_sampling(config),
        "num_items": config.aggregation not in DIVIDED_BY_ITEMS,
    }  # fmt: skip
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled() and not unread.get(name):
            raise ValueError(f"{name} must not require a gradient, there is none for it; pass {name}.detach()")


@dataclass(frozen=True)
class TokenInputs:
    """The detached inputs of the loss as [B, T] (or broadcasting [B, 1]) tensors, clean where the mask is 0."""

    mask: torch.Tensor  # [B, T] 0 or 1 in the compute dtype
    weights: torch.Tensor  # [B, T] u: mask times normaliser
    advantages: torch.Tensor  # [B, 1] or [B, T]
    per_sequence: bool  # so are the advantages
    count: torch.Tensor  # 0-dim, the tokens that a mean over tokens is over, at least 1 (of a rank: its share of all)
    old: torch.Tensor | None = None  # [B, T]
    ref: torch.Tensor | None = None  # [B, T], None where k3 is not in the loss
    rho: torch.Tensor | None = None  # [B, 1] or [B, T]; of importance_sampling_mode too, but where that is on-policy
    sampling: torch.Tensor | None = None  # [B, T]


def prepare(config, dtype, advantages, mask, tensors, num_items=None) -> TokenInputs:
    """Casts the per-token inputs to the compute dtype, replaces what they hold where the mask is 0, and weighs the tokens.

    ``tensors``: old, ref, rho and sampling by name.
    """
    kept = mask.bool()

    def clean(x, fill=0.0):
        if x is None:
            return None
        x = x.detach().to(dtype)
        x = x.unsqueeze(1) if x.dim() == 1 else x
        if x.shape == kept.shape:
            return x.where(kept, fill)
        return x.where(kept.any(1, keepdim=True) | x.isfinite(), fill)

    m = kept.to(dtype)
    count = m.sum().clamp(min=1)
    old, rho = clean(tensors["old"]), clean(tensors["rho"], 1.0)
    sampling = clean(tensors["sampling"]) if reads_sampling(config) else None
    if config.importance_sampling_mode is not None and old is not None:
        rho = sampler_correction(old, sampling, m, config)
    return TokenInputs(
        mask=m,
        weights=m / _divisor(config, m, num_items, count),
        advantages=clean(advantages),
        per_sequence=advantages.dim() == 1,
        count=count,
        old=old,
        ref=clean(tensors["ref"]) if config.beta != 0 and not config.exact_kl else None,
        rho=rho,
        sampling=sampling,
    )


def weighed_over(t: TokenInputs, config, count) -> TokenInputs:
    """The inputs whose means over tokens, bnpo's and the entropy bonus's, are over so many."""
    return replace(t, count=count, weights=t.mask / count if config.aggregation == "bnpo" else t.weights)


def _divisor(config, m, num_items, token_count):
    """What a token's loss is divided by, so that every reduction is ``(weights * loss).sum()``."""
    sequences = max(m.shape[0], 1)
    aggregation = config.aggregation
    if aggregation in ("grpo", "sapo"):
        return sum_per_sequence(m).clamp(min=1) * sequences
    if aggregation == "luspo":
        return sequences
    if aggregation == "bnpo":
        return token_count
    if aggregation == "dr_grpo":
        return sequences * config.max_completion_length
    if num_items is None:
        return m.sum().clamp(min=1)
    return num_items.detach().to(m).clamp(min=1) if isinstance(num_items, torch.Tensor) else num_items


def evaluate(t: TokenInputs, logps, entropy, config, top=None, reduction="loss_type", kl=None, marked=None):
    """(loss, metrics) of log-probs and entropies [B, T], and of the exact KL [B, T] where that is in the loss.

    ``top``: the (mask, count) of an entropy quantile over several ranks. ``marked`` [B, T] bool: the `marked_tokens` over them.
    ``reduction`` "none": loss is [B, T], without weights.
    """
    m, A = t.mask, t.advantages
    logps, entropy = logps.where(m > 0, 0.0), entropy.where(m > 0, 0.0)
    old = logps.detach() if t.old is None else t.old
    term = TERMS[config.loss_type]

    d = logps - old
    log_w = d
    if config.sequence_level:
        log_w = sum_per_sequence(d * m / sum_per_sequence(m).clamp(min=1))
    elif config.loss_type == "gspo":
        log_w = d - d.detach() + mean_per_sequence(d.detach(), m)  # the sequence's in value, the token's own in gradient
    w = clamped_exp(log_w)
    rho = t.rho
    if rho is None and config.importance_sampling_mode is not None:
        rho = sampler_correction(logps.detach(), t.sampling, m, config)
    correction = rho
    if config.loss_type == "geo_mean" and rho is not None:
        rho = mean_per_sequence((rho + _SMALLEST_WEIGHT).log(), m).exp()
    if term.scope == "call" and marked is None:
        marked = marked_tokens(logps.detach(), t, config)
    s = _policy_term(logps, old, log_w, w, marked, t, config)

    phi = gamma_weights(d.detach(), A, m, rho, config) if config.loss_type == "vespo" else None
    if phi is not None:
        s = phi * s
    if config.off_policy_mask_threshold is not None:
        s = s * _off_policy_mask(A, logps.detach(), old if t.sampling is None else t.sampling, m, config)
    active, count = m, t.count
    if config.top_entropy_quantile < 1.0:
        if top is None:
            active = top_tokens(entropy.detach(), m, entropy_threshold(entropy.detach(), m, config.top_entropy_quantile))
            count = active.sum().clamp(min=1)
        else:
            active, count = top
        s = s * active
    if rho is not None and phi is None:
        s = s * rho

    # where u is 0, so is the term: a masked token must not turn 0 * inf into NaN
    policy_loss = (t.weights * s).where(m > 0, 0.0).sum()
    kl = kl if config.exact_kl else None if t.ref is None else k3(log_w, w, t.ref - logps, config)
    if kl is not None:
        kl = kl.where(m > 0, 0.0)
        policy_loss = policy_loss + config.beta * (t.weights * kl).where(m > 0, 0.0).sum()
    loss = policy_loss
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * (entropy * active).sum() / count
    if reduction == "none":
        loss = s if kl is None else s + config.beta * kl
        loss = loss if config.entropy_coef == 0 else loss - config.entropy_coef * entropy * active
        loss = loss.expand_as(m).where(m > 0, 0.0)

    with torch.no_grad():
        metrics = {"policy_loss": policy_loss.detach(), "entropy": _token_mean(entropy, m)}
        if kl is not None:
            metrics["kl"] = _token_mean(kl, m)
        per_sequence = t.per_sequence and (config.sequence_level or phi is not None)
        metrics.update(_clip_metrics(w, phi, A, m, config, per_sequence))
        if config.loss_type in CUTS:
            cut = marked if term.scope == "call" else cut_tokens(logps, old, d, A, config)
            metrics["clip_ratio/region_mean"] = _token_mean(cut.to(m.dtype), m)
        if config.importance_sampling_mode is not None:
            metrics[SAMPLING_METRIC] = _token_mean(correction.expand_as(m), m)
    return loss, metrics


def _policy_term(logps, old, log_w, w, marked, t, config):
    """s [B, T], or [B, 1] of a sequence, without the weights that stand before it."""
    term, A = TERMS[config.loss_type], t.advantages
    if config.loss_type == "geo_mean":
        w, A = clamped_exp(mean_per_sequence(clipped_log_ratio(log_w, A, config), t.mask)), mean_per_sequence(A, t.mask)
    moved = old + log_w if config.sequence_level and term.registered else logps
    s = term.of(w, moved, old, A, config)
    if config.loss_type == "clip_cov":
        return s * ~marked
    return s + config.ppo_kl_coef * log_w.abs() * marked if config.loss_type == "kl_cov" else s


def clipped_log_ratio(d, A, config):
    """GMPO's: the lower of log-ratio and clipped log-ratio where the advantage is positive, the higher where it is negative."""
    bounded = d.clamp(-config.epsilon, config.upper_epsilon)
    lower, higher = torch.min(d, bounded), torch.max(d, bounded)
    return torch.where(A > 0, lower, torch.where(A < 0, higher, 0 * d)) + 0 * d  # an infinite log-ratio is no NaN when clipped


@torch.no_grad()
def cut_tokens(logps, old, d, A, config):
    """[B, T] bool: the tokens whose gradient the policy term cuts."""
    if config.loss_type == "geo_mean":
        return ((d > config.upper_epsilon) & (A > 0)) | ((d < -config.epsilon) & (A < 0))
    return beyond_trust_region(logps, old, A, config)


# What a fused pass needs to know before the log-probs are there


def depends_on_its_row_alone(config: GRPOLossConfig, on_policy: bool) -> bool:
    """Whether d loss / d logps of a token needs the log-probs of no other token, so that one pass is enough."""
    if config.top_entropy_quantile < 1.0 or config.off_policy_mask_threshold is not None:
        return False
    term = TERMS[config.loss_type]
    if term.scope == "call" or config.loss_type == "geo_mean" or (config.sequence_level and term.registered):
        return False
    if on_policy and config.importance_sampling_mode is not None:
        return False  # the correction is by the very log-probs
    if on_policy:
        return not (config.sequence_level and config.beta != 0 and not config.exact_kl and config.use_bias_correction_kl)
    return not config.sequence_level and term.scope == "token"


def known_zero(t: TokenInputs, config: GRPOLossConfig) -> torch.Tensor:
    """[B, T] bool: kept tokens whose gradient is zero whatever their log-probs will be. NaN inputs are never called zero."""
    if config.beta != 0 or config.entropy_coef != 0:
        return torch.zeros_like(t.mask, dtype=torch.bool)
    weight = t.weights.clone() if TERMS[config.loss_type].trains_at_zero else t.weights * t.advantages
    if t.rho is not None and config.loss_type not in ("vespo", "geo_mean"):
        weight = weight * t.rho
    zero = weight == 0
    if t.old is not None:
        zero = zero & ~t.old.isnan()
    if config.sequence_level and config.loss_type not in ("cispo", "vespo"):
        zero = zero.all(1, keepdim=True).expand_as(zero)
    return zero


def linear_coefficients(t: TokenInputs, config: GRPOLossConfig) -> torch.Tensor | None:
    """d (policy part of the loss) / d logps, [B, T], where it is known beforehand: on-policy, for vespo and at sequence level.

    None elsewhere. The ratio is 1, and so are its gradient and every sigmoid's derivative times 4.
    """
    if t.old is not None or not (config.sequence_level or config.loss_type == "vespo"):
        return None
    A, m = t.advantages.expand_as(t.mask), t.mask
    if config.loss_type == "vespo":
        return -gamma_weights(torch.zeros_like(m), t.advantages, m, t.rho, config) * A * t.weights
    weight = t.weights if t.rho is None else t.weights * t.rho
    if config.loss_type == "cispo":
        return -min(1.0, config.upper_epsilon) * A * weight
    bounded = config.loss_type != "sapo" and config.delta is not None and config.delta < 1
    dw = weight * -(A.clamp(max=0) if bounded else A)  # below a ratio of 1 the bound is constant, and the minimum for A > 0
    return m / sum_per_sequence(m).clamp(min=1) * sum_per_sequence(dw)


@torch.no_grad()
def gamma_weights(d, A, m, rho, config):
    """phi of vespo: [B, 1], or [B, T] where advantages are per token."""
    log_w = sum_per_sequence(d.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND) * m)
    if rho is not None:
        log_rho = rho.log().clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
        log_w = log_w + (log_rho if rho.shape[1] != m.shape[1] else sum_per_sequence(log_rho * m))
    log_w = log_w.clamp(_LOG_RATIO_FLOOR, _LOG_RATIO_BOUND)
    k = choose(A >= 0, config.vespo_k_pos, config.vespo_k_neg, A)
    lam = choose(A >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, A).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    # a log-prob that is not finite must not vanish in the clamps
    return phi + 0 * sum_per_sequence(d * m)


def _off_policy_mask(A, logps, sampling, m, config):
    drift = sum_per_sequence((sampling - logps).nan_to_num(nan=0.0) * m) / sum_per_sequence(m).clamp(min=1)
    return ((A >= 0) | (drift <= config.off_policy_mask_threshold)).to(m.dtype)


def entropy_threshold(entropy, m, quantile, gathered=None):
    """0-dim, the (1 - quantile) quantile of the kept tokens' entropies; ``gathered``: (entropies, count) of all ranks.

    Sorts with the masked tokens last instead of selecting the kept ones: shapes do not depend on data, nothing syncs.
    """
    values, count = (masked_last(entropy, m), m.sum()) if gathered is None else gathered
    if values.numel() == 0:
        return values.new_zeros(())
    values = values.sort().values
    rank = (1 - quantile) * (count.to(values.dtype) - 1).clamp(min=0)
    below = rank.floor()
    # gather: an index that is a 0-dim tensor would be read back to the host
    lower, upper = values.gather(0, torch.stack([below, rank.ceil()]).long()).unbind()
    return torch.lerp(lower, upper, rank - below)


def masked_last(entropy, m):
    """[B T] entropies, those of masked tokens behind all others in a sorted order."""
    return entropy.masked_fill(m == 0, float("inf")).flatten()


def top_tokens(entropy, m, threshold):
    """[B, T] 1 where a kept token's entropy reaches the threshold: all of those that tie at it, as in TRL."""
    return ((entropy >= threshold) & (m > 0)).to(m.dtype)


# Metrics


def metric_weight(name, config, tokens, sequences, shares=False, per_sequence=True):
    """What a metric of a part of a batch counts for in the whole: ``tokens``, ``sequences``, or 1.

    ``shares``: the parts' losses, divided by a part of a common count, average to the whole's. ``per_sequence``: so are advantages.
    """
    if name in ("loss", "policy_loss", "aux_loss"):
        return sequences if config.aggregation in OVER_SEQUENCES else 1 if shares else tokens
    over_sequences = per_sequence and (config.sequence_level or config.loss_type == "vespo")
    return sequences if over_sequences and name not in ("entropy", "kl", SAMPLING_METRIC) else tokens


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
    if TERMS[config.loss_type].kind != "clipped":
        return {}
    if config.ratio_bound is not None:
        w = w.clamp(max=config.ratio_bound)
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
