"""`fused_linear_grpo_loss`: the GRPO loss and its gradients from hidden states, without the [B, T, V] logits.

One pass wherever a row's coefficient d loss / d logps depends on that row alone: the gradients are ready when the forward
ends, and the backward only scales them. Everything else goes through two phases and autograd of the objective on [B, T] tensors.
"""

import inspect
from typing import Any

import torch
from typing_extensions import Unpack

from .call import GRPOLossOutput, LossArguments, describe
from .checks import Backend, Reduction
from .engine.ops import loss_in_one_pass, with_gradients
from .losses.config import LOSS_FIELDS, GRPOLossConfig, LossOptions
from .support import TokenSupport
from .teacher import TeacherArguments


def fused_linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    importance_sampling_ratio: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    num_items: float | torch.Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
    temperature: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    vocab_parallel_group: Any = None,
    sequence_parallel: bool = False,
    data_parallel_group: Any = None,
    cu_seqlens: torch.Tensor | None = None,
    kept_rows: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
    differentiable_logps: bool = False,
    reduction: Reduction = "loss_type",
    support: TokenSupport | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
) -> GRPOLossOutput:
    """The loss of the GRPO family from hidden states and the head's weight. Position t of hidden predicts token t.

    A causal model's last ``hidden[:, :-1]`` stand beside ``ids[:, 1:]``: shift before the call, nothing is shifted here.

    Equals `reference.grpo_loss` with the same arguments, that is `objective` of the log-probs of
    ``hidden @ weight.T + bias``, without ever holding the logits.

    Args:
        hidden: [B, T, D] float32, float64, bfloat16 or float16; differentiable.
            In float16 the gradients of one pass are made before a loss scale can act, so small ones vanish: under a GradScaler
            use `linear_logprobs` and `objective`.
        weight: [V, D] of the same dtype (under autocast both are cast once); differentiable, or frozen.
        completion_ids: [B, T] int64, in [0, V) where the mask is 1.
        advantages: [B] or [B, T] float, finite where the mask is 1.
        mask: [B, T] bool or 0/1; rows where it is 0 are never computed.
        bias: [V], differentiable; may hold -inf.
        old_logps: [B, T] log-probs of the policy that sampled; None = on-policy.
        ref_logps: [B, T] log-probs of the reference; needed when ``config.beta != 0``, unless ``config.kl_estimator`` is ``exact``.
        importance_sampling_ratio: [B, T] or [B, 1], trainer over sampler; ``config.importance_sampling_mode`` makes it instead.
        sampling_logps: [B, T], may hold nan; for that mode, which needs them, and for the off-policy mask, which falls back to
            ``old_logps``.
        num_items: the exact divisor of dapo, cispo, vespo and of verl's losses but gspo and geo_mean: a number > 0, or a 0-dim
            tensor (clamped to >= 1, not synchronised); None = the kept tokens. Under DDP's mean of gradients pass the global
            count / world size.
        config: `GRPOLossConfig`; options and tensors that its loss_type does not use are ignored.
        temperature: [B, T] or a 0-dim tensor, overrides ``config.temperature``; differentiable, in two phases, but for an exact KL.
            A number goes into the config.
        lora: (A [r, D], B [V, r], scale), an adapter on the head, never merged; A and B differentiable.
        vocab_parallel_group: torch.distributed group over which the vocabulary is sharded. weight, bias and lora's B are then
            this rank's rows of it, in rank order, of any number; everything else is the same on every rank, ids are global, and
            the gradients of hidden and of lora's A come back summed over the group. Padded rows: a bias of -inf. A weight that
            is a DTensor in Shard(0) brings its own group, and nothing of it is gathered.
        sequence_parallel: hidden is sharded over that group along its first dimension, in rank order: it is gathered here, and
            its gradient reduce-scattered.
        data_parallel_group: torch.distributed group over which the entropy quantile is taken, clip_cov and kl_cov choose their
            tokens, and bnpo and the entropy bonus are means: the mean of the ranks' losses is then that of all their tokens. All
            ranks of it must call.
        cu_seqlens: [B + 1] int32, packed layout: hidden [N, D], every per-token tensor [N], advantages [B] or [N],
            importance_sampling_ratio [B, 1] or [N].
        kept_rows: [N] int64, ascending indices into the flattened tokens, equal to mask's nonzero. With it the forward does
            not synchronise with the host: bad values then give a NaN loss instead of an exception. (Nor does the backward
            of one pass; that of two phases reads which rows have a gradient, unless a CUDA graph is captured. A support that has
            an empty range synchronises.)
        workspace_bytes: budget of chunks, buffer and stash; None is GRPO_KERNELS_WORKSPACE_MB, or 384 MiB (1536 on a GPU).
            engine/plan.py states the peak.
        backend: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.
        differentiable_logps: logps and entropy of the output keep their graph, in two phases, so that a term made of them trains:
            ``(out.loss - 0.1 * out.entropy[mask].mean()).backward()``, for which `entropy_coef` is the shorter way.
        reduction: ``loss_type`` adds the tokens' losses up as the loss_type does. ``none``: loss is [B, T], 0 where masked, the
            ``s + beta * k3 - entropy_coef * entropy`` of each token without the normaliser, in two phases. s has its factors: the
            importance_sampling_ratio and the masks of the entropy quantile and of off-policy sequences.
        support: `TokenSupport` of the flattened [B, T] or packed [N], the tokens that each position could have been sampled as:
            logits outside of it count as -inf, in log-probs, entropy and everything behind them. ``old_logps``, ``ref_logps`` and
            ``sampling_logps`` must have been taken over the same supports.
        ref_hidden, ref_weight, ref_bias: [B, T, D'], [V, D'] and [V] or None of the reference, for ``kl_estimator="exact"``: the KL
            of policy and reference over the vocabulary (over the support, where there is one) takes the place of k3, 2NVD' more.
            Logits of both have the config's logit_scale, softcap and temperature. Constants; any float dtype.
        batch_invariant: a token's bits depend on nothing else in the call, also where that has a price (docs/bits.md); and those of
            a gradient of the head on the rows' order alone. False promises nothing; None what is free, or what the environment's
            GRPO_KERNELS_BATCH_INVARIANT says, 1 or 0.

    Returns:
        `GRPOLossOutput`: loss 0-dim, differentiable once in hidden, weight, bias, lora and temperature; logps and entropy [B, T],
        detached unless ``differentiable_logps``: a term made of detached ones trains nothing; metrics, name -> 0-dim tensor.
        float32, or float64 for float64 inputs. No other argument has a gradient: one that requires it is a ValueError.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used.

    Source: ratio, clipping, k3: Shao et al. 2024; the other losses as named in docs/losses.md.
    """
    args = LossArguments(
        hidden, weight, completion_ids, mask, config, bias, temperature, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, kept_rows, data_parallel_group, advantages=advantages, old_logps=old_logps, ref_logps=ref_logps,
        importance_sampling_ratio=importance_sampling_ratio, sampling_logps=sampling_logps, num_items=num_items,
        cu_seqlens=cu_seqlens, differentiable_logps=differentiable_logps,
        reduction=reduction, support=support, batch_invariant=batch_invariant,
        teacher=TeacherArguments.of_reference(config, ref_hidden, ref_weight, ref_bias),
    )  # fmt: skip
    call, kl = describe(args), None
    if call.one_pass:
        over, call = call.over_supports()
        logps, entropy, kl, gradients = loss_in_one_pass(call.head, call.rows, call.work, call.teacher)
        logps, entropy = call.scatter(logps, over.logps), call.scatter(entropy, over.entropy)
        kl = None if call.teacher is None else call.scatter(kl, over.divergence)
    elif call.teacher is not None:
        logps, entropy, kl = call.compared()
    else:
        logps, entropy, *_ = call.scores(args.entropy_has_gradient)
    loss, metrics = call.loss(logps, entropy, kl)
    if call.one_pass:
        loss = with_gradients(loss, gradients, call.head, call.rows, call.work)
    return GRPOLossOutput.of(loss, logps, entropy, metrics, differentiable_logps)


