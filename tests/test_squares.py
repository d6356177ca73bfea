"""The sum of p^2 as a fifth statistic of a row: beside the other four, whose bits it leaves alone, against float64 and in parts."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.long_rows import COLUMNS, CUTS, cases, part
from support.long_rows import problem as long_rows
from support.row_kernels import INF, NAN, acc, all_kernels, each_dtype, make_tile

from grpo_kernels.backends import pytorch
from grpo_kernels.backends.statistics import (
    TILE_COLUMNS,
    Scored,
    Tile,
    log_sum_of_squares,
    new_statistics,
    squared_probs,
    tiles_of,
)
from grpo_kernels.losses.config import LogitTransform as Transform

each_kernels = pytest.mark.parametrize("kernels", [k for k in all_kernels() if not k.wide and not k.apart], ids=repr)
WIDTHS = [1, 5, TILE_COLUMNS - 1, TILE_COLUMNS + 1, 2 * TILE_COLUMNS + 37]


def stats_of(kernels, tile, squares=True, parts=None):
    stats = new_statistics(len(tile.target), acc(tile.values.dtype), "cpu", parts, squares)
    kernels.statistics(tile, stats)
    return stats


def rows_of(columns, dtype):
    """Random, steep, flat, almost certain of the target (p = 1 - 1e-9), almost certain of another token, and with banned columns."""
    values = make_tile(6, columns, dtype, spare=3)
    values[1] *= 4
    values[2:5] = 0.25
    certain = math.log(max(columns - 1, 1) * 1e9)
    values[3, columns // 2] = certain
    values[4, columns - 1] = certain
    values[5, ::2] = -INF
    return values, torch.tensor([0, columns - 1, columns // 3, columns // 2, columns // 2, min(1, columns - 1)])


def in_float64(tile):
    """(log p of the target, sum of the others' p^2, entropy), each from probabilities of its own."""
    tile = replace(tile, values=tile.values.double(), bias=None if tile.bias is None else tile.bias.double(),
                   temperature=None if tile.temperature is None else tile.temperature.double())  # fmt: skip
    z, _ = pytorch.transformed(tile, slice(None), torch.float64)
    others = z.scatter(1, tile.target.unsqueeze(1), -INF)
    rest, own = others.logsumexp(1), z.gather(1, tile.target.unsqueeze(1)).squeeze(1)
    squared = ((2 * others).logsumexp(1) - 2 * torch.logaddexp(rest, own)).exp()
    return -torch.nn.functional.softplus(rest - own), squared


@each_kernels
@each_dtype
@pytest.mark.parametrize("transform, biased", [(Transform(), False), (Transform(1.3, 25.0, 0.9), True)], ids=["plain", "all"])
def test_equals_float64_and_leaves_the_others_alone(kernels, dtype, transform, biased):
    """Beside p = 1 - 1e-9 the others' p^2 are below 1e-18, and so is 1 - 2 p + sum p^2: both keep their digits."""
    for columns in WIDTHS:
        values, target = rows_of(columns, dtype)
        bias = torch.randn(columns, dtype=acc(dtype)) if biased else None
        tile = Tile(values, target, transform, bias, 0.8 + torch.rand(6, dtype=acc(dtype)) / 4 if biased else None)
        stats = stats_of(kernels, tile)
        torch.testing.assert_close(stats[:, :4], stats_of(kernels, tile, False), rtol=0, atol=0, equal_nan=True)
        scored, squared = kernels.squared(stats)
        for with_it, without in zip(scored, kernels.closed(stats[:, :4].contiguous()), strict=True):
            torch.testing.assert_close(with_it, without, rtol=0, atol=0, equal_nan=True)
        logps, exact = in_float64(tile)
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5  # z is as large as 30, and rounded: its exp by some 2e-6
        seen = torch.arange(6) if columns > 1 else torch.arange(5)  # a row of nothing but -inf has no distribution
        torch.testing.assert_close(squared.double()[seen], exact[seen], rtol=tolerance, atol=1e-37)
        weight = scored.logps.double().expm1().square() + squared.double()
        torch.testing.assert_close(weight[seen], (logps.expm1().square() + exact)[seen], rtol=3 * tolerance, atol=1e-37)
        logs = log_sum_of_squares(scored.logps, squared)  # p = 1 - 1e-9 of another token is 1 in float32
        torch.testing.assert_close(logs.double()[seen], ((2 * logps).exp() + exact).log()[seen], rtol=tolerance, atol=tolerance / 10)
        torch.testing.assert_close(logs[3].double(), torch.logaddexp(2 * logps, exact.log())[3], rtol=tolerance, atol=1e-20)
        if columns > 5 and not biased:
            assert 0 < weight[3] < 3e-18 and weight[4] > 1.9 and abs(squared[2] * columns - 1) < 0.2


@each_kernels
@each_dtype
@cases()
def test_cuts_and_parts_change_no_bit(kernels, dtype, transform, biased):
    """As `test_fixed_tiles` has it of the other four."""
    tile = long_rows(dtype, transform, biased)
    rows, whole = len(tile.target), stats_of(kernels, tile)
    scored, squared = kernels.squared(whole)
    for i in range(rows):
        alone = stats_of(kernels, part(tile, [i], 0, COLUMNS))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=0)
        assert torch.equal(kernels.squared(alone)[1], squared[i : i + 1])
    for cuts in CUTS[1::2]:
        bounds, stats, parts = [0, *(TILE_COLUMNS * i for i in cuts), COLUMNS], torch.empty_like(whole), []
        stats.copy_(new_statistics(rows, acc(dtype), "cpu", squares=True))
        widest = max(tiles_of(b - a) for a, b in itertools.pairwise(bounds))
        for start, end in itertools.pairwise(bounds):
            piece = part(tile, slice(None), start, end)
            kernels.statistics(piece, stats)
            parts += [stats_of(kernels, piece, parts=tiles_of(end - start))]
            parts += [new_statistics(rows, acc(dtype), "cpu", widest - parts[-1].shape[1], True)]  # of nothing
        torch.testing.assert_close(stats, whole, rtol=0, atol=0)
        found, of_parts = kernels.squared(torch.cat(parts, 1))
        for ours, theirs in zip((*found, of_parts), (*scored, squared), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@each_kernels
@each_dtype
def test_of_ranges(kernels, dtype):
    if dtype == torch.bfloat16:
        pytest.skip("ranges are of acc")
    values, lengths = torch.randn(700, dtype=dtype) * 3, [3, 0, 200, 1]
    ends = torch.tensor(list(itertools.accumulate(lengths)))
    ranges = torch.stack([ends - torch.tensor(lengths), ends], 1)
    target = torch.tensor([1, 0, 150, 0])
    tile, stats = Tile(values, target, Transform(1.3, 5.0), ranges=ranges), new_statistics(4, dtype, "cpu", squares=True)
    options = kernels.options
    kernels.module.statistics(tile, stats, **options)
    for i, length in enumerate(lengths):
        if length:
            row = Tile(values[ranges[i, 0] : ranges[i, 1]].unsqueeze(0), target[i : i + 1], tile.transform)
            _, exact = in_float64(row)
            torch.testing.assert_close(squared_probs(stats[i : i + 1].double()), exact, rtol=1e-5, atol=1e-37)


@each_kernels
@each_dtype
def test_what_is_not_finite(kernels, dtype):
    """NaN comes through; a row of nothing but -inf has no p^2; the likeliest of two tokens may be banned."""
    values = torch.zeros(4, 5000, dtype=dtype)
    values[0, 4999] = NAN
    values[1] = -INF
    values[2], values[2, 7] = -INF, 1.0
    values[3, :4999] = -INF
    scored, squared = kernels.squared(stats_of(kernels, Tile(values, torch.tensor([0, 1, 7, 0]), Transform())))
    assert squared[0].isnan() and squared[1].isnan()
    assert squared[2:].tolist() == [0.0, 1.0] and scored.logps[2:].tolist() == [0.0, -INF]
    assert log_sum_of_squares(scored.logps, squared)[2:].tolist() == [0.0, 0.0]


@each_kernels
def test_close_refuses(kernels):
    vector = torch.zeros(3)
    for squares, squared, name in ((True, None, "stats"), (False, vector, "stats"), (True, vector[:2], "squared")):
        with pytest.raises(AssertionError, match=f"{name} must be"):
            kernels.module.close(new_statistics(3, torch.float32, "cpu", squares=squares), Scored(vector, vector, vector), squared,
                                 **kernels.options)  # fmt: skip
