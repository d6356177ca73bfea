"""The product in C++: right within the rounding of its sums, and the same bits whatever else is in the call."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels.backends import native

pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason="there is no compiled extension")
ISAS = native.product_isas() if native.why_unavailable() is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def called(dtype):
    return str(dtype).removeprefix("torch.")


# "amx" is of bfloat16: the others' code is that of "avx512"
KINDS = [(isa, dtype) for isa in ISAS for dtype in DTYPES if isa != "amx" or dtype == torch.bfloat16]
each_kind = pytest.mark.parametrize("isa, dtype", KINDS, ids=[f"{isa}-{called(dtype)}" for isa, dtype in KINDS])


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def placed(values, turned=False, spare=3, offset=1):
    """The same numbers in memory of other strides and alignment, with NaN on every side."""
    rows, columns = values.shape[::-1] if turned else values.shape
    memory = torch.full((rows + 2, columns + spare + offset), math.nan, dtype=values.dtype)
    view = memory[1 : rows + 1, offset : offset + columns]
    view = view.T if turned else view
    return view.copy_(values)


def product(a, b, out_dtype=None, before=None, **options):
    """In memory of NaN, or in a copy of ``before``."""
    if before is None:
        before = torch.full((a.shape[0], b.shape[1]), math.nan, dtype=out_dtype or a.dtype)
    out = placed(before, spare=5)
    native.product(a, b, out, **options)
    got, memory = out.clone(), out._base
    out.fill_(math.nan)
    assert memory.isnan().all(), "nothing is written beside out"
    return got


def draw(seed, M, N, K, dtype):
    torch.manual_seed(seed)
    return torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SHAPES = [(1, 1, 1), (33, 47, 65), (1, 300, 1000), (300, 1, 1030), (129, 90, 1100), (17, 513, 31), (520, 40, 40), (5, 7, 3001)]


@pytest.mark.cover("isa", "dtype")
@each_kind
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_it_is_the_product_within_the_rounding_of_its_sums(isa, dtype, M, N, K):
    a, b = draw(0, M, N, K, dtype)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for (a_turned, b_turned), out_dtype in itertools.product(itertools.product((False, True), repeat=2), {dtype, acc(dtype)}):
        operands = placed(a, a_turned), placed(b, b_turned)
        before = torch.randn(M, N).to(out_dtype)
        for options in ({}, {"add": True}, {"alpha": 0.37}, {"alpha": 0.37, "add": True}, {"continued": True},
                        {"continued": True, "add": True}):
            if len(options) == 2 and "continued" in options and out_dtype != acc(dtype):
                continue
            kept = before.double() if "add" in options else torch.zeros(M, N, dtype=torch.float64)
            got = product(*operands, before=before, isa=isa, **options)
            wanted = kept + options.get("alpha", 1.0) * exact
            # random rounding of a sum of K numbers: within 4 sqrt(K) of its largest partial sum's half unit, and the last rounding
            bound = (
                4 * K**0.5 * torch.finfo(acc(dtype)).eps * (size + kept.abs()) + 0.51 * torch.finfo(out_dtype).eps * wanted.abs()
            )
            assert ((got.double() - wanted).abs() <= bound).all(), (a_turned, b_turned, out_dtype, options)


@each_kind
def test_sums_are_chains_of_1024_in_ascending_order(isa, dtype):
    """1 + 2^-24 - 1 and the like: what a sum loses tells its order."""
    if isa == "amx" and dtype == torch.bfloat16:
        pytest.skip("inside of 32 k the order is the instruction's own")
    tiny = torch.finfo(acc(dtype)).eps / 4
    row = torch.zeros(1, 3000, dtype=dtype)
    one = torch.ones(3000, 1, dtype=dtype)
    row[0, [0, 5, 1023]] = torch.tensor([1.0, tiny, -1.0], dtype=dtype)  # lost beside 1
    assert product(row, one, isa=isa, out_dtype=acc(dtype)).item() == 0
    row[0, 1023], row[0, 1030] = 0, -1  # the chain that ends at 1023 is 1
    row[0, 1029] = tiny
    assert product(row, one, isa=isa, out_dtype=acc(dtype)).item() == 0
    row[0, 1030], row[0, 2047] = 0, tiny
    assert product(row, one, isa=isa, out_dtype=acc(dtype)).item() == 1, "two times a quarter, summed before they meet 1"
    row[0, [1029, 1500, 2047]] = 2 * tiny * 1.0
    assert product(row, one, isa=isa, out_dtype=acc(dtype)).item() > 1, "three halves in a chain of their own are not lost"
    assert product(row, one, isa=isa, before=torch.zeros(1, 1, dtype=acc(dtype)), add=True, continued=True).item() == 1, (
        "in one chain they are"
    )


@each_kind
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_bits_depend_on_row_and_column_alone(isa, dtype, data):
    """Not on M, N, position, strides, transposition, alignment, neighbours or threads."""
    pick = data.draw
    K = pick(st.sampled_from((1, 31, 64, 900, 1024, 1025, 2500)))
    M, N = pick(st.sampled_from((1, 16, 33, 150, 300))), pick(st.sampled_from((1, 16, 40, 200, 330)))
    a, b = draw(pick(st.integers(0, 99)), M, N, K, dtype)
    out_dtype = pick(st.sampled_from((dtype, acc(dtype))))
    options = pick(st.sampled_from(({}, {"add": True}, {"alpha": 0.7}, {"alpha": 0.7, "add": True})))
    before = torch.randn(M, N).to(out_dtype)
    whole = product(a, b, before=before, isa=isa, **options)
    for _ in range(3):
        rows = torch.randperm(M)[: pick(st.integers(1, M))]
        columns = torch.randperm(N)[: pick(st.integers(1, N))]
        torch.set_num_threads(pick(st.sampled_from((1, 2, 3, 16))))
        some_a = placed(a[rows], pick(st.booleans()), pick(st.integers(0, 40)), pick(st.integers(0, 3)))
        some_b = placed(b[:, columns], pick(st.booleans()), pick(st.integers(0, 40)), pick(st.integers(0, 3)))
        some = product(some_a, some_b, before=before[rows][:, columns], isa=isa, **options)
        assert same(some, whole[rows][:, columns])


@pytest.mark.cover("isa", "dtype")
@each_kind
@pytest.mark.parametrize("M, N, K", [(40, 1100, 1500), (1100, 40, 1500), (600, 600, 300), (40, 36, 30000)])
def test_large_and_many_threaded(isa, dtype, M, N, K):
    """Sizes at which rows come in chunks, columns in groups and K in calls, beside the same rows one panel at a time."""
    a, b = draw(1, M, N, K, dtype)
    for b_turned, alpha in ((False, 1.0), (True, 0.5)):
        b = placed(b, b_turned)
        whole = product(a, b, alpha=alpha, isa=isa)
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            assert same(product(placed(a, True), b, alpha=alpha, isa=isa), whole)
        rows, columns = slice(M // 2, M // 2 + 20), slice(N // 3, N // 3 + 21)
        assert same(product(a[rows], b[:, columns], alpha=alpha, isa=isa), whole[rows, columns])


@each_kind
def test_a_cut_of_k_changes_no_bit(isa, dtype):
    K = 3100
    a, b = draw(2, 37, 70, K, dtype)
    before = torch.randn(37, 70).to(acc(dtype))
    added, continued = (product(a, b, before=before, isa=isa, add=True, continued=how) for how in (False, True))
    assert not same(added, continued)
    for cuts in ([1024], [2048], [1024, 2048, 3072]):
        parts = before
        for begin, end in zip([0, *cuts], [*cuts, K], strict=True):
            parts = product(a[:, begin:end], b[begin:end], before=parts, add=True, isa=isa)
        assert same(parts, added), cuts
    step = 32 if isa == "amx" and dtype == torch.bfloat16 else 1
    for cuts in ([step], [96, 128, 1024], [1000 // step * step, 1024 + step, 3000 // step * step]):
        parts = before
        for begin, end in zip([0, *cuts], [*cuts, K], strict=True):
            parts = product(a[:, begin:end], b[begin:end], before=parts, add=True, continued=True, isa=isa)
        assert same(parts, continued), cuts
    # from nothing, and rounded at the end where there is no cut
    at_once, in_two = (torch.zeros(37, 70, dtype=acc(dtype)) for _ in range(2))
    native.product(a, b, at_once, continued=True, isa=isa)
    native.product(a[:, :1024], b[:1024], in_two, continued=True, isa=isa)
    native.product(a[:, 1024:], b[1024:], in_two, add=True, continued=True, isa=isa)
    rounded = torch.empty(37, 70, dtype=dtype)
    native.product(a, b, rounded, continued=True, isa=isa)
    assert same(in_two, at_once) and same(rounded, at_once.to(dtype))


@each_kind
@pytest.mark.parametrize("M, N, K", [(20, 45, 50), (60, 90, 1030)])
def test_nan_and_infinity_stay_in_their_row_and_column(isa, dtype, M, N, K):
    a, b = draw(3, M, N, K, dtype)
    clean = product(a, b, isa=isa)
    for value, turned in itertools.product((math.nan, math.inf), (False, True)):
        bad_a, bad_b = a.clone(), b.clone()
        bad_a[M - 1, K - 1], bad_a[M // 2, 0], bad_b[K // 2, N - 1] = value, value, value
        got = product(placed(bad_a, turned), placed(bad_b, turned), isa=isa)
        hit = torch.zeros(M, N, dtype=torch.bool)
        hit[[M - 1, M // 2]], hit[:, N - 1] = True, True
        assert same(got[~hit], clean[~hit]) and not got[hit].isfinite().any()


@each_kind
def test_nothing_to_sum_and_nothing_to_write(isa, dtype):
    for M, N in ((0, 5), (5, 0), (0, 0)):
        native.product(torch.empty(M, 3, dtype=dtype), torch.empty(3, N, dtype=dtype), torch.empty(M, N, dtype=dtype), isa=isa)
    a, b = torch.empty(4, 0, dtype=dtype), torch.empty(0, 6, dtype=dtype)
    assert same(product(a, b, isa=isa), torch.zeros(4, 6, dtype=dtype))
    before = torch.randn(4, 6).to(acc(dtype))
    assert same(product(a, b, before=before, add=True, isa=isa), before)
    assert same(product(a, b, before=before, add=True, continued=True, isa=isa), before)


def test_rows_of_no_stride():
    row, b = torch.randn(1, 70), torch.randn(70, 50)
    for isa in ISAS:
        wanted = product(row, b, isa=isa).expand(40, 50)
        out = torch.full((40, 50), math.nan)
        native.product(row.expand(40, 70), b, out, isa=isa)
        assert same(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=called)
def test_refusals(dtype):
    a, b, out = torch.zeros(4, 6, dtype=dtype), torch.zeros(6, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    square, shared = torch.zeros(6, 6, dtype=dtype), torch.zeros(60, dtype=dtype)
    for arguments, message in (
        ((a.half(), b.half(), out.half()), "a must be a matrix of float32"),
        ((a, b.to(other), out), "b must be a matrix of"),
        ((a[0], b, out), "a must be a matrix"),
        ((torch.zeros(8, 12, dtype=dtype)[::2, ::2], b, out), "a's rows or columns must be adjacent"),
        ((a, torch.zeros(12, 16, dtype=dtype)[::2, ::2], out), "b's rows or columns must be adjacent"),
        ((a, b.T, out), "b must have 6 rows"),
        ((a, b, out[:3]), "out must be"),
        ((a, b, out.to(torch.float16)), "out must be"),
        ((a, b, torch.zeros(8, 4, dtype=dtype).T), "out's columns must be adjacent"),
        ((square, square, square), "out must be other memory"),
        ((shared[:24].view(4, 6), b, shared[20:52].view(4, 8)), "out must be other memory"),
        ((torch.zeros(4, 6, dtype=dtype, device="meta"), b, out), "a must be a matrix"),
    ):
        with pytest.raises(AssertionError, match=message):
            native.product(*arguments)
    right = torch.zeros(4, 8, dtype=acc(dtype))
    with pytest.raises(AssertionError, match="continued goes with"):
        native.product(a, b, right, continued=True, alpha=0.5)
    if dtype == torch.bfloat16:
        with pytest.raises(AssertionError, match="continued goes with"):
            native.product(a, b, out, add=True, continued=True)
    with pytest.raises(ValueError, match="isa 'none' was not built"):
        native.product(a, b, out, isa="none")
