"""The supports of a rollout's tokens: how they are cut into micro-batches and put together.

A batch holds them as ``support``, the `TokenSupport` of its mask [B, T]: a row's positions stand together.
"""

import torch

from ..support import TokenSupport


def split(support: TokenSupport, positions: int) -> list[TokenSupport]:
    """Stretches of so many positions, without a copy of the ids. Waits for the device once."""
    starts = range(0, support.positions, positions)
    bounds = [*support.offsets[:-1:positions].tolist(), len(support.ids)]
    ends = zip(starts, bounds, bounds[1:], strict=False)
    return [TokenSupport(support.ids[a:b], support.offsets[i : i + positions + 1] - a) for i, a, b in ends]


def places(mask: torch.Tensor) -> torch.Tensor:
    """[B, T] int64: of each position among the flattened ones, which `TokenSupport.take` takes when rows or columns were chosen."""
    return torch.arange(mask.numel(), device=mask.device).view(mask.shape)


def joined(batches: list[dict]) -> TokenSupport:
    """Of the rows of several batches, padded on the right to the longest of them."""
    T = max(batch["mask"].shape[1] for batch in batches)
    lengths = [batch["support"].lengths().view_as(batch["mask"]) for batch in batches]
    lengths = torch.cat([torch.nn.functional.pad(x, (0, T - x.shape[1])) for x in lengths]).flatten()
    ids = torch.cat([batch["support"].ids for batch in batches])
    return TokenSupport.from_lengths(ids, lengths)
