"""The chunk loops, as three torch.library ops: one pass, scoring (with a stash), and the backward of scoring.

    one_pass         per tile of rows: z = h W^T, row kernel (statistics ... dz in place), dH = dz W, dW += dz^T h     6NVD
    score            per tile: z, statistics; the first ``stash_rows`` rows leave their softmax behind                  2NVD
    score_backward   dz from the stash, or from z computed again; vocabulary outermost                           4NVD or 6NVD

They take flattened rows: ``hidden`` [M, D] and ``rows`` [N], the indices of the kept rows with those that need a gradient (the
first ``live``) in front; every per-row vector is in the order of ``rows``. ``scalars`` are (lora scale, logit scale, softcap or
0, temperature); ``needs`` says which gradients are wanted, of (hidden, weight, bias, lora A, lora B). Nothing here
synchronises with the host except `score_backward`, which drops rows that got no gradient. The ops carry no autograd formula:
loss.py and logprobs.py hold theirs.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..arguments import host_may_wait
from ..backends.pytorch import new_statistics
from ..backends.statistics import finalize
from ..distributed import shard_named
from ..losses.coefficients import PolicyRows, PolicyTerms, coefficient
from ..losses.config import LogitTransform
from .diagnostics import Diagnostics
from .plan import Plan, Problem, plan
from .products import (
    Gradients,
    Head,
    accumulation_dtype,
    blocks,
    blocks_from,
    empty,
    float32_products,
    multiply,
    sums_directly,
    tile_dtype,
    tile_memory,
)

_ROW_ALIGNMENT = 128
_COMPACTED_ROWS = 64


def plan_call(live, dead, weight, needs, budget, backend, sizes=(), mixed=False) -> Plan:
    """``sizes``: the rows of the vocabulary on each rank; all of them cut the rows of hidden alike."""
    vocab, depth = max(sizes, default=weight.shape[0]), weight.shape[1]
    return plan(
        Problem(
            live=live,
            dead=dead,
            vocab=vocab,
            depth=depth,
            element_size=weight.element_size(),
            tile_size=tile_dtype(weight, backend).itemsize,
            needs_weight=needs[1] or needs[2] or needs[4],
            budget=budget,
            sums_directly=sums_directly(weight),
            mixed=mixed,
        )
    )


def _without_autocast(op):
    """The public functions cast once under autocast; in here it would round the float32 sums."""

    @functools.wraps(op)
    def run(hidden, *args):
        with torch.autocast(hidden.device.type, enabled=False):
            return op(hidden, *args)

    return run


@torch.library.custom_op("grpo_kernels::one_pass", mutates_args=())
@_without_autocast
def one_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    w_policy: Tensor,
    advantages: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    w_kl: Tensor | None,
    w_entropy: Tensor | None,
    live: int,
    kind: str,
    terms: Sequence[float],
    bias_correction: bool,
    scalars: Sequence[float],
    needs: Sequence[bool],
    budget: int,
    backend: str,
    group: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps [N], entropy [N], dH, dW, dbias, dA, dB): scores all rows and differentiates the first ``live``."""
    the_plan, shard = plan_call(live, rows.shape[0] - live, weight, needs, budget, backend, sizes), shard_named(group, sizes)
    call = _Call(hidden, weight, bias, lora_a, lora_b, rows, target, temperature, live, scalars, backend, shard)
    policy_terms = PolicyTerms(kind, *terms[:2], terms[2] or None, *terms[3:], bias_correction)
    vectors = [w_policy, advantages, old, ref, w_kl, w_entropy]
    # before the tiles, so that its buffer and theirs are never in memory together
    call.score(live, rows.shape[0], the_plan)
    grads = Gradients(hidden, call.head, needs, the_plan.tiles, the_plan.columns, call.all_live, shard=shard)
    if live:
        _policy_tiles(call, grads, the_plan, vectors, policy_terms, live)
    return call.logps, call.entropy, *grads.finish(hidden)


