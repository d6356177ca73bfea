"""A thousand optimiser steps of the trainer, rollouts of changing lengths: behind the first two hundred, memory does not grow."""

import json
import subprocess
import sys
import tempfile

STEPS, SETTLED, EVERY = 1000, 200, 50
ALLOWED = 8 * 2**20  # bytes, of some 700 MiB
_SCRIPT = """
import gc, json, sys
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from grpo_kernels.bench.clock import resident
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer, demo

steps, every, folder, seed = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(seed)

class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []
    def on_step_end(self, args, state, control, **_):
        if state.global_step % every == 0:
            gc.collect()
            tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            self.seen.append((state.global_step, resident(), tensors))

def digits(completions, **_):
    return [sum(map(ord, c)) % 7 / 7 for c in completions]

tokenizer = demo.make_tokenizer()
model = demo.make_model(tokenizer)
train, _ = demo.make_problems(seed)
args = GRPOConfig(output_dir=folder, use_cpu=True, report_to="none", save_strategy="no", max_steps=steps, logging_steps=25,
                  beta=0.01, num_iterations=2, per_device_train_batch_size=16, num_generations=4, max_completion_length=12,
                  learning_rate=1e-4)
trainer = GRPOTrainer(model, digits, args, train, processing_class=tokenizer)
for callback in (ProgressCallback, PrinterCallback):
    trainer.remove_callback(callback)
watch = Watch()
trainer.add_callback(watch)
trainer.train()
print("\\n" + json.dumps(watch.seen))
"""


def run(options, steps=STEPS, settled=SETTLED, every=EVERY):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _SCRIPT, json.dumps([steps, every, folder, options.seed])]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = json.loads(out.splitlines()[-1])
    after = [(step, size, tensors) for step, size, tensors in seen if step >= settled]
    grown, more = after[-1][1] - after[0][1], after[-1][2] - after[0][2]
    return {
        "holds": grown <= ALLOWED and more <= 0, "grown_bytes": grown, "tensors_more": more, "allowed_bytes": ALLOWED,
        "points": seen,
        "says": f"steps {after[0][0]} to {after[-1][0]}: {grown / 2**20:+.1f} MiB of {after[0][1] / 2**20:.0f}, "
                f"{more:+d} tensors alive",
    }  # fmt: skip
