"""The floor: the matrix products that a workload cannot do without, multiplied in the fastest way that is found.

Logits of every kept row, dH and, unless the head is frozen, dW of every row that is trained; nothing else. Outputs exist already
and are overwritten: no sum is counted, no copy of dz. A row's logits are whole before its gradient begins, as a softmax needs them.
Over supports there is no floor: no product of matrices is left. Beside a teacher its logits are one product more, and stay
as long as the student's do.

The ways: chunks of some rows or all; the vocabulary whole or in blocks; dz^T as a transposed view or contiguous. All are timed
twice, the best twice more, on the tensors that are measured then. The row says which was the fastest.
"""

import itertools
from dataclasses import asdict, dataclass

import torch

from ..engine.chunks import padded
from .peers import Absent
from .problem import Result

ROWS = (256, 512, 1024, None)
COLUMNS = (None, 32_768, 8_192)
_FINALS, _CALLS = 3, 2
_SHARE_OF_MEMORY = 0.7


@dataclass(frozen=True)
class Way:
    rows: int  # of a chunk
    columns: int  # of a block of the vocabulary
    contiguous: bool  # dz^T, where dW is wanted


class Floor:
    """The products of one problem; calling it runs them in the fastest way."""

    def __init__(self, p, clock):
        if p.support is not None:
            raise Absent("a support leaves no product of matrices")
        self.p = p
        self.rows = p.hidden.flatten(0, 1)[p.mask.flatten()]
        self.live = p.live if p.workload.gradients else 0
        self.trains_head = bool(self.live) and p.workload.trains_head
        self.dh = torch.empty_like(self.rows)
        self.dw = torch.empty_like(p.weight) if self.trains_head else None
        ways, V, size = self._ways(clock.free()), p.shape.vocab, p.hidden.element_size()
        tallest = max(way.rows for way in ways)
        # each way lays its own matrix out in this memory, with rows on 128 bytes, as the products like it
        self.z = self.rows.new_empty(tallest * padded(V, size))
        # ordinary numbers: a product of zeros or NaN takes another time
        self.dz_t = self.rows.new_empty(V * padded(tallest, size)).normal_() if self.trains_head else None
        self.teacher = None if p.heads == 1 else p.teacher_hidden.flatten(0, 1)[p.mask.flatten()]
        self.y = torch.empty_like(self.z) if p.heads == 2 else None
        self.seconds = {way: self._time(way, clock) for way in ways}
        for way in sorted(ways, key=self.seconds.get)[:_FINALS]:
            self.seconds[way] = min(self.seconds[way], self._time(way, clock))
        self.way = min(self.seconds, key=self.seconds.get)

    @property
    def settings(self) -> dict:
        return {**asdict(self.way), "ways": len(self.seconds)}

    def __call__(self):
        self.run(self.way)
        return Result()

    def run(self, way):
        weight, V = self.p.weight, self.p.shape.vocab
        z, dz_t = _matrix(self.z, way.rows, V), _matrix(self.dz_t, V, way.rows) if way.contiguous else None
        blocks = [slice(c, c + way.columns) for c in range(0, V, way.columns)]
        for start in range(0, len(self.rows), way.rows):
            h = self.rows[start : start + way.rows]
            tile, live = z[: len(h)], min(max(self.live - start, 0), len(h))
            for block in blocks:
                torch.mm(h, weight[block].T, out=tile[:, block])
            if self.teacher is not None:
                y, t = _matrix(self.y, way.rows, V)[: len(h)], self.teacher[start : start + way.rows]
                for block in blocks:
                    torch.mm(t, self.p.teacher_weight[block].T, out=y[:, block])
            for block in blocks if live else ():
                torch.mm(tile[:live, block], weight[block], out=self.dh[start : start + live])
            for block in blocks if live and self.trains_head else ():
                torch.mm(dz_t[block, :live] if way.contiguous else tile[:live, block].T, h[:live], out=self.dw[block])

    def _ways(self, free):
        kept, V = max(1, len(self.rows)), self.p.shape.vocab
        heights = sorted({min(rows or kept, kept) for rows in ROWS})
        logits = V * self.rows.element_size() * (self.p.heads + self.trains_head)
        fits = [r for r in heights if free is None or r * logits < _SHARE_OF_MEMORY * free] or heights[:1]
        widths = sorted({min(columns or V, V) for columns in COLUMNS})
        return [Way(*way) for way in itertools.product(fits, widths, (False, True) if self.trains_head else (False,))]

    def _time(self, way, clock):
        return min(clock.seconds(lambda: self.run(way)) for _ in range(_CALLS))


def _matrix(memory, rows, columns):
    stride = padded(columns, memory.element_size())
    return memory[: rows * stride].view(rows, stride)[:, :columns]
