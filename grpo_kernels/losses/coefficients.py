"""Derivatives of the objective in closed form: what a fused pass needs to know of a loss before the logits are there.

A row's gradient is ``c (onehot - p)`` with ``c = d loss / d logps``. Where c is known beforehand (on-policy), or is zero
beforehand, and how the row kernels get it from the log-prob they have just computed, stands here; a property test holds each
function against autograd of `objective`.
"""

from dataclasses import dataclass

import torch

from .config import CLIPPED_LOSSES, GRPOLossConfig
from .objective import EXP_BOUND, TokenInputs, gamma_weights, sapo_temperature, sum_per_sequence


def slope(w: torch.Tensor, A: torch.Tensor, config: GRPOLossConfig) -> torch.Tensor:
    """ds/dw of the losses whose gradient runs through the ratio (clipped ones and sapo); the derivative of _policy_term."""
    if config.loss_type == "sapo":
        tau = sapo_temperature(A, config)
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
        return -gamma_weights(torch.zeros_like(m), t.advantages, m, t.rho, config) * A * weight
    dw = weight * slope(torch.ones_like(m), A, config)
    if config.sequence_level:
        return m / sum_per_sequence(m).clamp(min=1) * sum_per_sequence(dw)
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
    w = torch.ones_like(logps) if rows.old is None else (logps - rows.old).clamp(-EXP_BOUND, EXP_BOUND).exp()
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
        dk3 = -w * r if terms.use_bias_correction_kl else 1 - r.clamp(-EXP_BOUND, EXP_BOUND).exp()
        c = c + rows.w_kl * dk3
    return c
