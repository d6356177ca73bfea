"""The planner: shapes, a budget and a device in; heights of the chunks, predicted time and peak memory out. It touches no tensor.

Peak memory of a call, beyond its inputs and O(N) vectors, is at most

    N_all D e  (dH)  +  budget  +  4 V D  (dW: its float32 sum, the final dW its first half; e V D where e >= 4)          bytes

with e the bytes of an input's element and z those of a logit. dW and dH count only where they are wanted, dH twice where a frozen
head in two phases keeps u = d logps / d hidden. V' is V padded to
128 bytes. What the workspace holds, with R rows of dz in the buffer and r rows of logits in the chunk:

    one pass     R (V' e + D e)  +  r V' z where z > e (else the chunk is the buffer)  +  dh_rows D (4 + e)    <= budget
    direct       the same with R = all live rows; dW is one product in its final dtype      <= budget + 2 V D if e < 4
    two phases   a stash instead of dz, and where it is wide D (4 + e) more a row: all live rows by the direct rule, else as many as
                 the budget holds beside what is recomputed, if these are a quarter of the live rows
    recomputed   stripe_rows D (4 + 2 e)  +  recompute_columns (recompute_rows e + recompute_chunk z)    <= budget / 2
    scoring      score_group D e  +  score_rows score_columns z    <= budget / 2

On a CPU a row of the buffer takes its row of dH as well, and one block's operands of dW stand beside it. A budget below one row
of these and 64 columns is exceeded by at most so much; one of products of a fixed order by that of 4096 columns.

A call that compares two heads has as many logits of the teacher beside each chunk and each block, of the student's dtype, and
their rows of the teacher's hidden states, D' e' bytes each. On a CPU such a chunk has at most 512 rows, the buffer may have more. A
divergence that mixes both (jsd) is scored over whole rows.

Over supports nothing is cut, and there is no workspace. Beside dH and dW (in its final dtype) a call takes at most 128 bytes a pair
(sorted ids and their order among them) and 256 a token; hidden states that are a view are copied, and an adapter or a shard has
1024 rows of dH beside it in float32.

Heights are the fastest by the count of cost.py at 16,384 rows of a shape and budget. The number of rows clips them, and decides
whether all live rows fit: then dW is direct, and everything is stashed.
"""

import functools
import os
from dataclasses import dataclass, replace

import torch

from ..backends.native import CHAIN, PRODUCT_ROWS
from ..backends.statistics import TILE_COLUMNS
from .cost import DEVICES, TILE, Device, Plan, Problem, Step, Tally, device_of, rate, seconds, steps

__all__ = ["DEVICES", "Device", "Plan", "Prediction", "Problem", "Step", "default_budget", "device_of", "peak_bytes", "plan",
           "predict", "stash_rows_of", "steps"]  # fmt: skip

DEFAULT_WORKSPACE_BYTES = 384 * 2**20  # 1024 rows of a 152k vocabulary in bf16 with their scratch
DEFAULT_GPU_WORKSPACE_BYTES = 1536 * 2**20
_CHUNK_ROWS = tuple(TILE * n for n in (1, 2, 3, 4, 6, 8))
_SCORE_HEIGHTS = (128, 256, 512, 1024)
_CHUNK_SLACK = 1.02  # a lower chunk that leaves room for all live rows may cost so much more
_USUAL_ROWS = 16384  # heights are compared at so many rows, rests included; there are none of powers of two
_ALIGNMENT = 128  # bytes; an odd row stride would push the products off their fast path
_BLOCK_BYTES = 16 * 2**20
_MIN_COLUMNS = 64
_MAX_COLUMNS = 8192
_SCORE_ROWS = 1024
_COMPARED_ROWS = 512  # of a CPU's chunk beside a teacher's
_PAIR_BYTES, _TOKEN_BYTES = 128, 256


@dataclass(frozen=True)
class Prediction:
    predicted_ms: float
    floor_ms: float
    ratio: float
    peak_bytes: int


def default_budget(device_type: str = "cpu") -> int:
    """GRPO_KERNELS_WORKSPACE_MB in bytes, or 384 MiB on a CPU and 1536 MiB on a GPU."""
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


