"""The options of the loss: one frozen dataclass, validated when it is made, named as in TRL's GRPO trainer."""

import dataclasses
import difflib
import functools
import numbers
import sys
import warnings
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch

from .terms import AGGREGATIONS, BUILT_IN, TERMS

LossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo",
    "vanilla", "gspo", "geo_mean", "dppo_tv", "dppo_kl", "gpg", "dro", "clip_cov", "kl_cov",
]  # fmt: skip
Level = Literal["token", "sequence"]
KLEstimator = Literal["k3", "exact"]
SamplingMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask", "icepop",
]  # fmt: skip

LOSS_TYPES = BUILT_IN
TRL_LOSS_TYPES = AGGREGATIONS
IMPORTANCE_SAMPLING_MODES = get_args(SamplingMode)
DIVIDED_BY_ITEMS = ("dapo", "cispo", "vespo")  # aggregations whose divisor is num_items
IMPORTANCE_SAMPLING_LEVELS = get_args(Level)
_FLOAT32_MAX = 3.4e38  # options are float32 numbers in the kernels
_DELTAS = {"vanilla": 3.0, "dppo_tv": 20.0, "dppo_kl": 20.0}  # where delta is None: verl's clip_ratio_c of these losses
_ICEPOP_MINIMUM = 0.5
_KNOWN_AS = {"gmpo": "geo_mean", "dppo": "dppo_tv", "ppo": "vanilla", "reinforce": "gpg"}  # what papers call a loss_type
_SMALLEST = 1e-30  # a divisor below would overflow finite logits


