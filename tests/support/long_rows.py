"""Rows of several fixed tiles of columns, cut between two of them."""

from dataclasses import replace

import pytest
import torch

from grpo_kernels.backends.statistics import TILE_COLUMNS, Tile
from grpo_kernels.losses.config import LogitTransform as Transform
from support.row_kernels import INF, acc, make_tile

COLUMNS = 3 * TILE_COLUMNS + 501
TRANSFORMS = [Transform(), Transform(1.3, 5.0, 0.7)]
CUTS = [(), (2,), (1, 3), (1, 2, 3)]  # between tiles


def problem(dtype, transform, biased):
    """Rows whose tiles rise and fall; one has a tile of nothing but -inf, one its target in the last column."""
    columns, rows = COLUMNS, 6
    values = make_tile(rows, columns, dtype, spare=3)
    values[1] += torch.linspace(-40, 40, columns).to(dtype)
    values[2] -= torch.linspace(-40, 40, columns).to(dtype)
    values[3, TILE_COLUMNS : 2 * TILE_COLUMNS] = -INF
    values[4, 700] = 60.0
    target = torch.tensor([0, TILE_COLUMNS, columns - 1, 5, 700, 2 * TILE_COLUMNS - 1])
    bias = torch.randn(columns, dtype=acc(dtype)) if biased else None
    return Tile(values, target, transform, bias, torch.rand(rows, dtype=acc(dtype)) + 0.5 if biased else None)


def part(tile, rows, start, end):
    at = {name: None if getattr(tile, name) is None else getattr(tile, name)[rows].contiguous() for name in ("target", "temperature")}
    bias = None if tile.bias is None else tile.bias[start:end].contiguous()
    return replace(tile, values=tile.values[rows, start:end], bias=bias, target=at["target"] - start, temperature=at["temperature"])


def cases():
    return pytest.mark.parametrize("transform, biased", [(TRANSFORMS[0], False), (TRANSFORMS[1], True)], ids=["plain", "all"])
