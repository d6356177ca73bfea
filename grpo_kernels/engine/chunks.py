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
"""


import contextlib
import functools

import torch

from .. import backends
from ..backends.pytorch import target_gradient
from ..backends.statistics import Scored, Tile, finalize, merged, new_statistics
from ..losses.terms import kernel_terms, row_coefficient
from .accumulate import Gradients
from .diagnostics import Diagnostics
from .operands import Head, Rows, problem_of
from .plan import plan
from .products import accumulation_dtype, blocks, blocks_from, empty, multiply, tile_dtype, tile_memory

_ROW_ALIGNMENT = 128


class _NoColumns:
    """The row kernels of a rank that holds no row of the vocabulary: nothing to do."""

    statistics = gradient = staticmethod(lambda *args, **options: None)


class Run:
    """One op at work: its operands, its plan, and the steps that the loops share."""

    def __init__(self, hidden, head, rows, live, work, two_phases=False, backward=False):
        self.work, self.accumulate = work, accumulation_dtype(hidden.dtype)
        weight, bias, *lora = head
        self.head = Head(weight, None if bias is None else bias.to(self.accumulate).contiguous(), *lora)
        self.rows = Rows.of(hidden, rows, live)
        self.kernels = backends.kernels(self.work.backend) if weight.shape[0] else _NoColumns
        self.tile_dtype = tile_dtype(weight, self.work.backend)
        self.wide = self.tile_dtype != hidden.dtype
        n = self.rows.index.shape[0]
        # with every row of hidden kept, the index is in order unless the live ones were moved to the front; a backward cannot tell
        self.in_order = n == hidden.shape[0] and live in (0, n) and not backward
        self.all_live = self.in_order and live == n
        self.plan = plan(problem_of(weight, self.work, live, n - live, two_phases))
        self.scored = Scored(*(torch.empty(n, dtype=self.accumulate, device=hidden.device) for _ in range(3)))
        self.diagnostics = self.scored.logps.new_empty(n if any(self.work.diagnostics) else 0, len(self.work.diagnostics))

    def gather(self, start, end):
        """(h [R, D], t = h A^T or None, where in hidden they are): the rows [start, end) of the index."""
        where = slice(start, end) if self.in_order else self.rows.index[start:end]
        h = self.rows.hidden[where]
        return h, None if self.head.lora_a is None else h @ self.head.lora_a.T, where

    def tile(self, values, start, left=0):
        """`Tile` of raw logits whose first row is the index's ``start`` and whose first column the vocabulary's ``left``."""
        s, columns = slice(start, start + values.shape[0]), slice(left, left + values.shape[1])
        target, temperature, bias = self.rows.target[s], self.rows.temperature, self.head.bias
        return Tile(values, target - left if left else target, self.work.transform, None if bias is None else bias[columns],
                    None if temperature is None else temperature[s])  # fmt: skip

    def slope(self, s):
        """d z / d raw logits but for a softcap's part: a number, or one a row."""
        transform, temperature = self.work.transform, self.rows.temperature
        return transform.logit_scale / (transform.temperature if temperature is None else temperature[s])

    def logits(self, h, t, values, left=0):
        """values [R, C] = the raw logits of C columns from ``left`` on, without the bias."""
        columns = slice(left, left + values.shape[1])
        multiply(h, self.head.weight[columns].T, values)
        if t is not None:
            multiply(t, self.head.lora_b[columns].T, values, add=True, alpha=self.work.lora_scale)

    def score_tile(self, tile, s):
        """Log-probs, lse and entropy of whole rows, over all ranks' columns."""
        stats = new_statistics(tile.values.shape[0], self.accumulate, tile.values.device)
        self.kernels.statistics(tile, stats)
        return self.close(stats, s)

    def close(self, stats, s):
        """The rows' statistics as what is known of them, written down at ``s``."""
        if self.work.shard is not None:
            stats = functools.reduce(merged, self.work.shard.gathered(stats))  # in rank order, so that all ranks have the same bits
        found = finalize(stats)
        for vector, value in zip(self.scored, found, strict=True):
            vector[s] = value
        return found

    def some(self, scored, start, end):
        return Scored(*(x[start:end] for x in scored))


