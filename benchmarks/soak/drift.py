"""300 steps of the demo's task, trained in bf16 through the fused loss and in float64 through the reference: do they drift apart?

Same warmed-up model, prompts and dice for both; the first token that is drawn otherwise makes them two samples of one process. So
curves, a point for every rollout, are compared as samples: in no window of ten may the means over seeds differ by more than the
seeds of the float64 runs do.
"""

import copy
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from grpo_kernels import fused_linear_grpo_loss, reference
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer, demo
from grpo_kernels.trainer.rewards import exact_match

CURVES, WINDOW = ("reward", "entropy"), 10
PICTURE = Path("benchmarks/results/drift.png")
WAYS = {"fused bf16": fused_linear_grpo_loss, "reference float64": reference.grpo_loss}


def train(loss, model, tokenizer, rows, seed, steps):
    """The logs of the steps that began with a rollout."""
    set_seed(seed)
    model, exact = copy.deepcopy(model), loss is reference.grpo_loss
    with tempfile.TemporaryDirectory() as folder, patch("grpo_kernels.trainer.trainer.fused_linear_grpo_loss", loss):
        options = dict(output_dir=folder, max_steps=steps, seed=seed, bf16=not exact, save_strategy="no", logging_steps=1,
                       skip_untrained=False, disable_tqdm=True)  # fmt: skip
        args = GRPOConfig(**demo.DEFAULTS | options)
        trainer = GRPOTrainer(model.double() if exact else model, exact_match, args, rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [log for log in trainer.state.log_history if "reward" in log]


def run(options, seeds=(0, 1, 2), steps=300):
    torch.set_num_threads(1)
    logs = {way: [] for way in WAYS}
    for seed in seeds:
        set_seed(seed)
        tokenizer, (rows, _) = demo.make_tokenizer(), demo.make_problems(seed)
        model = demo.make_model(tokenizer)
        demo.warm_up(model, tokenizer, rows, seed)
        for way, loss in WAYS.items():
            logs[way].append(train(loss, model, tokenizer, rows, seed, steps))
    curves = {name: {way: [[log[name] for log in run] for run in runs] for way, runs in logs.items()} for name in CURVES}
    draw(curves, steps)
    verdicts = {name: compare(*map(smooth, runs.values())) for name, runs in curves.items()}
    says = [f"{name} apart by {v['apart']:.3f} at most, seeds by {v['spread']:.3f} at least" for name, v in verdicts.items()]
    return {"holds": all(v["holds"] for v in verdicts.values()), "says": "; ".join(says), "verdicts": verdicts, "curves": curves}


def smooth(runs):
    """[seeds, points] -> [seeds, windows], the means of their points."""
    runs = np.array(runs)[:, : len(runs[0]) // WINDOW * WINDOW]
    return runs.reshape(len(runs), -1, WINDOW).mean(2)


def compare(ours, exact):
    """In each window, how far the means over seeds are apart, and how far the seeds of the float64 runs are."""
    apart, spread = np.abs(ours.mean(0) - exact.mean(0)), np.ptp(exact, axis=0)
    return {"holds": bool((apart <= spread).all()), "apart": apart.max(), "spread": spread.min(), "apart_at": apart.tolist()}


def draw(curves, steps):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (name, runs) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        for (way, own), colour in zip(runs.items(), ("#1f5fa8", "#d1662a"), strict=True):
            points = smooth(own).T
            at = steps * (np.arange(len(points)) + 0.5) / len(points)
            axis.plot(at, points, color=colour, linewidth=1.2, alpha=0.8)[0].set_label(way)
        axis.set(title=f"{name}, means of {WINDOW} rollouts, a line per seed", xlabel="optimiser step")
        axis.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)
