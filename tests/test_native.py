"""The compiled row kernels of the CPU: memory, threads and what they refuse. What they compute is in test_row_kernels.py."""

import math
import re
from pathlib import Path

import pytest
import torch
from support.row_kernels import acc, each_dtype, log_probs, make_tile

from grpo_kernels.backends import native, params, pytorch
from grpo_kernels.backends.comparison import KINDS as DIVERGENCES
from grpo_kernels.backends.comparison import Compared, DivergenceKind, compare, new_comparison
from grpo_kernels.backends.statistics import Pairs, Scored, Tile, finalize, new_statistics
from grpo_kernels.losses.config import LogitTransform
from grpo_kernels.losses.terms import KINDS, PolicyRows, PolicyTerms

if native.why_unavailable():
    pytest.skip(native.why_unavailable(), allow_module_level=True)

PLAIN = LogitTransform()
CLIPPED = PolicyTerms(kind="clipped")
each_isa = pytest.mark.parametrize("isa", native.isas())


pytestmark = pytest.mark.usefixtures("one_thread")  # small tiles; test_same_bits_whatever_the_threads has more


@each_isa
@each_dtype
def test_transpose(isa, dtype):
    for rows, columns, spare in [
        (1, 1, 0),
        (1, 700, 0),
        (700, 1, 3),
        (32, 32, 0),
        (33, 65, 7),
        (96, 1100, 1),
        (31, 515, 0),
    ]:
        tile = make_tile(rows, columns, dtype, spare)
        tile[0, 0] = float("nan")
        out = torch.full((columns, rows), float("nan"), dtype=dtype)
        native.transpose(tile, out, isa=isa)
        torch.testing.assert_close(out, tile.T, rtol=0, atol=0, equal_nan=True)
    native.transpose(torch.empty(0, 5, dtype=dtype), torch.empty(5, 0, dtype=dtype), isa=isa)


def test_kinds_are_numbered_alike():
    """The kernels are handed a kind's place in KINDS."""
    header = Path(__file__).parent.parent.joinpath("csrc", "params.h").read_text()
    (names,) = re.findall(r"enum class PolicyKind : int \{ ([\w, ]+) \};", header)
    assert tuple(names.split(", ")) == KINDS


def nan(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


def scored_like(vector):
    return Scored(*(torch.full_like(vector, math.nan) for _ in Scored._fields))


@each_isa
@each_dtype
def test_same_bits_whatever_the_threads_and_the_place(isa, dtype):
    """Results over the tile and in memory of another stride are the same, and a tile whose result goes elsewhere stays."""
    n, columns = 70, 5001
    raw = make_tile(n, columns, dtype)
    target = torch.randint(0, columns, (n,))
    exact_logps, _ = log_probs(raw.double(), target)
    vector = torch.randn(3, n, dtype=acc(dtype))
    rows = PolicyRows(w_policy=vector[2], advantages=vector[1], old=exact_logps.to(acc(dtype)) + 0.1 * vector[0])

    def everything(in_place):
        made = []

        def result_of(kernel, values, transform, *args, **more):
            values = values.clone()
            before, out = values.clone(), values if in_place else nan(n, columns + 3, dtype=dtype)[:, :columns]
            kernel(Tile(values, target, transform), out, *args, isa=isa, **more)
            assert in_place or torch.equal(values, before)
            made.append(out)
            return out

        for transform in (PLAIN, LogitTransform(1.3, 5.0, 0.7)):
            stats = new_statistics(n, acc(dtype), "cpu")
            native.statistics(Tile(raw, target, transform), stats, isa=isa)
            scored, scored_by_policy = finalize(stats), scored_like(vector[0])
            for g_entropy in (None, vector[1]):
                result_of(native.gradient, raw, transform, scored, vector[0], g_entropy)
            result_of(native.policy, raw, transform, rows, CLIPPED, scored_by_policy)
            made += [stats, *scored_by_policy]
        out = nan(columns, n, dtype=dtype)
        native.transpose(raw, out, isa=isa)
        return [*made, out]

    first = everything(in_place=True)
    for threads, in_place in ((1, False), (2, True), (3, False)):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, first, everything(in_place)))


