"""Three torch.library ops around the loops of chunks.py, and autograd around the ops.

    one_pass         logps, entropy and all gradients of a loss whose coefficients depend on their rows alone
    score            logps, entropy, lse, and a stash of the rows that fit it
    score_backward   the gradients of `score` from those of logps, entropy and lse

Beside a teacher all know of its divergence too. All take (hidden, head, teacher, rows, ...): lists of tensors in the order of
`Head.tensors`, `Teacher.tensors` (empty without one) and `Rows.tensors`, and a `Work` as numbers and a string. The host is
waited for in a two-phase backward alone: which rows got a gradient, and whether an entropy did.
"""

import functools
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.comparison import Compared
from ..backends.statistics import Scored
from .chunks import Run, backward, one_pass, padded, score_with_stash
from .operands import FIELDS, Head, Rows, Teacher, Work, can_sync, decoded, encoded, problem_of
from .plan import stash_rows_of
from .products import accumulation_dtype, blocks, tile_memory

_COMPACTED_ROWS = 64
_SCALED_ROWS = 2048


def differentiable_once(backward):
    """A `backward` that refuses to be recorded; PyTorch's decorator allows that where the incoming gradient needs no gradient."""
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *incoming):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph must be False: a fused gradient cannot be differentiated again; reference.grpo_loss can, and so can "
                "objective of log-probs from full logits"
            )
        return once(ctx, *incoming)

    return run


def _op(mutates=()):
    """A torch.library op; the public functions cast once under autocast, in here it would round the float32 sums."""

    def register(function):
        @functools.wraps(function)
        def run(hidden, *args):
            with torch.autocast(hidden.device.type, enabled=False):
                return function(hidden, *args)

        return torch.library.custom_op(f"grpo_kernels::{function.__name__.strip('_')}", mutates_args=mutates)(run)

    return register


@_op()
def _one_pass(
    hidden: Tensor, head: Sequence[Tensor | None], teacher: Sequence[Tensor | None], rows: Sequence[Tensor | None], live: int,
    numbers: Sequence[float], work: str,
) -> list[Tensor]:  # fmt: skip
    run = Run(hidden, head, rows, live, decoded(tuple(numbers), work), teacher=teacher)
    gradients = one_pass(run)
    return [run.scored.logps, run.scored.entropy, run.compared.value, *gradients]


@_one_pass.register_fake
def _(hidden, head, teacher, rows, live, numbers, work):
    logps, entropy, value = _fake_vectors(hidden, rows, 3)
    return [logps, entropy, value if teacher else value[:0], *_fake_gradients(hidden, head, work)]


@_op()
def _score(
    hidden: Tensor, head: Sequence[Tensor | None], teacher: Sequence[Tensor | None], rows: Sequence[Tensor | None], live: int,
    stash_rows: int, numbers: Sequence[float], work: str,
) -> list[Tensor]:  # fmt: skip
    run = Run(hidden, head, rows, live, decoded(tuple(numbers), work), two_phases=True, teacher=teacher)
    stash = score_with_stash(run, stash_rows)
    return [*run.scored, *run.compared, stash, run.diagnostics]


@_score.register_fake
def _(hidden, head, teacher, rows, live, stash_rows, numbers, work):
    scored, compared = _fake_vectors(hidden, rows, 3), _fake_vectors(hidden, rows, 3)
    stash = hidden.new_empty(stash_rows, padded(head[0].shape[0], hidden.element_size()))
    wanted = _of(work, "diagnostics")
    diagnostics = scored[0].new_empty(len(scored[0]) if any(wanted) else 0, len(wanted))
    return [*scored, *(compared if teacher else [x[:0] for x in compared]), stash, diagnostics]


