"""The options of the loss: one frozen dataclass, validated when it is made, named as in TRL's GRPO trainer."""

import dataclasses
import functools
import numbers
import sys
import warnings
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch

from .terms import BUILT_IN, TERMS

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Level = Literal["token", "sequence"]
KLEstimator = Literal["k3", "exact"]

LOSS_TYPES = BUILT_IN
DIVIDED_BY_ITEMS = ("dapo", "cispo", "vespo")  # whose normaliser is num_items
IMPORTANCE_SAMPLING_LEVELS = get_args(Level)
_FLOAT32_MAX = 3.4e38  # options are float32 numbers in the kernels
_SMALLEST = 1e-30  # a divisor below would overflow finite logits


@dataclass(frozen=True)
class GRPOLossConfig:
    """Options of the GRPO loss family; an option that a ``loss_type`` does not use is ignored.

    Args:
        loss_type: which policy term and reduction; one of ``LOSS_TYPES``, or a name given to `register_policy_term`.
        importance_sampling_level: ratio per ``"token"``, or one per ``"sequence"`` (GSPO).
        epsilon: lower clip range; the ratio is clipped at ``1 - epsilon``. >= 0.
        epsilon_high: upper clip range, ``1 + epsilon_high``; None means ``epsilon``. For cispo it is the cap itself
            (5.0 in the ScaleRL paper); a cap below 1 is warned of, once. >= 0.
        delta: upper bound of the unclipped ratio (two-sided clipping); None means no bound. > 0.
        beta: weight of the KL of the policy from the reference policy; 0 needs no reference.
        kl_estimator: ``"k3"`` estimates that KL from the sampled token's ``ref_logps``; ``"exact"`` sums it over the vocabulary,
            from ``ref_hidden`` and ``ref_weight``: a product more, and no sampling noise.
        use_bias_correction_kl: multiply k3 by the importance ratio, with its gradient (DeepSeek-V3.2).
        temperature: the logits are divided by it. > 0.
        logit_scale: the logits are multiplied by it, before softcap and temperature (Granite, Cohere). Finite, not 0.
        softcap: ``softcap * tanh(logits / softcap)`` (Gemma); None means none. > 0.
        entropy_coef: weight of the entropy bonus, subtracted from the loss.
        top_entropy_quantile: share of tokens, those of highest entropy, that the policy term trains. In [0, 1].
        off_policy_mask_threshold: drop negative-advantage sequences that drifted further from the sampler; None keeps all.
        max_completion_length: the constant divisor of dr_grpo, in tokens. > 0.
        sapo_temperature_pos, sapo_temperature_neg: gate temperatures of sapo. > 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: gamma weights of vespo.

    Raises:
        ValueError: naming the field, what was wanted and what came.
    """

    loss_type: LossType | str = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self):
        self._one_of("loss_type", tuple(TERMS))
        self._one_of("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS)
        self._one_of("kl_estimator", get_args(KLEstimator))
        if not isinstance(self.use_bias_correction_kl, bool):
            raise ValueError(f"use_bias_correction_kl must be True or False, got {self.use_bias_correction_kl!r}")
        self._number("epsilon", lambda x: x >= 0, ">= 0")
        self._number("epsilon_high", lambda x: x >= 0, ">= 0 or None", optional=True)
        self._number("delta", lambda x: x > 0, "> 0 or None", optional=True)
        self._number("temperature", lambda x: x >= _SMALLEST, "> 0")
        self._number("logit_scale", lambda x: x != 0, "a finite number other than 0")
        self._number("softcap", lambda x: x >= _SMALLEST, "> 0 or None", optional=True)
        self._number("top_entropy_quantile", lambda x: 0 <= x <= 1, "in [0, 1]")
        self._number("off_policy_mask_threshold", lambda x: True, "a finite number or None", optional=True)
        self._number("max_completion_length", lambda x: x > 0 and x == int(x), "an integer > 0 or None", optional=True)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            self._number(name, lambda x: x > 0, "> 0")
        for name in ("beta", "entropy_coef", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            self._number(name, lambda x: True, "a finite number")
        if self.aggregation == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(f"max_completion_length must be an integer > 0 for loss_type={self.loss_type!r}, got None")
        cap = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and cap < 1 and not torch.compiler.is_compiling():
            _warn_of_low_cap()

    def _one_of(self, name, allowed):
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            hint = "; GSPO is importance_sampling_level='sequence'" if value == "gspo" else ""
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")

    def _number(self, name, holds, wanted, optional=False):
        value = getattr(self, name)
        if value is None and optional:
            return
        real = isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX
        if not real or not holds(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if type(value) not in (int, float):  # numpy's and others: written down as Python's
            object.__setattr__(self, name, int(value) if isinstance(value, numbers.Integral) else float(value))

    @property
    def upper_epsilon(self) -> float:
        """``epsilon_high``, or ``epsilon`` where it is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def aggregation(self) -> str:
        """The built-in loss_type whose normaliser the loss uses: its own, or that of a registered term."""
        return TERMS[self.loss_type].aggregation

    @property
    def trains_without_advantage(self) -> bool:
        """Whether a token whose advantage is 0 may have a gradient: a KL, an entropy bonus, a registered term."""
        return self.beta != 0 or self.entropy_coef != 0 or TERMS[self.loss_type].registered

    @property
    def exact_kl(self) -> bool:
        """Whether the loss reads the KL from the reference over the whole vocabulary."""
        return self.beta != 0 and self.kl_estimator == "exact"

    @property
    def sequence_level(self) -> bool:
        return self.importance_sampling_level == "sequence"

    @property
    def transform(self) -> "LogitTransform":
        return LogitTransform(float(self.logit_scale), None if self.softcap is None else float(self.softcap),
                              float(self.temperature))


@functools.cache  # once per process
def _warn_of_low_cap():
    package, frame, level = __name__.partition(".")[0], sys._getframe(), 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        "cispo caps the importance ratio at epsilon_high itself, or at epsilon where epsilon_high is not set, as TRL does: here "
        "below the on-policy ratio of 1; the ScaleRL paper takes epsilon_high=5.0",
        stacklevel=level,
    )


class LossOptions(TypedDict, total=False):
    """The fields of `GRPOLossConfig` as keywords."""

    loss_type: LossType | str
    importance_sampling_level: Level
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    use_bias_correction_kl: bool
    temperature: float
    logit_scale: float
    softcap: float | None
    entropy_coef: float
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None
    max_completion_length: int | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    kl_estimator: KLEstimator


LOSS_FIELDS = tuple(field.name for field in dataclasses.fields(GRPOLossConfig))


@dataclass(frozen=True)
class LogitTransform:
    """What stands between the head's product and the softmax: scale, then softcap, then temperature."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
