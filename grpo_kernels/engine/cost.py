"""What a plan runs, step by step, and the time that a device takes for it: bytes, waves and launches, by count.

A product takes the longer of its bytes and of its arithmetic, in whole waves of 128 x 256 or 128 x 128 tiles over the
multiprocessors; a third of its output's traffic is exposed on top. A row kernel takes its bytes. A chunk that fits half of the
L2 cache stays there. Numbers come from data sheets until `make gpu` has measured a device, see devices.py.

Over supports no logits are made: rows of W and of hidden are read once a pair, and what is left are launches of small kernels.
The host is taken to keep the queue full; small kernels that end before it has sent the next one take its time instead.
"""

import functools
from dataclasses import dataclass, replace

import torch

from ..devices import constants
from ..tracing import constant

_L2_SPEED = 2  # of L2 beside memory, at least: an A100's 5120 bytes a clock are 3.5 times its memory
_SORT_PASSES = 8  # of a radix sort of 64-bit keys, a byte each
# PyTorch's kernels around those of a call over supports, over numbers of its pairs and of its rows
_OVER_PAIRS = {"scores": 10, "gradient": 1, "dW": 14}
_OVER_ROWS = {"scores": 80, "gradient": 140, "dW": 2}
TILE = 128  # rows and columns of a tile of a GPU's product; wide tiles have twice the columns


@dataclass(frozen=True)
class Device:
    name: str
    multiprocessors: int
    tflops: float  # of 16-bit products, as large ones reach it
    float32_tflops: float  # of float32 products without TF32
    bandwidth: float  # bytes a second of a copy, read and written
    l2: int  # bytes
    exposed: float = 1 / 3  # of a product's output: the tiles of a wave are written while the next wave computes, but not the last
    launch: float = 2e-6  # seconds by which the next kernel of a full queue starts later
    l2_share: float = 0.5  # that a chunk may fill: the rest is for what streams past

    @property
    def cache(self):
        return int(self.l2 * self.l2_share)


