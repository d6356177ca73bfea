"""The collectives: a vocabulary sharded over ranks, and sums over ranks of different batches.

A vocabulary-parallel head: rank k of a group holds some rows of the weight, in rank order, and every rank the same hidden states.
Per tile of rows the ranks exchange their statistics, 16 bytes a row each, and merge them in rank order, so that all have the same
log-probs bit by bit; each then makes the gradient of its own columns, and the parts of dH are added up while the next tile is made.
For N kept rows, T of them with a gradient, of depth D and element size e, on each of P ranks:

    sizes and counts     2 exchanges a call of some 100 bytes
    statistics           16 N bytes given and 16 N P received (32 and 32 P for float64)
    dH                   T D e bytes into an all-reduce, and r D a more for an adapter (a = 4, or 8 for float64); with
                         ``sequence_parallel`` M D e into a reduce-scatter instead, and M D e / P into the gathering of hidden, of
                         all M rows
    rows with a gradient N bytes into an all-reduce in a two-phase backward

`counted()` counts what really goes through. How many collectives there are depends on shapes that all ranks share, never on one
rank's data, and the first exchange carries each rank's shapes and refusals, so that a rank which raises makes all of them raise.
"""

import contextlib
import functools
import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from .arguments import host_may_wait
from .row_statistics import merged

_counters = []
_PARTIAL = "partial:"


@contextlib.contextmanager
def counted():
    """A dict that fills with bytes handed to each kind of collective while the block runs, in this process."""
    counter = {}
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(kind, tensor):
    for counter in _counters:
        counter[kind] = counter.get(kind, 0) + tensor.numel() * tensor.element_size()


def _gathered(x, group, kind):
    """[P, *x.shape], in rank order."""
    _count(kind, x)
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
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

    @property
    def op_arguments(self):
        """(group, sizes) as the ops take them, and `shard_named` reads them."""
        return (self.name if self.sums_hidden else _PARTIAL + self.name), list(self.sizes)

    @staticmethod
    def of(group, weight, facts, sums_hidden=True):
        """Exchanges the sizes. ``facts``: name -> int that must be the same on all ranks.

        Raises ValueError on every rank, naming what differs.
        """
        if not host_may_wait(weight):
            raise RuntimeError("vocab_parallel_group cannot be used under torch.compile or while a CUDA graph is captured")
        digest = {name: value if isinstance(value, int) else _digest(value) for name, value in facts.items()}
        everywhere = _exchanged([weight.shape[0], *digest.values()], weight.device, group)
        for i, name in enumerate(digest, 1):
            values = [row[i] for row in everywhere]
            if len(set(values)) > 1:
                numbers = isinstance(facts[name], int)
                shown = ", ".join(f"rank {rank}: {v}" for rank, v in enumerate(values)) if numbers else "others"
                raise ValueError(f"{name} must be the same on all ranks of vocab_parallel_group, got {shown}")
        return VocabShard(group.group_name, dist.get_rank(group), tuple(row[0] for row in everywhere), sums_hidden)

    def agree(self, device, **counts):
        """Raises ValueError on every rank if a count that a rank has found in its data differs between them."""
        everywhere = _exchanged(list(counts.values()), device, self.group)
        for i, name in enumerate(counts):
            if len({row[i] for row in everywhere}) > 1:
                shown = ", ".join(f"rank {rank}: {row[i]}" for rank, row in enumerate(everywhere))
                raise ValueError(f"hidden, ids and mask must be the same on all ranks of vocab_parallel_group; {name}: {shown}")

    def statistics(self, stats):
        """Statistics [R, 4] of this rank's columns -> (of the whole vocabulary, of all other ranks' columns)."""
        parts = _gathered(stats, self.group, "statistics").unbind()
        others = [part for rank, part in enumerate(parts) if rank != self.rank]
        return functools.reduce(merged, parts), functools.reduce(merged, others) if others else None

    def sum_later(self, x):
        """Starts adding x up over the ranks, in place; the returned function waits for it."""
        if not self.sums_hidden:
            return lambda: None
        _count("dH", x)
        work = dist.all_reduce(x, group=self.group, async_op=True)
        return work.wait

    def sum_now(self, x):
        _count("dA", x)
        dist.all_reduce(x, group=self.group)

    def any(self, wanted):
        """Where some rank wants a row, all do."""
        flags = wanted.to(torch.uint8)
        _count("rows", flags)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return flags.bool()


def shard_named(name: str, sizes) -> VocabShard | None:
    """The shard that an op was told of by `op_arguments`; None for no name."""
    if not name:
        return None
    sums_hidden = not name.startswith(_PARTIAL)
    name = name.removeprefix(_PARTIAL)
    return VocabShard(name, dist.get_rank(_group_of(name)), tuple(sizes), sums_hidden)


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
        _count("dH", dh)
        dist.reduce_scatter_tensor(own, dh.contiguous(), group=ctx.group)
        return own, None


