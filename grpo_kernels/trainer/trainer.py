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

On several processes (DDP, FSDP2; examples/accelerate) each samples and trains on its share of a rollout. Which
completions a step takes, their advantages, the loss and the logged metrics are those of one process with the whole batch;
only the dice are rolled by each process for itself. Groups may straddle processes.

Where sampling is truncated (top-p, top-k, min-p), a token is one of those that were left, its support. The rollout keeps these
(`keep_sampling_mask`), and log-probs, entropy, ratio and KL are over them.

The KL from the reference (beta > 0) is estimated from its log-probs of the sampled tokens, or summed over the vocabulary
(`kl_estimator="exact"`). The rollout then keeps the reference's last hidden states in place of its log-probs.

Completions without a gradient do not run through the model (`skip_untrained`): entropy and clip ratios are then those of the
completions that train, `trained_token_share` says how many these are. Rewards and lengths are of all.
"""

import contextlib
import copy
import dataclasses
import inspect
import math
import os
import time

import torch
from accelerate.utils import DistributedType, fsdp2_prepare_model, gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from .. import backends
from ..engine.fixed_order import unless_told
from ..integrations.sampling_mask import mask_metrics, recorded_support
from ..integrations.transformers import fuse_lm_head, lm_head
from ..logprobs import linear_logprobs
from ..loss import fused_linear_grpo_loss
from ..losses.advantages import group_advantages
from ..losses.objective import OVER_SEQUENCES, metric_weight
from ..support import TokenSupport
from . import checkpoints, diagnose, microbatch, reference_model
from .config import GRPOConfig
from .loading import load, refuse_encoder
from .metrics import Recorded
from .rewards import ModelReward, noted, reward_metrics, reward_names, score
from .rollout import joined, length_metrics, sample, sampling_config, seeded, tokenize
from .rollout_server import RolloutServer
from .watch import Samples


class GRPOTrainer(Trainer):
    """`transformers.Trainer` that learns from rewards.

    Args:
        model: a causal LM, or the path or name to load one from.
        reward_funcs: one or a list. A function, async ones too, ``f(prompts, completions, completion_ids, **columns) -> list``
            of numbers or None; ``columns`` are the dataset's columns other than ``prompt``, one entry per completion. Or a model
            for sequence classification with one label, or the path of one: its logit is the reward.
        args: `GRPOConfig`.
        train_dataset: rows with a ``prompt``, a string or a list of messages; anything with a length and integer indices
            that gives dicts (`datasets.Dataset`, a list of dicts).
        eval_dataset: likewise, or a dict of several by name, or None.
        processing_class: tokenizer; None loads it from the model's path.
        peft_config: a PEFT configuration to wrap the model with; the reference is then the model without its adapters.
        callbacks: of transformers.
        reward_processing_classes: the tokenizers of the models among the reward functions, in the places of those; None, and
            None in a place, loads it from the model's path.

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
        reward_processing_classes=None,
    ):
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args must be a GRPOConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(f"one process trains on one GPU, got {args.n_gpu}: start with torchrun, or show it one GPU")
        if (processes := int(os.environ.get("WORLD_SIZE", 1))) != args.world_size:
            raise ValueError(f"this is one of {processes} processes (WORLD_SIZE), but args knows of {args.world_size}")
        self.reward_funcs = _reward_functions(reward_funcs, reward_processing_classes, args)
        if args.reward_weights is not None and len(args.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights must have one weight for each of {len(self.reward_funcs)} reward functions, "
                f"got {args.reward_weights}"
            )
        _check_dataset("train_dataset", train_dataset)
        if args.eval_on_start and eval_dataset is None:
            raise ValueError("eval_on_start must be False without an eval_dataset (--eval_data), got True")
        for name, data in named_datasets(eval_dataset).items():
            _check_dataset(f"eval_dataset {name}".strip(), data, needed=bool(name))
        if isinstance(model, (str, os.PathLike)):
            model, processing_class = load(model, args, processing_class)
        refuse_encoder(getattr(model, "config", None))
        if processing_class is None:
            raise ValueError("processing_class must be a tokenizer when the model is not given by its path, got None")
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes packs 4-bit weights on a CPU when it samples; packed ones pass no gradient on, and say nothing
                module.support_avx512bf16_for_cpu = False
        if peft_config is not None:
            import peft

            model = peft.get_peft_model(model, peft_config)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        ref_model = None
        if args.beta != 0 and causal_lm is model:
            ref_model = fuse_lm_head(copy.deepcopy(model).eval().requires_grad_(False))
        elif args.sync_ref_model:
            raise ValueError("sync_ref_model must be False under PEFT: its reference is the model without adapters, got True")
        if ref_model is not None and args.kl_estimator == "exact" and is_deepspeed_zero3_enabled():
            raise ValueError(
                "kl_estimator must be 'k3' under ZeRO-3, unless an adapter is trained: while the policy runs, the reference's head "
                "is in parts, got 'exact'"
            )
        fuse_lm_head(causal_lm)
        model.train()  # as it will be, so that `lm_head` refuses now what it would refuse then
        if args.gradient_checkpointing and causal_lm is not model:
            model.enable_input_require_grads()  # frozen embeddings would cut the checkpointed layers off the graph

        head = lm_head(causal_lm)
        backends.resolve(args.backend, args.device, head.weight.dtype)  # one that is not usable here is refused now
        self.loss_config = _with_head_factors(args, head)
        self._takes_position_ids = "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters
        self._packed = _runs_packed(args.padding_free, causal_lm, self._takes_position_ids)
        self._router_coef = _router_coefficient(causal_lm)
        self._skips = args.skip_untrained and self._router_coef is None and microbatch.can_skip(self.loss_config)
        self._samples = Samples(args, reward_names(self.reward_funcs)) if args.log_completions else None
        self._rollout, self._rollout_index, self._order = None, None, None
        self._server = RolloutServer(args) if args.rollout_server else None
        self._metrics = {"train": Recorded(), "eval": Recorded()}
        self._clock, self._tokens = None, torch.zeros((), dtype=torch.long, device=args.device)
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version must be 2, got 1: set it in the accelerate config or in fsdp_config")
        if ref_model is not None and self.accelerator.is_fsdp2:  # prepare_model would leave it whole, and on the CPU
            ref_model = fsdp2_prepare_model(self.accelerator, ref_model)
        elif ref_model is not None:
            ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.ref_model = ref_model
        if args.sync_ref_model:
            self.add_callback(reference_model.Synchronised(self))

    # ---- 1. rollout ----

    def get_train_dataloader(self):
        """One item per micro-batch and device. It only counts: `get_batch_samples` makes the micro-batches from prompts."""
        self._rollout = self._clock = None
        self._tokens.zero_()
        self._metrics["train"].clear()
        rollouts = math.ceil(len(self.train_dataset) * self.args.num_generations / self.args.generation_batch_size)
        micro_batches = rollouts * self.args.num_iterations * self.args.steps_per_generation
        return DataLoader(range(micro_batches), collate_fn=list)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of the next optimiser step, from the current rollout or a new one."""
        for _ in range(num_batches):
            next(epoch_iterator)
        index, step = divmod(self.state.global_step, self.args.steps_per_rollout)
        self._clock = self._clock or time.monotonic()
        if self._rollout is None or self._rollout_index != index:
            self._rollout, self._rollout_index = self._new_rollout(index), index
        micro_batches = self._split(self._rollout)
        first = step * num_batches % len(micro_batches)
        micro_batches = micro_batches[first : first + num_batches]
        # DDP and gradient accumulation both average, so this divisor is the mean over micro-batches and processes
        kept = self._share_of_kept(*micro_batches)
        self._tokens += sum(batch["attention_mask"].sum() for batch in micro_batches)
        return [{**batch, "num_items": kept} for batch in micro_batches], None

    def _share_of_kept(self, *micro_batches):
        """Kept tokens of all processes, at least 1, per micro-batch and process. A number, since a tensor would be at least 1."""
        kept = self.accelerator.reduce(sum(batch["mask"].sum() for batch in micro_batches), reduction="sum").item()
        return max(kept, 1) / (len(micro_batches) * self.args.world_size)

    def _split(self, batch):
        return microbatch.split(batch, self.args.per_device_train_batch_size)

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
        advantages = self._advantages(rewards, group_ids, "train")
        batch["advantages"] = advantages[layout[rank]]
        if self._samples:
            self._samples.keep(self.state.global_step, layout.flatten().argsort().tolist(), rewards, advantages)
        if args.steps_per_rollout > 1 or args.corrects_sampler:
            # by the loss's own kernels and in training mode, so that the first step finds these bits again; draws of dropout are
            # others, and must not depend on what a checkpoint forgets
            self.model.train()
            logps = lambda hidden, head, given: self._loss(hidden, head, given)[0].logps  # noqa: E731
            with seeded(args.seed, "old_logps", index, rank):
                batch["old_logps"] = self._of_tokens(logps, self.model, batch, skip=self._skips)
        if args.corrects_sampler:
            batch = self._server.corrected(batch, self._metrics["train"], self._skips)
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
        causal_lm = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        # a sharded model is gathered in every forward, so all processes sample until the last one has done
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        continuous = self.args.use_transformers_continuous_batching
        options = (self.args.transformers_continuous_batching_config or {}) if continuous else None
        with self._raising_together():
            prompt_ids = tokenize(tokenizer, prompts, self.args.chat_template_kwargs)
            config = sampling_config(self.args, causal_lm, tokenizer)
            if continuous and sharded:
                raise ValueError("use_transformers_continuous_batching must be False for a sharded model, got True")
        noting = recorded_support(causal_lm) if self.args.keeps_sampling_mask else contextlib.nullcontext()
        # accelerate puts autocast on the model's forward; an adapted model's generate goes past it
        with self.accelerator.autocast(), noting as recorder:
            if self._server:
                drawn = self._server.sample(self, prompt_ids, config)
            else:
                drawn = sample(causal_lm, prompt_ids, config, synced_gpus=sharded, continuous=options)
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
            self._metrics[mode].record({name: value}, counts * (drawn.terminated.sum() if "terminated" in name else len(rows)))
        if self._samples and mode == "train":
            self._samples.gather(self.accelerator, prompts, completions)
        mask = drawn.mask & drawn.terminated.unsqueeze(1) if self.args.mask_truncated_completions else drawn.mask
        batch = {"input_ids": drawn.input_ids, "attention_mask": drawn.attention_mask, "mask": mask}
        if drawn.logps is not None:
            batch["sampling_logps"] = drawn.logps
        if recorder is not None:
            batch["support"] = recorder.support(mask)
            found = mask_metrics(batch["support"], mask, recorder.vocab)
            self._metrics[mode].record(found, counts * mask.sum())
        if self.args.beta != 0:
            batch |= self._of_reference(batch, whole=mode == "eval")
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
            told = f": {note}" if (note := noted(error)) else f" raised {type(error).__name__}: {error}"
            said = error and f"rank {self.args.process_index}{told}"
            errors = [text for text in gather_object([said]) if text]
            if errors:
                raise RuntimeError("; ".join(errors)) from error

    def _advantages(self, rewards, group_ids, mode):
        """[B, K] rewards of whole groups, the same on all processes -> [B] advantages."""
        args, weights = self.args, None
        if args.reward_weights is not None:
            weights = torch.tensor(args.reward_weights, device=rewards.device)
        found = reward_metrics(rewards, group_ids, weights, reward_names(self.reward_funcs))
        self._metrics[mode].record(found, len(rewards))
        return group_advantages(
            rewards, group_ids, scale_rewards=args.scale_rewards, weights=weights,
            aggregation=args.multi_objective_aggregation,
        )  # fmt: skip

    # ---- 4. loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch, made inside the wrapped model's forward."""
        training, made = model.training, []
        micro = self._micro_batch(inputs, skip=training and self._skips)

        def loss(hidden, head):
            hidden = micro.predicting(hidden)
            output, reference = self._loss(hidden, head, micro.loss_inputs)
            names, decode = diagnose.parameters(self.model), self.processing_class.decode
            diagnose.check(output.loss.detach(), micro, hidden.detach(), head, inputs, names, decode, reference)
            made.append(output)
            return output.loss

        if self._router_coef is None:
            loss, aux_loss = model(**micro.model_inputs, use_cache=False, fused_lm_head=loss), None
        else:
            loss, aux_loss = model(**micro.model_inputs, use_cache=False, output_router_logits=True, fused_lm_head=loss)
        (output,) = made
        loss = loss + (output.loss.detach() - loss.detach())  # FSDP2 under bf16 rounds what a forward returns, log-probs too
        loss = loss * micro.scale
        metrics = output.metrics | {"policy_loss": output.metrics["policy_loss"] * micro.scale}
        if aux_loss is not None:
            loss = loss + self._router_coef * aux_loss
            metrics["aux_loss"] = aux_loss.detach()
        if not training:  # all processes' losses count alike here, those of sequences by how many there are
            share = inputs.get("share_of_sequences", 1.0) if self.loss_config.aggregation in OVER_SEQUENCES else 1.0
            policy_loss = metrics["policy_loss"] * share
            metrics |= {"policy_loss": policy_loss, "loss": loss.detach() - output.metrics["policy_loss"] + policy_loss}
        recorded, kept = self._metrics["train" if training else "eval"], inputs["mask"].sum()
        for name, value in metrics.items():
            recorded.record({name: value}, self._weight(name, inputs, micro))
        if training:
            share = micro.loss_inputs["mask"].sum() * (not micro.idle) / kept
            recorded.record({"trained_token_share": share}, kept)
            old = micro.loss_inputs.get("old_logps")
            if old is not None and not self.state.global_step % self.args.steps_per_rollout:  # before the first update
                moved = torch.nn.functional.pad((output.logps - old).abs().flatten(), (0, 1))  # which may be of no token
                recorded.record({"sampler_mismatch": moved.amax()}, kept)
        output = output._replace(loss=loss.detach(), logps=micro.spread(output.logps), entropy=micro.spread(output.entropy))
        return (loss, output) if return_outputs else loss

    def _loss(self, hidden, head, given):
        """(`GRPOLossOutput`, the reference's head or None) of a micro-batch."""
        reference = None
        if self.loss_config.exact_kl:
            reference = self._reference_head(given["ref_hidden"].dtype)
            given = given | {"ref_weight": reference.weight, "ref_bias": reference.bias}
        several = self.args.steps_per_rollout > 1  # the first of which must find the very old log-probs
        output = fused_linear_grpo_loss(
            hidden, head.weight, **given, bias=head.bias, lora=head.lora, data_parallel_group=self._data_parallel_group,
            config=self.loss_config, backend=self.args.backend, batch_invariant=unless_told(hidden) if several else None,
        )  # fmt: skip
        return output, reference

    def _prepare_input(self, data):
        return data.to(self.args.device) if isinstance(data, TokenSupport) else super()._prepare_input(data)

    def _micro_batch(self, inputs, skip):
        return microbatch.make(
            inputs, self.loss_config, positions=self._takes_position_ids, packed=self._packed, skip=skip,
            group=self._data_parallel_group,
        )  # fmt: skip

    def _weight(self, name, inputs, micro):
        """What a metric of a micro-batch is a mean over: kept tokens, or sequences; of the loss, those that were skipped too."""
        if name == "aux_loss":
            return inputs.get("sequences", len(inputs["mask"]))
        if name in ("loss", "policy_loss"):  # shares, of the round in an evaluation
            return inputs.get("weight", 1)
        if micro.idle:
            return 0
        sequences = inputs.get("sequences", len(micro.loss_inputs["advantages"]))
        return metric_weight(name, self.loss_config, micro.loss_inputs["mask"].sum(), sequences)

    def _logps(self, model, batch, whole=False):
        """Log-probs [B, T] of the sampled tokens."""
        config = self.loss_config

        def logps(hidden, head, given):
            return linear_logprobs(
                hidden, head.weight, given["completion_ids"], mask=given["mask"], bias=head.bias, lora=head.lora,
                temperature=config.temperature, logit_scale=config.logit_scale, softcap=config.softcap,
                backend=self.args.backend, support=given.get("support"),
            ).logps  # fmt: skip

        return self._of_tokens(logps, model, batch, whole=whole)

    @torch.no_grad()
    def _of_tokens(self, function, model, batch, skip=False, whole=False):
        """[B, T, ..] of ``function(hidden, head, loss_inputs)``, by the numerics, and in the micro-batches, that the loss will see.

        ``whole``: in one, as in an evaluation. There ranks may hold different numbers of rows, and a sharded model must run as
        often on each of them.
        """
        parts = []
        for part in [batch] if whole else self._split(batch):
            micro = self._micro_batch(part, skip)

            def in_head(hidden, head, micro=micro):
                found = function(micro.predicting(hidden), head, micro.loss_inputs)
                parts.append(micro.spread(found))
                return found

            with self.compute_loss_context_manager():
                model(**micro.model_inputs, use_cache=False, fused_lm_head=in_head)
        return torch.cat(parts)

    def _of_reference(self, batch, whole=False):
        """What the loss reads of the reference: its log-probs [B, T], or for an exact KL its last hidden states [B, T, D]."""
        with self._reference() as model:
            if self.loss_config.exact_kl:
                return {"ref_hidden": self._of_tokens(_as_the_head_sees_them, model, batch, whole=whole)}
            return {"ref_logps": self._logps(model, batch, whole=whole)}

    @contextlib.contextmanager
    def _reference(self):
        """In eval mode, as the reference that is a model of its own."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True).disable_adapter():
                yield self.model
        finally:
            self.model.train(training)

    @torch.no_grad()
    def _reference_head(self, dtype):
        """The policy's own without adapters, or that of the reference, gathered whole if it is sharded."""
        unwrap = self.accelerator.unwrap_model
        if self.ref_model is None:
            return lm_head(unwrap(self.model, keep_fp32_wrapper=True).get_base_model(), dtype, adapters=False)
        head, config = lm_head(unwrap(self.ref_model, keep_fp32_wrapper=True), dtype), self.loss_config
        if (head.logit_scale, head.softcap) != (config.logit_scale, config.softcap):
            raise ValueError(
                f"kl_estimator='exact' needs a reference with the policy's logit_scale {config.logit_scale} and softcap "
                f"{config.softcap}, got {head.logit_scale} and {head.softcap}"
            )
        return head

    def retake_reference(self):
        """After the reference has moved: the states that the rest of a rollout trains on must be those of its new head."""
        if self._rollout is not None and "ref_hidden" in self._rollout and self.state.global_step % self.args.steps_per_rollout:
            self._rollout |= self._of_reference(self._rollout)

    @property
    def _data_parallel_group(self):
        return torch.distributed.group.WORLD if self.args.world_size > 1 else None

    # ---- 5. step: what transformers' Trainer does not know ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Sample ``num_generations_eval`` completions for every prompt of the evaluation set and average their metrics."""
        began, dataset = time.monotonic(), self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, data in dataset.items():
                metrics |= self.evaluate(data, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        args = self.args
        _check_dataset("eval_dataset", dataset, needed=True)
        whole = self.is_fsdp_enabled and not any(isinstance(p, DTensor) for p in self.model.parameters())
        if whole or (self.is_deepspeed_enabled and self.deepspeed is None):
            raise ValueError("evaluate() of a model that is to be sharded must come after or amid train(), which shards it")
        repeats = args.num_generations_eval or args.num_generations
        each = max(args.per_device_eval_batch_size // repeats, 1)
        training = self.model.training
        self.model.eval()
        self._metrics["eval"].clear()  # of an evaluation that was broken off
        try:
            for first in range(0, len(dataset), each * args.world_size):
                self._evaluate_round(dataset, first, each, repeats)
        finally:
            self.model.train(training)
        if self._clock is not None:
            self._clock += time.monotonic() - began
        found = self._metrics["eval"].take(self.accelerator.gather)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _evaluate_round(self, dataset, first, each, repeats):
        """``repeats`` completions of ``each`` prompts on every process, from prompt number ``first`` on."""
        args = self.args
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
            batch["num_items"] = self._share_of_kept(batch)
            batch["share_of_sequences"] = len(mine) * args.world_size / len(numbers)
            batch["weight"] = len(numbers) if self.loss_config.aggregation in OVER_SEQUENCES else batch["num_items"]
            with self.compute_loss_context_manager():
                self.compute_loss(self.model, batch)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self._metrics["train"].take(self.accelerator.gather) | self._speed()
            logs |= {"num_tokens": self.state.num_input_tokens_seen}
            if self._samples:
                self._samples.show()
        super().log(logs, start_time)

    def _speed(self):
        """Prompt and completion tokens of all processes that the steps since the last call trained on, by the time since then.

        Sampling is in it, evaluation and saving are not.
        """
        tokens = self.accelerator.reduce(self._tokens, reduction="sum").item()
        then, self._clock, self._tokens = self._clock, time.monotonic(), torch.zeros_like(self._tokens)
        return {"tokens_per_second": tokens / max(self._clock - then, 1e-9)}

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As `transformers.Trainer.train`; a checkpoint that was not written to its end, or was changed since, is refused.

        True takes the newest one of ``output_dir`` that is whole, and is refused where there is none; "last" then begins anew. A
        run whose steps have all been taken is loaded and not trained on.

        Raises:
            ValueError: naming the checkpoint, what is wrong with it, and the newest one that is whole.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if resume_from_checkpoint and self.is_world_process_zero():
            print(f"resumes from {checkpoint}" if checkpoint else f"{self.args.output_dir} has no checkpoint: begins anew")
        if checkpoint and (state := state_of(checkpoint)).global_step >= self.planned_steps():
            return self._finished(checkpoint, state)
        return super().train(checkpoint, *args, **kwargs)

    def checkpoint_to_resume(self, asked):
        """The path that `train` would resume from, checked on all processes; None where it would begin anew. Raises as it does."""
        if asked in (True, "last", "true", "True"):
            asked = self._newest_checkpoint(needed=asked != "last")
        else:
            with self._raising_together():
                if asked and self.args.should_save:
                    checkpoints.check(asked)
        with self._raising_together():
            if asked:
                checkpoints.check_kind(asked, self.is_fsdp_enabled)
        return asked or None

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        of_an_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * of_an_epoch)

    def _finished(self, checkpoint, state):
        """transformers would take one step more."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise checkpoints.Unusable(f"{checkpoint} has taken all {state.global_step} steps of the run: nothing is left to train")
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.is_world_process_zero():
            print(f"{checkpoint} has taken all {state.global_step} steps of the run: nothing is left to train")
        return TrainOutput(state.global_step, math.nan, {})

    def _newest_checkpoint(self, needed):
        """The newest one that is whole on every node; one process of each reads all of its bytes."""
        reads, found = self.args.local_process_index == 0, None
        with self._raising_together():
            if reads:
                found = checkpoints.newest(self.args.output_dir)
                if found is None and needed:
                    raise checkpoints.Unusable(f"resume_from_checkpoint: {self.args.output_dir} has no checkpoint")
        oldest = min(gather_object([found] if reads else []), key=checkpoints.step_of)
        with self._raising_together():
            if reads and oldest not in (found, None):
                checkpoints.check(oldest)
        return oldest

    def _save_checkpoint(self, model, trial):
        began, name = time.monotonic(), f"checkpoint-{self.state.global_step}"
        seal = os.path.join(self._get_output_dir(trial), name, checkpoints.SEAL)
        if self.args.should_save and os.path.exists(seal):
            os.remove(seal)  # of an earlier run that came as far
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        folder = self._get_output_dir(trial)
        self._seal(os.path.dirname(seal))
        if self.args.should_save:
            # only now is it safe to delete older ones
            rotate_checkpoints(folder, limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True)
        if self._clock is not None:
            self._clock += time.monotonic() - began

    def _push_from_checkpoint(self, checkpoint_folder):
        self._seal(checkpoint_folder)  # or whoever downloads it could not resume
        super()._push_from_checkpoint(checkpoint_folder)

    def _seal(self, folder):
        self.accelerator.wait_for_everyone()
        if self.args.should_save and not os.path.exists(os.path.join(folder, checkpoints.SEAL)):
            checkpoints.seal(folder)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model and self.args.should_save:
            reference_model.save(self.accelerator.unwrap_model(self.ref_model), output_dir)
        if self.state.global_step % self.args.steps_per_rollout:
            os.makedirs(output_dir, exist_ok=True)
            rows = self._layout()[self.args.process_index]
            saved = {"index": self._rollout_index, "rollout": self._rollout, "rows": rows, "processes": self.args.world_size}
            torch.save(saved, checkpoints.rollout_file(output_dir, self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        with self._raising_together():
            self._load_reference_and_rollout(checkpoint)

    def _load_reference_and_rollout(self, checkpoint):
        if checkpoint is not None and self.args.sync_ref_model:
            reference_model.load(self.accelerator.unwrap_model(self.ref_model), checkpoint)
        if checkpoint is None or not self.state.global_step % self.args.steps_per_rollout:
            return
        load = lambda rank: checkpoints.load_rollout(checkpoint, rank, self.state.global_step, self.args.steps_per_rollout)  # noqa: E731
        kept = "ref_hidden" if self.loss_config.exact_kl else "ref_logps"
        if self.args.beta != 0 and kept not in load(0)["rollout"]:
            raise ValueError(
                f"kl_estimator and beta must be those of the checkpoint: it is amid a rollout that has no {kept} of the reference, "
                f"got kl_estimator {self.args.kl_estimator!r} and beta {self.args.beta}"
            )
        processes, rank = load(0)["processes"], self.args.process_index
        index = self.state.global_step // self.args.steps_per_rollout
        if load(0)["index"] != index:
            raise ValueError(
                f"num_iterations, steps_per_generation and gradient_accumulation_steps must be those of the checkpoint: it is amid "
                f"rollout {load(0)['index']}, with these step {self.state.global_step} is of rollout {index}"
            )
        if processes == self.args.world_size:
            saved = load(rank)
            if torch.equal(saved["rows"].cpu(), self._layout()[rank]):
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
        self._rollout = self._prepare_inputs(microbatch.take(whole, own))


def _with_head_factors(args, head):
    """The loss's options with the model's own logit factors, which are what it samples with."""
    config = args.loss_config()
    for name in ("logit_scale", "softcap"):
        default = getattr(type(config), name)
        asked, own = getattr(config, name), getattr(head, name)
        if asked != default and asked != own:
            raise ValueError(f"{name} must be the model's own ({own}) or left alone, got {asked}")
    return dataclasses.replace(config, logit_scale=head.logit_scale, softcap=head.softcap)


def _as_the_head_sees_them(hidden, head, given):
    """Hidden states in the dtype that the loss takes their product in: half of the memory under autocast, and the same KL."""
    device = hidden.device.type
    lower = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return hidden.to(torch.get_autocast_dtype(device)) if lower else hidden


def _reward_functions(given, tokenizers, args):
    functions = list(given) if isinstance(given, (list, tuple)) else [given]
    tokenizers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(functions)
    if len(tokenizers) != len(functions):
        raise ValueError(f"reward_processing_classes must have {len(functions)} entries, as reward_funcs, got {len(tokenizers)}")
    for i, function in enumerate(functions):
        if isinstance(function, (str, os.PathLike, PreTrainedModel)):
            functions[i] = ModelReward.of(function, tokenizers[i], args.device, args.trust_remote_code)
    if not functions or not all(map(callable, functions)):
        raise TypeError(f"reward_funcs must be functions, models or paths of models, got {given!r}")
    return functions


def _runs_packed(asked, causal_lm, takes_position_ids):
    # convolutions, recurrences and chunked attention go by places in the row, across the sequences that are packed in it
    layers = set(getattr(causal_lm.config.get_text_config(), "layer_types", None) or ())
    by_positions = layers <= {"full_attention", "sliding_attention"} and not getattr(causal_lm, "_is_stateful", False)
    able = takes_position_ids and by_positions
    if asked and not able:
        name = type(causal_lm).__name__
        raise ValueError(f"padding_free must be False or None for {name}, which cannot tell packed rows apart, got True")
    return able and microbatch.flash(causal_lm) if asked is None else asked


def state_of(checkpoint):
    return TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))


def _router_coefficient(causal_lm):
    """Of the load-balancing loss of a mixture of experts, where the model's configuration asks for it."""
    text = causal_lm.config.get_text_config()
    return getattr(text, "router_aux_loss_coef", 0.0) if getattr(text, "output_router_logits", False) else None


def named_datasets(dataset):
    return dataset if isinstance(dataset, dict) else {"": dataset}


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
