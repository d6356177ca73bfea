"""`fused_linear_grpo_loss`: the GRPO loss and its gradients from hidden states, without the [B, T, V] logits.

One pass wherever a row's coefficient d loss / d logps depends on that row alone: the gradients are ready when the forward
ends, and the backward only scales them. Everything else goes through the two phases of logprobs.py and autograd of the
objective on [B, T] tensors.
"""

import inspect

import torch

from . import backends
from .arguments import check_group, check_loss_arguments, host_may_wait, value_flags
from .batch import LossBatch
from .distributed import gathered_sequence, group_of, of_dtensors, refusing_together
from .engine import tiles
from .engine.products import accumulation_dtype
from .logprobs import FusedHead, given_names, graph_is_retained, row_logprobs
from .losses.coefficients import row_terms
from .losses.config import LOSS_FIELDS, GRPOLossConfig
from .losses.objective import group_in_use
from .outputs import GRPOLossOutput
from .rows import flatten, select_rows


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
    num_items=None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
    temperature: torch.Tensor | None = None,
    lora: tuple | None = None,
    vocab_parallel_group=None,
    sequence_parallel: bool = False,
    data_parallel_group=None,
    cu_seqlens: torch.Tensor | None = None,
    kept_rows: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> GRPOLossOutput:
    """The loss of the GRPO family from the last hidden states and the head's weight.

    Equals `reference.grpo_loss` with the same arguments, that is `objective` of the log-probs of
    ``hidden @ weight.T + bias``, without ever holding the logits.

    Args:
        hidden: [B, T, D] float32, float64, bfloat16 or float16; differentiable. Position t predicts ``completion_ids[:, t]``.
            In float16 the gradients of one pass are made before a loss scale can act, so small ones vanish: under a GradScaler
            use `linear_logprobs` and `objective`.
        weight: [V, D] of the same dtype (under autocast both are cast once); differentiable, or frozen.
        completion_ids: [B, T] int64, in [0, V) where the mask is 1.
        advantages: [B] or [B, T] float, finite where the mask is 1.
        mask: [B, T] bool or 0/1; rows where it is 0 are never computed.
        bias: [V], differentiable; may hold -inf.
        old_logps: [B, T] log-probs of the policy that sampled; None = on-policy.
        ref_logps: [B, T] log-probs of the reference; needed when ``config.beta != 0``.
        importance_sampling_ratio: [B, T] or [B, 1], trainer over sampler.
        sampling_logps: [B, T], may hold nan; for the off-policy mask, falls back to ``old_logps``.
        num_items: the exact divisor of dapo, cispo and vespo: a number > 0, or a 0-dim tensor (clamped to >= 1, not
            synchronised); None = the kept tokens. Under DDP's mean of gradients pass the global count / world size.
        config: `GRPOLossConfig`; options and tensors that its loss_type does not use are ignored.
        temperature: [B, T], overrides ``config.temperature`` per token.
        lora: (A [r, D], B [V, r], scale), an adapter on the head, never merged; A and B differentiable.
        vocab_parallel_group: torch.distributed group over which the vocabulary is sharded. weight, bias and lora's B are then
            this rank's rows of it, in rank order, of any number; everything else is the same on every rank, ids are global, and
            the gradients of hidden and of lora's A come back summed over the group. Padded rows: a bias of -inf. A weight that
            is a DTensor in Shard(0) brings its own group, and nothing of it is gathered.
        sequence_parallel: hidden is sharded over that group along its first dimension, in rank order: it is gathered here, and
            its gradient reduce-scattered.
        data_parallel_group: torch.distributed group over which the entropy quantile is taken, and bnpo and the entropy bonus
            are means: the mean of the ranks' losses is then that of all their tokens. All ranks of it must call.
        cu_seqlens: [B + 1] int32, packed layout: hidden [N, D], every per-token tensor [N], advantages [B] or [N],
            importance_sampling_ratio [B, 1] or [N].
        kept_rows: [N] int64, ascending indices into the flattened tokens, equal to mask's nonzero. With it the forward does
            not synchronise with the host: bad values then give a NaN loss instead of an exception. (Nor does the backward
            of one pass; that of two phases reads once which rows have a gradient, unless a CUDA graph is captured.)
        workspace_bytes: budget of tiles and stash; None is GRPO_KERNELS_WORKSPACE_MB, or 384 MiB (768 on a GPU). plan.py states the
            peak.
        backend: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        `GRPOLossOutput`: loss 0-dim, differentiable once in hidden, weight, bias and lora; logps and entropy [B, T]
        detached; metrics, name -> 0-dim tensor. float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used.

    Source: ratio, clipping, k3: Shao et al. 2024; the other losses as named in README.md.
    """
    check_group("vocab_parallel_group", vocab_parallel_group)
    vocab_parallel_group = group_of(weight, vocab_parallel_group)
    wait = kept_rows is None and host_may_wait(hidden)
    with refusing_together(group_in_use(config, data_parallel_group) if wait else None, hidden, "data_parallel_group"):
        hidden = gathered_sequence(hidden, vocab_parallel_group) if sequence_parallel else hidden
        with refusing_together(vocab_parallel_group, hidden) as meeting:
            hidden, weight, bias, lora = of_dtensors(hidden, weight, bias, lora, vocab_parallel_group)
            args = check_loss_arguments(
                hidden, weight, completion_ids, advantages, mask, bias=bias, old_logps=old_logps, ref_logps=ref_logps,
                importance_sampling_ratio=importance_sampling_ratio, sampling_logps=sampling_logps, num_items=num_items,
                config=config, temperature=temperature, lora=lora, vocab_parallel_group=vocab_parallel_group,
                cu_seqlens=cu_seqlens, kept_rows=kept_rows, workspace_bytes=workspace_bytes, backend=backend,
                data_parallel_group=data_parallel_group,
            )  # fmt: skip
            head = FusedHead.of(
                args.hidden, args.weight, args.bias, args.lora, config.transform, workspace_bytes, backend, meeting
            )
            if meeting.group is not None:
                given = given_names(
                    bias=bias, old_logps=old_logps, ref_logps=ref_logps, importance_sampling_ratio=importance_sampling_ratio,
                    sampling_logps=sampling_logps, num_items=num_items, temperature=temperature, cu_seqlens=cu_seqlens,
                )  # fmt: skip
                meeting.facts |= {
                    "config": repr(config), "which tensors are given": given, "shape of advantages": list(advantages.shape),
                    "length of kept_rows": -1 if kept_rows is None else kept_rows.numel(),
                    "sequence_parallel": int(sequence_parallel),
                }  # fmt: skip
            batch = LossBatch(args, mask, config, accumulation_dtype(args.hidden.dtype), data_parallel_group, wait)
        head = head.sharded(meeting, not sequence_parallel)
        flags = value_flags(mask, completion_ids, head.vocab, advantages, temperature, batch.layout)
        trains = any(head.needs(args.hidden))
        live = batch.live() if trains else None
        selection = select_rows(mask, flags, head.vocab, live=live, kept_rows=kept_rows, shard=head.shard)
    rows = flatten(args.hidden, mask, all_rows=kept_rows is None and not wait)
    if trains and coefficients_depend_on_their_row_alone(config, on_policy=old_logps is None):
        return _one_pass(rows, head, batch, selection, completion_ids, args.temperature, mask)

    logps, entropy, _ = row_logprobs(rows, head, selection, completion_ids, args.temperature, config.entropy_coef != 0)
    logps, entropy = selection.scatter(logps, mask), selection.scatter(entropy, mask)
    loss, metrics = batch.objective(logps, entropy)
    return GRPOLossOutput(loss, logps.detach(), entropy.detach(), metrics)


