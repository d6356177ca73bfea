"""What a run would do, before it does it: model, tokens of a step, memory of the loss by the planner's formula, operations."""

import inspect

from .. import backends
from ..engine import plan
from ..engine.products import tile_dtype
from ..integrations.transformers import lm_head
from ..loss import coefficients_depend_on_their_row_alone
from .rewards import RESERVED, reward_names
from .rollout import tokenize

_TOKENISED = 1000  # rows of data whose prompts are tokenised; more would be waited for


def describe(trainer):
    """Lines. The first thousand prompts are tokenised.

    Raises:
        ValueError: naming what in the data cannot be trained on, a column that a reward lacks, a checkpoint that cannot be resumed.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, tokenizer = lm_head(causal_lm), trainer.processing_class
    V, D = head.weight.shape
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield f"model      {type(causal_lm).__name__}, {_count(total)} parameters, {_count(trained)} trained, {_names(model)}"
    yield f"head       vocabulary {V}, hidden size {D}" + (", an adapter on it" if head.lora else "") + (
        "" if head.weight.requires_grad else ", frozen")  # fmt: skip

    data = trainer.train_dataset
    rows = [data[i] for i in range(min(len(data), _TOKENISED))]
    lengths = [len(ids) for ids in tokenize(tokenizer, [row["prompt"] for row in rows], args.chat_template_kwargs)]
    columns = sorted({name for row in rows for name in row} - {"prompt"})
    yield f"data       {len(data)} prompts of up to {max(lengths)} tokens (first {len(rows)}); other columns: {columns or 'none'}"
    names = reward_names(trainer.reward_funcs)
    for name, function in zip(names, trainer.reward_funcs, strict=True):
        _check_columns(name, function, columns)
    yield f"rewards    {', '.join(names)}"
    if args.resume_from_checkpoint:
        yield f"resumes    from {trainer.checkpoint_to_resume(args.resume_from_checkpoint)}"

    prompts = args.generation_batch_size // args.num_generations
    steps = trainer.planned_steps()
    yield (f"rollout    {prompts} prompts x {args.num_generations} completions of up to {args.max_completion_length} tokens, "
           f"for {args.steps_per_rollout} optimiser steps")  # fmt: skip
    rows_of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens = rows_of_step * (max(lengths) + args.max_completion_length)
    kept = rows_of_step * args.max_completion_length
    yield (f"step       {rows_of_step * args.world_size} completions, up to {tokens * args.world_size:,} tokens, of which "
           f"{kept * args.world_size:,} have a loss; {steps} steps")  # fmt: skip

    weight, live = head.weight, args.per_device_train_batch_size * args.max_completion_length
    needs_weight = weight.requires_grad or (head.lora is not None and head.lora[1].requires_grad)
    backend = backends.resolve("auto", weight.device, weight.dtype, V)
    budget = plan.default_budget(weight.device.type)
    two_phases = not coefficients_depend_on_their_row_alone(trainer.loss_config, on_policy=args.steps_per_rollout == 1)
    problem = plan.Problem(
        live, 0, V, D, weight.element_size(), tile_dtype(weight, backend).itemsize, True, needs_weight, budget, two_phases,
        device=plan.device_of(weight.device),
    )  # fmt: skip
    peak = plan.peak_bytes(problem, live)
    logits = live * V * (weight.element_size() + 12)
    yield (f"the loss   at most {_bytes(peak)} of memory on top of its inputs, gradients included, per micro-batch of {live:,} "
           f"tokens; through logits some {_bytes(logits)}")  # fmt: skip
    body = total - V * D * (1 if causal_lm.config.get_text_config().tie_word_embeddings else 2)  # embeddings are only looked up
    passes = 8 if args.gradient_checkpointing else 6
    products = 3 if needs_weight else 2
    yield (f"operations {_flops(2 * body * tokens + 2 * V * D * kept)} to sample, {_flops(passes * body * tokens)} in the body and "
           f"{_flops(2 * products * V * D * kept)} in the head, per step and process, at full length")  # fmt: skip


def _check_columns(name, function, columns):
    """Of a reward function whose signature says what it wants."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if missing := sorted(needed - {*RESERVED, *columns}):
        raise ValueError(f"reward {name!r} needs the columns {missing}, the data has {columns}")


def _names(model):
    return "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _count(n):
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _bytes(n):
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def _flops(n):
    return f"{n / 1e12:.3g} TFLOP"

