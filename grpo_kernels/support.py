"""`TokenSupport`: the tokens that each position could have been sampled as, and what is asked of them."""

import functools
import math
import warnings
from dataclasses import dataclass, field, replace

import torch

from .checks import kind
from .engine.operands import can_sync
from .engine.pairs import PairRows

_INTEGERS = (torch.int32, torch.int64)
_WIDE = 1000  # tokens a position in the mean, from which a warning is due: by count some 850 cost as much as the vocabulary


@dataclass(frozen=True, eq=False)
class TokenSupport:
    """The tokens that each position could have been sampled as: what top-k, top-p or min-p left of the vocabulary.

    Position i, of the flattened [B, T] or of packed [N], has ``ids[offsets[i]:offsets[i + 1]]``, in any order, none twice. An empty
    range is the whole vocabulary. At kept positions the token itself is among them.

    The first call that uses a support looks at its values once and remembers what it found; that waits for the device.

    Args:
        ids: [M] int32 or int64.
        offsets: [positions + 1] int64 (or int32), from 0 to M, never falling.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape. Values are checked where a call uses them.
    """

    ids: torch.Tensor
    offsets: torch.Tensor

    def __post_init__(self):
        for name in ("ids", "offsets"):
            x = getattr(self, name)
            _check_integers(f"support.{name}", x)
            if x.dim() != 1:
                raise ValueError(f"support.{name} must be 1-D, got {list(x.shape)}")
        if not len(self.offsets):
            raise ValueError("support.offsets must have an entry more than there are positions, got none")
        if self.ids.device != self.offsets.device:
            raise ValueError(f"support.offsets must be on {self.ids.device} as support.ids is, got {self.offsets.device}")

    @staticmethod
    def from_lengths(ids: torch.Tensor, lengths: torch.Tensor) -> "TokenSupport":
        """Of the ids [M] of all positions, one behind the other, and how many each has: [positions] int64, in sum M."""
        return TokenSupport(ids, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    @staticmethod
    def from_mask(mask: torch.Tensor) -> "TokenSupport":
        """Of a bool mask [.., V], True for the tokens that were left. A position without any True has the whole vocabulary."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor [.., V], got {kind(mask)}")
        if mask.dim() < 1:
            raise ValueError("mask must be [.., V], got a 0-dim tensor")
        flat = _rows(mask)
        return TokenSupport.from_lengths(flat.nonzero()[:, 1].contiguous(), flat.sum(1))

    @staticmethod
    def from_padded(ids: torch.Tensor, pad: int = -1) -> "TokenSupport":
        """Of ids [.., K], with ``pad`` where a position has fewer. One of nothing but ``pad`` has the whole vocabulary."""
        _check_integers("ids", ids)
        if ids.dim() < 1:
            raise ValueError("ids must be [.., K], got a 0-dim tensor")
        flat = _rows(ids)
        return TokenSupport.from_lengths(flat[flat != pad], (flat != pad).sum(1))

    @staticmethod
    def from_sequences(sequences, length: int | None = None, device=None) -> "TokenSupport":
        """Of the sampling mask of each sequence, as samplers return them.

        Args:
            sequences: B of them, each (token_ids, offsets) of arrays or lists, an object with attributes of these names, a
                `TokenSupport`, or None. Offsets begin at 0 and have an entry more than the sequence has tokens. None is a sequence
                without a mask: it needs a ``length``, and gets empty ranges.
            length: T of a padded [B, T], where shorter sequences get empty ranges behind their end; None is the packed layout.
            device: of the result; None is the CPU.

        Raises:
            TypeError, ValueError: naming the sequence, what was wanted and what came.
        """
        ids, lengths = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        if isinstance(sequences, (TokenSupport, dict)):
            raise TypeError(f"sequences must be a list of one (token_ids, offsets) a sequence, got {kind(sequences)}")
        for number, mask in enumerate(sequences):
            token_ids, own = _pair(number, mask, length)
            falls = own.diff() < 0
            if not len(own) or own[0] != 0 or own[-1] != len(token_ids) or falls.any():
                where = f"; they fall behind token {int(falls.nonzero()[0])}" if falls.any() else ""
                got = f"{own.tolist()[:8]}{' ..' * (len(own) > 8)}{where}"
                raise ValueError(f"offsets of sequence {number} must rise from 0 to {len(token_ids)}, its token_ids, got {got}")
            own = own.diff()
            if length is not None and len(own) > length:
                raise ValueError(f"sequence {number} must have at most {length} positions, got {len(own)}")
            ids.append(token_ids)
            lengths.append(own if length is None else torch.nn.functional.pad(own, (0, length - len(own))))
        return TokenSupport.from_lengths(torch.cat(ids), torch.cat(lengths)).to(device or "cpu")

    @property
    def positions(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> torch.Tensor:
        """[positions] int64: how many tokens each could have been; 0 is the whole vocabulary."""
        return self.offsets.long().diff()

    def to(self, device) -> "TokenSupport":
        return TokenSupport(self.ids.to(device), self.offsets.to(device))

    def take(self, index: torch.Tensor) -> "TokenSupport":
        """Of some positions: their numbers [n] int64, in that order, or a bool mask [positions]."""
        if not isinstance(index, torch.Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.bool):
            got = f"{kind(index)} {list(index.shape)}" if isinstance(index, torch.Tensor) else kind(index)
            raise TypeError(f"index must be an int64 tensor [n], or a bool one [{self.positions}], got {got}")
        if index.dtype == torch.bool:
            if len(index) != self.positions:
                raise ValueError(f"index must be [{self.positions}] as a bool tensor, got {list(index.shape)}")
            index = index.nonzero().squeeze(1)
        lengths, starts = self.lengths()[index], self.offsets[:-1].long()[index]
        row = torch.repeat_interleave(torch.arange(len(index), device=index.device), lengths)
        shift = starts - lengths.cumsum(0) + lengths
        return TokenSupport.from_lengths(self.ids[shift[row] + torch.arange(len(row), device=row.device)], lengths)

    def to_mask(self, vocab: int) -> torch.Tensor:
        """[positions, vocab] bool; all True where a range is empty. Ids outside of the vocabulary are left out."""
        facts = self.facts()
        if facts.wrong:
            raise ValueError(facts.wrong)
        mask = (self.lengths() == 0).unsqueeze(1).repeat(1, vocab)
        inside = (self.ids >= 0) & (self.ids < vocab)
        mask[facts.row_of[inside], self.ids[inside].long()] = True
        return mask

    def facts(self) -> "Facts":
        """What a look at the values has found; taken again when they were changed."""
        known = self.known()
        if known is None:
            known = Facts.of(self)
            object.__setattr__(self, "_facts", (self._versions(), known))
        return known

    def known(self) -> "Facts | None":
        """`facts`, where they need no look."""
        versions, facts = self.__dict__.get("_facts", (None, None))
        return facts if versions is not None and versions == self._versions() else None

    def _versions(self):
        """None of inference tensors, which do not count their changes."""
        tensors = self.ids, self.offsets
        return None if any(x.is_inference() for x in tensors) else tuple(x._version for x in tensors)

    def __repr__(self):
        return f"TokenSupport(positions={self.positions}, ids={len(self.ids)}, device={self.ids.device})"

    def __getstate__(self):
        return {"ids": self.ids, "offsets": self.offsets}


@dataclass(frozen=True)
class Facts:
    """Of a support's values: numbers on the host, tensors beside the ids."""

    wrong: str | None  # what is wrong with the offsets; then nothing else is known
    lowest: int = 0  # id
    highest: int = -1
    repeats: bool = False  # whether a range has an id twice, or may have
    empty: int = 0  # ranges
    lengths: torch.Tensor | None = None  # [positions] int64
    ranges: torch.Tensor | None = None  # [positions, 2] int64, first and last of each
    row_of: torch.Tensor | None = None  # [M] int64, the position of each id
    place: torch.Tensor | None = None  # [M] int64: 0, 1, ...
    nowhere: torch.Tensor | None = None  # [positions] int64: -1, 0 where the range is empty
    over: dict = field(default_factory=dict)  # of `Supports.over`, by the size of the vocabulary

    @staticmethod
    def of(support):
        ids, offsets = support.ids, support.offsets.long()
        total, lengths = len(ids), offsets.diff()
        falls = (lengths < 0).sum()
        ends = torch.stack([offsets[0], offsets[-1], falls, (lengths == 0).sum()])
        first, last, falls, empty = ends.tolist()
        if first != 0 or last != total or falls:
            where = f"; they fall behind position {int((lengths < 0).nonzero()[0])}" if falls else ""
            wanted = f"support.offsets must rise from 0 to {total}, the number of ids, without falling"
            return Facts(f"{wanted}, got {first} to {last}{where}")
        row_of = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths, output_size=total)
        place, ranges = torch.arange(total, device=ids.device), torch.stack([offsets[:-1], offsets[1:]], 1)
        lowest, highest, repeats = 0, -1, False
        if total:
            lowest, highest = torch.stack(ids.aminmax()).tolist()
            size = highest - lowest + 1  # garbage of masked positions may be of any size
            repeats = size * len(lengths) >= 2**62 or bool(_repeats(ids.long() - lowest, row_of, size).any())
        return Facts(None, lowest, highest, repeats, empty, lengths, ranges, row_of, place, (lengths > 0).long().neg())


