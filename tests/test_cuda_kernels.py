"""The CUDA kernels on the host, beside what test_row_kernels.py asks of every backend: barriers, launch shapes, alignment, errors."""

import ctypes
import itertools
import math
import mmap
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import cuda_host
from support.cases import usually
from support.cuda_host import KEPT, TWICE, sanitizer_libraries
from support.row_kernels import DEVICE, log_probs, make_tile
from support.tolerance import assert_no_worse_than_torch

from grpo_kernels import build_cuda
from grpo_kernels.backends import cuda
from grpo_kernels.backends.comparison import KINDS, Compared, DivergenceKind, compare, new_comparison
from grpo_kernels.backends.statistics import Pairs, Scored, Tile, finalize, new_statistics
from grpo_kernels.losses.config import LogitTransform as Transform
from grpo_kernels.losses.terms import PolicyRows, PolicyTerms

if cuda_host.why_unavailable() or DEVICE != "cpu":
    pytest.skip(cuda_host.why_unavailable() or "they are tested on the device", allow_module_level=True)

SENTINEL = 12345.0
PLAIN = Transform()
ROWS, COLUMNS = 3, 4096 + 37  # several steps of 64 threads, and a rest that is no whole unit
TERMS = PolicyTerms("clipped", epsilon_high=0.28, use_bias_correction_kl=False)
# Every kernel that writes, in every variant: (kernel, launch). Clusters with blocks that have nothing to do among them.
LAUNCHES = [("gradient", TWICE, 0), ("policy", TWICE, 0), *(("policy", KEPT, blocks) for blocks in (1, 2, 4, 8))]
PAIRS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16),
         (torch.float16, torch.float16), (torch.float64, torch.float64)]  # fmt: skip
each_launch = pytest.mark.parametrize("kernel, variant, cluster", LAUNCHES, ids=lambda x: str(x))
each_pair = pytest.mark.parametrize("dtype, narrow", PAIRS, ids=lambda d: str(d).removeprefix("torch."))


def acc_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem(dtype, columns=COLUMNS, rows=ROWS):
    """Everything the kernels are given; row 1 is idle."""
    acc = acc_of(dtype)
    logits, target = make_tile(rows, columns, dtype), torch.randint(0, columns, (rows,))
    logps, entropy = log_probs(logits.to(acc), target)
    vector = torch.randn(6, rows, dtype=acc)
    g = vector[5]
    weights = PolicyRows(vector[3].abs() + 0.1, vector[2], logps + 0.1 * vector[0], logps + 0.1 * vector[1], vector[4].abs())
    g[1:2] = weights.w_policy[1:2] = weights.w_kl[1:2] = 0
    return SimpleNamespace(logits=logits, target=target, weights=weights, scored=Scored(logps, logits.to(acc).logsumexp(1), entropy), g=g)


def linear(w_policy):
    return PolicyRows(w_policy), PolicyTerms("linear")


def scored_like(vector):
    return Scored(*(torch.full_like(vector, float("nan")) for _ in Scored._fields))


def call(kernel, p, values, out=None, transform=PLAIN, **launch):
    """Runs a kernel on a tile, by default in place; returns the vectors it writes, [3, R] or none."""
    tile, out = Tile(values, p.target, transform), values if out is None else out
    if kernel == "gradient":
        cuda_host.gradient(tile, out, p.scored, p.g, **launch)
    else:
        scored = scored_like(p.g)
        cuda_host.policy(tile, out, p.weights, TERMS, scored, **launch)
        return torch.stack(scored)
    return torch.zeros(0)


def statistics(p, values, stats=None, target=None, **launch):
    stats = new_statistics(len(values), acc_of(values.dtype), "cpu") if stats is None else stats
    cuda_host.statistics(Tile(values, p.target if target is None else target, PLAIN), stats, **launch)
    return stats


def expected_of(kernel, p, dtype):
    """What the kernel writes, from PyTorch in this dtype."""
    z = p.logits.to(dtype).detach().requires_grad_()
    logps, _ = log_probs(z, p.target)
    if kernel == "gradient":
        loss = (p.g.to(dtype) * logps).sum()
    else:
        w = {k: v.to(dtype) for k, v in vars(p.weights).items() if v is not None}
        ratio = (logps - w["old"]).exp()
        clipped = torch.min(ratio * w["advantages"], ratio.clamp(0.8, 1.28) * w["advantages"])
        k3 = (w["ref"] - logps).exp() - (w["ref"] - logps) - 1
        loss = (w["w_policy"] * -clipped + w["w_kl"] * k3).sum()
    return torch.autograd.grad(loss, z)[0]


