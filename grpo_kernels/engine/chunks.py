"""The loops: scoring, one pass, and the two phases with their stash.

    score             vocabulary outermost: z of some rows and columns = h W^T, statistics                              2NVD
    one_pass          a chunk of r rows at a time: z, row kernel -> dz into a buffer of R rows; then dH = dz W, dW += dz^T h   6NVD
    score with stash  a chunk at a time: z, statistics; z stays in the stash                                            2NVD
    backward          stashed rows: dz from z in place, dH and dW                                                       4NVD
                      recomputed rows: vocabulary outermost; z, dz, dH += dz W, dW of a block written once              6NVD

`plan.py` chooses the heights. Where products write float32 (``wide``: a GPU's, of 16-bit inputs) a chunk is float32 and the buffer
other memory in the inputs' dtype; elsewhere r = R and the chunk is the buffer. A wide stash holds onehot - p, times the
softcap's slope, rounded once: all else of dz is a factor a row, and needs no pass over the stash. An entropy's gradient cannot be
had from it: p (log p + entropy) cancels on flat rows, and what is left is the rounding of p. Nothing here synchronises.

Beside a `Teacher` each tile of the student's logits has one of the teacher's, 2NVD' more wherever logits are made, and the row
kernels over two tiles take the place of the others. The stash is then u = d divergence / d raw logits, everywhere: dz is g u.
"""

import contextlib
import functools
from typing import NamedTuple

import torch

from .. import backends
from ..backends.comparison import Compared, compare, merged_comparisons, mixed, new_comparison
from ..backends.pytorch import target_gradient
from ..backends.statistics import TILE_COLUMNS, Scored, Tile, new_statistics, tiles_of
from ..losses.terms import PolicyRows, kernel_terms, row_coefficient
from .accumulate import Gradients
from .diagnostics import Diagnostics
from .fixed_order import fixed_logits, fixed_products
from .operands import Head, Rows, Teacher, problem_of
from .plan import plan
from .products import (
    accumulation_dtype,
    adapted,
    blocks,
    blocks_from,
    empty,
    multiply,
    tile_dtype,
    tile_memory,
    write_logits,
)

_ROW_ALIGNMENT = 128


class _Statistics(NamedTuple):
    """Running ones of rows: of the student's columns (`statistics.new_statistics`), and of both heads' (`new_comparison`)."""

    own: torch.Tensor | None
    both: torch.Tensor | None


class _NoColumns:
    """The row kernels of a rank that holds no row of the vocabulary: nothing to do but for what all ranks know."""

    statistics = gradient = staticmethod(lambda *args, **options: None)
    divergence_statistics = jensen_shannon = divergence_gradient = statistics

    def __init__(self, kernels):
        self.close = kernels.close


