"""Prompts in, completions out: tokenise, pad on the left, sample with transformers' generate, mask behind the first EOS."""

import contextlib
import random
from typing import NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, generation, set_seed
from transformers.trainer_utils import unwrap_peft_model


class Completions(NamedTuple):
    """B sampled completions of at most T tokens behind prompts of at most P tokens, padded to [P | T]."""

    input_ids: torch.Tensor  # [B, P + T]
    attention_mask: torch.Tensor  # [B, P + T], 0 on the padding left of prompts and right of completions
    mask: torch.Tensor  # [B, T] bool, True up to and including the first EOS
    terminated: torch.Tensor  # [B] bool, an EOS was sampled
    logps: torch.Tensor | None = None  # [B, T] float32, of a sampler that tells them; 0 where the mask is False


@contextlib.contextmanager
def seeded(*key):
    """Random numbers inside the block depend on ``key`` alone, and those after it do not depend on the block.

    So the n-th rollout of a run is the same whether or not the run was interrupted before it.
    """
    seed = random.Random(repr(key)).getrandbits(32)
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def tokenize(tokenizer, prompts, chat_template_kwargs=None) -> list[list[int]]:
    """Token ids of each prompt: a string as it is, a list of messages through the chat template."""
    ids = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            try:
                text = tokenizer.apply_chat_template(
                    prompt, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
                )
            except ValueError as error:
                if getattr(tokenizer, "chat_template", "") is not None:
                    raise
                name = tokenizer.name_or_path
                raise ValueError(f"the data's prompts are messages, and the tokenizer of {name!r} has no chat template") from error
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them
        else:
            ids.append(tokenizer(prompt)["input_ids"])
        if not ids[-1]:
            raise ValueError(f"prompt {prompt!r} has no tokens")
    return ids


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion, by the model's generation config and by the tokenizer."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})


def sampling_config(args, model, tokenizer) -> GenerationConfig:
    """How completions are drawn: from the distribution the loss sees, unless an option of the sampling narrows or bends it."""
    eos = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0] if eos else 0
    options = dict(
        do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, use_cache=True,
        max_new_tokens=args.max_completion_length, eos_token_id=eos or None, pad_token_id=pad,
        repetition_penalty=args.repetition_penalty, min_p=args.min_p, num_beams=1,
    )  # fmt: skip
    return GenerationConfig(**options | (args.generation_kwargs or {}))


@torch.no_grad()
def sample(model, prompt_ids: list[list[int]], config: GenerationConfig, synced_gpus=False, continuous=None) -> Completions:
    """One completion per row of ``prompt_ids``, sampled in eval mode; the model's mode is restored.

    With ``synced_gpus`` all processes run the model equally often, as a sharded one needs. With ``continuous``, options of
    ContinuousBatchingConfig, a completion that has ended makes room for the next (transformers' engine, on a paged cache).
    """
    width = max(map(len, prompt_ids))
    pads = [width - len(ids) for ids in prompt_ids]
    ids = torch.tensor([[config.pad_token_id] * n + row for n, row in zip(pads, prompt_ids, strict=True)])
    attention = torch.arange(width) >= torch.tensor(pads).unsqueeze(1)
    ids, attention = ids.to(model.device), attention.to(model.device).long()
    training, causal_lm = model.training, unwrap_peft_model(model)
    own, causal_lm.generation_config = causal_lm.generation_config, GenerationConfig()  # would fill in what ``config`` leaves open
    model.eval()
    try:
        if continuous is not None:
            full = torch.cat([ids, _sampled_continuously(model, prompt_ids, config, continuous).to(ids)], 1)
        else:
            # one token at a time, whose experts transformers would set against the mask of the whole row
            routers = getattr(causal_lm.config.get_text_config(), "output_router_logits", False)
            options = {"output_router_logits": False} if routers else {}
            options |= {"attention_mask": attention, "generation_config": config, "synced_gpus": synced_gpus}
            full = model.generate(input_ids=ids, **options)
    finally:
        model.train(training)
        causal_lm.generation_config = own
    mask, terminated = completion_mask(full[:, width:], config.eos_token_id)
    return Completions(full, torch.cat([attention, mask.long()], dim=1), mask, terminated)


def _sampled_continuously(model, prompt_ids, config, options):
    """[B, T] ids of the completions, padded on the right."""
    attention = model.config._attn_implementation
    try:
        engine = {"continuous_batching_config": generation.ContinuousBatchingConfig(**options)} if options else {}
        found = model.generate_batch(prompt_ids, generation_config=config, progress_bar=False, **engine)
    finally:
        model.set_attn_implementation(attention)  # the engine leaves its own, paged one behind
    if len(found) != len(prompt_ids):
        raise RuntimeError(f"continuous batching answered {len(found)} of {len(prompt_ids)} prompts")
    if errors := [output.error for output in found.values() if output.error]:
        raise RuntimeError(f"continuous batching failed for {len(errors)} prompts: {errors[0]}")
    rows = [output.generated_tokens for output in found.values()]  # in the order of the prompts
    longest = max(map(len, rows))
    return torch.tensor([row + [config.pad_token_id] * (longest - len(row)) for row in rows])


def completion_mask(completion_ids, eos_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids -> (True up to and including the first EOS [B, T], whether there is one [B])."""
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids or [-1], device=completion_ids.device))
    return (is_eos.cumsum(1) - is_eos.long()) == 0, is_eos.any(1)


def length_metrics(drawn: Completions) -> dict[str, torch.Tensor]:
    """Lengths in tokens of all completions and of those that ended by themselves (nan if none did), by TRL's names."""
    lengths = drawn.mask.sum(1).float()
    metrics = {"completions/clipped_ratio": 1 - drawn.terminated.float().mean()}
    ended = lengths[drawn.terminated] if drawn.terminated.any() else lengths.new_full((1,), float("nan"))
    for name, of in (("length", lengths), ("terminated_length", ended)):
        metrics |= {
            f"completions/mean_{name}": of.mean(),
            f"completions/min_{name}": of.min(),
            f"completions/max_{name}": of.max(),
        }
    return metrics
