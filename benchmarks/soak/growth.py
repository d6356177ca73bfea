"""A thousand optimiser steps of the trainer, rollouts of changing lengths: after the first two hundred, memory does not grow.

The process of it, which kill.py kills: the demo's model and prompts on one thread, with a reward that needs no right answer.

    python -m benchmarks.soak.growth '["FOLDER", 0, {"max_steps": 48}]'     # resumes the run that it finds in the folder
"""

import gc
import json
import sys
import tempfile

import torch
from transformers import TrainerCallback

from grpo_kernels.bench import memory
from grpo_kernels.bench.clock import resident
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer, demo

ALLOWED = 8 * 2**20  # bytes, of some 700 MiB
OPTIONS = dict(save_strategy="no", logging_steps=25, beta=0.01, num_iterations=2, max_completion_length=12, learning_rate=1e-4)


class Watch(TrainerCallback):
    """(step, bytes that the process holds, tensors alive), twenty times in a run."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, *_, **__):
        print("training", flush=True)

    def on_step_end(self, args, state, *_, **__):
        if state.global_step % max(1, args.max_steps // 20) == 0:
            gc.collect()
            self.seen.append((state.global_step, resident(), sum(isinstance(o, torch.Tensor) for o in gc.get_objects())))


def digits(completions, **_):
    return [sum(map(ord, c)) % 7 / 7 for c in completions]


def train(folder, seed, options):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer, (rows, _), watch = demo.make_tokenizer(), demo.make_problems(seed), Watch()
    args = GRPOConfig(output_dir=folder, seed=seed, use_cpu=True, report_to="none", disable_tqdm=True,
                      per_device_train_batch_size=16, num_generations=4, **options)  # fmt: skip
    trainer = GRPOTrainer(demo.make_model(tokenizer), digits, args, rows, processing_class=tokenizer, callbacks=[watch])
    trainer.train(resume_from_checkpoint="last")
    trainer.save_model(folder)
    return watch.seen


def run(options, steps=1000, settled=200):
    with tempfile.TemporaryDirectory() as folder:
        seen = memory.run(__name__, [folder, options.seed, {**OPTIONS, "max_steps": steps}])
    first, *_, last = [point for point in seen if point[0] >= settled]
    grown, more = last[1] - first[1], last[2] - first[2]
    says = f"steps {first[0]} to {last[0]}: {grown / 2**20:+.1f} MiB of {first[1] / 2**20:.0f}, {more:+d} tensors alive"
    return {"holds": grown <= ALLOWED and more <= 0, "says": says, "grown_bytes": grown, "tensors_more": more, "points": seen}


if __name__ == "__main__":
    memory.answer(train(*json.loads(sys.argv[1])))
