"""TRL's trainers on fused kernels: a patch under all of them, and a GRPO trainer whose whole loss is fused.

`patch_trl()` replaces the autograd function that turns hidden states into log-probs under every TRL trainer, and the one that
compares a student's with a teacher's under `trl.DistillationTrainer`. `FusedGRPOTrainer` is `trl.GRPOTrainer` with the loss itself
inside the model's forward: one pass where the options allow it.

How the fused trainer stays TRL's: it hands the loss function through TRL's own forward call, then lets TRL's own `_compute_loss`
run on the detached log-probs that came of it. That makes TRL's metrics, drives its entropy controller and yields TRL's value of
the loss, which must agree with the fused one. On-policy that value is close to 0 whatever the loss, so the first micro-batches
compare the gradients with respect to log-probs and entropies, too.

``top_entropy_quantile`` keeps the tokens that TRL's rule keeps: float32 entropies >= `torch.quantile` of those of all tokens that
count. Tokens of one context, such as the first of every completion of a prompt, have one distribution, so TRL's entropies of them
are equal to the bit; ours differ in the last ones, because the kernels sum the sampled token apart. Where the quantile falls on
such a group stock TRL trains all of it and this module a part, and the runs differ from that step on.

Under top-p, top-k or min-p a token came from the renormalised distribution over the tokens that were left. The fused trainer keeps
these supports, the sampling mask, and takes its log-probs over them (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; see
`FusedGRPOTrainer`). Stock TRL takes them over the whole vocabulary, so such runs differ unless ``keep_sampling_mask=False``.

Source: interfaces of TRL 1.15 and 1.16 (trl/trainer/utils.py: add_fused_lm_head; trl/kernels/chunked_logprob.py,
chunked_divergence.py).
"""

import collections
import contextlib
import dataclasses
import importlib.util
import inspect
import math
import sys
import warnings

import torch

from ..call import LossArguments, TokenLoss
from ..checks import kind
from ..distributed import QuantileOnly
from ..divergence import linear_divergence
from ..logprobs import token_statistics
from ..loss import fused_linear_grpo_loss
from ..losses.config import GRPOLossConfig
from ..support import TokenSupport
from .sampling_mask import filled_in, mask_metrics, recorded_support, truncations
from .transformers import FusedCausalLMOutput, LMHead, fuse_lm_head, lm_head

try:
    import trl
    import trl.trainer.grpo_trainer as grpo_module
    import trl.trainer.utils as utils_module
    from trl.kernels import chunked_logprob as kernel_module
except ImportError as error:
    raise ImportError("grpo_kernels.integrations.trl needs TRL 1.15 or newer: pip install 'trl>=1.15'") from error
divergence_module = distillation_module = None
if importlib.util.find_spec("trl.kernels.chunked_divergence") is not None:  # younger than the log-prob function
    # TRL imports its trainers when they are asked for; one imported after the patch would keep what it replaced for ever
    import trl.trainer.distillation_trainer as distillation_module
    from trl.kernels import chunked_divergence as divergence_module

_ARGUMENTS = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
              "outputs")  # fmt: skip
_DIVERGENCE_ARGUMENTS = (
    "ctx", "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias", "beta",
    "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)  # fmt: skip
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_AGREEMENT = 1e-3  # of two sums of the same float32 terms, relative to max(1, |loss|)
_COMPARED = 8  # micro-batches of each kind whose gradients are compared
_GRADIENT_AGREEMENT = 1e-2  # relative; one token of 32k on the other side of a clip bound is half of it
_MAKES_LOSS = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies", "get_high_entropy_mask",
               "get_off_policy_mask", "get_gamma_weights")  # fmt: skip


def _unknown(what):
    return RuntimeError(
        f"this TRL ({trl.__version__}) is not one that grpo_kernels knows: {what}; known are 1.15 and 1.16. Upgrade grpo_kernels, "
        "or install trl==1.16.0"
    )


