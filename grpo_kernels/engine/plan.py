"""How a call is cut into tiles: shapes and a budget in, chunk sizes out; no tensor is touched here.

Peak memory of a call, beyond its inputs and O(N) vectors, in bytes (e = bytes of the inputs' dtype, a = 4, or 8 for float64):

    gradients   N_all D e  (dH)  +  V D e  (dW)                          only those that are asked for
    + V D (a - e)               the float32 sum behind dW, if e < a and the live rows need more than one tile (one pass)
                                or more than ``stripe_rows`` rows are recomputed (two phases); dW is its first half, so
                                that on a GPU the other half stays taken for as long as dW lives
    + workspace                 tile or stash, gathered hidden rows, float32 sums of dH, and the scratch of one vocabulary block

The workspace never exceeds the budget unless the budget is below one row and one narrow block of columns:
``minimum = 2 V z + 2 * 64 * (D + 64) * a`` bytes (z = bytes of an element of the tile), which is what is then used.

Two machines, two plans. A CPU's products go by vocabulary blocks through a scratch that stays in the cache. A GPU's products
write and add float32 themselves: one product covers the vocabulary, and the only question is how many rows a tile holds.
"""

import os
from dataclasses import dataclass

DEFAULT_WORKSPACE_BYTES = 384 * 2**20
DEFAULT_GPU_WORKSPACE_BYTES = 768 * 2**20
_BLOCK_BYTES = 16 * 2**20
_MAX_COLUMNS = 8192
_MIN_COLUMNS = 64
_SCORE_ROWS = 1024
_SCORE_COLUMNS = 4096
_GPU_ROWS = 128  # a GPU's products work on tiles of 128 rows and more
_GPU_SCORE_ROWS = 4096
_GPU_SCORE_COLUMNS = 8192


@dataclass(frozen=True)
class Problem:
    """What a call asks for."""

    live: int  # rows that are scored and may get a gradient
    dead: int  # rows that are only scored
    vocab: int
    depth: int
    element_size: int  # bytes of the inputs' dtype
    tile_size: int  # bytes of an element of a tile of logits
    needs_weight: bool  # a gradient of weight, bias or the adapter's B is wanted
    budget: int  # bytes
    sums_directly: bool = False  # products add to their float32 sums themselves (a GPU's)
    mixed: bool = False  # some of the rows come from a stash: a block of dW is a sum of several products


@dataclass(frozen=True)
class Plan:
    """The answer; every number is at least 1 except ``stash_rows``."""

    tile_rows: int  # one pass: rows of [., V] processed together
    tiles: int  # how many such tiles the live rows take
    columns: int  # width of a vocabulary block of the products
    score_rows: int  # scoring without gradient: rows and columns of a tile
    score_columns: int
    stash_rows: int  # two phases: live rows whose probabilities are kept for the backward
    stash_tile_rows: int  # of them, those whose logits are in memory together
    stripe_rows: int  # recomputed rows whose dH is summed together while the vocabulary passes once
    recompute_rows: int  # rows of a recomputed [., recompute_columns] tile
    recompute_columns: int


def default_budget(device_type: str = "cpu") -> int:
    """GRPO_KERNELS_WORKSPACE_MB in bytes, or 384 MiB: 1024 rows of a 152k vocabulary in bf16 with their scratch.

    On a GPU 768 MiB: 1280 rows in float32. Fewer would let memory set the pace of the products behind dW.
    """
    megabytes = os.environ.get("GRPO_KERNELS_WORKSPACE_MB")
    if megabytes is None:
        return DEFAULT_WORKSPACE_BYTES if device_type == "cpu" else DEFAULT_GPU_WORKSPACE_BYTES
    try:
        budget = int(float(megabytes) * 2**20)
    except (ValueError, OverflowError):
        budget = 0
    if budget <= 0:
        raise ValueError(f"GRPO_KERNELS_WORKSPACE_MB must be a number of MiB > 0, got {megabytes!r}")
    return budget


def plan(problem: Problem) -> Plan:
    """The chunk sizes that keep the peak within the formula above."""
    return _gpu_plan(problem) if problem.sums_directly else _cpu_plan(problem)


def peak_bytes(problem: Problem, tokens: int, needs_hidden=True, two_phases=False) -> int:
    """The formula above, an upper bound: ``tokens`` rows of hidden, of which the problem's live ones are computed."""
    p, the_plan = problem, plan(problem)
    e, accumulate = p.element_size, max(p.element_size, 4)
    several = p.live - the_plan.stash_rows > the_plan.stripe_rows if two_phases else the_plan.tiles > 1
    weight_bytes = p.vocab * p.depth * (accumulate if several else e) if p.needs_weight else 0
    return tokens * p.depth * e * needs_hidden + weight_bytes + min(max(p.budget, _minimum(p)), _whole_bytes(p))


def _minimum(p):
    return 2 * p.vocab * p.tile_size + 2 * _MIN_COLUMNS * (p.depth + 64) * max(p.element_size, 4)


