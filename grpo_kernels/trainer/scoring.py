"""What the loss compares with: the policy's log-probs before a rollout's first step, and the reference.

The reference is a frozen copy of the model, or the model without its adapters. It stands still, or becomes every so many steps a
mean of itself and the policy (Gorbatovski et al. 2024, TR-DPO).
"""

import contextlib
import math
import os

import torch
from accelerate.utils import DistributedType, fsdp2_prepare_model
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback

from ..integrations.transformers import lm_head
from ..logprobs import linear_logprobs
from . import microbatch
from .rollout import seeded

_FILE = "reference.safetensors"


class Scoring:
    """Of `GRPOTrainer`: a rollout's tokens under other weights than those that are trained."""

    def _old_logps(self, batch, index):
        """[B, T] of the policy as it sampled rollout ``index``.

        By the loss's own kernels and in training mode, so that the first step finds these bits again. Draws of dropout are
        others, and must not depend on what a checkpoint forgets.
        """
        self.model.train()
        with seeded(self.args.seed, "old_logps", index, self.args.process_index):
            return self._of_tokens(lambda *given: self._loss(*given)[0].logps, self.model, batch, skip=self._skips)

    def _beside_sampler(self, batch) -> dict:
        """A server's rollout with ``old_logps``; if `corrects_sampler`, with the ``importance_sampling_ratio`` [B, T] of these to
        its ``sampling_logps`` too, at most ``rollout_server_clip_max``.

        Source: truncated importance sampling of Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
        training".
        """
        self._record_sampler(batch["old_logps"], batch)
        if not self.args.corrects_sampler:
            return batch
        mask = self._with_gradient(batch)
        difference = (batch["old_logps"].float() - batch["sampling_logps"]).where(mask, 0.0)
        ratio, kept = difference.exp().clamp(max=self.args.rollout_server_clip_max), mask.sum()
        found = {"sampler/ratio_mean": ratio.where(mask, 0.0).sum() / kept, "sampler/ratio_max": ratio.where(mask, 0.0).amax()}
        self._metrics["train"].record(found | {"sampler/ratio_min": ratio.where(mask, math.inf).amin()}, kept)
        batch = batch | {"importance_sampling_ratio": ratio}
        if self.args.steps_per_rollout == 1:
            del batch["old_logps"]  # the one step's own, which the loss makes
        return batch

    def _record_sampler(self, logps, batch):
        """How far the policy's log-probs [B, T], before its first update by the rollout, are from the server's."""
        mask = self._with_gradient(batch)
        apart, kept = (logps.float() - batch["sampling_logps"]).abs().where(mask, 0.0), mask.sum()
        found = {"sampler/logp_difference_mean": apart.sum() / kept, "sampler/logp_difference_max": apart.amax()}
        self._metrics["train"].record(found, kept)  # nan of no tokens, which is not recorded

    def _with_gradient(self, batch):
        """[B, T] bool: kept tokens of the completions that are not skipped, and so have log-probs."""
        mask = batch["mask"]
        return mask & microbatch.trained(mask, batch["advantages"]).unsqueeze(1) if self._skips else mask

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
        for part in [batch] if whole else microbatch.split(batch, self.args.per_device_train_batch_size):
            micro = self._micro_batch(part, skip)

            def in_head(hidden, head, micro=micro):
                found = function(micro.predicting(hidden), head, micro.loss_inputs)
                parts.append(micro.spread(found))
                return found

            with self.compute_loss_context_manager():
                model(**micro.model_inputs, use_cache=False, fused_lm_head=in_head)
        return torch.cat(parts)

    def _prepare_reference(self, model):
        """``model``: the frozen copy, or None where the reference is the policy without its adapters."""
        if model is not None and self.accelerator.is_fsdp2:  # prepare_model would leave it whole, and on the CPU
            model = fsdp2_prepare_model(self.accelerator, model)
        elif model is not None:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.ref_model = model
        if self.args.sync_ref_model:
            self.add_callback(Synchronised(self))

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

    def save_reference(self, folder):
        os.makedirs(folder, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.ref_model), os.path.join(folder, _FILE))

    def load_reference(self, folder):
        """Raises FileNotFoundError where the checkpoint is of a run whose reference stood still."""
        path = os.path.join(folder, _FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: the checkpoint holds no reference; sync_ref_model was off when it was written")
        load_model(self.accelerator.unwrap_model(self.ref_model), path)


class Synchronised(TrainerCallback):
    """reference = alpha x policy + (1 - alpha) x reference after every ``ref_model_sync_steps`` optimiser steps."""

    def __init__(self, trainer):
        if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("sync_ref_model must be False for a sharded model, whose reference is sharded on its own, got True")
        self.trainer = trainer

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps:
            return
        trainer = self.trainer
        policy, reference = map(trainer.accelerator.unwrap_model, (trainer.model, trainer.ref_model))
        for new, old in zip(policy.parameters(), reference.parameters(), strict=True):
            old.lerp_(new.to(old), args.ref_model_mixup_alpha)
        for new, old in zip(policy.buffers(), reference.buffers(), strict=True):
            old.copy_(new)
        if trainer._rollout is not None and "ref_hidden" in trainer._rollout and state.global_step % args.steps_per_rollout:
            trainer._rollout |= trainer._of_reference(trainer._rollout)  # whose states are multiplied with the new head


def _as_the_head_sees_them(hidden, head, given):
    """Hidden states in the dtype that the loss takes their product in: half of the memory under autocast, and the same KL."""
    device = hidden.device.type
    lower = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return hidden.to(torch.get_autocast_dtype(device)) if lower else hidden
