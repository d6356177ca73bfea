"""GRPO in one sitting: rollout, reward, advantage, loss, step.

1. Rollout. For each prompt, sample G completions from the policy as it is now.
2. Reward. Reward functions score every completion with a number.
3. Advantage. A completion is good or bad only beside the others of its prompt: subtract the group's mean reward and divide
   by its standard deviation. No value network is needed.
4. Loss. Raise the probability of each token of a completion with a positive advantage and lower it for a negative one, as
   long as the policy stays within the clip range of the one that sampled (and near a reference, if beta > 0). The logits this
   takes are never made: the model hands its last hidden states at the completion's positions, and its output layer, to
   `fused_linear_grpo_loss`.
5. Step. `transformers.Trainer` accumulates gradients, clips, steps, schedules, logs, saves and resumes. The same rollout may
   serve several steps (`steps_per_generation`, `num_iterations`); its log-probs at sampling time are then kept as `old_logps`.

A run is a function of its arguments: the n-th rollout takes the n-th stretch of prompts and its own random numbers, both
computed from seed and n. A checkpoint holds a rollout that is still being trained on, so a resumed run continues bit by bit.

On several processes (DDP, FSDP2, DeepSpeed; examples/accelerate) each samples and trains on its share of a rollout. Which
completions a step takes, their advantages, the loss and the logged metrics are those of one process with the whole batch;
only the dice are rolled by each process for itself. Groups may straddle processes.
"""

import contextlib
import copy
import dataclasses
import inspect
import math
import os
from collections import defaultdict

import torch
from accelerate.utils import DistributedType, fsdp2_prepare_model, gather_object
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from ..advantages import group_advantages
from ..integrations.transformers import fuse_lm_head, lm_head
from ..logprobs import linear_logprobs
from ..loss import fused_linear_grpo_loss
from .config import GRPOConfig
from .rewards import reward_metrics, reward_names, score
from .rollout import joined, length_metrics, sample, sampling_config, seeded, tokenize