_PER_CALL = inspect.signature(fused_linear_grpo_loss).parameters.keys() - LOSS_FIELDS - {"config"}


class FusedLinearGRPOLoss(torch.nn.Module):
    """`fused_linear_grpo_loss` as a module: the options at construction, everything else per call.

    Args:
        **options: the fields of `GRPOLossConfig`.

    Raises:
        ValueError: an option has a wrong value. TypeError: there is no such option.
    """

    def __init__(self, **options):
        super().__init__()
        per_call = sorted(options.keys() & _PER_CALL)
        if per_call:
            raise TypeError(f"{', '.join(per_call)} must be given to the call, not to FusedLinearGRPOLoss(...)")
        self.config = GRPOLossConfig(**options)

    def forward(self, hidden, weight, completion_ids, advantages, mask, **tensors) -> GRPOLossOutput:
        """The arguments of `fused_linear_grpo_loss` but for ``config``: ``backend`` and ``workspace_bytes`` among them."""
        return fused_linear_grpo_loss(hidden, weight, completion_ids, advantages, mask, config=self.config, **tensors)

    def extra_repr(self):
        return repr(self.config)


def coefficients_depend_on_their_row_alone(config: GRPOLossConfig, on_policy: bool) -> bool:
    """Whether d loss / d logps of a token needs the log-probs of no other token, so that one pass is enough."""
    if config.top_entropy_quantile < 1.0 or config.off_policy_mask_threshold is not None:
        return False
    if on_policy:
        return not (config.sequence_level and config.beta != 0 and config.use_bias_correction_kl)
    return not config.sequence_level and config.loss_type != "vespo"


