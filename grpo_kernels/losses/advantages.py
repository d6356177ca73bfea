"""Group-relative advantages: rewards compared within the completions of one prompt."""

import torch

SCALE_REWARDS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
_EPSILON = 1e-4


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    scale_rewards: str = "group",
    weights: torch.Tensor | None = None,
    aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """Advantage of each completion over the other completions of its prompt.

    Equals ``(r - r[group].mean()) / (r[group].std() + 1e-4)`` for each row (``scale_rewards="group"``).

    Args:
        rewards: [B] or, for several reward functions, [B, K]; float; nan = not scorable, ignored in every statistic.
        group_ids: [B] integers naming the prompt of each row; rows may come in any order.
        scale_rewards: ``"group"`` divides by the group's standard deviation, ``"batch"`` by that of the whole batch,
            ``"none"`` (or False) only centres. Standard deviations are unbiased (ddof = 1).
        weights: [K] weights of the reward functions; None means 1 each.
        aggregation: ``"sum_then_normalize"``, or ``"normalize_then_sum"`` (GDPO: each reward function is normalised
            within its group, the weighted sum over the batch; ``scale_rewards`` is then ignored).

    Returns:
        [B] advantages in the rewards' dtype (float32 for integers). Exactly 0 for a group without spread, a group with a
        single scorable completion, and a completion that is not scorable. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Shao et al. 2024 (GRPO), Liu et al. 2025 (Dr. GRPO, "none"), GDPO 2026 ("normalize_then_sum").
    """
    rewards, group_ids, weights, scale_rewards = _checked(rewards, group_ids, scale_rewards, weights, aggregation)
    members = torch.unique(group_ids, return_inverse=True)[1]
    if aggregation == "sum_then_normalize":
        return _normalized(_weighted_sum(rewards, weights), members, scale_rewards)
    each = torch.stack([_normalized(column, members, "group") for column in rewards.unbind(1)], dim=1)
    total = _weighted_sum(each.masked_fill(rewards.isnan(), float("nan")), weights)
    # the batch mean of centred columns is 0 but for rounding, which must not reach rows that learned nothing
    return _normalized(total, torch.zeros_like(members), "group").masked_fill(total == 0, 0.0)


def _weighted_sum(rewards, weights):
    """[B, K] -> [B]; nan entries are skipped, a row of only nan stays nan."""
    scorable = ~rewards.isnan()
    total = (rewards.nan_to_num(nan=0.0) * weights).where(scorable, 0.0).sum(1)
    return total.masked_fill(~scorable.any(1), float("nan"))


def _normalized(rewards, members, scale_rewards):
    scorable = ~rewards.isnan()
    values = rewards.where(scorable, 0.0)
    groups = int(members.max()) + 1 if members.numel() else 1
    membership = torch.nn.functional.one_hot(members, groups).to(rewards.dtype) * scorable.unsqueeze(1)
    count = membership.sum(0)
    mean = (membership * values.unsqueeze(1)).sum(0) / count.clamp(min=1)
    centred = (values - mean[members]).where(scorable, 0.0)
    infinity = torch.full_like(mean, float("inf"))
    highest = (-infinity).scatter_reduce(0, members, rewards.where(scorable, -float("inf")), "amax")
    lowest = infinity.scatter_reduce(0, members, rewards.where(scorable, float("inf")), "amin")
    # decided on the rewards themselves: the rounding of the mean must not turn equal rewards into advantages
    flat = (count < 2) | (highest == lowest)
    centred = centred.masked_fill(flat[members], 0.0)
    if scale_rewards == "none":
        return centred
    if scale_rewards == "group":
        squares = (membership * centred.square().unsqueeze(1)).sum(0)
        spread = (squares / (count - 1).clamp(min=1)).sqrt()[members]
    else:
        scored = rewards[scorable]
        spread = scored.std() if scored.numel() > 1 else scored.new_zeros(())
    return centred / (spread + _EPSILON)


def _checked(rewards, group_ids, scale_rewards, weights, aggregation):
    if not isinstance(rewards, torch.Tensor) or rewards.is_complex() or rewards.dtype == torch.bool:
        raise TypeError(f"rewards must be a real tensor, got {_kind(rewards)}")
    if not isinstance(group_ids, torch.Tensor) or group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids must be an integer tensor, got {_kind(group_ids)}")
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards must be [B] or [B, K], got {list(rewards.shape)}")
    if group_ids.shape != rewards.shape[:1]:
        raise ValueError(f"group_ids must be [{rewards.shape[0]}], got {list(group_ids.shape)}")
    if group_ids.device != rewards.device:
        raise ValueError(f"group_ids must be on {rewards.device} as rewards, got {group_ids.device}")
    if scale_rewards is False or scale_rewards is True:
        scale_rewards = "group" if scale_rewards else "none"
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards must be one of {', '.join(SCALE_REWARDS)}, got {scale_rewards!r}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    rewards = rewards.detach()
    if rewards.dtype not in (torch.float32, torch.float64):
        rewards = rewards.float()
    if rewards.isinf().any():
        raise ValueError("rewards must be finite or nan, got inf")
    rewards = rewards.unsqueeze(1) if rewards.dim() == 1 else rewards
    if weights is None:
        weights = torch.ones(rewards.shape[1])
    if not isinstance(weights, (torch.Tensor, list, tuple)):
        raise TypeError(f"weights must be a tensor or a list of numbers, got {_kind(weights)}")
    weights = torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)
    if weights.shape != rewards.shape[1:]:
        raise ValueError(f"weights must be [{rewards.shape[1]}], one per reward function, got {list(weights.shape)}")
    if not weights.isfinite().all():
        raise ValueError(f"weights must be finite, got {weights.tolist()}")
    return rewards, group_ids, weights, scale_rewards


def _kind(value):
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