def predict(problem: Problem) -> Prediction:
    """Beside the products that cannot be avoided: 2NVD, 4NVD or 6NVD of live rows and 2NVD of the others, at the device's rate. A
    teacher's is 2NVD' more of all.

    Over supports beside the bytes that cannot: for each of logits, dH and dW a row of W or hidden a pair, hidden, dH and dW once.
    """
    p, found = problem, plan(problem)
    predicted = sum(step.count * seconds(p, step) for step in steps(p, found))
    rows = p.live + p.dead + p.live * (p.needs_hidden + p.needs_weight)
    floor = 2 * rows * p.vocab * p.depth / rate(p, p.element_size)
    if p.compares:
        floor += 2 * (p.live + p.dead) * p.vocab * p.teacher_depth / rate(p, p.teacher_size)
    if p.pairs:
        gathered = p.pairs * (1 + p.needs_hidden + p.needs_weight)
        whole = (p.live + p.dead) * (1 + p.needs_hidden) + p.vocab * p.needs_weight
        floor = (gathered + whole) * p.depth * p.element_size / p.device.bandwidth
    return Prediction(predicted * 1e3, floor * 1e3, predicted / floor if floor else 1.0, peak_bytes(p, p.live + p.dead))


def peak_bytes(problem: Problem, tokens: int) -> int:
    """The formula of this file with the heights of the plan, an upper bound: ``tokens`` rows of hidden, kept or not."""
    p, found = problem, plan(problem)
    dh = tokens * p.depth * p.element_size * p.needs_hidden
    if p.two_phases and not p.stashes:
        dh *= 2  # u stays until the backward has made dH of it
    if p.pairs:
        return dh + p.dw_bytes(True) + _PAIR_BYTES * p.pairs + _TOKEN_BYTES * tokens
    scoring = found.score_group * _hidden_bytes(p) + found.score_rows * found.score_columns * _logit_bytes(p)
    if not p.trained:
        return dh + p.dw_bytes(True) + scoring
    if not p.stashes:
        return dh + max(scoring, p.dw_bytes(found.direct) + _pass_bytes(p, found.chunk_rows, found.buffer_rows, found.dh_rows))
    stashed, again = found.stash_rows, 0
    if stashed < p.live:
        again = _recompute_bytes(p, found.recompute_columns, found.recompute_chunk, found.stripe_rows, found.recompute_rows)
    dw = p.dw_bytes(found.direct or (not stashed and p.live <= found.stripe_rows))
    if not stashed:
        return dh + max(scoring, dw + again)
    # making the stash takes no dW, the backward no chunk
    stash = stashed * _padded(p.vocab, p.element_size) * p.element_size
    making = _pass_bytes(p, found.chunk_rows, stashed, 0)
    return dh + max(stash + scoring, making, dw + again + _pass_bytes(p, 0, stashed, found.dh_rows))


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem) -> Plan:
    """The fastest heights within the memory of this file's formula."""
    p = problem
    (h, chunks), live, rows = _heights(replace(p, live=0, dead=0)), max(1, p.live), max(1, p.live + p.dead)
    dh_rows, stripe, R = min(h.dh_rows, live), min(h.stripe_rows, live), min(h.buffer_rows, live)
    heights = (min(r, live) for r in chunks or (live,)) if p.needs_weight else ()
    r = next((r for r in heights if _all_fit(p, r, dh_rows)), 0)
    stash = 0
    if r:
        stash = R = live
    elif p.stashes:
        sums = stripe if p.on_cpu else h.stripe_rows
        left = p.budget - _recompute_bytes(p, h.recompute_columns, h.recompute_chunk, sums, h.recompute_rows)
        fixed = _pass_bytes(p, 0, 0, dh_rows)
        stash = _whole(max(0, left - fixed) // (_pass_bytes(p, 0, 1, dh_rows) - fixed), p)
        # fewer would not pay for the float32 sum of dW that they need
        stash = min(stash, live) if 4 * stash >= live else 0
        R = max(1, stash)
        chunk_row = _pass_bytes(p, 1, 0, dh_rows) - fixed
        room = p.budget + p.dw_bytes(False) - _pass_bytes(p, 0, stash, dh_rows)
        r = max(1, min(h.chunk_rows, _whole(room // chunk_row, p) if _has_chunk(p) else R))
    span = min(h.recompute_rows, stripe)
    return Plan(
        chunk_rows=min(r or h.chunk_rows, R) if _has_chunk(p) else R, buffer_rows=R, columns=h.columns, direct=p.live <= R,
        dh_rows=R if p.on_cpu else min(dh_rows, R), score_group=min(h.score_group, rows), score_rows=min(h.score_rows, rows),
        score_columns=h.score_columns, stash_rows=stash if p.stashes and p.live else 0, stripe_rows=stripe, recompute_rows=span,
        recompute_chunk=min(h.recompute_chunk, span), recompute_columns=h.recompute_columns,
    )  # fmt: skip


def stash_rows_of(problem: Problem) -> int:
    """The stash that `plan` gives these rows. Under torch.compile sizes may be symbols, and nothing is compared but memory: all
    live rows beside the lowest chunk, or none.
    """
    if not torch.compiler.is_compiling():
        return plan(problem).stash_rows
    if not problem.stashes:
        return 0
    return problem.live if _all_fit(problem, TILE, problem.budget // 32 // max(1, _pass_bytes(problem, 0, 0, 1))) else 0


def _all_fit(p, r, dh_rows):
    """Whether all live rows fit beside a chunk of r: what the float32 sum of dW would take, a direct dW leaves to the buffer."""
    spare, live = p.dw_bytes(False) - p.dw_bytes(True), max(1, p.live)
    if p.stashes:  # dW is not there yet while the stash is made, nor the chunk any more when dW is
        return max(_pass_bytes(p, r, live, 0) - p.dw_bytes(True), _pass_bytes(p, 0, live, dh_rows)) <= p.budget + spare
    return _pass_bytes(p, r, live, dh_rows) <= p.budget + spare


@functools.lru_cache(maxsize=512)
def _heights(p):
    """(plan, heights of a chunk beside all live rows, the best first): what the shape says before rows are counted."""
    return _cpu_heights(p) if p.on_cpu else _gpu_heights(p)


def _gpu_heights(p):
    V, budget = p.vocab, p.budget

    def cost(loop, *args):
        tally = Tally(p)
        getattr(tally, loop)(*args)
        return sum(step.count * seconds(p, step) for step in tally.steps())

    dh_row = _pass_bytes(p, 0, 0, 1)
    dh_rows = min(_units(budget // 32 // max(1, dh_row)), key=lambda x: cost("dh", 1, x, x, V) / x)
    left = max(1, budget - dh_rows * dh_row)
    most_chunk = left // _pass_bytes(p, 1, 1, 0)
    chunks = [x for x in _CHUNK_ROWS if x <= most_chunk] or [max(1, most_chunk)]

    def buffers(chunk):
        """Heights of the buffer beside a chunk; where z is no wider than dz, the chunk is the buffer."""
        most = (left - _pass_bytes(p, chunk, 0, 0)) // _pass_bytes(p, 0, 1, 0)
        return [(chunk if _has_chunk(p) else x, x) for x in _units(most) if 2 * x >= most and x >= chunk] or [(chunk, chunk)]

    pairs = [pair for chunk in (chunks if _has_chunk(p) else chunks[:1]) for pair in buffers(chunk)]
    r, R = min(pairs, key=lambda pair: cost("one_pass", _USUAL_ROWS, *pair, dh_rows, V, False))
    costs = {x: cost("policy", 1, _USUAL_ROWS, x, V) for x in chunks if x <= r}
    beside = tuple(x for x in reversed(costs) if costs[x] <= _CHUNK_SLACK * min(costs.values())) if _has_chunk(p) else ()

    in_cache = min(budget // 4, p.device.cache) // _logit_bytes(p)
    # blocks of like width: a narrow last one would fill no wave
    whole = TILE_COLUMNS if p.fixed else TILE
    widths = sorted({min(V, -(-V // n // whole) * whole) for n in range(1, 65)} | {min(V, TILE_COLUMNS if p.fixed else 64)})
    tiles = [(x, c) for c in widths for x in _SCORE_HEIGHTS if x * c <= in_cache]
    tiles = [(x, c) for x, c in tiles if x * _hidden_bytes(p) <= budget // 4] or [(1, widths[0])]
    score_rows, score_columns = min(tiles, key=lambda tile: cost("score", tile[0], *tile, tile[0]) / tile[0])
    if p.mixes:
        score_rows, score_columns = _whole(max(1, budget // 4 // (V * _logit_bytes(p))), p), V
    group = max(1, budget // 4 // _hidden_bytes(p) // score_rows) * score_rows

    def stripe(x, c):
        fixed = _recompute_bytes(p, c, x, 0, 0)
        return _whole(max(1, (budget // 2 - fixed) // (_recompute_bytes(p, c, x, 1, 1) - fixed)), p)

    x, columns = min(tiles, key=lambda tile: cost("block", 1, stripe(*tile), *tile, False, True) / (stripe(*tile) * tile[1]))
    n = stripe(x, columns)
    return Plan(r, R, V, False, dh_rows, group, score_rows, score_columns, 0, n, n, min(x, n), columns), beside


def _cpu_heights(p):
    """Blocks whose operands stay in the cache; everything was measured, nothing is left to the cost model."""
    e, z, accumulate = p.element_size, _logit_bytes(p), max(p.element_size, 4)
    columns = _block_columns(p)
    least = TILE_COLUMNS if p.fixed or e == 2 else max(_MIN_COLUMNS, p.budget // (4 * z))
    score_columns = p.vocab if p.mixes else min(p.vocab, TILE_COLUMNS, least)
    score_rows = min(_SCORE_ROWS, max(1, p.budget // (score_columns * z + _hidden_bytes(p))))
    fixed = _pass_bytes(p, 0, 0, 0)
    R = r = _whole(max(1, (p.budget - fixed) // (_pass_bytes(p, 1, 1, 0) - fixed)), p)
    if p.compares and R > _COMPARED_ROWS:
        r, beside = _COMPARED_ROWS, _pass_bytes(p, _COMPARED_ROWS, 0, 0)
        R = _whole((p.budget - beside) // (_pass_bytes(p, 0, 1, 0) - fixed), p)
    # what is recomputed is cut the same way whether or not these rows would fit a stash: a backward that drops rows asks again
    again = max(min(CHAIN if p.fixed else _MIN_COLUMNS, p.vocab), columns // 2)
    row = again * (z + e) + p.depth * e + _hidden_bytes(p)
    span = _whole(max(1, min(_SCORE_ROWS, (p.budget // 4 - _recompute_bytes(p, again, 0, 0, 0)) // row)), p)
    stripe = _whole(max(span, p.budget // 2 // (p.depth * accumulate)), p)
    return Plan(r, R, columns, False, R, score_rows, score_rows, score_columns, 0, stripe, span, span, again), (r,) * p.compares


def _block_columns(p):
    """Blocks of some 16 MiB of weight: large enough for the products, small beside the chunk."""
    by_bytes = min(_BLOCK_BYTES, p.budget // 8) // (p.depth * p.element_size)
    whole = 2 * CHAIN if p.fixed else 1
    return min(p.vocab, _MAX_COLUMNS, max(whole, _MIN_COLUMNS, by_bytes // whole * whole))


def _has_chunk(p):
    """Whether a chunk of logits stands beside the buffer; elsewhere it is the buffer."""
    return p.wide or p.compares


def _logit_bytes(p):
    """Of a logit of each head."""
    return p.tile_size * (1 + p.compares)


def _hidden_bytes(p):
    """Of a row of hidden, and of the teacher's."""
    return p.depth * p.element_size + p.teacher_depth * p.teacher_size


def _scratch_bytes(p, columns):
    """Of a CPU's product of a teacher in another dtype than the student's, a row of it."""
    return columns * p.teacher_size * (p.on_cpu and p.compares and p.teacher_size != p.element_size)


def _padded(columns, size):
    unit = _ALIGNMENT // size
    return -(-columns // unit) * unit


def _pass_bytes(p, r, R, dh_rows):
    """Chunk, buffer, the rows of hidden behind it, a slice of dH; on a CPU the rows of dH and one block's operands of dW."""
    e, D = p.element_size, p.depth
    chunk = r * _padded(p.vocab, p.tile_size) * p.tile_size * (p.wide + p.compares)
    chunk += r * (p.teacher_depth * p.teacher_size + _scratch_bytes(p, _block_columns(p)))
    scaled = p.stashes and _has_chunk(p)  # the rows of hidden behind such a stash, in float32
    row = _padded(p.vocab, e) * e + D * (e + (4 + e) * scaled)
    if not p.on_cpu:
        return chunk + R * row + dh_rows * D * (e if e >= 4 else 4 + e) * p.needs_hidden
    columns = _block_columns(p) * p.needs_weight
    return chunk + R * (row + D * e + columns * e) + columns * D * e


def _recompute_bytes(p, columns, chunk, stripe, span):
    """dH's float32 sum and the rows of hidden of a stripe, dz of a span, the chunk; on a CPU the product of a block and its sum."""
    e, z, D, accumulate = p.element_size, p.tile_size, p.depth, max(p.element_size, 4)
    if not p.on_cpu:
        teacher = stripe * p.teacher_depth * p.teacher_size
        return stripe * D * (accumulate + 2 * e) + teacher + columns * (span * e + chunk * z * (p.wide + p.compares))
    rows = columns * (_logit_bytes(p) + e) + D * e + _hidden_bytes(p) + _scratch_bytes(p, columns)
    return stripe * D * accumulate + span * rows + columns * D * (e + accumulate)


def _whole(count, p):
    """In whole tiles of rows where that many fit; on a CPU in what a product sums at once."""
    unit = PRODUCT_ROWS if p.on_cpu and p.fixed else 1 if p.on_cpu else TILE
    return count if count < unit else count // unit * unit


def _units(most):
    """Multiples of 128 up to ``most``; where it is less, ``most`` alone."""
    return range(TILE, min(most, _USUAL_ROWS) + 1, TILE) if most >= TILE else (max(1, most),)