class GRPOTrainer(Trainer):
    """`transformers.Trainer` that learns from rewards.

    Args:
        model: a causal LM, or the path or name to load one from.
        reward_funcs: one function or a list, each ``f(prompts, completions, completion_ids, **columns) -> list``
            of numbers or None; ``columns`` are the dataset's columns other than ``prompt``, one entry per completion.
        args: `GRPOConfig`.
        train_dataset: rows with a ``prompt``, a string or a list of messages; anything with a length and integer indices
            that gives dicts (`datasets.Dataset`, a list of dicts).
        eval_dataset: likewise, or None.
        processing_class: tokenizer; None loads it from the model's path.
        peft_config: a PEFT configuration to wrap the model with; the reference is then the model without its adapters.
        callbacks: of transformers.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """

    # the loss of a micro-batch is its own; Trainer takes the mean over the micro-batches of a step
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model,
        reward_funcs,
        args: GRPOConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
    ):
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args must be a GRPOConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(f"one process trains on one GPU, got {args.n_gpu}: start with torchrun, or show it one GPU")
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not self.reward_funcs or not all(map(callable, self.reward_funcs)):
            raise TypeError(f"reward_funcs must be a function or a list of functions, got {reward_funcs!r}")
        if args.reward_weights is not None and len(args.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one weight for each of {len(self.reward_funcs)} reward functions, "
                f"got {args.reward_weights}"
            )
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            _check_dataset(name, data)
        if isinstance(model, (str, os.PathLike)):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
        if processing_class is None:
            raise ValueError("processing_class must be a tokenizer when the model is not given by its path, got None")
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        if peft_config is not None:
            import peft

            model = peft.get_peft_model(model, peft_config)
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        reference = None
        if args.beta != 0 and causal_lm is model:
            reference = fuse_lm_head(copy.deepcopy(model).eval().requires_grad_(False))
        fuse_lm_head(causal_lm)
        if args.gradient_checkpointing and causal_lm is not model:
            model.enable_input_require_grads()  # frozen embeddings would cut the checkpointed layers off the graph

        self.loss_config = _with_head_factors(args, lm_head(causal_lm))
        self._takes_position_ids = "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters
        self._rollout, self._rollout_index, self._order = None, None, None
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version must be 2, got 1: set it in the accelerate config or in fsdp_config")
        if reference is not None and self.accelerator.is_fsdp2:  # prepare_model would leave it whole, and on the CPU
            reference = fsdp2_prepare_model(self.accelerator, reference)
        elif reference is not None:
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.ref_model = reference

    # ---- 1. rollout ----

    def get_train_dataloader(self):
        """One item per micro-batch and device. It only counts: `get_batch_samples` makes the micro-batches from prompts."""
        self._rollout = None
        rollouts = math.ceil(len(self.train_dataset) * self.args.num_generations / self.args.generation_batch_size)
        micro_batches = rollouts * self.args.num_iterations * self.args.steps_per_generation
        return DataLoader(range(micro_batches), collate_fn=list)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of the next optimiser step, from the current rollout or a new one."""
        for _ in range(num_batches):
            next(epoch_iterator)
        index, step = divmod(self.state.global_step, self.args.steps_per_rollout)
        if self._rollout is None or self._rollout_index != index:
            self._rollout, self._rollout_index = self._new_rollout(index), index
        micro_batches = self._split(self._rollout)
        first = step * num_batches % len(micro_batches)
        micro_batches = micro_batches[first : first + num_batches]
        # DDP and gradient accumulation both average, so this divisor is the mean over micro-batches and processes
        kept = torch.stack([batch["mask"].sum() for batch in micro_batches]).float().mean()
        kept = self.accelerator.reduce(kept, reduction="mean")
        return [{**batch, "num_items": kept} for batch in micro_batches], None

    def _split(self, batch):
        parts = {k: v.split(self.args.per_device_train_batch_size) for k, v in batch.items() if v is not None}
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def _new_rollout(self, index):
        """Tensors of this process's share of rollout ``index``, one row per completion."""
        args, rank = self.args, self.args.process_index
        groups = args.generation_batch_size // args.num_generations
        layout = self._layout()
        rows = [self._nth_row(index * groups + i // args.num_generations) for i in layout[rank].tolist()]
        with seeded(args.seed, "rollout", index, rank):
            batch, rewards = self._sample_and_score(rows, "train")
        layout, gathered = layout.to(rewards.device), self.accelerator.gather(rewards)
        rewards = torch.empty_like(gathered).index_copy(0, layout.flatten(), gathered)
        group_ids = torch.arange(groups, device=rewards.device).repeat_interleave(args.num_generations)
        batch["advantages"] = self._advantages(rewards, group_ids, "train")[layout[rank]]
        if args.steps_per_rollout > 1:
            # in training mode, dropout included, as the loss will be; its draws must not depend on what a checkpoint forgets
            self.model.train()
            with seeded(args.seed, "old_logps", index, rank):
                batch["old_logps"] = self._logps(self.model, batch)
        self.state.num_input_tokens_seen += self.accelerator.reduce(batch["attention_mask"].sum(), "sum").item()
        return batch

    def _layout(self):
        """[processes, share] completions of a rollout by number. A step takes one stretch of them, however many processes."""
        args = self.args
        numbers = torch.arange(args.generation_batch_size).view(-1, args.world_size, args.per_device_train_batch_size)
        return numbers.transpose(0, 1).flatten(1)

    def _nth_row(self, n):
        """Row ``n`` of the endless stream of prompts: epoch after epoch, each in an order of its own."""
        epoch, position = divmod(n, len(self.train_dataset))
        if self.args.shuffle_dataset:
            if self._order is None or self._order[0] != epoch:
                seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
                generator = torch.Generator().manual_seed(seed + epoch)
                self._order = epoch, torch.randperm(len(self.train_dataset), generator=generator).tolist()
            position = self._order[1][position]
        return self.train_dataset[position]

    def _sample_and_score(self, rows, mode, counts=True):
        """Sample one completion per row; returns the model's inputs for them and their rewards [B, K]."""
        prompts = [row["prompt"] for row in rows]
        tokenizer = self.processing_class
        prompt_ids = tokenize(tokenizer, prompts, self.args.chat_template_kwargs)
        causal_lm = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        # a sharded model is gathered in every forward, so all processes sample until the last one has done
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        drawn = sample(causal_lm, prompt_ids, sampling_config(self.args, causal_lm, tokenizer), synced_gpus=sharded)
        completion_ids = [
            ids[kept].tolist() for ids, kept in zip(drawn.input_ids[:, -drawn.mask.shape[1] :], drawn.mask, strict=True)
        ]
        completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        names = {name for row in rows for name in row} - {"prompt"}
        columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
        if self.args.remove_unused_columns:
            columns = {}
        with self._raising_together():
            rewards = score(self.reward_funcs, prompts, completions, completion_ids, columns).to(drawn.mask.device)
        for name, value in length_metrics(drawn).items():
            self._record({name: value}, mode, counts * (drawn.terminated.sum() if "terminated" in name else len(rows)))
        batch = {"input_ids": drawn.input_ids, "attention_mask": drawn.attention_mask, "mask": drawn.mask}
        if self.args.beta != 0:
            batch["ref_logps"] = self._reference_logps(batch)
        return batch, rewards

    # ---- 2. and 3. reward and advantage ----

    @contextlib.contextmanager
    def _raising_together(self):
        """Where one process raises, all of them do, naming it, instead of waiting for it in the next collective."""
        error = None
        try:
            yield
        except Exception as raised:
            if self.args.world_size == 1:
                raise
            error = raised
        if self.args.world_size > 1:
            said = error and f"rank {self.args.process_index} raised {type(error).__name__}: {error}"
            errors = [text for text in gather_object([said]) if text]
            if errors:
                raise RuntimeError("; ".join(errors)) from error

    def _advantages(self, rewards, group_ids, mode):
        """[B, K] rewards of whole groups, the same on all processes -> [B] advantages."""
        args, weights = self.args, None
        if args.reward_weights is not None:
            weights = torch.tensor(args.reward_weights, device=rewards.device)
        self._record(reward_metrics(rewards, group_ids, weights, reward_names(self.reward_funcs)), mode, len(rewards))
        return group_advantages(
            rewards, group_ids, scale_rewards=args.scale_rewards, weights=weights,
            aggregation=args.multi_objective_aggregation,
        )  # fmt: skip

    # ---- 4. loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch, made inside the wrapped model's forward."""
        mask, made = inputs["mask"], []

        def loss(hidden, head):
            output = fused_linear_grpo_loss(
                _predicting(hidden, mask), head.weight, inputs["input_ids"][:, -mask.shape[1] :], inputs["advantages"], mask,
                bias=head.bias, lora=head.lora, old_logps=inputs.get("old_logps"), ref_logps=inputs.get("ref_logps"),
                num_items=inputs.get("num_items"), data_parallel_group=self._data_parallel_group, config=self.loss_config,
            )  # fmt: skip
            made.append(output)
            return output.loss

        loss = model(**self._model_inputs(inputs), fused_lm_head=loss)
        (output,) = made
        loss = loss + (output.loss.detach() - loss.detach())  # FSDP2 under bf16 rounds what a forward returns, log-probs too
        metrics = output.metrics if model.training else output.metrics | {"loss": loss.detach()}
        for name, value in metrics.items():
            self._record({name: value}, "train" if model.training else "eval", self._weight(name, inputs))
        return (loss, output) if return_outputs else loss

    def _weight(self, name, inputs):
        """What a metric of a micro-batch is a mean over: kept tokens, or sequences."""
        config, tokens, sequences = self.loss_config, inputs["mask"].sum(), inputs.get("sequences", len(inputs["mask"]))
        if name in ("loss", "policy_loss"):
            return sequences if "num_items" in inputs or config.loss_type in ("grpo", "sapo", "luspo", "dr_grpo") else tokens
        if name in ("entropy", "kl") or not (config.sequence_level or config.loss_type == "vespo"):
            return tokens
        return sequences

    @torch.no_grad()
    def _logps(self, model, batch):
        """Log-probs [B, T] of the sampled tokens, by the numerics, and in the micro-batches, that the loss will see."""
        config = self.loss_config
        parts = []
        for part in self._split(batch):
            mask = part["mask"]

            def logps(hidden, head, part=part, mask=mask):
                parts.append(linear_logprobs(
                    _predicting(hidden, mask), head.weight, part["input_ids"][:, -mask.shape[1] :], mask=mask, bias=head.bias,
                    lora=head.lora, temperature=config.temperature, logit_scale=config.logit_scale, softcap=config.softcap,
                ).logps)  # fmt: skip
                return parts[-1]

            with self.compute_loss_context_manager():
                model(**self._model_inputs(part), fused_lm_head=logps)
        return torch.cat(parts)

    def _reference_logps(self, batch):
        if self.ref_model is not None:
            return self._logps(self.ref_model, batch)
        with self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True).disable_adapter():
            return self._logps(self.model, batch)

    def _model_inputs(self, batch):
        attention_mask = batch["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": attention_mask, "use_cache": False}
        if self._takes_position_ids:  # as generate counts them: padding on the left has none
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return inputs

    @property
    def _data_parallel_group(self):
        return torch.distributed.group.WORLD if self.args.world_size > 1 else None

    # ---- 5. step: what transformers' Trainer does not know ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Sample ``num_generations_eval`` completions for every prompt of the evaluation set and average their metrics."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        args = self.args
        _check_dataset("eval_dataset", dataset, needed=True)
        repeats = args.num_generations_eval or args.num_generations
        each = max(args.per_device_eval_batch_size // repeats, 1)
        training = self.model.training
        self.model.eval()
        for first in range(0, len(dataset), each * args.world_size):
            numbers = range(first, min(first + each * args.world_size, len(dataset)))
            mine = numbers[each * args.process_index :][:each]
            # every process takes part in every round, if need be with a prompt of another one that does not count
            rows = [dataset[i] for i in mine or [first] for _ in range(repeats)]
            with seeded(args.seed, "eval", first, args.process_index), torch.no_grad():
                batch, rewards = self._sample_and_score(rows, "eval", counts=bool(mine))
                everywhere = rewards.new_zeros(each * repeats, rewards.shape[1])
                everywhere[: len(rewards)] = rewards
                rewards = self.accelerator.gather(everywhere)[: len(numbers) * repeats]
                group_ids = torch.arange(len(numbers), device=rewards.device).repeat_interleave(repeats)
                advantages = self._advantages(rewards, group_ids, "eval")
                own = advantages[each * repeats * args.process_index :][: len(rows)]
                batch["advantages"] = own if mine else advantages.new_zeros(len(rows))
                batch["sequences"] = len(mine) * repeats
                if not mine:
                    batch["mask"] = torch.zeros_like(batch["mask"])
                with self.compute_loss_context_manager():
                    self.compute_loss(self.model, batch)
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._mean_metrics("eval").items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self._mean_metrics("train") | {"num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    def _record(self, metrics, mode, weight):
        for name, value in metrics.items():
            self._metrics[mode][name].append((value.float(), torch.as_tensor(weight, device=value.device).float()))

    def _mean_metrics(self, mode):
        """Of all that was recorded since the last call, on all processes: means by weight, minima and maxima by name.

        One collective, of the same size on every process. What had no weight anywhere, or was nan, has no entry.
        """
        recorded, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        if not recorded:
            return {}
        rows = []
        for _, pairs in sorted(recorded.items()):
            values, weights = (torch.stack(x) for x in zip(*pairs, strict=True))
            counts = (weights > 0) & ~values.isnan()
            weights, values = weights.where(counts, 0.0), values.where(counts, 0.0)
            low, high = values.masked_fill(~counts, math.inf).amin(), values.masked_fill(~counts, -math.inf).amax()
            rows.append(torch.stack([(values * weights).sum(), weights.sum(), low, high]))
        everywhere = self.accelerator.gather(torch.stack(rows).unsqueeze(0))  # [processes, metrics, 4]
        sums, low, high = everywhere[..., :2].sum(0), everywhere[..., 2].amin(0), everywhere[..., 3].amax(0)
        metrics = {}
        figures = torch.stack([*sums.unbind(1), low, high], dim=1).tolist()
        for name, (total, weight, lowest, highest) in zip(sorted(recorded), figures, strict=True):
            if weight > 0:
                kind = next((word for word in ("min", "max") if name.endswith(f"_{word}") or f"/{word}_" in name), "mean")
                metrics[name] = {"mean": total / weight, "min": lowest, "max": highest}[kind]
        return metrics

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.state.global_step % self.args.steps_per_rollout:
            os.makedirs(output_dir, exist_ok=True)
            rows = self._layout()[self.args.process_index]
            saved = {"index": self._rollout_index, "rollout": self._rollout, "rows": rows, "processes": self.args.world_size}
            torch.save(saved, _rollout_file(output_dir, self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.state.global_step % self.args.steps_per_rollout:
            return

        def load(rank):
            path = _rollout_file(checkpoint, rank)
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"{path}: step {self.state.global_step} is amid a rollout, without which the run cannot go on as it was; "
                    f"resume from a checkpoint that holds it, or from a step divisible by {self.args.steps_per_rollout}"
                )
            return torch.load(path, map_location="cpu", weights_only=True)  # "cpu:0", a rank's device, is not known to it

        processes, rank = load(0)["processes"], self.args.process_index
        if processes == self.args.world_size:
            saved = load(rank)
            self._rollout, self._rollout_index = self._prepare_inputs(saved["rollout"]), saved["index"]
            return
        parts = [load(i) for i in range(processes)]
        rows = torch.cat([part["rows"] for part in parts])
        if len(rows) != self.args.generation_batch_size:
            raise ValueError(
                f"generation_batch_size must be that of the checkpoint, which is amid a rollout of {len(rows)} completions, "
                f"got {self.args.generation_batch_size}"
            )
        whole = joined([part["rollout"] for part in parts], self.processing_class.pad_token_id)
        own = rows.argsort()[self._layout()[rank]]
        self._rollout_index = parts[0]["index"]
        self._rollout = self._prepare_inputs({name: x[own] for name, x in whole.items()})


def _rollout_file(folder, rank):
    return os.path.join(folder, f"rollout_{rank}.pt")


def _predicting(hidden, mask):
    """The T hidden states that predict the completion, [B, T, D]: each token is predicted from the one before it."""
    return hidden[:, -mask.shape[1] - 1 : -1]


def _with_head_factors(args, head):
    """The loss's options with the model's own logit factors, which are what it samples with."""
    config = args.loss_config()
    for name in ("logit_scale", "softcap"):
        default = getattr(type(config), name)
        asked, own = getattr(config, name), getattr(head, name)
        if asked != default and asked != own:
            raise ValueError(f"{name} must be the model's own ({own}) or left alone, got {asked}")
    return dataclasses.replace(config, logit_scale=head.logit_scale, softcap=head.softcap)


def _check_dataset(name, dataset, needed=None):
    needed = name == "train_dataset" if needed is None else needed
    if dataset is None and not needed:
        return
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must have a length and rows by index, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must have at least one row, got none")
    if "prompt" not in dataset[0]:
        raise ValueError(f"{name} must have a column 'prompt', got {sorted(dataset[0])}")
