"""The process of a point of step.py with TRL's trainer around the loss: stock, patched, fused."""

import functools
import json
import sys

from datasets import Dataset

from ..integrations.trl import FusedGRPOTrainer, patch_trl, trl
from .memory import answer
from .step_process import ROWS, make, measure


def trainer_of(variant, layers, folder):
    if variant == "trl patched":
        patch_trl()
    cls = FusedGRPOTrainer if variant == "trl fused" else trl.GRPOTrainer
    trainer = make(cls, trl.GRPOConfig, Dataset.from_list(ROWS), layers, folder)
    return trainer, functools.partial(trainer._compute_loss, trainer.model)


if __name__ == "__main__":
    answer(measure(trainer_of, *json.loads(sys.argv[1])))
