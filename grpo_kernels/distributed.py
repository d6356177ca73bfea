"""The collectives: a vocabulary sharded over ranks, and sums over ranks of different batches.

A vocabulary-parallel head: rank k of a group holds some rows of the weight, in rank order, and every rank the same hidden states.
Per tile of rows the ranks exchange their statistics, 16 bytes a row each, and merge them in rank order, so that all have the same
log-probs bit by bit; each then makes the gradient of its own columns, and the parts of dH are added up while the next tile is made.
For N kept rows, T of them with a gradient, of depth D and element size e, on each of P ranks:

    sizes and counts     2 exchanges, 128 and 24 bytes; with ``kept_rows`` only the first, with ``sequence_parallel`` 128 more
    statistics           16 N bytes given and 16 N P received (32 and 32 P for float64)
    dH                   T D e bytes into an all-reduce, and r D a more for an adapter (a = 4, or 8 for float64); with
                         ``sequence_parallel`` M D e into a reduce-scatter instead, and M D e / P into the gathering of hidden, of
                         all M rows
    rows with a gradient N bytes into an all-reduce in a two-phase backward

`counted()` counts what really goes through. How many collectives there are depends on shapes that all ranks share, never
on one rank's data, and the first exchange carries each rank's shapes, options and refusals, so that a rank which raises makes all
of them raise. It has the same size whatever a rank has to say.
"""

import contextlib
import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .losses.config import GRPOLossConfig
from .losses.covariance import call_sums, lowest, marked_count, marking_order
from .losses.objective import entropy_threshold, masked_last, metric_weight, top_tokens
from .losses.terms import TERMS

_OF_THE_KEEPING = ("_min", "_max", "phi_seq_mean")  # metrics of ranks that keep a token
_NUMBERS = 16  # in an exchange before the first tile


_counters = []


@contextlib.contextmanager
def counted():
    """A dict that fills with bytes handed to each kind of collective while the block runs, in this process."""
    counter = {}
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def count(kind, tensor):
    for counter in _counters:
        counter[kind] = counter.get(kind, 0) + tensor.numel() * tensor.element_size()


def _gathered(x, group, kind):
    """[P, *x.shape], in rank order."""
    count(kind, x)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return torch.stack(out)


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a vocabulary."""

    name: str  # of the group: ops take strings
    rank: int
    sizes: tuple[int, ...]  # rows of each rank
    sums_hidden: bool = True  # False: dH stays this rank's part, a reduce-scatter will sum it

    @property
    def group(self):
        return _group_of(self.name)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def widest(self) -> int:
        """What all ranks plan with: tiles, and so collectives, must be the same on each."""
        return max(self.sizes)

    @staticmethod
    def of(meeting, sums_hidden=True):
        """Of the rows that each rank has brought to a `Meeting`; None without a group."""
        group, sizes = meeting.group, tuple(meeting.sizes)
        if group is None:
            return None
        if not sum(sizes):
            raise ValueError("weight must have at least one row on some rank of vocab_parallel_group, got none")
        return VocabShard(group.group_name, dist.get_rank(group), sizes, sums_hidden)

    def agree(self, device, **counts):
        """Raises ValueError on every rank if a count that a rank has found in its data differs between them."""
        everywhere = _exchanged(list(counts.values()), device, self.group)
        for i, name in enumerate(counts):
            if len({row[i] for row in everywhere}) > 1:
                shown = ", ".join(f"rank {rank}: {row[i]}" for rank, row in enumerate(everywhere))
                raise ValueError(f"hidden, ids and mask must be the same on all ranks of vocab_parallel_group; {name}: {shown}")

    def gathered(self, stats):
        """Statistics [R, 4] of each rank's columns, in rank order."""
        return _gathered(stats, self.group, "statistics").unbind()

    def sum_later(self, x):
        """Starts adding x up over the ranks, in place; the returned function waits for it."""
        if not self.sums_hidden:
            return lambda: None
        count("dH", x)
        work = dist.all_reduce(x, group=self.group, async_op=True)
        return work.wait

    def sum_now(self, x):
        count("dA", x)
        dist.all_reduce(x, group=self.group)

    def summed(self, x):
        """The ranks' parts of x added up, differentiable: each rank has the gradient of the sum already."""
        return _Summed.apply(x, self)

    def any(self, wanted):
        """Where some rank wants a row, all do."""
        flags = wanted.to(torch.uint8)
        count("rows", flags)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return flags.bool()


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shard):
        count("logits", x)
        total = x.clone()
        dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g, None


