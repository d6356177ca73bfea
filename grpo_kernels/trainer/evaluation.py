"""Evaluation over ranks: every process samples for its share of the prompts, and all of them average as one would."""

import torch
from accelerate.utils import model_has_dtensor

from ..losses.objective import OVER_SEQUENCES
from .rollout import seeded
from .run_checks import check_dataset


class Evaluation:
    """`GRPOTrainer.evaluate`, round by round; a round is a micro-batch of each process."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Sample ``num_generations_eval`` completions for every prompt of the evaluation set and average their metrics."""
        args, dataset = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, data in dataset.items():
                metrics |= self.evaluate(data, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        check_dataset("eval_dataset", dataset)
        whole = self.is_fsdp_enabled and not model_has_dtensor(self.model)
        if whole or (self.is_deepspeed_enabled and self.deepspeed is None):
            raise ValueError("evaluate() of a model that is to be sharded must come after or amid train(), which shards it")
        training = self.model.training
        self.model.eval()
        self._metrics["eval"].clear()  # of an evaluation that was broken off
        try:
            with self._off_the_clock():
                for first in range(0, len(dataset), self._round()[0] * args.world_size):
                    self._evaluate_round(dataset, first)
        finally:
            self.model.train(training)
            if self._server:
                self._server.forget()
        found = self._metrics["eval"].take(self.accelerator.gather)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _round(self):
        """(prompts of each process, completions of each prompt)"""
        repeats = self.args.num_generations_eval or self.args.num_generations
        return max(self.args.per_device_eval_batch_size // repeats, 1), repeats

    def _evaluate_round(self, dataset, first=0):
        """One round, from prompt number ``first`` on."""
        args, (each, repeats) = self.args, self._round()
        numbers = range(first, min(first + each * args.world_size, len(dataset)))
        mine = numbers[each * args.process_index :][:each]
        # every process takes part in every round, if need be with a prompt of another one that does not count
        rows = [dataset[i] for i in mine or [first] for _ in range(repeats)]
        with seeded(args.seed, "eval", first, args.process_index), torch.no_grad():
            batch, rewards = self._sample_and_score(rows, "eval", counts=bool(mine))
            # the first process has the most rows, so what pads the others' stands behind all that count
            rewards = self.accelerator.gather(self.accelerator.pad_across_processes(rewards))[: len(numbers) * repeats]
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
