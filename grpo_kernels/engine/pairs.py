"""Logits of single pairs (row of hidden, vocabulary id) instead of whole rows of logits, and their gradients.

    logits    z_j = h W_v (+ adapter, + bias) of each pair j = (row, v)                D multiplications and e D bytes of W a pair
    scores    log-probs, lse and entropy of a row over its range of pairs, by the row kernels
    backward  dz of a range in place of z; dH = sum over a row's pairs of dz_j W_v; dW_v = sum over an id's pairs of dz_j h

z is float32 (float64 for float64) whatever the inputs are: M numbers, so that nothing is ever computed again. dH and dW are one
kernel: the second with rows and ids exchanged, over pairs sorted by id. Nothing here waits for the device but the compaction for
a shard, and plain PyTorch's kernels.

`with_pair_logits` also hands hidden and head through: what the dense side of the same call sends back to them arrives in its
backward, which adds the pairs' part in place. So a call that has both sides has one dW.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .. import backends
from ..backends.comparison import Compared, compare, merged_comparisons, new_comparison
from ..backends.statistics import Pairs, Scored, Tile, new_statistics
from .diagnostics import merged as merged_moments
from .diagnostics import new_moments, variance_of, with_tile
from .operands import Head, Teacher, Work
from .ops import differentiable_once
from .products import accumulation_dtype, blocks, tile_dtype, zeros

_ROWS = 1024  # whose dH stands apart in float32, beside an adapter or in a shard


@dataclass(frozen=True)
class PairRows:
    """The rows of a call that are computed over their pairs, those that need a gradient in front."""

    index: torch.Tensor  # [R] int64, of a row in hidden
    live: int
    ids: torch.Tensor  # [M] int64, relative to this rank's first row of the vocabulary
    ranges: torch.Tensor  # [R, 2] int64: row r has the pairs [first, last)
    row_of: torch.Tensor  # [M] int64, the row in hidden of a pair
    target: torch.Tensor | None = None  # [R] int64, relative to first; outside of the range where this rank does not have it
    temperature: torch.Tensor | None = None  # [R] acc
    single: torch.Tensor | None = None  # [R] bool: rows whose range is empty since they have one token; None: there are none

    @staticmethod
    def rectangular(ids, index, live):
        """Rows ``index`` of hidden with as many ids each, [R, K]; an id outside of the vocabulary is no pair."""
        starts = torch.arange(len(index) + 1, device=ids.device) * ids.shape[1]
        ranges = torch.stack([starts[:-1], starts[1:]], 1)
        return PairRows(index, live, ids.reshape(-1), ranges, index.repeat_interleave(ids.shape[1]))

    @property
    def trained(self):
        """The live rows."""
        return replace(self, index=self.index[: self.live], ranges=self.ranges[: self.live])

    def of_shard(self, vocab):
        """The pairs whose id is in this rank's part of the vocabulary; ranges shrink, none goes."""
        here = (self.ids >= 0) & (self.ids < vocab)
        before = torch.nn.functional.pad(here.cumsum(0), (1, 0))
        ranges, target = before[self.ranges], self.target
        if target is not None:
            # where the target is not here, what would be its place is another's: behind the end
            at = (self.ranges[:, 0] + target).clamp(max=max(len(here) - 1, 0))
            target = (before[at] - ranges[:, 0]).where(here[at], -1) if len(here) else torch.full_like(target, -1)
        own = here.nonzero().squeeze(1)
        return replace(self, ids=self.ids[own], row_of=self.row_of[own], ranges=ranges, target=target)


class RangeScores(NamedTuple):
    """Of R rows over their ranges, [R] each; None: there are no such rows, or no variance is wanted."""

    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    variance: torch.Tensor | None = None  # of log p
    divergence: torch.Tensor | None = None  # from the teacher


def with_pair_logits(head: Head, hidden, pairs: PairRows, work: Work, as_in_tiles=False):
    """(z [M] raw logits with the bias, differentiable; hidden and head, through which the dense side's gradients come).

    ``as_in_tiles``: rounded where a tile's logits are, so that a probability left by these is that of the others.
    """
    if not any(work.needs):
        return _Side(pairs, work, hidden, head).logits(as_in_tiles), hidden, head
    z, hidden, *tensors = _PairLogits.apply(pairs, work, as_in_tiles, hidden, *head.tensors)
    return z, hidden, Head(*tensors)


