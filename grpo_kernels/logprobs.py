"""`linear_logprobs`: log-probs and entropy of given tokens from hidden states, differentiable under any loss, in two phases."""

from dataclasses import dataclass, replace

import torch

from . import backends
from .arguments import check_group, check_logprob_arguments, host_may_wait, value_flags
from .distributed import VocabShard, gathered_sequence, group_of, of_dtensors, refusing_together
from .engine import tiles
from .engine.diagnostics import NAMES
from .engine.plan import default_budget
from .engine.products import accumulation_dtype, tile_memory
from .losses.config import GRPOLossConfig, LogitTransform
from .outputs import LogProbs
from .rows import Selection, flatten, select_rows


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
    lora: tuple | None = None,
    vocab_parallel_group=None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probs of the tokens and entropies of their distributions, without the [.., V] logits.

    Equals ``z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``, then
    ``z.log_softmax(-1).gather(-1, token_ids)`` and the entropy of ``z.softmax(-1)``.

    Args:
        hidden: [.., D] float32, float64, bfloat16 or float16; differentiable.
        weight: [V, D] of the same dtype; differentiable.
        token_ids: [..] int64 in [0, V) where the mask is 1.
        mask: [..] bool or 0/1; None keeps all. Masked rows are not computed.
        bias: [V]; differentiable; may hold -inf.
        temperature: a number > 0, or a tensor [..] with one value per token.
        logit_scale, softcap: as in `GRPOLossConfig`.
        lora: (A [r, D], B [V, r], scale), an adapter on the head that is never merged; A and B differentiable.
        vocab_parallel_group, sequence_parallel: as in `fused_linear_grpo_loss`.
        workspace_bytes: budget for tiles and stash; None is GRPO_KERNELS_WORKSPACE_MB or 384 MiB (768 on a GPU). Rows whose softmax
            fits it cost 6NVD operations forward and backward, the others 8NVD; a frozen head costs 4NVD.
        backend: ``auto``, ``torch``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        `LogProbs` of two [..] float32 tensors (float64 for float64), 0 where masked, both differentiable once. No graph is
        made and no gradient work is done under no_grad or when nothing requires a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used.
    """
    return LogProbs(*token_statistics(
        hidden, weight, token_ids, mask=mask, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        lora=lora, vocab_parallel_group=vocab_parallel_group, sequence_parallel=sequence_parallel, workspace_bytes=workspace_bytes,
        backend=backend,
    )[:2])  # fmt: skip


def token_statistics(hidden, weight, token_ids, *, mask=None, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, lora=None,
                     vocab_parallel_group=None, sequence_parallel=False, workspace_bytes=None, backend="auto",
                     diagnostics=(), sums_hidden=True):  # fmt: skip
    """`linear_logprobs` with what trainers log beside: ``diagnostics`` names some of ``diagnostics.NAMES``.

    ``sums_hidden`` False leaves the gradient of hidden this rank's part of a sum over the vocab_parallel_group.

    Returns:
        [logps, entropy, log_sum_sq_probs, mean_logits, is_top1]: [..] each, the last bool, None for a diagnostic that was not
        asked for. Only the first two have gradients.
    """
    wanted = [name in diagnostics for name in NAMES]
    per_token = temperature if isinstance(temperature, torch.Tensor) and temperature.dim() > 0 else None
    check_group("vocab_parallel_group", vocab_parallel_group)
    vocab_parallel_group = group_of(weight, vocab_parallel_group)
    hidden = gathered_sequence(hidden, vocab_parallel_group) if sequence_parallel else hidden
    with refusing_together(vocab_parallel_group, hidden) as meeting:
        hidden, weight, bias, lora = of_dtensors(hidden, weight, bias, lora, vocab_parallel_group)
        if isinstance(temperature, torch.Tensor) and per_token is None:
            temperature = temperature.item()
        config = GRPOLossConfig(temperature=1.0 if per_token is not None else temperature, logit_scale=logit_scale, softcap=softcap)
        hidden, weight, bias, lora = check_logprob_arguments(
            hidden, weight, token_ids, mask, bias, per_token, lora, vocab_parallel_group, workspace_bytes, backend, config
        )
        if vocab_parallel_group is not None and any(wanted):
            raise ValueError("diagnostics must be empty with a vocab_parallel_group")
        head = FusedHead.of(hidden, weight, bias, lora, config.transform, workspace_bytes, backend, meeting)
        meeting.facts["which tensors are given"] = given_names(mask=mask, bias=bias, temperature=per_token)
    head = head.sharded(meeting, sums_hidden and not sequence_parallel)
    if mask is None:
        mask = torch.ones(token_ids.shape, dtype=torch.bool, device=hidden.device)
    flags = value_flags(mask, token_ids, head.vocab, temperature=per_token)
    live = mask.bool() if any(head.needs(hidden)) else None
    selection = select_rows(mask, flags, head.vocab, live=live, shard=head.shard)
    rows = flatten(hidden, mask, all_rows=not host_may_wait(mask))
    logps, entropy, found = row_logprobs(rows, head, selection, token_ids, per_token, wanted=wanted)
    found = [selection.scatter(x, mask) if want else None for x, want in zip(found.unbind(1), wanted, strict=True)]
    found[2] = None if found[2] is None else found[2] > 0
    return [selection.scatter(logps, mask), selection.scatter(entropy, mask), *found]


@dataclass(frozen=True)
class FusedHead:
    """The head and how to run it, as the ops of tiles.py take them."""

    tensors: tuple  # weight, bias, lora A, lora B
    scalars: list  # lora scale, logit scale, softcap or 0, temperature
    budget: int
    backend: str
    shard: VocabShard | None = None

    @staticmethod
    def of(hidden, weight, bias, lora, transform: LogitTransform, workspace_bytes, backend, meeting):
        """Brings to the `Meeting` what must be the same on all ranks, and this rank's rows; `sharded` comes after it."""
        a, b, scale = (None, None, 1.0) if lora is None else lora
        scalars = [float(scale), transform.logit_scale, transform.softcap or 0.0, transform.temperature]
        budget = default_budget(weight.device.type) if workspace_bytes is None else int(workspace_bytes)
        backend = backends.resolve(backend, weight.device, weight.dtype, weight.shape[0])
        head = FusedHead((weight, bias, a, b), scalars, budget, backend)
        if meeting.group is None:
            return head
        if not host_may_wait(weight):
            raise RuntimeError("vocab_parallel_group cannot be used under torch.compile or while a CUDA graph is captured")
        meeting.own_rows = weight.shape[0]
        meeting.facts = {
            "rows of hidden": hidden.shape[:-1].numel(), "depth of hidden": hidden.shape[-1], "dtype": str(weight.dtype),
            "which tensors need a gradient": str(head.needs(hidden)), "workspace_bytes": budget, "temperature and factors": scalars,
            "rank of the adapter": 0 if a is None else a.shape[0],
        }  # fmt: skip
        return head

    def sharded(self, meeting, sums_hidden):
        """With the other ranks' rows, once the `Meeting` is over; itself where there is no group."""
        return self if meeting.group is None else replace(self, shard=VocabShard.of(meeting, sums_hidden))

    @property
    def vocab(self):
        """All of it, whatever this rank holds."""
        return self.tensors[0].shape[0] if self.shard is None else self.shard.total

    @property
    def sharding(self):
        """(name of the group, rows of each rank), as the ops take them."""
        return ("", []) if self.shard is None else self.shard.op_arguments

    def needs(self, hidden):
        """Which of (hidden, weight, bias, lora A, lora B) want a gradient."""
        if not torch.is_grad_enabled():
            return [False] * 5
        return [x is not None and x.requires_grad for x in (hidden, *self.tensors)]

    def targets(self, selection: Selection, token_ids, temperature):
        """(target [N], temperature [N] or None) of the selected rows; clean where nothing was checked on the host."""
        accumulate = accumulation_dtype(self.tensors[0].dtype)
        target = selection.take(token_ids)
        temperature = None if temperature is None else selection.take(temperature.detach()).to(accumulate)
        if selection.correction is not None:
            target = target.clamp(0, self.vocab - 1)
            temperature = None if temperature is None else temperature.where(temperature > 0, 1.0)
        return target if self.shard is None else target - self.shard.offset, temperature


