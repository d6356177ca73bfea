"""Part `kernels`: the row kernels alone, on tiles of float32 logits, as a share of the bandwidth of a copy.

    kernel      bytes per logit
    statistics  4 read
    gradient    4 read, 2 written: bf16 into other memory
    stash       4 read, 2 written
    policy      4 read, 2 written; whoever reads the row a second time from memory pays for it in the share

A batch walks over several tiles, so that none is in the cache when its turn comes. Only the CPU's kernels, whose results have the
tile's dtype, overwrite theirs, which are filled again before the next batch is timed.
"""

import torch

from grpo_kernels import backends
from grpo_kernels.backends import pytorch
from grpo_kernels.backends.statistics import Scored, Tile, finalize, new_statistics
from grpo_kernels.losses.config import GRPOLossConfig, LogitTransform
from grpo_kernels.losses.terms import PolicyRows, kernel_terms, row_coefficient

from .context import Wrong, row
from .device import Timed
from .measure import interleaved
from .providers import our_backends

KERNELS = ("statistics", "gradient", "stash", "policy")
BYTES = {"statistics": 4, "gradient": 6, "stash": 6, "policy": 6}
LOSS = GRPOLossConfig(beta=0.04)
SHAPES = ((1024, 151_936), (1280, 151_936), (6080, 32_000), (1516, 128_256), (741, 262_144))  # rows, V: 620 .. 780 MB of float32
TINY_SHAPES = ((8, 1009), (5, 127))
ROUNDS, SLOW_ROUNDS = 15, 3  # the second of plain PyTorch
_COPIED = 2**31  # bytes
_COMPARED = 16  # rows
_ALLOWED = 1e-2  # of a gradient in bf16, relative; a tenth of it of anything in float32


def run(context):
    tiny = context.options.tiny
    bandwidth = copy_bandwidth(context, 2**20 if tiny else _COPIED)
    for rows, vocab in TINY_SHAPES if tiny else SHAPES:
        for name in our_backends(context.device):
            if context.left() > 0:
                _time(context, name, rows, vocab, bandwidth)


def copy_bandwidth(context, size):
    """Bytes read and written per second by one large copy."""
    a = torch.ones(size, dtype=torch.uint8, device=context.device)
    b = torch.empty_like(a)
    about = row("copy_", "copy", {"bytes": size}, peer=False)
    times = interleaved(context, {"copy_": (about, Timed(lambda: b.copy_(a), ahead=True))}, ROUNDS, context.deadline)["copy_"]
    result = row("copy_", "copy", {"bytes": size}, times, peer=False)
    result["bytes_per_second"] = 2 * size / result["median"]
    context.journal.row(result)
    return result["bytes_per_second"]


def _time(context, name, rows, vocab, bandwidth):
    shape, calls = {"rows": rows, "vocab": vocab}, {}
    module = backends.kernels(backends.resolve(name, context.device, torch.float32))
    about = {kernel: row(name, kernel, shape, peer=False) for kernel in KERNELS if hasattr(module, kernel)}
    wanted = [kernel for kernel in about if not context.already(about[kernel])]
    if not wanted:
        return
    with context.attempt(row(name, "tile", shape, peer=False)):
        case = Case(module, rows, vocab, context.device, context.clock.l2_bytes)
        errors = {}
        for kernel in wanted:
            with context.attempt(about[kernel]):
                errors[kernel] = case.check(kernel)
                calls[kernel] = (about[kernel], Timed(lambda kernel=kernel: case.run(kernel), case.refill, ahead=True))
        for kernel, seconds in interleaved(context, calls, SLOW_ROUNDS if name == "torch" else ROUNDS, context.deadline).items():
            timed = row(name, kernel, shape, [s / len(case.tiles) for s in seconds], peer=False)
            moved = rows * vocab * BYTES[kernel]
            share = moved / timed["median"] / bandwidth
            context.journal.row(timed | {"error": errors[kernel], "bytes": moved, "share": share, "ratio": 1 / share})