def _policy_tiles(call, grads, the_plan, vectors, terms, live):
    buffer = _tile(the_plan.tile_rows, call.head.weight.shape[0], call.hidden, call.tile_dtype)
    for start, end in blocks(live, the_plan.tile_rows):
        h, t, where = call.gather(start, end)
        s, tile = slice(start, end), buffer[: end - start]
        call.head.tile(h, t, the_plan.columns, out=tile)
        rows, out = PolicyRows(*(None if x is None else x[s] for x in vectors)), _over(tile, call.hidden.dtype)
        if call.shard is None:
            call.kernels.policy(
                tile, call.target[s], rows, terms, call.transform, call.logps[s], call.entropy[s], out=out, **call.options(s)
            )
        else:
            _sharded_policy(call, tile, s, rows, terms, out)
        grads.add_tile(_operand(tile, out), h, t, where)
        del h, t  # before the next ones are gathered
    tile_memory.give_back(buffer)


def _sharded_policy(call, tile, s, rows, terms, out):
    """The policy kernel in two halves, with the other ranks' statistics between them."""
    stats = new_statistics(tile.shape[0], call.accumulate, tile.device)
    call.kernels.statistics(tile, stats, call.target[s], call.transform, **call.options(s))
    logps, lse, entropy = finalize(call.shard.statistics(stats)[0])
    call.logps[s], call.entropy[s] = logps, entropy
    g = coefficient(logps, rows, terms)
    call.kernels.gradient(
        tile, call.target[s], lse, logps, entropy, g, rows.w_entropy, call.transform, out=out, **call.options(s)
    )


