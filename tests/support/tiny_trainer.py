"""GRPOTrainer on a model of one layer and sums of a few digits: its data, its options, its weights."""

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from grpo_kernels.trainer import GRPOConfig, GRPOTrainer
from grpo_kernels.trainer.demo import make_tokenizer

TINY = dict(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
DATA = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (1, 23, 456) for b in (1, 5, 9)]


def tiny_model(seed=0, config=LlamaConfig, model=LlamaForCausalLM, **options):
    set_seed(seed)
    model = model(config(**{**TINY, **options}))
    model.generation_config.eos_token_id = [1, 3, 4, 5, 6]  # so that random completions end, too
    return model


def config(folder, **options):
    defaults = dict(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=2, logging_steps=1,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=5, learning_rate=1e-2, max_grad_norm=0.0,
    )  # fmt: skip
    return GRPOConfig(**{**defaults, **options})


def digit_sum(completions, **_):
    """A reward that differs between most completions of a random model."""
    return [sum(ord(c) for c in text) % 7 / 7 for text in completions]


def trainer(folder, model=None, rewards=digit_sum, data=DATA, **options):
    keywords = {k: options.pop(k) for k in ("eval_dataset", "peft_config", "callbacks") if k in options}
    model = tiny_model() if model is None else model
    return GRPOTrainer(model, rewards, config(folder, **options), data, processing_class=make_tokenizer(), **keywords)


def weights(model):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().double().flatten() for p in whole])


def next_micro_batches(t):
    """The micro-batches of the step that `t` would take now."""
    accumulation = t.args.gradient_accumulation_steps
    return t.get_batch_samples(iter(range(accumulation)), accumulation, t.args.device)[0]


def model_inputs(batch):
    attention = batch["attention_mask"]
    return {"input_ids": batch["input_ids"], "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