class Case:
    """Tiles of one shape with everything that the kernels of a backend take."""

    def __init__(self, module, rows, vocab, device, l2_bytes, seed=0):
        g = torch.Generator(device).manual_seed(seed)
        uniform = lambda: torch.rand(rows, generator=g, device=device)  # noqa: E731
        matrix = lambda dtype: torch.zeros(rows, -(-vocab // 64) * 64, device=device, dtype=dtype)[:, :vocab]  # noqa: E731
        self.module, self.in_place = module, module is backends.native
        self.logits = matrix(torch.float32)
        for some in self.logits.split(64):
            some.copy_(2.5 * torch.randn(some.shape, generator=g, device=device))
        count = 2 if l2_bytes == 0 else max(2, min(8, 1 + 4 * l2_bytes // (4 * rows * vocab)))
        target = torch.randint(0, vocab, (rows,), generator=g, device=device)
        self.tiles = [Tile(matrix(torch.float32), target, LogitTransform()) for _ in range(count)]
        self.out = None if self.in_place else matrix(torch.bfloat16)
        self.stats = new_statistics(rows, torch.float32, device)
        pytorch.statistics(Tile(self.logits, target, LogitTransform()), self.stats)
        self.scored = finalize(self.stats)
        self.g = 2 * uniform() - 1
        self.rows = PolicyRows(
            w_policy=uniform() / rows, advantages=2 * uniform() - 1, old=self.scored.logps - 0.6 * (uniform() - 0.5),
            ref=self.scored.logps + 0.2 * (uniform() - 0.5), w_kl=0.04 * uniform() / rows,
        )  # fmt: skip
        self.written = Scored(*(torch.empty(rows, device=device) for _ in range(3)))
        self.refill()

    def refill(self):
        for tile in self.tiles:
            tile.values.copy_(self.logits)

    def run(self, kernel):
        """The kernel on every tile, one after the other."""
        for tile in self.tiles:
            self._launch(kernel, tile)

    def result(self, kernel):
        """What the kernel computes, of the first rows."""
        self.refill()
        if kernel == "statistics":
            self.stats.copy_(new_statistics(self.stats.shape[0], torch.float32, self.stats.device))
        out = self._launch(kernel, self.tiles[0])
        some = slice(0, _COMPARED)
        if kernel == "statistics":
            return [x.double() for x in finalize(self.stats[some])]
        return [out[some].double(), *(x[some].double() for x in self.written if kernel == "policy")]

    def exact(self, kernel):
        """The same in float64, by the readable kernels and autograd."""
        some = slice(0, _COMPARED)
        wide = lambda x: None if x is None else x[some].double()  # noqa: E731
        tile = Tile(wide(self.logits), self.tiles[0].target[some], LogitTransform())
        stats = new_statistics(tile.values.shape[0], torch.float64, tile.values.device)
        pytorch.statistics(tile, stats)
        scored, out = finalize(stats), torch.empty_like(tile.values)
        if kernel == "statistics":
            return list(scored)
        if kernel == "stash":
            pytorch.stash(tile, out, scored)
        else:
            rows = PolicyRows(*map(wide, vars(self.rows).values()))
            g = wide(self.g) if kernel == "gradient" else row_coefficient(scored.logps, rows, LOSS, linear=False)
            pytorch.gradient(tile, out, scored, g)
        return [out, *(scored if kernel == "policy" else ())]

    def check(self, kernel):
        """The largest relative error of what the kernel computes."""
        largest = 0.0
        for i, (ours, exact) in enumerate(zip(self.result(kernel), self.exact(kernel), strict=True)):
            error = ((ours - exact).norm() / exact.norm()).item()
            allowed = _ALLOWED if i == 0 and kernel != "statistics" else _ALLOWED / 10
            if not error <= allowed:
                raise Wrong(f"relative error {error:.1e} of result {i}, more than {allowed:.0e}")
            largest = max(largest, error)
        return largest

    def _launch(self, kernel, tile):
        """What was written, or the tile."""
        out = tile.values if self.in_place else self.out
        if kernel == "statistics":
            self.module.statistics(tile, self.stats)
        elif kernel == "gradient":
            self.module.gradient(tile, out, self.scored, self.g)
        elif kernel == "stash":
            self.module.stash(tile, out, self.scored)
        else:
            self.module.policy(tile, out, self.rows, kernel_terms(LOSS, linear=False), self.written)
        return out
