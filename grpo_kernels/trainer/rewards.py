"""Reward functions: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, None = not scorable."""

import importlib
import math
import os
import sys

import torch

RESERVED = ("prompts", "completions", "completion_ids")


def exact_match(completions, answer, **_):
    """1.0 where the completion is the dataset's ``answer``, spaces around it aside; else 0.0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def text_of(completion) -> str:
    """The text of a completion: itself, or the content of the messages that a conversational prompt is answered with."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def load_reward(spec: str):
    """The function named ``package.module:function``; the working directory is searched too.

    Raises:
        ValueError: naming the spec and what is wrong with it.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"reward must be named package.module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {spec!r}: cannot import {module_name!r} ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        wrong = "has no" if function is None else "holds something that cannot be called under"
        raise ValueError(f"reward {spec!r}: module {module_name!r} {wrong} {name!r}")
    return function


def reward_names(functions) -> list[str]:
    """One name per function for the metrics; a repeated name is numbered."""
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def score(functions, prompts, completions, completion_ids, columns) -> torch.Tensor:
    """Rewards [B, K] float32 of B completions under K functions; nan where a function answered None.

    Raises:
        ValueError: naming the function, when its answer is not one finite number or None per completion.
    """
    for name in RESERVED:
        if name in columns:
            raise ValueError(f"dataset column {name!r} collides with an argument of the reward functions; rename it")
    rewards = []
    for function, name in zip(functions, reward_names(functions), strict=True):
        answer = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        answer = answer.tolist() if isinstance(answer, torch.Tensor) else answer
        try:
            values = [math.nan if value is None else float(value) for value in answer]
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {name!r} must return a list of numbers or None, got {answer!r}") from error
        if len(values) != len(completions) or any(map(math.isinf, values)):
            raise ValueError(
                f"reward {name!r} must return one finite number or None for each of {len(completions)} completions, "
                f"got {len(values)}: {values[:8]}"
            )
        rewards.append(torch.tensor(values, dtype=torch.float32))
    return torch.stack(rewards, dim=1)


def reward_metrics(rewards, group_ids, weights, names) -> dict[str, torch.Tensor]:
    """Statistics over the scorable completions, by TRL's names; nan where there are too few.

    Args:
        rewards: [B, K]; group_ids: [B], 0..groups-1; weights: [K] or None; names: K names of the reward functions.
    """
    metrics = {}
    for name, column in zip(names, rewards.unbind(1), strict=True):
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = column.nanmean(), _nanstd(column)
    total = (rewards if weights is None else rewards * weights).nansum(1)
    total = total.masked_fill(rewards.isnan().all(1), math.nan)
    flat = [_is_flat(total[group_ids == group]) for group in range(int(group_ids.max()) + 1)]
    return metrics | {
        "reward": total.nanmean(),
        "reward_std": _nanstd(total),
        "frac_reward_zero_std": torch.tensor(flat, dtype=torch.float32, device=rewards.device).mean(),
    }


def _nanstd(values):
    return values[~values.isnan()].std() if (~values.isnan()).sum() > 1 else values.new_tensor(math.nan)


def _is_flat(values):
    values = values[~values.isnan()]
    return len(values) == 0 or bool(values.max() == values.min())