# H200: 80 % of the data sheet's products, 90 % of its memory; the other GPUs by their data sheets likewise
DEVICES = {
    "a100": Device("a100", 108, 250.0, 15.6, 1.83e12, 40 * 2**20),  # A100 SXM 80 GB: 312 and 19.5 TFLOP/s, 2.04 TB/s
    "h100": Device("h100", 132, 790.0, 53.6, 3.0e12, 50 * 2**20),  # H100 SXM: 989 and 67 TFLOP/s, 3.35 TB/s
    "h200": Device("h200", 132, 790.0, 53.6, 4.3e12, 60 * 2**20),  # H200 SXM: 989 and 67 TFLOP/s, 4.8 TB/s
    "b200": Device("b200", 148, 1800.0, 60.0, 7.2e12, 126 * 2**20),  # HGX B200: 2250 and 75 TFLOP/s, 8 TB/s
    # two cores with AMX: dz^T h of 1024 x 151,936 x 896 in 130 ms, the transposed copy of dz before it in 20 ms
    "cpu": Device("cpu", 1, 2.1, 0.2, 31e9, 16 * 2**20),
}
# dense 16-bit and float32 operations a clock of one multiprocessor, by compute capability (CUDA C++ Programming Guide, data sheets)
_PER_CLOCK = {(7, 0): (1024, 128), (7, 5): (1024, 128), (8, 0): (2048, 128), (8, 6): (1024, 256), (8, 9): (1024, 256),
              (9, 0): (4096, 256), (10, 0): (8192, 256), (10, 3): (8192, 256), (12, 0): (1024, 256)}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a call asks for."""

    live: int  # rows that get a gradient
    dead: int  # rows that are only scored
    vocab: int  # columns; of the widest rank where the vocabulary is sharded
    depth: int
    element_size: int  # bytes of the inputs' dtype
    tile_size: int  # bytes of an element of a chunk of logits
    needs_hidden: bool
    needs_weight: bool  # a gradient of weight, bias or the adapter's B is wanted
    budget: int  # bytes of workspace
    two_phases: bool = False
    reads_once: bool = False  # the row kernel keeps a row instead of reading it twice
    device: Device = DEVICES["cpu"]
    sums_weight: bool = True  # of these the weight's own, [V, D]: what its float32 sum would take is to spare
    pairs: int = 0  # (row, token) over which the rows are computed instead of the vocabulary; 0 is the vocabulary
    teacher_depth: int = 0  # of a second head, whose logits are beside those of the first; 0: there is none
    teacher_size: int = 0  # bytes of an element of it
    mixes: bool = False  # a divergence that needs the whole rows of both twice
    fixed: bool = False  # products of a fixed order: all cuts are at places where they change no bit

    @property
    def trained(self):
        return self.live if self.needs_hidden or self.needs_weight else 0

    @property
    def compares(self):
        return self.teacher_depth > 0

    @property
    def stashes(self):
        """Of a frozen head two phases are one pass: u = d logps / d hidden takes the place of dH."""
        return self.two_phases and self.needs_weight

    @property
    def on_cpu(self):
        return self.device.name == "cpu"

    @property
    def wide(self):
        return self.tile_size > self.element_size

    def dw_bytes(self, direct):
        """Of dW, or of the float32 sum in whose memory it is rounded."""
        size = self.element_size if direct else max(self.element_size, 4)
        return self.vocab * self.depth * size * (self.needs_weight and self.sums_weight)


@dataclass(frozen=True)
class Plan:
    """The answer; every number is at least 1 except ``stash_rows``."""

    chunk_rows: int  # r: rows of logits in memory together, in one pass and while a stash is made
    buffer_rows: int  # R: rows of dz that one product dH and one product dW take; the stash where there is one
    columns: int  # width of a vocabulary block of the products; the whole vocabulary on a GPU
    direct: bool  # dW is one product in its final dtype
    dh_rows: int  # rows of dH that are summed in float32 together and rounded once
    score_group: int  # scoring without gradient: rows of hidden that are gathered together
    score_rows: int  # of them the rows and columns of one chunk of logits
    score_columns: int
    stash_rows: int  # two phases: live rows whose logits, or onehot - p, are kept for the backward
    stripe_rows: int  # recomputed rows whose float32 dH is summed while the vocabulary passes once
    recompute_rows: int  # of them, rows of dz [., recompute_columns] that one product takes
    recompute_chunk: int  # and of these the rows of logits in memory together
    recompute_columns: int


@dataclass(frozen=True)
class Step:
    """``count`` executions, shape and bytes of one: m, n, k of a product, (rows, columns, 0) of a row kernel or a copy."""

    what: str
    count: int
    m: int
    n: int
    k: int
    read: int  # from memory
    written: int
    cached: int = 0  # read and written in the L2 cache


@constant  # which would trace the asking
def device_of(torch_device) -> Device:
    """What was measured on this GPU, else the table's entry by its name, else what its properties say; nothing is timed here."""
    return _device(torch_device)


@functools.cache
def _device(torch_device):
    sheet = data_sheet(torch_device)
    return sheet if torch_device.type != "cuda" else replace(sheet, **constants(torch.cuda.get_device_name(torch_device)))


def data_sheet(torch_device) -> Device:
    """Whatever was measured."""
    if torch_device.type != "cuda":
        return DEVICES["cpu"]
    found = torch.cuda.get_device_properties(torch_device)
    for name in found.name.lower().replace("-", " ").split():
        # a part of a GPU, or a slower sibling of the same name, has fewer multiprocessors
        if name in DEVICES and DEVICES[name].multiprocessors == found.multi_processor_count:
            return DEVICES[name]
    by_clock = _PER_CLOCK.get((found.major, found.minor), _PER_CLOCK[8, 0])
    tflops, float32_tflops = (0.8 * found.multi_processor_count * found.clock_rate * 1e3 * each / 1e12 for each in by_clock)
    bandwidth = 0.9 * 2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8  # two transfers a clock
    return Device(found.name, found.multi_processor_count, tflops, float32_tflops, bandwidth, found.L2_cache_size)