@dataclass(frozen=True)
class GRPOLossConfig:
    """Options of the GRPO loss family; an option that a ``loss_type`` does not use is ignored.

    Args:
        loss_type: which policy term and reduction: TRL's grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo; verl's vanilla,
            gspo, geo_mean (GMPO), dppo_tv, dppo_kl, gpg, dro, clip_cov, kl_cov; or a name given to `register_policy_term`.
        importance_sampling_level: ratio per ``"token"``, or one per ``"sequence"`` (GSPO). Of verl's losses none reads it.
        epsilon: lower clip range; the ratio is clipped at ``1 - epsilon``, for geo_mean the log-ratio at ``-epsilon``. For dppo_tv
            and dppo_kl how far the probability of a token with a negative advantage may have moved. >= 0.
        epsilon_high: upper clip range, ``1 + epsilon_high``; None means ``epsilon``. For cispo it is the cap itself
            (5.0 in the ScaleRL paper); a cap below 1 is warned of, once. >= 0.
        delta: upper bound of the unclipped ratio (two-sided clipping); None means no bound. For vanilla, dppo_tv and dppo_kl it is
            verl's ``clip_ratio_c``, and None means 3, 20 and 20. gspo and clip_cov ignore it. > 0.
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
        dro_beta: weight of dro's squared log-ratio; dro needs it. > 0.
        clip_cov_ratio: share of a call's tokens (of a micro-batch) whose gradient clip_cov cuts, one token at least. In (0, 1].
        clip_cov_lb, clip_cov_ub: it cuts among tokens whose covariance of log-prob and advantage lies between these. lb < ub.
        kl_cov_ratio: share of a call's tokens, those of highest covariance, that kl_cov penalises, one token at least. In (0, 1].
        ppo_kl_coef: weight of that penalty, the absolute log-ratio.
        importance_sampling_mode: the correction for a sampler with other log-probs than the trainer's: token_truncate, token_mask,
            sequence_truncate, sequence_mask, geometric_truncate, geometric_mask or icepop. The policy term is weighted by
            ``exp(old_logps - sampling_logps)`` per token, its product over a sequence or its geometric mean; truncate cuts the
            weight to the range below, mask makes it 0 outside. icepop is token_mask with a minimum of 0.5 where none is set.
            None: no correction but a given ``importance_sampling_ratio``.
        importance_sampling_clip_min, importance_sampling_clip_max: the range of that ratio; None means no bound. >= 0.

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
    dro_beta: float | None = None
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1
    importance_sampling_mode: SamplingMode | None = None
    importance_sampling_clip_min: float | None = None
    importance_sampling_clip_max: float | None = 3.0

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
        self._number("dro_beta", lambda x: x > 0, "> 0 or None", optional=True)
        for name in ("clip_cov_ratio", "kl_cov_ratio"):
            self._number(name, lambda x: 0 < x <= 1, "in (0, 1]")
        for name in ("clip_cov_lb", "clip_cov_ub", "ppo_kl_coef"):
            self._number(name, lambda x: True, "a finite number")
        if self.loss_type == "clip_cov" and self.clip_cov_lb >= self.clip_cov_ub:  # nothing would ever be cut
            raise ValueError(f"clip_cov_lb must be below clip_cov_ub, {self.clip_cov_ub!r}, got {self.clip_cov_lb!r}")
        self._check_correction()
        if self.loss_type == "dro" and self.dro_beta is None:
            raise ValueError("dro_beta must be > 0 for loss_type='dro', got None")
        if self.aggregation == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(f"max_completion_length must be an integer > 0 for loss_type={self.loss_type!r}, got None")
        cap = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and cap < 1 and not torch.compiler.is_compiling():
            _warn_of_low_cap()

    def _check_correction(self):
        if self.importance_sampling_mode is not None:
            self._one_of("importance_sampling_mode", IMPORTANCE_SAMPLING_MODES, "None or ")
        for name in ("importance_sampling_clip_min", "importance_sampling_clip_max"):
            self._number(name, lambda x: x >= 0, ">= 0 or None", optional=True)
        low, high = self.importance_sampling_range
        if self.importance_sampling_mode is not None and low is not None and high is not None and low >= high:
            came = f"{low!r}" if self.importance_sampling_clip_min is not None else f"icepop's own {low!r}"
            raise ValueError(f"importance_sampling_clip_min must be below importance_sampling_clip_max, {high!r}, got {came}")
        if self.importance_sampling_mode is not None and low is None and high is None:
            raise ValueError("importance_sampling_clip_max must be a number without importance_sampling_clip_min, got None for "
                             f"importance_sampling_mode={self.importance_sampling_mode!r}")  # fmt: skip

    def _one_of(self, name, allowed, also=""):
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            close = difflib.get_close_matches(str(value).lower(), [*allowed, *(_KNOWN_AS if name == "loss_type" else ())], 1)
            meant = f"; did you mean {_KNOWN_AS.get(close[0], close[0])!r}?" if close else ""
            raise ValueError(f"{name} must be {also}one of {', '.join(allowed)}, got {value!r}{meant}")

    def _number(self, name, holds, wanted, optional=False):
        value = getattr(self, name)
        if value is None and optional:
            return
        real = isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX
        if not real and not wanted.startswith("a"):
            wanted = f"a finite number {wanted}"
        if not real or not holds(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if type(value) not in (int, float):  # numpy's and others: written down as Python's
            object.__setattr__(self, name, int(value) if isinstance(value, numbers.Integral) else float(value))

    @property
    def upper_epsilon(self) -> float:
        """``epsilon_high``, or ``epsilon`` where it is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def ratio_bound(self) -> float | None:
        """``delta`` as the loss_type takes it: its own default where that is None, and None where it has no such bound."""
        if self.loss_type in ("gspo", "clip_cov"):
            return None
        return _DELTAS.get(self.loss_type) if self.delta is None else self.delta

    @property
    def importance_sampling_range(self) -> tuple[float | None, float | None]:
        """Lowest and highest ratio of trainer to sampler, of `importance_sampling_mode`."""
        low = self.importance_sampling_clip_min
        low = _ICEPOP_MINIMUM if low is None and self.importance_sampling_mode == "icepop" else low
        return low, self.importance_sampling_clip_max

    @property
    def aggregation(self) -> str:
        """The built-in loss_type whose normaliser the loss uses: its own, or that of a registered term."""
        return TERMS[self.loss_type].aggregation

    @property
    def trains_without_advantage(self) -> bool:
        """Whether a token whose advantage is 0 may have a gradient, or a say in another's: by KL, entropy bonus or policy term."""
        term = TERMS[self.loss_type]
        return self.beta != 0 or self.entropy_coef != 0 or term.trains_at_zero or term.scope == "call"

    @property
    def exact_kl(self) -> bool:
        """Whether the loss reads the KL from the reference over the whole vocabulary."""
        return self.beta != 0 and self.kl_estimator == "exact"

    @property
    def sequence_level(self) -> bool:
        """Whether the ratio is one per sequence by `importance_sampling_level`, which verl's losses do not read."""
        return self.importance_sampling_level == "sequence" and TERMS[self.loss_type].has_levels

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
    dro_beta: float | None
    clip_cov_ratio: float
    clip_cov_lb: float
    clip_cov_ub: float
    kl_cov_ratio: float
    ppo_kl_coef: float
    importance_sampling_mode: SamplingMode | None
    importance_sampling_clip_min: float | None
    importance_sampling_clip_max: float | None


LOSS_FIELDS = tuple(field.name for field in dataclasses.fields(GRPOLossConfig))


@dataclass(frozen=True)
class LogitTransform:
    """What stands between the head's product and the softmax: scale, then softcap, then temperature."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
