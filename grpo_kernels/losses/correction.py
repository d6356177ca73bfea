"""The correction for a sampler whose log-probs are not the trainer's: a weight of the policy term, made of both."""

import math

import torch

from .terms import clamped_exp, mean_per_sequence, sum_per_sequence

_FAR = 1e30  # in place of an infinite log-ratio: a sequence's sum of these is finite in float32


def check_correction(config, importance_sampling_ratio, sampling_logps):
    """``importance_sampling_mode`` makes the one of the other."""
    mode = config.importance_sampling_mode
    if mode is not None and sampling_logps is None:
        raise ValueError(f"sampling_logps must be given with importance_sampling_mode={mode!r}, got None")
    if mode is not None and importance_sampling_ratio is not None:
        raise ValueError(f"importance_sampling_ratio must be None with importance_sampling_mode={mode!r}, got a tensor")


def reads_sampling(config):
    """Whether the loss reads ``sampling_logps``."""
    return config.off_policy_mask_threshold is not None or config.importance_sampling_mode is not None


@torch.no_grad()
def sampler_correction(old, sampling, m, config):
    """The ratio of trainer to sampler as ``importance_sampling_mode`` weighs with it: [B, T], or [B, 1] of a sequence.

    As in TRL, a log-prob of NaN from the sampler, which knows none, counts as a ratio of 1, and one of -inf as an infinite ratio.
    """
    level = config.importance_sampling_mode.partition("_")[0]
    d = (old - sampling).where((m > 0) & ~sampling.isnan(), 0.0).clamp(-_FAR, _FAR)
    if level == "sequence":
        d = sum_per_sequence(d)
    elif level == "geometric":
        d = mean_per_sequence(d, m)
    ratio, (low, high) = clamped_exp(d), config.importance_sampling_range
    if config.importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(low, high)
    outside = (ratio < (0.0 if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)
