"""The process of one point of step.py: a random Qwen2.5-0.5B (bf16, gradient checkpointing, AdamW) takes optimiser steps.

One group of 8 completions of 40 to 100 % of the length behind prompts of 64 tokens, off-policy, default options (dapo). One step
warms up; ``peak_bytes`` is how far the process grew from there being a model and a batch to the timed steps: gradients and
optimiser states are in it. ``gradients`` are the norms of the head's and of a layer's in the first timed step. On a GPU where
there is one.

    python -m grpo_kernels.bench.step_process '["thin trainer", 256, 24, 2]'     # 0 layers: a tiny model
"""

import json
import math
import sys
import tempfile

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ..trainer import GRPOConfig, GRPOTrainer
from . import clock as clocks
from .clock import Timed
from .memory import answer

SEQUENCES, PROMPT = 8, 64


def model_of(layers):
    torch.manual_seed(0)
    shape = dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)
    if layers == 0:
        shape, layers = dict(vocab_size=503, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2), 1
    config = Qwen2Config(**shape, num_hidden_layers=layers, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
                         pad_token_id=0)  # fmt: skip
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")
    return Qwen2ForCausalLM(config).to(torch.bfloat16), tokenizer


def batch_of(config, length):
    """One group of completions, its tensors by the names that TRL gives them."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, config.vocab_size, (SEQUENCES, PROMPT + length), generator=g)
    lengths = (length * (0.4 + 0.6 * torch.rand(SEQUENCES, generator=g))).ceil().long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    rewards = torch.rand(SEQUENCES, generator=g)
    # of a random model every log-prob is near -ln V: ratios around 1, so that loss and gradients depend on the log-probs
    old = 0.1 * torch.randn(SEQUENCES, length, generator=g) - math.log(config.vocab_size)
    return {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:] * mask, "completion_mask": mask, "old_per_token_logps": old,
        "advantages": (rewards - rewards.mean()) / rewards.std(), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def options(folder):
    return dict(output_dir=folder, report_to="none", save_strategy="no", per_device_train_batch_size=SEQUENCES, max_steps=10,
                learning_rate=1e-6, num_generations=SEQUENCES, use_cpu=not torch.cuda.is_available(), bf16=False)  # fmt: skip


def own_trainer(variant, layers, folder):
    model, tokenizer = model_of(layers)
    args = GRPOConfig(**options(folder), gradient_checkpointing=True)
    trainer = GRPOTrainer(model, no_reward, args, [{"prompt": "a"}] * SEQUENCES, processing_class=tokenizer)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()

    def inputs_of(inputs):
        mask = inputs["completion_mask"]
        return {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1), "mask": mask.bool(),
            "old_logps": inputs["old_per_token_logps"], "advantages": inputs["advantages"],
            "num_items": inputs["num_items_in_batch"],
        }  # fmt: skip

    def thin(inputs):
        return trainer.compute_loss(trainer.model, inputs_of(inputs))

    def without_head(inputs):
        given = inputs_of(inputs)
        ids, attended = given["input_ids"], given["attention_mask"]
        hidden = trainer.model.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
        return hidden.float().square().mean()

    return trainer, without_head if variant == "model" else thin


def _norms(model):
    """Of the gradient of the (tied) head, and of the first layer's down projection; one is all there is without a head."""
    named, ends = dict(model.named_parameters()), ("embed_tokens.weight", "0.mlp.down_proj.weight")
    wanted = [next(p for name, p in named.items() if name.endswith(end)) for end in ends]
    return [p.grad.float().norm().item() for p in wanted if p.grad is not None]


def no_reward(completions, **_):
    return [0.0] * len(completions)


def measure(trainer_of, variant, length, layers, rounds) -> dict:
    """In this very process, which should be a fresh one; ``trainer_of`` gives a trainer and its loss of a batch."""
    clock = clocks.here()
    with tempfile.TemporaryDirectory() as folder:
        trainer, loss_of = trainer_of(variant, layers, folder)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        config, losses = trainer.model.config, []

        def step(inputs):
            loss = loss_of(inputs)
            trainer.accelerator.backward(loss)
            if len(losses) == first:
                gradients.extend(_norms(trainer.model))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            losses.append(float(loss.detach()))

        on_device = lambda batch: {name: x.to(trainer.accelerator.device) for name, x in batch.items()}  # noqa: E731
        small, inputs = on_device(batch_of(config, 8)), on_device(batch_of(config, length))
        held, gradients, first = clock.held(), [], -1
        step(small)
        if clock.device.type == "cuda":
            step(inputs)
        first = len(losses)
        times, peak = clock.peak(lambda: [clock.seconds(Timed(lambda: step(inputs))) for _ in range(rounds)], held)
    kept = int(inputs["completion_mask"].sum())
    shape = {"tokens": kept, "length": length, "sequences": SEQUENCES, "depth": config.hidden_size, "vocab": config.vocab_size,
             "layers": config.num_hidden_layers, "dtype": "bfloat16"}  # fmt: skip
    return {"shape": shape, "times": times, "peak_bytes": peak, "losses": losses[-rounds:], "gradients": gradients}


if __name__ == "__main__":
    answer(measure(own_trainer, *json.loads(sys.argv[1])))
