"""A product of matrices in Triton whose bits do not depend on its shape: for `batch_invariant` on a GPU.

``out (+)= alpha a @ b`` of a [M, K] and b [K, N]. A program owns a tile of out; its shape, and the steps over K, are a function of
the dtype alone. A library chooses both by M, N and K, and splits K where the tiles are few: a row's sum has another order in
another batch. Here element (i, j) is

    total = out[i, j] or 0;  for each SEGMENT of K, from left to right:  total += alpha * (sum over the segment, step by step)

in float32 (float64 for float64 operands), rounded once to out. So any product may be cut or reordered in M and N, and one that
adds to a float32 ``out`` may be cut between two segments of K. What lies behind an edge is read as 0.

2 M N K operations; a tile of BLOCK_M x BLOCK_N reads K (BLOCK_M + BLOCK_N) elements, most of them from the L2 cache: programs walk
down GROUP rows of tiles before they go right.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .statistics import described, require

SEGMENT = tl.constexpr(1024)  # of K, divides a fixed tile of columns; what is summed in an accumulator of its own
GROUP = tl.constexpr(8)
# (BLOCK_M, BLOCK_N, columns of a step, warps, steps under way). A second accumulator of the tile's size takes 64 registers.
_SHAPES = {torch.bfloat16: (128, 128, 32, 8, 4), torch.float16: (128, 128, 32, 8, 4), torch.float32: (64, 64, 32, 4, 2),
           torch.float64: (32, 32, 32, 4, 2)}  # fmt: skip


@triton.jit
def _add_step(sums, a_ptr, b_ptr, a_at, b_at, of_a, of_b, left, WIDEN: tl.constexpr, STEP: tl.constexpr):
    """sums + a @ b of a step of columns of a and rows of b, of which ``left`` exist; None: all do."""
    if left is not None:
        inside = tl.arange(0, STEP) < left
        of_a, of_b = of_a & inside[None, :], of_b & inside[:, None]
    a, b = tl.load(a_ptr + a_at, mask=of_a, other=0.0), tl.load(b_ptr + b_at, mask=of_b, other=0.0)
    if WIDEN:
        a, b = a.to(sums.dtype), b.to(sums.dtype)
    return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit(do_not_specialize=["K"])
def product_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    out_ptr,  # [M, N] of their dtype or acc
    M,
    N,
    K,
    a_m,
    a_k,
    b_k,
    b_n,
    out_m,
    out_n,
    alpha: tl.float64,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    program, down, right = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * right) * GROUP
    height = tl.minimum(down - first, GROUP)
    first_row = (first + program % (GROUP * right) % height) * BLOCK_M
    first_column = program % (GROUP * right) // height * BLOCK_N
    rows, columns, at = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, STEP)
    # addresses of a tile in 64 bits, inside of it in 32: they take half of the registers
    a_ptr += first_row.to(tl.int64) * a_m
    b_ptr += first_column.to(tl.int64) * b_n
    out_ptr += first_row.to(tl.int64) * out_m + first_column.to(tl.int64) * out_n
    of_a, of_b = rows < M - first_row, columns < N - first_column
    a_at, b_at, out_at = rows * a_m + at[None, :] * a_k, at[:, None] * b_k + columns * b_n, rows * out_m + columns * out_n
    alpha = tl.full((BLOCK_M, BLOCK_N), alpha, ACC)
    if ADD:
        total = tl.load(out_ptr + out_at, mask=of_a & of_b, other=0.0).to(ACC)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, K, SEGMENT):
        steps = tl.minimum(SEGMENT, K - start) // STEP
        sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for _ in range(steps):
            sums = _add_step(sums, a_ptr, b_ptr, a_at, b_at, of_a, of_b, None, WIDEN, STEP)
            a_ptr += STEP * a_k
            b_ptr += STEP * b_k
        left = tl.minimum(SEGMENT, K - start) - steps * STEP
        if left > 0:
            sums = _add_step(sums, a_ptr, b_ptr, a_at, b_at, of_a, of_b, left, WIDEN, STEP)
        total = tl.fma(alpha, sums, total)
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=of_a & of_b)


_INTERPRETED = not isinstance(product_kernel, triton.JITFunction)  # and there the dot of two bfloat16 is that of their bits


def product(a, b, out, add=False, alpha=1.0):
    """``out = alpha a @ b``, or ``out += alpha a @ b``; a wider ``out`` gets the product as it was summed.

    a [M, K] and b [K, N] of one dtype and any strides; out [M, N] of that dtype or float32, in memory of its own.
    """
    (M, K), N = a.shape, b.shape[1]
    dtypes = ", ".join(map(str, _SHAPES))
    require(a.dtype in _SHAPES and b.dtype == a.dtype, f"a and b must share one of {dtypes}, got {a.dtype} and {b.dtype}")
    require(b.shape[0] == K, f"b must be [{K}, N] as a is {tuple(a.shape)}, got {described(b)}")
    acc = torch.float64 if a.dtype == torch.float64 else torch.float32
    fits = out.shape == (M, N) and out.dtype in (a.dtype, acc) and out.device == a.device
    require(fits, f"out must be [{M}, {N}] {a.dtype} or {acc} on {a.device}, got {described(out)}")
    strides = *a.stride(), *b.stride(), *out.stride()
    require(max(map(abs, strides)) < 2**24, f"strides must be below 2^24, got {strides}")
    if M == 0 or N == 0:
        return
    block_m, block_n, step, warps, stages = _SHAPES[a.dtype]
    device = torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext()
    with device:
        product_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
            a, b, out, M, N, K, *strides, float(alpha), ADD=bool(add),
            ACC=tl.float64 if acc == torch.float64 else tl.float32, WIDEN=_INTERPRETED, BLOCK_M=block_m, BLOCK_N=block_n, STEP=step,
            num_warps=warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