@pytest.mark.cover
@each_isa
@each_dtype
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_kernels_over_two_tiles_same_bits_whatever_the_threads_and_the_place(isa, dtype, kind):
    n, columns = 70, 5001
    values = make_tile(n, columns, dtype)
    teacher_values = values + 0.3 * make_tile(n, columns, dtype, 1)
    target, vector, divergence = torch.randint(0, columns, (n,)), torch.randn(3, n, dtype=acc(dtype)), DivergenceKind(kind, 0.3)

    def everything(in_place):
        made = []
        for transform in (PLAIN, LogitTransform(1.3, 5.0, 0.7)):
            teacher, stats = Tile(teacher_values.clone(), target, transform), new_comparison(n, acc(dtype), "cpu")
            native.divergence_statistics(Tile(values, target, transform), teacher, stats, kind, isa=isa)
            scored, found = compare(stats, kind)
            sums = torch.zeros(n, 2, dtype=acc(dtype))
            native.jensen_shannon(Tile(values, target, transform), teacher, scored, found.gap, sums, 0.3, isa=isa)
            at_once = Scored(*torch.empty(3, n, dtype=acc(dtype))), Compared(*torch.empty(3, n, dtype=acc(dtype)))
            student = values.clone()
            out = student if in_place else nan(n, columns + 3, dtype=dtype)[:, :columns]
            native.divergence(Tile(student, target, transform), teacher, out, vector[0], divergence, *at_once, isa=isa)
            made += [stats, sums, out, *at_once[0], *at_once[1]]
            for more in ((), tuple(vector[1:])):
                student = values.clone()
                out = student if in_place else nan(n, columns + 3, dtype=dtype)[:, :columns]
                tile = Tile(student, target, transform)
                native.divergence_gradient(tile, teacher, out, scored, found, vector[0], divergence, *more, isa=isa)
                made.append(out)
            assert torch.equal(teacher.values, teacher_values)
        return made

    first = everything(in_place=True)
    assert not any(x.isnan().any() for x in first)
    for threads, in_place in ((1, False), (2, True), (3, False)):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, first, everything(in_place)))


@each_isa
@each_dtype
def test_pair_kernels_same_bits_whatever_the_threads_and_the_other_pairs(isa, dtype):
    """Ranges of many lengths, which pieces of work cut anywhere."""
    lengths = torch.tensor([1, 2, 500, 0, 3, 64, 129, 1, 0, 40])
    last, K, V = lengths.cumsum(0), 300, 50
    ids, ranges = torch.randint(-1, V + 1, (int(last[-1]),)), torch.stack([last - lengths, last], 1)
    hidden, weight, g = make_tile(10, K, dtype, 3), make_tile(V, K, dtype), torch.randn(len(ids)).to(acc(dtype))

    def everything(rows):
        logits, sums, wide = nan(len(ids), dtype=acc(dtype)), nan(10, K, dtype=dtype), nan(10, K, dtype=acc(dtype))
        for some in rows:
            pairs = Pairs(ids, ranges[some].contiguous(), some)
            native.pair_logits(pairs, hidden, weight, logits, isa=isa)
            for out in (sums, wide):
                native.pair_sums(pairs, g, weight, out, isa=isa)
        return logits, sums[lengths > 0], wide[lengths > 0]

    first = everything([torch.arange(10)])
    assert not any(x.isnan().any() for x in first)
    for threads, rows in ((2, [torch.arange(10)]), (3, [torch.arange(10).flip(0)]), (2, torch.arange(10).split(1))):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, first, everything(rows)))