class _GatheredSequence(torch.autograd.Function):
    """[N / P, D] of each rank -> [N, D]; backward, the ranks' parts of the gradient summed and cut back."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return _gathered(hidden, group, "hidden").flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        own = dh.new_empty(dh.shape[0] // dist.get_world_size(ctx.group), *dh.shape[1:])
        count("dH", dh)
        dist.reduce_scatter_tensor(own, dh.contiguous(), group=ctx.group)
        return own, None


def gathered_sequence(hidden, group, name="hidden"):
    """Hidden states sharded along their first dimension, in rank order, as all of them; for the loss with ``sums_hidden`` off."""
    if group is None:
        raise ValueError("vocab_parallel_group must be given with sequence_parallel, got None")
    with validate_across_ranks(group, hidden) as meeting:
        if not isinstance(hidden, torch.Tensor) or _is_dtensor(hidden) or hidden.dim() < 1:
            raise TypeError(f"{name} must be a tensor [.., D] with sequence_parallel, got {type(hidden).__name__}")
        meeting.facts = {
            f"first dimension of {name}": hidden.shape[0], f"shape of {name}": list(hidden.shape), "dtype": str(hidden.dtype),
            "sequence_parallel": 1, "which tensors need a gradient": torch.is_grad_enabled() and hidden.requires_grad,
        }  # fmt: skip
    return _GatheredSequence.apply(hidden, group)


def _is_dtensor(x):
    # where there is one, its module was imported; importing it takes as long as half of PyTorch
    return hasattr(dist, "tensor") and isinstance(x, dist.tensor.DTensor)


def group_of(weight, group):
    """The group over which the vocabulary is sharded: that of a sharded weight's mesh dimension, or the given one."""
    sharded = [i for i, p in enumerate(weight.placements) if not p.is_replicate()] if _is_dtensor(weight) else []
    if not sharded:
        return group
    own = weight.device_mesh.get_group(sharded[0])
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own):
        raise ValueError("vocab_parallel_group must be None or the group of the weight's mesh dimension")
    return own


def of_dtensors(hidden, weight, bias, lora, group):
    """(hidden, weight, bias, lora) with DTensors as this rank's part: a weight in Shard(0) is a vocabulary-parallel head.

    ``group`` is that of `group_of`. Nothing is gathered; the gradients come back as DTensors. Raises TypeError and ValueError for
    any other layout.
    """
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "lora A": None, "lora B": None}
    if isinstance(lora, (tuple, list)) and len(lora) == 3:
        tensors |= {"lora A": lora[0], "lora B": lora[1]}
    if not any(_is_dtensor(x) for x in tensors.values()):
        return hidden, weight, bias, lora
    if not _is_dtensor(weight):
        raise TypeError("weight must be a DTensor where hidden, bias or lora is one")
    sharded = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(not weight.placements[i].is_shard(0) for i in sharded):
        raise ValueError(f"weight must be sharded by rows over one dimension of its mesh, Shard(0), got {weight.placements}")

    def part(name, like_weight):
        x = tensors[name]
        if not _is_dtensor(x):
            return x
        wanted = weight.placements if like_weight else (dist.tensor.Replicate(),) * x.device_mesh.ndim
        if tuple(x.placements) != tuple(wanted):
            raise ValueError(f"{name} must be laid out as {wanted}, got {x.placements}")
        return x.to_local()

    parts = {name: part(name, name in ("weight", "bias", "lora B")) for name in tensors}
    if tensors["lora A"] is not None:
        lora = (parts["lora A"], parts["lora B"], lora[2])
    return parts["hidden"], parts["weight"], parts["bias"], lora