def gathered_sequence(hidden, group):
    """Hidden states sharded along their first dimension, in rank order, as all of them; for the loss with ``sums_hidden`` off."""
    if group is None:
        raise ValueError("vocab_parallel_group must be given with sequence_parallel, got None")
    lengths = [row[0] for row in _exchanged([hidden.shape[0]], hidden.device, group)]
    if len(set(lengths)) > 1:
        shown = ", ".join(f"rank {rank}: {n}" for rank, n in enumerate(lengths))
        raise ValueError(f"hidden must have the same first dimension on all ranks with sequence_parallel, got {shown}")
    return _GatheredSequence.apply(hidden, group)


def of_dtensors(hidden, weight, bias, lora, group):
    """(hidden, weight, bias, lora, group) with DTensors as this rank's part: a weight in Shard(0) is a vocabulary-parallel head.

    Nothing is gathered; the gradients come back as DTensors. Raises TypeError and ValueError for any other layout.
    """
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "lora A": None, "lora B": None}
    if isinstance(lora, (tuple, list)) and len(lora) == 3:
        tensors |= {"lora A": lora[0], "lora B": lora[1]}
    if not any(isinstance(x, DTensor) for x in tensors.values()):
        return hidden, weight, bias, lora, group
    if not isinstance(weight, DTensor):
        raise TypeError("weight must be a DTensor where hidden, bias or lora is one")
    sharded = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(not weight.placements[i].is_shard(0) for i in sharded):
        raise ValueError(f"weight must be sharded by rows over one dimension of its mesh, Shard(0), got {weight.placements}")
    if sharded:
        own = weight.device_mesh.get_group(sharded[0])
        if group is not None and group is not own:
            raise ValueError("vocab_parallel_group must be None or the group of the weight's mesh dimension")
        group = own

    def part(name, like_weight):
        x = tensors[name]
        if not isinstance(x, DTensor):
            return x
        wanted = weight.placements if like_weight else (Replicate(),) * x.device_mesh.ndim
        if tuple(x.placements) != tuple(wanted):
            raise ValueError(f"{name} must be laid out as {wanted}, got {x.placements}")
        return x.to_local()

    parts = {name: part(name, name in ("weight", "bias", "lora B")) for name in tensors}
    if tensors["lora A"] is not None:
        lora = (parts["lora A"], parts["lora B"], lora[2])
    return parts["hidden"], parts["weight"], parts["bias"], lora, group


@contextlib.contextmanager
def refusing_together(group, like):
    """A rank whose arguments are refused inside the block tells the others, which then raise too instead of waiting for it."""
    if group is None:
        yield
        return
    device = getattr(like, "device", torch.device("cpu"))
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        _exchanged([1], device, group)
        raise
    refused = [rank for rank, (flag,) in enumerate(_exchanged([0], device, group)) if flag]
    if refused:
        raise RuntimeError(f"rank {', '.join(map(str, refused))} of vocab_parallel_group refused its arguments; the error is there")


def _exchanged(numbers, device, group):
    """Every rank's list of integers, by rank."""
    return _gathered(torch.tensor(numbers, dtype=torch.int64, device=device), group, "sizes").tolist()


def _digest(value):
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")


def _group_of(name):
    return dist.distributed_c10d._resolve_process_group(name)


def reduce_metrics(metrics: dict, mask: torch.Tensor, group=None) -> dict:
    """The metrics of all ranks' batches together, by their kept tokens; minima and maxima by theirs. One all-reduce and one gather.

    Args:
        metrics: name -> 0-dim tensor, the same names on every rank.
        mask: [B, T] of this rank; a rank that keeps nothing has no say.
        group: torch.distributed group; None is the default one.

    Returns:
        name -> 0-dim tensor, the same on every rank; 0 where no rank keeps a token.
    """
    names = sorted(metrics)
    count = mask.sum().to(torch.float64)
    own = torch.stack([count, *(metrics[name].detach().to(torch.float64) for name in names)])
    rows = _gathered(own, group, "metrics")
    counts, values = rows[:, 0], rows[:, 1:]
    heard = counts > 0
    total = counts.sum()
    mean = (values * counts.unsqueeze(1)).where(heard.unsqueeze(1), 0.0).sum(0) / total.clamp(min=1)
    low = values.masked_fill(~heard.unsqueeze(1), float("inf")).amin(0)
    high = values.masked_fill(~heard.unsqueeze(1), -float("inf")).amax(0)
    kinds = {"_min": low, "_max": high}
    chosen = {name: kinds.get(name[-4:], mean)[i] for i, name in enumerate(names)}
    return {name: value.where(total > 0, 0.0).to(metrics[name].dtype) for name, value in chosen.items()}
