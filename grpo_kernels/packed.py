"""The packed layout: sequences without padding, one behind the other, and back to [B, T]."""

from itertools import pairwise

import torch


class PackedLayout:
    """Moves per-token tensors between the packed layout [N] and [B, T]; the identity for tensors that are padded already.

    The mathematics is written for [B, T] only: a packed batch's per-token vectors are small beside its logits, and padding
    them keeps every sum per sequence in one deterministic form.
    """

    def __init__(self, cu_seqlens=None, tokens=0, wait=True):
        self.position, self.bad_ends = None, None
        if cu_seqlens is None:
            return
        starts = cu_seqlens.long()
        index = torch.arange(tokens, device=cu_seqlens.device)
        sequence = torch.bucketize(index, starts[1:], right=True)
        if wait:
            self.sequences, self.length = self._checked_lengths(cu_seqlens.tolist(), tokens)
            self.position = sequence * self.length + index - starts[sequence]
            return
        # nothing may synchronise: the longest a sequence can be, and wrong ends are only counted
        self.sequences, self.length = cu_seqlens.shape[0] - 1, tokens
        position = sequence * self.length + index - starts[sequence]
        self.position = position.clamp(0, max(self.sequences * self.length - 1, 0))
        self.bad_ends = (starts.diff() < 0).sum() + (starts[0] != 0) + (starts[-1] != tokens)

    @staticmethod
    def _checked_lengths(ends, tokens):
        lengths = [end - start for start, end in pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
            shown = f"{ends[:8]}{'...' * (len(ends) > 8)}"
            raise ValueError(f"cu_seqlens must rise from 0 to N = {tokens} without falling, got {shown}")
        return len(lengths), max(lengths, default=0)

    @staticmethod
    def of(cu_seqlens, mask, wait=True):
        """``wait``: the host may read cu_seqlens back."""
        return PackedLayout(cu_seqlens, mask.shape[0] if cu_seqlens is not None else 0, wait)

    def pad(self, x):
        """[N] -> [B, T], zeros beyond a sequence's end; differentiable."""
        if self.position is None or x is None:
            return x
        out = x.new_zeros(self.sequences * self.length).index_put((self.position,), x)
        return out.view(self.sequences, self.length)

    def pad_advantages(self, x):
        """[B] stays, [N] -> [B, T]."""
        return x if self.position is None or x.shape[0] == self.sequences else self.pad(x)

    def pad_ratio(self, x):
        """[B, 1] stays, [N] -> [B, T]."""
        return x if self.position is None or x is None or x.dim() == 2 else self.pad(x)

    def unpad(self, x):
        """[B, T] -> [N]."""
        return x if self.position is None else x.reshape(-1)[self.position]