def score(run, first, last):
    """Statistics of the rows [first, last), a block of columns at a time, in one small buffer."""
    heights, vocab = run.plan, run.head.weight.shape[0]
    if first == last:
        return
    size = min(heights.score_rows, last - first) * _stride(min(heights.score_columns, vocab), run)
    buffer = empty(size, like=run.rows.hidden, dtype=run.tile_dtype)
    for group, end_of_group in blocks_from(first, last, heights.score_group):
        h, t, _ = run.gather(group, end_of_group)
        stats = new_statistics(h.shape[0], run.accumulate, h.device)
        wanted = Diagnostics(run, run.rows.target[group:end_of_group]) if any(run.work.diagnostics) else None
        for left, right in blocks(vocab, heights.score_columns):
            for start, end in blocks(h.shape[0], heights.score_rows):
                values = _block(buffer, end - start, right - left, run)
                run.logits(h[start:end], None if t is None else t[start:end], values, left)
                tile = run.tile(values, group + start, left)
                if wanted is not None:
                    wanted.add(tile, slice(start, end), left)
                run.kernels.statistics(tile, stats[start:end])
        found = run.close(stats, slice(group, end_of_group))
        if wanted is not None:
            run.diagnostics[group:end_of_group] = wanted.finish(found.lse)


def one_pass(run):
    """Scores all rows and differentiates the live ones; the gradients, finished."""
    live, height = run.rows.live, min(run.plan.buffer_rows, max(run.rows.live, 1))
    # before the buffer, so that it and the small one of scoring are never in memory together
    score(run, live, run.rows.index.shape[0])
    gradients = Gradients(run, -(-live // height))
    if live:
        buffer = whole_rows(height, run)
        chunk = chunk_for(run, height)
        for start, end in blocks(live, height):
            h, t, where = run.gather(start, end)
            _fill(run, buffer, chunk, start, h, t, _differentiate)
            gradients.add(buffer[: end - start, : run.head.weight.shape[0]], h, t, where)
            del h, t  # before the next ones are gathered
        tile_memory.give_back(buffer, run.work.budget)
    return gradients.finish()


def score_with_stash(run, stash_rows):
    """Scores all rows; the first ``stash_rows`` leave z behind, or where it is wide ``onehot - p``, which is returned."""
    score(run, stash_rows, run.rows.index.shape[0])
    stash = whole_rows(stash_rows, run)
    if stash_rows:
        h, t, _ = run.gather(0, stash_rows)
        _fill(run, stash, chunk_for(run, stash_rows), 0, h, t, _leave_stash)
    return stash


def _fill(run, buffer, chunk, first, h, t, write):
    """Logits of the rows of h, a chunk at a time, and what ``write(run, tile, out, s)`` makes of them in the buffer."""
    vocab = run.head.weight.shape[0]
    for start, end in blocks(h.shape[0], buffer.shape[0] if chunk is None else chunk.shape[0]):
        out = buffer[start:end, :vocab]
        values = out if chunk is None else chunk[: end - start, :vocab]
        for left, right in blocks(vocab, run.plan.columns):  # that stay in a CPU's cache
            run.logits(h[start:end], None if t is None else t[start:end], values[:, left:right], left)
        write(run, run.tile(values, first + start), out, slice(first + start, first + end))


def _differentiate(run, tile, out, s):
    """The rows' gradient: in one launch where the row kernels know the loss and see the whole row, else in three steps."""
    rows, work = run.rows.policy.of(s), run.work
    terms = kernel_terms(work.config, work.linear)
    if terms is not None and work.shard is None and hasattr(run.kernels, "policy"):
        run.kernels.policy(tile, out, rows, terms, run.some(run.scored, s.start, s.stop))
        return
    found = run.score_tile(tile, s)
    with _autograd_in_an_op():
        g = row_coefficient(found.logps, rows, work.config, work.linear)
    run.kernels.gradient(tile, out, found, g, rows.w_entropy)


@contextlib.contextmanager
def _autograd_in_an_op():
    """An op runs below autograd, which is excluded from this thread's dispatch: here it is not."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


def _leave_stash(run, tile, out, s):
    if any(run.work.diagnostics):
        wanted = Diagnostics(run, tile.target)
        wanted.add(tile, slice(None), 0)
    found = run.score_tile(tile, s)
    if any(run.work.diagnostics):
        run.diagnostics[s] = wanted.finish(found.lse)
    if run.wide:
        run.kernels.gradient(tile, out, found, torch.ones_like(found.lse) / run.slope(s))  # a slope in it would round even the 1


def backward(run, scored, stash, *incoming):
    """The gradients from those of logps, entropy and lse (None where there is none), finished; the rows of the stash come first."""
    k, n, heights = stash.shape[0], run.rows.index.shape[0], run.plan
    stripes = blocks_from(k, n, heights.stripe_rows)
    spans = sum(len(blocks_from(*stripe, heights.recompute_rows)) for stripe in stripes)
    outermost = k == 0 and len(stripes) == 1
    gradients = Gradients(run, (k > 0) + spans, heights.recompute_columns if outermost else None)
    if k:
        _stashed_rows(run, gradients, run.some(scored, 0, k), stash, _some_of(incoming, slice(0, k)))
    for stripe in stripes:
        _recomputed_rows(run, gradients, stripe, scored, incoming)
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
    g, *beside = incoming
    factor = None
    if run.wide:
        assert not any(x is not None for x in beside)
        factor = g * run.slope(slice(0, len(g)))
    else:
        _gradient(run, run.tile(stash, 0), stash, scored, *incoming)
    gradients.add(stash, *run.gather(0, len(g)), factor)


def _recomputed_rows(run, gradients, stripe, scored, incoming):
    """A stripe of rows whose float32 dH is summed while the vocabulary passes once, outermost."""
    heights, head, needs, (first, last) = run.plan, run.head, run.work.needs, stripe
    vocab, columns = head.weight.shape[0], min(heights.recompute_columns, max(1, head.weight.shape[0]))
    h, t, where = run.gather(first, last)
    zeros = lambda width: h.new_zeros(last - first, width, dtype=run.accumulate)  # noqa: E731
    dh = zeros(h.shape[1]) if needs[0] else None
    dz_b = zeros(head.lora_a.shape[0]) if gradients.needs_adapter else None
    height, low = min(heights.recompute_rows, last - first), min(heights.recompute_chunk, last - first)
    buffer = empty(height * _stride(columns, run), like=h)
    chunk = empty(low * _stride(columns, run), like=h, dtype=run.tile_dtype) if run.wide else None
    for left, right in blocks(vocab, columns):
        for start, end in blocks(last - first, height):
            dz = _block(buffer, end - start, right - left, run)
            for a, b in blocks(end - start, low if run.wide else height):
                s = slice(start + a, start + b)
                values = _block(chunk, b - a, right - left, run) if run.wide else dz
                run.logits(h[s], None if t is None else t[s], values, left)
                tile = run.tile(values, first + s.start, left)
                rows = slice(first + s.start, first + s.stop)
                _gradient(run, tile, dz[a:b], run.some(scored, rows.start, rows.stop), *_some_of(incoming, rows))
            gradients.add_block(dz, left, right, h[start:end], None if t is None else t[start:end])
            for total, factor in ((dh, head.weight), (dz_b, head.lora_b)):
                if total is not None:
                    add_product(total[start:end], dz, factor[left:right], run.wide)
        gradients.close_block(left, right)
    gradients.add_rows(dh, dz_b, h, where)


def add_product(total, dz, factor, wide):
    """A float32 sum of products; a CPU's of 16-bit inputs are rounded before they are added."""
    if wide or factor.dtype == total.dtype:
        multiply(dz, factor, total, add=True)
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