@one_pass.register_fake
def _(hidden, weight, bias, lora_a, lora_b, rows, target, temperature, w_policy, advantages, old, ref, w_kl, w_entropy, live,
      kind, terms, bias_correction, scalars, needs, budget, backend, group, sizes):  # fmt: skip
    logps = hidden.new_empty(rows.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return logps, torch.empty_like(logps), *_fake_gradients(hidden, weight, bias, lora_a, lora_b, needs)


@torch.library.custom_op("grpo_kernels::score", mutates_args=())
@_without_autocast
def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    stash_rows: int,
    live: int,
    scalars: Sequence[float],
    needs: Sequence[bool],
    budget: int,
    backend: str,
    wanted: Sequence[bool],
    group: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps [N], entropy [N], lse [N], stash [stash_rows, >= V], diagnostics [N, 3], or [0, 3] where none are ``wanted``).

    The stash holds softmax(z) in the inputs' dtype.
    """
    the_plan, shard = plan_call(live, rows.shape[0] - live, weight, needs, budget, backend, sizes), shard_named(group, sizes)
    call = _Call(hidden, weight, bias, lora_a, lora_b, rows, target, temperature, live, scalars, backend, shard, wanted)
    vocab = weight.shape[0]
    call.score(stash_rows, rows.shape[0], the_plan)
    stash = _tile(stash_rows, vocab, hidden, hidden.dtype, whole=True)
    if stash_rows:
        _stash_tiles(call, stash[:, :vocab], the_plan)
    return call.logps, call.entropy, call.lse, stash, call.diagnostics


def _stash_tiles(call, stash, the_plan):
    """The softmax of the first rows, through a tile of logits unless they are as wide as the probabilities."""
    in_place = call.tile_dtype == stash.dtype
    height = min(stash.shape[0], the_plan.stash_tile_rows)
    buffer = None if in_place else _tile(height, stash.shape[1], call.hidden, call.tile_dtype)
    for start, end in blocks(stash.shape[0], height):
        s = slice(start, end)
        tile = stash[s] if in_place else buffer[: end - start]
        h, t, _ = call.gather(start, end)
        stats = new_statistics(end - start, call.accumulate, stash.device)
        call.head.tile(h, t, the_plan.columns, out=tile)
        diagnostics = call.diagnose(s)
        if diagnostics is not None:
            diagnostics.add(tile, 0, **call.options(s))
        out = None if in_place else stash[s]
        if call.shard is not None:  # the softmax is over all ranks' columns: fold this tile into what the others have
            call.kernels.statistics(tile, stats, call.target[s], call.transform, **call.options(s))
            whole, others = call.shard.statistics(stats)
            stats = new_statistics(end - start, call.accumulate, stash.device) if others is None else others
        call.kernels.statistics(tile, stats, call.target[s], call.transform, probs=True, out=out, **call.options(s))
        call.write(s, stats if call.shard is None else whole, diagnostics)
        del h, t


@score.register_fake
def _(hidden, weight, bias, lora_a, lora_b, rows, target, temperature, stash_rows, live, scalars, needs, budget, backend, wanted,
      group, sizes):  # fmt: skip
    logps = hidden.new_empty(rows.shape[0], dtype=accumulation_dtype(hidden.dtype))
    stash = hidden.new_empty(stash_rows, _padded(weight.shape[0], hidden.element_size()))
    return logps, torch.empty_like(logps), torch.empty_like(logps), stash, logps.new_empty(len(logps) if any(wanted) else 0, 3)


@torch.library.custom_op("grpo_kernels::score_backward", mutates_args=("stash",))
@_without_autocast
def score_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    lse: Tensor,
    stash: Tensor,
    g: Tensor,
    g_entropy: Tensor | None,
    scalars: Sequence[float],
    needs: Sequence[bool],
    budget: int,
    backend: str,
    group: str,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dH, dW, dbias, dA, dB) from the gradients g and g_entropy [N] of logps and entropy; overwrites the stash."""
    vocab, shard = weight.shape[0], shard_named(group, sizes)
    kept = _rows_with_gradient(g, g_entropy, shard)
    stashed = kept if kept is None else kept[kept < stash.shape[0]]
    stash = _compacted(stash[:, :vocab], stashed)
    k = stash.shape[0]
    vectors = [target, temperature, logps, entropy, lse, g, g_entropy]
    if kept is not None:
        rows, *vectors = [None if x is None else x[kept] for x in (rows, *vectors)]
    target, temperature, logps, entropy, lse, g, g_entropy = vectors
    n = rows.shape[0]

    the_plan = plan_call(n, 0, weight, needs, budget, backend, sizes, mixed=0 < k < n)
    columns = the_plan.columns if n == k else the_plan.recompute_columns
    call = _Call(hidden, weight, bias, lora_a, lora_b, rows, target, temperature, n, scalars, backend, shard)
    spans = [blocks_from(k + start, k + end, the_plan.recompute_rows) for start, end in blocks(n - k, the_plan.stripe_rows)]
    stripes = [[(0, k)] * (k > 0) + spans[0], *spans[1:]] if spans else [[(0, k)]]
    grads = Gradients(hidden, call.head, needs, sum(map(len, stripes)), columns, call.all_live, len(stripes) == 1, shard)
    height = max((end - start for stripe in spans for start, end in stripe), default=0)
    buffer = empty(height * _stride(min(columns, vocab), hidden), like=hidden, dtype=call.tile_dtype)
    for stripe in stripes:
        first = max(stripe[0][0], k)
        dh, db = _recomputed_sums(call, stripe[-1][1] - first, needs)
        for start, end in blocks(vocab, columns):
            for span in stripe:
                (h, t, _), s, from_probs = call.gather(*span), slice(*span), span[1] <= k
                if from_probs:
                    tile, out = stash[:, start:end], None
                else:
                    tile = _block(buffer, h.shape[0], end - start, hidden)
                    call.head.logits(h, t, start, end, tile)
                    out = _over(tile, hidden.dtype)
                call.kernels.gradient(
                    tile, target[s] - start, lse[s], logps[s], entropy[s], g[s], None if g_entropy is None else g_entropy[s],
                    call.transform, from_probs=from_probs, out=out, **call.options(s, slice(start, end)),
                )  # fmt: skip
                dz = _operand(tile, out)
                grads.add_block(dz, start, end, h, t)
                if not from_probs:
                    where = slice(span[0] - first, span[1] - first)
                    _add_product(dh, where, dz, weight[start:end])
                    _add_product(db, where, dz, None if lora_b is None else lora_b[start:end])
            grads.close_block(start, end)
        for span in stripe:
            h, _, where = call.gather(*span)
            if span[1] <= k:
                grads.add_hidden(stash, h, where)
            else:
                s = slice(span[0] - first, span[1] - first)
                grads.add_recomputed(None if dh is None else dh[s], None if db is None else db[s], h, where)
    return grads.finish(hidden)


