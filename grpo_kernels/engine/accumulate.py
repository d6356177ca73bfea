"""The gradients of one call, fed with dz: dH = dz W, dW = dz^T h, and those of bias and adapter.

dz is the gradient of the raw logits, so with t = h A^T and dt = lora_scale dz B:
dH = dz W + dt A,  dW = dz^T h,  dbias = sum of dz,  dB = lora_scale dz^T t,  dA = dt^T h.
A wide stash holds dz / factor, with one factor a row: it scales the rows of h, t and dH instead, and dbias is a product with it.
"""

import torch

from ..backends import native
from .products import accumulation_dtype, blocks, empty, float32_sums

_PRODUCT_BYTES = 64 * 2**20  # of a product that is added to a sum by a second step
_CAST_BYTES = 16 * 2**20  # of float32 that are cast first at the end of a sum


class WeightSum:
    """A [V, K] gradient: the sum of ``additions`` products ``dz^T x``, each built block by block of its rows.

    With one product every block is written in its final dtype. With several they are added in float32: over one block if the
    vocabulary is outermost (`close` casts it), over all of [V, K] else (`finish` casts in place, the final rows at the front of
    the float32 memory, so that no second full copy exists). A library's products of 16-bit inputs on a CPU cannot write float32:
    each passes through a buffer of the plan's columns in the inputs' dtype.
    """

    def __init__(self, rows, columns, like, additions, run, block=None):
        self.dtype, self.multiply, wide, most = like.dtype, run.multiply, run.wide, run.plan.columns
        accumulate = like.dtype if additions <= 1 else accumulation_dtype(like.dtype)
        self.rounded = accumulate != like.dtype
        self.blockwise = self.rounded and block is not None
        height = min(block or rows, rows)
        self.product, self.step = None, height
        if self.rounded and not run.fixed and not (wide and (like.device.type == "cpu" or float32_sums(like.device, like.dtype))):
            self.step = max(1, min(height, most, _PRODUCT_BYTES // (max(columns, 1) * accumulate.itemsize)))
            self.product = torch.empty(self.step, columns, dtype=accumulate if wide else like.dtype, device=like.device)
        self.sum = empty(height if self.blockwise else rows, columns, like=like, dtype=accumulate)
        self.final = empty(rows, columns, like=like) if self.blockwise else None
        self.reached = 0  # rows that have their first product: every pass goes from left to right

    def add(self, start, end, dz_t, x):
        """Rows [start, end) += dz_t @ x, with dz_t [end - start, R] and x [R, K]."""
        out = self.sum[: end - start] if self.blockwise else self.sum[start:end]
        first, self.reached = end > self.reached, max(end, self.reached)
        if self.product is None:
            self.multiply(dz_t, x, out, add=not first, continued=True)
            return
        for low, high in blocks(end - start, self.step):
            part = self.product[: high - low]
            self.multiply(dz_t[low:high], x, part)
            out[low:high].copy_(part) if first else out[low:high].add_(part)

    def close(self, start, end):
        """The block is complete; only called where the vocabulary is outermost."""
        if self.blockwise:
            self.final[start:end].copy_(self.sum[: end - start])

    def finish(self):
        if not self.reached:
            return (self.final if self.blockwise else self.sum).to(self.dtype).zero_()
        if self.blockwise:
            return self.final
        if not self.rounded:
            return self.sum
        self.product = None
        rows, columns = self.sum.shape
        memory = self.sum.view(-1).view(self.dtype)
        final = memory[: rows * columns].view(rows, columns)
        start, end = 0, max(1, min(rows, _CAST_BYTES // (4 * max(columns, 1))))
        final[:end].copy_(self.sum[:end].to(self.dtype))  # through memory of its own: it lies under its own final rows
        while end < rows:  # the final rows [a, b) end before the float32 row a begins where b <= 2 a
            start, end = end, min(2 * end, rows)
            final[start:end].copy_(self.sum[start:end])
        if memory.device.type == "cpu":
            native.release_pages(memory[rows * columns :])
        self.sum = None
        return final


class Gradients:
    """The gradients of a `Run`; absent ones cost nothing.

    ``additions``: how many buffers of dz each row of dW is the sum of. ``block``: columns of a block, the vocabulary outermost.
    """

    def __init__(self, run, additions, block=None):
        self.run, self.arriving, self._transposed = run, None, None
        hidden, head, work = run.rows.hidden, run.head, run.work
        needs_hidden, needs_weight, needs_bias, needs_a, needs_b = work.needs
        vocab, depth = head.weight.shape
        zeros = lambda like: torch.zeros(like.shape, dtype=run.accumulate, device=hidden.device)  # noqa: E731
        of_weight = lambda width: WeightSum(vocab, width, hidden, additions, run, block)  # noqa: E731
        self.hidden = None
        if needs_hidden:  # rows that are not computed, or have no gradient, stay 0
            self.hidden = empty(*hidden.shape, like=hidden) if run.all_live else torch.zeros_like(hidden)
        self.weight = of_weight(depth) if needs_weight else None
        self.bias = zeros(head.bias) if needs_bias else None
        self.lora_a = zeros(head.lora_a) if needs_a else None
        self.lora_b = of_weight(head.lora_b.shape[1]) if needs_b else None
        self.needs_adapter = head.lora_a is not None and (needs_a or needs_hidden)

    def add_block(self, dz, start, end, h, t, factor=None):
        """dW, dB and dbias from dz [R, end - start], the gradient of a block of the vocabulary; h and t have the factor in them."""
        if self.weight is not None or self.lora_b is not None:
            dz_t = self._transpose(dz)
            if self.weight is not None:
                self.weight.add(start, end, dz_t, h)
            if self.lora_b is not None:
                self.lora_b.add(start, end, dz_t, t * self.run.work.lora_scale)
        if self.bias is not None:
            if factor is None:
                self.bias[start:end] += dz.sum(0, dtype=self.bias.dtype)
            else:
                self.run.multiply(factor.to(dz.dtype).unsqueeze(0), dz, self.bias[start:end].unsqueeze(0), add=True)

    def close_block(self, start, end):
        for row_sum in (self.weight, self.lora_b):
            if row_sum is not None:
                row_sum.close(start, end)

    def add(self, dz, h, t, where, factor=None):
        """Everything from dz [R, V], whole rows; ``where`` in hidden they come from. ``factor`` [R]: dz is ``factor * dz``."""
        self.add_hidden(dz, h, where, factor)
        if factor is not None:
            h, t = ((x * factor.unsqueeze(1)).to(x.dtype) if x is not None else None for x in (h, t))
        if self.weight is not None or self.lora_b is not None or self.bias is not None:
            for start, end in blocks(dz.shape[1], self.run.plan.columns):
                self.add_block(dz[:, start:end], start, end, h, t, factor)

    def add_hidden(self, dz, h, where, factor):
        """dH and dA from whole rows of dz, some rows at a time: their float32 sums are rounded once."""
        if self.hidden is None and self.lora_a is None:
            return
        weight = self.run.head.weight
        for start, end in blocks(dz.shape[0], self.run.plan.dh_rows):
            s, dh, is_there = slice(start, end), None, False
            place = slice(where.start + start, where.start + end) if isinstance(where, slice) else where[s]
            if self.hidden is not None:
                is_there = isinstance(place, slice) and factor is None and not (self.run.wide or self.run.fixed)
                if self.run.wide or self.run.fixed:
                    dh = self._over_blocks(dz[s], weight, self.run.accumulate)
                else:
                    dh = torch.mm(dz[s], weight, out=self.hidden[place]) if is_there else dz[s] @ weight
            self.add_rows(dh, self._adapter_product(dz[s]), h[s], place, is_there, None if factor is None else factor[s])

    def add_rows(self, dh, dz_b, h, where, is_there=False, factor=None):
        """dH of some rows from their products dz W [R, D] and, with an adapter, dz B [R, r]."""
        if dz_b is not None:
            dt, a = dz_b * self.run.work.lora_scale, self.run.head.lora_a
            if self.lora_a is not None:
                own = dt if factor is None else dt * factor.unsqueeze(1)
                self.run.multiply(own.T.to(self.lora_a.dtype), h.to(self.lora_a.dtype), self.lora_a, add=True, continued=True)
            if dh is not None:
                self.run.multiply(dt.to(dh.dtype), a.to(dh.dtype), dh, add=True)
        if dh is not None:
            dh = dh if factor is None else dh.mul_(factor.unsqueeze(1))
            self._place(dh.to(self.hidden.dtype), where, is_there)

    def _adapter_product(self, dz):
        if not self.needs_adapter:
            return None
        return self._over_blocks(dz, self.run.head.lora_b, self.run.accumulate if self.run.fixed else self.run.tile_dtype)

    def _over_blocks(self, dz, factor, dtype):
        """dz factor; a product of a fixed order packs what it reads, so it gets a block of the vocabulary at a time."""
        step = self.run.plan.columns if self.run.fixed else max(1, dz.shape[1])
        out = torch.empty(dz.shape[0], factor.shape[1], dtype=dtype, device=dz.device)
        for left, right in blocks(dz.shape[1], step) or [(0, 0)]:
            self.run.multiply(dz[:, left:right], factor[left:right], out, add=left > 0)
        return out

    def _place(self, dh, where, is_there):
        """dh into its rows; with a sharded vocabulary once the other ranks' parts have been added, while the next is made."""
        shard = self.run.work.shard
        if shard is None:
            if not is_there:
                self.hidden[where] = dh
            return
        self._arrive()
        self.arriving = shard.sum_later(dh), dh, None if is_there else where

    def _arrive(self):
        if self.arriving is not None:
            wait, dh, where = self.arriving
            wait()
            if where is not None:
                self.hidden[where] = dh
            self.arriving = None

    def finish(self):
        """[dH, dW, dbias, dA, dB] with an empty tensor for each that was not asked for."""
        self._arrive()
        like, shard = self.run.rows.hidden, self.run.work.shard
        if shard is not None and self.lora_a is not None:
            shard.sum_now(self.lora_a)
        done = (
            self.hidden,
            None if self.weight is None else self.weight.finish(),
            self.bias,
            None if self.lora_a is None else self.lora_a.to(like.dtype),
            None if self.lora_b is None else self.lora_b.finish(),
        )
        return [like.new_empty(0) if x is None else x for x in done]

    def _transpose(self, dz):
        """dz^T as the products take it: oneDNN needs twice as long for a transposed view as for a copy, see products.py."""
        if dz.device.type != "cpu" or dz.dtype != torch.bfloat16 or self.run.fixed or native.why_unavailable() is not None:
            return dz.T
        rows, columns = dz.shape
        if self._transposed is None or self._transposed.numel() < rows * columns:
            self._transposed = empty(rows * columns, like=dz)
        out = self._transposed[: rows * columns].view(columns, rows)
        native.transpose(dz, out)
        return out
