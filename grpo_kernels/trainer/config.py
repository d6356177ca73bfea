"""Every option of a run in one dataclass: transformers' own, the loss's, and those of the rollouts.

The loss's fields are taken over from `GRPOLossConfig`, so that an option added there is a flag of the command line here
without being written twice. Names are those of TRL's GRPO trainer.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from ..config import GRPOLossConfig

_LossFields = dataclasses.make_dataclass(
    "_LossFields",
    [
        (f.name, f.type, field(default=f.default, metadata={"help": f"{f.name} of GRPOLossConfig."}))
        for f in dataclasses.fields(GRPOLossConfig)
    ],
)


@dataclass
class GRPOConfig(TrainingArguments, _LossFields):
    """Options of `GRPOTrainer`: those of `transformers.TrainingArguments`, of `GRPOLossConfig`, and the fields below.

    ``per_device_train_batch_size`` counts completions. A rollout of ``generation_batch_size`` completions is sampled at
    once, split into ``steps_per_generation`` micro-batches per device, and trained on ``num_iterations`` times; every
    ``gradient_accumulation_steps`` micro-batches make an optimiser step. ``temperature`` divides the logits in the loss and
    in sampling alike.

    Raises:
        ValueError: naming the field, what was wanted and what came.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimiser steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop every column but the prompt; the reward functions then see none."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens sampled per completion at most; also the divisor of dr_grpo."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt: the group."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation; None means num_generations."}
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Completions per rollout over all devices; excludes steps_per_generation."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches per device and rollout; None means gradient_accumulation_steps."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each rollout (mu)."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 keeps every token."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k most probable tokens; 0 keeps every token."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function; None means 1 each."}
    )
    scale_rewards: str = field(
        default="group", metadata={"help": "Advantages are divided by the std of the 'group', the 'batch', or 'none'."}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "'sum_then_normalize' or 'normalize_then_sum' (GDPO)."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Draw the prompts of an epoch in random order."})
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout probability of the model to 0."})
    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by path (JSON)."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the chat template (JSON)."}
    )

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        self.loss_config()
        for name, least in (("num_generations", 2), ("num_iterations", 1), ("max_completion_length", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        self._size_the_rollout()

    def _size_the_rollout(self):
        accumulation = self.gradient_accumulation_steps
        completions = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation exclude each other, got both")
        if self.generation_batch_size is not None:
            if self.generation_batch_size % completions:
                raise ValueError(
                    f"generation_batch_size must be a multiple of {completions} (per_device_train_batch_size x processes), "
                    f"got {self.generation_batch_size}"
                )
            self.steps_per_generation = self.generation_batch_size // completions
        elif self.steps_per_generation is None:
            self.steps_per_generation = accumulation
        if self.steps_per_generation < 1 or self.steps_per_generation % accumulation:
            raise ValueError(
                f"steps_per_generation must be a multiple of gradient_accumulation_steps ({accumulation}), "
                f"got {self.steps_per_generation}"
            )
        self.generation_batch_size = completions * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations must divide the completions of a rollout ({self.generation_batch_size} = "
                f"per_device_train_batch_size x processes x steps_per_generation), got {self.num_generations}"
            )

    def loss_config(self) -> GRPOLossConfig:
        """The loss's share of the options."""
        return GRPOLossConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GRPOLossConfig)})

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps taken on one rollout."""
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps
