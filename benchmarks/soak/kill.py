"""A run that is killed (SIGKILL) at random moments, while it samples, trains or writes a checkpoint, and resumed each time."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS, STEPS = 10, 48
_LIMIT = 300  # seconds of one process
_SCRIPT = """
import sys, time
import torch
from transformers import TrainerCallback
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer, demo

folder, steps = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)

class Slowly(TrainerCallback):
    def on_train_begin(self, *_, **__):
        print("training", flush=True)
    def on_step_end(self, args, state, control, **_):
        time.sleep(0.02)

def digits(completions, **_):
    return [sum(map(ord, c)) % 7 / 7 for c in completions]

tokenizer = demo.make_tokenizer()
args = GRPOConfig(output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=steps, save_steps=1,
                  save_total_limit=3, logging_steps=1, beta=0.05, sync_ref_model=True, ref_model_sync_steps=5, num_iterations=3,
                  per_device_train_batch_size=16, num_generations=4, max_completion_length=6, learning_rate=1e-3, seed=3)
model, rows = demo.make_model(tokenizer), demo.make_problems(0)[0]
trainer = GRPOTrainer(model, digits, args, rows, processing_class=tokenizer, callbacks=[Slowly()])
trainer.train(resume_from_checkpoint="last")
trainer.save_model(folder)
trainer.save_state()
"""


def start(folder, steps):
    command = [sys.executable, "-c", _SCRIPT, str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(folder, steps):
    process = start(folder, steps)
    out = process.communicate(timeout=_LIMIT)[0]
    if process.returncode:
        raise RuntimeError(out[-2000:])
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest(), out


def killed(folder, steps, dice, span):
    """One life: (seconds behind its first training step after which it was killed, what it said), or None where it had ended."""
    process = start(folder, steps)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("training"):
            break
    wait = dice.uniform(0, span)
    time.sleep(wait)
    if process.poll() is not None:
        if process.returncode:
            raise RuntimeError("".join(said) + process.stdout.read())
        return None
    os.killpg(process.pid, signal.SIGKILL)
    said.append(process.communicate(timeout=_LIMIT)[0])
    return wait, "".join(said)


def run(options, kills=KILLS, steps=STEPS):
    dice, moments, passed_over = random.Random(options.seed), [], 0
    with tempfile.TemporaryDirectory() as unbroken, tempfile.TemporaryDirectory() as broken:
        began = time.monotonic()
        expected, _ = finish(unbroken, steps)
        span = (time.monotonic() - began) / kills  # so that the last kill comes before the end
        for _ in range(kills):
            found = killed(broken, steps, dice, span)
            if found is None:
                break
            moments.append(round(found[0], 2))
            passed_over += found[1].count("passed over")
        ended, out = finish(broken, steps)
        passed_over += out.count("passed over")
    return {
        "holds": ended == expected and len(moments) == kills, "kills": len(moments), "moments": moments, "passed_over": passed_over,
        "says": f"killed {len(moments)} times, {passed_over} checkpoints cut short and passed over; the weights are "
                + ("those of the unbroken run, bit by bit" if ended == expected else "others than the unbroken run's"),
    }  # fmt: skip
