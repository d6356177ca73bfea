"""GRPO in one sitting: rollout, reward, advantage, loss, step.

1. Rollout. For each prompt, sample G completions from the policy as it is now (`rollout`).
2. Reward. Reward functions score every completion with a number (`rewards`).
3. Advantage. A completion is good or bad only beside the others of its prompt: subtract the group's mean reward and divide
   by its standard deviation. No value network is needed.
4. Loss. Raise the probability of each token of a completion with a positive advantage and lower it for a negative one, as
   long as the policy stays within the clip range of the one that sampled (and near a reference, if beta > 0). The logits this
   takes are never made: the model hands its last hidden states at the completion's positions, and its output layer, to
   `fused_linear_grpo_loss`. Completions without a gradient do not run through the model (`microbatch`).
5. Step. `transformers.Trainer` accumulates gradients, clips, steps, schedules, logs and saves. The same rollout may serve
   several steps (`steps_per_generation`, `num_iterations`); its log-probs at sampling time are then kept (`scoring`).

A run is a function of its arguments: the n-th rollout takes the n-th stretch of prompts and its own random numbers, both
computed from seed and n. A checkpoint holds a rollout that is still being trained on: a resumed run (`resume`) goes on bit by bit.

On several processes (DDP, FSDP2; examples/accelerate) each samples and trains on its share of a rollout. Which
completions a step takes, their advantages, the loss and the logged metrics are those of one process with the whole batch;
only the dice are rolled by each process for itself. Groups may straddle processes.
"""

import inspect
import math
import time
from contextlib import nullcontext

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import unwrap_peft_model

from .. import backends
from ..engine.fixed_order import unless_told
from ..integrations.sampling_mask import mask_metrics, recorded_support
from ..integrations.transformers import lm_head
from ..loss import fused_linear_grpo_loss
from ..losses.advantages import group_advantages
from ..support import TokenSupport
from . import microbatch
from .adaptive_entropy import AdaptiveEntropy
from .completion_log import CompletionLog
from .config import GRPOConfig
from .evaluation import Evaluation
from .metrics import Metrics, Recorded
from .models import policy_and_reference, router_coefficient, runs_packed, with_head_factors
from .not_finite import check_finite
from .resume import Resume
from .rewards import reward_metrics, reward_names, score
from .rollout import length_metrics, sample, sampling_config, seeded, tokenize
from .rollout_server import RolloutServer
from .run_checks import check_datasets, check_process, raising_together, reward_functions
from .scoring import Scoring


