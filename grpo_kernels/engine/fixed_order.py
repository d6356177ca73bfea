"""Products whose sums have one order, whatever is multiplied beside: where they are wanted, where they are to be had, and where a
library's product has their bits.
"""

import os

import torch

from ..backends import native
from ..tracing import constant

_LIBRARY_ROWS = (1024, 512)
_OUR_ROWS = 512  # at once: 1024 of them took a quarter more than twice 512
_CHECKED_COLUMNS = 512  # at once, so that the check needs little memory
_agreements = {}


def batch_invariance(wanted, like):
    """What is wanted: True everything, None what is free, False nothing; None is GRPO_KERNELS_BATCH_INVARIANT where that is 1 or 0.
    RuntimeError where it cannot be had.
    """
    wanted = _of_environment() if wanted is None else wanted
    if wanted and not like.is_cuda and not _has_products(like.dtype):
        why = native.why_unavailable() or f"{like.dtype} has none on a CPU, bfloat16, float32 and float64 have"
        raise RuntimeError(f"batch_invariant cannot be had, it needs compiled products: {why}")
    return wanted


def unless_told(like):
    """True on a CPU that has these products for such hidden states, where the environment does not say otherwise; else None."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else like.dtype
    return True if like.device.type == "cpu" and _of_environment() is None and _has_products(dtype) else None


@constant
def _of_environment():
    given, known = os.environ.get("GRPO_KERNELS_BATCH_INVARIANT"), {None: None, "0": False, "1": True}
    if given not in known:
        raise ValueError(f"GRPO_KERNELS_BATCH_INVARIANT must be 0 or 1, got {given!r}")
    return known[given]


def fixed_products(wanted, like):
    """Whether all products of matrices like this one are to add up in an order that depends on their depth alone: where it is
    ``wanted``, since a library's are faster, which choose it by their shape.
    """
    return bool(wanted) and (like.is_cuda or _has_products(like.dtype))


def fixed_logits(wanted, like):
    """Whether those of logits are, at least: also where that costs nothing, in bfloat16 on a CPU with AMX."""
    return fixed_products(wanted, like) or (wanted is None and not like.is_cuda and _is_free(like.dtype))


@constant
def _has_products(dtype):
    return native.why_unavailable() is None and dtype in native.PRODUCT_DTYPES


@constant
def _is_free(dtype):
    return _has_products(dtype) and dtype == torch.bfloat16 and native.product_isas()[-1] == "amx"


def bfloat16_logits(h, weight, out):
    """``out = h @ weight.T`` on a CPU, each row's bits the same whatever the others; rows or columns of each are adjacent.

    oneDNN's product of 512 or 1024 bfloat16 rows by some thousand columns is 15 % faster than ours, and mostly sums in the same
    order: such pieces are its, once it was seen to agree on random rows, and what is left is ours. By all columns of a vocabulary
    it takes another order, and 10 % longer than ours.
    """
    start = 0
    for height in _LIBRARY_ROWS:
        while len(h) - start >= height and _library_agrees(h[start : start + height], weight, out[start : start + height]):
            torch.mm(h[start : start + height], weight.T, out=out[start : start + height])
            start += height
    for first in range(start, len(h), _OUR_ROWS):
        rows = slice(first, first + _OUR_ROWS)
        native.product(h[rows], weight.T, out[rows], continued=True)


def _library_agrees(h, weight, out):
    """Whether torch.mm of matrices like these has our product's bits: it chooses its way by shape, strides and threads.

    The check's own numbers are random in pairs that cancel, so that each sum is nothing but rounding. Another order then changes a
    tenth of them and more; of sums that do not cancel one in 30,000, which a narrow piece does not show.
    """
    if h.stride(1) != 1 or weight.stride(1) != 1:
        return False
    operands = h.stride(), weight.shape, weight.stride(), out.shape, out.stride()
    key = *operands, torch.get_num_threads(), torch.backends.mkldnn.enabled
    if key not in _agreements:
        generator = torch.Generator().manual_seed(0)
        h, weight = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).normal_(generator=generator) for x in (h, weight))
        half, order = h.shape[1] // 2, torch.randperm(h.shape[1], generator=generator)
        ones, others, last = order.split([half, half, len(order) % 2])
        h[:, others], weight[:, others] = -h[:, ones], weight[:, ones]
        h[:, last] *= 2**-18
        torch.mm(h, weight.T, out=out)
        blocks = zip(weight.split(_CHECKED_COLUMNS), out.split(_CHECKED_COLUMNS, 1), strict=True)
        _agreements[key] = all(_agree(h, columns, product) for columns, product in blocks)
    return _agreements[key]


def _agree(rows, weight, product):
    ours = torch.empty(product.shape, dtype=product.dtype)
    native.product(rows, weight.T, ours, continued=True)
    return torch.equal(product, ours)
