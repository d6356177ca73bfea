"""Fused GRPO loss: log-probs, ratio, clipping and KL from hidden states and the head's weight, without the logits.

    fused_linear_grpo_loss, FusedLinearGRPOLoss     the loss, as a function and as a module; GRPOLossConfig has its options
    linear_logprobs, linear_logprobs_at             log-probs and entropy of given tokens, of one or several a position
    linear_divergence, topk_divergence              KL or JSD from a teacher's hidden states, or from its top tokens
    fused_linear_distillation_loss                  the weighted mean of such a divergence, in one pass
    TokenSupport                                    the tokens that truncated sampling left
    group_advantages                                rewards compared within the completions of a prompt
    register_policy_term                            a loss of your own by name
    objective, grpo_loss_from_logits                the same loss from log-probs, or from logits that are there already
    reference                                       the same loss in plain PyTorch: what the tests compare with
    available_backends                              which backends work here, and why others do not

`grpo_kernels.integrations` has the adapters to transformers, TRL, liger-kernel, verl and vLLM; `grpo_kernels.trainer` the trainer.

A public name is imported when it is first used, PyTorch with it: the command line answers `--help` without either.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import reference
    from .backends import available_backends
    from .call import GRPOLossOutput, LogProbs, LogProbsAndLse
    from .divergence import DistillationOutput, Divergence, fused_linear_distillation_loss, linear_divergence
    from .from_logits import grpo_loss_from_logits
    from .logprobs import linear_logprobs, linear_logprobs_at
    from .loss import FusedLinearGRPOLoss, fused_linear_grpo_loss
    from .losses.advantages import group_advantages
    from .losses.config import GRPOLossConfig
    from .losses.objective import objective
    from .losses.terms import register_policy_term
    from .support import TokenSupport
    from .topk import topk_divergence

__version__ = "0.1.0"

__all__ = [
    "DistillationOutput",
    "Divergence",
    "FusedLinearGRPOLoss",
    "GRPOLossConfig",
    "GRPOLossOutput",
    "LogProbs",
    "LogProbsAndLse",
    "TokenSupport",
    "available_backends",
    "fused_linear_distillation_loss",
    "fused_linear_grpo_loss",
    "group_advantages",
    "grpo_loss_from_logits",
    "linear_divergence",
    "linear_logprobs",
    "linear_logprobs_at",
    "objective",
    "reference",
    "register_policy_term",
    "topk_divergence",
]

_MODULES = {
    "backends": ("available_backends",),
    "call": ("GRPOLossOutput", "LogProbs", "LogProbsAndLse"),
    "divergence": ("DistillationOutput", "Divergence", "fused_linear_distillation_loss", "linear_divergence"),
    "from_logits": ("grpo_loss_from_logits",),
    "logprobs": ("linear_logprobs", "linear_logprobs_at"),
    "loss": ("FusedLinearGRPOLoss", "fused_linear_grpo_loss"),
    "losses.advantages": ("group_advantages",),
    "losses.config": ("GRPOLossConfig",),
    "losses.objective": ("objective",),
    "losses.terms": ("register_policy_term",),
    "support": ("TokenSupport",),
    "topk": ("topk_divergence",),
}
_SUBMODULES = ("backends", "build_cuda", "call", "devices", "distributed", "divergence", "engine", "from_logits", "logprobs",
               "loss", "losses", "reference", "support", "teacher", "topk")  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # to whom it would say that every name exists

    def __getattr__(name):
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return value


def __dir__():
    return sorted({*globals(), *__all__, *_SUBMODULES})
