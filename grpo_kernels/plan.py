"""How a call is cut into tiles: shapes and a budget in, chunk sizes out; no tensor is touched here.

Peak memory of a call, beyond its inputs and O(N) vectors, in bytes (e = bytes of the inputs' dtype, a = 4, or 8 for float64):

    gradients   N_all D e  (dH)  +  V D e  (dW)                          only those that are asked for
    + V D (a - e)               the float32 sum behind dW, if e < a and the live rows need more than one tile (one pass)
                                or more than ``stripe_rows`` rows are recomputed (two phases)
    + workspace                 tile or stash, gathered hidden rows, float32 sums of dH, and the scratch of one vocabulary block

The workspace never exceeds the budget unless the budget is below one row and one narrow block of columns:
``minimum = 2 V e + 2 * 64 * (D + 64) * a`` bytes, which is what is then used.
"""

import os
from dataclasses import dataclass

DEFAULT_WORKSPACE_BYTES = 384 * 2**20
_BLOCK_BYTES = 16 * 2**20
_MAX_COLUMNS = 8192
_MIN_COLUMNS = 64
_SCORE_ROWS = 1024
_SCORE_COLUMNS = 4096


@dataclass(frozen=True)
class Problem:
    """What a call asks for."""

    live: int  # rows that are scored and may get a gradient
    dead: int  # rows that are only scored
    vocab: int
    depth: int
    element_size: int  # bytes of the inputs' dtype, which is the tile's dtype
    needs_weight: bool  # a gradient of weight, bias or the adapter's B is wanted
    budget: int  # bytes


@dataclass(frozen=True)
class Plan:
    """The answer; every number is at least 1 except ``stash_rows``."""

    tile_rows: int  # one pass: rows of [., V] processed together
    tiles: int  # how many such tiles the live rows take
    columns: int  # width of a vocabulary block of the products
    score_rows: int  # scoring without gradient: rows and columns of a tile
    score_columns: int
    stash_rows: int  # two phases: live rows whose probabilities are kept for the backward
    stripe_rows: int  # recomputed rows whose dH is summed together while the vocabulary passes once
    recompute_rows: int  # rows of a recomputed [., recompute_columns] tile
    recompute_columns: int


def default_budget() -> int:
    """GRPO_KERNELS_WORKSPACE_MB in bytes, or 384 MiB: 1024 rows of a 152k vocabulary in bf16 with their scratch."""
    megabytes = os.environ.get("GRPO_KERNELS_WORKSPACE_MB")
    if megabytes is None:
        return DEFAULT_WORKSPACE_BYTES
    try:
        budget = int(float(megabytes) * 2**20)
    except (ValueError, OverflowError):
        budget = 0
    if budget <= 0:
        raise ValueError(f"GRPO_KERNELS_WORKSPACE_MB must be a number of MiB > 0, got {megabytes!r}")
    return budget


def plan(problem: Problem) -> Plan:
    """The chunk sizes that keep the peak within the formula above."""
    p = problem
    e = p.element_size
    columns = _block_columns(p)
    score_columns = min(p.vocab, _SCORE_COLUMNS, max(_MIN_COLUMNS, p.budget // (4 * e)))
    score_rows = min(_SCORE_ROWS, max(1, p.budget // (score_columns * e + p.depth * e)))

    row_bytes = p.vocab * e + p.depth * e * 2 + (columns * e if p.needs_weight else 0)
    block_bytes = columns * p.depth * e if p.needs_weight else 0
    fit = max(1, (p.budget - block_bytes) // row_bytes)
    tiles = max(1, -(-p.live // fit))
    # full tiles and a rest: the peak then does not move with the number of rows
    tile_rows = max(1, min(p.live, fit))

    stash_rows, stripe_rows, recompute_rows, recompute_columns = p.live, 1, 1, columns
    if p.live * row_bytes + block_bytes > p.budget:
        recompute_columns = max(min(_MIN_COLUMNS, p.vocab), columns // 2)
        accumulate = max(e, 4)
        # a block's product and float32 sum; per recomputed row the tile, its transpose and the hidden row
        block = recompute_columns * p.depth * (e + accumulate)
        recompute_row = 2 * recompute_columns * e + 2 * p.depth * e
        recompute_rows = max(1, min(_SCORE_ROWS, (p.budget // 4 - block) // recompute_row))
        stripe_rows = max(recompute_rows, min(p.live, p.budget // 2 // (p.depth * accumulate)))
        # the stash takes what is left, so that the peak does not move with the number of rows here either
        left = p.budget - block - recompute_rows * recompute_row - stripe_rows * p.depth * accumulate
        stash_rows = min(p.live, max(0, left) // (p.vocab * e + 2 * p.depth * e + recompute_columns * e))
    return Plan(
        tile_rows, tiles, columns, score_rows, score_columns, stash_rows, stripe_rows, recompute_rows, recompute_columns
    )


def _block_columns(p):
    """Blocks of some 16 MiB of weight: large enough for the products, small beside the tile."""
    by_bytes = min(_BLOCK_BYTES, p.budget // 8) // (p.depth * p.element_size)
    return min(p.vocab, _MAX_COLUMNS, max(_MIN_COLUMNS, by_bytes))

