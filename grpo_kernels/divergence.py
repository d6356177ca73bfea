"""`linear_divergence` and `fused_linear_distillation_loss`: how far a student's distributions are from a teacher's, without logits.

The per-token form goes through two phases under any loss of it. The loss is one pass: its gradients are ready when the forward
ends.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .call import TokenArguments, describe
from .checks import FLOAT_DTYPES, Backend, check_num_items, check_shape, check_tensor, refuse_transforms
from .engine.ops import loss_in_one_pass, with_gradients
from .losses.config import GRPOLossConfig
from .losses.objective import refuse_lost_gradients
from .losses.terms import PolicyRows
from .teacher import Kind, TeacherArguments, divergence_of, transform_of


class Divergence(NamedTuple):
    """Per token, 0 where masked: ``divergence`` differentiable, ``entropy`` of the student detached."""

    divergence: torch.Tensor
    entropy: torch.Tensor


class DistillationOutput(NamedTuple):
    """``loss`` 0-dim, differentiable; ``divergence`` and ``entropy`` of the student per token, detached."""

    loss: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class DistillationArguments(TokenArguments):
    """What both functions take; the tokens themselves are of no use."""

    weights: torch.Tensor | None = None
    num_items: Any = None
    kind: Any = "reverse_kl"
    beta: Any = 0.5
    teacher_options: tuple = (1.0, None)  # logit_scale and softcap

    entropy_has_gradient = False

    def checked(self):
        if self.completion_ids is None and isinstance(self.hidden, torch.Tensor) and self.hidden.dim():
            ids = torch.zeros(self.hidden.shape[:-1], dtype=torch.int64, device=self.hidden.device)
            return replace(self, completion_ids=ids).checked()
        temperature = self.options[0] if self.options is not None else self.config.temperature
        teacher = replace(self.teacher, divergence=divergence_of(self.kind, self.beta),
                          transform=transform_of(temperature, *self.teacher_options))  # fmt: skip
        args = TokenArguments.checked(replace(self, teacher=teacher))
        if self.weights is not None:
            check_tensor("weights", self.weights, args.mask.device, FLOAT_DTYPES)
            check_shape("weights", self.weights, args.mask.shape)
        check_num_items(self.num_items, GRPOLossConfig())
        refuse_lost_gradients(GRPOLossConfig(), weights=self.weights, num_items=self.num_items)
        return args

    def trained(self):
        return None if self.weights is None else self.weights != 0


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    vocab_parallel_group: Any = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> Divergence:
    """The divergence of a student's next-token distribution p from a teacher's q at each position, without the logits of either.

    Equals, with ``lp = z.log_softmax(-1)`` of the student's transformed logits, ``lq`` of the teacher's and
    ``lm = logaddexp(lp + log(1 - beta), lq + log(beta))``, sums over the vocabulary: ``reverse_kl`` of ``lp.exp() * (lp - lq)``,
    ``forward_kl`` of ``lq.exp() * (lq - lp)``, ``jsd`` of ``beta * lq.exp() * (lq - lm) + (1 - beta) * lp.exp() * (lp - lm)``.

    Args:
        hidden: [.., D] float32, float64, bfloat16 or float16, the student's; differentiable.
        weight: [V, D] of the same dtype; differentiable, or frozen.
        teacher_hidden, teacher_weight: [.., D'], [V, D'] of any one float dtype; constants.
        kind: ``reverse_kl`` KL(p || q), ``forward_kl`` KL(q || p), or ``jsd``, the generalised divergence of Jensen and Shannon.
        beta: of ``jsd``, in [0, 1]: the share of the teacher in the mixture. At 0 and 1, where the formula vanishes, ``jsd`` is the
            forward and the reverse KL, as in TRL.
        mask: [..] bool or 0/1; None keeps all. Masked rows are not computed.
        bias, teacher_bias: [V]; the student's is differentiable. Both may hold -inf: a column that both ban counts nothing, one
            that the teacher alone bans makes the reverse KL inf, one that the student alone bans the forward KL.
        temperature: a number > 0, or a tensor, 0-dim or [..]; both logits are divided by it.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: as in `GRPOLossConfig`, of each.
        lora: (A [r, D], B [V, r], scale), an adapter on the student's head; A and B differentiable.
        vocab_parallel_group, sequence_parallel: as in `fused_linear_grpo_loss`; teacher_weight and teacher_bias are this rank's
            rows too, and teacher_hidden is laid out as hidden.
        workspace_bytes: budget for chunks and stash; None is GRPO_KERNELS_WORKSPACE_MB or 384 MiB (1536 on a GPU). Rows that fit
            the stash cost 6NVD + 2NVD' operations forward and backward, the others 8NVD + 4NVD'; a frozen head 4NVD + 2NVD'.
        backend: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        `Divergence` (divergence, entropy): [..] float32 (float64 for float64), 0 where masked. divergence is differentiable once in
        hidden, weight, bias and lora; entropy, the student's, is detached.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used.

    Source: generalised JSD: Agarwal et al. 2024 (on-policy distillation).
    """
    call = _described(
        hidden, weight, teacher_hidden, teacher_weight, kind, beta, mask, bias, teacher_bias, temperature, logit_scale, softcap,
        teacher_logit_scale, teacher_softcap, lora, vocab_parallel_group, sequence_parallel, workspace_bytes, backend,
    )  # fmt: skip
    _, entropy, divergence = call.compared(alone=True)
    return Divergence(divergence, entropy.detach())


def fused_linear_distillation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    vocab_parallel_group: Any = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
    weights: torch.Tensor | None = None,
    num_items: float | torch.Tensor | None = None,
) -> DistillationOutput:
    """A weighted mean of `linear_divergence` over the tokens, in one pass: the gradients are ready when the forward ends.

    Equals ``(weights * linear_divergence(...).divergence).sum() / num_items``. Arguments that are not below are those of
    `linear_divergence`.

    Args:
        weights: [..] float, of each token; None is the mask. Tokens of weight 0 are scored but not trained; where the mask is 0 a
            weight counts as 0.
        num_items: the divisor, a number > 0 or a 0-dim tensor (clamped to >= 1, not synchronised); None is the sum of the weights,
            which may be 0 or negative where a weight is negative: give it then. Under gradient accumulation and DDP it is the
            global count / world size.

    Returns:
        `DistillationOutput` (loss, divergence, entropy): loss 0-dim, differentiable once in hidden, weight, bias and lora, 6NVD +
        2NVD' operations (4NVD + 2NVD' with a frozen head); divergence and entropy [..], detached. Without a kept token loss is 0.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used.
    """
    call = _described(
        hidden, weight, teacher_hidden, teacher_weight, kind, beta, mask, bias, teacher_bias, temperature, logit_scale, softcap,
        teacher_logit_scale, teacher_softcap, lora, vocab_parallel_group, sequence_parallel, workspace_bytes, backend,
        weights=weights, num_items=num_items,
    )  # fmt: skip
    kept, index = call.mask.bool(), call.rows.index
    if not any(call.work.needs):
        _, entropy, divergence = call.compared(alone=True)
        u = _token_weights(kept, weights, num_items, divergence.dtype)
        return DistillationOutput((u * divergence).where(u != 0, 0.0).sum(), divergence, entropy)
    u = _token_weights(kept, weights, num_items, torch.promote_types(call.rows.hidden.dtype, torch.float32))
    rows = replace(call.rows, policy=PolicyRows(None, w_kl=u.reshape(-1)[index[: call.rows.live]]))
    _, entropy, divergence, gradients = loss_in_one_pass(call.head, rows, call.work, call.teacher)
    divergence, entropy = call.scatter(divergence), call.scatter(entropy)
    loss = with_gradients((u * divergence).where(u != 0, 0.0).sum(), gradients, call.head, rows, call.work)
    return DistillationOutput(loss, divergence, entropy)


def _token_weights(kept, weights, num_items, dtype):
    """[..] what the loss has of each token's divergence."""
    weights = kept.to(dtype) if weights is None else weights.detach().to(dtype).where(kept, 0.0)
    if num_items is None:
        total = weights.sum()
        return weights / total.where(total != 0, 1.0)
    return weights / (num_items.detach().to(dtype).clamp(min=1) if isinstance(num_items, torch.Tensor) else num_items)


def _described(hidden, weight, teacher_hidden, teacher_weight, kind, beta, mask, bias, teacher_bias, temperature, logit_scale,
               softcap, teacher_logit_scale, teacher_softcap, lora, vocab_parallel_group, sequence_parallel, workspace_bytes,
               backend, **more):  # fmt: skip
    refuse_transforms({"temperature": temperature})
    per_token = isinstance(temperature, torch.Tensor)
    args = DistillationArguments(
        hidden, weight, None, mask, None, bias=bias, temperature=temperature if per_token else None, lora=lora,
        vocab_parallel_group=vocab_parallel_group, sequence_parallel=sequence_parallel, workspace_bytes=workspace_bytes,
        backend=backend, options=(1.0 if per_token else temperature, logit_scale, softcap), kind=kind, beta=beta,
        teacher=TeacherArguments(teacher_hidden, teacher_weight, teacher_bias),
        teacher_options=(teacher_logit_scale, teacher_softcap), **more,
    )  # fmt: skip
    call = describe(args)
    nowhere = torch.full_like(call.rows.target, -1)  # no column of the logits is a target
    return replace(call, rows=replace(call.rows, target=nowhere))