@each_isa
@each_dtype
@pytest.mark.parametrize("rows, columns", [(0, 7), (3, 0)])
def test_nothing_to_do(isa, dtype, rows, columns):
    tile = Tile(torch.empty(rows, columns, dtype=dtype), torch.zeros(rows, dtype=torch.int64), PLAIN)
    zeros = torch.zeros(rows, dtype=acc(dtype))
    scored, stats = Scored(zeros, zeros, zeros), new_statistics(rows, acc(dtype), "cpu")
    native.statistics(tile, stats, isa=isa)
    assert torch.equal(stats, new_statistics(rows, acc(dtype), "cpu"))
    native.gradient(tile, tile.values, scored, zeros, isa=isa)
    native.policy(tile, tile.values, PolicyRows(zeros, zeros), CLIPPED, scored_like(zeros), isa=isa)
    native.transpose(tile.values, torch.empty(columns, rows, dtype=dtype), isa=isa)


def test_pages():
    size = 3 << 20
    tensor = torch.ones(size + 5, dtype=torch.uint8)[3:]
    native.advise_huge_pages(tensor)
    assert tensor.sum() == size + 2
    native.release_pages(tensor)  # what shares a page with a neighbour stays
    assert tensor.sum() < 2 * 4096 or not torch.backends.cpu.get_cpu_capability()
    tensor.fill_(2)
    assert tensor.sum() == 2 * (size + 2)
    native.release_pages(torch.empty(0))


def test_wrong_arguments_are_refused():
    values, target, vector = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    tile, stats, scored = Tile(values, target, PLAIN), new_statistics(3, torch.float32, "cpu"), Scored(vector, vector, vector)
    other, both, ranges = torch.zeros(3, 8), torch.zeros(3, 20), torch.zeros(3, 2, dtype=torch.int64)
    bad = {
        "tile must be": [
            lambda: native.statistics(Tile(values.half(), target, PLAIN), stats),
            lambda: native.statistics(Tile(values.to("meta"), target, PLAIN), stats),
        ],
        "tile's columns": [
            lambda: native.statistics(Tile(values.T, target, PLAIN), stats),
            lambda: native.statistics(Tile(values[:1].expand(3, 8), target, PLAIN), stats),
        ],
        "stats must be": [
            lambda: native.statistics(tile, stats[:2]),
            lambda: native.statistics(tile, stats.double()),
            lambda: native.statistics(tile, stats.T.contiguous().T),
        ],
        "target must be": [lambda: native.statistics(Tile(values, target.int(), PLAIN), stats)],
        "bias must be": [lambda: native.statistics(Tile(values, target, PLAIN, bias=torch.zeros(7)), stats)],
        "temperature must be": [lambda: native.statistics(Tile(values, target, PLAIN, temperature=torch.ones(8)), stats)],
        "matrix must be": [lambda: native.transpose(values.half(), other.T)],
        "matrix's columns": [lambda: native.transpose(values.T, other)],
        "out must be contiguous": [lambda: native.transpose(values, torch.empty(3, 8))],
        "logps must be": [lambda: native.gradient(tile, values, Scored(vector[:2], vector, vector), vector)],
        "entropy must be": [lambda: native.gradient(tile, values, Scored(vector, vector, None), vector)],
        "g must be": [lambda: native.gradient(tile, values, scored, None), lambda: native.gradient(tile, values, scored, vector[:2])],
        "g_entropy must be": [lambda: native.gradient(tile, values, scored, vector, vector.double())],
        "old must be": [lambda: native.policy(tile, values, PolicyRows(vector, vector, old=vector[:1]), CLIPPED, scored)],
        "ids must be": [lambda: native.pair_logits(Pairs(target.int(), ranges), values, other, vector)],
        "ranges must be": [lambda: native.pair_sums(Pairs(target, ranges[:, :1]), vector, values, other)],
        "per_pair must be": [lambda: native.pair_sums(Pairs(target, ranges), vector.double(), values, other)],
        "per_row must have 4 rows": [lambda: native.pair_sums(Pairs(target, torch.zeros(4, 2, dtype=torch.int64)), vector, values, other)],
        "matrices must be": [lambda: native.pair_sums(Pairs(target, ranges), vector, values.half(), other)],
        "must share a dtype": [lambda: native.pair_logits(Pairs(target, ranges), values, other.bfloat16(), vector)],
        "advantages are missing": [lambda: native.policy(tile, values, PolicyRows(vector), CLIPPED, scored)],
        "w_kl is missing": [lambda: native.policy(tile, values, PolicyRows(None, ref=vector), CLIPPED, scored)],
        "kind must be": [lambda: native.policy(tile, values, PolicyRows(None), PolicyTerms(kind="clip"), scored)],
        r"out must be \(3, 8\)": [
            lambda: native.gradient(tile, values[:, :7], scored, vector),
            lambda: native.gradient(tile, other.bfloat16(), scored, vector),
        ],
        "out's columns": [lambda: native.gradient(tile, torch.zeros(8, 3).T, scored, vector)],
        "the tile's own memory": [
            lambda: native.gradient(Tile(both[:, :8], target, PLAIN), both[:, 4:12], scored, vector),
            lambda: native.gradient(Tile(both[:, :8], target, PLAIN), both.view(-1)[:24].view(3, 8), scored, vector),
            lambda: native.gradient(Tile(both.view(-1)[10:34].view(3, 8), target, PLAIN), both.view(-1)[:24].view(3, 8), scored, vector),
        ],
    }
    for message, calls in bad.items():
        for call in calls:
            with pytest.raises(AssertionError, match=message):
                call()
    assert not both.any() and not values.any()
    with pytest.raises(ValueError, match="isa"):
        native.statistics(tile, stats, isa="avx1024")
    with pytest.raises(ValueError, match="another csrc/params.h"):  # a struct of another kernel, as of another version
        native._native.gradient("", 1, params.statistics(tile, stats))


