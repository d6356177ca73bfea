"""Fused GRPO loss: log-probs, ratio, clipping and KL from hidden states and the head's weight, without the logits."""

from . import reference
from .backends import available_backends
from .call import GRPOLossOutput, LogProbs, LogProbsAndLse
from .from_logits import grpo_loss_from_logits
from .logprobs import linear_logprobs
from .loss import FusedLinearGRPOLoss, fused_linear_grpo_loss
from .losses.advantages import group_advantages
from .losses.config import GRPOLossConfig
from .losses.objective import objective
from .losses.terms import register_policy_term

__version__ = "0.1.0"

__all__ = [
    "FusedLinearGRPOLoss",
    "GRPOLossConfig",
    "GRPOLossOutput",
    "LogProbs",
    "LogProbsAndLse",
    "available_backends",
    "fused_linear_grpo_loss",
    "group_advantages",
    "grpo_loss_from_logits",
    "linear_logprobs",
    "objective",
    "reference",
    "register_policy_term",
]
