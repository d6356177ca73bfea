"""Every option of a run in one dataclass: transformers' own, the loss's, and those of the rollouts.

The loss's fields are taken over from `GRPOLossConfig`, so that an option added there is a flag of the command line here
without being written twice. Names are those of TRL's GRPO trainer.
"""

import dataclasses
import importlib.util
import inspect
import json
import math
import operator
import os
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..checks import check_options
from ..integrations.sampling_mask import filled_in, truncations
from ..losses.advantages import AGGREGATIONS, SCALE_REWARDS
from ..losses.config import GRPOLossConfig
from .adaptive_entropy import EntropyOptions, check_entropy_options
from .server_options import ServerOptions, check_server_options

# of GenerationConfig: what else has an option of its own, or would change what a rollout is
_OURS = {
    "temperature", "max_new_tokens", "max_length", "do_sample", "num_return_sequences", "num_beams", "eos_token_id", "pad_token_id",
    "return_dict_in_generate", "output_scores", "output_logits", "use_cache",
}  # fmt: skip

_JSON = (
    "model_init_kwargs", "chat_template_kwargs", "generation_kwargs", "transformers_continuous_batching_config",
    "rollout_server_kwargs",
)  # fmt: skip

# of TrainingArguments: without a meaning for rollouts
NOT_OURS = ("auto_find_batch_size", "include_num_input_tokens_seen", "label_smoothing_factor")

_WANTED = {
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": (lambda x: x is None or 0 <= x <= 1, "None or in [0, 1]"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a number > 0"),
    "ref_model_mixup_alpha": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "num_completions_to_print": (lambda x: x is None or x >= 0, "None or >= 0"),
    "num_generations_eval": (lambda x: x is None or x >= 1, "None or >= 1"),
    "keep_sampling_mask": (lambda x: x is None or isinstance(x, bool), "True, False or None"),
    "scale_rewards": (lambda x: x in SCALE_REWARDS, f"one of {', '.join(SCALE_REWARDS)}"),
    "multi_objective_aggregation": (lambda x: x in AGGREGATIONS, f"one of {', '.join(AGGREGATIONS)}"),
}


def option(default, text):
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": text})


def _documented(cls):
    """What the section Args of a docstring says of each name, in one line."""
    section = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", section, re.M)
    return {name: " ".join(text.replace("``", "").split()) for names, text in entries for name in names.split(", ")}


_HELP = _documented(GRPOLossConfig)
_LossFields = dataclasses.make_dataclass(
    "_LossFields",
    [
        (f.name, kind, option(f.default, _HELP.get(f.name, "").replace("%", "%%")))
        for f in dataclasses.fields(GRPOLossConfig)
        for kind in [str if "Literal" in str(f.type) else f.type]  # a Literal's flag would refuse the names of registered losses
    ],
)


