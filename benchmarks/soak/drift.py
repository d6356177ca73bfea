"""300 steps of the demo's task, trained in bf16 through the fused loss and in float64 through the reference: do they drift apart?

Same warmed-up model, prompts and dice for both; the first token that is drawn otherwise makes them two samples of one process. So
curves are compared as samples: at no point of the smoothed curves may the means over seeds differ by more than the seeds do. A
curve has a point for every rollout.
"""

import copy
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from grpo_kernels import reference
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer, demo
from grpo_kernels.trainer.rewards import exact_match

SEEDS, STEPS, WINDOW = (0, 1, 2), 300, 10
CURVES = ("reward", "entropy")
PICTURE = Path("benchmarks/results/drift.png")


class Exact(GRPOTrainer):
    """Everything in float64, the loss through all logits, by the reference."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        micro = self._micro_batch(inputs, skip=False)
        hidden = model.base_model(**micro.model_inputs, use_cache=False).last_hidden_state
        given = dict(micro.loss_inputs)
        given["advantages"] = given["advantages"].double()
        output = reference.grpo_loss(
            micro.predicting(hidden), model.lm_head.weight, given.pop("completion_ids"), given.pop("advantages"), given.pop("mask"),
            config=self.loss_config, **given,
        )  # fmt: skip
        for name, value in output.metrics.items():
            self._metrics["train"].record({name: value}, self._weight(name, inputs, micro))
        return output.loss


def curve(cls, model, tokenizer, train, seed, steps, **options):
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        own = {**demo.DEFAULTS, "output_dir": folder, "max_steps": steps, "seed": seed, "save_strategy": "no", "logging_steps": 1,
               "skip_untrained": False}  # fmt: skip
        own.pop("save_steps")
        trainer = cls(copy.deepcopy(model), exact_match, GRPOConfig(**own | options), train, processing_class=tokenizer)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]  # the steps that began with a rollout
    return {name: [log[name] for log in logs] for name in CURVES}


def run(options, seeds=SEEDS, steps=STEPS):
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {"fused bf16": {}, "reference float64": {}}
    for seed in seeds:
        set_seed(seed)
        tokenizer, (train, _) = demo.make_tokenizer(), demo.make_problems(seed)
        model = demo.make_model(tokenizer)
        demo.warm_up(model, tokenizer, train, seed)
        found["fused bf16"][seed] = curve(GRPOTrainer, model, tokenizer, train, seed, steps, bf16=True)
        found["reference float64"][seed] = curve(Exact, model.double(), tokenizer, train, seed, steps)
    verdicts = {name: _compare(found, name) for name in CURVES}
    _draw(found, steps)
    said = [f"{name} apart by {v['apart']:.3f} at most, where seeds spread by {v['spread']:.3f}" for name, v in verdicts.items()]
    holds = all(v["holds"] for v in verdicts.values())
    return {"holds": holds, "says": ", ".join(said), "verdicts": verdicts, "curves": found, "steps": steps}


def smooth(values):
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]


def _compare(found, name):
    """Means over seeds of both, window by window, and how far the seeds of the float64 runs lie apart there."""
    ours, exact = ([smooth(run[name]) for run in runs.values()] for runs in found.values())
    mean = lambda runs: [statistics.fmean(at) for at in zip(*runs, strict=True)]  # noqa: E731
    apart = [abs(a - b) for a, b in zip(mean(ours), mean(exact), strict=True)]
    spread = [max(at) - min(at) for at in zip(*exact, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    holds = all(a <= s for a, s in zip(apart, spread, strict=True))
    return {"holds": holds, "apart": apart[worst], "spread": spread[worst], "apart_at": apart, "spread_at": spread}


def _draw(found, steps):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), CURVES, strict=True):
        for (label, runs), colour in zip(found.items(), ("#1f5fa8", "#d1662a"), strict=True):
            for i, one in enumerate(runs.values()):
                points = smooth(one[name])
                at = [steps * WINDOW * (j + 0.5) / len(one[name]) for j in range(len(points))]
                axis.plot(at, points, color=colour, linewidth=1.2, alpha=0.8, label=label if i == 0 else None)
        axis.set_title(f"{name}, means of {WINDOW} rollouts, a line per seed", loc="left", fontsize=10)
        axis.set_xlabel("optimiser step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)
