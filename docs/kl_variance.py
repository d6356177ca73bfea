"""How much the gradient of the KL term depends on which tokens were sampled: k3 and the exact KL on the demo's task.

    python -m docs.kl_variance      the table of docs/training.md

The demo's model after its warm-up is the reference. Some GRPO steps later it is the policy, which completes 64 batches of prompts.
Of each batch the gradient of the KL term alone is taken (advantages 0, beta 1, on-policy), with respect to all parameters. Every
estimator has the same completions and the same hidden states. Given the tokens before it, the exact KL of a token does not depend
on which token was drawn: what is left of its variance is that of prompts and prefixes.

In the mean k3 with the bias correction has the gradient of KL(policy || reference), without it that of KL(reference || policy).
"""

import copy
import random
import tempfile
from dataclasses import dataclass

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs
from grpo_kernels.integrations.transformers import fuse_lm_head
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer, demo
from grpo_kernels.trainer.rewards import exact_match
from grpo_kernels.trainer.rollout import sample, sampling_config, tokenize

ESTIMATORS = {
    "`k3`": GRPOLossConfig(beta=1.0),
    "`k3`, `use_bias_correction_kl` off": GRPOLossConfig(beta=1.0, use_bias_correction_kl=False),
    "`exact`": GRPOLossConfig(beta=1.0, kl_estimator="exact"),
}
EXACT = "`exact`"


@dataclass
class Moments:
    """Of the gradients [P] of several batches, and of their KLs."""

    sum: torch.Tensor | float = 0.0
    squares: float = 0.0
    kls: tuple[float, ...] = ()

    def add(self, gradient, kl):
        self.sum = self.sum + gradient
        self.squares += gradient.dot(gradient).item()
        self.kls += (kl,)

    @property
    def mean(self):
        return self.sum / len(self.kls)

    @property
    def variance(self):
        """Trace of the covariance (unbiased)."""
        n = len(self.kls)
        return (self.squares - n * self.mean.dot(self.mean).item()) / (n - 1)


def warmed_up(seed=0):
    """The demo's model as it is before GRPO, and its tokenizer."""
    set_seed(seed)
    tokenizer = demo.make_tokenizer()
    model = demo.make_model(tokenizer)
    demo.warm_up(model, tokenizer, demo.make_problems(seed)[0], seed)
    return model, tokenizer


def trained_away(model, tokenizer, steps, **options):
    """The trainer of the demo after so many steps; ``model`` stays where it was."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**demo.DEFAULTS, "lr_scheduler_type": "constant", "logging_strategy": "no", "save_strategy": "no", **options}
        args = GRPOConfig(**{**options, "output_dir": folder, "max_steps": steps, "disable_tqdm": True})
        prompts = demo.make_problems(args.seed)[0]
        trainer = GRPOTrainer(copy.deepcopy(model), exact_match, args, prompts, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def drawn(trainer, dice, completions):
    """(what the model takes, completion ids [B, T], mask [B, T]) of a batch of prompts that the policy completes."""
    rows = dice.choices(trainer.train_dataset, k=completions)
    prompts = tokenize(trainer.processing_class, [row["prompt"] for row in rows])
    found = sample(trainer.model, prompts, sampling_config(trainer.args, trainer.model, trainer.processing_class))
    positions = (found.attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": found.input_ids, "attention_mask": found.attention_mask, "position_ids": positions, "use_cache": False}
    return inputs, found.input_ids[:, -found.mask.shape[1] :], found.mask


def gradients(policy, reference, inputs, ids, mask):
    """{estimator: (gradient [P] float64, KL)} of a batch."""

    def predicting(hidden):
        return hidden[:, -ids.shape[1] - 1 : -1]

    def of_reference(hidden, head):
        logps = linear_logprobs(predicting(hidden), head.weight, ids, mask=mask).logps
        return {"ref_logps": logps, "ref_hidden": predicting(hidden), "ref_weight": head.weight}

    def losses(hidden, head):
        advantages = torch.zeros(len(mask))
        found = {name: fused_linear_grpo_loss(predicting(hidden), head.weight, ids, advantages, mask, config=config, **given)
                 for name, config in ESTIMATORS.items()}  # fmt: skip
        return {name: (out.loss, out.metrics["kl"].item()) for name, out in found.items()}

    with torch.no_grad():
        given = reference(**inputs, fused_lm_head=of_reference)
    found = policy(**inputs, fused_lm_head=losses)
    parameters = list(policy.parameters())
    of_each = {name: torch.autograd.grad(loss, parameters, retain_graph=True) for name, (loss, _) in found.items()}
    return {name: (torch.cat([g.double().flatten() for g in of_each[name]]), kl) for name, (_, kl) in found.items()}


def measure(trainer, reference, batches, completions):
    """{estimator: `Moments`}."""
    dice, found = random.Random(0), {name: Moments() for name in ESTIMATORS}
    trainer.model.eval()
    for _ in range(batches):
        for name, (gradient, kl) in gradients(trainer.model, reference, *drawn(trainer, dice, completions)).items():
            found[name].add(gradient, kl)
    return found


def show(steps, found):
    exact = found[EXACT].mean
    size = exact.norm().item()
    for name, moments in found.items():
        kls, mean = torch.tensor(moments.kls, dtype=torch.float64), moments.mean
        cosine = mean.dot(exact).item() / (mean.norm().item() * size)
        print(f"| {steps} | {name} | {kls.mean():.4f} ± {kls.std():.4f} | {mean.norm():.4f} | {moments.variance / size**2:.3g} "
              f"| {cosine:.3f} |", flush=True)  # fmt: skip


def main(distances=(10, 40), batches=64, completions=256):
    torch.set_num_threads(1)  # matrices of 64 columns
    model, tokenizer = warmed_up()
    reference = fuse_lm_head(copy.deepcopy(model)).eval()
    print("| steps | `kl_estimator` | `kl` ± its deviation | norm of the mean gradient | variance / norm² of the exact mean "
          "| cosine to the exact mean |\n" + "|---" * 6 + "|")  # fmt: skip
    for steps in distances:
        trainer = trained_away(model, tokenizer, steps)
        set_seed(1)
        show(steps, measure(trainer, reference, batches, completions))


if __name__ == "__main__":
    main()
