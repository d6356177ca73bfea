"""What the public functions return."""

from typing import NamedTuple

import torch


class LogProbs(NamedTuple):
    """Log-probs of the given tokens and entropies of their distributions, both differentiable; 0 where masked."""

    logps: torch.Tensor
    entropy: torch.Tensor


class GRPOLossOutput(NamedTuple):
    """``loss`` 0-dim, differentiable; ``logps`` and ``entropy`` per token, detached; ``metrics`` name -> 0-dim tensor."""

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    metrics: dict[str, torch.Tensor]
