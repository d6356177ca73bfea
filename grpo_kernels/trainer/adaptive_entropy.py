"""An entropy bonus whose coefficient follows the entropy (`use_adaptive_entropy`), by the rule of TRL 1.16's GRPO trainer.

After every optimiser step the coefficient rises by a step where the mean entropy of the trained tokens, over micro-batches and
processes, is at most the target, and falls by one where it is above. It is applied only after a step at or below the target: a
policy that still explores is left alone. (Skywork-OR1, He et al. 2025, arXiv 2505.22312.)
"""

import json
import math
import os
from dataclasses import dataclass, field, replace

import torch

from ..distributed import top_tokens_over_ranks
from ..losses.objective import entropy_threshold, top_tokens

_FILE = "entropy_ctrl_state.json"  # TRL's name and keys


@dataclass
class EntropyOptions:
    """TRL's options of the controller; ``entropy_coef`` is the coefficient that it begins with."""

    use_adaptive_entropy: bool = field(default=False, metadata={"help": "Move entropy_coef so that the entropy holds the target."})
    entropy_coef_min: float = field(default=0.0, metadata={"help": "Lowest coefficient."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Highest coefficient."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "By how much it moves in an optimiser step."})
    entropy_target: float = field(default=0.2, metadata={"help": "Mean entropy of a token, in nats, to hold the policy above."})


def check_entropy_options(args):
    """Raises ValueError naming the option, what was wanted and what came."""
    for name in ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    if args.entropy_coef_delta < 0:
        raise ValueError(f"entropy_coef_delta must be >= 0, got {args.entropy_coef_delta!r}")
    if not args.entropy_coef_min <= args.entropy_coef_max:
        limit = f"entropy_coef_max, {args.entropy_coef_max!r}"
        raise ValueError(f"entropy_coef_min must be at most {limit}, got {args.entropy_coef_min!r}")
    if not isinstance(args.use_adaptive_entropy, bool):
        raise ValueError(f"use_adaptive_entropy must be True or False, got {args.use_adaptive_entropy!r}")
    if args.use_adaptive_entropy and not args.entropy_coef_min <= args.entropy_coef <= args.entropy_coef_max:
        bounds = f"entropy_coef_min, {args.entropy_coef_min!r}, and entropy_coef_max, {args.entropy_coef_max!r}"
        raise ValueError(f"entropy_coef must be between {bounds}, with use_adaptive_entropy, got {args.entropy_coef!r}")


class AdaptiveEntropy:
    """Of `GRPOTrainer`: the controller. Its metric is ``entropy_coef``."""

    _coefficient, _last_entropy, _window = None, math.inf, None

    def training_step(self, *args, **keywords):
        if self.args.use_adaptive_entropy:
            begun = self.args.entropy_coef if self._coefficient is None else self._coefficient
            applied = begun if self._last_entropy <= self.args.entropy_target else 0.0
            self._coefficient, self.loss_config = begun, replace(self.loss_config, entropy_coef=applied)
        return super().training_step(*args, **keywords)

    def _record_loss(self, loss, metrics, output, inputs, micro, training):
        super()._record_loss(loss, metrics, output, inputs, micro, training)
        if training and self.args.use_adaptive_entropy:
            sums = self._entropy_and_tokens(micro.spread(output.entropy), inputs["mask"])
            self._window = sums if self._window is None else self._window + sums
            if self.accelerator.sync_gradients:
                self._move()

    def _entropy_and_tokens(self, entropy, mask):
        """[2]: the sum of the entropies that the bonus is of, and of how many tokens."""
        config, m = self.loss_config, mask.to(entropy.dtype)
        if config.top_entropy_quantile < 1:
            over_ranks = top_tokens_over_ranks(entropy, m, config, self._data_parallel_group)
            threshold = entropy_threshold(entropy, m, config.top_entropy_quantile) if over_ranks is None else None
            m = top_tokens(entropy, m, threshold) if over_ranks is None else over_ranks[0]
        return torch.stack([(entropy * m).sum(), m.sum()]).detach()

    def _move(self):
        """The coefficient of the next step, by the entropy of this one."""
        total, tokens = self.accelerator.reduce(self._window, reduction="sum").tolist()
        self._last_entropy, self._window = total / max(tokens, 1.0), None
        step = self.args.entropy_coef_delta
        if self._last_entropy <= self.args.entropy_target:
            self._coefficient = min(self._coefficient + step, self.args.entropy_coef_max)
        else:
            self._coefficient = max(self._coefficient - step, self.args.entropy_coef_min)
        self._metrics["train"].record({"entropy_coef": torch.tensor(self._coefficient)}, 1.0)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.args.use_adaptive_entropy:
            os.makedirs(output_dir, exist_ok=True)
            with open(os.path.join(output_dir, _FILE), "w") as file:
                json.dump({"entropy_coef": self._coefficient, "last_world_entropy": self._last_entropy}, file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", _FILE)
        if checkpoint is not None and self.args.use_adaptive_entropy and os.path.exists(path):
            with open(path) as file:
                state = json.load(file)
            self._coefficient, self._last_entropy = state["entropy_coef"], state["last_world_entropy"]