@_op(mutates=("stash",))
def _score_backward(
    hidden: Tensor, head: Sequence[Tensor | None], teacher: Sequence[Tensor | None], rows: Sequence[Tensor | None],
    scored: Sequence[Tensor], stash: Tensor, incoming: Sequence[Tensor | None], numbers: Sequence[float], work: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``scored``: logps, lse, entropy, and with a teacher gap, own, value. ``incoming``: of logps, entropy, lse, divergence."""
    run = Run(hidden, head, rows, rows[0].shape[0], decoded(tuple(numbers), work), True, True, teacher)
    g, g_entropy, *more = incoming
    if run.wide and len(stash) and not teacher:  # torch.compile hands over zeros for None: this is known here at the earliest
        g_entropy = _unless_zero(g_entropy, run.work.shard)
        stash = stash if g_entropy is None else stash[:0]
    compared = Compared(*scored[3:]) if teacher else None
    return tuple(backward(run, Scored(*scored[:3]), compared, stash[:, : head[0].shape[0]], g, g_entropy, *more))


@_score_backward.register_fake
def _(hidden, head, teacher, rows, scored, stash, incoming, numbers, work):
    return tuple(_fake_gradients(hidden, head, work))


def _fake_vectors(hidden, rows, count):
    return [hidden.new_empty(rows[0].shape[0], dtype=accumulation_dtype(hidden.dtype)) for _ in range(count)]


def _fake_gradients(hidden, head, work):
    done = []
    for i, (tensor, needed) in enumerate(zip((hidden, *head), _of(work, "needs"), strict=True)):
        dtype = accumulation_dtype(hidden.dtype) if i == 2 else hidden.dtype  # that of bias is a sum
        done.append(torch.empty(tensor.shape if needed else 0, dtype=dtype, device=hidden.device))
    return done


def _of(work, name):
    """A field of an encoded `Work` that holds no numbers: those may be symbols."""
    return json.loads(work)[FIELDS.index(name)]


# One pass


def loss_in_one_pass(head: Head, rows: Rows, work: Work, teacher: Teacher | None = None):
    """(logps, entropy, divergence or an empty tensor, gradients): of all rows, and of the loss of these coefficients."""
    beside = [] if teacher is None else teacher.tensors
    found = _one_pass(rows.hidden.detach(), _detached(head.tensors), beside, rows.tensors, rows.live, *encoded(work))
    return *found[:3], found[3:]


def _detached(tensors):
    return [None if x is None else x.detach() for x in tensors]


def with_gradients(loss, gradients, head: Head, rows: Rows, work: Work):
    """The loss with its gradients, which are known already: a backward multiplies them by the incoming gradient."""
    return _WithGradients.apply(loss, work.needs, work.backend, len(gradients), rows.hidden, *head.tensors, *gradients)


class _WithGradients(torch.autograd.Function):
    """The gradients are saved tensors, which autograd lets go of before it accumulates: a parameter's ``.grad`` is then the very
    memory that the forward wrote. The multiplication is in place, since a second full-size gradient would undo what the fusion
    saves, unless the graph is retained for another backward. A compiled backward may write over what it is the last to read.
    """

    @staticmethod
    def forward(ctx, loss, needs, backend, count, *tensors):
        inputs, gradients = tensors[:count], tensors[count:]
        ctx.needs, ctx.backend = needs, backend
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.save_for_backward(loss.isnan(), *gradients)
        return loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        is_nan, *grads = ctx.saved_tensors
        # rows that cost no backward must not hide a NaN of theirs from the gradients
        scale = g.masked_fill(is_nan, float("nan"))
        if graph_is_retained():
            grads = [torch.mul(grad, scale) for grad in grads]  # in float32: rounded first, a loss scale may be inf
        else:
            for grad in grads:
                backends.scale_(grad, scale, ctx.backend)
        done = [grad.to(dtype) if needed else None for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs, strict=True)]
        # the loss has a graph of its own where some of its rows are computed over supports
        return g if ctx.needs_input_grad[0] else None, None, None, None, *done, *(None,) * len(done)


# Two phases


def row_logprobs(head: Head, rows: Rows, work: Work, entropy_gradient=False, return_lse=False):
    """(logps [N], entropy [N], diagnostics [N, 5] or [0, 5], lse [N] or None) of the rows.

    Differentiable where ``work.needs`` anything. ``entropy_gradient`` says that a gradient of the entropy will come.
    """
    if not any(work.needs):
        found = _score(rows.hidden.detach(), _detached(head.tensors), [], rows.tensors[:3], 0, 0, *encoded(work))
        (logps, lse, entropy), found = found[:3], found[-1]
        return logps, entropy, found, lse if return_lse else None
    return _RowLogProbs.apply(work, rows.live, (entropy_gradient, return_lse), rows.hidden, *head.tensors, *rows.tensors[:3])


class _RowLogProbs(torch.autograd.Function):
    """Two phases. A frozen head keeps u = d logps / d hidden; else the stash of as many rows as fit is kept."""

    @staticmethod
    def forward(ctx, work, live, beside, hidden, *tensors):
        head, rows = tensors[:4], tensors[4:]
        ctx.set_materialize_grads(False)
        problem = problem_of(head[0], work, live, rows[0].shape[0] - live, two_phases=True)
        ctx.work, ctx.stash, ctx.wide = work, None, problem.wide
        ctx.direct = work.needs[0] and not any((*work.needs[1:], *beside, *work.diagnostics))
        if ctx.direct:
            ones = torch.ones(live, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
            logps, entropy, _, u, *_ = _one_pass(hidden, head, [], [*rows, ones, *(None,) * 5], live, *encoded(work))
            ctx.save_for_backward(hidden, *tensors, logps, None, entropy, u)
            return logps, entropy, logps.new_empty(0, len(work.diagnostics)), None
        # what a wide stash has rounded would depend on whether a row fits it
        stash_rows = 0 if ctx.wide and (any(beside) or work.batch_invariant) else stash_rows_of(problem)
        *scored, stash, found = _score(hidden, head, [], rows, live, stash_rows, *encoded(work))
        logps, lse, entropy = scored[:3]
        ctx.mark_non_differentiable(found)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(hidden, *tensors, logps, lse, entropy, stash)
        else:
            # not a saved tensor, since the backward overwrites it (a copy, if the graph is retained)
            ctx.save_for_backward(hidden, *tensors, logps, lse, entropy, None)
            ctx.stash = stash
        return logps, entropy, found, lse if beside[1] else None

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_entropy, _, g_lse):
        hidden, *tensors, logps, lse, entropy, saved = ctx.saved_tensors
        head, rows, nothing = tensors[:4], tensors[4:], (None,) * 3
        if g is None and g_entropy is None and g_lse is None:
            return (*nothing, *(None,) * 8)
        g = torch.zeros_like(logps) if g is None else g
        if ctx.wide or ctx.direct:  # whose way with an entropy's gradient is a longer one
            g_entropy = _unless_zero(g_entropy, ctx.work.shard)
        if ctx.direct and g_entropy is None:
            factor = g.new_zeros(hidden.shape[0]).index_copy(0, rows[0], g).unsqueeze(1)
            return (*nothing, _scaled_rows(saved, factor), *(None,) * 7)
        retained, stash = graph_is_retained(), saved
        if ctx.direct:
            lse, stash = _score(hidden, head, [], rows, 0, 0, *encoded(ctx.work))[1], hidden.new_empty(0, head[0].shape[0])
        elif saved is None:
            stash, ctx.stash = ctx.stash, ctx.stash if retained else None
            if ctx.wide and g_entropy is not None:
                stash = stash.new_empty(0, stash.shape[1])  # of no use here (chunks.py): gone before the recomputing takes memory
            elif retained:
                stash = stash.clone()
        incoming = [g, g_entropy, g_lse, None]
        grads = _backward_of_live_rows(hidden, head, [], rows, [logps, lse, entropy], stash, incoming, ctx.work)
        if saved is None and not retained:
            tile_memory.give_back(stash, ctx.work.budget)
        done = [grad.to(x.dtype) if needed else None
                for grad, x, needed in zip(grads, (hidden, *head), ctx.work.needs, strict=True)]  # fmt: skip
        return (*nothing, *done, None, None, None)


class _RowDivergences(torch.autograd.Function):
    """Two phases beside a teacher. Where only the divergence has a gradient, a frozen head keeps u = d divergence / d hidden, and
    others a stash of that of the logits: a backward scales rows. Where logps or entropy have one too, all is recomputed.
    """

    @staticmethod
    def forward(ctx, work, live, alone, hidden, *tensors):
        head, teacher, rows = tensors[:4], tensors[4:7], tensors[7:]
        ctx.set_materialize_grads(False)
        ctx.work, ctx.stash, ctx.alone = work, None, alone
        ctx.direct = alone and work.needs[0] and not any(work.needs[1:])
        if ctx.direct:
            ones = torch.ones(live, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
            policy = (None,) * 4 + (ones, None)
            logps, entropy, value, u, *_ = _one_pass(hidden, head, teacher, [*rows, *policy], live, *encoded(work))
            ctx.save_for_backward(rows[0], u)
        else:
            problem = problem_of(head[0], work, live, rows[0].shape[0] - live, True, teacher)
            stash_rows = stash_rows_of(problem) if alone else 0
            *scored, stash, _ = _score(hidden, head, teacher, rows, live, stash_rows, *encoded(work))
            ctx.stash = stash
            ctx.save_for_backward(hidden, *tensors, *scored)
            logps, _, entropy, *_, value = scored
        if alone:
            ctx.mark_non_differentiable(logps, entropy)
        return logps, entropy, value

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_entropy, g_divergence):
        nothing = (None,) * 3
        if g is None and g_entropy is None and g_divergence is None:
            return (*nothing, *(None,) * 11)
        if ctx.direct:
            index, u = ctx.saved_tensors
            factor = g_divergence.new_zeros(u.shape[0]).index_copy(0, index, g_divergence).unsqueeze(1)
            return (*nothing, _scaled_rows(u, factor), *(None,) * 10)
        hidden, *tensors = ctx.saved_tensors
        head, teacher, rows, scored = tensors[:4], tensors[4:7], tensors[7:10], tensors[10:]
        retained, stash = graph_is_retained(), ctx.stash
        ctx.stash = ctx.stash if retained else None
        g_divergence = torch.zeros_like(scored[0]) if g_divergence is None else g_divergence
        g, g_entropy = (None, None) if ctx.alone else (g, g_entropy)  # torch.compile hands over zeros
        incoming = [g, g_entropy, None, g_divergence]
        stash = stash.clone() if retained else stash
        grads = _backward_of_live_rows(hidden, head, teacher, rows, scored, stash, incoming, ctx.work)
        if not retained:
            tile_memory.give_back(stash, ctx.work.budget)
        done = [grad.to(x.dtype) if needed else None
                for grad, x, needed in zip(grads, (hidden, *head), ctx.work.needs, strict=True)]  # fmt: skip
        return (*nothing, *done, *(None,) * 6)


def row_divergences(head: Head, teacher: Teacher, rows: Rows, work: Work, alone=True):
    """(logps [N], entropy [N], divergence [N]) of the rows, differentiable where ``work.needs`` anything.

    ``alone``: only the last of the three.
    """
    if not any(work.needs):
        tensors = _detached(head.tensors)
        found = _score(rows.hidden.detach(), tensors, teacher.tensors, rows.tensors[:3], 0, 0, *encoded(work))
        return found[0], found[2], found[5]
    return _RowDivergences.apply(work, rows.live, alone, rows.hidden, *head.tensors, *teacher.tensors, *rows.tensors[:3])


def _backward_of_live_rows(hidden, head, teacher, rows, scored, stash, incoming, work):
    """`_score_backward` of the rows that got a gradient; the stash of the others is overwritten."""
    chosen = _rows_with_gradient(incoming, work.shard)
    if chosen is not None:
        stash = _compacted(stash, chosen[chosen < stash.shape[0]])
        rows, scored, incoming = ([None if x is None else x[chosen] for x in some] for some in (rows, scored, incoming))
    return _score_backward(hidden, head, teacher, rows, scored, stash, incoming, *encoded(work))


def _unless_zero(g_entropy, shard):
    """None for a gradient that is zero on all ranks, where the host may look."""
    if g_entropy is None or not can_sync(g_entropy):
        return g_entropy
    some = (g_entropy != 0).any()  # NaN is not zero
    return g_entropy if (some if shard is None else shard.any(some)) else None


def _rows_with_gradient(incoming, shard):
    """Indices of rows whose gradient is not zero (NaN counts as not zero), on any rank, or None if that is all of them."""
    if not can_sync(next(x for x in incoming if x is not None)):
        return None
    wanted = torch.stack([x != 0 for x in incoming if x is not None]).any(0)
    if shard is not None:
        wanted = shard.any(wanted)
    chosen = wanted.nonzero().squeeze(1)
    return None if len(chosen) == len(wanted) else chosen


def _scaled_rows(u, factor):
    """u [M, D] times a float32 factor a row, in u's dtype; a block at a time, for the product is float32 before it is rounded."""
    if torch.compiler.is_compiling():
        return torch.mul(u, factor).to(u.dtype)
    out = torch.empty_like(u)
    for start, end in blocks(u.shape[0], _SCALED_ROWS):
        out[start:end] = u[start:end] * factor[start:end]
    return out


def _compacted(stash, chosen):
    """The chosen rows of the stash moved to its front, in place."""
    if chosen.shape[0] == stash.shape[0]:
        return stash
    # a row's source never lies before it, so a block that was moved is never read again
    for start, end in blocks(chosen.shape[0], 1 if stash.device.type == "cpu" else _COMPACTED_ROWS):
        stash[start:end] = stash[chosen[start:end]]
    return stash[: chosen.shape[0]]


def graph_is_retained():
    """Whether the running backward was asked to keep the graph for another one; True where that cannot be known."""
    if torch.compiler.is_compiling():
        return True
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()