def test_one_openmp_runtime():
    """torch's threads and ours come from one pool: two would fight over the cores."""
    try:
        with open("/proc/self/maps") as lines:
            runtimes = {line.split()[-1] for line in lines if "libgomp" in line}
    except OSError:
        pytest.skip("no /proc here")
    assert len(runtimes) <= 1, runtimes


def gradient_of(values, transform=PLAIN, isa=None):
    """p, as far as float32 holds it: the gradient for g = -1 of a row without a target."""
    zero, out = torch.zeros(1), nan(*values.shape, dtype=values.dtype)
    tile = Tile(values, torch.tensor([-1]), transform)
    native.gradient(tile, out, Scored(zero, zero, zero), zero - 1, isa=isa)
    return out


@each_isa
def test_exponential_to_two_units_in_the_last_place(isa):
    z = torch.linspace(-87, 0, 100_003).repeat(1, 1)
    exact = z.double().exp()
    assert ((gradient_of(z, isa=isa).double() - exact).abs() / exact).max() < 2 * 2.0**-23
    ours = gradient_of(torch.tensor([[-88.5, -200.0, -math.inf, math.nan]]), isa=isa)
    assert ours[0, :3].tolist() == [0, 0, 0] and ours[0, 3].isnan()


@each_isa
def test_the_softcaps_derivative_keeps_its_digits_near_the_cap(isa):
    """1 - tanh^2 of it cancels: at 8 times the cap no digit of float32 would be left."""
    transform, u = LogitTransform(softcap=2.0), torch.linspace(-30, 30, 4001)
    z, exact = (u * 2.0).repeat(1, 1), (2 * u.double().tanh()).exp() / u.double().cosh().square()
    error = (gradient_of(z, transform, isa).double() - exact).abs() / exact
    assert error.max() < 1e-5, error.max()  # the argument of the derivative's exponential is off by 60 * 2^-24
    for target in (0, 700, 4000):  # by itself, on the way of a scalar
        tile, vector = Tile(z, torch.tensor([target]), transform), torch.ones(1)
        ours, truth = torch.empty_like(z), torch.empty_like(z).double()
        scored = Scored(-vector, 3 * vector, vector)
        native.gradient(tile, ours, scored, vector, isa=isa)
        pytorch.gradient(Tile(z.double(), tile.target, transform), truth, Scored(*(x.double() for x in scored)), vector.double())
        torch.testing.assert_close(ours[0, target].double(), truth[0, target], rtol=1e-5, atol=0)
