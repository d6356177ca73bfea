"""Statistics of fixed tiles of columns: the same bits however a row is cut between two of them, and whoever else is in the call."""

import itertools

import pytest
import torch
from support.long_rows import COLUMNS, CUTS, cases, part, problem
from support.row_kernels import INF, NAN, acc, each_dtype, each_kernels, each_policy, new_stats

from grpo_kernels.backends import pytorch
from grpo_kernels.backends.statistics import TILE_COLUMNS, Tile, finalize, fold, new_statistics, tiles_of
from grpo_kernels.losses.config import LogitTransform as Transform
from grpo_kernels.losses.terms import PolicyRows, PolicyTerms


def in_pieces(kernels, tile, cuts, rows=slice(None)):
    bounds = [0, *(TILE_COLUMNS * i for i in cuts), COLUMNS]
    stats = new_stats(len(tile.target[rows]), tile.values.dtype)
    for start, end in itertools.pairwise(bounds):
        kernels.statistics(part(tile, rows, start, end), stats)
    return stats


@pytest.mark.cover("kernels", "dtype")
@each_kernels
@each_dtype
@cases()
def test_cuts_and_other_rows_change_no_bit(kernels, dtype, transform, biased):
    tile = problem(dtype, transform, biased)
    whole = in_pieces(kernels, tile, ())
    for cuts in CUTS:
        torch.testing.assert_close(in_pieces(kernels, tile, cuts), whole, rtol=0, atol=0)
    for rows in ([2], [5, 0, 3], [4, 1]):
        torch.testing.assert_close(in_pieces(kernels, tile, (1,), rows), whole[rows], rtol=0, atol=0)
    scored = kernels.closed(whole)
    for i in range(len(whole)):
        for of_all, alone in zip(scored, kernels.closed(whole[i : i + 1]), strict=True):
            assert torch.equal(of_all[i : i + 1], alone)


@pytest.mark.cover("kernels", "dtype")
@each_kernels
@each_dtype
@cases()
def test_parts_that_ranks_hand_over_merge_to_the_same_bits(kernels, dtype, transform, biased):
    tile = problem(dtype, transform, biased)
    rows, whole = len(tile.target), kernels.closed(in_pieces(kernels, tile, ()))
    for cuts in CUTS:
        bounds = [0, *(TILE_COLUMNS * i for i in cuts), COLUMNS]
        widest, parts = max(tiles_of(b - a) for a, b in itertools.pairwise(bounds)), []
        for start, end in itertools.pairwise(bounds):
            stats = new_statistics(rows, acc(dtype), "cpu", tiles_of(end - start))
            kernels.statistics(part(tile, slice(None), start, end), stats)
            parts += [stats, new_statistics(rows, acc(dtype), "cpu", widest - stats.shape[1])]  # of nothing
        for ours, theirs in zip(kernels.closed(torch.cat(parts, 1)), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.cover("kernels", "dtype")
@each_policy
@each_dtype
@cases()
def test_policy_scores_as_statistics_do(kernels, dtype, transform, biased):
    tile = problem(dtype, transform, biased)
    one = torch.ones(len(tile.target), dtype=acc(dtype))
    if kernels.wide and dtype != torch.bfloat16:
        pytest.skip("as on tiles of this dtype")
    for w_entropy in (None, 0.1 * one):
        _, scored = kernels.policy(tile, PolicyRows(one, one, w_entropy=w_entropy), PolicyTerms(kind="linear"))
        for ours, theirs in zip(scored, kernels.closed(in_pieces(kernels, tile, (2,))), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@each_kernels
@each_dtype
def test_close(kernels, dtype):
    """Against the plain merging in float64; rows of nothing, of the target alone, and with NaN."""
    stats = new_statistics(5, acc(dtype), "cpu", 4)
    for i, peaks in enumerate(([3.0, 4.0, -2.0, 9.0], [90.0, -80.0, 0.5, 91.0], [-INF] * 4, [1.0, -INF, 2.0, 2.0], [0.0, NAN, 1.0, 2.0])):
        peak = torch.tensor(peaks, dtype=acc(dtype))
        stats[i, :, 0] = peak
        stats[i, :, 1:3] = torch.where(peak.isfinite(), torch.rand(2, 4, dtype=acc(dtype)) * 50, torch.zeros(2, 4, dtype=acc(dtype))).T
        stats[i, :, 2] *= -1
    stats[4, 1, 1] = NAN
    stats[0, 1, 3], stats[1, 3, 3], stats[3, 0, 3] = 2.5, 91.0, -7.0
    found, exact = kernels.closed(stats), finalize(fold(stats.double()))
    for ours, theirs in zip(found, exact, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(ours[[0, 1, 3]].double(), theirs[[0, 1, 3]], rtol=tolerance, atol=tolerance)
        assert ours[4].isnan()


@each_kernels
def test_close_refuses(kernels):
    stats = new_statistics(3, torch.float32, "cpu", 2)
    for bad in (stats[..., :3], stats.half(), stats[:, 0, 0], stats.transpose(0, 1)):
        with pytest.raises(AssertionError, match="stats must be"):
            kernels.closed(bad)
    if kernels.module is pytorch:  # which trusts the engine
        return
    with pytest.raises(AssertionError, match="stats must be"):
        kernels.module.statistics(Tile(torch.zeros(3, 4097), torch.zeros(3, dtype=torch.int64), Transform()), stats[:, :1], **kernels.options)


