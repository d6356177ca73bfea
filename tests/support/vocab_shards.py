"""A problem's vocabulary over several gloo processes."""

import functools
import traceback

import torch

from support.problems import Problem
from support.ranks import join, launch, leave

SECONDS = 240  # a rank that waits for another one's collective is killed then
V = 53
SHARDS = {1: (53,), 2: (20, 33), 3: (20, 33, 0), 4: (7, 1, 30, 15)}


def sharded(p: Problem, rank, world) -> Problem:
    """The same call with this rank's rows of the vocabulary."""
    sizes = SHARDS[world]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    parts = {name: None if getattr(p, name) is None else getattr(p, name)[own] for name in ("weight", "bias", "lora_b")}
    return Problem(**{**vars(p), **parts}), own


def together(scenario, world, rank, folder, port):
    join(rank, port, world, SECONDS)
    try:
        torch.save(scenario(rank, world), f"{folder}/{rank}")
    except Exception:
        torch.save(traceback.format_exc(), f"{folder}/{rank}")
        raise
    leave()


def spawn(tmp_path, world, scenario):
    """What each rank's scenario returned."""
    launch(functools.partial(together, scenario, world), str(tmp_path), world, SECONDS)
    return [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(world)]
