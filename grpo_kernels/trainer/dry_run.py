"""What a run would do, before it does it: model, tokens of a step, memory of the loss by the planner's formula, operations.

Then its first minute in small: a rollout of short completions, their rewards, loss and gradients, the optimiser, an evaluation.
"""

import inspect
from dataclasses import replace

import huggingface_hub
import torch
from transformers.trainer_utils import unwrap_peft_model

from .. import backends
from ..engine import plan
from ..engine.products import tile_dtype
from ..integrations.transformers import lm_head
from ..losses.objective import depends_on_its_row_alone
from .resume import state_of
from .rewards import RESERVED, reward_names
from .rollout import tokenize
from .run_checks import named_datasets

_FIRST = 1000  # rows of data that are looked at; more would be waited for
_SAMPLED = 8  # tokens of a completion
_OF_ENDED = [f"completions/{kind}_terminated_length" for kind in ("mean", "min", "max")]


def forgo_hub(args):
    """transformers' Trainer would make the repository as soon as it is made itself; raises ValueError if it could not."""
    if args.push_to_hub and not (args.hub_token or huggingface_hub.get_token()):
        raise ValueError("push_to_hub needs a token of the hub: give hub_token, or log in with `hf auth login`")
    args.push_to_hub = False


def check(trainer):
    """Of every run before its first step: the columns that rewards need, a first prompt of each data set, optimiser and schedule.

    Raises:
        ValueError: naming the reward and the column that it lacks.
        Exception: whatever making a prompt's tokens, the optimiser or the schedule raises.
    """
    args = trainer.args
    for data in (trainer.train_dataset, *named_datasets(trainer.eval_dataset).values()):
        columns = [] if args.remove_unused_columns else _columns(data)
        for name, function in zip(reward_names(trainer.reward_funcs), trainer.reward_funcs, strict=True):
            _check_signature(name, function, columns)
        tokenize(trainer.processing_class, [data[0]["prompt"]], args.chat_template_kwargs)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # whose optimiser is that of the sharded model
        return
    trainer.create_optimizer()  # the one of the run: some hang hooks on the parameters, which a second one would not replace
    # its schedule is tried on another, whose learning rate it may change
    trainer.create_scheduler(trainer.planned_steps(), torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate))
    trainer.lr_scheduler = None


