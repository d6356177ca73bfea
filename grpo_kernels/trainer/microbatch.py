"""Batches of a rollout, cut and joined, and a micro-batch as model and loss take it.

It holds no completion that trains nothing, and no padding where that can be had. All of it is exact. A completion whose advantage
is 0, or none of whose tokens is kept, has no gradient, unless the KL term or the entropy bonus gives it one; padding is neither
attended to nor trained on. `scale` makes up for a loss that is a mean over what is there. A batch holds its tokens' supports as
``support``, the `TokenSupport` of its mask [B, T]: a row's positions stand together.
"""

from typing import NamedTuple

import torch

from ..losses.objective import OVER_SEQUENCES
from ..support import TokenSupport

PER_TOKEN = ("old_logps", "ref_logps", "ref_hidden", "sampling_logps", "importance_sampling_ratio", "support")
_FLASH = ("flash_attention", "flex_attention", "kernels-community")


class MicroBatch(NamedTuple):
    """B completions in [B, P + T], or packed in [1, N]."""

    model_inputs: dict  # input_ids, attention_mask, position_ids
    loss_inputs: dict  # completion_ids, mask, advantages, cu_seqlens, and of `PER_TOKEN` what there is
    at: torch.Tensor | None  # packed: the places in [N] that predict a kept token; else None
    kept: torch.Tensor | None  # packed: mask [B, T] of those tokens in the batch it was made of
    rows: torch.Tensor | None  # rows of the batch it was made of; None is all
    shape: tuple[int, int]  # [B, T] of the batch it was made of
    scale: torch.Tensor | float  # of the loss
    idle: bool  # nothing in it has a gradient: one completion runs so that all processes do the same

    def predicting(self, hidden):
        """Last hidden states -> those that predict the completion: each token is predicted from the one before it."""
        if self.at is not None:
            return hidden[0, self.at]
        return hidden[:, -self.loss_inputs["mask"].shape[1] - 1 : -1]

    def spread(self, values):
        """What was made of each token, as [B, T, ..] of the whole batch, 0 elsewhere."""
        whole = values.new_zeros(*self.shape, *values.shape[1 if self.at is not None else 2 :])
        if self.kept is not None:
            whole[self.kept] = values
        else:
            rows = slice(None) if self.rows is None else self.rows
            whole[rows, : values.shape[1]] = values
        return whole


def can_skip(config) -> bool:
    """Whether a completion with advantage 0 may be left out: nothing but its own policy term needs it."""
    return not config.trains_without_advantage and config.top_entropy_quantile == 1


def flash(model) -> bool:
    """Whether the model's attention runs on packed rows without ever making a mask of tokens x tokens."""
    return (getattr(model.config, "_attn_implementation", None) or "").startswith(_FLASH)


def trained(mask, advantages) -> torch.Tensor:
    """[B] bool: the completions that have a gradient, where `can_skip`."""
    return mask.any(1) & (advantages != 0)


def split(batch, rows) -> list[dict]:
    """Batches of so many rows each."""
    tensors = {k: v for k, v in batch.items() if v is not None}
    parts = {k: v.split(rows) for k, v in tensors.items() if k != "support"}
    if "support" in tensors:
        parts["support"] = _split_support(tensors["support"], rows * batch["mask"].shape[1])
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _split_support(support, positions):
    """Stretches of so many positions, without a copy of the ids. Waits for the device once."""
    starts = range(0, support.positions, positions)
    bounds = [*support.offsets[:-1:positions].tolist(), len(support.ids)]
    ends = zip(starts, bounds, bounds[1:], strict=False)
    return [TokenSupport(support.ids[a:b], support.offsets[i : i + positions + 1] - a) for i, a, b in ends]


def take(batch, rows) -> dict:
    """The batch of ``rows`` [n] int64, in their order."""
    taken = {name: x[rows] for name, x in batch.items() if name != "support"}
    if "support" in batch:
        taken["support"] = batch["support"].take(_places(batch["mask"])[rows].flatten())
    return taken


def _places(mask):
    """[B, T] int64: of each position among the flattened ones, which `TokenSupport.take` takes when rows or columns were chosen."""
    return torch.arange(mask.numel(), device=mask.device).view(mask.shape)