_PER_CALL = inspect.signature(fused_linear_grpo_loss).parameters.keys() - LOSS_FIELDS - {"config"}


class FusedLinearGRPOLoss(torch.nn.Module):
    """`fused_linear_grpo_loss` as a module: the options at construction, everything else per call.

    Args:
        **options: the fields of `GRPOLossConfig`.

    Raises:
        ValueError: an option has a wrong value. TypeError: there is no such option.
    """

    def __init__(self, **options: Unpack[LossOptions]):
        super().__init__()
        per_call = sorted(options.keys() & _PER_CALL)
        if per_call:
            raise TypeError(f"{', '.join(per_call)} must be given to the call, not to FusedLinearGRPOLoss(...)")
        self.config = GRPOLossConfig(**options)

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, completion_ids: torch.Tensor, advantages: torch.Tensor,
        mask: torch.Tensor, **tensors: Any,
    ) -> GRPOLossOutput:  # fmt: skip
        """The arguments of `fused_linear_grpo_loss` but for ``config``: ``backend`` and ``workspace_bytes`` among them."""
        if "config" in tensors:
            raise TypeError("config must not be given to the call: its options go into FusedLinearGRPOLoss(...)")
        return fused_linear_grpo_loss(hidden, weight, completion_ids, advantages, mask, config=self.config, **tensors)

    def extra_repr(self) -> str:
        return repr(self.config)


def _signature(init):
    """For help() and the completion of notebooks, which do not read a TypedDict."""
    own = next(iter(inspect.signature(init).parameters.values()))
    options = inspect.signature(GRPOLossConfig).parameters.values()
    return inspect.Signature([own, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options)])


FusedLinearGRPOLoss.__init__.__signature__ = _signature(FusedLinearGRPOLoss.__init__)  # type: ignore[attr-defined]