def describe(trainer):
    """Lines. The first thousand prompts are tokenised, and the first rollout is rehearsed: no weight changes, nothing is written.

    Raises:
        ValueError: naming what in the data cannot be trained on, a checkpoint that cannot be resumed.
        Exception: whatever the run would end with in its first minute.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    causal_lm = unwrap_peft_model(model)
    head, tokenizer = lm_head(causal_lm), trainer.processing_class
    V, D = head.weight.shape
    total = sum(p.numel() for p in model.parameters())
    trained = trainer.get_num_trainable_parameters()
    yield f"model      {type(causal_lm).__name__}, {_count(total)} parameters, {_count(trained)} trained, {_names(model)}"
    yield f"head       vocabulary {V}, hidden size {D}" + (", an adapter on it" if head.lora else "") + (
        "" if head.weight.requires_grad else ", frozen")  # fmt: skip

    data = trainer.train_dataset
    prompts = tokenize(tokenizer, [row["prompt"] for row in _first_rows(data)], args.chat_template_kwargs)
    lengths, highest = [len(ids) for ids in prompts], max(map(max, prompts))
    if highest >= V:
        raise ValueError(f"the tokenizer must be the model's, got token {highest} of a prompt and a vocabulary of {V}")
    columns = _columns(data) or "none"
    yield f"data       {len(data)} prompts of up to {max(lengths)} tokens (first {len(prompts)}); other columns: {columns}"
    yield f"rewards    {', '.join(reward_names(trainer.reward_funcs))}"
    checkpoint = trainer.checkpoint_to_resume(args.resume_from_checkpoint)
    if args.resume_from_checkpoint:
        yield f"resumes    from {checkpoint or 'nothing: it begins anew'}"

    groups = args.generation_batch_size // args.num_generations
    steps = trainer.planned_steps()
    yield (f"rollout    {groups} prompts x {args.num_generations} completions of up to {args.max_completion_length} tokens, "
           f"for {args.steps_per_rollout} optimiser step{'s' * (args.steps_per_rollout != 1)}")  # fmt: skip
    cuts, keeps = args.truncations, args.keeps_sampling_mask
    if cuts or keeps:
        over = "tokens that this leaves" if keeps else "whole vocabulary (keep_sampling_mask is off)"
        named = ", ".join(f"{name} {value}" for name, value in cuts.items()) or "no truncation"
        yield f"sampling   {named}; the loss is over the {over}"
    if args.rollout_server:
        at_once = args.rollout_server_requests
        yield f"sampler    {args.rollout_server}; new weights by {args.rollout_server_reload}, {at_once} requests at once"
    rows_of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens = rows_of_step * (max(lengths) + args.max_completion_length)
    kept = rows_of_step * args.max_completion_length
    yield (f"step       {rows_of_step * args.world_size} completions, up to {tokens * args.world_size:,} tokens, of which "
           f"{kept * args.world_size:,} have a loss; {steps} step{'s' * (steps != 1)}")  # fmt: skip

    weight, live = head.weight, args.per_device_train_batch_size * args.max_completion_length
    needs_weight = weight.requires_grad or (head.lora is not None and head.lora[1].requires_grad)
    backend = backends.resolve(args.backend, weight.device, weight.dtype, V)
    budget = plan.default_budget(weight.device.type)
    two_phases = not depends_on_its_row_alone(trainer.loss_config, on_policy=args.steps_per_rollout == 1)
    exact, size = trainer.loss_config.exact_kl, torch.bfloat16.itemsize if args.bf16 else weight.element_size()
    problem = plan.Problem(
        live, 0, V, D, weight.element_size(), tile_dtype(weight, backend).itemsize, True, needs_weight, budget, two_phases,
        device=plan.device_of(weight.device), teacher_depth=D * exact, teacher_size=size * exact,
    )  # fmt: skip
    peak = plan.peak_bytes(problem, live)
    logits = live * V * (weight.element_size() + 12)
    whole, instead = "", ""
    if keeps:
        one, two = (plan.peak_bytes(replace(problem, pairs=size * live), live) for size in (1, 2))  # linear in the pairs
        whole = " over the whole vocabulary"
        instead = f"; over supports {_bytes(2 * one - two)} and {(two - one) // live} bytes a token in them"
    yield (f"the loss   at most {_bytes(peak)} of memory on top of its inputs, gradients included, per micro-batch of {live:,} "
           f"tokens{whole}; through logits some {_bytes(logits)}{instead}")  # fmt: skip
    if exact:
        states = args.generation_batch_size // args.world_size * args.max_completion_length
        yield (f"reference  its last hidden states of {states:,} tokens are kept with a rollout of each process: "
               f"{_bytes(states * D * size)} at full length")  # fmt: skip
    body = total - V * D * (1 if causal_lm.config.get_text_config().tie_word_embeddings else 2)  # embeddings are only looked up
    passes = 8 if args.gradient_checkpointing else 6
    products = (3 if needs_weight else 2) + exact  # the reference's logits
    in_head = f"{'at most ' * keeps}{_flops(2 * products * V * D * kept)}"
    sampling = "" if args.rollout_server else f"{_flops(2 * body * tokens + 2 * V * D * kept)} to sample, "
    yield (f"operations {sampling}{_flops(passes * body * tokens)} in the body and "
           f"{in_head} in the head, per step and process, at full length")  # fmt: skip

    longest = max(lengths) + args.max_completion_length
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        yield f"note       up to {longest} tokens in a row, more than the {positions} positions of the model"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        yield "rehearsed  nothing: a sharded model is made when training begins"
        return
    if checkpoint:
        trainer.state = state_of(checkpoint)
    if trainer.state.global_step >= steps:
        yield f"rehearsed  nothing: {checkpoint} has taken all {steps} steps of the run"
        return
    evaluated = named_datasets(trainer.eval_dataset)
    _rehearse(trainer, steps, checkpoint, evaluated)
    yield "rehearsed  a rollout of short completions, rewards, loss, gradients, optimiser" + (", evaluation" if evaluated else "")


def _rehearse(trainer, steps, checkpoint, evaluated):
    """What `trainer.train` does first. Raises as it would."""
    args, count = trainer.args, trainer.args.gradient_accumulation_steps
    whole, args.max_completion_length = args.max_completion_length, min(_SAMPLED, args.max_completion_length)
    trainer.create_optimizer_and_scheduler(steps)
    try:
        if checkpoint:
            trainer._load_from_checkpoint(checkpoint)
            trainer._load_optimizer_and_scheduler(checkpoint)
        batches, _ = trainer.get_batch_samples(iter(range(count)), count, args.device)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batches[0])
        loss.backward()
        trainer.model.zero_grad(set_to_none=True)
        seen = {f"eval_{name}" for part in evaluated for name in _evaluate(trainer, part, evaluated[part])}
        if args.max_completion_length < whole:  # none of the short ones may have come to its end
            seen |= {f"eval_{part}_{name}".replace("__", "_") for part in evaluated for name in _OF_ENDED}
    finally:
        args.max_completion_length, trainer.optimizer, trainer.lr_scheduler = whole, None, None
    best = args.metric_for_best_model
    if best is not None and evaluated and f"eval_{best.removeprefix('eval_')}" not in seen:
        raise ValueError(f"metric_for_best_model must be one of the evaluation's, got {best!r}; known: {', '.join(sorted(seen))}")


def _evaluate(trainer, part, data):
    """Names of the metrics that one round on an evaluation set reports."""
    trainer.model.eval()
    try:
        trainer._evaluate_round(data)
    finally:
        trainer.model.train()
    return [f"{part}_{name}".lstrip("_") for name in trainer._metrics["eval"].take(trainer.accelerator.gather)]


def _first_rows(data):
    return [data[i] for i in range(min(len(data), _FIRST))]


def _columns(data):
    return sorted({name for row in _first_rows(data) for name in row} - {"prompt"})


def _check_signature(name, function, columns):
    """Of a reward function whose signature says what it wants."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a wrapper may supply what is behind it
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if missing := sorted(needed - {*RESERVED, *columns}):
        raise ValueError(f"reward {name!r} needs the columns {missing}, the data has {columns}")
    try:
        signature.bind(**dict.fromkeys([*RESERVED, *columns]))
    except TypeError as error:
        raise ValueError(f"reward {name!r} must take {', '.join(RESERVED)} and the columns {columns} by name: {error}") from error


def _names(model):
    return "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _count(n):
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _bytes(n):
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def _flops(n):
    return f"{n / 1e12:.3g} TFLOP"