def teacher_pair_logits(teacher: Teacher, pairs: PairRows, work: Work):
    """y [M], the teacher's raw logits of the pairs, with its bias."""
    return _Side(pairs, work, teacher.hidden, Head(teacher.weight, teacher.bias)).logits()


def range_logprobs(z, pairs: PairRows, work: Work, y=None):
    """`RangeScores` of the rows over their ranges of z; logps, entropy and, with a teacher's y, divergence differentiable."""
    if y is not None:
        logps, entropy, divergence = _RangeDivergences.apply(pairs, work, z, y)
        return RangeScores(logps, entropy, None, divergence)
    if not any(work.needs):
        _, scored, variance = _scored(pairs, work, z)
        return RangeScores(scored.logps, scored.entropy, variance)
    return RangeScores(*_RangeLogProbs.apply(pairs, work, z))


def _scored(pairs, work, z):
    """(the tile, `Scored`, variance of log p or None) of the rows over their ranges, and over all ranks' parts of these."""
    tile = Tile(z, pairs.target, work.transform, None, pairs.temperature, pairs.ranges)
    stats, moments = new_statistics(len(pairs.index), z.dtype, z.device), None
    kernels, scored = backends.kernels(work.backend), Scored(*torch.empty(3, len(stats), dtype=z.dtype, device=z.device))
    kernels.statistics(tile, stats)
    if work.diagnostics[-1]:
        moments = with_tile(new_moments(len(stats), z.dtype, z.device), tile)
    if work.shard is not None:
        stats = torch.stack(work.shard.gathered(stats), 1)  # merged in rank order, so that all ranks have the same bits
        moments = None if moments is None else functools.reduce(merged_moments, work.shard.gathered(moments))
    kernels.close(stats, scored)
    found = [*scored, None if moments is None else variance_of(moments)]
    if pairs.single is not None:  # nothing was read of them
        found = [None if x is None else x.masked_fill(pairs.single, 0.0) for x in found]
    return tile, Scored(*found[:3]), found[3]


class _PairLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pairs, work, as_in_tiles, hidden, *tensors):
        ctx.pairs, ctx.work = pairs, work
        ctx.set_materialize_grads(False)
        side = _Side(pairs, work, hidden, Head(*tensors))
        z = side.logits(as_in_tiles)
        ctx.save_for_backward(hidden, *tensors)
        through = (hidden, *tensors)
        ctx.mark_non_differentiable(*(x for x, needed in zip(through, work.needs, strict=True) if x is not None and not needed))
        return z, *through

    @staticmethod
    @differentiable_once
    def backward(ctx, dz, *incoming):
        hidden, *tensors = ctx.saved_tensors
        found = list(incoming)
        if dz is not None:
            found = _Side(ctx.pairs, ctx.work, hidden, Head(*tensors)).gradients(dz.contiguous(), found)
        return None, None, None, *(x if needed else None for x, needed in zip(found, ctx.work.needs, strict=True))