class Run:
    """One op at work: its operands, its plan, and the steps that the loops share."""

    def __init__(self, hidden, head, rows, live, work, two_phases=False, backward=False, teacher=()):
        self.work, self.accumulate = work, accumulation_dtype(hidden.dtype)
        weight, bias, *lora = head
        self.head = Head(weight, None if bias is None else bias.to(self.accumulate).contiguous(), *lora)
        self.rows = Rows.of(hidden, rows, live)
        kernels = backends.kernels(self.work.backend)
        self.kernels = kernels if weight.shape[0] else _NoColumns(kernels)
        self.fixed = fixed_products(self.work.batch_invariant, hidden)
        self.fixed_logits = fixed_logits(self.work.batch_invariant, hidden)
        self.tile_dtype = tile_dtype(weight, self.work.backend)
        self.wide = self.tile_dtype != hidden.dtype
        n = self.rows.index.shape[0]
        # with every row of hidden kept, the index is in order unless the live ones were moved to the front; a backward cannot tell
        self.in_order = n == hidden.shape[0] and live in (0, n) and not backward
        self.all_live = self.in_order and live == n
        self.plan = plan(problem_of(weight, self.work, live, n - live, two_phases, teacher))
        self.teacher, compared = None, 0
        if teacher:
            *both, bias = teacher
            self.teacher, compared = Teacher(*both, None if bias is None else bias.to(self.accumulate).contiguous()), n
        self.compared = Compared(*(torch.empty(compared, dtype=self.accumulate, device=hidden.device) for _ in range(3)))
        self.scored = Scored(*(torch.empty(n, dtype=self.accumulate, device=hidden.device) for _ in range(3)))
        self.diagnostics = self.scored.logps.new_empty(n if any(self.work.diagnostics) else 0, len(self.work.diagnostics))
        self.squared = self.scored.logps.new_empty(n) if self.work.needs_squares else None

    def gather(self, start, end):
        """(h [R, D], t = h A^T or None, where in hidden they are): the rows [start, end) of the index."""
        where = slice(start, end) if self.in_order else self.rows.index[start:end]
        h = self.rows.hidden[where]
        return h, None if self.head.lora_a is None else adapted(h, self.head.lora_a, self.fixed_logits), where

    def tile(self, values, start, left=0):
        """`Tile` of raw logits whose first row is the index's ``start`` and whose first column the vocabulary's ``left``."""
        s, columns = slice(start, start + values.shape[0]), slice(left, left + values.shape[1])
        target, temperature, bias = self.rows.target[s], self.rows.temperature, self.head.bias
        return Tile(values, target - left if left else target, self.work.transform, None if bias is None else bias[columns],
                    None if temperature is None else temperature[s])  # fmt: skip

    def beside(self, values, start, left=0):
        """`Tile` of the teacher's raw logits beside that of `tile`."""
        s, columns = slice(start, start + values.shape[0]), slice(left, left + values.shape[1])
        bias, temperature = self.teacher.bias, self.rows.temperature
        return Tile(values, self.rows.target[s], self.work.teacher_transform, None if bias is None else bias[columns],
                    None if temperature is None else temperature[s])  # fmt: skip

    def slope(self, s):
        """d z / d raw logits but for a softcap's part: a number, or one a row."""
        transform, temperature = self.work.transform, self.rows.temperature
        return transform.logit_scale / (transform.temperature if temperature is None else temperature[s])

    def multiply(self, a, b, out, **options):
        """As `products.multiply`."""
        multiply(a, b, out, fixed=self.fixed, **options)

    def product(self, a, b, dtype=None):
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype or a.dtype, device=a.device)
        self.multiply(a, b, out)
        return out

    def logits(self, h, t, values, left=0):
        """values [R, C] = the raw logits of C columns from ``left`` on, without the bias."""
        columns = slice(left, left + values.shape[1])
        b = None if t is None else self.head.lora_b[columns]
        write_logits(h, self.head.weight[columns], values, t, b, self.work.lora_scale, self.fixed_logits)

    def teacher_logits(self, where, values, left=0):
        """values [R, C] = the teacher's raw logits of some rows and C columns, without the bias."""
        h, weight = self.teacher.hidden[where], self.teacher.weight[left : left + values.shape[1]]
        for start, end in blocks(len(weight), self.plan.columns):
            part = values[:, start:end]
            if h.dtype == values.dtype or tile_dtype(h, self.work.backend) == values.dtype:
                write_logits(h, weight[start:end], part, fixed=fixed_logits(self.work.batch_invariant, h))
            else:
                part.copy_(h @ weight[start:end].T)

    def new_statistics(self, rows):
        """Of all columns; in a shard of each fixed tile, so that the ranks' are merged as one process would."""
        dtype, device, shard = self.accumulate, self.rows.hidden.device, self.work.shard
        own = both = None
        if self.teacher is None or self.work.own_statistics or self.squared is not None:
            parts = None if shard is None else max(1, tiles_of(shard.widest))
            own = new_statistics(rows, dtype, device, parts, self.squared is not None)
        if self.teacher is not None:
            both = new_comparison(rows, dtype, device)
        return _Statistics(own, both)

    def fold(self, tile, teacher, stats, left=0):
        """The statistics of a tile whose first column is the vocabulary's ``left``, and of that beside it."""
        own, both = stats
        if both is not None:
            self.kernels.divergence_statistics(tile, teacher, both, self.work.divergence.kind)
        if own is None:
            return
        if own.dim() == 3:
            first = left // TILE_COLUMNS
            part = own[:, first : first + tiles_of(tile.values.shape[1])].contiguous()
            self.kernels.statistics(tile, part)
            own[:, first : first + part.shape[1]] = part
        else:
            self.kernels.statistics(tile, own)

    def score_tile(self, tile, s, teacher=None):
        """(`Scored`, `Compared` or None) of whole rows, over all ranks' columns."""
        stats = self.new_statistics(tile.values.shape[0])
        self.fold(tile, teacher, stats)
        return self.close(stats, s, tile, teacher)

    def close(self, stats, s, tile=None, teacher=None):
        """The rows' statistics as what is known of them, written down at ``s``; of jsd by another walk over the whole rows."""
        shard, divergence, (own, both) = self.work.shard, self.work.divergence, stats
        scored = self.some(self.scored, s.start, s.stop)
        if own is not None:
            own = own if shard is None else torch.cat(shard.gathered(own), 1)
            self.kernels.close(own, scored, None if self.squared is None else self.squared[s])
        if both is None:
            return scored, None
        if shard is not None:  # in rank order, so that all ranks have the same bits
            both = functools.reduce(functools.partial(merged_comparisons, kind=divergence.kind), shard.gathered(both))
        found, compared = compare(both, divergence.kind)
        if own is None:
            self._write_down(scored, found)
        if divergence.kind == "jsd":
            sums = torch.zeros(len(both), 2, dtype=both.dtype, device=both.device)
            self.kernels.jensen_shannon(tile, teacher, scored, compared.gap, sums, divergence.beta)
            sums = sums if shard is None else functools.reduce(torch.add, shard.gathered(sums))
            compared = mixed(both, scored, compared, sums, divergence.beta)
        self._write_down(self.some(self.compared, s.start, s.stop), compared)
        return scored, compared

    def _write_down(self, vectors, found):
        for vector, value in zip(vectors, found, strict=True):
            vector.copy_(value)

    def some(self, vectors, start, end):
        """Their rows [start, end)."""
        return type(vectors)(*(x if x is None else x[start:end] for x in vectors))