def _repeats(ids, row_of, size):
    """Of each pair of neighbours in the order of (row, id): whether they are the same."""
    key = (row_of * size + ids).sort().values
    return key[1:] == key[:-1]


def _pair(number, mask, length):
    """(token_ids, offsets) [..] int64 on the CPU of one sequence."""
    if mask is None:
        if length is None:
            raise ValueError(f"sequence {number} must have (token_ids, offsets) without a length, got None")
        return torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    if isinstance(mask, TokenSupport):
        mask = mask.ids, mask.offsets
    elif hasattr(mask, "token_ids") and hasattr(mask, "offsets"):
        mask = mask.token_ids, mask.offsets
    if not isinstance(mask, (tuple, list)) or len(mask) != 2:
        wanted = "(token_ids, offsets), an object with these attributes, or None"
        raise TypeError(f"sequence {number} must be {wanted}, got {kind(mask)}")
    found = []
    for name, given in zip(("token_ids", "offsets"), mask, strict=True):
        try:
            x = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} of sequence {number} must be integers [..], got {kind(given)}: {error}") from error
        if x.dim() != 1 or (x.numel() and (x.is_floating_point() or x.dtype == torch.bool)):
            raise TypeError(f"{name} of sequence {number} must be integers [..], got {x.dtype} {list(x.shape)}")
        found.append(x.long().cpu())
    return found


