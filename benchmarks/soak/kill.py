"""A run that is killed (SIGKILL) at random moments, while it samples, trains or writes a checkpoint, and resumed each time."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = dict(save_steps=1, save_total_limit=3, logging_steps=1, beta=0.05, sync_ref_model=True, ref_model_sync_steps=5,
               num_iterations=3, max_completion_length=6, learning_rate=1e-3)  # fmt: skip
_LIMIT = 300  # seconds of one process


def live(folder, steps, seconds=_LIMIT):
    """One process, killed some seconds after it began to train: (whether it was, how long it lived from there, what it said)."""
    command = [sys.executable, "-m", "benchmarks.soak.growth", json.dumps([folder, 0, {**OPTIONS, "max_steps": steps}])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    said = "".join(itertools.takewhile(lambda line: not line.startswith("training"), process.stdout))
    began = time.monotonic()
    try:
        said += process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said += process.communicate()[0]
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(said[-2000:])
    return process.returncode != 0, time.monotonic() - began, said


def run(options, kills=10, steps=48):
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as unbroken, tempfile.TemporaryDirectory() as broken:
        _, trained, _ = live(unbroken, steps)
        moments = [round(dice.uniform(0, trained / kills), 3) for _ in range(kills)]  # so that the last kill comes before the end
        lives = [live(broken, steps, seconds) for seconds in (*moments, _LIMIT)]
        same = len({Path(folder, "model.safetensors").read_bytes() for folder in (unbroken, broken)}) == 1
    killed, passed_over = sum(was for was, *_ in lives), sum(said.count("passed over") for *_, said in lives)
    weights = "those of the unbroken run, bit by bit" if same else "others than the unbroken run's"
    says = f"killed {killed} times, {passed_over} checkpoints cut short and passed over; the weights are {weights}"
    return {"holds": same and killed == kills, "says": says, "kills": killed, "moments": moments, "passed_over": passed_over}
