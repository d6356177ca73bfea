"""`grpo_loss_from_logits`: the same loss for callers that hold the logits; the row kernels without the products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.statistics import Scored, Tile, new_statistics
from .call import GRPOLossOutput, LossArguments, TokenLoss
from .checks import Backend, Reduction, raise_bad_values, refuse_transforms, value_flags
from .distributed import group_in_use, validate_across_ranks
from .engine.diagnostics import new_moments, variance_of, with_tile
from .engine.operands import Work, can_sync, decoded, encoded
from .engine.ops import differentiable_once
from .engine.products import accumulation_dtype
from .engine.temperature import with_temperature_gradient
from .losses.config import GRPOLossConfig


def grpo_loss_from_logits(
    logits: torch.Tensor,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    importance_sampling_ratio: torch.Tensor | None = None,
    sampling_logps: torch.Tensor | None = None,
    num_items: float | torch.Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
    temperature: torch.Tensor | None = None,
    data_parallel_group: Any = None,
    cu_seqlens: torch.Tensor | None = None,
    kept_rows: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
    differentiable_logps: bool = False,
    reduction: Reduction = "loss_type",
    inplace_backward: bool = False,
) -> GRPOLossOutput:
    """The loss of the GRPO family from logits. Position t of logits predicts token t.

    A causal model's ``logits[:, :-1]`` stand beside ``ids[:, 1:]``: shift before the call, nothing is shifted here.

    Equals `objective` of ``(softcap(logit_scale * logits) / temperature).log_softmax(-1)`` at the tokens. Arguments that are not
    below are those of `fused_linear_grpo_loss`.

    Args:
        logits: [B, T, V] raw logits (before logit_scale, softcap and temperature), or [N, V] with cu_seqlens; float32,
            float64, bfloat16 or float16; any strides; differentiable.
        inplace_backward: the backward overwrites the logits with their gradient instead of taking new memory (unless they
            overlap themselves, as expanded ones do); they, and everything that shares their memory, are lost, and a
            second backward is an error.
        kept_rows: only says that nothing may synchronise with the host.
        workspace_bytes: accepted for symmetry; without products nothing needs one.

    Returns:
        `GRPOLossOutput`: loss differentiable once in logits and temperature; logps and entropy detached, unless
        ``differentiable_logps``; metrics.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear_grpo_loss`.
    """
    given = LossArguments(
        logits, None, completion_ids, mask, config, temperature=temperature, workspace_bytes=workspace_bytes, backend=backend,
        kept_rows=kept_rows, data_parallel_group=data_parallel_group, advantages=advantages, old_logps=old_logps,
        ref_logps=ref_logps, importance_sampling_ratio=importance_sampling_ratio, sampling_logps=sampling_logps,
        num_items=num_items, cu_seqlens=cu_seqlens, differentiable_logps=differentiable_logps,
        reduction=reduction,
    )  # fmt: skip
    refuse_transforms(vars(given))
    wait = kept_rows is None and can_sync(logits)
    with validate_across_ranks(group_in_use(config, data_parallel_group) if wait else None, logits, "data_parallel_group"):
        args = given.checked()
        vocab, accumulate = logits.shape[-1], accumulation_dtype(logits.dtype)
        backend = backends.resolve(backend, logits.device, logits.dtype, vocab)
        loss = TokenLoss(args, wait)
        flags = value_flags(args, vocab, loss)
        correction = None
        if wait:
            raise_bad_values(flags.tolist(), vocab)
        else:
            correction = torch.zeros((), dtype=accumulate, device=logits.device).masked_fill(flags.sum() > 0, float("nan"))
        if not isinstance(inplace_backward, bool):
            raise TypeError(f"inplace_backward must be True or False, got {type(inplace_backward).__name__}")

    loss.weigh()
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    kept = mask.bool()
    target = completion_ids.where(kept, 0).clamp(0, vocab - 1)
    temperature = args.temperature
    if temperature is not None:
        temperature = temperature.detach().to(accumulate)
        temperature = temperature.where(kept & (temperature > 0), 1.0)
    variance = args.temperature_has_gradient and args.entropy_has_gradient
    work = Work(config.transform, backend, 0, (True, *(False,) * 4), diagnostics=(*(False,) * 4, variance))
    logps, entropy, found = _LogitsLogProbs.apply(logits, target, kept, temperature, work, inplace_backward and not overlaps)
    logps, entropy = logps.where(kept, 0.0), entropy.where(kept, 0.0)  # a GPU scores masked positions too
    if args.temperature_has_gradient:
        logps, entropy, _ = with_temperature_gradient(logps, entropy, args.temperature, mask, found if variance else None)
    if correction is not None:
        logps = (logps + correction).where(kept, 0.0)
    loss, metrics = loss(logps, entropy)
    return GRPOLossOutput.of(loss, logps, entropy, metrics, differentiable_logps)


class _LogitsLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, kept, temperature, work, inplace):
        *scored, variance = score_logits(logits, target, kept, temperature, *encoded(work))
        ctx.mark_non_differentiable(variance)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, temperature, *scored)
        ctx.options = (work, inplace)
        return scored[0], scored[2], variance

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_entropy, _):
        logits, target, temperature, *scored = ctx.saved_tensors
        work, inplace = ctx.options
        if g is None and g_entropy is None:
            return (None,) * 6
        g = torch.zeros_like(scored[0]) if g is None else g
        tile = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device).copy_(logits)
        logits_to_gradient(tile, target, temperature, scored, [g, g_entropy], *encoded(work))
        return tile, *(None,) * 5


@torch.library.custom_op("grpo_kernels::score_logits", mutates_args=())
def score_logits(
    logits: Tensor, target: Tensor, kept: Tensor, temperature: Tensor | None, numbers: Sequence[float], work: str
) -> list[Tensor]:
    """[logps, lse, entropy, variance of log p], [B, T] (or [N]) each, of logits [B, T, V] (or [N, V]); 0 where not kept.

    The variance is 0 where it is not wanted.
    """
    dtype, wanted = accumulation_dtype(logits.dtype), decoded(tuple(numbers), work)
    *scored, variance = out = [torch.zeros(target.shape, dtype=dtype, device=logits.device) for _ in range(4)]
    for values, sequence in _sequences(logits):
        for span in _spans(kept[sequence]):
            stats = new_statistics(values[span].shape[0], dtype, logits.device)
            temp = None if temperature is None else temperature[sequence][span]
            tile = Tile(_rows(values[span]), target[sequence][span].contiguous(), wanted.transform, temperature=temp)
            kernels = backends.kernels(wanted.backend)
            kernels.statistics(tile, stats)
            kernels.close(stats, Scored(*(vector[sequence][span] for vector in scored)))
            if wanted.diagnostics[-1]:
                variance[sequence][span] = variance_of(with_tile(new_moments(stats.shape[0], dtype, logits.device), tile))
    return out


@score_logits.register_fake
def _(logits, target, kept, temperature, numbers, work):
    return [logits.new_empty(target.shape, dtype=accumulation_dtype(logits.dtype)) for _ in range(4)]


@torch.library.custom_op("grpo_kernels::logits_to_gradient", mutates_args=("logits",))
def logits_to_gradient(
    logits: Tensor, target: Tensor, temperature: Tensor | None, scored: Sequence[Tensor], incoming: Sequence[Tensor | None],
    numbers: Sequence[float], work: str,
) -> None:  # fmt: skip
    """Overwrites logits with their gradient, given those of logps and entropy; rows without one become 0."""
    wanted = decoded(tuple(numbers), work)
    vectors = [None if x is None else x.contiguous() for x in (target, temperature, *scored, *incoming)]
    for values, sequence in _sequences(logits):
        target, temp, logps, lse, entropy, g, g_entropy = (None if x is None else x[sequence] for x in vectors)
        dense = _rows(values)
        tile = Tile(dense, target, wanted.transform, temperature=temp)
        backends.kernels(wanted.backend).gradient(tile, dense, Scored(logps, lse, entropy), g, g_entropy)
        if dense is not values:
            values.copy_(dense)


def _rows(tile):
    """The tile itself if a row's elements are adjacent and rows do not overlap, as the kernels need it; else a copy."""
    adjacent = tile.stride(1) == 1 or tile.shape[1] == 1
    if adjacent and (tile.shape[0] <= 1 or tile.stride(0) >= tile.shape[1]):
        return tile
    return tile.clone(memory_format=torch.contiguous_format)  # contiguous() would keep the strides of a tile without rows


def _sequences(logits):
    """(tile [T, V], index) of each sequence: a slice like logits[:, :-1] has no [B T, V] view, but each sequence has."""
    if logits.dim() == 2:
        return [(logits, slice(None))]
    return [(logits[b], b) for b in range(logits.shape[0])]


def _spans(kept):
    """Runs of kept rows; on a GPU all rows at once, since finding the runs would synchronise."""
    if kept.device.type != "cpu":
        return [slice(0, kept.shape[0])]
    edges = torch.diff(kept.to(torch.int8), prepend=kept.new_zeros(1).to(torch.int8), append=kept.new_zeros(1).to(torch.int8))
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [slice(a, b) for a, b in zip(starts, ends, strict=True)]
