"""One GRPO optimiser step of TRL's trainer - stock, patched, fused - with the whole model around the head: seconds and peak memory.

    python -m benchmarks.trl_step [--lengths 64,256,512] [--layers 24] [--json FILE]

A fresh process per point makes a random Qwen2.5-0.5B (bf16, gradient checkpointing, AdamW) and one group of 8 completions of 40 to
100 % of the length behind prompts of 64 tokens, on-policy, default options of TRL (dapo). It takes one step to warm up, which makes
gradients and optimiser states, and then times steps: forward, loss, backward, optimiser. Sampling is not in it. ``peak_bytes`` is
how far the steps grew above what the process held before them. On a GPU where there is one.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import record

VARIANTS = ("stock", "patched", "fused")
SEQUENCES, PROMPT = 8, 64


def trainer_of(variant, layers, folder):
    """A TRL trainer over a random model, its optimiser made."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from grpo_kernels.integrations.trl import FusedGRPOTrainer, patch_trl

    torch.manual_seed(0)
    shape = dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)
    if layers == 0:  # --tiny: seconds, to see that everything runs
        shape, layers = dict(vocab_size=503, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2), 1
    config = Qwen2Config(**shape, num_hidden_layers=layers, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
                         pad_token_id=0)  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    if variant == "patched":
        patch_trl()
    on_gpu = torch.cuda.is_available()
    args = GRPOConfig(output_dir=folder, report_to="none", save_strategy="no", per_device_train_batch_size=SEQUENCES, max_steps=10,
                      learning_rate=1e-6, num_generations=SEQUENCES, use_cpu=not on_gpu, bf16=False)  # fmt: skip
    trainer = (FusedGRPOTrainer if variant == "fused" else GRPOTrainer)(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * SEQUENCES),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>"),
    )  # fmt: skip
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def inputs_of(trainer, length):
    """One group of completions as TRL's `_generate_and_score_completions` returns it, and its kept tokens."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, trainer.model.config.vocab_size, (SEQUENCES, PROMPT + length), generator=g)
    lengths = (length * (0.4 + 0.6 * torch.rand(SEQUENCES, generator=g))).ceil().long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    rewards = torch.rand(SEQUENCES, generator=g)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:] * mask, "completion_mask": mask,
        "advantages": (rewards - rewards.mean()) / rewards.std(), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return {name: x.to(trainer.accelerator.device) for name, x in inputs.items()}, int(mask.sum())


def measure(variant, length, layers, rounds) -> dict:
    """In this very process, which should be a fresh one."""
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(variant, layers, folder)
        losses = []

        def step(inputs):
            loss = trainer._compute_loss(trainer.model, inputs)
            trainer.accelerator.backward(loss)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            losses.append(float(loss))

        step(inputs_of(trainer, 8)[0])
        inputs, kept = inputs_of(trainer, length)
        if on_gpu:
            step(inputs)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            if not record.reset_peak():
                raise RuntimeError("the peak mark cannot be reset here: /proc/self/clear_refs is not to be written")
            before = record.resident()
        times = []
        for _ in range(rounds):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(inputs)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if on_gpu else record.resident("VmHWM")
    config = trainer.model.config
    return {
        "provider": f"trl {variant}", "path": "grpo step",
        "shape": {"tokens": kept, "length": length, "sequences": SEQUENCES, "depth": config.hidden_size, "vocab": config.vocab_size,
                  "layers": config.num_hidden_layers, "dtype": "bfloat16"},
        "median": statistics.median(times), "spread": record.spread(times), "rounds": rounds, "peak_bytes": peak - before,
        "data_bytes": before, "error": None, "losses": losses[-rounds:], **record.environment(),
        **({"device": torch.cuda.get_device_name()} if on_gpu else {}),
    }  # fmt: skip


def in_fresh_process(*point) -> dict:
    command = [sys.executable, "-m", "benchmarks.trl_step", "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{point}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description="One optimiser step of TRL's GRPO trainer: stock, patched and fused.")
    parser.add_argument("--lengths", default="64,256,512", help="completion lengths, by comma")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small model: seconds, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.point:
        print(json.dumps(measure(*json.loads(options.point))))
        return 0
    rows = []
    print(f"{'trainer':8} {'length':>6} {'tokens':>6} {'seconds':>8} {'x stock':>8} {'peak MiB':>9}")
    for length in map(int, options.lengths.split(",")):
        stock = None
        for variant in VARIANTS:
            r = in_fresh_process(variant, length, 0 if options.tiny else options.layers, options.rounds)
            rows.append(r)
            stock = stock or r
            pairs = zip(stock["losses"], r["losses"], strict=True)
            if not all(math.isfinite(b) and abs(a - b) <= 0.02 * max(1, abs(a)) for a, b in pairs):
                raise SystemExit(f"{variant} trains something else than stock: losses {r['losses']}, {stock['losses']}")
            ratio, peak = r["median"] / stock["median"], r["peak_bytes"] / 2**20
            print(f"{variant:8} {length:6} {r['shape']['tokens']:6} {r['median']:8.2f} {ratio:8.2f} {peak:9.0f}", flush=True)
    if options.json:
        record.write(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