class _Side:
    """One call of the pair kernels over the operands of a head."""

    def __init__(self, pairs, work, hidden, head):
        self.pairs, self.work, self.hidden, self.head = pairs, work, hidden, head
        self.kernels = backends.kernels(work.backend)
        self.accumulate = accumulation_dtype(hidden.dtype)
        self.adapts = head.lora_a is not None and len(head.lora_a) > 0  # the kernels want a column

    def logits(self, as_in_tiles=False):
        pairs, head = self.pairs, self.head
        z = torch.empty(pairs.ids.shape, dtype=self.accumulate, device=pairs.ids.device)
        stored = tile_dtype(head.weight, self.work.backend) if as_in_tiles else z.dtype
        with self._precise():
            ids, weight, bias = _rows_of(head.weight, pairs.ids, head.bias)
            bias = None if bias is None else bias.to(self.accumulate).contiguous()
            of_pairs = Pairs(ids, pairs.ranges, pairs.index)
            self.kernels.pair_logits(of_pairs, self.hidden, weight, z, bias=bias if stored == z.dtype else None)
            z = z.to(stored).to(z.dtype)
            if self.adapts:
                b_ids, b, _ = _rows_of(head.lora_b, pairs.ids)
                by_row = Pairs(b_ids, pairs.ranges, pairs.index)
                self.kernels.pair_logits(by_row, self._adapted(), b, z, scale=self.work.lora_scale, add=True)
                z = z.to(stored).to(z.dtype)
            if stored != z.dtype and bias is not None:  # which a row kernel adds to what it reads
                z += bias[ids.clamp(min=0)]
        return z

    def _precise(self):
        return torch.autocast(self.hidden.device.type, enabled=False)

    def _adapted(self):
        """t = h A^T [N, r], 0 in the other rows of hidden."""
        t = self.hidden[self.pairs.index] @ self.head.lora_a.T
        return t.new_zeros(self.hidden.shape[0], t.shape[1]).index_copy_(0, self.pairs.index, t)

    def gradients(self, dz, found):
        """``found``: (dH, dW, dbias, dA, dB) as far as they are known, or None; the pairs' part is added in place."""
        with self._precise():
            return self._gradients(dz, *found)

    def _gradients(self, dz, dh, dw, dbias, da, db):
        needs_hidden, needs_weight, needs_bias, needs_a, needs_b = self.work.needs
        pairs, head = self.pairs.trained, self.head
        t = self._adapted() if needs_b and self.adapts else None
        if needs_hidden or needs_a:
            dh, da = self._of_rows(pairs, dz, dh, da)
        if needs_weight or needs_bias or needs_b:
            by_id, g = _by_id(pairs, dz, self.hidden.shape[0], head.weight.shape[0])
            dw = self._of_ids(by_id, g, self.hidden, head.weight, dw, 1.0) if needs_weight else dw
            db = self._of_ids(by_id, g, t, head.lora_b, db, self.work.lora_scale) if needs_b else db
            if needs_bias:
                one = dz.new_ones(self.hidden.shape[0], 1)
                total = dz.new_zeros(len(head.bias), 1)
                self.kernels.pair_sums(by_id, g, one, total)
                total = total.squeeze(1).to(head.bias.dtype)
                dbias = total if dbias is None else dbias.add_(total)
        return dh, dw, dbias, da, db

    def _of_ids(self, by_id, g, source, like, found, scale):
        out = zeros(like) if found is None else found
        if source is not None:
            self.kernels.pair_sums(by_id, g, source, out, scale=scale, add=found is not None)
        return out

    def _of_rows(self, pairs, dz, dh, da):
        """(dH, dA)"""
        head, hidden, shard = self.head, self.hidden, self.work.shard
        needs_hidden, needs_a = self.work.needs[0], self.work.needs[3]
        add = dh is not None
        dh = torch.zeros_like(hidden) if needs_hidden and not add else dh
        ids, weight, _ = _rows_of(head.weight, pairs.ids)
        if needs_hidden and shard is None and not self.adapts and not needs_a:
            self.kernels.pair_sums(Pairs(ids, pairs.ranges, pairs.index), dz, weight, dh, add=add)
            return dh, da
        b_ids, b, _ = _rows_of(head.lora_b, pairs.ids) if self.adapts else (None,) * 3
        of_a = None if not needs_a else dz.new_zeros(head.lora_a.shape)
        for start, end in blocks(len(pairs.index), _ROWS):
            index, ranges = pairs.index[start:end], pairs.ranges[start:end]
            own = dz.new_zeros(end - start, hidden.shape[1]) if needs_hidden else None
            if needs_hidden:
                self.kernels.pair_sums(Pairs(ids, ranges), dz, weight, own)
            if self.adapts:
                dt = dz.new_zeros(end - start, head.lora_a.shape[0])
                self.kernels.pair_sums(Pairs(b_ids, ranges), dz, b, dt, scale=self.work.lora_scale)
                if needs_hidden:
                    own.addmm_(dt, head.lora_a.to(dt.dtype))
                if needs_a:
                    of_a.addmm_(dt.T, hidden[index].to(dt.dtype))
            if needs_hidden:
                own = own.to(hidden.dtype)
                if shard is not None:
                    shard.sum_later(own)()
                dh.index_add_(0, index, own)
        if needs_a:
            if shard is not None:
                shard.sum_now(of_a)
            da = of_a.to(head.lora_a.dtype) if da is None else da.add_(of_a.to(da.dtype))
        return dh, da