def given_names(**tensors):
    """The names of what is given."""
    return [name for name, x in tensors.items() if x is not None]


def row_logprobs(hidden, head: FusedHead, selection: Selection, token_ids, temperature, entropy_gradient=False,
                 wanted=(False,) * 3):  # fmt: skip
    """(logps [N], entropy [N], diagnostics [N, 3] or [0, 3]) of the selected rows.

    ``entropy_gradient`` says that a gradient of the entropy will come, ``wanted`` which diagnostics are.
    """
    target, temperature = head.targets(selection, token_ids, temperature)
    needs = head.needs(hidden)
    if not any(needs):
        tensors = [x if x is None else x.detach() for x in (hidden, *head.tensors)]
        logps, entropy, _, _, found = tiles.score(
            *tensors, selection.rows, target, temperature, 0, 0, head.scalars, [False] * 5, head.budget, head.backend, wanted,
            *head.sharding,
        )  # fmt: skip
        return logps, entropy, found
    return _RowLogProbs.apply(
        hidden, *head.tensors, selection.rows, target, temperature,
        head.scalars, selection.live, head.budget, head.backend, needs, entropy_gradient, wanted, head.sharding,
    )  # fmt: skip


class _RowLogProbs(torch.autograd.Function):
    """Two phases. A frozen head keeps u = d logps / d hidden; else the softmax of as many rows as fit is kept."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, rows, target, temperature, scalars, live, budget, backend, needs,
                entropy_gradient, wanted, sharding):  # fmt: skip
        tensors = (hidden, weight, bias, lora_a, lora_b, rows, target, temperature)
        ctx.set_materialize_grads(False)
        ctx.call = (scalars, needs, budget, backend, sharding)
        ctx.live = live
        ctx.direct = needs[0] and not any((*needs[1:], entropy_gradient, *wanted))
        ctx.stash = None
        if ctx.direct:
            ones = torch.ones(live, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
            logps, entropy, u, *_ = tiles.one_pass(
                *tensors, ones, None, None, None, None, None, live, "linear", [0.2, 0.2, 0.0, 1.0, 1.0], False,
                scalars, needs, budget, backend, *sharding,
            )  # fmt: skip
            ctx.save_for_backward(*tensors, logps, entropy, None, u)
            return logps, entropy, logps.new_empty(0, 3)
        stash_rows = tiles.plan_call(live, rows.shape[0] - live, weight, needs, budget, backend, sharding[1]).stash_rows
        logps, entropy, lse, stash, found = tiles.score(
            *tensors, stash_rows, live, scalars, needs, budget, backend, wanted, *sharding
        )
        ctx.mark_non_differentiable(found)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*tensors, logps, entropy, lse, stash)
        else:
            # not a saved tensor, since the backward overwrites it (a copy, if the graph is retained)
            ctx.save_for_backward(*tensors, logps, entropy, lse, None)
            ctx.stash = stash
        return logps, entropy, found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_entropy, _):
        *tensors, logps, entropy, lse, kept = ctx.saved_tensors
        hidden, rows = tensors[0], tensors[5]
        nothing = (None,) * 11
        if g is None and g_entropy is None:
            return (None,) * 5 + nothing
        if ctx.direct and g_entropy is None:
            factor = g.new_zeros(hidden.shape[0]).index_copy(0, rows, g).unsqueeze(1)
            return torch.mul(kept, factor).to(kept.dtype), None, None, None, None, *nothing
        scalars, needs, budget, backend, sharding = ctx.call
        empty = hidden.new_empty(0, tensors[1].shape[0])
        stash = kept if not ctx.direct and kept is not None else ctx.stash
        retained = graph_is_retained()
        if ctx.stash is not None and retained:
            stash = stash.clone()
        else:
            ctx.stash = None
        if lse is None:
            lse = tiles.score(*tensors, 0, 0, scalars, [False] * 5, budget, backend, [False] * 3, *sharding)[2]
        g = torch.zeros_like(logps) if g is None else g
        grads = tiles.score_backward(
            *tensors, logps, entropy, lse, empty if stash is None else stash, g, g_entropy, scalars, needs, budget, backend,
            *sharding,
        )  # fmt: skip
        if stash is not None and kept is None and not retained:
            tile_memory.give_back(stash)
        return *cast_gradients(grads, tensors, needs), *nothing


def graph_is_retained():
    """Whether the running backward was asked to keep the graph for another one; True where that cannot be known."""
    if torch.compiler.is_compiling():
        return True
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def cast_gradients(grads, tensors, needs):
    """The gradients that were asked for, in their tensors' dtypes; None for the others."""
    return tuple(
        grad.to(tensor.dtype) if needed else None for grad, tensor, needed in zip(grads, tensors, needs, strict=False)
    )