class Meeting:
    """What the ranks of a group tell each other once in a call."""

    def __init__(self, group=None):
        self.group = group
        self.own_rows = 0  # of the vocabulary
        self.facts = {}  # name -> what must be the same on all ranks
        self.sizes = ()  # afterwards: each rank's ``own_rows``

    def numbers(self):
        values = [value if isinstance(value, int) else _digest(value) for value in self.facts.values()]
        return [0, self.own_rows, *values, *[0] * (_NUMBERS - 2 - len(values))]

    def compare(self, everywhere, name_of_group):
        """Raises on every rank if one has refused its arguments or brings another fact."""
        refused = [rank for rank, row in enumerate(everywhere) if row[0]]
        if refused:
            raise RuntimeError(f"rank {', '.join(map(str, refused))} of {name_of_group} refused its arguments; the error is there")
        self.sizes = [row[1] for row in everywhere]
        for i, name in enumerate(self.facts, 2):
            values = [row[i] for row in everywhere]
            if len(set(values)) > 1:
                number = isinstance(self.facts[name], int)
                shown = ", ".join(f"rank {rank}: {v}" for rank, v in enumerate(values)) if number else "others"
                raise ValueError(f"{name} must be the same on all ranks of {name_of_group}, got {shown}")


@contextlib.contextmanager
def validate_across_ranks(group, like, name="vocab_parallel_group"):
    """A rank whose arguments are refused inside the block tells the others, which then raise too instead of waiting for it.

    Yields a `Meeting`: the facts that the block gives it are compared at its end. No collective of the group may stand inside.
    """
    meeting = Meeting(group)
    if group is None:
        yield meeting
        return
    device = like.device if isinstance(like, torch.Tensor) else torch.device("cpu")
    try:
        yield meeting
    except Exception:
        _exchanged([1] + [0] * (_NUMBERS - 1), device, group)
        raise
    meeting.compare(_exchanged(meeting.numbers(), device, group), name)


def _exchanged(numbers, device, group):
    """Every rank's list of integers, by rank."""
    return _gathered(torch.tensor(numbers, dtype=torch.int64, device=device), group, "sizes").tolist()


def _digest(value):
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")


def _group_of(name):
    return dist.distributed_c10d._resolve_process_group(name)


@dataclass(frozen=True)
class QuantileOnly:
    """A data_parallel_group for the entropy quantile alone: means stay those of this rank's tokens, as in TRL."""

    group: object


def group_in_use(config, data_parallel_group):
    """The group where the loss has collectives over it, else None."""
    if data_parallel_group is None or not isinstance(config, GRPOLossConfig):
        return None
    means = _means_over(config, data_parallel_group) or _marks_over(config, data_parallel_group)
    if config.top_entropy_quantile == 1 and not means:
        return None
    return data_parallel_group.group if isinstance(data_parallel_group, QuantileOnly) else data_parallel_group


def _means_over(config, data_parallel_group):
    """Whether bnpo or the entropy bonus is a mean over the ranks' tokens."""
    means = config.aggregation == "bnpo" or config.entropy_coef != 0
    return means and not (data_parallel_group is None or isinstance(data_parallel_group, QuantileOnly))


def _marks_over(config, data_parallel_group):
    """Whether clip_cov or kl_cov chooses among the ranks' tokens."""
    marks = TERMS[config.loss_type].scope == "call"
    return marks and not (data_parallel_group is None or isinstance(data_parallel_group, QuantileOnly))


def token_count(m, config, data_parallel_group):
    """0-dim: this rank's share of the tokens that means are over, at least 1 of all; None where they are its own."""
    if not _means_over(config, data_parallel_group):
        return None
    tokens = m.sum()
    count("means", tokens)
    dist.all_reduce(tokens, group=data_parallel_group)
    return tokens.clamp(min=1) / dist.get_world_size(data_parallel_group)


