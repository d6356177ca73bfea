"""What the trainer does not compute: the time of a micro-batch's forward, loss and backward with each kind of work left out.

A random Qwen2 of four layers (D 896, V 151,936, float32), eight completions of log-normal length behind prompts of 32 to 64 tokens;
half of them have no advantage. All ways run round by round, and their gradients must agree.

    python -m benchmarks.savings [FILE]
"""

import sys
import tempfile
from functools import partial

import torch

from grpo_kernels.bench import clock, record
from grpo_kernels.bench.measure import Effort, rounds
from grpo_kernels.bench.step_process import SEQUENCES, trainer_of
from grpo_kernels.trainer.microbatch import MicroBatch, make

ROUNDS, LAYERS, PROMPT, LENGTH = 5, 4, 64, 128


def batch_of(vocab):
    """Padded [P + T]; the second half of the completions has advantage 0, as those of a group without variance."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(32, PROMPT + 1, (SEQUENCES, 1), generator=g)
    lengths = (40 * (0.7 * torch.randn(SEQUENCES, 1, generator=g)).exp()).clamp(4, LENGTH).long()
    attention = torch.cat([torch.arange(PROMPT) >= PROMPT - prompts, torch.arange(LENGTH) < lengths], 1)
    ids = torch.randint(2, vocab, attention.shape, generator=g) * attention
    advantages = torch.randn(SEQUENCES, generator=g) * (torch.arange(SEQUENCES) < SEQUENCES // 2)
    return {"input_ids": ids, "attention_mask": attention.long(), "mask": attention[:, PROMPT:], "advantages": advantages,
            "num_items": float(lengths.sum())}  # fmt: skip


def untouched(batch, config):
    """Every row and column, as most trainers hand them to the model."""
    ids, attention = batch["input_ids"], batch["attention_mask"]
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
    given = {"completion_ids": ids[:, PROMPT:], **{name: batch[name] for name in ("mask", "advantages", "num_items")}}
    return MicroBatch(inputs, given, None, None, None, (SEQUENCES, LENGTH), 1.0, False)


WAYS = {"everything": untouched, "padding cut": make, "packed": partial(make, packed=True),
        "half the rows skipped": partial(make, skip=True), "skipped and packed": partial(make, skip=True, packed=True)}  # fmt: skip


def main(file="benchmarks/results/cpu-savings.json"):
    with tempfile.TemporaryDirectory() as folder:
        trainer, loss = trainer_of("thin trainer", LAYERS, folder)
    model, rows = trainer.model.float().train(), []
    batch = batch_of(model.config.vocab_size)

    def step(way):
        trainer._micro_batch = lambda inputs, skip: way(inputs, trainer.loss_config)
        model.zero_grad()
        loss(batch).backward()
        return model.model.layers[0].mlp.down_proj.weight.grad

    whole = step(untouched)
    off = {name: ((step(way) - whole).norm() / whole.norm()).item() for name, way in WAYS.items()}
    assert max(off.values()) < 1e-3, f"other gradients, relative errors {off}"
    times = rounds({name: partial(step, way) for name, way in WAYS.items()}, clock.here(), Effort(ROUNDS))
    for name, own in times.items():
        shape = {"tokens": WAYS[name](batch, trainer.loss_config).model_inputs["input_ids"].numel()}
        ratios = record.ratios(own, times["everything"])
        rows.append(record.row(name, "micro-batch", shape, list(own.values()), ratios=ratios, kind="savings"))
        print(f"{name:24} {shape['tokens']:6} tokens  {rows[-1]['median']:6.2f} s  {rows[-1]['ratio']:.2f} x")
    record.write(file, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
