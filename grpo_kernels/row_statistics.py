"""From the running statistics of a row of logits to its log-prob, log-sum-exp and entropy."""

import torch


def finalize(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[R, 4] statistics -> (logps, lse, entropy), [R] each.

    logps = -softplus(log(sum of the others) + max - target's logit): near p = 1 the difference target - lse would cancel.
    """
    peak, others, weighted, target = stats.unbind(1)
    margin = peak + others.log() - target
    logps = -(margin.clamp(min=0) + torch.log1p(torch.exp(-margin.abs())))
    total = others + torch.exp(target - peak)
    lse = peak + total.log()
    return logps, lse, total.log() - weighted / total
