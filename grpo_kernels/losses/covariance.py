"""Losses that mark tokens by what all of a call are like: the covariance of log-prob and advantage.

clip_cov cuts the gradient of some tokens of high covariance, kl_cov penalises the log-ratio of the highest: both keep the entropy
from collapsing (Cui et al. 2025, arXiv 2505.22617). Which tokens those are takes means over all, so both losses take two phases.
verl draws clip_cov's at random. Here a hash of the call's own numbers orders them: the same call marks the same tokens, run after
run and on all ranks of a sharded vocabulary, and no generator is touched.
"""

import math

import torch

from .terms import clamped_exp


def call_sums(logps, t):
    """[3] sums over kept tokens: of log-probs, of advantages, and how many there are. Those of several ranks add up."""
    return torch.stack([(x * t.mask).sum() for x in (logps, t.advantages, torch.ones_like(t.mask))])


def marking_order(logps, t, sums, config, rank=0):
    """[B, T]: a call marks the tokens that come lowest, and none that is infinite. ``sums``: the call's `call_sums`."""
    m, A = t.mask, t.advantages
    mean_logps, mean_A, _ = (sums / sums[2].clamp(min=1)).unbind()
    covariance = (A - mean_A) * (logps - mean_logps)
    if config.loss_type == "kl_cov":
        return (-covariance).where(m > 0, math.inf)
    w = clamped_exp(torch.zeros_like(logps) if t.old is None else logps - t.old)
    clipped = w.clamp(1 - config.epsilon, 1 + config.upper_epsilon) * A < w * A
    between = (covariance > config.clip_cov_lb) & (covariance < config.clip_cov_ub)
    # on-policy a place and an advantage alone would mark the same places call after call; rounded, so that backends agree
    own = (16 * logps).round() + 0.0 if t.old is None else t.old
    return _scrambled(m, A, own, rank).where((m > 0) & ~clipped & between, math.inf)


def marked_count(tokens, config):
    """0-dim: how many of so many tokens are marked."""
    share = config.clip_cov_ratio if config.loss_type == "clip_cov" else config.kl_cov_ratio
    return (tokens.double() * share).floor().clamp(min=1)


def lowest(order, count):
    """[N] bool: the ``count`` lowest of ``order`` [N], the first ones of equal ones, and none that is infinite. Nothing syncs."""
    index = order.argsort(stable=True)
    place = torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))
    return (place < count) & (order < math.inf)


@torch.no_grad()
def marked_tokens(logps, t, config):
    """[B, T] bool: the tokens that clip_cov cuts, or kl_cov penalises, of log-probs and `TokenInputs`."""
    sums = call_sums(logps, t)
    return lowest(marking_order(logps, t, sums, config).flatten(), marked_count(sums[2], config)).view_as(t.mask)


def _scrambled(m, A, logps, rank):
    """[B, T] float64 numbers in [0, 1) without a pattern, made of place, advantage, log-prob and rank."""
    b, column = (torch.arange(n, device=m.device) for n in m.shape)
    x = b.unsqueeze(1) * 0x9E3779B1 + column + rank * 0x85EBCA6B
    for value in (A, logps):
        x = _mixed(x ^ value.double().contiguous().view(torch.int64))
    return (x & 0xFFFFFF).double() / 0x1000000


def _mixed(x):
    """splitmix64's finaliser: int64 products wrap, and what a shift drags in of the sign is masked off."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