def _rows(x):
    """[.., K] -> [positions, K]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_integers(name, x):
    if not isinstance(x, torch.Tensor) or x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {kind(x)}")


def check_support(support, tokens, device):
    """Type, shape and device; no values."""
    if torch.compiler.is_compiling():
        raise RuntimeError("support cannot be used under torch.compile: call inside of torch.compiler.disable")
    if not isinstance(support, TokenSupport):
        raise TypeError(f"support must be a TokenSupport or None, got {type(support).__name__}")
    if support.positions != tokens.numel():
        raise ValueError(
            f"support.offsets must have {tokens.numel() + 1} entries, one more than the {tokens.numel()} positions of "
            f"{list(tokens)}, got {support.positions + 1}"
        )
    if support.ids.device != device:
        raise ValueError(f"support must be on {device} as hidden is, got {support.ids.device}")


def found_in(support, facts, token_ids):
    """[positions] int64: where among all ids a position's token is, -1 where it is not, anything where its range is empty."""
    here = facts.place.where(support.ids == token_ids[facts.row_of], -1)
    return facts.nowhere.scatter_reduce(0, facts.row_of, here, "amax")


def wrong_values(support, facts, kept, vocab, tokens):
    """None, or what is wrong at the kept positions, named with its place; waits for the device where the facts leave a doubt.

    ``kept`` [positions] is the mask, ``tokens`` its shape.
    """
    if facts.wrong:
        return facts.wrong
    if facts.lowest >= 0 and facts.highest < vocab and not facts.repeats:
        return None
    own = kept[facts.row_of].nonzero().squeeze(1)
    ids, row_of = support.ids[own].long(), facts.row_of[own]
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside):
        first = int(outside[0])
        place = _place(int(row_of[first]), tokens)
        return f"support.ids must be in [0, V = {vocab}) where the mask is 1, got {int(ids[first])} at position {place}"
    key, order = (row_of * vocab + ids).sort()
    again = (key[1:] == key[:-1]).nonzero()
    if len(again):
        first = int(order[again[0, 0]])
        place = _place(int(row_of[first]), tokens)
        return f"support.ids must name a token once in a range, got {int(ids[first])} twice at position {place}"
    return None


def wrong_token(support, kept, token_ids, tokens, name):
    """What to say where a kept position's token is not among its ids."""
    facts = support.facts()
    missing = kept & (found_in(support, facts, token_ids) < 0)
    first = int(missing.nonzero()[0])
    own = support.ids[slice(*facts.ranges[first].tolist())].tolist()
    return (
        f"{name} must be among support.ids where the mask is 1, got {int(token_ids[first])} at position {_place(first, tokens)}, "
        f"whose support is {own[:8]}{' ..' * (len(own) > 8)}; range t is what token t could have been, which hidden[t] predicts"
    )


