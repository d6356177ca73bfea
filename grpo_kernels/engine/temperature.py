"""The gradient of a temperature, from what is known of a row once it is scored. It is applied last, so a softcap changes nothing.

    z = y / T:    d logps / d T = -(logps + entropy) / T    d entropy / d T = Var_p(log p) / T    d lse / d T = (entropy - lse) / T
"""

import torch

from .ops import differentiable_once


def with_temperature_gradient(logps, entropy, temperature, mask, variance=None, lse=None):
    """(logps, entropy, lse) with a path to the temperature, all [..]. ``variance``: of log p; None where entropy needs no path."""
    kept, h = mask.bool(), entropy.detach()
    return (
        _Scaled.apply(logps, temperature, -(logps.detach() + h), kept),
        entropy if variance is None else _Scaled.apply(entropy, temperature, variance, kept),
        None if lse is None else _Scaled.apply(lse, temperature, h - lse.detach(), kept),
    )


class _Scaled(torch.autograd.Function):
    """x, whose derivative by the temperature is slope / temperature where kept."""

    @staticmethod
    def forward(ctx, x, temperature, slope, kept):
        ctx.save_for_backward(temperature, slope, kept)
        return x.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        temperature, slope, kept = ctx.saved_tensors
        # a masked position's temperature may be NaN, and the slope of a token that nobody asks for infinite
        return g, (g * slope / temperature).where(kept & (g != 0), 0.0).to(temperature.dtype), None, None
