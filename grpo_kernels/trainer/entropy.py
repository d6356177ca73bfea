"""An entropy bonus whose coefficient follows the entropy: `AdaptiveEntropyTrainer`, by the rule of TRL 1.16's GRPO trainer.

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
from .config import GRPOConfig
from .trainer import GRPOTrainer

_FILE = "entropy_ctrl_state.json"  # TRL's name and keys


@dataclass
class AdaptiveEntropyConfig(GRPOConfig):
    """`GRPOConfig`, and TRL's options of the controller; ``entropy_coef`` is the coefficient that it begins with.

    Raises:
        ValueError: naming the field, what was wanted and what came.
    """

    entropy_coef_min: float = field(default=0.0, metadata={"help": "Lowest coefficient."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Highest coefficient."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "By how much it moves in an optimiser step."})
    entropy_target: float = field(default=0.2, metadata={"help": "Mean entropy of a token, in nats, to hold the policy above."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.entropy_coef_delta < 0:
            raise ValueError(f"entropy_coef_delta must be >= 0, got {self.entropy_coef_delta!r}")
        if not self.entropy_coef_min <= self.entropy_coef_max:
            limit = f"entropy_coef_max, {self.entropy_coef_max!r}"
            raise ValueError(f"entropy_coef_min must be at most {limit}, got {self.entropy_coef_min!r}")


class AdaptiveEntropyTrainer(GRPOTrainer):
    """`GRPOTrainer` with the controller; ``args`` is an `AdaptiveEntropyConfig`. Its metric is ``entropy_coef``."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        if not isinstance(self.args, AdaptiveEntropyConfig):
            raise TypeError(f"args must be an AdaptiveEntropyConfig, got {type(self.args).__name__}")
        self._skips = False  # an entropy is that of all tokens, and the bonus trains those without advantage, too
        self._coefficient, self._last_entropy, self._window = self.args.entropy_coef, math.inf, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        applied = self._coefficient if self._last_entropy <= self.args.entropy_target else 0.0
        self.loss_config = replace(self.loss_config, entropy_coef=applied)
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        sums = self._entropy_and_tokens(output.entropy, inputs["mask"])
        self._window = sums if self._window is None else self._window + sums
        if self.accelerator.sync_gradients:
            self._move()
        return (loss, output) if return_outputs else loss

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
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            with open(os.path.join(output_dir, _FILE), "w") as file:
                json.dump({"entropy_coef": self._coefficient, "last_world_entropy": self._last_entropy}, file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.exists(path := os.path.join(checkpoint, _FILE)):
            with open(path) as file:
                state = json.load(file)
            self._coefficient, self._last_entropy = state["entropy_coef"], state["last_world_entropy"]