def top_tokens_over_ranks(entropy, m, config, data_parallel_group):
    """(mask [B, T], count) of the tokens above the entropy quantile of all ranks' tokens; None without a group or a quantile."""
    if data_parallel_group is None or config.top_entropy_quantile == 1:
        return None
    group = group_in_use(config, data_parallel_group)
    values, tokens = _gathered_ragged(masked_last(entropy, m), group), m.sum()
    count("quantile", tokens)
    dist.all_reduce(tokens, group=group)
    top = top_tokens(entropy, m, entropy_threshold(entropy, m, config.top_entropy_quantile, (values, tokens)))
    # only the bonus divides by them
    own = top.sum().clamp(min=1)
    share = token_count(top, config, data_parallel_group) if config.entropy_coef != 0 else None
    return top, own if share is None else share


@torch.no_grad()
def marked_tokens_over_ranks(logps, t, config, data_parallel_group):
    """[B, T] bool: this rank's of the tokens that clip_cov or kl_cov marks among all; None without a group or such a loss."""
    if not _marks_over(config, data_parallel_group):
        return None
    m, rank = t.mask, dist.get_rank(data_parallel_group)
    logps = logps.where(m > 0, 0.0)
    sums = call_sums(logps, t)
    count("marks", sums)
    dist.all_reduce(sums, group=data_parallel_group)
    order = marking_order(logps, t, sums, config, rank)
    ranks = _gathered_ragged(order.flatten(), data_parallel_group)
    chosen = lowest(ranks, marked_count(sums[2], config)).view(dist.get_world_size(data_parallel_group), -1)
    return chosen[rank, : m.numel()].view_as(m)


def _gathered_ragged(values, group):
    """All ranks' values, padded with inf to the longest rank; the same two collectives whatever a rank holds."""
    length = torch.full((), values.numel(), device=values.device)
    count("quantile", length)
    dist.all_reduce(length, op=dist.ReduceOp.MAX, group=group)
    padded = values.new_full((int(length),), float("inf"))
    padded[: values.numel()] = values
    return _gathered(padded, group, "quantile").flatten()


def reduce_metrics(metrics: dict, mask: torch.Tensor, config: GRPOLossConfig, *, sequences: int | None = None, shares=True,
                   per_token_advantages=False, group=None) -> dict:  # fmt: skip
    """The metrics of all ranks' batches together: means by what they are means of, minima and maxima by theirs. One gather.

    Args:
        metrics: name -> 0-dim tensor, the same names on every rank.
        mask: [B, T] of this rank, or [N] packed.
        config: the loss's options.
        sequences: B; None is mask's first dimension.
        shares: the losses were given ``num_items`` (dapo and what is added up like it) or a ``data_parallel_group`` (bnpo), so that
            their mean over the ranks is that of the whole batch. False: each was divided by its own tokens.
        per_token_advantages: advantages are not [B].
        group: torch.distributed group; None is the default one.

    Returns:
        name -> 0-dim tensor, the same on every rank; 0 where no rank keeps a token. A rank that keeps none has no say in vespo's
        phi, in minima and in maxima.
    """
    names = sorted(metrics)
    tokens = mask.sum().to(torch.float64)
    sequences = len(mask) if sequences is None else sequences
    weights = {name: metric_weight(name, config, tokens, sequences, shares, not per_token_advantages) for name in names}
    weights |= {name: weight * (tokens > 0) for name, weight in weights.items() if name.endswith(_OF_THE_KEEPING)}
    weights = torch.stack([torch.as_tensor(weights[name], device=mask.device).double() for name in names])
    values = torch.stack([metrics[name].detach().to(torch.float64) for name in names])
    values = values.where((weights > 0) & ((tokens > 0) | ~values.isnan()), 0.0)
    rows = _gathered(torch.cat([tokens.unsqueeze(0), weights, values]), group, "metrics")
    total, (weights, values) = rows[:, 0].sum(), rows[:, 1:].unflatten(1, (2, len(names))).unbind(1)
    mean = (values * weights).sum(0) / weights.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    low, high = (values.masked_fill(weights == 0, end) for end in (float("inf"), -float("inf")))
    kinds = {"_min": low.amin(0), "_max": high.amax(0)}
    chosen = {name: kinds.get(name[-4:], mean)[i] for i, name in enumerate(names)}
    return {name: value.where(total > 0, 0.0).to(metrics[name].dtype) for name, value in chosen.items()}
