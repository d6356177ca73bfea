"""The process of one point of step.py: a random Qwen2.5-0.5B (bf16, gradient checkpointing, AdamW) takes optimiser steps.

One group of 8 completions of 40 to 100 % of the length behind prompts of 64 tokens, off-policy, default options (dapo). One step
warms up. ``peak_bytes`` is how far the process grew above model and batch, gradients and optimiser states included.
``gradients`` are the norms of the head's and of a layer's in the last step. On a GPU where there is one.

    python -m grpo_kernels.bench.step_process '["thin trainer", 256, 24, 2]'     # 0 layers: a tiny model
"""

import functools
import json
import math
import sys
import tempfile

import torch

from ..extras import needs
from ..trainer import GRPOConfig, GRPOTrainer
from . import clock as clocks
from .memory import answer

with needs("train", "bench --step"):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SEQUENCES, PROMPT = 8, 64
ROWS = [{"prompt": "a"}] * SEQUENCES
QWEN = dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)
TINY = dict(vocab_size=503, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
COMPARED = ("embed_tokens.weight", ".0.mlp.down_proj.weight")  # the tied head, and a layer


def model_of(layers):
    torch.manual_seed(0)
    config = Qwen2Config(**(QWEN if layers else TINY), num_hidden_layers=layers or 1, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")
    return Qwen2ForCausalLM(config).to(torch.bfloat16), tokenizer


def batch_of(config, length):
    """One group of completions, its tensors by TRL's names and by ours."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, config.vocab_size, (SEQUENCES, PROMPT + length), generator=g)
    lengths = (length * (0.4 + 0.6 * torch.rand(SEQUENCES, generator=g))).ceil().long()
    mask = torch.arange(length) < lengths[:, None]
    rewards = torch.rand(SEQUENCES, generator=g)
    # of a random model every log-prob is near -ln V: ratios around 1, so that loss and gradients depend on the log-probs
    old = 0.1 * torch.randn(SEQUENCES, length, generator=g) - math.log(config.vocab_size)
    attention = torch.cat([torch.ones(SEQUENCES, PROMPT, dtype=torch.bool), mask], 1).long()
    ids, tokens = ids * attention, mask.sum()
    return {
        "advantages": (rewards - rewards.mean()) / rewards.std(),
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": attention[:, :PROMPT], "completion_ids": ids[:, PROMPT:],
        "completion_mask": attention[:, PROMPT:], "old_per_token_logps": old, "num_items_in_batch": tokens,
        "input_ids": ids, "attention_mask": attention, "mask": mask, "old_logps": old, "num_items": tokens,
    }  # fmt: skip


def make(cls, config, rows, layers, folder):
    """A trainer of a new model."""
    model, tokenizer = model_of(layers)
    args = config(output_dir=folder, report_to="none", save_strategy="no", per_device_train_batch_size=SEQUENCES, max_steps=10,
                  learning_rate=1e-6, num_generations=SEQUENCES, use_cpu=not torch.cuda.is_available(), bf16=False)  # fmt: skip
    reward = len  # any function: nothing is sampled
    trainer = cls(model, reward, args, rows, processing_class=tokenizer)
    trainer.model.gradient_checkpointing_enable()  # as train() does by TRL's default
    return trainer


def trainer_of(variant, layers, folder):
    """(trainer, its loss of a batch)."""
    trainer = make(GRPOTrainer, GRPOConfig, ROWS, layers, folder)

    def without_head(inputs):
        given = trainer._micro_batch(inputs, skip=False).model_inputs
        return trainer.model.base_model(**given, use_cache=False).last_hidden_state.float().square().mean()

    return trainer, without_head if variant == "model" else functools.partial(trainer.compute_loss, trainer.model)


def measure(trainer_of, variant, length, layers, rounds) -> dict:
    """In this very process, which should be a fresh one."""
    clock, losses = clocks.here(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer, loss_of = trainer_of(variant, layers, folder)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        model, config = trainer.model.train(), trainer.model.config
        small, inputs = ({k: x.to(model.device) for k, x in batch_of(config, tokens).items()} for tokens in (8, length))

        def step(inputs):
            trainer.optimizer.zero_grad()
            loss = loss_of(inputs)
            trainer.accelerator.backward(loss)
            trainer.optimizer.step()
            losses.append(float(loss.detach()))

        def steps():
            for warming in (small, inputs) if clock.device.type == "cuda" else (small,):
                step(warming)
            return [clock.seconds(lambda: step(inputs)) for _ in range(rounds)]

        times, peak = clock.peak(steps)
        gradients = [p.grad.float().norm().item() for name, p in model.named_parameters() if name.endswith(COMPARED)]
    shape = {"tokens": int(inputs["num_items"]), "length": length, "sequences": SEQUENCES, "depth": config.hidden_size,
             "vocab": config.vocab_size, "layers": config.num_hidden_layers, "dtype": "bfloat16"}  # fmt: skip
    return {"shape": shape, "times": times, "peak_bytes": peak, "losses": losses[-rounds:], "gradients": gradients}


if __name__ == "__main__":
    answer(measure(trainer_of, *json.loads(sys.argv[1])))
