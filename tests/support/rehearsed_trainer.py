"""A trainer whose completions are given, by rollout and row, so that several processes do what one does."""

import functools
import os
import random

import torch
from accelerate import state
from accelerate.utils import FullyShardedDataParallelPlugin

from grpo_kernels.trainer import GRPOTrainer
from grpo_kernels.trainer import trainer as module
from grpo_kernels.trainer.rollout import Completions

LENGTH = 5


class Rehearsed(GRPOTrainer):
    """A trainer that is given its completions: by rollout and row, in evaluation by prompt. ``masked`` empties these rows of 8."""

    masked, longest, prompts = (), None, ()

    def _sample_and_score(self, rows, mode, **keywords):
        numbers = self._layout()[self.args.process_index].tolist() if mode == "train" else range(len(rows))
        index = self.state.global_step // self.args.steps_per_rollout
        if mode == "train":  # the prompts are those that one process would have sampled for
            groups = self.args.generation_batch_size // self.args.num_generations
            assert rows == [self._nth_row(index * groups + n // self.args.num_generations) for n in numbers]
        keys = [(index, n) if mode == "train" else (row["prompt"], n % 2) for n, row in zip(numbers, rows, strict=True)]
        kept = [mode != "train" or n % 8 not in self.masked for n in numbers]
        module.sample = functools.partial(rehearsed, keys, kept, self.longest)
        return super()._sample_and_score(rows, mode, **keywords)


def rehearsed(keys, kept, longest, model, prompt_ids, config, synced_gpus=False, continuous=None):
    completions = []
    for key in keys:
        dice = random.Random(repr(key))
        completions.append([dice.randrange(2, 14) for _ in range(dice.randint(0, LENGTH))] + [1])
    T, P = min(max(map(len, completions)), LENGTH), max(map(len, prompt_ids))
    mask = torch.tensor([[keep and t < len(ids[:longest]) for t in range(T)] for ids, keep in zip(completions, kept, strict=True)])
    ids = torch.tensor([[0] * (P - len(p)) + p + (c + [0] * T)[:T] for p, c in zip(prompt_ids, completions, strict=True)])
    prompts = torch.tensor([[t >= P - len(p) for t in range(P)] for p in prompt_ids])
    ended = torch.tensor([len(c) <= T for c in completions])
    return Completions(ids, torch.cat([prompts, mask], 1).long(), mask, ended)


def letters(completions, answer, **_):
    """Differs between completions of a group; not for all to score."""
    scores = [sum(ord(c) for c in text + a) % 7 / 7 for text, a in zip(completions, answer, strict=True)]
    return [None if score == 0 else score for score in scores]


def use_fsdp():
    """From here on accelerate shards. It refuses that to a CPU alone (MULTI_CPU in AcceleratorState), so ours has another name."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                      FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", FSDP_RESHARD_AFTER_FORWARD="true",
                      FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", ACCELERATE_TORCH_DEVICE="cpu")  # fmt: skip
    state.PartialState._prepare_backend = lambda self, *args: ("gloo", state.DistributedType.MULTI_XPU)
    assert FullyShardedDataParallelPlugin().fsdp_version == 2