def rate(p, size):
    """Operations a second of a product of elements of so many bytes; float64 at half of float32's."""
    return 1e12 * (p.device.tflops if size == 2 else p.device.float32_tflops * 4 / size)


def operand_size(p, what):
    """Bytes of an element of a product's operands."""
    return p.teacher_size if what == "teacher logits" else p.element_size


def seconds(p: Problem, step: Step) -> float:
    """Of one execution: the longer of arithmetic and bytes, what of a product's output is exposed, the launch."""
    d, from_memory = p.device, step.read + step.written
    bytes_moved = max(from_memory, (from_memory + step.cached) / _L2_SPEED)  # the two stream side by side
    if not step.k:
        return bytes_moved / d.bandwidth + d.launch
    size = operand_size(p, step.what)
    each = rate(p, size)
    work = 2 * step.m * step.n * step.k / each
    if not p.on_cpu:
        # a partial tile costs a whole one, and so does the last wave over the multiprocessors
        wave = 2 * TILE * TILE * step.k * d.multiprocessors / each
        tiles = [-(-step.m // TILE) * -(-step.n // width) for width in (TILE, 2 * TILE)]
        work = wave * min(-(-tiles[0] // d.multiprocessors), 2 * -(-tiles[1] // d.multiprocessors))
    output = step.written + step.read - (step.m + step.n) * step.k * size  # read again where it is added to
    return max(work, bytes_moved / d.bandwidth) + output * d.exposed / d.bandwidth + d.launch


def steps(problem: Problem, plan: Plan) -> list[Step]:
    """Everything that this plan runs, in order; equal steps are counted together."""
    p, tally = problem, Tally(problem)
    if p.pairs:
        tally.over_supports()
        return tally.steps()
    stashed, trained = plan.stash_rows, p.trained
    tally.score(p.dead + p.live - (stashed if p.stashes else trained), plan.score_rows, plan.score_columns, plan.score_group)
    if not p.stashes:
        tally.one_pass(trained, plan.chunk_rows, plan.buffer_rows, plan.dh_rows, plan.columns, plan.direct)
        return tally.steps()
    tally.gather(stashed > 0, stashed)
    for c, r in _cuts(stashed, plan.chunk_rows):
        tally.logits(c, r, plan.columns)
        tally.kernel(c, "statistics", r, p.vocab, 1 + p.mixes, 0)
        tally.kernel(c * (p.wide or p.compares), "gradient", r, p.vocab, 1, p.element_size)
    recomputed = p.live - stashed
    if stashed:
        if p.wide or p.compares:
            tally.scale(stashed)
        else:
            tally.gather(1, stashed)
            tally.kernel(1, "gradient", stashed, p.vocab, 1, p.element_size)
        tally.dh(1, stashed, plan.dh_rows, plan.columns)
        # both parts of dW are summed by the same blocks
        tally.dw(1, stashed, plan.columns, False, plan.direct)
    final, started = not stashed and recomputed <= plan.recompute_rows, stashed > 0
    for s, n in _cuts(recomputed, plan.stripe_rows):
        tally.gather(s, n)
        for u, span in _cuts(n, plan.recompute_rows):
            for b, c in _cuts(p.vocab, plan.recompute_columns):
                tally.block(s * u * b, span, plan.recompute_chunk, c, started, final, b)
            started = True
        if p.needs_hidden:
            tally.add(s, "round dH", n, p.depth, 0, n * p.depth * max(p.element_size, 4), n * p.depth * p.element_size)
    tally.cast(not plan.direct and not final)
    return tally.steps()


def _cuts(total, size):
    """(count, size) of the whole pieces and of the rest."""
    return [(count, n) for count, n in ((total // size, size), (1, total % size)) if count and n]


class Tally:
    """Steps of one kind added up; each method is one loop of the engine, ``count`` times."""

    def __init__(self, problem):
        self.p, self.counts = problem, {}

    def steps(self):
        return [Step(what, count, *rest) for (what, *rest), count in self.counts.items()]

    def add(self, count, *step):
        if not count:
            return
        self.counts[step] = self.counts.get(step, 0) + count

    def product(self, count, what, m, n, k, size, adds=False, cached=False):
        out = m * n * size
        read = (m + n) * k * operand_size(self.p, what) + out * adds
        self.add(count, what, m, n, k, read, out * (not cached), out * cached)

    def kernel(self, count, what, m, n, reads, size):
        """A second read walks the row back, so it meets first what was read last. With a row in flight on each multiprocessor,
        the cache still holds this share of it."""
        tiles = 1 + self.p.compares
        chunk, device = tiles * m * n * self.p.tile_size, self.p.device
        again = min(1.0, device.cache / (tiles * device.multiprocessors * n * self.p.tile_size))
        cached = chunk * reads if self.in_cache(m, n) else int(chunk * (reads - 1) * again)
        self.add(count, what, m, n, 0, chunk * reads - cached, m * n * size, cached)

    def in_cache(self, m, n, size=None):
        return m * n * (size or self.p.tile_size * (1 + self.p.compares)) <= self.p.device.cache

    def gather(self, count, rows):
        size = rows * self.p.depth * self.p.element_size
        self.add(count, "gather hidden", rows, self.p.depth, 0, size, size)
        size = rows * self.p.teacher_depth * self.p.teacher_size
        self.add(count * self.p.compares, "gather hidden", rows, self.p.teacher_depth, 0, size, size)

    def scale(self, rows):
        """The rows of hidden behind a stash by their gradient: gathered, to float32 and back."""
        size, e = rows * self.p.depth, self.p.element_size
        self.gather(1, rows)
        self.add(1, "scale hidden", rows, self.p.depth, 0, size * (e + 4), size * (e + 4))

    def score(self, rows, height, columns, group):
        for g, n in _cuts(rows, group):
            self.gather(g, n)
            for b, c in _cuts(self.p.vocab, columns):
                for k, m in _cuts(n, height):
                    self.block_logits(g * b * k, m, c)
                    self.kernel(g * b * k, "statistics", m, c, 1 + self.p.mixes, 0)

    def block_logits(self, count, rows, columns):
        """Those of both heads."""
        p, cached = self.p, self.in_cache(rows, columns)
        self.product(count, "logits", rows, columns, p.depth, p.tile_size, cached=cached)
        if p.compares:
            self.product(count, "teacher logits", rows, columns, p.teacher_depth, p.tile_size, cached=cached)

    def one_pass(self, rows, chunk_rows, buffer_rows, dh_rows, columns, direct):
        for i, (g, n) in enumerate(_cuts(rows, buffer_rows)):
            self.gather(g, n)
            self.policy(g, n, chunk_rows, columns)
            self.dh(g, n, dh_rows, columns)
            self.dw(g, n, columns, i > 0, direct)
        self.cast(rows and not direct)

    def logits(self, count, rows, columns):
        for b, c in _cuts(self.p.vocab, columns):
            p, cached = self.p, self.in_cache(rows, self.p.vocab)
            self.product(count * b, "logits", rows, c, p.depth, p.tile_size, cached=cached)
            if p.compares:
                self.product(count * b, "teacher logits", rows, c, p.teacher_depth, p.tile_size, cached=cached)

    def policy(self, count, rows, height, columns):
        for k, m in _cuts(rows, height):
            self.logits(count * k, m, columns)
            reads = (1 if self.p.reads_once else 2) + self.p.mixes
            self.kernel(count * k, "divergence" if self.p.compares else "policy", m, self.p.vocab, reads, self.p.element_size)

    def dh(self, count, rows, height, columns):
        p = self.p
        for k, m in _cuts(rows, height) if p.needs_hidden else ():
            if p.fixed:
                for b, c in _cuts(p.vocab, columns):
                    self.product(count * k * b, "dH", m, p.depth, c, max(p.element_size, 4), cached=True)
                continue
            if p.on_cpu or p.element_size >= 4:
                self.product(count * k, "dH", m, p.depth, p.vocab, p.element_size)
                continue
            cached, size = self.in_cache(m, p.depth, 4), m * p.depth
            self.product(count * k, "dH", m, p.depth, p.vocab, 4, cached=cached)
            self.add(count * k, "round dH", m, p.depth, 0, 4 * size * (not cached), size * p.element_size, 4 * size * cached)

    def dw(self, count, rows, columns, started, final):
        for b, c in _cuts(self.p.vocab, columns) if self.p.needs_weight else ():
            self.dw_block(count * b, rows, c, 0 if started else b, final)

    def dw_block(self, count, rows, columns, first, final):
        """``first`` of them write their rows of dW, the others add to them."""
        if self.p.on_cpu and self.p.element_size == 2:
            size = rows * columns * 2
            self.add(count, "transpose dz", rows, columns, 0, size, size)
        for executions, adds in ((first, False), (count - first, True)):
            if executions:
                self.summed(executions, "dW", columns, self.p.depth, rows, adds, final)

    def summed(self, count, what, m, n, k, adds, final=False):
        e = self.p.element_size
        if final or e >= 4 or not self.p.on_cpu:
            self.product(count, what, m, n, k, e if final else max(e, 4), adds)
        else:  # a CPU's product of 16-bit matrices cannot write float32
            self.product(count, what, m, n, k, e)
            self.add(count, f"add {what}", m, n, 0, m * n * (e + 4 * adds), m * n * 4)

    def cast(self, rounded):
        if rounded and self.p.needs_weight and self.p.element_size < 4:
            size = self.p.vocab * self.p.depth
            self.add(1, "cast dW", self.p.vocab, self.p.depth, 0, 4 * size, size * self.p.element_size)

    def over_supports(self):
        """pairs.py: a row of W a pair for z and again for dH, a row of hidden a pair for dW, whose ids are taken to be distinct."""
        p, pairs, rows = self.p, self.p.pairs, self.p.live + self.p.dead
        row, acc, gradient = p.depth * p.element_size, max(p.element_size, 4), p.trained > 0
        wanted = ["scores"] + ["gradient"] * gradient + ["dW"] * p.needs_weight
        sorts = 1 + p.needs_weight  # whether an id is there twice; pairs by id
        self.add(1, "pair logits", pairs, p.depth, 0, (pairs + rows) * row + 8 * pairs, acc * pairs)
        self.numbers(1, "statistics", pairs, acc, 0)
        self.numbers(1 * gradient, "gradient", pairs, acc, acc)
        if p.needs_hidden:
            self.add(1, "zero dH", rows, p.depth, 0, 0, rows * row)
            self.add(1, "dH", pairs, p.depth, 0, (row + 8 + acc) * pairs, rows * row)
        self.numbers(_SORT_PASSES * sorts, "sort pairs", pairs, 16, 16)
        if p.needs_weight:
            distinct = min(pairs, p.vocab)
            self.add(1, "zero dW", p.vocab, p.depth, 0, 0, p.vocab * row)
            self.add(1, "dW", pairs, p.depth, 0, (row + 8 + acc) * pairs, distinct * row)
        self.numbers(sum(_OVER_PAIRS[name] for name in wanted), "small passes", pairs, 8, 8)
        self.numbers(sum(_OVER_ROWS[name] for name in wanted), "small passes", rows, 8, 8)

    def numbers(self, count, what, length, read, written):
        """A pass over a vector, with so many bytes of each element."""
        here = 0 if self.in_cache(length, 1, read + written) else length
        self.add(count, what, length, 1, 0, read * here, written * here, (read + written) * (length - here))

    def block(self, count, span, height, columns, started, final, blocks=1):
        """A block of the vocabulary for a span of recomputed rows."""
        p = self.p
        for k, m in _cuts(span, height):
            self.block_logits(count * k, m, columns)
            self.kernel(count * k, "gradient", m, columns, 1, p.element_size)
        if p.needs_hidden:
            self.summed(count, "dH", span, p.depth, columns, True)
        self.dw_block(count, span, columns, 0 if started else blocks, final)
