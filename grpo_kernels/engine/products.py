"""Matrix products on tiles: through torch.mm, summed in float32.

On a GPU the products of 16-bit operands write and add float32 themselves (``out_dtype``, torch 2.8 and newer), so that logits
and sums are never rounded on the way, and one product covers the whole vocabulary.

On the CPU everything goes by vocabulary blocks: a bf16 product rounds its result to bf16, so sums over chunks are kept in
float32 and fed block by block from a small bf16 product. oneDNN takes twice as long for ``dz^T h`` on a transposed view as on a
transposed copy (2 cores, AMX, 1024 x 151,936: 270 ms against 130 ms + 20 ms for the copy), so bf16 blocks are transposed first.
"""

import functools
from dataclasses import dataclass

import torch

from ..backends import FLOAT32_TILES, native

_HUGE_PAGE_BYTES = 8 * 2**20
_CAST_BYTES = 16 * 2**20  # of float32 cast at a time at the end of a sum: it stays in a GPU's L2 cache


@dataclass(frozen=True)
class Head:
    """The head's parameters: z = h W^T + scale (h A^T) B^T; the bias is added by the row kernels."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V] in the accumulation dtype
    lora_a: torch.Tensor | None  # [r, D]
    lora_b: torch.Tensor | None  # [V, r]
    lora_scale: float

    def bias_block(self, start, end):
        return None if self.bias is None else self.bias[start:end]

    def adapted(self, h):
        """t = h A^T, [R, r], or None without an adapter."""
        return None if self.lora_a is None else h @ self.lora_a.T

    def logits(self, h, t, start, end, out):
        """out [R, end - start] = the raw logits of a block of the vocabulary, without the bias."""
        multiply(h, self.weight[start:end].T, out)
        if t is not None:
            multiply(t, self.lora_b[start:end].T, out, add=True, alpha=self.lora_scale)

    def tile(self, h, t, columns, out):
        """The whole rows, by blocks of columns."""
        for start, end in blocks(out.shape[1], columns):
            self.logits(h, t, start, end, out[:, start:end])


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_dtype(like, backend):
    """What a tile of logits of these inputs holds: float32 wherever a product can write it and the row kernels can take it."""
    if like.dtype not in (torch.bfloat16, torch.float16):
        return like.dtype
    wide = float32_products(like.device, like.dtype) if like.is_cuda else backend in FLOAT32_TILES
    return torch.float32 if wide else like.dtype


@torch.compiler.assume_constant_result
def float32_products(device, dtype):
    """Whether ``torch.mm`` of 16-bit matrices on this device can write float32."""
    return _accepted("mm", device, dtype)


@torch.compiler.assume_constant_result
def float32_sums(device, dtype):
    """Whether ``torch.addmm`` of 16-bit matrices on this device can add to float32 in place (early out_dtype could not)."""
    return _accepted("addmm", device, dtype)


@functools.cache
def _accepted(product, device, dtype):
    """Tried once for each device; behind the functions above, since torch.compile would trace a cached function itself."""
    if device.type != "cuda":
        return False
    a, out = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        if product == "mm":
            torch.mm(a, a, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # refused for its dtypes, or by a version that has no such argument
        return False
    return True


def sums_directly(like):
    """Whether a product adds to its float32 (or float64) sum itself, without a buffer between."""
    return like.is_cuda and (accumulation_dtype(like.dtype) == like.dtype or float32_sums(like.device, like.dtype))


def multiply(a, b, out, add=False, alpha=1.0):
    """``out = a @ b``, or ``out += alpha a @ b``; a wider ``out`` gets the product as it was summed, never rounded to a's dtype."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=alpha) if add else torch.mm(a, b, out=out)
    elif add and float32_sums(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
    elif float32_products(a.device, a.dtype):
        if add:
            out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=alpha)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # Triton's interpreter on a CPU
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product, alpha=alpha) if add else out.copy_(product)


def blocks(total, step):
    """[0, total) cut into (start, end) of at most ``step``."""
    return blocks_from(0, total, step)


def blocks_from(first, last, step):
    return [(start, min(start + step, last)) for start in range(first, last, step)]


