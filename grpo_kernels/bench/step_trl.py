"""The process of one point of step.py with TRL's trainer around the loss: stock, patched, fused."""

import json
import sys

from ..integrations.trl import FusedGRPOTrainer, patch_trl
from .memory import answer
from .step_process import SEQUENCES, measure, model_of, no_reward, options


def trl_trainer(variant, layers, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    if variant == "trl patched":
        patch_trl()
    model, tokenizer = model_of(layers)
    trainer = (FusedGRPOTrainer if variant == "trl fused" else GRPOTrainer)(
        model=model, reward_funcs=no_reward, args=GRPOConfig(**options(folder)),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * SEQUENCES), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.gradient_checkpointing_enable()  # as train() does by TRL's default, and as the other variants do
    return trainer, lambda inputs: trainer._compute_loss(trainer.model, inputs)


if __name__ == "__main__":
    answer(measure(trl_trainer, *json.loads(sys.argv[1])))