def _by_id(pairs, dz, rows, vocab):
    """(the pairs sorted by id, each id's as one range; dz in that order). Those of other rows get id ``vocab``, behind the end."""
    place = torch.arange(len(dz), device=dz.device)
    trained = torch.zeros(rows, dtype=torch.bool, device=dz.device).index_fill_(0, pairs.index, True)
    valid = trained[pairs.row_of] & (pairs.ids >= 0) & (pairs.ids < vocab)
    ids, order = pairs.ids.where(valid, vocab).sort(stable=True)
    begins = ids != torch.nn.functional.pad(ids, (1, 0), value=-1)[:-1]
    last = torch.searchsorted(ids, ids, right=True)
    ranges = torch.stack([place, last.where(begins, place)], 1)
    return Pairs(pairs.row_of[order], ranges, ids), dz[order]


class _RangeLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pairs, work, z):
        tile, scored, variance = _scored(pairs, work, z)
        ctx.tile, ctx.kernels = tile, backends.kernels(work.backend)
        ctx.save_for_backward(z, *scored)
        ctx.set_materialize_grads(False)
        if variance is not None:
            ctx.mark_non_differentiable(variance)
        return scored.logps, scored.entropy, variance

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_entropy, _):
        z, *scored = ctx.saved_tensors
        if g is None and g_entropy is None:
            return None, None, None
        g = torch.zeros_like(scored[0]) if g is None else g.contiguous()
        g_entropy = None if g_entropy is None else g_entropy.contiguous()
        dz = z.clone()
        ctx.kernels.gradient(replace(ctx.tile, values=dz), dz, Scored(*scored), g, g_entropy)
        return None, None, dz


class _RangeDivergences(torch.autograd.Function):
    """As `_RangeLogProbs`, and the KL of the rows from a teacher over the same ranges."""

    @staticmethod
    def forward(ctx, pairs, work, z, y):
        kernels, kind = backends.kernels(work.backend), work.divergence.kind
        tile = Tile(z, pairs.target, work.transform, None, pairs.temperature, pairs.ranges)
        beside = replace(tile, values=y, transform=work.teacher_transform)
        stats = new_comparison(len(pairs.index), z.dtype, z.device)
        kernels.divergence_statistics(tile, beside, stats, kind)
        if work.shard is not None:
            stats = functools.reduce(functools.partial(merged_comparisons, kind=kind), work.shard.gathered(stats))
        scored, compared = compare(stats, kind)
        if pairs.single is not None:  # nothing was read of them
            scored, compared = (type(some)(*(x.masked_fill(pairs.single, 0.0) for x in some)) for some in (scored, compared))
        ctx.tiles, ctx.kernels, ctx.divergence = (tile, beside), kernels, work.divergence
        ctx.save_for_backward(z, *scored, *compared)
        ctx.set_materialize_grads(False)
        return scored.logps, scored.entropy, compared.value

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_entropy, g_divergence):
        z, *vectors = ctx.saved_tensors
        g, g_entropy, g_divergence = (None if x is None else x.contiguous() for x in (g, g_entropy, g_divergence))
        if g is None and g_entropy is None and g_divergence is None:
            return (None,) * 4
        g_divergence = torch.zeros_like(vectors[0]) if g_divergence is None else g_divergence
        (tile, beside), dz = ctx.tiles, z.clone()
        ctx.kernels.divergence_gradient(replace(tile, values=dz), beside, dz, Scored(*vectors[:3]), Compared(*vectors[3:]),
                                        g_divergence, ctx.divergence, g, g_entropy)  # fmt: skip
        return None, None, dz, None


def _rows_of(matrix, ids, beside=None):
    """(ids, the matrix, a vector beside it) as the pair kernels take them: of one that they cannot, only the rows that ids name."""
    rows, columns = matrix.shape
    if (matrix.stride(1) == 1 or columns <= 1) and (matrix.stride(0) >= columns or rows <= 1):
        return ids, matrix, beside
    known = (ids >= 0) & (ids < rows)
    named = ids.where(known, 0)
    place = torch.arange(len(ids), device=ids.device).where(known, -1)
    return place, matrix[named].contiguous(), None if beside is None else beside[named]