def empty(*shape, like, dtype=None):
    """torch.empty, on huge pages where the kernel offers them: faulting in 300 MiB by 4 KiB pages takes 60 ms."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if out.device.type == "cpu" and out.numel() * out.element_size() >= _HUGE_PAGE_BYTES:
        native.advise_huge_pages(out)
    return out


class KeptMemory:
    """One block of CPU memory that outlives the call that made it, so that the next call's tile need not be faulted in again.

    That costs as much as a twelfth of a call (300 MiB: 40 ms of 500), and far more on a virtual machine whose host has taken the
    freed pages back. Whoever takes the block owns it; what is not given back is simply gone. On a GPU PyTorch's own
    allocator does this.
    """

    def __init__(self):
        self.block = None

    def take(self, rows, columns, like, dtype):
        """[rows, columns] of undefined contents, in the kept block if it is large enough."""
        needed = rows * columns * dtype.itemsize
        if like.device.type != "cpu" or needed < _HUGE_PAGE_BYTES:
            return empty(rows, columns, like=like, dtype=dtype)
        block, self.block = self.block, None
        if block is None or block.numel() < needed:
            block = empty(needed, like=like, dtype=torch.uint8)
        return block[:needed].view(dtype).view(rows, columns)

    def give_back(self, taken):
        if taken.device.type == "cpu" and taken.numel() * taken.element_size() >= _HUGE_PAGE_BYTES:
            block = torch.empty(0, dtype=torch.uint8).set_(taken.untyped_storage())
            if self.block is None or self.block.numel() < block.numel():
                self.block = block


tile_memory = KeptMemory()


class RowSum:
    """A [V, K] gradient, the sum over tiles of ``dz^T x``, built block by block of its rows.

    With one tile every block is one product written in its final dtype. With several, products are added in float32: over
    all of [V, K] if the tiles are outermost (`finish` then casts in place, the final rows at the front of the float32 memory,
    so that no second full copy exists), over one block if the vocabulary is outermost (`close` casts it). Where a product
    cannot add to float32 itself, it passes through a buffer of one block.
    """

    def __init__(self, rows, columns, like, tiles, block, vocabulary_outermost):
        self.dtype = like.dtype
        accumulate = like.dtype if tiles <= 1 else accumulation_dtype(like.dtype)
        self.rounded = accumulate != like.dtype
        block = min(block, rows)
        self.blockwise = self.rounded and vocabulary_outermost
        self.product = None
        if self.rounded and not sums_directly(like):
            wide = accumulate if float32_products(like.device, like.dtype) else like.dtype
            self.product = torch.empty(block, columns, dtype=wide, device=like.device)
        self.sum = empty(block if self.blockwise else rows, columns, like=like, dtype=accumulate)
        self.final = empty(rows, columns, like=like) if self.blockwise else None
        self.started = set()

    def add(self, start, end, dz_t, x):
        """Rows [start, end) += dz_t @ x, with dz_t [end - start, R] and x [R, K]."""
        out = self.sum[: end - start] if self.blockwise else self.sum[start:end]
        first = start not in self.started
        self.started.add(start)
        if self.product is None:
            multiply(dz_t, x, out, add=not first)
        else:
            part = self.product[: end - start]
            multiply(dz_t, x, part)
            out.copy_(part) if first else out.add_(part)

    def close(self, start, end):
        """The block is complete; only called where the vocabulary is outermost."""
        if self.blockwise:
            self.final[start:end].copy_(self.sum[: end - start])

    def finish(self):
        if not self.started:
            return (self.final if self.blockwise else self.sum).to(self.dtype).zero_()
        if self.blockwise:
            return self.final
        if not self.rounded:
            return self.sum
        self.product = None
        rows, columns = self.sum.shape
        memory = self.sum.view(-1).view(self.dtype)
        final = memory[: rows * columns].view(rows, columns)
        step = max(1, min(rows, _CAST_BYTES // (4 * columns)))
        buffer = torch.empty(step, columns, dtype=self.dtype, device=memory.device)
        for start, end in blocks(rows, step):
            # through a small buffer: the first block's float32 rows lie under its own final rows
            final[start:end].copy_(buffer[: end - start].copy_(self.sum[start:end]))
        if memory.device.type == "cpu":
            native.release_pages(memory[rows * columns :])
        self.sum = None
        return final


class Gradients:
    """The gradients of one call, fed with tiles of dz; absent ones cost nothing.

    dz is the gradient of the raw logits, so with t = h A^T and dt = scale dz B:
    dH = dz W + dt A,  dW = dz^T h,  dbias = sum of dz,  dB = scale dz^T t,  dA = dt^T h.
    """

    def __init__(self, hidden, head, needs, tiles, columns, all_rows, vocabulary_outermost=False, shard=None):
        self.head, self.columns, self.shard, self.arriving = head, columns, shard, None
        hidden_needed, weight, bias, a, b = needs
        vocab, depth = head.weight.shape
        accumulate = accumulation_dtype(hidden.dtype)
        if hidden_needed:
            rows = hidden.shape[0]
            self.hidden = empty(rows, depth, like=hidden) if all_rows else hidden.new_zeros(rows, depth)
        else:
            self.hidden = None
        self.weight = RowSum(vocab, depth, hidden, tiles, columns, vocabulary_outermost) if weight else None
        self.bias = torch.zeros(vocab, dtype=accumulate, device=hidden.device) if bias else None
        self.lora_a = torch.zeros(head.lora_a.shape, dtype=accumulate, device=hidden.device) if a else None
        self.lora_b = RowSum(vocab, head.lora_b.shape[1], hidden, tiles, columns, vocabulary_outermost) if b else None
        self.needs_adapter = head.lora_a is not None and (a or hidden_needed)
        self._transposed = None

    def add_block(self, dz, start, end, h, t):
        """dW, dB and dbias from dz [R, end - start], the gradient of a block of the vocabulary."""
        if self.weight is not None or self.lora_b is not None:
            dz_t = self._transpose(dz)
            if self.weight is not None:
                self.weight.add(start, end, dz_t, h)
            if self.lora_b is not None:
                self.lora_b.add(start, end, dz_t, t * self.head.lora_scale)
        if self.bias is not None:
            self.bias[start:end] += dz.sum(0, dtype=self.bias.dtype)

    def close_block(self, start, end):
        for row_sum in (self.weight, self.lora_b):
            if row_sum is not None:
                row_sum.close(start, end)

    def add_tile(self, dz, h, t, rows):
        """Everything from dz [R, V], whole rows; ``rows`` says where in hidden they come from."""
        if self.weight is not None or self.lora_b is not None or self.bias is not None:
            for start, end in blocks(dz.shape[1], self.columns):
                self.add_block(dz[:, start:end], start, end, h, t)
        self.add_hidden(dz, h, rows)

    def add_hidden(self, dz, h, rows):
        """dH and dA from whole rows of dz."""
        if self.hidden is not None:
            contiguous = isinstance(rows, slice)
            dh = torch.mm(dz, self.head.weight, out=self.hidden[rows]) if contiguous else dz @ self.head.weight
            if self.needs_adapter:
                self._adapter(dz @ self.head.lora_b, h, dh)
            self._place(dh, rows, contiguous)
        elif self.lora_a is not None:
            self._adapter(dz @ self.head.lora_b, h, None)

    def add_recomputed(self, dh, db, h, rows):
        """dH from its float32 sum over blocks, dh [R, D], and dz B summed likewise, db [R, r]."""
        if self.needs_adapter or self.lora_a is not None:
            self._adapter(db, h, dh)
        if self.hidden is not None:
            self._place(dh.to(self.hidden.dtype), rows, False)

    def _place(self, dh, rows, is_there):
        """dh into its rows; with a sharded vocabulary once the other ranks' parts have been added, while the next is made."""
        if self.shard is None:
            if not is_there:
                self.hidden[rows] = dh
            return
        self._arrive()
        self.arriving = self.shard.sum_later(dh), dh, None if is_there else rows

    def _arrive(self):
        if self.arriving is not None:
            wait, dh, rows = self.arriving
            wait()
            if rows is not None:
                self.hidden[rows] = dh
            self.arriving = None

    def finish(self, like):
        """(dH, dW, dbias, dA, dB) with an empty tensor for each that was not asked for."""
        self._arrive()
        if self.shard is not None and self.lora_a is not None:
            self.shard.sum_now(self.lora_a)
        done = (
            self.hidden,
            None if self.weight is None else self.weight.finish(),
            self.bias,
            None if self.lora_a is None else self.lora_a.to(like.dtype),
            None if self.lora_b is None else self.lora_b.finish(),
        )
        return tuple(like.new_empty(0) if x is None else x for x in done)

    def _adapter(self, dz_b, h, dh):
        dt = dz_b * self.head.lora_scale
        if self.lora_a is not None:
            self.lora_a.addmm_(dt.T.to(self.lora_a.dtype), h.to(self.lora_a.dtype))
        if dh is not None:
            dh.addmm_(dt.to(dh.dtype), self.head.lora_a.to(dh.dtype))

    def _transpose(self, dz):
        if dz.device.type != "cpu" or dz.dtype != torch.bfloat16 or native.why_unavailable() is not None:
            return dz.T
        rows, columns = dz.shape
        if self._transposed is None or self._transposed.numel() < rows * columns:
            self._transposed = empty(rows * max(columns, self.columns), like=dz)
        out = self._transposed[: rows * columns].view(columns, rows)
        native.transpose(dz, out)
        return out