def _row_bytes(p, columns):
    """Of a row in a tile: its logits, its hidden state gathered and the gradient of that, and its part of a block's scratch."""
    return p.vocab * p.tile_size + p.depth * p.element_size * 2 + (columns * p.element_size if p.needs_weight else 0)


def _whole_bytes(p):
    """Of all rows, live and dead, in one tile."""
    columns = p.vocab if p.sums_directly else _block_columns(p)
    return (p.live + p.dead) * _row_bytes(p, columns) + (columns * p.depth * p.element_size if p.needs_weight else 0)


def _cpu_plan(p):
    e, z = p.element_size, p.tile_size
    columns = _block_columns(p)
    score_columns = min(p.vocab, _SCORE_COLUMNS, max(_MIN_COLUMNS, p.budget // (4 * z)))
    score_rows = min(_SCORE_ROWS, max(1, p.budget // (score_columns * z + p.depth * e)))

    row_bytes = _row_bytes(p, columns)
    block_bytes = columns * p.depth * e if p.needs_weight else 0
    fit = max(1, (p.budget - block_bytes) // row_bytes)
    tiles = max(1, -(-p.live // fit))
    # full tiles and a rest: the peak then does not move with the number of rows
    tile_rows = max(1, min(p.live, fit))

    # what is recomputed is cut the same way whether or not these rows would fit a stash: a backward that drops rows asks again
    recompute_columns = max(min(_MIN_COLUMNS, p.vocab), columns // 2)
    accumulate = max(e, 4)
    # a block's product and float32 sum; per recomputed row the tile, its transpose and the hidden row
    block = recompute_columns * p.depth * (e + accumulate)
    recompute_row = recompute_columns * (z + e) + 2 * p.depth * e
    recompute_rows = max(1, min(_SCORE_ROWS, (p.budget // 4 - block) // recompute_row))
    stripe_rows = max(recompute_rows, min(p.live, p.budget // 2 // (p.depth * accumulate)))
    stash_rows = p.live
    if p.live * row_bytes + block_bytes > p.budget:
        # the stash takes what is left, so that the peak does not move with the number of rows here either
        left = p.budget - block - recompute_rows * recompute_row - stripe_rows * p.depth * accumulate
        stash_rows = min(p.live, max(0, left) // (p.vocab * z + 2 * p.depth * e + recompute_columns * e))
    return Plan(
        tile_rows, tiles, columns, score_rows, score_columns, stash_rows, max(1, stash_rows), stripe_rows, recompute_rows,
        recompute_columns,
    )  # fmt: skip


def _gpu_plan(p):
    e, z, accumulate = p.element_size, p.tile_size, max(p.element_size, 4)
    gathered = 2 * p.depth * e  # a row of hidden, and of dH
    tile_rows = _whole(max(1, p.budget // (p.vocab * z + gathered)), _GPU_ROWS, most=p.live)
    tiles = max(1, -(-p.live // tile_rows))
    score_columns = min(p.vocab, _GPU_SCORE_COLUMNS)
    score_rows = max(1, min(_GPU_SCORE_ROWS, p.budget // (score_columns * z + gathered)))

    # recomputed: all rows together if their float32 dH is affordable, and as many columns as half of the budget holds
    summed = p.depth * (accumulate + e)  # a row of dH, and of hidden
    stripe_rows = max(1, min(p.live, p.budget // 4 // summed))
    columns = max(_MIN_COLUMNS, p.budget // 2 // (stripe_rows * z))
    if p.mixed:
        columns = max(_MIN_COLUMNS, min(columns, p.budget // 4 // (p.depth * accumulate)))
    columns = _whole(columns, _GPU_ROWS, most=p.vocab)

    # everything stashed: beside it stand the logits of some rows, until they are probabilities
    stash_row = p.vocab * e + gathered
    in_place = e == z
    left = p.budget - p.live * stash_row
    if left >= (0 if in_place else min(p.live, _GPU_ROWS) * p.vocab * z):
        stash_rows = p.live
        stash_tile_rows = max(1, p.live) if in_place else _whole(left // (p.vocab * z), _GPU_ROWS, most=p.live)
    else:
        # a part of them, beside what is recomputed; every block of dW is then a sum of two products, in float32
        left = p.budget - stripe_rows * (summed + columns * z)
        stash_rows = max(0, left - min(p.budget // 4, columns * p.depth * accumulate)) // (stash_row + p.vocab * (z - e))
        stash_rows = stash_rows if 4 * stash_rows >= p.live else 0
        stash_tile_rows = max(1, stash_rows)
    return Plan(tile_rows, tiles, p.vocab, score_rows, score_columns, stash_rows, stash_tile_rows, stripe_rows, stripe_rows,
                columns)  # fmt: skip


def _whole(count, unit, most):
    """At most ``count`` and ``most``, in whole units where that many fit; at least 1."""
    return max(1, min(most, count // unit * unit if count >= unit else count))


def _block_columns(p):
    """Blocks of some 16 MiB of weight: large enough for the products, small beside the tile."""
    by_bytes = min(_BLOCK_BYTES, p.budget // 8) // (p.depth * p.element_size)
    return min(p.vocab, _MAX_COLUMNS, max(_MIN_COLUMNS, by_bytes))