@score_backward.register_fake
def _(hidden, weight, bias, lora_a, lora_b, rows, target, temperature, logps, entropy, lse, stash, g, g_entropy, scalars, needs,
      budget, backend, group, sizes):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, lora_a, lora_b, needs)


class _NoColumns:
    """The row kernels of a rank that holds no row of the vocabulary: nothing to do."""

    statistics = gradient = staticmethod(lambda *args, **options: None)


class _Call:
    """What the three ops share: the head, the row kernels, the outputs per row, and the gathering of rows."""

    def __init__(self, hidden, weight, bias, lora_a, lora_b, rows, target, temperature, live, scalars, backend,
                 shard=None, wanted=(False,) * 3):  # fmt: skip
        self.shard = shard
        self.accumulate = accumulation_dtype(hidden.dtype)
        self.hidden, self.rows, self.target, self.temperature = hidden, rows, target, temperature
        bias = None if bias is None else bias.to(self.accumulate).contiguous()
        self.head = Head(weight, bias, lora_a, lora_b, scalars[0])
        self.transform = LogitTransform(scalars[1], scalars[2] or None, scalars[3])
        self.kernels = backends.kernels(backend) if weight.shape[0] else _NoColumns
        self.tile_dtype = tile_dtype(weight, backend)
        n = rows.shape[0]
        self.all_live = live == n == hidden.shape[0]
        # with every row of hidden kept, rows is in order unless the live ones had to be moved to the front
        self.in_order = n == hidden.shape[0] and live in (0, n)
        self.logps, self.entropy, self.lse = (
            torch.empty(n, dtype=self.accumulate, device=hidden.device) for _ in range(3)
        )
        self.wanted = wanted
        self.diagnostics = self.logps.new_empty(n if any(wanted) else 0, 3)

    def gather(self, start, end):
        """(h [R, D], t = h A^T or None, where): the rows [start, end) of ``rows``, and their place in hidden."""
        where = slice(start, end) if self.in_order else self.rows[start:end]
        h = self.hidden[where]
        return h, self.head.adapted(h), where

    def options(self, s, columns=slice(None)):
        bias = None if self.head.bias is None else self.head.bias[columns]
        return {"bias": bias, "temperature": None if self.temperature is None else self.temperature[s]}

    def score(self, first, last, the_plan):
        """Statistics of the rows [first, last), a block of columns at a time, in one small buffer."""
        if first == last:
            return
        vocab = self.head.weight.shape[0]
        height = min(the_plan.score_rows, last - first)
        buffer = empty(height * _stride(min(the_plan.score_columns, vocab), self.hidden), like=self.hidden, dtype=self.tile_dtype)
        for start, end in blocks(last - first, height):
            s = slice(start + first, end + first)
            h, t, _ = self.gather(s.start, s.stop)
            stats, diagnostics = new_statistics(h.shape[0], self.accumulate, h.device), self.diagnose(s)
            for left, right in blocks(vocab, the_plan.score_columns):
                tile = _block(buffer, h.shape[0], right - left, self.hidden)
                self.head.logits(h, t, left, right, tile)
                options = self.options(s, slice(left, right))
                if diagnostics is not None:
                    diagnostics.add(tile, left, **options)
                self.kernels.statistics(tile, stats, self.target[s] - left, self.transform, **options)
            if self.shard is not None:
                stats, _ = self.shard.statistics(stats)
            self.write(s, stats, diagnostics)

    def diagnose(self, s):
        """`Diagnostics` of some rows, or None where none are wanted."""
        if not any(self.wanted):
            return None
        return Diagnostics(self.wanted, self.target[s], self.kernels, self.transform, self.accumulate, self.head.weight.shape[0])

    def write(self, s, stats, diagnostics):
        self.logps[s], self.lse[s], self.entropy[s] = finalize(stats)
        if diagnostics is not None:
            self.diagnostics[s] = diagnostics.finish(self.lse[s])