@dataclass
class GRPOConfig(TrainingArguments, _LossFields, ServerOptions, EntropyOptions):
    """Options of `GRPOTrainer`: transformers' `TrainingArguments`, those of `GRPOLossConfig`, `ServerOptions` and `EntropyOptions`,
    and these fields.

    ``per_device_train_batch_size`` counts completions. A rollout of ``generation_batch_size`` completions is sampled at
    once, split into ``steps_per_generation`` micro-batches per device, and trained on ``num_iterations`` times; every
    ``gradient_accumulation_steps`` micro-batches make an optimiser step. ``temperature`` divides the logits in the loss and
    in sampling alike.

    Raises:
        ValueError: naming the field, what was wanted and what came.
    """

    learning_rate: float = option(1e-6, "Peak learning rate.")
    logging_steps: float = option(10, "Log every so many optimiser steps.")
    remove_unused_columns: bool = option(False, "Drop every column but the prompt; the reward functions then see none.")
    max_completion_length: int = option(256, "Tokens sampled per completion at most; also the divisor of dr_grpo.")
    num_generations: int = option(8, "Completions per prompt: the group.")
    num_generations_eval: int | None = option(None, "Completions per prompt in evaluation; None means num_generations.")
    generation_batch_size: int | None = option(None, "Completions per rollout over all devices; excludes steps_per_generation.")
    steps_per_generation: int | None = option(None, "Micro-batches per device and rollout; None means gradient_accumulation_steps.")
    num_iterations: int = option(1, "Passes over each rollout (mu).")
    top_p: float = option(1.0, "Nucleus sampling; 1 keeps every token.")
    top_k: int = option(0, "Sample among the k most probable tokens; 0 keeps every token.")
    min_p: float | None = option(None, "Sample only tokens at least this share as probable as the best; None keeps every token.")
    repetition_penalty: float = option(1.0, "Divides the positive logits of tokens already written; 1 is no penalty.")
    keep_sampling_mask: bool | None = option(
        None, "Take log-probs, entropy, ratio and KL over the tokens that truncated sampling left; None: where it truncates."
    )
    generation_kwargs: dict | str | None = option(
        None, "Further options of transformers' GenerationConfig (JSON); they win over those above."
    )
    use_transformers_continuous_batching: bool = option(
        False, "Sample with transformers' generate_batch: finished completions make room for others."
    )
    transformers_continuous_batching_config: dict | str | None = option(
        None, "Options of transformers' ContinuousBatchingConfig (JSON): blocks of the cache and such."
    )
    mask_truncated_completions: bool = option(False, "Completions that hit max_completion_length without an EOS train nothing.")
    reward_weights: list[float] | None = option(None, "One weight per reward function; None means 1 each.")
    scale_rewards: str = option("group", "Advantages are divided by the std of the 'group', the 'batch', or 'none'.")
    multi_objective_aggregation: str = option("sum_then_normalize", "'sum_then_normalize' or 'normalize_then_sum' (GDPO).")
    shuffle_dataset: bool = option(True, "Draw the prompts of an epoch in random order.")
    skip_untrained: bool = option(True, "Leave out of the model what cannot change a weight: the same gradients, sooner.")
    padding_free: bool | None = option(None, "Run the model on one row without padding; None: where its attention is a flash one.")
    sync_ref_model: bool = option(False, "Move the reference towards the policy now and then (beta > 0).")
    ref_model_mixup_alpha: float = option(0.6, "reference = alpha x policy + (1 - alpha) x reference at each synchronisation.")
    ref_model_sync_steps: int = option(512, "Optimiser steps between two synchronisations.")
    log_completions: bool = option(False, "At every log: a table of completions on the terminal, all of them in a parquet file.")
    num_completions_to_print: int | None = option(8, "Rows of that table; None is all of them.")
    trust_remote_code: bool = option(False, "Run Python code that comes with a model or tokenizer. It can do whatever you can.")
    disable_dropout: bool = option(False, "Set every dropout probability of the model to 0.")
    model_init_kwargs: dict | str | None = option(
        None, "Keyword arguments of from_pretrained when the model is given by path (JSON)."
    )
    chat_template_kwargs: dict | str | None = option(None, "Keyword arguments of the chat template (JSON).")
    backend: str = option("auto", "Of the loss: torch, cpu, triton, cuda; auto asks GRPO_KERNELS_BACKEND, then the device.")

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, *_JSON]

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # or transformers would start as many runs, each of its own
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(f"deepspeed must be None: it is not installed; pip install deepspeed, got {self.deepspeed!r}")
        for name in _JSON:
            _check_json(name, getattr(self, name))  # transformers parses it, names no option, and takes any text without a brace
        super().__post_init__()
        try:
            get_reporting_integration_callbacks(self.report_to)
        except ValueError as error:
            raise ValueError(f"report_to: {error}") from error
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        check_options(self.loss_config(), None, self.backend)
        least_of = {"num_generations": 2, "num_iterations": 1, "max_completion_length": 1, "top_k": 0, "ref_model_sync_steps": 1}
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        least_of |= dict.fromkeys(sizes, 1)
        for name, least in least_of.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
            setattr(self, name, operator.index(value))  # numpy's could not be written to a checkpoint's JSON
        for name, (holds, wanted) in _WANTED.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.use_transformers_continuous_batching and (self.min_p or self.repetition_penalty != 1):
            raise ValueError("use_transformers_continuous_batching has no min_p and no repetition_penalty: leave them alone, or it")
        if self.use_transformers_continuous_batching and self.generation_kwargs:
            raise ValueError("generation_kwargs must be None with use_transformers_continuous_batching, which lacks most of them")
        if self.use_transformers_continuous_batching and self.keep_sampling_mask:
            raise ValueError(
                "keep_sampling_mask must be False or None with use_transformers_continuous_batching, whose engine does not tell "
                "which completion a row of scores is of, got True"
            )
        check_server_options(self)
        check_entropy_options(self)
        for name in NOT_OURS:
            if getattr(self, name) not in (False, None, "no", 0.0):
                raise ValueError(f"{name} must be left alone: it has no meaning for rollouts, got {getattr(self, name)!r}")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel must be False: it would put its own forward in the place of the fused one, got True")
        if self.fp16:
            raise ValueError(
                "fp16 must be False: gradients are made beside the loss, before a loss scale could keep small ones from "
                "vanishing in float16; use bf16, got True"
            )
        if self.sync_ref_model and self.beta == 0:
            raise ValueError("sync_ref_model must be False with beta 0, which has no reference, got True")
        if refused := sorted(set(self.generation_kwargs or ()) & _OURS):
            raise ValueError(f"generation_kwargs must leave {', '.join(refused)} alone: the trainer sets or relies on it")
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

    @property
    def truncations(self) -> dict:
        """The options of the sampling by which unlikely tokens are left out."""
        own = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return truncations(filled_in(own | (self.generation_kwargs or {})))

    @property
    def keeps_sampling_mask(self) -> bool:
        """`keep_sampling_mask`, decided where it is None."""
        if self.keep_sampling_mask is None:
            return bool(self.truncations) and not self.use_transformers_continuous_batching and self.rollout_server is None
        return self.keep_sampling_mask

    def loss_config(self) -> GRPOLossConfig:
        """The loss's share of the options."""
        return GRPOLossConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GRPOLossConfig)})

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps taken on one rollout."""
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps


def _check_json(name, value):
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON object, got {value!r}: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
