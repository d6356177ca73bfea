"""A reference that follows the policy: every so many steps a mean of both (Gorbatovski et al. 2024, TR-DPO)."""

import os

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_model, save_model
from transformers import TrainerCallback

_FILE = "reference.safetensors"


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
        unwrapped = self.trainer.accelerator.unwrap_model
        policy, reference = unwrapped(self.trainer.model), unwrapped(self.trainer.ref_model)
        for new, old in zip(policy.parameters(), reference.parameters(), strict=True):
            old.lerp_(new.to(old), args.ref_model_mixup_alpha)
        for new, old in zip(policy.buffers(), reference.buffers(), strict=True):
            old.copy_(new)
        self.trainer.retake_reference()


def save(model, folder):
    os.makedirs(folder, exist_ok=True)
    save_model(model, os.path.join(folder, _FILE))


def load(model, folder):
    """Raises FileNotFoundError where the checkpoint is of a run whose reference stood still."""
    path = os.path.join(folder, _FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: the checkpoint holds no reference; sync_ref_model was off when it was written")
    load_model(model, path)