def framed(values, spare, offset):
    """The values inside a block of sentinels, `offset` elements from a 16-byte boundary: (tile, frame, its untouched part)."""
    rows, columns = values.shape
    stride = columns + spare
    memory = torch.full(((rows + 2) * stride + offset + 64,), SENTINEL, dtype=values.dtype)
    start = stride + offset
    start += -(memory.data_ptr() // values.element_size() + start - offset) % (16 // values.element_size())
    tile = memory.as_strided((rows, columns), (stride, 1), start)
    tile.copy_(values)
    inside = torch.zeros(memory.shape, dtype=torch.bool)
    inside.as_strided((rows, columns), (stride, 1), start).fill_(True)
    return tile, memory, ~inside


def in_place(tile, narrow):
    """The tile's own memory where its dtype is that of the result, memory of another stride otherwise."""
    return tile if narrow == tile.dtype else framed(torch.full(tile.shape, float("nan"), dtype=narrow), 3, 0)[0]


# ---- barriers


@each_launch
@each_pair
def test_the_same_bits_whatever_order_the_threads_run_in(kernel, variant, cluster, dtype, narrow):
    p = problem(dtype)
    expected = None
    for seed in range(1, 7):
        tile = p.logits.clone()
        out = in_place(tile, narrow)
        # the first seeds yield at every access: threads run as far apart as the barriers let them
        written = call(kernel, p, tile, out, variant=variant, cluster=cluster, threads=64, seed=seed, yield_one_in=1 if seed < 4 else 50)
        expected = expected or (out, written)
        assert torch.equal(out, expected[0]) and torch.equal(written, expected[1]), f"the order of seed {seed}"
    exact = expected_of(kernel, p, torch.float64)
    assert_no_worse_than_torch(kernel, expected[0], expected_of(kernel, p, narrow), exact, 2.0, 1e-12 if dtype == torch.float64 else 4e-6)
    assert (expected[0][1] == 0).all()


@pytest.mark.parametrize("variant, cluster", [(TWICE, 0), (KEPT, 2)])
def test_an_idle_row_becomes_zeros_whatever_it_holds(variant, cluster):
    """A coefficient handed in as 0 makes zeros of a row of NaN; one that comes of its log-prob is NaN itself."""
    values, w = torch.full((2, 700), float("nan")), torch.tensor([0.0, 1.0])
    cuda_host.policy(Tile(values, torch.tensor([3, 4]), PLAIN), values, *linear(w), scored_like(w), variant=variant, cluster=cluster)
    assert (values[0] == 0).all() and values[1].isnan().all()


@pytest.mark.parametrize("variant, cluster", [(TWICE, 0), (KEPT, 2)])
def test_the_target_of_a_confident_row_keeps_its_digits(variant, cluster):
    """Its gradient is 1 - p, which float32 cannot take from p = 1 - 6e-8."""
    values, one = torch.zeros(1, 700), torch.ones(1)
    values[0, 5] = 23.0
    exact = 699 / (699 + torch.tensor(23.0, dtype=torch.float64).exp())
    cuda_host.policy(Tile(values, torch.tensor([5]), PLAIN), values, *linear(one), scored_like(one), variant=variant, cluster=cluster)
    torch.testing.assert_close(values[0, 5].double(), exact, rtol=1e-5, atol=0)


# ---- launch shapes


@each_launch
def test_launch_shapes_agree(kernel, variant, cluster):
    p = problem(torch.float32)
    exact, by_torch = expected_of(kernel, p, torch.float64), expected_of(kernel, p, torch.float32)
    for threads in (0, 32, 96, 256, 448 if variant == KEPT else 1024):
        tile = p.logits.clone()
        written = call(kernel, p, tile, variant=variant, cluster=cluster, threads=threads)
        assert_no_worse_than_torch(f"{threads}", tile, by_torch, exact, 2.0, 4e-6)
        if kernel == "policy":
            logps, entropy = log_probs(p.logits.double(), p.target)
            expected = torch.stack([logps, p.logits.double().logsumexp(1), entropy])
            torch.testing.assert_close(written.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("variant, cluster", [(TWICE, 0), (KEPT, 2), (KEPT, 8)])
@pytest.mark.parametrize("columns", [2, 3, 5, 31, 127, 257, 1023])
def test_rows_shorter_than_a_step(columns, variant, cluster):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        p = problem(dtype, columns, 2)
        tile, memory, outside = framed(p.logits, spare=3, offset=1)
        call("policy", p, tile, variant=variant, cluster=cluster, threads=64)
        exact, by_torch = expected_of("policy", p, torch.float64), expected_of("policy", p, dtype)
        assert_no_worse_than_torch(f"{columns}", tile, by_torch, exact, 2.0, 1e-12 if dtype == torch.float64 else 4e-6)
        assert (memory[outside] == SENTINEL).all()


def test_folding_into_statistics_that_are_there_already():
    p = problem(torch.float32)
    whole, stats = statistics(p, p.logits), new_statistics(ROWS, torch.float32, "cpu")
    for first, end in itertools.pairwise((0, 1, 1700, 1701, COLUMNS)):
        statistics(p, p.logits[:, first:end], stats, p.target - first, threads=64)
    for ours, theirs, exact in zip(finalize(stats), finalize(whole), finalize(whole.double()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(theirs.double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(finalize(whole).logps, p.scored.logps, rtol=2e-6, atol=2e-6)


def library():
    return cuda.loaded(str(cuda_host.built()))


def test_the_device_and_stream_of_the_tile(monkeypatch):
    """And the caller's device is current again."""
    p = problem(torch.float32, 64, 2)
    library().shim_launched_in.restype = ctypes.c_void_p
    monkeypatch.setattr(cuda, "_place", lambda values: {"device": 1, "stream": 0x5A0})
    kernels = cuda.Kernels(cuda_host.built())
    kernels.statistics(Tile(p.logits, p.target, PLAIN), new_statistics(2, torch.float32, "cpu"))
    assert library().shim_launched_on() == 1 and library().shim_launched_in() == 0x5A0 and library().shim_device() == 0


def test_a_library_of_other_sources_is_not_used(tmp_path):
    """One that was left by another version would be handed structs it does not know."""
    fingerprint = build_cuda.fingerprint()
    assert cuda.why_unusable(cuda_host.built((f'-DGRPO_SOURCES="{fingerprint}"', "-O1"))) is None
    assert "from other sources" in cuda.why_unusable(cuda_host.built())
    nothing = tmp_path / "empty.so"
    nothing.write_bytes(b"")
    assert "cannot be loaded" in cuda.why_unusable(nothing)
    (tmp_path / "csrc").mkdir()
    for name in build_cuda.SOURCES:
        shutil.copy(cuda_host.CSRC / name, tmp_path / "csrc")
    (tmp_path / "csrc" / "params.h").write_text("// other")
    assert build_cuda.fingerprint(tmp_path / "csrc") != fingerprint


# ---- memory


@each_launch
@each_pair
def test_nothing_else_is_written_at_any_alignment(kernel, variant, cluster, dtype, narrow):
    """Pointers off the 16-byte path, odd strides: the same bits, and every sentinel stands."""
    p = problem(dtype)
    launch = dict(variant=variant, cluster=cluster, threads=64)
    results = []
    for spare, offset in ((3, 0), (8, 1), (5, 3), (1, 2), (16 - COLUMNS % 16, 0)):
        separate, out_memory, out_outside = framed(torch.zeros(ROWS, COLUMNS, dtype=narrow), spare=spare + 1, offset=offset)
        tile, memory, outside = framed(p.logits, spare, offset)
        written = call(kernel, p, tile, separate, **launch)
        assert torch.equal(tile, p.logits), "a tile whose result goes elsewhere stays"
        results.append((separate.clone(), written))

        if narrow == dtype:
            written = call(kernel, p, tile, **launch)
            results.append((tile.clone(), written))
        assert (memory[outside] == SENTINEL).all() and (out_memory[out_outside] == SENTINEL).all()
    for result, written in results[1:]:
        assert torch.equal(result, results[0][0]) and torch.equal(written, results[0][1])


def test_a_target_beyond_32_bits_is_in_no_tile():
    """Its lower half would be a column."""
    p = problem(torch.float32, 64, 2)
    results = [statistics(p, p.logits, target=target) for target in (torch.tensor([-1, -1]), torch.tensor([2**32 + 3, -(2**32) + 5]))]
    assert torch.equal(*results) and results[0][:, 3].isneginf().all()


def test_statistics_leave_the_tile():
    p = problem(torch.bfloat16)
    tile, memory, outside = framed(p.logits, 3, 1)
    statistics(p, tile, threads=64)
    assert torch.equal(tile, p.logits) and (memory[outside] == SENTINEL).all()


def test_the_softcaps_derivative_keeps_its_digits_near_the_cap():
    """1 - tanh^2 of it cancels: at 8 times the cap no digit of float32 would be left."""
    u, zero = torch.linspace(-30, 30, 999), torch.zeros(1)
    values, exact = (u * 2.0).repeat(1, 1), (2 * u.double().tanh()).exp() / u.double().cosh().square()
    tile = Tile(values, torch.tensor([-1]), Transform(softcap=2.0))
    cuda_host.gradient(tile, values, Scored(zero, zero, zero), zero - 1)
    error = (values.double() - exact).abs() / exact
    assert error.max() < 1e-5, error.max()  # the argument of the derivative's exponential is off by 60 * 2^-24


def test_rows_and_strides_beyond_32_bits():
    """Row 1 lies 2^31 elements behind row 0, in memory that is reserved and never touched."""
    stride = 2**31 + 64
    reserved = mmap.mmap(-1, 2 * (stride + 256), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    tile = torch.frombuffer(reserved, dtype=torch.bfloat16).as_strided((2, 256), (stride, 1))
    p = problem(torch.bfloat16, 256, 2)
    for (kernel, variant, cluster), out in itertools.product(LAUNCHES, (None, tile)):
        tile.copy_(p.logits)
        call(kernel, p, tile, out, variant=variant, cluster=cluster, threads=32)
        torch.testing.assert_close(tile.double(), expected_of(kernel, p, torch.float64), rtol=1e-2, atol=1e-5)


# ---- the pure functions


def test_shared_memory_and_cluster_size():
    assert [cuda_host.shared_memory(c) >> 10 for c in (75, 80, 86, 89, 90, 100, 120)] == [48, 163, 99, 99, 227, 227, 99]
    for capability, element_size in itertools.product((80, 86, 89, 90, 100, 120), (2, 4, 8)):
        widths = (1, 1000, 32_000, 65_536, 128_256, 151_936, 262_144, 10**7)
        sizes = [cuda_host.cluster_size(columns, element_size, capability) for columns in widths]
        assert set(sizes) <= {0, 1, 2, 4, 8}
        if capability < 90:
            assert set(sizes) == {0}
            continue
        fitting = [s for s in sizes if s]
        assert fitting == sorted(fitting) and fitting[0] == 1 and sizes[-1] == 0
        for columns, blocks in zip(widths, sizes, strict=True):
            assert blocks == 0 or columns * element_size / blocks < cuda_host.shared_memory(capability)
    assert cuda_host.cluster_size(151_936, 4, 90) == 8 and cuda_host.cluster_size(151_936, 2, 90) == 4
    assert cuda_host.cluster_size(32_000, 4, 90) == 2 and cuda_host.cluster_size(262_144, 4, 120) == 0


def test_threads():
    """Warps that have as many pieces of 1024 columns each, but for the last round; in no block more than may be."""
    for columns, element_size, visits, cluster in itertools.product((1, 37, 2048, 32_000, 65_536, 151_936, 10**7), (2, 4, 8), (1, 2), (1, 4, 8)):
        threads, pieces = cuda_host.threads_of(columns, element_size, visits, cluster), -(-columns // 1024)
        most = (512 if element_size == 8 else 1024) if visits == 2 and columns >= 65_536 else 448
        of_block = -(-pieces // cluster)
        rounds = -(-of_block // (threads // 32))
        assert threads % 32 == 0 and 32 <= threads <= most and rounds == -(-of_block // (most // 32))
        assert rounds * threads // 32 - of_block < rounds
    assert cuda_host.threads_of(151_936, 4, 2) == 960, "one row per multiprocessor, so that the second read is cached"
    for columns, element_size in itertools.product((1, 37, 2048, 32_000, 65_536, 151_936), (2, 4, 8)):
        assert cuda_host.threads_of_two_tiles(columns, element_size) in (32, 64, 128, 256, 512)


def test_block_memory():
    """What a block is given holds its share of the row; the blocks' shares are the row."""
    for columns, element_size, cluster in itertools.product((1, 37, 4133, 32_000, 128_256, 151_936), (2, 4, 8), (1, 2, 4, 8)):
        bytes = cuda_host.block_memory(columns, element_size, cluster) - cuda_host.block_memory(columns, element_size, 0)
        row = -(-columns * element_size // 16) * 16
        assert row <= bytes * cluster and bytes <= row / cluster + 1024 * element_size and bytes % 16 == 0
    assert cuda_host.block_memory(151_936, 4, 8) == 8224 + 19 * 4096, "149 pieces of 4 KB"


@each_pair
def test_every_launch_shape_gives_the_same_bits(dtype, narrow):
    """Neither threads nor blocks change what is added to what."""
    for columns in (37, 700, 12_288 + 5, 27_001):
        p, expected, stats = problem(dtype, columns, 2), None, None
        for (variant, cluster), threads in itertools.product([(TWICE, 0), *itertools.product([KEPT], [1, 2, 4, 8])], (0, 32, 96, 448)):
            result = torch.empty(p.logits.shape, dtype=narrow)
            written = call("policy", p, p.logits, result, variant=variant, cluster=cluster, threads=threads, yield_one_in=1000)
            expected = expected or (result, written)
            assert torch.equal(result, expected[0]) and torch.equal(written, expected[1]), (columns, variant, cluster, threads)
            folded = statistics(p, p.logits, threads=threads, yield_one_in=1000)
            stats = folded if stats is None else stats
            assert torch.equal(folded, stats), (columns, threads)


@pytest.mark.parametrize("dtype, columns", [(torch.float32, 98_304 + 5), (torch.bfloat16, 270_336 + 3)])
def test_the_longest_rows(dtype, columns):
    """Of more tiles than lanes, and of more pieces than are in shared memory at once."""
    p, results = problem(dtype, columns, 1), []
    p.logits[0, -4:] += 9.0  # so that what a lost piece held would show
    exact = expected_of("policy", p, torch.float64)
    for variant, cluster, threads in ((TWICE, 0, 0), (KEPT, 4, 0), (KEPT, 8, 0), (TWICE, 0, 256)):
        tile = p.logits.clone()
        written = call("policy", p, tile, variant=variant, cluster=cluster, threads=threads, yield_one_in=10**6)
        results.append((tile, written))
    for tile, written in results:
        assert torch.equal(tile, results[0][0]) and torch.equal(written, results[0][1])
    logps, entropy = log_probs(p.logits.double(), p.target)
    torch.testing.assert_close(results[0][1].double(), torch.stack([logps, p.logits.double().logsumexp(1), entropy]), rtol=1e-5, atol=1e-5)
    assert_no_worse_than_torch("dz", results[0][0], expected_of("policy", p, dtype), exact, 2.0, 4e-6)
    stats, parts = (new_statistics(1, torch.float32, "cpu", n) for n in (1, -(-columns // 4096)))
    statistics(p, p.logits, stats[:, 0], yield_one_in=10**6)
    statistics(p, p.logits, parts, threads=96, yield_one_in=10**6)
    for given in (stats, parts):
        scored = scored_like(p.g)
        cuda_host.close(given, scored)
        assert torch.equal(torch.stack(scored), results[0][1])


def test_a_device_without_room_for_the_cluster_reads_twice():
    p = problem(torch.float32, 4096, 2)
    kept, twice = p.logits.clone(), p.logits.clone()
    call("policy", p, kept)
    call("policy", p, twice, largest_cluster=0)
    assert torch.equal(kept, twice) and not library().shim_error_pending(), "what failed is not left for others to find"
    with pytest.raises(RuntimeError, match="policy kernel: no room for a cluster"):
        call("policy", p, twice, variant=KEPT, largest_cluster=0)


def test_the_variant_is_chosen_by_device_and_width():
    """At 8.0 no cluster is launched; at 9.0 a row that fits is kept, and one that does not is read twice."""
    p = problem(torch.float32, 700, 2)
    results = {}
    for capability in (80, 90):
        tile = p.logits.clone()
        call("policy", p, tile, capability=capability)
        results[capability] = tile
    kept, twice = p.logits.clone(), p.logits.clone()
    call("policy", p, kept, variant=KEPT)
    call("policy", p, twice, variant=TWICE)
    assert torch.equal(results[80], twice) and torch.equal(results[90], kept)


# ---- pairs and ranges

LENGTHS = [2, 0, 1, 65, 300, 17, 2, 700]  # the long ones: of some slices, of each slice, of more runs than slices


def pair_problem(dtype, K=264, offset=0):
    """(pairs, hidden, weight, g); the matrices begin `offset` elements behind 16 bytes."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    pairs = Pairs(torch.randint(-1, 40, (int(ends[-1]),)), torch.stack([ends[:-1], ends[1:]], 1), torch.randperm(len(LENGTHS)))
    spare = 5 if offset else 8
    hidden, weight = (framed(torch.randn(rows, K).to(dtype), spare, offset)[0] for rows in (len(LENGTHS), 39))
    return pairs, hidden, weight, torch.randn(len(pairs.ids), dtype=acc_of(dtype))


def logits_of(problem, add=False, **launch):
    """What stood there was NaN; with `add` it was 1."""
    pairs, hidden, weight, g = problem
    out = torch.full_like(g, 1.0 if add else float("nan"))
    cuda_host.pair_logits(pairs, hidden, weight, out, 0.7, torch.arange(39, dtype=g.dtype), add, **launch)
    return out


def sums_of(problem, narrow=None, add=False, **launch):
    pairs, hidden, weight, g = problem
    out = torch.full(hidden.shape, 1.0 if add else float("nan"), dtype=narrow or hidden.dtype)
    cuda_host.pair_sums(pairs, g, weight, out, 0.7, add, **launch)
    return out


same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype, narrow", [(d, d) for d in (torch.float32, torch.float16, torch.float64)] + [
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=lambda d: str(d).removeprefix("torch."))  # fmt: skip
def test_pairs_have_the_same_bits_at_every_schedule_launch_and_alignment(dtype, narrow, add):
    problem = pair_problem(dtype)
    pairs, hidden, weight, g = problem
    logits, sums = logits_of(problem, add), sums_of(problem, narrow, add)
    rest = sums[pairs.rows[LENGTHS.index(0)]]
    assert (rest == 1).all() if add else rest.isnan().all()
    for threads, seed in ((32, 1), (96, 2), (256, 3), (96, 4)):
        launch = dict(threads=threads, seed=seed, yield_one_in=1 if threads == 96 else 50)
        same(logits_of(problem, add, **launch), logits)
        same(sums_of(problem, narrow, add, **launch), sums)
    _, other_hidden, other_weight, _ = pair_problem(dtype, offset=1)
    problem = pairs, other_hidden.copy_(hidden), other_weight.copy_(weight), g
    same(logits_of(problem, add), logits)
    same(sums_of(problem, narrow, add), sums)


@pytest.mark.parametrize("kernel, counts", [(logits_of, (1 << 12, 1 << 14)), (sums_of, (1 << 18, 1 << 19))], ids=["logits", "sums"])
def test_pairs_have_the_same_bits_among_many_rows(kernel, counts):
    """The number of rows says how many of them share a block, and how many blocks share them."""
    pairs, hidden, weight, g = problem = pair_problem(torch.bfloat16, K=24)
    expected = kernel(problem)
    for count in counts:
        ranges, rows = torch.zeros(count, 2, dtype=torch.int64), torch.arange(count) + len(hidden)
        chosen = 3 * torch.arange(len(LENGTHS)) + count - 30
        ranges[chosen], rows[chosen] = pairs.ranges, pairs.rows
        same(kernel((Pairs(pairs.ids, ranges, rows), hidden, weight, g), threads=32, yield_one_in=1000), expected)


def test_ranges_have_the_same_bits_at_every_launch_and_place():
    """Of a row counts its length alone, and it needs no alignment."""
    for dtype in (torch.float32, torch.float64):
        lengths, results = torch.tensor([1, 2, 37, 700, 5000]), []
        values = [torch.randn(n, dtype=dtype) for n in lengths]
        for gap, threads in ((0, 0), (0, 64), (3, 96), (4, 512), (1, 0)):
            last = (lengths + gap).cumsum(0)
            ranges, memory = torch.stack([last - lengths, last], 1), torch.full((int(last[-1]) + 2,), SENTINEL, dtype=dtype)
            for (first, end), row in zip(ranges.tolist(), values, strict=True):
                memory[first:end] = row
            tile, stats = Tile(memory, lengths // 2, Transform(1.3, 5.0), ranges=ranges), new_statistics(5, dtype, "cpu")
            cuda_host.statistics(tile, stats, threads=threads)
            cuda_host.gradient(tile, memory, finalize(stats), stats[:, 3].cos(), threads=threads)
            inside = torch.cat([torch.arange(first, end) for first, end in ranges.tolist()])
            results.append((stats, memory[inside]))
            memory[inside] = SENTINEL
            assert (memory == SENTINEL).all()
        for stats, written in results[1:]:
            same(stats, results[0][0])
            same(written, results[0][1])


def test_what_is_wrong_with_pairs_is_said():
    problem = pair_problem(torch.float32, K=8)
    for kernel in (logits_of, sums_of):
        for threads in (48, 512):
            with pytest.raises(RuntimeError, match=f"multiple of 32 up to 256, got {threads}"):
                kernel(problem, threads=threads)
        with pytest.raises(RuntimeError, match="device 3: invalid device ordinal"):
            kernel(problem, device=3)
    pairs, hidden, weight, g = pair_problem(torch.bfloat16, K=8)
    with pytest.raises(AssertionError, match="hidden must be torch.bfloat16 as weight is"):
        logits_of((pairs, hidden.float(), weight, g))


# ---- two tiles


def both_of(dtype, columns=COLUMNS, rows=ROWS):
    """(logits of a student and of a teacher, target, g_divergence); row 1 has no gradient but that of its entropy."""
    z = make_tile(rows, columns, dtype)
    y = (z.to(acc_of(dtype)) + torch.randn(rows, columns, dtype=acc_of(dtype))).to(dtype)
    g = torch.randn(rows, dtype=acc_of(dtype))
    g[1:2] = 0
    return z, y, torch.randint(-1, columns, (rows,)), g


def through(kind, z, y, target, g, out, transform=PLAIN, ranges=None, **launch):
    """(statistics, sums) after all three kernels; the gradient is in `out`."""
    student, teacher = (Tile(x, target, transform, ranges=ranges) for x in (z, y))
    stats, sums = new_comparison(len(target), g.dtype, "cpu"), torch.zeros(len(target), 2, dtype=g.dtype)
    cuda_host.divergence_statistics(student, teacher, stats, kind, **launch)
    scored, found = compare(stats, kind)
    if kind == "jsd":
        cuda_host.jensen_shannon(student, teacher, scored, found.gap, sums, 0.3, **launch)
        found = Compared(found.gap, sums[:, 0].contiguous(), sums[:, 1])
    cuda_host.divergence_gradient(student, teacher, out, scored, found, g, DivergenceKind(kind, 0.3), g, g.cos(), **launch)
    return stats, sums


@pytest.mark.parametrize("kind", KINDS)
@each_pair
def test_two_tiles_give_the_same_bits_at_every_schedule_launch_and_alignment(dtype, narrow, kind):
    """And the teacher's tile, which may be aligned otherwise than the student's, stays as it is."""
    for columns in (37, COLUMNS):
        z, y, target, g = both_of(dtype, columns)
        expected, shapes = None, ((0, 5, 100), (32, 1, 50), (96, 2, 1), (96, 3, 1), (512, 4, 100))
        for (threads, seed, rarely), (of_z, of_y) in zip(shapes, ((0, 0), (1, 0), (0, 3), (1, 1), (0, 0)), strict=True):
            student, memory, outside = framed(z, 8 + of_z, of_z)
            teacher, *_ = framed(y, 16 - columns % 8 + of_y, of_y)
            out, out_memory, out_outside = framed(torch.zeros(z.shape, dtype=narrow), 3, of_z)
            launch = dict(threads=threads, seed=seed, yield_one_in=rarely)
            written = (*through(kind, student, teacher, target, g, out, **launch), out)
            assert torch.equal(student, z) and torch.equal(teacher, y)
            expected = expected or tuple(x.clone() for x in written)
            if narrow == dtype:
                written += (*through(kind, student, teacher, target, g, student, **launch), student)
            for found, same_bits in zip(written, expected * 2, strict=False):
                assert torch.equal(found, same_bits), (columns, threads, of_z, of_y)
            assert (memory[outside] == SENTINEL).all() and (out_memory[out_outside] == SENTINEL).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_rows_of_two_tiles_have_most_lanes(kind):
    """4096, as rows of 152k have: each lane of the merging warp takes four warps' sums."""
    z, y, target, g = both_of(torch.float32, 98_304 + 5, 1)
    z[0, -4:] += 9.0  # so that what a lost lane held would show
    y[0, :4] += 9.0
    results = [through(kind, z, y, target, g, torch.empty_like(z), threads=n, yield_one_in=10**6) for n in (0, 256)]
    assert all(map(torch.equal, *results))
    lp, lq = z.double().log_softmax(1), y.double().log_softmax(1)
    stats, sums = results[0]
    if kind == "jsd":
        lm = torch.logaddexp(lp + math.log(0.7), lq + math.log(0.3))
        of_p, of_q = ((a.exp() * (a - lm)).sum(1) for a in (lp, lq))
        exact = torch.stack([of_p, 0.7 * of_p + 0.3 * of_q], 1)
        torch.testing.assert_close(sums.double(), exact, rtol=2e-6, atol=0)
    else:
        exact = ((lq.exp() * (lq - lp)) if kind == "forward_kl" else (lp.exp() * (lp - lq))).sum(1)
        torch.testing.assert_close(compare(stats, kind)[1].value.double(), exact, rtol=4e-6, atol=0)


def test_rows_of_two_tiles_beyond_32_bits():
    """Row 1 of each lies 2^31 elements behind row 0, in memory that is reserved and never touched."""
    stride, (z, y, target, g) = 2**31 + 64, both_of(torch.bfloat16, 256, 2)
    far = []
    for x in (z, y):
        reserved = mmap.mmap(
            -1, 2 * (stride + 256), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        )
        far.append(torch.frombuffer(reserved, dtype=torch.bfloat16).as_strided((2, 256), (stride, 1)).copy_(x))
    for kind in KINDS:
        near, before = torch.empty_like(z), through(kind, z, y, target, g, torch.empty_like(z))
        through(kind, z, y, target, g, near)
        assert all(map(torch.equal, through(kind, far[0].copy_(z), far[1], target, g, far[0]), before)) and torch.equal(
            far[0], near
        )


def test_ranges_of_two_tiles_have_the_same_bits_at_every_launch_and_place():
    for dtype, kind in itertools.product((torch.float32, torch.float64), KINDS):
        lengths, results = torch.tensor([1, 2, 37, 700, 5000]), []
        values = [(torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)) for n in lengths]
        for gap, threads in ((0, 0), (3, 96), (1, 512)):
            last = (lengths + gap).cumsum(0)
            ranges, memory = torch.stack([last - lengths, last], 1), torch.full((2, int(last[-1]) + 2), SENTINEL, dtype=dtype)
            for (first, end), row in zip(ranges.tolist(), values, strict=True):
                memory[0, first:end], memory[1, first:end] = row
            z, g = memory[0], lengths.to(dtype).cos()
            stats, sums = through(kind, z, memory[1], lengths // 2, g, z, Transform(1.3, 5.0), ranges, threads=threads)
            inside = torch.cat([torch.arange(first, end) for first, end in ranges.tolist()])
            results.append((stats, sums, z[inside]))
            z[inside] = SENTINEL
            assert (z == SENTINEL).all()
        for found in results[1:]:
            assert all(map(torch.equal, found, results[0]))


def test_what_is_wrong_with_two_tiles_is_said():
    z, y, target, g = both_of(torch.float32, 64, 2)
    for message, launch in (
        ("multiple of 32 up to 512, got 1024", dict(threads=1024)),
        ("device 3: invalid device", dict(device=3)),
    ):
        with pytest.raises(RuntimeError, match=f"divergence_statistics kernel: .*{message}"):
            through("jsd", z, y, target, g, z, **launch)
    with pytest.raises(AssertionError, match="one shape, dtype and device"):
        through("jsd", z, y.double(), target, g, z)


def test_sums_of_two_tiles_without_their_barrier_are_found_out(tmp_path):
    before, after = "    __syncthreads();\n    Sums parts", "    Sums parts"
    sources = tmp_path / "csrc"
    shutil.copytree(cuda_host.CSRC, sources)
    text = (sources / "divergence_cuda.cuh").read_text()
    assert text.count(before) == 1
    (sources / "divergence_cuda.cuh").write_text(text.replace(before, after))
    z, y, target, g = both_of(torch.float32, 4096, 1)
    tiles, stats = (Tile(z, target, PLAIN), Tile(y, target, PLAIN)), new_comparison(6, torch.float32, "cpu")
    for row, mine in enumerate((None, *[sources] * 5)):
        of_row = stats[row : row + 1]
        cuda_host.divergence_statistics(
            *tiles, of_row, "jsd", threads=256, seed=row + 1, yield_one_in=1, sources=mine, flags=("-O1",)
        )
    assert not all(torch.equal(row.nan_to_num(7.0), stats[0].nan_to_num(7.0)) for row in stats[1:])


# ---- errors


def test_what_is_wrong_is_said():
    p = problem(torch.float32, 700, 2)
    for message, launch in (
        ("does not fit the shared memory of a cluster of", dict(variant=KEPT, capability=80)),
        ("cluster of 3 blocks", dict(variant=KEPT, cluster=3)),
        ("cluster of 16 blocks", dict(variant=KEPT, cluster=16)),
        ("multiple of 32 up to 448, got 48", dict(threads=48)),
        ("multiple of 32 up to 448, got 2048", dict(threads=2048)),
        ("policy kernel: device 3: invalid device ordinal", dict(device=3)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call("policy", p, p.logits.clone(), **launch)
    q = problem(torch.bfloat16, 700, 2)
    for narrow in (torch.float32, torch.float16):
        with pytest.raises(AssertionError, match=r"out must be \(2, 700\) torch.bfloat16 on cpu"):
            call("policy", q, q.logits, torch.empty(2, 700, dtype=narrow))
    with pytest.raises(AssertionError, match="the tile's own memory in its own dtype"):
        call("policy", p, p.logits, p.logits.view(torch.bfloat16)[:, :700])
    with pytest.raises(AssertionError, match="tile's columns must be adjacent"):
        call("policy", p, p.logits.T.contiguous().T)
    wide, one = torch.zeros(1, 500_000), torch.ones(1)
    with pytest.raises(RuntimeError, match="a row of 500000 columns does not fit"):
        cuda_host.policy(Tile(wide, torch.tensor([0]), PLAIN), wide, *linear(one), scored_like(one), variant=KEPT)


FAULTS = {  # (before, after, (variant, cluster)) of the policy kernel
    "a block's partial sums are read before they are there": (
        "else __syncthreads();", "", (TWICE, 0)),
    "the row's sums are read before they are there": ("    __syncthreads();\n    return scratch()->row;", "    return scratch()->row;", (TWICE, 0)),
    "a cluster's partial sums are read before they are there": ("::sync();", "::barrier_arrive();", (KEPT, 4)),
    "a block leaves while its shared memory is read": ("ClusterOf<Mode>::type::barrier_wait();", ";", (KEPT, 4)),
    "a barrier that some threads do not reach": ("else __syncthreads();", "else if (threadIdx.x) __syncthreads();", (TWICE, 0)),
}  # fmt: skip


@pytest.mark.parametrize("fault", usually(FAULTS, "a block's partial sums are read before they are there"))
def test_a_kernel_without_its_barrier_is_found_out(fault, tmp_path):
    """The shim is worth something if the kernels fail in it once a barrier is missing."""
    before, after, (variant, cluster) = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(cuda_host.CSRC, sources)
    kernels = sources / "row_kernels_cuda.cuh"
    text = kernels.read_text()
    assert before in text
    kernels.write_text(text.replace(before, after))
    p, results = problem(torch.float32, 4096, 2), []
    for seed, mine in itertools.product(range(1, 5), (None, sources)):
        tile = p.logits.clone()
        try:
            call("policy", p, tile, variant=variant, cluster=cluster, threads=64, seed=seed, yield_one_in=1, sources=mine, flags=("-O1",))
        except RuntimeError as error:
            assert mine is not None and "policy kernel: thread" in str(error)
            return
        results.append(tile.clone())
    right, wrong = results[::2], results[1::2]
    assert all(torch.equal(result, right[0]) for result in right)
    assert not all(torch.equal(result, right[0]) for result in wrong)


PAIR_FAULTS = {
    "slices are added before they are there": ("    __syncthreads();\n    if (warp == 0) {", "    if (warp == 0) {"),
    "slices are overwritten before they are added": ("      write_sums<Aligned, O>(sums, p, place_of(p.pairs, first_row + of), column);\n    }\n"
                                                     "    __syncthreads();\n", "      write_sums<Aligned, O>(sums, p, place_of(p.pairs, first_row + of), column);\n    }\n"),
}  # fmt: skip


@pytest.mark.parametrize("fault", usually(PAIR_FAULTS, "slices are added before they are there"))
def test_a_sum_without_its_barrier_is_found_out(fault, tmp_path):
    before, after = PAIR_FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(cuda_host.CSRC, sources)
    text = (sources / "pairs_cuda.cuh").read_text()
    assert text.count(before) == 1
    (sources / "pairs_cuda.cuh").write_text(text.replace(before, after))
    problem = pair_problem(torch.float32, K=100)
    right = sums_of(problem, yield_one_in=1, flags=("-O1",))
    wrong = [sums_of(problem, yield_one_in=1, seed=seed, sources=sources, flags=("-O1",)) for seed in range(1, 6)]
    assert not all(torch.equal(result.nan_to_num(7.0), right.nan_to_num(7.0)) for result in wrong)


# ---- sanitizers

SANITIZED = """
import itertools, sys
import torch
sys.path[:0] = {paths!r}
from support import cuda_host
from support.cuda_host import KEPT, SANITIZERS, TWICE
from test_cuda_kernels import (KINDS, PAIRS, Tile, Transform, both_of, call, finalize, logits_of, new_statistics, pair_problem, problem,
                               statistics, sums_of, through)

for dtype, narrow in PAIRS:
    # one row: it is aligned, so that a unit read as a whole behind its end is seen
    for (columns, rows), (variant, cluster) in itertools.product(((37, 2), (300, 2), (1111, 1)), ((TWICE, 0), (KEPT, 1), (KEPT, 4))):
        p = problem(dtype, columns, rows)
        launch = dict(variant=variant, cluster=cluster, threads=64, flags=SANITIZERS)
        statistics(p, p.logits.clone(), **launch)
        for transform, kernel in itertools.product((Transform(), Transform(1.3, 5.0, 0.7)), ("gradient", "policy")):
            # exactly as long as the tile: one element further is an error
            out = torch.empty(rows, columns, dtype=narrow)
            call(kernel, p, p.logits.clone(), out, transform, **launch)
            if narrow == dtype:
                call(kernel, p, p.logits.clone(), None, transform, **launch)
                cuda_host.gradient(Tile(p.logits.clone(), p.target, transform), out, p.scored, p.g, p.g, **launch)

for dtype, narrow in PAIRS:
    for K in (264, 77):
        # cut to their rows: what lies behind the last one is nobody's
        pairs, hidden, weight, g = pair_problem(dtype, K)
        given = pairs, hidden.clone(), weight.clone(), g
        logits_of(given, flags=SANITIZERS)
        sums_of(given, add=K == 77, flags=SANITIZERS)
        if dtype == torch.bfloat16:
            sums_of(given, torch.float32, flags=SANITIZERS)
for dtype in (torch.float32, torch.float64):
    values, ranges = torch.randn(707, dtype=dtype), torch.tensor([[0, 2], [2, 5], [5, 5], [5, 707]])
    tile, stats = Tile(values, torch.tensor([1, 2, 0, 701]), Transform(), ranges=ranges), new_statistics(4, dtype, "cpu")
    cuda_host.statistics(tile, stats, flags=SANITIZERS)
    cuda_host.gradient(tile, values, finalize(stats), stats[:, 0].cos(), flags=SANITIZERS)
for (dtype, narrow), columns, kind in itertools.product(PAIRS, (37, 300, 1111), KINDS):
    z, y, target, g = both_of(dtype, columns, 1 if columns == 1111 else 2)
    for transform in (Transform(), Transform(1.3, 5.0, 0.7)):
        through(kind, z.clone(), y.clone(), target, g, torch.empty(z.shape, dtype=narrow), transform, threads=64, flags=SANITIZERS)
        if narrow == dtype:
            own = z.clone()
            through(kind, own, y.clone(), target, g, own, transform, threads=64, flags=SANITIZERS)
for dtype, kind in itertools.product((torch.float32, torch.float64), KINDS):
    z, y, ranges = torch.randn(707, dtype=dtype), torch.randn(707, dtype=dtype), torch.tensor([[0, 2], [2, 5], [5, 5], [5, 707]])
    g = torch.randn(4, dtype=dtype)
    through(kind, z, y, torch.tensor([1, 2, 0, 701]), g, z, ranges=ranges, threads=64, flags=SANITIZERS)
print("clean")
"""


@pytest.mark.exhaustive(reason="half a minute and more: compiles every kernel with the sanitizers")
def test_under_address_and_undefined_behaviour_sanitizers():
    libraries = sanitizer_libraries()
    if libraries is None:
        pytest.skip("g++ has no sanitizer libraries")
    tests = Path(__file__).parent
    # torch leaks at exit; the fibers' own stacks are told to the sanitizer, its fake ones would not be
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "OMP_NUM_THREADS": "1"}
    code = SANITIZED.format(paths=[str(tests), str(tests.parent)])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and run.stdout.strip() == "clean", run.stdout[-500:] + run.stderr[-4000:]