def _padded(vocab, element_size):
    """Row stride in elements: a multiple of 128 bytes, since an odd stride puts the products off their fast path."""
    unit = _ROW_ALIGNMENT // element_size
    return -(-vocab // unit) * unit


def _tile(rows, vocab, like, dtype, whole=False):
    tile = tile_memory.take(rows, _padded(vocab, dtype.itemsize), like, dtype)
    if tile.device.type == "cpu":
        # oneDNN's bf16 product on AMX reads up to 32 columns past the last one, times 0: NaN there would come through
        tile[:, vocab:] = 0
    return tile if whole else tile[:, :vocab]


def _stride(columns, like):
    """Row stride of a block's tile: rows without gaps on the CPU, whose products read past the end of a row."""
    return columns if like.device.type == "cpu" else _padded(columns, 4)


def _block(buffer, rows, columns, like):
    """[rows, columns] at the front of a buffer."""
    stride = _stride(columns, like)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


def _over(tile, dtype):
    """The memory of a tile seen in a narrower dtype, rows on rows; None if the tile has that dtype already."""
    return None if tile.dtype == dtype else tile.view(dtype)[:, : tile.shape[1]]


def _operand(tile, out):
    """The gradient as products can take it. On the CPU they would read the logits behind an overlaid row, see `_tile`."""
    if out is None:
        return tile
    return out.contiguous() if out.device.type == "cpu" else out


def _rows_with_gradient(g, g_entropy, shard):
    """Indices of rows whose gradient is not zero (NaN counts as not zero), on any rank, or None if that is all of them."""
    if not host_may_wait(g):
        return None
    wanted = g != 0
    if g_entropy is not None:
        wanted = wanted | (g_entropy != 0)
    if shard is not None:
        wanted = shard.any(wanted)
    kept = wanted.nonzero().squeeze(1)
    return None if kept.shape[0] == g.shape[0] else kept


def _compacted(stash, kept):
    """The kept rows of the stash moved to its front, in place."""
    if kept is None or kept.shape[0] == stash.shape[0]:
        return stash
    # a row's source never lies before it, so a block that was moved is never read again
    for start, end in blocks(kept.shape[0], 1 if stash.device.type == "cpu" else _COMPACTED_ROWS):
        stash[start:end] = stash[kept[start:end]]
    return stash[: kept.shape[0]]


def _recomputed_sums(call, rows, needs):
    """Float32 sums of dz W [R, D] and dz B [R, r] over the blocks of the vocabulary, where they are wanted."""
    zeros = lambda width: call.hidden.new_zeros(rows, width, dtype=call.accumulate)  # noqa: E731
    dh = zeros(call.hidden.shape[1]) if needs[0] and rows else None
    adapted = call.head.lora_a is not None and (needs[0] or needs[3]) and rows
    return dh, zeros(call.head.lora_a.shape[0]) if adapted else None


def _add_product(total, where, dz, factor):
    if total is None or factor is None:
        return
    if factor.dtype == total.dtype or float32_products(dz.device, dz.dtype):
        multiply(dz, factor, total[where], add=True)
    else:
        total[where] += dz @ factor


def _fake_gradients(hidden, weight, bias, lora_a, lora_b, needs):
    accumulate = accumulation_dtype(hidden.dtype)
    done = []
    for tensor, needed in zip((hidden, weight, bias, lora_a, lora_b), needs, strict=True):
        dtype = accumulate if tensor is bias else hidden.dtype
        done.append(torch.empty(tensor.shape if needed else 0, dtype=dtype, device=hidden.device))
    return tuple(done)
