"""The compiled row kernels of the CPU: memory, threads and what they refuse. What they compute is in test_row_kernels.py."""

from types import SimpleNamespace

import pytest
import torch
from row_kernels import INF, acc, each_dtype, make_tile, new_stats
from test_row_kernels import Terms, Transform, forward, log_probs

from grpo_kernels.backends import native

if native.why_unavailable():
    pytest.skip(native.why_unavailable(), allow_module_level=True)

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


@each_isa
@each_dtype
def test_same_bits_whatever_the_threads(isa, dtype):
    n, columns = 70, 5001
    tile = make_tile(n, columns, dtype)
    target = torch.randint(0, columns, (n,))
    exact_logps, _ = log_probs(tile.double(), target)
    vector = torch.randn(3, n, dtype=acc(dtype))
    rows = SimpleNamespace(
        old=exact_logps.to(acc(dtype)) + 0.1 * vector[0],
        ref=None,
        advantages=vector[1],
        w_policy=vector[2],
        w_kl=None,
        w_entropy=None,
    )

    def everything():
        made = []
        for probs in (False, True):
            stats, z = new_stats(n, dtype), tile.clone()
            native.statistics(z, stats, target, Transform(), probs=probs, isa=isa)
            made += [stats, z]
        lse, logps, entropy = forward(native, tile, target, Transform(), dict(bias=None, temperature=None))
        for g_entropy in (None, vector[1]):
            z = tile.clone()
            native.gradient(z, target, lse, logps, entropy, vector[0], g_entropy, Transform(), isa=isa)
            made.append(z)
        z, logps, entropy = tile.clone(), torch.empty(n, dtype=acc(dtype)), torch.empty(n, dtype=acc(dtype))
        native.policy(z, target, rows, Terms(), Transform(), logps, entropy, isa=isa)
        out = torch.empty(columns, n, dtype=dtype)
        native.transpose(tile, out, isa=isa)
        return [*made, z, logps, entropy, out]

    first = everything()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, first, everything()))


@each_dtype
def test_no_rows(dtype):
    tile, none, target = (
        torch.empty(0, 7, dtype=dtype),
        torch.empty(0, dtype=acc(dtype)),
        torch.empty(0, dtype=torch.int64),
    )
    native.statistics(tile, torch.empty(0, 4, dtype=acc(dtype)), target, Transform())
    native.gradient(tile, target, none, none, none, none, None, Transform())
    rows = SimpleNamespace(old=none, ref=none, advantages=none, w_policy=none, w_kl=none, w_entropy=none)
    native.policy(tile, target, rows, Terms(), Transform(), none, none)


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
    tile, target, stats = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64), new_stats(3, torch.float32)
    bad = [
        lambda: native.statistics(tile.half(), stats, target, Transform()),
        lambda: native.statistics(tile.T, stats, target, Transform()),
        lambda: native.statistics(tile[:1].expand(3, 8), stats, target, Transform()),
        lambda: native.statistics(tile, stats[:2], target, Transform()),
        lambda: native.statistics(tile, stats.double(), target, Transform()),
        lambda: native.statistics(tile, stats, target.int(), Transform()),
        lambda: native.statistics(tile, stats, target, Transform(), bias=torch.zeros(7)),
        lambda: native.statistics(tile, stats, target, Transform(), temperature=torch.ones(8)),
        lambda: native.statistics(tile.to("meta"), stats, target, Transform()),
        lambda: native.transpose(tile, torch.empty(3, 8)),
        lambda: native.gradient(tile, target, *[torch.zeros(2)] * 4, None, Transform()),
    ]
    for call in bad:
        with pytest.raises(AssertionError):
            call()
    with pytest.raises(ValueError, match="isa"):
        native.statistics(tile, stats, target, Transform(), isa="avx1024")


def test_one_openmp_runtime():
    """torch's threads and ours come from one pool: two would fight over the cores."""
    try:
        with open("/proc/self/maps") as lines:
            runtimes = {line.split()[-1] for line in lines if "libgomp" in line}
    except OSError:
        pytest.skip("no /proc here")
    assert len(runtimes) <= 1, runtimes


@each_isa
def test_exponential_to_two_units_in_the_last_place(isa):
    z = torch.linspace(-87, 0, 100_003).repeat(1, 1)
    zero, g = torch.zeros(1), -torch.ones(1)
    ours = z.clone()
    native.gradient(ours, torch.tensor([-1]), zero, zero, zero, g, None, Transform(), isa=isa)
    exact = z.double().exp()
    assert ((ours.double() - exact).abs() / exact).max() < 2 * 2.0**-23
    ours = torch.tensor([[-88.5, -200.0, -INF, float("nan")]])
    native.gradient(ours, torch.tensor([-1]), zero, zero, zero, g, None, Transform(), isa=isa)
    assert ours[0, :3].tolist() == [0, 0, 0] and ours[0, 3].isnan()


@each_isa
@each_dtype
def test_rows_without_columns_are_left_alone(isa, dtype):
    tile, target, zeros = torch.empty(3, 0, dtype=dtype), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=acc(dtype))
    stats = new_stats(3, dtype)
    native.statistics(tile, stats, target, Transform(), isa=isa)
    assert torch.equal(stats, new_stats(3, dtype))
    native.gradient(tile, target, zeros, zeros, zeros, zeros, None, Transform(), isa=isa)
    native.transpose(tile, torch.empty(0, 3, dtype=dtype), isa=isa)