class GRPOTrainer(AdaptiveEntropy, Resume, Evaluation, Scoring, Metrics, Trainer):
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
        check_process(args)
        self.reward_funcs = reward_functions(reward_funcs, reward_processing_classes, args)
        check_datasets(args, train_dataset, eval_dataset)
        model, reference, processing_class = policy_and_reference(model, args, processing_class, peft_config)
        causal_lm = unwrap_peft_model(model)
        head = lm_head(causal_lm)
        backends.resolve(args.backend, args.device, head.weight.dtype)  # one that is not usable here is refused now
        self.loss_config = with_head_factors(args.loss_config(), head)
        self._takes_position_ids = "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters
        self._packed = runs_packed(args.padding_free, causal_lm, self._takes_position_ids)
        self._router_coef = router_coefficient(causal_lm)
        needed = self._router_coef is not None or args.use_adaptive_entropy  # all completions
        self._skips = args.skip_untrained and not needed and microbatch.can_skip(self.loss_config)
        self._completions = CompletionLog(args, reward_names(self.reward_funcs)) if args.log_completions else None
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
        self._prepare_reference(reference)

    # ---- 1. rollout ----

    def _new_rollout(self, index):
        """Tensors of this process's share of rollout ``index``, one row per completion."""
        args, rank, layout = self.args, self.args.process_index, self._layout()
        groups = args.generation_batch_size // args.num_generations
        rows = [self._nth_row(index * groups + i // args.num_generations) for i in layout[rank].tolist()]
        with seeded(args.seed, "rollout", index, rank):
            batch, rewards = self._sample_and_score(rows, "train")
        layout, gathered = layout.to(rewards.device), self.accelerator.gather(rewards)
        rewards = torch.empty_like(gathered).index_copy(0, layout.flatten(), gathered)
        group_ids = torch.arange(groups, device=rewards.device).repeat_interleave(args.num_generations)
        advantages = self._advantages(rewards, group_ids, "train")
        batch["advantages"] = advantages[layout[rank]]
        if self._completions:
            self._completions.keep(self.state.global_step, layout.flatten().argsort().tolist(), rewards, advantages)
        if args.steps_per_rollout > 1 or args.corrects_sampler:
            batch["old_logps"] = self._old_logps(batch, index)
            batch = self._beside_sampler(batch) if self._server else batch
        self.state.num_input_tokens_seen += self.accelerator.reduce(batch["attention_mask"].sum(), "sum").item()
        return batch

    def _layout(self):
        """[processes, share] completions of a rollout by number. A step takes one stretch of them, however many processes."""
        shape = -1, self.args.world_size, self.args.per_device_train_batch_size
        numbers = torch.arange(self.args.generation_batch_size).view(shape)
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
        args, prompts = self.args, [row["prompt"] for row in rows]
        drawn, recorder = self._sample(prompts)
        rewards = self._rewards(prompts, rows, drawn, mode)
        for name, value in length_metrics(drawn).items():
            self._metrics[mode].record({name: value}, counts * (drawn.terminated.sum() if "terminated" in name else len(rows)))
        mask = drawn.mask & drawn.terminated.unsqueeze(1) if args.mask_truncated_completions else drawn.mask
        batch = {"input_ids": drawn.input_ids, "attention_mask": drawn.attention_mask, "mask": mask}
        batch |= {} if drawn.logps is None else {"sampling_logps": drawn.logps}
        if recorder is not None:
            batch["support"] = recorder.support(mask)
            self._metrics[mode].record(mask_metrics(batch["support"], mask, recorder.vocab), counts * mask.sum())
        if args.beta != 0:
            batch |= self._of_reference(batch, whole=mode == "eval")
        return batch, rewards

    def _sample(self, prompts):
        """(`Completions`, the recorder of their supports or None)."""
        args, causal_lm = self.args, self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        # a sharded model is gathered in every forward, so all processes sample until the last one has done
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        continuous = (args.transformers_continuous_batching_config or {}) if args.use_transformers_continuous_batching else None
        with raising_together(args):
            prompt_ids = tokenize(self.processing_class, prompts, args.chat_template_kwargs)
            config = sampling_config(args, causal_lm, self.processing_class)
            if continuous is not None and sharded:
                raise ValueError("use_transformers_continuous_batching must be False for a sharded model, got True")
        # accelerate puts autocast on the model's forward; an adapted model's generate goes past it
        with self.accelerator.autocast(), recorded_support(causal_lm) if args.keeps_sampling_mask else nullcontext() as recorder:
            if self._server:
                return self._server.sample(self, prompt_ids, config), recorder
            return sample(causal_lm, prompt_ids, config, synced_gpus=sharded, continuous=continuous), recorder

    # ---- 2. reward ----

    def _rewards(self, prompts, rows, drawn, mode):
        """[B, K] of this process's completions, by every reward function."""
        ids = drawn.input_ids[:, -drawn.mask.shape[1] :]
        completion_ids = [own[kept].tolist() for own, kept in zip(ids, drawn.mask, strict=True)]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        completions = [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                       for prompt, text in zip(prompts, texts, strict=True)]  # fmt: skip
        names = set() if self.args.remove_unused_columns else {name for row in rows for name in row} - {"prompt"}
        columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
        with raising_together(self.args):
            rewards = score(self.reward_funcs, prompts, completions, completion_ids, columns).to(drawn.mask.device)
        if self._completions and mode == "train":
            self._completions.gather(self.accelerator, prompts, completions)
        return rewards

    # ---- 3. advantage ----

    def _advantages(self, rewards, group_ids, mode):
        """[B, K] rewards of whole groups, the same on all processes -> [B] advantages."""
        args = self.args
        weights = args.reward_weights and torch.tensor(args.reward_weights, device=rewards.device)
        found = reward_metrics(rewards, group_ids, weights, reward_names(self.reward_funcs))
        self._metrics[mode].record(found, len(rewards))
        how = {"scale_rewards": args.scale_rewards, "aggregation": args.multi_objective_aggregation}
        return group_advantages(rewards, group_ids, weights=weights, **how)

    # ---- 4. loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch, made inside the wrapped model's forward."""
        micro, made = self._micro_batch(inputs, skip=model.training and self._skips), []

        def loss(hidden, head):
            hidden = micro.predicting(hidden)
            output, reference = self._loss(hidden, head, micro.loss_inputs)
            check_finite(output.loss.detach(), micro, hidden.detach(), head, inputs, self.model, self.processing_class, reference)
            made.append(output)
            return output.loss

        routed = {} if self._router_coef is None else {"output_router_logits": True}
        found = model(**micro.model_inputs, **routed, use_cache=False, fused_lm_head=loss)
        loss, aux_loss = found if routed else (found, None)
        (output,) = made  # FSDP2 under bf16 rounds what a forward returns, log-probs too
        loss = (loss + (output.loss.detach() - loss.detach())) * micro.scale
        metrics = output.metrics | {"policy_loss": output.metrics["policy_loss"] * micro.scale}
        if aux_loss is not None:
            loss = loss + self._router_coef * aux_loss
            metrics["aux_loss"] = aux_loss.detach()
        self._record_loss(loss.detach(), metrics, output, inputs, micro, model.training)
        output = output._replace(loss=loss.detach(), logps=micro.spread(output.logps), entropy=micro.spread(output.entropy))
        return (loss, output) if return_outputs else loss

    def _micro_batch(self, inputs, skip):
        can = {"positions": self._takes_position_ids, "packed": self._packed, "group": self._data_parallel_group}
        return microbatch.make(inputs, self.loss_config, **can, skip=skip)

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

    @property
    def _data_parallel_group(self):
        return torch.distributed.group.WORLD if self.args.world_size > 1 else None

    # ---- 5. step: what transformers' Trainer accumulates ----

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
        micro_batches = microbatch.split(self._rollout, self.args.per_device_train_batch_size)
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

    def _prepare_input(self, data):
        return data.to(self.args.device) if isinstance(data, TokenSupport) else super()._prepare_input(data)
