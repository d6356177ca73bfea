"""Metrics between two logs: kept on their device as they come, reduced over time and processes when somebody asks."""

import contextlib
import math
import time
from collections import defaultdict

import torch
from transformers.utils import logging

from ..losses.objective import OVER_SEQUENCES, metric_weight

logger = logging.get_logger(__name__)

_LARGEST = ("sampler_mismatch",)  # whose highest value counts, though their names do not say so
_FAR = 0.5  # nats: no two kernels differ by as much in the mean
_SERVER_IS_FAR = (
    "sampler/logp_difference_mean is above 0.5: are the rollout server's log-probs after the temperature (vLLM: --logprobs-mode "
    "processed_logprobs), and are its weights the trainer's?"
)
_LENGTH = 256  # values that wait one by one; a run that never logs keeps no more


class Recorded:
    """Weighted values by name since the last `take`. Recording never waits for the device."""

    def __init__(self):
        self._waiting = defaultdict(list)  # name -> (value, weight), scalar tensors
        self._totals = {}  # name -> [4]: sum of weight x value, sum of weights, lowest, highest

    def record(self, metrics, weight):
        """``metrics``: scalar tensors by name, each a mean over ``weight``; nan and weight 0 do not count."""
        for name, value in metrics.items():
            waiting = self._waiting[name]
            value = value.detach().float()
            weight = weight.to(value) if isinstance(weight, torch.Tensor) else value.new_full((), weight)
            waiting.append((value, weight))
            if len(waiting) == _LENGTH:
                self._totals[name] = self._total(name)
                waiting.clear()

    def clear(self):
        self._waiting.clear()
        self._totals.clear()

    def take(self, gather) -> dict[str, float]:
        """Of all processes: means by weight, minima and maxima by name; and begins anew.

        One collective, ``gather`` of [1, metrics, 4], of the same size on every process. What had no weight anywhere has no entry.
        """
        names = sorted(self._waiting)
        if not names:
            return {}
        everywhere = gather(torch.stack([self._total(name) for name in names]).unsqueeze(0))
        self.clear()
        sums, low, high = everywhere[..., :2].sum(0), everywhere[..., 2].amin(0), everywhere[..., 3].amax(0)
        metrics = {}
        figures = torch.stack([*sums.unbind(1), low, high], dim=1).tolist()
        for name, (total, weight, lowest, highest) in zip(names, figures, strict=True):
            if weight > 0:
                kinds = (word for word in ("min", "max") if name.endswith(f"_{word}") or f"completions/{word}_" in name)
                kind = "max" if name in _LARGEST else next(kinds, "mean")
                metrics[name] = {"mean": total / weight, "min": lowest, "max": highest}[kind]
        return metrics

    def _total(self, name):
        rows = [self._totals[name]] if name in self._totals else []
        if self._waiting[name]:
            values, weights = (torch.stack(x) for x in zip(*self._waiting[name], strict=True))
            counts = (weights > 0) & ~values.isnan()
            weights, values = weights.where(counts, 0.0), values.where(counts, 0.0)
            low, high = values.masked_fill(~counts, math.inf).amin(), values.masked_fill(~counts, -math.inf).amax()
            rows.append(torch.stack([(values * weights).sum(), weights.sum(), low, high]))
        rows = torch.stack(rows)
        return torch.cat([rows[:, :2].sum(0), rows[:, 2].amin(0, keepdim=True), rows[:, 3].amax(0, keepdim=True)])


class Metrics:
    """Of `GRPOTrainer`: what a micro-batch tells, what each of its metrics is a mean over, and the log."""

    def _record_loss(self, loss, metrics, output, inputs, micro, training):
        """``loss``: of the micro-batch, detached; ``metrics``: of the loss's kernels; ``output``: of ``micro``'s tokens."""
        if not training:  # all processes' losses count alike here, those of sequences by how many there are
            share = inputs.get("share_of_sequences", 1.0) if self.loss_config.aggregation in OVER_SEQUENCES else 1.0
            policy_loss = metrics["policy_loss"] * share
            metrics = metrics | {"policy_loss": policy_loss, "loss": loss - metrics["policy_loss"] + policy_loss}
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
            if self._server and old is None and "importance_sampling_ratio" not in inputs:  # not compared yet
                self._record_sampler(micro.spread(output.logps), inputs)

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

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self._metrics["train"].take(self.accelerator.gather) | self._speed()
            logs |= {"num_tokens": self.state.num_input_tokens_seen}
            if self._completions:
                self._completions.show()
            far = logs.get("sampler/logp_difference_mean", 0.0) > _FAR and not self.args.truncations
            if far and self.is_world_process_zero():
                logger.warning_once(_SERVER_IS_FAR)
        super().log(logs, start_time)

    def _speed(self):
        """Prompt and completion tokens of all processes that the steps since the last call trained on, by the time since then.

        Sampling is in it, evaluation and saving are not.
        """
        tokens = self.accelerator.reduce(self._tokens, reduction="sum").item()
        then, self._clock, self._tokens = self._clock, time.monotonic(), torch.zeros_like(self._tokens)
        return {"tokens_per_second": tokens / max(self._clock - then, 1e-9)}

    @contextlib.contextmanager
    def _off_the_clock(self):
        began = time.monotonic()
        yield
        if self._clock is not None:
            self._clock += time.monotonic() - began