def joined(batches: list[dict], pad_token_id) -> dict:
    """Batches of a rollout as one, their prompts padded on the left and what is per token of the completion on the right."""
    P = max(batch["input_ids"].shape[1] - batch["mask"].shape[1] for batch in batches)
    T = max(batch["mask"].shape[1] for batch in batches)

    def padded(name, batch, x):
        if x.dim() == 1:
            return x
        t = batch["mask"].shape[1]
        left = P + t - x.shape[1] if name in ("input_ids", "attention_mask") else 0
        fill = (pad_token_id or 0) if name == "input_ids" else 0
        return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (left, T - t), value=fill)

    whole = {}
    for name in batches[0]:
        if name != "support":
            whole[name] = torch.cat([padded(name, batch, batch[name]) for batch in batches])
            continue
        lengths = [padded(name, batch, batch["support"].lengths().view_as(batch["mask"])) for batch in batches]
        ids = torch.cat([batch["support"].ids for batch in batches])
        whole[name] = TokenSupport.from_lengths(ids, torch.cat(lengths).flatten())
    return whole


def make(batch, config, *, positions=True, packed=False, skip=False, group=None) -> MicroBatch:
    """``batch`` holds input_ids and attention_mask [B, P + T], mask [B, T], and what the loss takes per sequence or per token.

    Args:
        positions: give the model position ids, counted as generate counts them.
        packed: one row without padding; the model must tell sequences apart by their position ids.
        skip: leave out completions without a gradient; one always stays, so that a wrapped model runs on every process.
        group: the loss's ``data_parallel_group``, whose other processes skip as well.
    """
    mask, attention = batch["mask"], batch["attention_mask"]
    shape, scale, rows, idle = tuple(mask.shape), 1.0, None, False
    support = batch.get("support")
    if support is not None:  # whose places go through what every other tensor goes through
        batch = {**batch, "support": _places(mask)}
    if skip:
        live = trained(mask, batch["advantages"])
        found = live.nonzero().squeeze(1)
        idle = len(found) == 0
        if idle:
            found = attention.sum(1).argmin().unsqueeze(0)
        if config.aggregation == "bnpo":  # all processes come through here
            scale = _share_of_tokens(mask, found, group)
        if len(found) < len(mask):
            rows = found
            scale = scale if config.aggregation == "bnpo" else _scale(config, mask, rows, "num_items" in batch)
            per_row = ("input_ids", "attention_mask", "mask", "advantages", *PER_TOKEN)
            batch = {k: v[rows] if k in per_row and v is not None else v for k, v in batch.items()}
            mask, attention = batch["mask"], batch["attention_mask"]
    loss_inputs = {name: batch[name] for name in ("advantages", "num_items", *PER_TOKEN) if batch.get(name) is not None}
    parts = (_packed if packed else _trimmed)(batch["input_ids"], attention, mask, loss_inputs, positions)
    model_inputs, loss_inputs, at = parts
    if support is not None:
        loss_inputs["support"] = support.take(loss_inputs["support"].flatten())
    kept = None
    if packed:
        kept = torch.zeros(shape, dtype=torch.bool, device=mask.device)
        kept[slice(None) if rows is None else rows] = mask
    return MicroBatch(model_inputs, loss_inputs, at, kept, rows, shape, scale, idle)


def _scale(config, mask, rows, divided):
    """What the loss of some rows is multiplied by to be that of all."""
    if config.aggregation in OVER_SEQUENCES:
        return len(rows) / len(mask)
    return 1.0 if divided else _share_of_tokens(mask, rows, None)


def _share_of_tokens(mask, rows, group):
    counts = torch.stack([mask[rows].sum(), mask.sum()])
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return counts[0].clamp(min=1) / counts[1].clamp(min=1)


def _trimmed(ids, attention, mask, loss_inputs, positions):
    """Without the columns that are padding in every row."""
    T = mask.shape[1]
    P = ids.shape[1] - T
    left = P - int(attention[:, :P].sum(1).max())
    length = max(1, int(attention[:, P:].sum(1).max()))
    ids, attention, mask = ids[:, left : P + length], attention[:, left : P + length], mask[:, :length]
    loss_inputs = {k: v[:, :length] if k in PER_TOKEN else v for k, v in loss_inputs.items()}
    loss_inputs |= {"completion_ids": ids[:, -length:], "mask": mask}
    model_inputs = {"input_ids": ids, "attention_mask": attention}
    if positions:
        model_inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    return model_inputs, loss_inputs, None


def _packed(ids, attention, mask, loss_inputs, positions):
    T = mask.shape[1]
    real = attention.bool()
    place = real.flatten().cumsum(0).view_as(ids) - 1  # of each real token in the packed row
    at = place[:, -T:][mask] - 1
    position = (attention.cumsum(1) - 1)[real]
    counts = mask.sum(1)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    loss_inputs = {k: v[mask] if k in PER_TOKEN else v for k, v in loss_inputs.items()}
    loss_inputs |= {"completion_ids": ids[:, -T:][mask], "mask": torch.ones_like(at, dtype=torch.bool), "cu_seqlens": starts}
    return {"input_ids": ids[real].unsqueeze(0), "position_ids": position.unsqueeze(0)}, loss_inputs, at