def _another_loss(trainer, what):
    """The fault is a subclass's where there is one that overrides what makes the loss, and otherwise TRL's."""
    changes = [
        f"{cls.__name__}.{name}"
        for cls in type(trainer).__mro__
        if cls is not FusedGRPOTrainer and not issubclass(trl.GRPOTrainer, cls)
        for name in _MAKES_LOSS
        if name in vars(cls)
    ]
    if not changes:
        return _unknown(what)
    return RuntimeError(
        f"{type(trainer).__name__} does not train the loss of trl.GRPOTrainer: {what}. It overrides {', '.join(changes)}; a "
        "trainer that changes log-probs or loss must derive from trl.GRPOTrainer, with patch_trl()"
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
        weight, bias = map(_outliving_zero3, (weight, bias))
        logps, entropy, *diagnostics = token_statistics(
            hidden, weight, targets, bias=bias, temperature=float(temperature), logit_scale=float(logit_scale),
            softcap=final_logit_softcapping, diagnostics=outputs,
        )  # fmt: skip
        return logps, entropy if "entropy" in outputs else None, *diagnostics[:3]


class FusedDivergenceFunction:
    """Stands where TRL's `ChunkedDivergenceFunction` stood: the same call, the same two results."""

    @staticmethod
    def apply(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature=1.0,
              student_logit_scale=1.0, student_final_logit_softcapping=None, teacher_logit_scale=1.0,
              teacher_final_logit_softcapping=None):  # fmt: skip
        """[N, D], [V, D], [V] or None, and a teacher's [N, D'], [V, D'], [V] or None -> (divergence, entropy), [N] each.

        beta 0 is KL(teacher || student), 1 KL(student || teacher), between them the generalised JSD. Gradients: the student's, from
        the divergence alone, as TRL's.
        """
        gather = utils_module.maybe_gather_lm_head_ctx  # here, for the trainer calls from outside of the heads' own forwards
        with gather(student_weight, student_bias), gather(teacher_weight, teacher_bias):
            weight, teacher_weight = (
                w if torch.is_autocast_enabled(h.device.type) else w.to(h.dtype)  # TRL's products have the dtype of hidden
                for h, w in ((student_hidden, student_weight), (teacher_hidden, teacher_weight))
            )
            weight, bias = map(_outliving_zero3, (weight, student_bias))
            return linear_divergence(
                student_hidden, weight, teacher_hidden, teacher_weight, kind="jsd", beta=float(beta), bias=bias,
                teacher_bias=teacher_bias, temperature=float(temperature), logit_scale=float(student_logit_scale),
                softcap=student_final_logit_softcapping, teacher_logit_scale=float(teacher_logit_scale),
                teacher_softcap=teacher_final_logit_softcapping,
            )  # fmt: skip


def _outliving_zero3(parameter):
    """ZeRO-3 takes the gathered weight away after the forward; by another name it lives until the backward."""
    return parameter.view_as(parameter) if hasattr(parameter, "ds_id") else parameter


def _arguments(module=kernel_module, name="ChunkedLogProbFunction"):
    function = getattr(module, name, None)
    if function is None or getattr(utils_module, "_ChunkedLogProbFunction", None) is None:
        return None
    return tuple(inspect.signature(function.forward).parameters)


_found = _arguments()
_found_divergence = None if divergence_module is None else _arguments(divergence_module, "ChunkedDivergenceFunction")
_places = []  # (module, name, value before) of what is patched


def patch_trl() -> None:
    """Replace TRL's chunked log-prob function under every TRL trainer (GRPO, RLOO, DPO, KTO, SFT), those that exist already too.

    Equal to it in all five outputs, to rounding; bias, softcap, logit scale, autocast and ZeRO-3 included. Calling it twice is
    calling it once. Token ids are checked: one outside of [0, V) is a ValueError here. Log-probs are over the whole vocabulary, as
    TRL's are: rollouts under top-p, top-k or min-p need `FusedGRPOTrainer`, which keeps what was left.

    Under `trl.DistillationTrainer` it replaces the chunked divergence and the entropy beside it, where this TRL has that function.

    Raises:
        RuntimeError: one of this TRL's functions is another than the one known.
    """
    if _places:
        return
    replaced = [(kernel_module, "ChunkedLogProbFunction", _found, _ARGUMENTS, FusedLogProbFunction)]
    if divergence_module is not None:
        known = _DIVERGENCE_ARGUMENTS
        replaced.append((divergence_module, "ChunkedDivergenceFunction", _found_divergence, known, FusedDivergenceFunction))
    for _, name, found, known, _ in replaced:
        if found != known:
            raise _unknown(f"{name} {'is missing' if found is None else f'takes {found}'}")
    places, modules = [], [m for name, m in sys.modules.items() if m is not None and (name == "trl" or name.startswith("trl."))]
    for home, name, _, _, ours in replaced:
        original = getattr(home, name)
        places += [(m, key, value, ours) for m in modules for key, value in vars(m).items() if value is original]
    for module in (utils_module, distillation_module):
        # where there is no Triton kernel TRL scores the masked tokens too; ours takes any number of rows
        if hasattr(module, "_use_triton"):
            places.append((module, "_use_triton", module._use_triton, _any_device))
    for module, name, _, ours in places:
        setattr(module, name, ours)
    _places.extend(place[:3] for place in places)


def unpatch_trl() -> None:
    """Undo `patch_trl`; without one, nothing."""
    while _places:
        setattr(*_places.pop())


def is_patched() -> bool:
    """Whether TRL's trainers use the fused function now."""
    return getattr(utils_module, "_ChunkedLogProbFunction", None) is FusedLogProbFunction


def _any_device(device):
    return True


# ---- the trainer


class FusedGRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` with every training and evaluation loss by `fused_linear_grpo_loss`, inside the wrapped forward.

    Takes what `trl.GRPOTrainer` takes and logs what it logs. Beyond it: a LoRA adapter on the output layer (``target_modules`` may
    name ``lm_head``), log-probs at a per-token temperature, see `token_temperature`, and log-probs over the tokens that a truncated
    sampler left: trained, old and reference log-probs, their ratio and KL, and entropies are then over the supports, whose sizes
    are logged as ``sampling_mask/*``.

    Supports come from transformers' ``generate``, recorded as it samples, or from a ``rollout_func`` that returns "sampling_mask":
    for each completion (token_ids, offsets), where its token i could have been any of ``token_ids[offsets[i]:offsets[i + 1]]``, or
    None. Name and layout are those of vLLM's ``SamplingMask``; that, or a `TokenSupport`, may stand for the pair. Ranges of tokens
    that ``env_mask`` leaves out have no meaning.

    Args:
        keep_sampling_mask: None keeps supports where generate truncates (top_p, top_k, min_p, or an option like them in
            ``generation_kwargs``) and where a ``rollout_func`` returns them. True records those of every generate, and asks a
            ``rollout_func`` for them. False trains over the whole vocabulary, as TRL does. So does None where a sampler truncates
            and returns none, with a warning.

    Raises:
        RuntimeError: at construction, if this TRL is not one that is known; in training, if its loss, or that of a subclass, is not
            the fused one.
        ValueError: at construction, an option of the loss has a value it cannot have, training in float16, or keep_sampling_mask
            True where nothing returns one: vLLM and continuous batching without a ``rollout_func``; in training, a sampling mask
            that does not fit its completions.
        NotImplementedError: at construction, an adapter on the output layer that is not a plain LoRA.
    """

    def __init__(self, *args, keep_sampling_mask: bool | None = None, **kwargs):
        fused = []

        def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
            fused.append(fuse_lm_head(model, temperature=temperature, head_in_float32=cast_lm_head_to_fp32, outputs=outputs))

        # its refusal of an adapter on the head asks for this class
        names = {"add_fused_lm_head": add, "BaseTunerLayer": _NoLayer}
        with _standing_in(grpo_module, names):
            super().__init__(*args, **kwargs)
        if not fused:
            raise _unknown("GRPOTrainer does not call add_fused_lm_head")
        _refuse_what_training_would(fused[0])
        if self.args.fp16:
            raise ValueError(
                "fp16 must be False: this loss makes its gradients before a loss scale could keep small ones from vanishing in "
                "float16; use bf16, or patch_trl(), whose gradients are made behind the scale"
            )
        if self.args.cast_lm_head_to_fp32 and hasattr(fused[0].get_output_embeddings(), "lora_A"):
            raise ValueError("cast_lm_head_to_fp32 must be False with a LoRA adapter on the output layer")
        self._pass, self._compared = None, collections.Counter()
        self._masks = self._turns = None  # supports of the completions that are being scored; of the calls of generate before them
        self.keep_sampling_mask, self._warned = self._checked_keeping(keep_sampling_mask), False
        self._vocab = fused[0].config.get_text_config().vocab_size
        _FusedPass(self, {}).config(LMHead(None, None, None, 1.0, None))  # raises now what the first loss would raise

    def token_temperature(self, inputs) -> torch.Tensor | None:
        """The temperature of each completion token, [B, C], or None for ``args.temperature``; to be overridden.

        ``inputs`` is what `_generate_and_score_completions` returned for this micro-batch; the default reads its entry
        "temperature". Old and reference log-probs, if there are any, must have been taken at the same temperatures.
        """
        return inputs.get("temperature")

    def _compute_loss(self, model, inputs):
        self._pass = _FusedPass(self, inputs)
        try:
            self._pass.compare(super()._compute_loss(model, inputs))
            ours = self._pass.loss
        finally:
            self._pass = None
        if ours is None:
            raise _another_loss(self, "_compute_loss does not call _get_per_token_logps_and_entropies")
        return ours

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._pass is not None:
            model = self._pass.instead_of(model)
        elif not torch.is_grad_enabled():
            model = _Scorer(self.temperature, model, logits_to_keep, self._masks)
        return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _checked_keeping(self, keep):
        if keep is not None and not isinstance(keep, bool):
            raise TypeError(f"keep_sampling_mask must be True, False or None, got {keep!r}")
        if keep and self.rollout_func is None and not self._uses_generate():
            sampler = "use_vllm" if self.use_vllm else "use_transformers_continuous_batching"
            raise ValueError(
                f"keep_sampling_mask must be None or False with {sampler} and no rollout_func, which could return one, got True"
            )
        return keep

    def _uses_generate(self):
        return self.rollout_func is None and not (self.use_vllm or getattr(self, "use_transformers_continuous_batching", False))

    def _records(self):
        """Whether generate's supports are noted."""
        keep = self.keep_sampling_mask
        return self._uses_generate() and (bool(_truncations(self)) if keep is None else keep)

    def _generate_and_score_completions(self, inputs):
        self._masks = None
        try:
            output = super()._generate_and_score_completions(inputs)
            # decided by what is alike on all ranks: a rollout_func may return masks on some of them
            if self._records() or (self.rollout_func is not None and self.keep_sampling_mask is not False):
                self._log_sampling_mask(output)
            # a list, which TRL shuffles and splits by completion as it does its lists of images
            return output if self._masks is None else {**output, "sampling_mask": self._masks}
        finally:
            self._masks = None

    def _generate(self, prompts):
        keep = self.keep_sampling_mask
        self._turns = [] if self._records() else None
        try:
            output = super()._generate(prompts)
            if len(output) < 6 or not isinstance(output[5], dict):
                raise _unknown("GRPOTrainer._generate returns other results")
            prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, *others = output
            given = extra_fields.pop("sampling_mask", None)
            if self._turns:
                self._masks, logprobs = _by_completion(_joined(self._turns), _numbers(logprobs, completion_ids)), None
            elif self.rollout_func is not None and keep is not False and (keep or given is not None):
                self._masks = _masks_of_rollouts(given, completion_ids, tool_mask)
            if self._masks is None and keep is None:
                self._warn_of_other_probabilities()
            return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, *others
        finally:
            self._turns = None

    def _log_sampling_mask(self, output):
        mask = output["completion_mask"] * output.get("tool_mask", 1) > 0
        if self._masks is None:
            mask = torch.zeros_like(mask)
        support = TokenSupport.from_sequences(self._masks or [None] * len(mask), mask.shape[1], mask.device)
        found, count = mask_metrics(support, mask, self._vocab), mask.sum()
        sums = torch.stack([count, *(value.nan_to_num() * count for value in found.values())])
        count, *sums = self.accelerator.gather(sums).view(-1, len(sums)).sum(0).tolist()
        if count > 0:
            for name, total in zip(found, sums, strict=True):
                self._metrics["train" if self.model.training else "eval"][name].append(total / count)

    def _warn_of_other_probabilities(self):
        cuts = "" if self._warned else ", ".join(f"{name} {value}" for name, value in _truncations(self).items())
        if cuts and self.accelerator.is_main_process:
            warnings.warn(
                f"sampling leaves tokens out ({cuts}) and returned no sampling mask: the loss is over the whole vocabulary, with "
                'other probabilities than were sampled from. Return "sampling_mask" from a rollout_func, or set '
                "keep_sampling_mask=False to silence this",
                stacklevel=2,
            )
            self._warned = True

    def _generate_single_turn(self, *args, **kwargs):
        if self._turns is None:
            return super()._generate_single_turn(*args, **kwargs)
        with recorded_support(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)) as recorder:
            completion_ids, _ = super()._generate_single_turn(*args, **kwargs)
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        before = sum(turn.positions for turn in self._turns)
        self._turns.append(recorder.support(mask.to(self.accelerator.device)).to("cpu"))
        # numbers of positions, from 1, where other samplers return log-probs: TRL's loop over tool calls cuts, joins and fills
        # these lists as it does the completions, with 0.0 for the tokens of a tool
        numbers = before + 1 + torch.arange(mask.numel()).view_as(mask)
        return completion_ids, [row[own].tolist() for row, own in zip(numbers, mask, strict=True)]


def _refuse_what_training_would(model):
    """An adapter whose dropout, off so far, would be on."""
    layer = model.get_output_embeddings()
    was = layer.training
    try:
        layer.train()
        lm_head(model)
    finally:
        layer.train(was)


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


class _StandIn:
    """Called by TRL in the model's place. Takes per-token results where the head made them: FSDP2 under bf16 returns them from
    the wrapped forward as bfloat16, an error of up to 3 % in the ratio of a token with log-prob -8."""

    model = None

    def __getattr__(self, name):
        return getattr(self.model, name)


class _Scorer(_StandIn):
    """For log-probs without gradient: of the old policy and of the reference."""

    def __init__(self, temperature, model, length, masks):
        self.temperature, self.model, self.length, self.masks = temperature, model, length, masks
        self.first = 0  # completion of the next call: TRL scores some at a time

    def __call__(self, *args, labels, fused_lm_head, **kwargs):
        scored, rows = [], slice(self.first, self.first + len(labels))
        self.first = rows.stop

        def score(hidden, head):
            target = labels[:, -self.length :].to(hidden.device)  # prompt learning puts more positions before them
            mask = target != -100
            support = _joined(None if self.masks is None else self.masks[rows], self.length, hidden.device)
            scored[:] = *token_statistics(
                hidden[:, -self.length - 1 : -1], head.weight, target.where(mask, 0), mask=mask, bias=head.bias, lora=head.lora,
                temperature=self.temperature, logit_scale=head.logit_scale, softcap=head.softcap, support=support,
            )[:2], mask  # fmt: skip
            return scored[0]

        output = self.model(*args, **kwargs, fused_lm_head=score)
        aux_loss = output[1] if kwargs.get("output_router_logits") else None
        return FusedCausalLMOutput(None, scored[0], scored[1], label_mask=scored[2], aux_loss=aux_loss)


class _FusedPass(_StandIn):
    """One micro-batch of `_compute_loss`: keeps the loss that came of TRL's forward call."""

    def __init__(self, trainer, inputs):
        self.trainer, self.inputs, self.loss = trainer, inputs, None

    def instead_of(self, model):
        self.model = model
        return self

    def __call__(self, *args, labels, fused_lm_head, **kwargs):
        if self.loss is not None:
            raise _another_loss(self.trainer, "its loss runs the model more than once")
        trainer, length = self.trainer, self.inputs["completion_ids"].shape[1]
        output = self.model(*args, **kwargs, fused_lm_head=self._fused)
        loss, aux_loss = output if kwargs.get("output_router_logits") else (output, None)
        self.loss = loss + (self.value - loss.detach())  # a difference where the wrapper rounded it
        if aux_loss is not None and trainer.aux_loss_enabled:
            self.loss = self.loss + trainer.router_aux_loss_coef * aux_loss / self._accumulated()
        columns = labels.shape[1] - 1 - length
        full = [torch.nn.functional.pad(x, (columns, 0)) for x in self.seen]
        return FusedCausalLMOutput(
            None, *full, label_mask=labels[:, 1:] != -100, aux_loss=None if aux_loss is None else aux_loss.detach()
        )

    def _fused(self, hidden, head):
        inputs, device = self.inputs, hidden.device
        mask = inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        advantages, mask = inputs["advantages"].to(device), mask.to(device)
        given = {name: None if x is None else x.to(device) for name, x in self._tensors().items()}
        temperature = self.trainer.token_temperature(inputs)
        if temperature is not None and not isinstance(temperature, torch.Tensor):
            raise TypeError(f"token_temperature must return a tensor [B, C] or None, got {kind(temperature)}")
        config, divisor = self.config(head), self._accumulated()
        if self._divides_by_items():  # the divisor holds the accumulation already; the bonus does not know of it
            given["num_items"] = self._normalizer()
            config, divisor = dataclasses.replace(config, entropy_coef=config.entropy_coef / divisor), 1.0
        given.update(config=config, data_parallel_group=self._group())
        ids = inputs["completion_ids"].to(device)
        output = fused_linear_grpo_loss(
            hidden[:, -ids.shape[1] - 1 : -1], head.weight, ids, advantages, mask, bias=head.bias, lora=head.lora,
            temperature=None if temperature is None else temperature.to(device),
            support=_joined(inputs.get("sampling_mask"), ids.shape[1], device), **given,
        )  # fmt: skip
        loss = output.loss / divisor
        # a ratio of 1 where nothing counts: TRL multiplies by 0 there, which makes an overflowed one NaN
        old = given["old_logps"]
        logps = output.logps if old is None else output.logps.where(mask > 0, old.to(output.logps.dtype))
        self.value, self.seen = loss.detach(), [logps.detach(), output.entropy.detach()]
        same = LossArguments(hidden, None, ids, mask, advantages=advantages, **given)
        self._prepare_comparison(lambda *seen: TokenLoss(same, wait=True)(*seen)[0] / divisor, given)
        return loss

    def _prepare_comparison(self, same_loss, given):
        # decided by what is alike on all ranks: an entropy quantile is taken over them
        kind = (*(name for name, x in given.items() if x is not None), given["config"].entropy_coef != 0)
        self.same_loss = None
        if torch.is_grad_enabled() and self.trainer._compared[kind] < _COMPARED:
            self.trainer._compared[kind] += 1
            self.same_loss, self.seen = same_loss, [x.requires_grad_() for x in self.seen]

    def compare(self, theirs):
        """Raises where TRL's loss of these log-probs, or its gradient, is not the fused one's."""
        if self.loss is None:
            return
        expected, value = torch.stack([theirs.detach().float(), self.loss.detach().float()]).tolist()
        if math.isfinite(expected) and not abs(expected - value) <= _AGREEMENT * max(1.0, abs(expected)):
            raise _another_loss(self.trainer, f"its loss of these log-probs is {expected}, the fused one {value}")
        if self.same_loss is None:
            return
        ours = self.same_loss(*self.seen)
        for name, a, b in zip(("log-probs", "entropies"), self._gradient(theirs), self._gradient(ours), strict=True):
            gap, size = torch.stack([(a - b).norm(), b.norm()]).tolist()
            # a gradient of rounding errors alone, as that of a KL between equal policies, is no difference
            if gap > _GRADIENT_AGREEMENT * size + 1e-6 / (len(a) * self._accumulated()):
                what = f"its gradient in the {name} differs from the fused one, of norm {size:.3g}, by {gap:.3g}"
                raise _another_loss(self.trainer, what)

    def _gradient(self, loss):
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in self.seen]
        return torch.autograd.grad(loss, self.seen, allow_unused=True, materialize_grads=True)

    def _tensors(self):
        trainer, inputs = self.trainer, self.inputs
        corrects = trainer.loss_type == "vespo" or (trainer.use_vllm and trainer.vllm_importance_sampling_correction)
        return {
            "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs.get("ref_per_token_logps"),
            "sampling_logps": inputs.get("sampling_per_token_logps"),
            "importance_sampling_ratio": inputs.get("importance_sampling_ratio") if corrects else None,
        }

    def config(self, head):
        trainer, args = self.trainer, self.trainer.args
        entropy_coef = 0.0
        if trainer._entropy_bonus_enabled:
            allowed = not trainer.use_adaptive_entropy or trainer._last_world_entropy <= args.entropy_target
            entropy_coef = trainer.entropy_coef if allowed else 0.0
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
        """Over which TRL takes the entropy quantile, and nothing else: all processes."""
        return QuantileOnly(torch.distributed.group.WORLD) if self.trainer.accelerator.num_processes > 1 else None


# ---- the sampling mask


def _truncations(trainer):
    """The options by which the sampler leaves tokens out. Where generate's configuration has None that of the model counts."""
    if not trainer._uses_generate():
        args = trainer.args
        return truncations({"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p} | (args.generation_kwargs or {}))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    chosen = {name: value for name, value in vars(trainer.generation_config).items() if value is not None}
    return truncations(filled_in(vars(model.generation_config) | chosen))


def _by_completion(support, numbers):
    """One `TokenSupport` a completion, of the positions with these numbers: from 1, and 0 for an empty range."""
    none = support.offsets[-1:]  # behind the others, where -1 finds it
    support = TokenSupport(support.ids, torch.cat([support.offsets, none]))
    return [support.take(torch.tensor(own, dtype=torch.int64) - 1) for own in numbers]


def _numbers(numbers, completion_ids):
    """The numbers of positions as they came back through TRL's lists of log-probs: one a token, or this is another TRL."""
    lengths = [len(ids) for ids in completion_ids]
    came = None if numbers is None else [len(own) for own in numbers]
    if came != lengths:
        got = "no log-probs" if came is None else f"log-probs of {came[:8]}{' ..' * (len(came) > 8)} tokens"
        more = " .." * (len(lengths) > 8)
        raise _unknown(f"GRPOTrainer._generate returns {got} with completions of {lengths[:8]}{more}")
    return numbers


def _masks_of_rollouts(given, completion_ids, env_mask):
    """Of what a rollout_func returned. Tokens that were not sampled may be outside of their ranges, and get empty ones."""
    _check_list("sampling_mask", given, "(token_ids, offsets)", len(completion_ids))
    if env_mask is not None:
        _check_list("env_mask", env_mask, "lists of 0 and 1", len(completion_ids))
    masks = []
    for i, (mask, ids) in enumerate(zip(given, completion_ids, strict=True)):
        try:
            support = TokenSupport.from_sequences([mask], len(ids) if mask is None else None)
        except (TypeError, ValueError) as error:
            raise type(error)(f"sampling_mask of completion {i}: {error}") from error
        if support.positions != len(ids):
            wanted = f"{len(ids) + 1} offsets, one more than it has tokens"
            raise ValueError(f"sampling_mask of completion {i} must have {wanted}, got {support.positions + 1}")
        sampled = [1] * len(ids) if env_mask is None else env_mask[i]
        if len(sampled) != len(ids):
            raise ValueError(f"env_mask of completion {i} must have {len(ids)} entries, one a token, got {len(sampled)}")
        masks += _by_completion(support, [[number if own else 0 for number, own in enumerate(sampled, 1)]])
    return masks


def _check_list(name, given, each, count):
    if not isinstance(given, list | tuple) or len(given) != count:
        got = f"{len(given)} of them" if isinstance(given, list | tuple) else kind(given)
        raise ValueError(f"{name} must be a list of {count} {each}, one a completion, got {got}")


def _joined(masks, length=None, device=None):
    """[B, length] of the supports of B completions, or [N] one behind the other; None of None."""
    return None if masks is None else TokenSupport.from_sequences(masks, length, device)
