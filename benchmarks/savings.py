"""What the trainer does not compute: the time of a micro-batch's forward, loss and backward with each kind of work left out.

    python -m benchmarks.savings [--json FILE]

A random Qwen2 of four layers (D 896, V 151,936, float32), eight completions of log-normal length behind prompts of 32 to 64 tokens.
All ways are run round by round, and their gradients must agree.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from grpo_kernels.bench import record
from grpo_kernels.bench.step_process import SEQUENCES, own_trainer
from grpo_kernels.trainer import microbatch

ROUNDS, LAYERS, PROMPT, LENGTH = 5, 4, 64, 128
RESULT = Path("benchmarks/results/cpu-savings.json")


def batch_of(vocab, zero):
    """Padded [P + T]; the last ``zero`` completions have advantage 0, as those of a group without variance."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(32, PROMPT + 1, (SEQUENCES,), generator=g)
    lengths = (40 * (0.7 * torch.randn(SEQUENCES, generator=g)).exp()).clamp(4, LENGTH).long()
    attention = torch.cat([torch.arange(PROMPT) >= PROMPT - prompts[:, None], torch.arange(LENGTH) < lengths[:, None]], 1)
    ids = torch.randint(2, vocab, attention.shape, generator=g) * attention
    advantages = torch.randn(SEQUENCES, generator=g)
    advantages[SEQUENCES - zero :] = 0
    return {"input_ids": ids, "attention_mask": attention.long(), "mask": attention[:, PROMPT:].clone(), "advantages": advantages,
            "num_items": float(lengths.sum())}  # fmt: skip


def untouched(batch, config):
    """Every row and column, as most trainers hand them to the model."""
    ids, attention, mask = batch["input_ids"], batch["attention_mask"], batch["mask"]
    given = {"completion_ids": ids[:, -mask.shape[1] :], "mask": mask, **{k: batch[k] for k in ("advantages", "num_items")}}
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
    return microbatch.MicroBatch(inputs, given, None, None, None, tuple(mask.shape), 1.0, False)


WAYS = {
    "everything": untouched,
    "padding cut": lambda batch, config: microbatch.make(batch, config),
    "packed": lambda batch, config: microbatch.make(batch, config, packed=True),
    "half the rows skipped": lambda batch, config: microbatch.make(batch, config, skip=True),
    "skipped and packed": lambda batch, config: microbatch.make(batch, config, skip=True, packed=True),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        trainer = own_trainer("thin trainer", LAYERS, folder)[0]
    model = trainer.model.float().train()
    batch = batch_of(model.config.vocab_size, SEQUENCES // 2)
    times, tokens, gradients = {name: [] for name in WAYS}, {}, {}

    def step(name):
        trainer._micro_batch = lambda inputs, skip: WAYS[name](inputs, trainer.loss_config)
        model.zero_grad()
        start = time.perf_counter()
        trainer.compute_loss(model, batch).backward()
        return time.perf_counter() - start

    for name, make in WAYS.items():
        step(name)
        tokens[name] = make(batch, trainer.loss_config).model_inputs["input_ids"].numel()
        gradients[name] = model.model.layers[0].mlp.down_proj.weight.grad.clone()
        off = (gradients[name] - gradients["everything"]).norm() / gradients["everything"].norm()
        assert off < 1e-3, f"{name}: another gradient, off by {off:.1e}"
    for i in range(ROUNDS):
        order = list(WAYS)
        random.Random(i).shuffle(order)
        for name in order:
            times[name].append(step(name))
    rows, base = [], times["everything"]
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        found = {"way": name, "tokens": tokens[name], "median": statistics.median(own), "times": own, "ratio": ratio}
        rows.append(found | record.environment())
        print(f"{name:24} {tokens[name]:6} tokens  {statistics.median(own):6.2f} s  {ratio:.2f} x")
    record.write(options.json, rows)


if __name__ == "__main__":
    main()
