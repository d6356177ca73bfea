"""Runs of TRL's trainers on tiny models, and what must agree between two of them."""

import math
import types

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from trl.kernels import chunked_logprob  # noqa: E402

from grpo_kernels import TokenSupport  # noqa: E402
from grpo_kernels.trainer.demo import make_tokenizer  # noqa: E402
from support.tiny_trainer import DATA, digit_sum, tiny_model, weights  # noqa: E402

STOCK = chunked_logprob.ChunkedLogProbFunction
TIMES = ("time", "runtime", "per_second", "epoch", "flos", "mfu", "tokens_per")


def saved(folder, name="llama", **options):
    """Path of a tiny model with its tokenizer: TRL loads its reference from where the model came from."""
    path = folder / (name + "".join(f"-{k}-{v}" for k, v in options.items() if not isinstance(v, type)))
    if not path.exists():
        tiny_model(**options).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return str(path)


def grpo(trainer, folder, model, mixin=None, peft=None, evaluate=False, seed=7, resume=None, more=None, **options):
    """({name: [value of each log]}, weights after training) of a run."""
    defaults = dict(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=3,
        logging_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=6, learning_rate=0.3, optim="sgd", max_grad_norm=0.0,
        gradient_checkpointing=False, temperature=0.9, seed=seed, epsilon=0.02, lr_scheduler_type="constant",
        generation_kwargs={"eos_token_id": [1, 3, 4, 5, 6]},
    )  # fmt: skip
    kind = trainer if mixin is None else type("Mixed", (mixin, trainer), {})
    data = Dataset.from_list(DATA)
    given = dict(model=model, reward_funcs=digit_sum, args=trl.GRPOConfig(**{**defaults, **options}), train_dataset=data, peft_config=peft,
                 eval_dataset=data.select(range(4)) if evaluate else None, processing_class=make_tokenizer())  # fmt: skip
    t = kind(**given | (more or {}))
    return finish(t, evaluate, resume)


def finish(t, evaluate=False, resume=None):
    t.train(resume_from_checkpoint=resume)
    if evaluate:
        t.evaluate()
    logs = {}
    for record in t.state.log_history:
        for name, value in record.items():
            if not any(part in name for part in TIMES):
                logs.setdefault(name, []).append(value)
    return logs, weights(t.accelerator.unwrap_model(t.model))


def assert_same(first, second, tolerance=2e-4):
    """Logs by name and value; weights, which moved, to a small part of their movement."""
    assert first[0].keys() == second[0].keys()
    for name, values in first[0].items():
        for a, b in zip(values, second[0][name], strict=True):
            assert (a is None) == (b is None) or math.isnan(a or b), name
            if a is not None and not (math.isnan(a) and math.isnan(b)):
                assert abs(a - b) <= tolerance * max(1.0, abs(a)), (name, values, second[0][name])
    assert (first[1] - second[1]).abs().max() <= tolerance


OFF_POLICY = dict(num_iterations=2, beta=0.05, max_steps=4)
MODELS = {
    "gemma": dict(config=Gemma2Config, model=Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8,
                  num_key_value_heads=2),
    "granite": dict(config=GraniteConfig, model=GraniteForCausalLM, logits_scaling=3.0),
    "cohere": dict(config=Cohere2Config, model=Cohere2ForCausalLM, logit_scale=0.3),
    "phi": dict(config=PhiConfig, model=PhiForCausalLM),
    "mixtral": dict(config=MixtralConfig, model=MixtralForCausalLM, num_local_experts=4, num_key_value_heads=2,
                    router_aux_loss_coef=0.1),
}  # fmt: skip


def rollouts(change=None, env=False):
    """A rollout_func of ragged completions. Nothing limits the second; with ``env`` the second token of each is not sampled."""

    def sample(prompts, trainer):
        g = torch.Generator().manual_seed(len(prompts))
        completions, found = [], []
        for i in range(len(prompts)):
            ids = torch.randint(7, 32, (2 + i % 4,), generator=g)
            left = (torch.rand(len(ids), 32, generator=g) < 0.2).scatter(1, ids.unsqueeze(1), True)
            if env and i == 0:
                left[1, ids[1]] = False
            support = TokenSupport.from_mask(left)
            completions.append(ids.tolist())
            pair = support.ids.tolist(), support.offsets.tolist()
            forms = pair, None, support, types.SimpleNamespace(token_ids=pair[0], offsets=pair[1])
            found.append(forms[min(i, 3)])
        output = {"prompt_ids": [[2, 3]] * len(prompts), "completion_ids": completions, "logprobs": None}
        if env:
            output["env_mask"] = [[int(t != 1) for t in range(len(ids))] for ids in completions]
        return output | {"sampling_mask": found if change is None else change(found)}

    return sample