def _place(position, tokens):
    """A flattened position as an index of the tokens' shape."""
    place = []
    for size in reversed(tokens):
        position, rest = divmod(position, size)
        place.append(rest)
    return place[::-1] if len(place) != 1 else place[0]


@functools.cache  # once per process
def _warn_of_width():
    warnings.warn(
        f"support has more than {_WIDE} tokens a position in the mean: the whole vocabulary would cost less; leave those ranges "
        "empty that have nearly all of it",
        stacklevel=2,
    )


@dataclass(frozen=True)
class Supports:
    """The supports of a call and its flattened tokens: which rows are computed over theirs, and how."""

    support: TokenSupport
    facts: Facts
    places: torch.Tensor  # [positions] int64, of `found_in`
    vocab: int

    @staticmethod
    def checked(args, kept, vocab, shard):
        """Raises ValueError for wrong values at kept positions, but for tokens outside of their supports: `missing` counts them."""
        support = args.support
        facts = support.facts()
        message = wrong_values(support, facts, kept, vocab, args.mask.shape)
        if shard is not None:
            shard.agree(kept.device, support=_digest(support), wrong_supports=int(message is not None))
        if message is not None:
            raise ValueError(message)
        return Supports.of(args, facts, vocab)

    @staticmethod
    def of(args, facts, vocab):
        ranges = len(facts.lengths) - facts.empty
        if len(facts.place) > _WIDE * ranges > 0:
            _warn_of_width()
        return Supports(args.support, facts, found_in(args.support, facts, args.completion_ids.reshape(-1)), vocab)

    @property
    def over(self):
        """[positions] int8: 0 computed over the whole vocabulary, 2 over the support, 4 not at all: it is a single token."""
        facts, vocab = self.facts, self.vocab
        if vocab not in facts.over:
            lengths = facts.lengths
            whole = (lengths == 0) | ((lengths == vocab) if vocab > 1 else lengths < 0)
            over = torch.full_like(lengths, 2, dtype=torch.int8).masked_fill(whole, 0)
            facts.over[vocab] = over.masked_fill(lengths == 1, 4)
        return facts.over[vocab]

    def missing(self, kept):
        """0-dim: kept positions whose token is not among the ids."""
        return (kept & (self.places < 0)).sum()

    def kinds(self, kept, live):
        """[positions] int8: `over`, and 1 more where not live; 6 where masked."""
        return (self.over + ~live).masked_fill(~kept, 6)

    def rows(self, index, live):
        facts = self.facts
        ranges = facts.ranges[index]
        # a copy: the backward needs the ids as they are now
        ids = self.support.ids.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
        return PairRows(index, live, ids, ranges, facts.row_of, self.places[index] - ranges[:, 0])

    @staticmethod
    def given(args, index, kept, vocab, trains):
        """(the rows of the whole vocabulary, `PairRows` of the others, whether a value is bad) of rows that are not looked at.

        All are live. A support that has an empty range, if only of a masked position, makes the host wait for the rows of these.
        """
        support, nothing = args.support, index[:0]
        waits = can_sync(args.hidden)
        facts = support.facts() if waits else support.known()
        if facts is None or (facts.empty and not waits):
            raise RuntimeError(
                "support cannot be used under torch.compile (call inside of torch.compiler.disable); in a CUDA graph a call "
                "outside of one must have looked at it before, and no range may be empty"
            )
        wrong = torch.zeros((), dtype=torch.bool, device=index.device)
        if wrong_values(support, facts, kept, vocab, args.mask.shape) is not None:
            return index, None, ~wrong
        over, whole = Supports.of(args, facts, vocab), nothing
        if facts.empty:
            chosen = over.over[index] == 0
            whole, index = index[chosen], index[~chosen]
        pairs = over.rows(index, len(index) if trains else 0)
        single = facts.lengths[index] == 1
        first, last = pairs.ranges.unbind(1)
        ids = pairs.ids.masked_fill((facts.lengths == 1)[facts.row_of], -1)
        pairs = replace(pairs, ids=ids, ranges=torch.stack([first, torch.where(single, first, last)], 1), single=single)
        return whole, pairs, over.missing(kept) > 0


def _digest(support):
    """A number that other ids or offsets do not have, but by chance."""
    total = 0
    for x in (support.ids.long(), support.offsets.long()):
        factors = torch.arange(1, len(x) + 1, device=x.device) * 0x1E3779B97F4A7C15
        total = total * 31 + int(((x + 1) * factors).sum())
    return total % 2**53
