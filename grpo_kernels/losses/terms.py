"""The policy terms: one function a loss, the registry of them, and what the fused row kernels are told of one."""

from dataclasses import dataclass

import torch

# The terms that the fused row kernels know, by the number that they are handed: the one table of them for every language.
# linear: the coefficient d loss / d logps is w_policy itself.
KINDS = ("clipped", "cispo", "sapo", "linear")


@dataclass(frozen=True)
class PolicyTerms:
    """Scalars of the fused row kernel: which policy term, and its constants."""

    kind: str  # one of KINDS
    epsilon_low: float = 0.2  # the clip range is [1 - epsilon_low, 1 + epsilon_high]; cispo's cap is epsilon_high itself
    epsilon_high: float = 0.2
    delta: float = float("inf")  # upper bound of the ratio in the unclipped branch; inf: none
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    use_bias_correction_kl: bool = True


@dataclass(frozen=True)
class PolicyRows:
    """Per-row inputs of the fused row kernel, [R] each in the compute dtype; None where a loss has no such part."""

    w_policy: torch.Tensor | None  # weight of s; for kind "linear" d loss / d logps itself
    advantages: torch.Tensor | None = None
    old: torch.Tensor | None = None  # None: the ratio is 1, with gradient
    ref: torch.Tensor | None = None
    w_kl: torch.Tensor | None = None
    w_entropy: torch.Tensor | None = None  # d loss / d entropy
