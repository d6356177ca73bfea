"""The pair kernels in Triton: pairs (row of one matrix, row of another), gathered; arithmetic in float32 (float64 for float64).

    pair_logits   out[j] = scale hidden[row] . weight[ids[j]] + bias[ids[j]]
    pair_sums     out[row] = scale sum over j of g[j] source[ids[j]]

A program is one warp, so that nothing is exchanged between warps. Bytes per pair, of matrices [.., K] with elements of b bytes:

    pair_logits   reads K b of weight and, from a cache but for one of every PAIRS, K b of hidden; the id, 8; writes 4 (acc)
    pair_sums     reads K b of source; the id and the factor, 12, once for every BLOCK of columns; a row with pairs is written once

Per element of a pair: one multiplication and one addition. Each sum is one program's, in the order of the columns, or of the pairs.
"""

import triton
import triton.language as tl

_PAIRS = "ids_ptr", "ranges_ptr", "rows_ptr"  # one by one: inside of a tuple Triton specialises on alignment all the same


@triton.jit
def _row_of(rows_ptr, r):
    row = r
    if rows_ptr is not None:
        row = tl.load(rows_ptr + r)
    return row


@triton.jit
def _factors(ids_ptr, g_ptr, start, last, PAIRS: tl.constexpr):
    """(ids, g) of some pairs of a range that ends at ``last``; behind it, no id and no weight."""
    at = start + tl.arange(0, PAIRS)
    return tl.load(ids_ptr + at, mask=at < last, other=-1), tl.load(g_ptr + at, mask=at < last, other=0.0)


@triton.jit
def _gathered(matrix, ids, here, columns, K):
    """[PAIRS, BLOCK]: some columns of some rows, 0 where there is nothing."""
    at = tl.expand_dims(ids * matrix.stride, 1) + tl.expand_dims(columns, 0)
    return tl.load(matrix.pointer + at, mask=tl.expand_dims(here, 1) & tl.expand_dims(columns < K, 0), other=0.0)


@triton.jit(do_not_specialize=["count", "V"], do_not_specialize_on_alignment=[*_PAIRS, "bias_ptr", "out_ptr"])
def pair_logits_kernel(
    ids_ptr,  # [M] int64
    ranges_ptr,  # [R, 2] int64
    rows_ptr,  # [R] int64 or None
    hidden,  # Matrix [.., K]
    weight,  # Matrix [V, K]
    bias_ptr,  # [V] acc or None
    out_ptr,  # [M] acc
    count,  # R
    V,
    K,
    scale: tl.float64,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the pairs of ROWS rows, PAIRS of one row at a time, each program of grid y takes its share: a row may have any number."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    LOAD: tl.constexpr = 16 // (weight.pointer.dtype.element_ty.primitive_bitwidth // 8)
    start = tl.program_id(0).to(tl.int64) * ROWS
    group = start + tl.arange(0, ROWS)
    first = tl.load(ranges_ptr + 2 * group, mask=group < count, other=0)
    lengths = tl.load(ranges_ptr + 2 * group + 1, mask=group < count, other=0) - first
    ends = tl.cumsum(tl.cdiv(lengths, PAIRS).to(tl.int32), 0)
    steps = tl.max(ends, 0)
    share = tl.cdiv(steps, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for step in range(begin, tl.minimum(begin + share, steps)):
        r = start + tl.sum((ends <= step).to(tl.int32), 0)
        since = step - tl.max(tl.where(ends <= step, ends, 0), 0)
        at = tl.load(ranges_ptr + 2 * r) + since * PAIRS + tl.arange(0, PAIRS)
        last = tl.load(ranges_ptr + 2 * r + 1)
        ids = tl.load(ids_ptr + at, mask=at < last, other=-1)
        here = (ids >= 0) & (ids < V)
        hidden_ptr = hidden.pointer + _row_of(rows_ptr, r) * hidden.stride
        total = tl.zeros((PAIRS, BLOCK // LOAD), ACC)
        for k in range(0, K, BLOCK):
            columns = k + tl.arange(0, BLOCK)
            x = tl.load(hidden_ptr + columns, mask=columns < K, other=0.0).to(ACC)
            product = tl.expand_dims(x, 0) * _gathered(weight, ids, here, columns, K).to(ACC)
            total += tl.sum(tl.reshape(product, (PAIRS, BLOCK // LOAD, LOAD)), 2)  # of one load: no exchange between threads
        z = tl.sum(total, 1) * tl.full((), scale, ACC)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + ids, mask=here, other=0.0)
        if ADD:
            tl.store(out_ptr + at, tl.load(out_ptr + at, mask=here, other=0.0) + z, mask=here)
        else:
            tl.store(out_ptr + at, tl.where(here, z, float("-inf")), mask=at < last)


@triton.jit(do_not_specialize=["rows_each", "out_rows", "count", "source_rows"],
            do_not_specialize_on_alignment=[*_PAIRS, "g_ptr"])  # fmt: skip
def pair_sums_kernel(
    ids_ptr,  # [M] int64
    ranges_ptr,  # [R, 2] int64
    rows_ptr,  # [R] int64 or None
    out,  # Matrix [out_rows, K]
    source,  # Matrix [source_rows, K]
    g_ptr,  # [M] acc
    rows_each,  # that a program takes, most of which may have no pairs
    out_rows,
    count,  # R
    source_rows,
    K,
    scale: tl.float64,
    ADD: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = g_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * rows_each
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for r in range(start, tl.minimum(start + rows_each, count)):
        first, last = tl.load(ranges_ptr + 2 * r), tl.load(ranges_ptr + 2 * r + 1)
        if first < last:
            row = _row_of(rows_ptr, r)
            if (row >= 0) & (row < out_rows):
                total = tl.zeros((BLOCK,), ACC)
                ids, g = _factors(ids_ptr, g_ptr, first, last, PAIRS)
                for at in range(first, last, PAIRS):
                    here = (ids >= 0) & (ids < source_rows)
                    x = _gathered(source, ids, here, columns, K).to(ACC)
                    ahead = _factors(ids_ptr, g_ptr, at + PAIRS, last, PAIRS)
                    total += tl.sum(tl.expand_dims(tl.where(here, g, 0.0), 1) * x, 0)
                    ids, g = ahead
                total *= tl.full((), scale, ACC)
                out_ptr = out.pointer + row * out.stride + columns
                if ADD:
                    total += tl.load(out_ptr, mask=columns < K, other=0.0).to(ACC)
                tl.store(out_ptr, total.to(out.pointer.dtype.element_ty), mask=columns < K)
