"""`linear_logprobs`: log-probs and entropy of given tokens from hidden states, differentiable under any loss, in two phases.

`linear_logprobs_at` has those of several tokens a position.
"""

from dataclasses import replace
from typing import Any, Literal, TypedDict, overload

import torch
from typing_extensions import Unpack

from .call import LogProbs, LogProbsAndLse, TokenArguments, describe
from .checks import Backend, refuse_transforms
from .engine.diagnostics import NAMES
from .engine.pairs import PairRows, with_pair_logits
from .engine.products import tile_dtype
from .support import TokenSupport


class LogProbsOptions(TypedDict, total=False):
    """What `linear_logprobs` takes by keyword."""

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    temperature: float | torch.Tensor
    logit_scale: float
    softcap: float | None
    lora: tuple[torch.Tensor, torch.Tensor, float] | None
    vocab_parallel_group: Any
    sequence_parallel: bool
    workspace_bytes: int | None
    backend: Backend
    support: TokenSupport | None
    batch_invariant: bool | None


@overload
def linear_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[LogProbsOptions],
) -> LogProbs: ...  # fmt: skip


@overload
def linear_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, *, return_lse: Literal[True],
    **options: Unpack[LogProbsOptions],
) -> LogProbsAndLse: ...  # fmt: skip


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    vocab_parallel_group: Any = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
    support: TokenSupport | None = None,
    batch_invariant: bool | None = None,
) -> LogProbs | LogProbsAndLse:
    """Log-probs of tokens and entropies of their distributions, without the logits. Position t of hidden predicts token t.

    A causal model's ``hidden[:, :-1]`` stand beside ``ids[:, 1:]``: shift before the call, nothing is shifted here.

    Equals ``z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``, then
    ``z.log_softmax(-1).gather(-1, token_ids)`` and the entropy of ``z.softmax(-1)``.

    Args:
        hidden: [.., D] float32, float64, bfloat16 or float16; differentiable.
        weight: [V, D] of the same dtype; differentiable.
        token_ids: [..] int64 in [0, V) where the mask is 1.
        mask: [..] bool or 0/1; None keeps all. Masked rows are not computed.
        bias: [V]; differentiable; may hold -inf.
        temperature: a number > 0, or a tensor, 0-dim or [..] with one value per token; differentiable.
        logit_scale, softcap: as in `GRPOLossConfig`.
        lora: (A [r, D], B [V, r], scale), an adapter on the head that is never merged; A and B differentiable.
        vocab_parallel_group, sequence_parallel: as in `fused_linear_grpo_loss`.
        workspace_bytes: budget for chunks and stash; None is GRPO_KERNELS_WORKSPACE_MB or 384 MiB (1536 on a GPU). Rows that fit
            the stash cost 6NVD operations forward and backward, the others 8NVD; so do all, on a GPU in 16 bits, where an entropy
            gets a gradient. A frozen head costs 4NVD.
        backend: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.
        return_lse: also return ``lse = z.logsumexp(-1)``, for a z-loss ``(lse[mask]**2).mean()``. Its gradient costs no product of
            its own, but on a GPU, in 16 bits, no row is stashed then: 8NVD.
        support: `TokenSupport` of the flattened positions, the tokens that each could have been sampled as: logits outside of it
            count as -inf, and nothing of them is computed. M D multiplications for M pairs instead of N V D.
        batch_invariant: a token's bits depend on nothing else in the call, also where that has a price (docs/bits.md); and those of
            a gradient of the head on the rows' order alone. False promises nothing; None what is free, or what the environment's
            GRPO_KERNELS_BATCH_INVARIANT says, 1 or 0.

    Returns:
        `LogProbs` (logps, entropy), or `LogProbsAndLse` (logps, entropy, lse): [..] float32 (float64 for float64), 0 where masked,
        all differentiable once, in temperature too. No graph is made and no gradient work is done under no_grad or when nothing
        requires a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used.
    """
    logps, entropy, lse, *_ = _scored(
        hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, return_lse=return_lse, support=support, batch_invariant=batch_invariant,
    )  # fmt: skip
    return LogProbsAndLse(logps, entropy, lse) if return_lse else LogProbs(logps, entropy)


