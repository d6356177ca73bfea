"""The second head of a call: a teacher's, or that of the reference policy, as its caller gave it, and checked."""

import numbers
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from .backends.comparison import DivergenceKind
from .checks import FLOAT_DTYPES, check_shape, check_tensor, kind
from .distributed import of_dtensors
from .engine.operands import Teacher
from .losses.config import GRPOLossConfig, LogitTransform

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class TeacherArguments:
    """hidden [.., D'], weight [V, D'], bias [V] or None, which are called ``<name>_hidden`` and so on; constants of the call."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    divergence: DivergenceKind | None = None
    transform: LogitTransform | None = None
    name: str = "teacher"

    @staticmethod
    def of_reference(config, hidden, weight, bias):
        """The reference policy of an exact KL, with the transform of the policy; None where the loss has no such term."""
        if not isinstance(config, GRPOLossConfig) or not config.exact_kl:
            return None
        return TeacherArguments(hidden, weight, bias, DivergenceKind("reverse_kl"), config.transform, "ref")

    def constants(self):
        """Detached, so that what trains them elsewhere does not matter here."""
        tensors = (x.detach() if isinstance(x, torch.Tensor) else x for x in (self.hidden, self.weight, self.bias))
        hidden, weight, bias = tensors
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def of_rank(self, group):
        """With DTensors as this rank's part."""
        if not isinstance(self.weight, torch.Tensor):
            return self
        hidden, weight, bias, _ = of_dtensors(self.hidden, self.weight, self.bias, None, group)
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def checked(self, tokens, vocab, device):
        """Beside a student of these tokens and so many rows of the vocabulary; cast once under autocast."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        for name, x in ((f"{self.name}_hidden", hidden), (f"{self.name}_weight", weight)):
            if x is None and self.name == "ref":
                raise ValueError(f"{name} must be given with kl_estimator='exact' and beta != 0 (ref_logps are for 'k3'), got None")
            check_tensor(name, x, device, FLOAT_DTYPES)
        depth = hidden.shape[-1] if hidden.dim() else 0
        if hidden.dim() < 1 or hidden.shape[:-1] != tokens or depth < 1:
            wanted = ", ".join(map(str, (*tokens, "D'")))
            raise ValueError(f"{self.name}_hidden must be [.., D'] = [{wanted}], got {list(hidden.shape)}")
        if weight.dim() != 2 or weight.shape != (vocab, depth):
            why = f"; V is the student's vocabulary, D' the depth of {self.name}_hidden"
            raise ValueError(f"{self.name}_weight must be [V, D'] = [{vocab}, {depth}], got {list(weight.shape)}{why}")
        if bias is not None:
            check_tensor(f"{self.name}_bias", bias, device, FLOAT_DTYPES)
            check_shape(f"{self.name}_bias", bias, (vocab,))
        if torch.is_autocast_enabled(device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if weight.dtype != hidden.dtype:
            raise TypeError(f"{self.name}_weight must be {hidden.dtype} as {self.name}_hidden is, got {weight.dtype}")
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def facts(self):
        """What must be the same on all ranks of a vocab_parallel_group."""
        return repr((list(self.hidden.shape), str(self.hidden.dtype), self.bias is not None, self.divergence, self.transform))

    def rows(self, mask=None):
        """What the engine is handed; ``mask``: rows of others may hold anything, and are computed too."""
        hidden = self.hidden if mask is None else self.hidden.where(mask.bool().unsqueeze(-1), 0.0)
        return Teacher(hidden.reshape(-1, hidden.shape[-1]).contiguous(), self.weight, self.bias)


def divergence_of(which, beta):
    """A checked `DivergenceKind`; the ends of jsd are the KLs, which read no beta."""
    if not isinstance(which, str):
        raise TypeError(f"kind must be a string, got {kind(which)}")
    if which not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {which!r}")
    if which != "jsd":
        return DivergenceKind(which)
    if not isinstance(beta, numbers.Real) or isinstance(beta, bool):
        raise TypeError(f"beta must be a number in [0, 1], got {kind(beta)}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    ends = {0: "forward_kl", 1: "reverse_kl"}
    return DivergenceKind(ends[beta]) if beta in ends else DivergenceKind(which, float(beta))


def transform_of(temperature, logit_scale, softcap):
    """The teacher's, whose options are called teacher_logit_scale and teacher_softcap."""
    try:
        return GRPOLossConfig(temperature=temperature, logit_scale=logit_scale, softcap=softcap).transform
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith("temperature") else f"teacher_{message}") from None
