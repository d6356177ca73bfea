"""TRL's trainers on fused kernels: a patch under all of them, and a GRPO trainer whose whole loss is fused.

`patch_trl()` replaces the autograd function that turns hidden states into log-probs under every TRL trainer. `FusedGRPOTrainer`
is `trl.GRPOTrainer` with the loss itself inside the model's forward: one pass where the options allow it.

How the fused trainer stays TRL's: it hands the loss function through TRL's own forward call, then lets TRL's own `_compute_loss`
run on the detached log-probs that came of it. That makes TRL's metrics, drives its entropy controller and yields TRL's value of
the loss, which must agree with the fused one: a TRL that computes another loss is an error, never a silent difference.

Source: interfaces of TRL 1.15 and 1.16 (trl/trainer/utils.py: add_fused_lm_head; trl/kernels/chunked_logprob.py).
"""

import contextlib
import functools
import inspect
import math
import sys

import torch

from ..config import GRPOLossConfig
from ..logprobs import token_statistics
from ..loss import fused_linear_grpo_loss
from .transformers import FusedCausalLMOutput, fuse_lm_head

try:
    import trl
    import trl.trainer.grpo_trainer as grpo_module
    import trl.trainer.utils as utils_module
    from trl.kernels import chunked_logprob as kernel_module
except ImportError as error:
    raise ImportError("grpo_kernels.integrations.trl needs TRL 1.15 or newer: pip install 'trl>=1.15'") from error

_ARGUMENTS = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
              "outputs")  # fmt: skip
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_AGREEMENT = 1e-3  # of two sums of the same float32 terms, relative to max(1, |loss|)


def _unknown(what):
    return RuntimeError(
        f"this TRL ({trl.__version__}) is not one that grpo_kernels knows: {what}; known are 1.15 and 1.16. Upgrade grpo_kernels, "
        "or install trl==1.16.0"
    )


# ---- the patch


