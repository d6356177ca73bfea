"""Which rows are computed: kept tokens only, those that need a gradient in front, after one host synchronisation."""

from dataclasses import dataclass

import torch

from .arguments import host_may_wait, raise_bad_values


@dataclass(frozen=True)
class Selection:
    """Rows of the flattened tokens that are computed."""

    rows: torch.Tensor  # [N] int64 indices into the flattened tokens, the ``live`` ones in front
    live: int
    total: int  # M, all tokens
    correction: torch.Tensor | None  # 0-dim, to add to log-probs: NaN if a value was bad; None where that was raised

    def take(self, x, live_only=False):
        """[M] -> the values of the selected rows."""
        if x is None:
            return None
        return x.reshape(-1)[self.rows[: self.live] if live_only else self.rows]

    def scatter(self, values, mask):
        """[N] -> the shape of mask, 0 elsewhere; differentiable."""
        full = values.new_zeros(self.total).index_copy(0, self.rows, values).view(mask.shape)
        return full if self.correction is None else (full + self.correction).where(mask.bool(), 0.0)


def select_rows(mask, flags, vocab, *, live=None, kept_rows=None, shard=None) -> Selection:
    """Chooses the rows, and raises what the value checks found.

    ``flags`` [5] are the counts of `value_flags`, ``live`` a bool tensor like mask (None: no row needs a gradient). Nothing
    synchronises when ``kept_rows`` is given, under torch.compile or while a CUDA graph is captured: then every row is taken as
    live, and bad values become the NaN ``correction``.
    """
    total = mask.numel()
    if kept_rows is not None or not host_may_wait(mask):
        rows, bad = torch.arange(total, device=mask.device), flags.sum() > 0
        if kept_rows is not None:
            rows = kept_rows.clamp(0, max(total - 1, 0))
            kept = mask.reshape(-1).bool()
            given = (rows == kept_rows).all() & (rows.diff() > 0).all() & kept[rows].all() & (kept.sum() == rows.shape[0])
            bad = bad | ~given
        correction = torch.zeros((), device=mask.device).masked_fill(bad, float("nan"))
        return Selection(rows, 0 if live is None else rows.shape[0], total, correction)
    kept = mask.reshape(-1).bool()
    live = torch.zeros_like(kept) if live is None else live.reshape(-1) & kept
    n, n_live, *bad = torch.cat([torch.stack([kept.sum(), live.sum()]), flags]).tolist()
    if shard is not None:
        shard.agree(mask.device, kept=n, trained=n_live, wrong=sum(bad))
    raise_bad_values(bad, vocab)
    # a stable sort by (live, scored only, masked) instead of nonzero, which would synchronise again
    order = (2 - kept.to(torch.int8) - live.to(torch.int8)).argsort(stable=True)
    return Selection(order[:n], n_live, total, None)


def flatten(hidden, mask, all_rows):
    """[.., D] -> [M, D] without gaps between rows. Where all rows are computed, masked ones too, their NaN must go."""
    if all_rows:
        hidden = hidden.where(mask.bool().unsqueeze(-1), 0.0)
    return hidden.reshape(-1, hidden.shape[-1]).contiguous()