def _one_pass(hidden, head, batch, selection, completion_ids, temperature, mask):
    config = batch.config
    target, temperature = head.targets(selection, completion_ids, temperature)
    terms = row_terms(config, on_policy=batch.prepared.old is None)
    tensors, needs = (hidden, *head.tensors), head.needs(hidden)
    detached = [x if x is None else x.detach() for x in tensors]
    numbers = [terms.epsilon_low, terms.epsilon_high, terms.delta or 0.0, terms.sapo_temperature_pos, terms.sapo_temperature_neg]
    arguments = (
        *detached, selection.rows, target, temperature, *batch.row_vectors(selection), selection.live, terms.kind, numbers,
        terms.use_bias_correction_kl, head.scalars, needs, head.budget, head.backend, *head.sharding,
    )  # fmt: skip
    logps, entropy, *grads = tiles.one_pass(*arguments)
    logps, entropy = selection.scatter(logps, mask), selection.scatter(entropy, mask)
    loss, metrics = batch.objective(logps, entropy)
    loss = _WithGradients.apply(loss, needs, head.backend, *tensors, *grads)
    return GRPOLossOutput(loss, logps, entropy, metrics)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already: the backward multiplies them by the incoming gradient.

    They are saved tensors, which autograd lets go of before it accumulates: a parameter's ``.grad`` is then the very memory
    that the forward wrote. The multiplication is in place, since a second full-size gradient would undo what the fusion
    saves, unless the graph is retained for another backward.
    """

    @staticmethod
    def forward(ctx, loss, needs, backend, hidden, weight, bias, lora_a, lora_b, *grads):
        ctx.needs, ctx.backend = needs, backend
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, lora_a, lora_b)]
        ctx.save_for_backward(loss.isnan(), *grads)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        is_nan, *grads = ctx.saved_tensors
        # rows that cost no backward must not hide a NaN of theirs from the gradients
        scale = g.masked_fill(is_nan, float("nan"))
        if graph_is_retained():
            grads = [grad * scale.to(grad.dtype) for grad in grads]
        else:
            for grad in grads:
                backends.scale_(grad, scale, ctx.backend)
        done = [grad.to(dtype) if needed else None for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs, strict=True)]
        return None, None, None, *done, *(None,) * 5
