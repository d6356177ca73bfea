"""The product of fixed shape: its value, and that the bits of an element depend on its row and column alone."""

import itertools

import pytest
import torch
from support.problems import DEVICE
from support.row_kernels import NAN, acc
from support.tolerance import assert_no_worse_than_torch

from grpo_kernels.backends import triton

if triton.why_unavailable():
    pytest.skip(triton.why_unavailable(), allow_module_level=True)

from grpo_kernels.backends.products_triton import product

PAIRS = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
         (torch.float64, torch.float64)]  # fmt: skip
each_pair = pytest.mark.parametrize("dtype, wide", PAIRS, ids=lambda d: str(d).removeprefix("torch."))
SEGMENT = 1024


def some(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def of(a, b, wide, **more):
    out = torch.full((len(a), b.shape[1]), NAN, dtype=wide, device=DEVICE)
    product(a, b, out, **more)
    return out


@each_pair
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (3, 130, 70), (129, 37, 64), (5, 7, SEGMENT + 65), (2, 3, 3 * SEGMENT)])
def test_against_float64(dtype, wide, M, N, K):
    a, b, before = some(M, K, dtype=dtype), some(K, N, dtype=dtype), some(M, N, dtype=wide)
    exact, by_torch = a.double() @ b.double(), (a.to(acc(dtype)) @ b.to(acc(dtype))).to(wide)
    floor = 1e-13 if dtype == torch.float64 else 1e-6
    assert_no_worse_than_torch("=", of(a, b, wide), by_torch, exact, 2.0, floor)
    out = before.clone()
    product(a, b, out, add=True, alpha=-0.5)
    by_torch = (before.to(acc(dtype)) - 0.5 * (a.to(acc(dtype)) @ b.to(acc(dtype)))).to(wide)
    assert_no_worse_than_torch("+=", out, by_torch, before.double() - 0.5 * exact, 2.0, floor)


@each_pair
def test_neither_the_other_rows_nor_the_other_columns_change_a_bit(dtype, wide):
    a, b = some(135, 1100, dtype=dtype), some(1100, 140, dtype=dtype)
    whole = of(a, b, wide)
    for rows, columns in (([0], [0]), ([130], slice(3, 9)), ([134, 7, 66], [139, 1]), (slice(60, 70), slice(None))):
        assert torch.equal(of(a[rows], b[:, columns], wide), whole[rows][:, columns])


@each_pair
def test_strides_change_no_bit(dtype, wide):
    a, b = some(70, 300, dtype=dtype), some(300, 66, dtype=dtype)
    whole = of(a, b, wide)
    assert torch.equal(of(a.T.contiguous().T, b.T.contiguous().T, wide), whole)
    frame = torch.full((71, 3 * 67), NAN, dtype=wide, device=DEVICE)
    product(torch.stack([a, a], 2)[..., 1], torch.cat([b[:, :1], b], 1)[:, 1:], frame[:70, 1:199:3])
    assert torch.equal(frame[:70, 1:199:3], whole)
    frame[:70, 1:199:3] = NAN
    assert frame.isnan().all(), "written outside of out"


@pytest.mark.parametrize("dtype, wide", [pair for pair in PAIRS if pair[1] == acc(pair[0])], ids=lambda d: str(d).removeprefix("torch."))
def test_cuts_of_K_between_segments_change_no_bit(dtype, wide):
    """As dH of a whole vocabulary has them."""
    a, b = some(9, 4 * SEGMENT + 100, dtype=dtype), some(4 * SEGMENT + 100, 33, dtype=dtype)
    whole = of(a, b, wide, alpha=0.7)
    for cuts in ((1,), (2, 3), (1, 2, 3, 4)):
        out, bounds = torch.full_like(whole, NAN), [0, *(SEGMENT * i for i in cuts), len(b)]
        for first, last in itertools.pairwise(bounds):
            product(a[:, first:last], b[first:last], out, add=first > 0, alpha=0.7)
        assert torch.equal(out, whole)


@each_pair
def test_nan_stays_in_its_row_and_column(dtype, wide):
    a, b = some(70, 90, dtype=dtype), some(90, 68, dtype=dtype)
    a[66, 89] = NAN
    found = of(a, b, wide)
    assert found.isnan().all(1).nonzero().flatten().tolist() == [66] and found.isnan().sum() == 68
    a[66, 89], b[3, 67] = 0.0, NAN
    assert of(a, b, wide).isnan().all(0).nonzero().flatten().tolist() == [67]


def test_nothing_to_add_up():
    for M, N, K in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        a, b, out = some(M, K), some(K, N), some(M, N)
        before = out.clone()
        product(a, b, out, add=True)
        assert torch.equal(out, before)
        product(a, b, out)
        assert torch.equal(out, torch.zeros_like(out))


def test_wrong_arguments_are_refused():
    a, b, out = some(3, 4), some(4, 5), some(3, 5)
    bad = {
        "must share": lambda: product(a, b.float(), out),
        "got torch.int32": lambda: product(a.int(), b.int(), out),
        "b must be": lambda: product(a, b[1:], out),
        "out must be": lambda: product(a, b, out.T),
        "or torch.float32": lambda: product(a.bfloat16(), b.bfloat16(), out),
    }
    for message, call in bad.items():
        with pytest.raises(AssertionError, match=message):
            call()
