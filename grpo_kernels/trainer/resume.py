"""A run that goes on where it was broken off: what of ours a checkpoint holds, and which checkpoint is resumed.

Amid a rollout each process saves its rows of it. The resumed run trains on the same completions, however many processes it has.
"""

import math
import os

import torch
from accelerate.utils import gather_object
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ..support import TokenSupport
from . import checkpoints, microbatch
from .run_checks import raising_together


class Resume:
    """Of `GRPOTrainer`: `train` from a checkpoint, saving and loading."""

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
            with raising_together(self.args):
                if asked and self.args.should_save:
                    checkpoints.check(asked)
        with raising_together(self.args):
            if asked:
                checkpoints.check_kind(asked, self.is_fsdp_enabled)
        return asked or None

    def _newest_checkpoint(self, needed):
        """The newest one that is whole on every node; one process of each reads all of its bytes."""
        reads, found = self.args.local_process_index == 0, None
        with raising_together(self.args):
            if reads:
                found = checkpoints.newest(self.args.output_dir)
                if found is None and needed:
                    raise checkpoints.Unusable(f"resume_from_checkpoint: {self.args.output_dir} has no checkpoint")
        oldest = min(gather_object([found] if reads else []), key=checkpoints.step_of)
        with raising_together(self.args):
            if reads and oldest not in (found, None):
                checkpoints.check(oldest)
        return oldest

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _finished(self, checkpoint, state):
        """transformers would take one step more."""
        said = f"{checkpoint} has taken all {state.global_step} steps of the run: nothing is left to train"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise checkpoints.Unusable(said)
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.is_world_process_zero():
            print(said)
        return TrainOutput(state.global_step, math.nan, {})

    def _save_checkpoint(self, model, trial):
        folder = self._get_output_dir(trial)
        new = os.path.join(folder, f"checkpoint-{self.state.global_step}")
        with self._off_the_clock():
            if self.args.should_save and os.path.exists(seal := os.path.join(new, checkpoints.SEAL)):
                os.remove(seal)  # of an earlier run that came as far
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self._seal(new)
            if self.args.should_save:
                # only now is it safe to delete older ones
                rotate_checkpoints(folder, limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True)

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
            self.save_reference(output_dir)
        if self.state.global_step % self.args.steps_per_rollout:
            os.makedirs(output_dir, exist_ok=True)
            rows = self._layout()[self.args.process_index]
            saved = {"index": self._rollout_index, "rollout": self._rollout, "rows": rows, "processes": self.args.world_size}
            torch.save(saved, rollout_file(output_dir, self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        with raising_together(self.args):
            if checkpoint is not None and self.args.sync_ref_model:
                self.load_reference(checkpoint)
            if checkpoint is not None and self.state.global_step % self.args.steps_per_rollout:
                self._load_rollout(checkpoint)

    def _load_rollout(self, checkpoint):
        """This process's rows of the rollout that the checkpoint is amid, from the files of all that saved it."""
        first = self._saved_rollout(checkpoint, 0)
        kept = "ref_hidden" if self.loss_config.exact_kl else "ref_logps"
        if self.args.beta != 0 and kept not in first["rollout"]:
            raise ValueError(
                f"kl_estimator and beta must be those of the checkpoint: it is amid a rollout that has no {kept} of the reference, "
                f"got kl_estimator {self.args.kl_estimator!r} and beta {self.args.beta}"
            )
        index = self.state.global_step // self.args.steps_per_rollout
        if first["index"] != index:
            raise ValueError(
                f"num_iterations, steps_per_generation and gradient_accumulation_steps must be those of the checkpoint: it is amid "
                f"rollout {first['index']}, with these step {self.state.global_step} is of rollout {index}"
            )
        wanted, rollout = self._layout()[self.args.process_index], None
        if first["processes"] == self.args.world_size:
            own = self._saved_rollout(checkpoint, self.args.process_index)
            rollout = own["rollout"] if torch.equal(own["rows"].cpu(), wanted) else None
        if rollout is None:
            parts = [first, *(self._saved_rollout(checkpoint, rank) for rank in range(1, first["processes"]))]
            rows = torch.cat([part["rows"] for part in parts])
            if len(rows) != self.args.generation_batch_size:
                raise ValueError(
                    f"generation_batch_size must be that of the checkpoint, which is amid a rollout of {len(rows)} completions, "
                    f"got {self.args.generation_batch_size}"
                )
            whole = microbatch.joined([part["rollout"] for part in parts], self.processing_class.pad_token_id)
            rollout = microbatch.take(whole, rows.argsort()[wanted])
        self._rollout, self._rollout_index = self._prepare_inputs(rollout), index

    def _saved_rollout(self, checkpoint, rank):
        path = rollout_file(checkpoint, rank)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: step {self.state.global_step} is amid a rollout, without which the run cannot go on as it was; "
                f"resume from a checkpoint that holds it, or from a step divisible by {self.args.steps_per_rollout}"
            )
        with torch.serialization.safe_globals([TokenSupport]):
            return torch.load(path, map_location="cpu", weights_only=True)  # "cpu:0", a rank's device, is not known to it


def rollout_file(folder, rank) -> str:
    return os.path.join(folder, f"rollout_{rank}.pt")


def state_of(checkpoint) -> TrainerState:
    return TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