def score(run, first, last):
    """Statistics of the rows [first, last), a block of columns at a time, in one small buffer."""
    heights, vocab = run.plan, run.head.weight.shape[0]
    if first == last:
        return
    size = min(heights.score_rows, last - first) * _stride(min(heights.score_columns, vocab), run)
    buffer, beside = (empty(size, like=run.rows.hidden, dtype=run.tile_dtype) if wanted else None
                      for wanted in (True, run.teacher is not None))  # fmt: skip
    mixes = run.teacher is not None and run.work.divergence.kind == "jsd"
    for group, end_of_group in blocks_from(first, last, heights.score_group):
        h, t, where = run.gather(group, end_of_group)
        stats = run.new_statistics(h.shape[0])
        wanted = Diagnostics(run, run.rows.target[group:end_of_group]) if any(run.work.diagnostics) else None
        for left, right in [(0, vocab)] if mixes else blocks(vocab, heights.score_columns):
            for start, end in blocks(h.shape[0], heights.score_rows):
                values = _block(buffer, end - start, right - left, run)
                # beside a teacher's in the same blocks: of equal heads products of other shapes would differ in their last bits
                for a, b in blocks(right - left, heights.columns if beside is not None else right - left):
                    run.logits(h[start:end], None if t is None else t[start:end], values[:, a:b], left + a)
                tile, teacher = run.tile(values, group + start, left), None
                if beside is not None:
                    values = _block(beside, end - start, right - left, run)
                    run.teacher_logits(_rows_in(where, start, end), values, left)
                    teacher = run.beside(values, group + start, left)
                if wanted is not None:
                    wanted.add(tile, slice(start, end), left)
                if mixes:
                    run.score_tile(tile, slice(group + start, group + end), teacher)
                else:
                    run.fold(tile, teacher, run.some(stats, start, end), left)
        found = run.some(run.scored, group, end_of_group)
        if not mixes:
            run.close(stats, slice(group, end_of_group))
        if wanted is not None:
            run.diagnostics[group:end_of_group] = wanted.finish(found, slice(group, end_of_group))