def linear_logprobs_at(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    vocab_parallel_group: Any = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
    batch_invariant: bool | None = None,
) -> LogProbs:
    """Log-probs over the whole vocabulary of K tokens a position: top-k distillation, prefix trees, candidates of a reward model.

    Equals ``z.log_softmax(-1).gather(-1, ids)`` with the z of `linear_logprobs`, in one pass over the vocabulary for any K: the
    normaliser is that of the likeliest of the K tokens, and the logits of the others are dot products.

    Args:
        ids: [.., K] int64 or int32 in [0, V) where the mask is 1; -1 is none.
        hidden, weight, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
            workspace_bytes, backend, batch_invariant: as in `linear_logprobs`.

    Returns:
        `LogProbs`: logps [.., K], 0 for an id of -1 and where masked; entropy [..] of the whole vocabulary. float32 (float64 for
        float64), differentiable once. 6NVD operations forward and backward within the stash, as `linear_logprobs`, and K D a row.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used, or the call is traced by torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("linear_logprobs_at cannot be used under torch.compile: call it inside of torch.compiler.disable")
    logps, entropy, _ = logprobs_at(
        hidden, weight, ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, batch_invariant=batch_invariant,
    )  # fmt: skip
    return LogProbs(logps, entropy)


def logprobs_at(hidden, weight, ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
                workspace_bytes, backend, ids_name="ids", as_in_tiles=False, batch_invariant=None):  # fmt: skip
    """(logps, entropy, the dtype of a tile's logits): `linear_logprobs_at` for those who want a log-prob of the other tokens.

    ``as_in_tiles``: as in `with_pair_logits`.
    """
    call = _described(
        hidden, weight, None, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, ids_name=ids_name, candidates=ids, batch_invariant=batch_invariant,
    )  # fmt: skip
    count, ids = ids.shape[-1], torch.nn.functional.pad(ids.long(), (0, 1), value=-1)
    index, chosen = call.rows.index, ids.reshape(-1, count + 1)[call.rows.index]
    z, call = _logits_at(call, chosen, as_in_tiles)
    given, offset = chosen >= 0, 0 if call.work.shard is None else call.work.shard.offset
    # the likeliest is the target of the dense pass: near p = 1, z - lse has lost its digits
    best = z.detach().masked_fill(~given, -float("inf")).argmax(1, keepdim=True)
    call = replace(call, rows=replace(call.rows, target=chosen.gather(1, best).squeeze(1).clamp(min=0) - offset))
    logps, entropy, *_ = call.scores()
    top = z.gather(1, best)
    difference = torch.where((z == top) & z.isinf(), 0.0, z - top)  # of banned tokens alone
    values = (difference + logps.reshape(-1)[index].unsqueeze(1)).where(given, 0.0)
    full = values.new_zeros(entropy.numel(), count + 1).index_copy(0, index, values).view(ids.shape)
    stored = tile_dtype(call.head.weight, call.work.backend)
    return full.where(call.mask.bool().unsqueeze(-1), 0.0)[..., :count], entropy, stored


def _logits_at(call, ids, as_in_tiles):
    """(z [N, K] of these tokens, 0 where an id is -1, differentiable; the call, whose gradients pass through the pairs)."""
    rows, work = call.rows, call.work
    own = ids if work.shard is None else ids - work.shard.offset
    here = (ids >= 0) & (own >= 0) & (own < call.head.weight.shape[0])
    pairs = PairRows.rectangular(own.where(here, -1), rows.index, rows.live)
    z, hidden, head = with_pair_logits(call.head, rows.hidden, pairs, work, as_in_tiles)
    z = z.view(ids.shape).where(here, 0.0)
    z = work.transform.logit_scale * (z if work.shard is None else work.shard.summed(z))
    if work.transform.softcap is not None:
        z = work.transform.softcap * torch.tanh(z / work.transform.softcap)
    given = rows.temperature if call.temperature is None else call.temperature.reshape(-1)[rows.index]
    banned = z == -float("inf")  # the temperature's gradient would be 0 times it
    z = z.masked_fill(banned, 0.0) / (work.transform.temperature if given is None else given.to(z.dtype).unsqueeze(1))
    return z.masked_fill(banned, -float("inf")), replace(call, head=head, rows=replace(rows, hidden=hidden))


def token_statistics(hidden, weight, token_ids, *, mask=None, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, lora=None,
                     vocab_parallel_group=None, sequence_parallel=False, workspace_bytes=None, backend="auto",
                     diagnostics=(), sums_hidden=True, support=None, batch_invariant=None):  # fmt: skip
    """`linear_logprobs` with what trainers log beside: ``diagnostics`` names some of ``diagnostics.NAMES``.

    ``sums_hidden`` False leaves the gradient of hidden this rank's part of a sum over the vocab_parallel_group.

    Returns:
        [logps, entropy, log_sum_sq_probs, mean_logits, is_top1, score_sq_norm]: [..] each, is_top1 bool, None for a diagnostic
        that was not asked for. Only the first two have gradients.
    """
    logps, entropy, _, *beside = _scored(
        hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, diagnostics, sums_hidden, support=support, batch_invariant=batch_invariant,
    )  # fmt: skip
    return [logps, entropy, *beside]


def _scored(hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
            workspace_bytes, backend, diagnostics=(), sums_hidden=True, **more):  # fmt: skip
    """[logps, entropy, lse or None, and the four diagnostics or None]."""
    wanted = [name in diagnostics for name in NAMES]
    call = _described(
        hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, wanted, sums_hidden, **more,
    )  # fmt: skip
    logps, entropy, lse, found = call.scores(return_lse=more.get("return_lse", False))
    beside = [call.scatter(found[:, i]) if want else None for i, want in enumerate(wanted)]
    beside[2] = None if beside[2] is None else beside[2] > 0
    return [logps, entropy, lse, *beside]


def _described(hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group,
               sequence_parallel, workspace_bytes, backend, diagnostics=(False,) * 4, sums_hidden=True, **more):  # fmt: skip
    refuse_transforms({"temperature": temperature})
    per_token = isinstance(temperature, torch.Tensor)
    if per_token and temperature.dim() == 0 and not (temperature.requires_grad and torch.is_grad_enabled()):
        per_token, temperature = False, temperature.item()
    options = 1.0 if per_token else temperature, logit_scale, softcap
    args = TokenArguments(hidden, weight, token_ids, mask, None, bias, temperature if per_token else None, lora,
                          vocab_parallel_group, sequence_parallel, workspace_bytes, backend, options=options, **more)  # fmt: skip
    return describe(args, diagnostics, sums_hidden)
