"""Matrix products on tiles, summed in float32: through torch.mm, or in an order that no shape changes.

On a GPU the products of 16-bit operands write and add float32 themselves (``out_dtype``, torch 2.8 and newer), so that logits
and sums are never rounded on the way, and one product covers the whole vocabulary.

On the CPU everything goes by vocabulary blocks: a bf16 product rounds its result to bf16, so sums over chunks are kept in
float32 and fed block by block from a small bf16 product. oneDNN takes twice as long for ``dz^T h`` on a transposed view as on a
transposed copy (2 cores, AMX, 1024 x 151,936: 270 ms against 130 ms + 20 ms for the copy), so bf16 blocks are transposed first.
"""

import functools
import mmap
import sys

import torch

from ..backends import FLOAT32_TILES, native, triton
from ..tracing import constant
from . import fixed_order

_HUGE_PAGE_BYTES = 8 * 2**20


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_dtype(like, backend):
    """What a tile of logits of these inputs holds: float32 wherever a product can write it and the row kernels can take it."""
    if like.dtype not in (torch.bfloat16, torch.float16):
        return like.dtype
    wide = float32_products(like.device, like.dtype) if like.is_cuda else backend in FLOAT32_TILES
    return torch.float32 if wide else like.dtype


@constant
def float32_products(device, dtype):
    """Whether ``torch.mm`` of 16-bit matrices on this device can write float32."""
    return _accepted("mm", device, dtype)


@constant
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


def adapted(h, lora_a, fixed=False):
    """t = h A^T in h's dtype."""
    t = h.new_empty(h.shape[0], lora_a.shape[0])
    multiply(h, lora_a.T, t, fixed=fixed)
    return t


def write_logits(h, weight, out, t=None, lora_b=None, scale=1.0, fixed=False):
    """``out = h @ weight.T``, with an adapter plus ``scale t @ lora_b.T``; ``fixed`` as of `fixed_order.fixed_logits`."""
    if fixed and not out.is_cuda and out.dtype == torch.bfloat16:
        fixed_order.bfloat16_logits(_adjacent(h), _adjacent(weight), out)
    else:
        multiply(h, weight.T, out, fixed=fixed, continued=fixed and not out.is_cuda)
    if t is not None:
        multiply(t, lora_b.T, out, add=True, alpha=scale, fixed=fixed)


def multiply(a, b, out, add=False, alpha=1.0, fixed=False, continued=False):
    """``out = a @ b``, or ``out += alpha a @ b``; a wider ``out`` gets the product as it was summed, never rounded to a's dtype.

    ``fixed``: as of `fixed_order.fixed_products`. ``continued``: then one sum over all of the depth, whose cuts change no bit.
    """
    if fixed:
        if out.is_cuda:
            triton.product_kernels.product(a, b, out, add=add, alpha=alpha)
        else:
            native.product(_adjacent(a), _adjacent(b), out, add=add, alpha=alpha, continued=continued)
    elif out.dtype == a.dtype:
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


def _adjacent(matrix):
    """With adjacent numbers in its rows or columns."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


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


def zeros(like):
    """torch.zeros_like, contiguous; a large one on the CPU is fresh pages of the system, which cost nothing until they are touched.

    To fill 272 MB takes 27 to 60 ms; a gradient of few rows touches few pages.
    """
    size = like.numel() * like.element_size()
    if like.device.type != "cpu" or size < _HUGE_PAGE_BYTES or not sys.platform.startswith("linux"):
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


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

    def give_back(self, taken, most):
        """Keeps the block for the next call if it has at most so many bytes."""
        if taken.device.type == "cpu" and _HUGE_PAGE_BYTES <= taken.numel() * taken.element_size() <= most:
            block = torch.empty(0, dtype=torch.uint8).set_(taken.untyped_storage())
            if self.block is None or self.block.numel() < block.numel():
                self.block = block


tile_memory = KeptMemory()
