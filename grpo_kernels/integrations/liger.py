"""`LigerFusedLinearGRPOLoss` and `LigerFusedLinearJSDLoss` of liger-kernel 0.8.5, by the same calls: a trainer written against
them swaps one import.

They name and order what goes in and comes out as those classes do; the losses and their gradients are those of
`fused_linear_grpo_loss`, and of `fused_linear_distillation_loss` beside a cross-entropy. Where liger disagrees about the
mathematics, the specification holds:

* luspo: liger averages over B * T positions, the masked ones included, which is right only where the mask is all ones (or,
  at sequence level, where every term is one number per sequence). Here it is ``mean_b(sum_t l m)``, as in TRL 1.16.
* vespo with a [B, T] ratio: liger also adds the logarithms that stand at masked positions; here those are not read.
* What a per-token input holds where the mask is 0 never matters; in liger a NaN there is a NaN loss.
* distillation: a column that both heads ban, with a bias of -inf, counts nothing; in liger it is a NaN loss. Float64 stays float64.
"""

import dataclasses
import numbers
import warnings

import torch

from ..call import describe
from ..checks import FLOAT_DTYPES, kind
from ..divergence import DistillationArguments, fused_linear_distillation_loss
from ..engine.ops import loss_in_one_pass, with_gradients
from ..logprobs import linear_logprobs
from ..loss import fused_linear_grpo_loss
from ..losses.config import GRPOLossConfig
from ..losses.terms import PolicyRows
from ..teacher import TeacherArguments

_TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
_DIVIDED_BY_ITEMS = ("dapo", "cispo", "vespo")


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The GRPO loss from hidden states and the head's weight, called like the class of that name in liger-kernel 0.8.5.

    Equals `reference.grpo_loss` of the same tensors under the options below, with liger's metrics beside it.

    Every argument stays an attribute under its own name; as in liger, one that is assigned anew counts from the next call.

    Args:
        beta: weight of the KL estimate.
        compiled: kept, without effect; nothing here is compiled at run time.
        use_ref_model: every call must bring a reference. False: the policy is its own and the KL exactly 0, whatever ``beta`` is.
        chunk_size: kept, without effect; tiles are cut by a budget of bytes (GRPO_KERNELS_WORKSPACE_MB).
        epsilon_low: the ratio is clipped at ``1 - epsilon_low``; ``epsilon`` of `GRPOLossConfig`.
        epsilon_high: and at ``1 + epsilon_high``. For cispo the cap itself, so the default caps at 0.2.
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.
        max_completion_length: divisor of dr_grpo, which needs it.
        importance_sampling_level: ``"token"`` or ``"sequence"``, the latter not for cispo, sapo and vespo.
        sapo_temperature_pos, sapo_temperature_neg, temperature, delta, use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg: as in `GRPOLossConfig`. The temperature is the reference's too.

    Raises:
        ValueError: a sapo temperature or delta is not > 0. All other options are judged at the call, as by liger.

    Source: interface and metrics: liger-kernel 0.8.5; mathematics: the papers named in README.md.
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
        epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo", max_completion_length: int | None = None,
        importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0, delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    ):  # fmt: skip
        super().__init__()
        self.compiled, self.chunk_size = compiled, chunk_size
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.beta, self.use_ref_model, self.use_bias_correction_kl = beta, use_ref_model, use_bias_correction_kl
        self.temperature, self.max_completion_length = temperature, max_completion_length
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value!r}")

    @property
    def config(self) -> GRPOLossConfig:
        """The attributes as they are now."""
        if self.importance_sampling_level == "sequence" and self.loss_type in _TOKEN_LEVEL_ONLY:
            raise ValueError(
                f"importance_sampling_level must be 'token' for loss_type={self.loss_type!r}, got 'sequence' (liger's rule; "
                "grpo_kernels.FusedLinearGRPOLoss has no such limit)"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise AssertionError("max_completion_length must be an integer > 0 for loss_type='dr_grpo', got None")
        own = {field.name for field in dataclasses.fields(GRPOLossConfig)} & vars(self).keys()
        return GRPOLossConfig(epsilon=self.epsilon_low, **{name: getattr(self, name) for name in own})

    def forward(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, vllm_is_ratio=None, num_items_in_batch=None,
    ):  # fmt: skip
        """(loss, metrics) of one batch.

        Args:
            _input: [B, T, D] float32, float64, bfloat16 or float16; differentiable.
            lin_weight: [V, D] float, differentiable or frozen; of another dtype than ``_input`` it is cast once per call.
            selected_token_ids: [B, T] int64 or int32, in [0, V) where the mask is 1.
            attention_mask: [B, T] bool or 0/1 in any dtype.
            advantages: [B] float; also [B, T], one per token.
            bias: [V] float, differentiable.
            ref_per_token_logps: [B, T] log-probs of the reference. They and ``ref_input`` are not read where beta is 0.
            old_per_token_logps: [B, T] log-probs of the policy that sampled; None: the policy's own, the ratio is 1.
            ref_input, ref_weight, ref_bias: [B, T, D'], [V', D'], [V'] of the reference's head, from which its log-probs are
                computed without gradient where ``ref_per_token_logps`` is None.
            vllm_is_ratio: [B, T], [B, 1] or [B], trainer over sampler.
            num_items_in_batch: kept tokens of all ranks and accumulation steps, a number or a 0-dim tensor. dapo, cispo and
                vespo divide by ``max(num_items_in_batch / world size, 1)``; None: by the mean over the ranks of the default
                process group of their kept tokens, in one all-reduce that every rank must then reach.

        Returns:
            loss: 0-dim, differentiable once in ``_input``, ``lin_weight`` and ``bias``; float32 (float64 for float64).
            metrics: tuple of 0-dim detached tensors: the token mean of the KL estimate as the loss has it, only where beta is
                not 0; then the share of kept tokens whose ratio, before the delta bound, is beyond the clip range on the
                side that its advantage's sign makes count: at sequence level every kept token of such a sequence; cispo: above
                its cap; sapo and vespo: 0.

        Raises:
            TypeError, ValueError: naming the argument, what was wanted and what came.
            AssertionError: where liger asserts: ``use_ref_model`` and no reference (even where beta is 0), dr_grpo without
                ``max_completion_length``, the shape of ``vllm_is_ratio``.

        Warns:
            UserWarning: a reference was given twice, or although ``use_ref_model`` is False and beta is not 0.
        """
        _check("_input", _input, FLOAT_DTYPES, ("B", "T", "D"))
        B, T, D = _input.shape
        _check("lin_weight", lin_weight, FLOAT_DTYPES, ("V", D))
        _check("selected_token_ids", selected_token_ids, (torch.int64, torch.int32), (B, T))
        _check("attention_mask", attention_mask, None, (B, T))
        _check("advantages", advantages, FLOAT_DTYPES, (B,), (B, T))
        if old_per_token_logps is not None:
            _check("old_per_token_logps", old_per_token_logps, FLOAT_DTYPES, (B, T))
        if vllm_is_ratio is not None:
            _check("vllm_is_ratio", vllm_is_ratio, FLOAT_DTYPES, (B, T), (B, 1), (B,), error=AssertionError)
            vllm_is_ratio = vllm_is_ratio.unsqueeze(1) if vllm_is_ratio.dim() == 1 else vllm_is_ratio
        config, ids = self.config, selected_token_ids.long()

        ref = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, ids, attention_mask)
        if ref is None:
            config = dataclasses.replace(config, beta=0.0)
        num_items = None
        if config.loss_type in _DIVIDED_BY_ITEMS:
            num_items = _items_per_rank(num_items_in_batch, attention_mask)

        advantages, old, ref, ratio = (
            None if x is None else x.detach()  # liger has no gradient for them either, and says nothing
            for x in (advantages, old_per_token_logps, ref, vllm_is_ratio)
        )
        out = fused_linear_grpo_loss(
            _input, lin_weight.to(_input.dtype), ids, advantages, attention_mask, bias=bias, old_logps=old, ref_logps=ref,
            importance_sampling_ratio=ratio, num_items=num_items, config=config,
        )  # fmt: skip
        clipped = _clip_fraction(out, old_per_token_logps, advantages, attention_mask.bool(), config)
        if self.beta == 0:
            return out.loss, (clipped,)
        return out.loss, (out.metrics.get("kl", torch.zeros_like(clipped)), clipped)

    def _reference(self, logps, hidden, weight, bias, ids, mask):
        """[B, T] log-probs of the reference, or None where the KL and its gradient are 0 or not wanted."""
        if not self.use_ref_model:
            if self.beta != 0 and (logps is not None or hidden is not None):
                warnings.warn("use_ref_model is False: the reference is not read, the KL is 0", stacklevel=2)
            return None
        if logps is None and hidden is None:
            raise AssertionError("ref_per_token_logps or ref_input must be given when use_ref_model is True, got None for both")
        if logps is not None and hidden is not None:
            warnings.warn("ref_input is not read, since there are ref_per_token_logps", stacklevel=2)
        if self.beta == 0:
            return None
        if logps is not None:
            _check("ref_per_token_logps", logps, FLOAT_DTYPES, tuple(ids.shape))
            return logps
        _check("ref_input", hidden, FLOAT_DTYPES, (*ids.shape, "D"))
        _check("ref_weight", weight, FLOAT_DTYPES, ("V", hidden.shape[-1]))
        if bias is not None:
            _check("ref_bias", bias, FLOAT_DTYPES, (weight.shape[0],))
        with torch.no_grad():
            weight = weight.to(hidden.dtype)
            return linear_logprobs(hidden, weight, ids, mask=mask, bias=bias, temperature=self.temperature).logps

    def extra_repr(self):
        return repr(self.config)


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Distillation from hidden states and both heads, called like the class of that name in liger-kernel 0.8.5.

    Equals a mean over the tokens whose label is not ``ignore_index`` (divided by at least 1) of ``weight_hard_loss`` times the
    cross-entropy of the label, which is at temperature 1 always, and ``weight_soft_loss`` times the generalised JSD of both logits
    over ``temperature``; no term is multiplied by its square.

    Every argument stays an attribute under its own name; as in liger, one that is assigned anew counts from the next call.

    Args:
        weight_hard_loss, weight_soft_loss: of the two terms.
        beta: the share of the teacher in the mixture, in [0, 1]; 0 is KL(teacher || student), 1 KL(student || teacher).
        ignore_index: the label of tokens that neither term counts.
        temperature: > 0.
        compiled: kept, without effect; nothing here is compiled at run time.
        chunk_size: kept, without effect; tiles are cut by a budget of bytes (GRPO_KERNELS_WORKSPACE_MB).
        return_soft_hard_loss: return the two terms, too.

    Raises:
        AssertionError: temperature is 0, as in liger. All other options are judged at the call.

    Source: interface: liger-kernel 0.8.5; generalised JSD: Agarwal et al. 2024 (on-policy distillation).
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100,
        temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024, return_soft_hard_loss: bool = False,
    ):  # fmt: skip
        super().__init__()
        if temperature == 0:
            raise AssertionError("temperature must be > 0, got 0")
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.return_soft_hard_loss = ignore_index, temperature, return_soft_hard_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(
        self, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias=None, teacher_bias=None,
    ):  # fmt: skip
        """The loss of one batch.

        Args:
            student_input: [N, D] or [B, T, D] float32, float64, bfloat16 or float16; differentiable.
            student_weight: [V, D] float, differentiable or frozen; of another dtype than ``student_input`` it is cast once.
            teacher_input, teacher_weight: [N, D'] or [B, T, D'], and [V', D'], cast likewise; constants. Where V' > V, the student
                has logits of 0 for the columns that it lacks, in the divergence alone.
            true_labels: [N] or [B, T] int64 or int32, in [0, V) or ``ignore_index``. Only compared with ``ignore_index`` where no
                cross-entropy is wanted.
            student_bias, teacher_bias: [V], [V'] float; the student's is differentiable.

        Returns:
            The loss, 0-dim, differentiable once in ``student_input``, ``student_weight`` and ``student_bias``; float32 (float64 for
            float64). With ``return_soft_hard_loss`` (loss, soft, hard), the terms before their weights, detached. One pass at
            temperature 1 or without a cross-entropy, 6NVD + 2NVD' operations; the cross-entropy costs 6NVD more elsewhere.

        Raises:
            TypeError, ValueError: naming the argument, what was wanted and what came.
        """
        _check("student_input", student_input, FLOAT_DTYPES, ("N", "D"), ("B", "T", "D"))
        *tokens, D = student_input.shape
        _check("student_weight", student_weight, FLOAT_DTYPES, ("V", D))
        _check("teacher_input", teacher_input, FLOAT_DTYPES, (*tokens, "D'"))
        _check("teacher_weight", teacher_weight, FLOAT_DTYPES, ("V'", teacher_input.shape[-1]))
        _check("true_labels", true_labels, (torch.int64, torch.int32), tuple(tokens))
        V, missing = student_weight.shape[0], teacher_weight.shape[0] - student_weight.shape[0]
        if missing < 0:
            raise ValueError(f"teacher_weight must have at least the student's V = {V} rows, got {V + missing}")
        for name, bias, rows in (("student_bias", student_bias, V), ("teacher_bias", teacher_bias, V + missing)):
            if bias is not None:
                _check(name, bias, FLOAT_DTYPES, (rows,))
        student = [student_input, student_weight.to(student_input.dtype), student_bias]
        teacher = [teacher_input, teacher_weight.to(teacher_input.dtype), teacher_bias]
        kept = true_labels != self.ignore_index
        if not (self.weight_hard_loss != 0 or self.return_soft_hard_loss):
            return self.weight_soft_loss * self._soft(student, teacher, kept, missing)
        labels = true_labels.long()
        if self.temperature == 1 and not missing:
            loss, soft, hard = self._in_one_pass(student, teacher, labels, kept)
        else:
            hidden, weight, bias = student
            soft = self._soft(student, teacher, kept, missing)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight_hard_loss != 0):
                logps = linear_logprobs(hidden, weight, labels, mask=kept, bias=bias).logps
            hard = -logps.sum() / kept.sum().clamp(min=1)
            loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

    def _soft(self, student, teacher, kept, missing):
        (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = student, teacher
        if missing:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, missing))
        return fused_linear_distillation_loss(
            hidden, weight, teacher_hidden, teacher_weight, kind="jsd", beta=self.beta, mask=kept, bias=bias,
            teacher_bias=teacher_bias, temperature=self.temperature, num_items=kept.sum(),
        ).loss  # fmt: skip

    def _in_one_pass(self, student, teacher, labels, kept):
        """(loss, soft, hard): the cross-entropy is of the same logits, and its gradient goes with the divergence's."""
        hidden, weight, bias = student
        call = describe(DistillationArguments(
            hidden, weight, labels, kept, bias=bias, options=(1.0, 1.0, None), kind="jsd", beta=self.beta,
            teacher=TeacherArguments(*teacher), ids_name="true_labels",
        ))  # fmt: skip
        count = kept.sum().clamp(min=1)

        def weighed(logps, divergence):
            soft, hard = divergence.sum() / count, -logps.sum() / count
            return self.weight_hard_loss * hard + self.weight_soft_loss * soft, soft, hard

        if not any(call.work.needs):
            logps, _, divergence = call.compared(alone=True)
            return weighed(logps, divergence)
        acc = torch.promote_types(call.rows.hidden.dtype, torch.float32)
        u = kept.reshape(-1)[call.rows.index[: call.rows.live]].to(acc) / count
        hard = -self.weight_hard_loss * u if self.weight_hard_loss != 0 else None
        rows = dataclasses.replace(call.rows, policy=PolicyRows(hard, w_kl=self.weight_soft_loss * u))
        logps, _, divergence, gradients = loss_in_one_pass(call.head, rows, call.work, call.teacher)
        loss, *terms = weighed(call.scatter(logps), call.scatter(divergence))
        return with_gradients(loss, gradients, call.head, rows, call.work), *terms

    def extra_repr(self):
        names = ("weight_hard_loss", "weight_soft_loss", "beta", "ignore_index", "temperature", "return_soft_hard_loss")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _items_per_rank(num_items, mask):
    """The divisor of this rank, so that a mean of gradients over the ranks divides by all their tokens; None: its own tokens."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if distributed else 1
    if num_items is None:
        if not distributed:
            return None
        num_items = mask.bool().sum()
        torch.distributed.all_reduce(num_items)
    elif not isinstance(num_items, torch.Tensor):
        if not isinstance(num_items, numbers.Real):
            raise TypeError(f"num_items_in_batch must be a number or a 0-dim tensor, got {kind(num_items)}")
        return max(num_items / ranks, 1.0)
    elif num_items.dim() != 0:
        raise ValueError(f"num_items_in_batch must be a number or a 0-dim tensor, got shape {list(num_items.shape)}")
    return num_items / ranks  # a tensor is clamped to >= 1 where it is used


@torch.no_grad()
def _clip_fraction(out, old, advantages, kept, config):
    """Differs from our clip metrics in two ways: the delta bound does not count, and a sequence counts as its tokens."""
    if config.loss_type == "cispo":
        return out.metrics["cispo_clip_ratio"]
    if config.loss_type in ("sapo", "vespo") or old is None:
        return torch.zeros_like(out.loss)
    d = (out.logps - old.to(out.logps.dtype)).where(kept, 0.0)
    if config.sequence_level:
        d = d.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    w, A = d.exp(), advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    beyond = ((w < 1 - config.epsilon) & (A < 0)) | ((w > 1 + config.upper_epsilon) & (A > 0))
    return (beyond & kept).sum() / kept.sum().clamp(min=1).to(w.dtype)


def _check(name, value, dtypes, *shapes, error=ValueError):
    """A letter in a shape stands for any length."""
    if not isinstance(value, torch.Tensor) or (dtypes is not None and value.dtype not in dtypes):
        wanted = "a tensor" if dtypes is None else " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {kind(value)}")

    def fits(shape):
        return value.dim() == len(shape) and all(isinstance(w, str) or w == n for w, n in zip(shape, value.shape, strict=True))

    if not any(map(fits, shapes)):
        wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
        raise error(f"{name} must be {wanted}, got {list(value.shape)}")