def one_pass(run):
    """Scores all rows and differentiates the live ones; the gradients, finished."""
    live, height = run.rows.live, min(run.plan.buffer_rows, max(run.rows.live, 1))
    # before the buffer, so that it and the small one of scoring are never in memory together
    score(run, live, run.rows.index.shape[0])
    gradients = Gradients(run, -(-live // height))
    if live:
        buffer, beside = tiles_for(run, height)
        chunk = chunk_for(run, height)
        for start, end in blocks(live, height):
            h, t, where = run.gather(start, end)
            _fill(run, buffer, chunk, beside, start, h, t, where, _differentiate)
            gradients.add(buffer[: end - start, : run.head.weight.shape[0]], h, t, where)
            del h, t  # before the next ones are gathered
        tile_memory.give_back(buffer, run.work.budget)
    return gradients.finish()


def score_with_stash(run, stash_rows):
    """Scores all rows; the first ``stash_rows`` leave z behind, or where it is wide ``onehot - p``, which is returned."""
    score(run, stash_rows, run.rows.index.shape[0])
    stash, beside = tiles_for(run, stash_rows)
    if stash_rows:
        h, t, where = run.gather(0, stash_rows)
        _fill(run, stash, chunk_for(run, stash_rows), beside, 0, h, t, where, _leave_stash)
    return stash


def _fill(run, buffer, chunk, beside, first, h, t, where, write):
    """Logits of the rows of h, a chunk at a time, and what ``write(run, tile, teacher, out, s)`` makes of them in the buffer."""
    vocab = run.head.weight.shape[0]
    height = min(len(x) for x in (buffer, chunk, beside) if x is not None)
    for start, end in blocks(h.shape[0], height):
        out = buffer[start:end, :vocab]
        values = out if chunk is None else chunk[: end - start, :vocab]
        for left, right in blocks(vocab, run.plan.columns):  # that stay in a CPU's cache
            run.logits(h[start:end], None if t is None else t[start:end], values[:, left:right], left)
        teacher = None
        if beside is not None:
            logits = beside[: end - start, :vocab]
            run.teacher_logits(_rows_in(where, start, end), logits)
            teacher = run.beside(logits, first + start)
        write(run, run.tile(values, first + start), teacher, out, slice(first + start, first + end))


def _rows_in(where, start, end):
    """Where in hidden the rows [start, end) of a gathered piece are."""
    return slice(where.start + start, where.start + end) if isinstance(where, slice) else where[start:end]


def _differentiate(run, tile, teacher, out, s):
    """The rows' gradient: in one launch where the row kernels know the loss and see the whole row, else in three steps."""
    rows, work = run.rows.policy.of(s), run.work
    if teacher is not None:
        _differentiate_both(run, tile, teacher, out, s, rows)
        return
    terms = kernel_terms(work.config, work.linear)
    if terms is not None and work.shard is None and hasattr(run.kernels, "policy"):
        run.kernels.policy(tile, out, rows, terms, run.some(run.scored, s.start, s.stop))
        return
    found, _ = run.score_tile(tile, s)
    with _autograd_in_an_op():
        g = row_coefficient(found.logps, rows, work.config, work.linear)
    run.kernels.gradient(tile, out, found, g, rows.w_entropy)


def _differentiate_both(run, tile, teacher, out, s, rows):
    work = run.work
    alone = work.config is None and rows.w_policy is None and rows.w_entropy is None
    if alone and work.shard is None and hasattr(run.kernels, "divergence"):
        vectors = run.some(run.scored, s.start, s.stop), run.some(run.compared, s.start, s.stop)
        run.kernels.divergence(tile, teacher, out, rows.w_kl, work.divergence, *vectors)
        return
    found, compared = run.score_tile(tile, s, teacher)
    with _autograd_in_an_op():
        g = None if alone else row_coefficient(found.logps, rows, work.config, work.linear)
    run.kernels.divergence_gradient(tile, teacher, out, found, compared, rows.w_kl, work.divergence, g, rows.w_entropy)


@contextlib.contextmanager
def _autograd_in_an_op():
    """An op runs below autograd, which is excluded from this thread's dispatch: here it is not."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


def _leave_stash(run, tile, teacher, out, s):
    if teacher is not None:
        _differentiate_both(run, tile, teacher, out, s, PolicyRows(None, w_kl=run.scored.lse.new_ones(s.stop - s.start)))
        return
    if any(run.work.diagnostics):
        wanted = Diagnostics(run, tile.target)
        wanted.add(tile, slice(None), 0)
    found, _ = run.score_tile(tile, s)
    if any(run.work.diagnostics):
        run.diagnostics[s] = wanted.finish(found, s)
    if run.wide:
        run.kernels.gradient(tile, out, found, torch.ones_like(found.lse) / run.slope(s))  # a slope in it would round even the 1


def backward(run, scored, compared, stash, *incoming):
    """The gradients from those of logps, entropy, lse and divergence (None where there is none), finished.

    The rows of the stash come first; ``compared`` is None without a teacher.
    """
    k, n, heights = stash.shape[0], run.rows.index.shape[0], run.plan
    stripes = blocks_from(k, n, heights.stripe_rows)
    spans = sum(len(blocks_from(*stripe, heights.recompute_rows)) for stripe in stripes)
    outermost = k == 0 and len(stripes) == 1
    gradients = Gradients(run, (k > 0) + spans, heights.recompute_columns if outermost else None)
    if k:
        _stashed_rows(run, gradients, run.some(scored, 0, k), stash, _some_of(incoming, slice(0, k)))
    for stripe in stripes:
        _recomputed_rows(run, gradients, stripe, scored, compared, incoming)
    return gradients.finish()


def _some_of(incoming, rows):
    return [None if x is None else x[rows] for x in incoming]


def _gradient(run, tile, out, scored, g, g_entropy, g_lse=None):
    """d lse / d z is p, which is onehot - (onehot - p): the kernel's gradient of logps, but for the target's own element."""
    if g_lse is None or not tile.values.shape[1]:
        run.kernels.gradient(tile, out, scored, g, g_entropy)
        return
    column, here, own = target_gradient(tile, scored, g, g_entropy, g_lse)
    run.kernels.gradient(tile, out, scored, g - g_lse, g_entropy)
    out.scatter_(1, column, torch.where(here, own.to(out.dtype), out.gather(1, column)))


def _stashed_rows(run, gradients, scored, stash, incoming):
    *incoming, g_divergence = incoming
    g, *beside = incoming
    factor = None
    if run.teacher is not None:
        assert not any(x is not None for x in incoming)
        factor = g_divergence
    elif run.wide:
        assert not any(x is not None for x in beside)
        factor = g * run.slope(slice(0, len(g)))
    else:
        _gradient(run, run.tile(stash, 0), stash, scored, *incoming)
    gradients.add(stash, *run.gather(0, len(stash)), factor)


def _recomputed_rows(run, gradients, stripe, scored, compared, incoming):
    """A stripe of rows whose float32 dH is summed while the vocabulary passes once, outermost."""
    heights, head, needs, (first, last) = run.plan, run.head, run.work.needs, stripe
    vocab, columns = head.weight.shape[0], min(heights.recompute_columns, max(1, head.weight.shape[0]))
    h, t, where = run.gather(first, last)
    zeros = lambda width: h.new_zeros(last - first, width, dtype=run.accumulate)  # noqa: E731
    dh = zeros(h.shape[1]) if needs[0] else None
    dz_b = zeros(head.lora_a.shape[0]) if gradients.needs_adapter else None
    height, low = min(heights.recompute_rows, last - first), min(heights.recompute_chunk, last - first)
    buffer = empty(height * _stride(columns, run), like=h)
    chunk, beside = (empty(low * _stride(columns, run), like=h, dtype=run.tile_dtype) if wanted else None
                     for wanted in (run.wide, run.teacher is not None))  # fmt: skip
    for left, right in blocks(vocab, columns):
        for start, end in blocks(last - first, height):
            dz = _block(buffer, end - start, right - left, run)
            for a, b in blocks(end - start, height if chunk is None and beside is None else low):
                s = slice(start + a, start + b)
                values = _block(chunk, b - a, right - left, run) if run.wide else dz[a:b]
                run.logits(h[s], None if t is None else t[s], values, left)
                tile = run.tile(values, first + s.start, left)
                rows = slice(first + s.start, first + s.stop)
                found, (*of_scored, g_divergence) = run.some(scored, rows.start, rows.stop), _some_of(incoming, rows)
                if beside is None:
                    _gradient(run, tile, dz[a:b], found, *of_scored)
                    continue
                values = _block(beside, b - a, right - left, run)
                run.teacher_logits(_rows_in(where, s.start, s.stop), values, left)
                run.kernels.divergence_gradient(
                    tile, run.beside(values, rows.start, left), dz[a:b], found, run.some(compared, rows.start, rows.stop),
                    g_divergence, run.work.divergence, *of_scored[:2],
                )  # fmt: skip
            gradients.add_block(dz, left, right, h[start:end], None if t is None else t[start:end])
            for total, factor in ((dh, head.weight), (dz_b, head.lora_b)):
                if total is not None:
                    add_product(run, total[start:end], dz, factor[left:right])
        gradients.close_block(left, right)
    gradients.add_rows(dh, dz_b, h, where)


def add_product(run, total, dz, factor):
    """A float32 sum of products; a library's of 16-bit inputs are rounded before they are added, on a CPU."""
    if run.wide or run.fixed or factor.dtype == total.dtype:
        run.multiply(dz, factor, total, add=True)
    elif dz.dtype == torch.float16:  # whose tiny numbers a product would round away
        total += dz.float() @ factor.float()
    else:
        total += dz @ factor


def padded(vocab, element_size):
    """Row stride in elements: a multiple of 128 bytes, since an odd stride puts the products off their fast path."""
    unit = _ROW_ALIGNMENT // element_size
    return -(-vocab // unit) * unit


def whole_rows(rows, run, dtype=None):
    """Memory for [rows, V] in the inputs' dtype, its rows padded."""
    vocab, hidden = run.head.weight.shape[0], run.rows.hidden
    dtype = hidden.dtype if dtype is None else dtype
    out = tile_memory.take(rows, padded(vocab, dtype.itemsize), hidden, dtype)
    if out.device.type == "cpu":
        # oneDNN's bf16 product on AMX reads up to 32 columns past the last one, times 0: NaN there would come through
        out[:, vocab:] = 0
    return out


def tiles_for(run, rows):
    """(a buffer of so many rows, memory for a chunk of the teacher's logits or None); one piece where both are of one dtype."""
    beside = min(run.plan.chunk_rows, rows) if run.teacher is not None else 0
    if run.wide and beside:
        return whole_rows(rows, run), whole_rows(beside, run, run.tile_dtype)
    memory = whole_rows(rows + beside, run)
    return memory[:rows], memory[rows:] if beside else None


def chunk_for(run, height):
    """Memory for a chunk of logits beside a buffer of so many rows; None where the chunk is the buffer."""
    return whole_rows(min(run.plan.chunk_rows, height), run, run.tile_dtype) if run.wide else None


def _stride(columns, run):
    """Row stride of a block's tile: rows without gaps on the CPU, whose products read past the end of a row."""
    return columns if run.rows.hidden.device.type == "cpu" else padded(columns, 2)


def _block(buffer, rows, columns, run):
    """[rows, columns] at the front of a buffer."""
    stride = _stride(columns, run)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]