class FusedLogProbFunction:
    """Stands where TRL's `ChunkedLogProbFunction` stood: the same call, the same five results."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
              outputs=_OUTPUTS):  # fmt: skip
        """[N, D], [V, D], [V] or None, [N] -> (logps, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each.

        ``chunk_size`` has no meaning here. What ``outputs`` does not name is None. Gradients: logps and entropy, as TRL's.
        """
        if not torch.is_autocast_enabled(hidden.device.type):  # TRL's tiles have the dtype of hidden
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        if hasattr(weight, "ds_id"):
            # ZeRO-3 takes the gathered weight away after the forward; by another name it lives until the backward
            weight, bias = weight.view_as(weight), None if bias is None else bias.view_as(bias)
        logps, entropy, *diagnostics = token_statistics(
            hidden, weight, targets, bias=bias, temperature=float(temperature), logit_scale=float(logit_scale),
            softcap=final_logit_softcapping, diagnostics=outputs,
        )  # fmt: skip
        return logps, entropy if "entropy" in outputs else None, *diagnostics


def _arguments():
    function = getattr(kernel_module, "ChunkedLogProbFunction", None)
    if function is None or getattr(utils_module, "_ChunkedLogProbFunction", None) is None:
        return None
    return tuple(inspect.signature(function.forward).parameters)


_found = _arguments()
_places = []  # (module, name, value before) of what is patched


def patch_trl() -> None:
    """Replace TRL's chunked log-prob function under every TRL trainer (GRPO, RLOO, DPO, KTO, SFT), those that exist already too.

    Equal to it in all five outputs, to rounding; bias, softcap, logit scale, autocast and ZeRO-3 included. Calling it twice is
    calling it once. Token ids are checked: one outside of [0, V) is a ValueError here.

    Raises:
        RuntimeError: this TRL's function is another than the one known.
    """
    if _places:
        return
    if _found != _ARGUMENTS:
        raise _unknown(f"ChunkedLogProbFunction takes {_found}")
    original, places = kernel_module.ChunkedLogProbFunction, []
    for module in [m for name, m in sys.modules.items() if m is not None and (name == "trl" or name.startswith("trl."))]:
        places += [(module, name, original) for name, value in vars(module).items() if value is original]
    # where there is no Triton kernel TRL scores the masked tokens too; ours takes any number of rows
    if hasattr(utils_module, "_use_triton"):
        places.append((utils_module, "_use_triton", utils_module._use_triton))
    for module, name, before in places:
        setattr(module, name, FusedLogProbFunction if before is original else _any_device)
    _places.extend(places)


def unpatch_trl() -> None:
    """Undo `patch_trl`; without one, nothing."""
    while _places:
        setattr(*_places.pop())


def is_patched() -> bool:
    """Whether TRL's trainers use the fused function now."""
    return utils_module._ChunkedLogProbFunction is FusedLogProbFunction


def _any_device(device):
    return True


# ---- the trainer


class FusedGRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` with every training and evaluation loss by `fused_linear_grpo_loss`, inside the wrapped forward.

    Takes what `trl.GRPOTrainer` takes and logs what it logs. Beyond it: a LoRA adapter on the output layer (``target_modules`` may
    name ``lm_head``), and log-probs at a per-token temperature, see `token_temperature`.

    Raises:
        RuntimeError: at construction, if this TRL is not one that is known; in training, if its loss is not the fused one.
    """

    def __init__(self, *args, **kwargs):
        fused = []

        def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
            fused.append(fuse_lm_head(model, temperature=temperature, head_in_float32=cast_lm_head_to_fp32, outputs=outputs))

        # its refusal of an adapter on the head asks for this class
        names = {"add_fused_lm_head": add, "BaseTunerLayer": _NoLayer}
        with _standing_in(grpo_module, names):
            super().__init__(*args, **kwargs)
        if not fused:
            raise _unknown("GRPOTrainer does not call add_fused_lm_head")
        if self.args.cast_lm_head_to_fp32 and hasattr(fused[0].get_output_embeddings(), "lora_A"):
            raise ValueError("cast_lm_head_to_fp32 must be False with a LoRA adapter on the output layer")
        self._pass = None

    def token_temperature(self, inputs) -> torch.Tensor | None:
        """The temperature of each completion token, [B, C], or None for ``args.temperature``; to be overridden.

        ``inputs`` is what `_generate_and_score_completions` returned for this micro-batch; the default reads its entry
        "temperature". Old and reference log-probs, if there are any, must have been taken at the same temperatures.
        """
        return inputs.get("temperature")

    def _compute_loss(self, model, inputs):
        self._pass = _FusedPass(self, inputs)
        try:
            theirs = super()._compute_loss(model, inputs)
            ours = self._pass.loss
        finally:
            self._pass = None
        if ours is None:
            raise _unknown("GRPOTrainer._compute_loss does not call _get_per_token_logps_and_entropies")
        expected, value = torch.stack([theirs.detach().float(), ours.detach().float()]).tolist()
        if abs(expected - value) > _AGREEMENT * max(1.0, abs(expected)) and math.isfinite(expected) and math.isfinite(value):
            raise _unknown(
                f"its loss of these log-probs is {expected}, the fused one {value}. If a subclass changes the loss, use "
                "patch_trl() with trl.GRPOTrainer instead"
            )
        return ours

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._pass is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(self._pass.instead_of(model), *args, **kwargs)


class _NoLayer:
    """A class of which nothing is an instance."""


@contextlib.contextmanager
def _standing_in(module, names):
    missing = [name for name in names if not hasattr(module, name) and name != "BaseTunerLayer"]
    if missing:
        raise _unknown(f"{module.__name__} has no {', '.join(missing)}")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    vars(module).update({name: names[name] for name in before})
    try:
        yield
    finally:
        vars(module).update(before)


class _FusedPass:
    """One micro-batch: stands in for the model in TRL's forward call, and keeps the loss that came of it."""

    def __init__(self, trainer, inputs):
        self.trainer, self.inputs, self.model, self.loss = trainer, inputs, None, None

    def instead_of(self, model):
        self.model = model
        return self

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, labels, fused_lm_head, **kwargs):
        if self.loss is not None:
            raise _unknown("its loss runs the model more than once")
        trainer, inputs = self.trainer, self.inputs
        length = inputs["completion_ids"].shape[1]
        output = self.model(*args, **kwargs, fused_lm_head=functools.partial(self._fused, length))
        output, aux_loss = output if kwargs.get("output_router_logits") else (output, None)
        # the divisor of the other losses holds the accumulation already
        self.loss = output.loss if self._divides_by_items() else output.loss / self._accumulated()
        if aux_loss is not None and trainer.aux_loss_enabled:
            self.loss = self.loss + trainer.router_aux_loss_coef * aux_loss / self._accumulated()
        mask = labels[:, 1:] != -100
        columns = mask.shape[1] - length
        full = [torch.nn.functional.pad(x.detach(), (columns, 0)) for x in (output.logps, output.entropy)]
        return FusedCausalLMOutput(None, *full, label_mask=mask, aux_loss=None if aux_loss is None else aux_loss.detach())

    def _fused(self, length, hidden, head):
        inputs, device = self.inputs, hidden.device
        given = {name: None if x is None else x.to(device) for name, x in self._tensors().items()}
        num_items = self._normalizer() if self._divides_by_items() else None
        mask = inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        return fused_linear_grpo_loss(
            hidden[:, -length - 1 : -1], head.weight, inputs["completion_ids"].to(device), inputs["advantages"].to(device),
            mask.to(device), bias=head.bias, lora=head.lora, config=self._config(head), data_parallel_group=self._group(),
            num_items=num_items, **given,
        )  # fmt: skip

    def _tensors(self):
        trainer, inputs = self.trainer, self.inputs
        corrects = trainer.loss_type == "vespo" or (trainer.use_vllm and trainer.vllm_importance_sampling_correction)
        return {
            "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs.get("ref_per_token_logps"),
            "sampling_logps": inputs.get("sampling_per_token_logps"),
            "importance_sampling_ratio": inputs.get("importance_sampling_ratio") if corrects else None,
            "temperature": trainer.token_temperature(inputs),
        }

    def _config(self, head):
        trainer, args = self.trainer, self.trainer.args
        entropy_coef = 0.0
        if trainer._entropy_bonus_enabled:
            allowed = not trainer.use_adaptive_entropy or trainer._last_world_entropy <= args.entropy_target
            entropy_coef = trainer.entropy_coef if allowed else 0.0
        if self._divides_by_items():  # the divisor holds the accumulation; the bonus does not know of it
            entropy_coef = entropy_coef / self._accumulated()
        return GRPOLossConfig(
            loss_type=trainer.loss_type,
            importance_sampling_level=trainer.importance_sampling_level,
            epsilon=trainer.epsilon_low,
            epsilon_high=trainer.epsilon_high,
            delta=args.delta,
            beta=trainer.beta,
            use_bias_correction_kl=args.use_bias_correction_kl,
            temperature=trainer.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            entropy_coef=entropy_coef,
            top_entropy_quantile=trainer.top_entropy_quantile,
            off_policy_mask_threshold=trainer.off_policy_mask_threshold,
            max_completion_length=trainer.max_completion_length,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
        )

    def _divides_by_items(self):
        return self.trainer.loss_type in ("cispo", "dapo", "vespo")

    def _trains(self):
        return self.trainer.model.training

    def _accumulated(self):
        return self.trainer.current_gradient_accumulation_steps if self._trains() else 1.0

    def _normalizer(self):
        """TRL's divisor of this micro-batch's sum: the generation batch's tokens, per process and per accumulation window."""
        trainer = self.trainer
        normalizer = self.inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if self._trains():
            normalizer = normalizer * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
        return normalizer.item()  # may be below 1, where a tensor would be clamped

    def _group(self):
        """Over which TRL takes the entropy quantile: all processes."""
        return torch.distributed.group.WORLD if self.trainer.accelerator.num_processes > 1 else None
