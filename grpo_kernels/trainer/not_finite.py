"""A loss that is not finite: which tensor it came from, and which token."""

import itertools

from torch.distributed.tensor import DTensor


class NotFinite(FloatingPointError):
    """The loss is NaN or infinite; the message names the first tensor, sequence and token where that begins."""


def check_finite(loss, micro, hidden, head, batch, model, tokenizer, reference=None):
    """Raises `NotFinite` unless the loss is finite. Waits for the device.

    Args:
        loss: 0-dim. micro: the `MicroBatch` that went in; batch: the one it was made of.
        hidden: the predicting states; head: an `LMHead`; reference: that of the reference, if the loss reads it.
        model: whose parameters tell whether training or the input broke it. tokenizer: that decodes the token.
    """
    if bool(loss.isfinite()):
        return
    given = micro.loss_inputs
    found = []
    of_tokens = {name: given.get(name) for name in ("old_logps", "ref_logps", "ref_hidden")}
    for name, x in (of_tokens | {"the hidden states": hidden}).items():
        if x is not None:
            bad = ~x.isfinite()
            bad = bad.any(-1) if x.dim() > given["mask"].dim() else bad
            where = (bad & given["mask"].bool()).nonzero()
            if len(where):
                found.append(f"{name} at {_place(where[0], micro, batch, tokenizer)}{_and_more(len(where))}")
    heads = {"the head": head} | ({} if reference is None else {"the reference's head": reference})
    for (whose, of), name in itertools.product(heads.items(), ("weight", "bias")):
        x = getattr(of, name)
        bad = None if x is None else ~x.isfinite() if name == "weight" else x.isnan() | (x == float("inf"))
        if bad is not None and bad.any():
            rows = bad.flatten(1).any(1).nonzero() if bad.dim() > 1 else bad.nonzero()
            found.append(f"{whose}'s {name} in the row of token {rows[0].item()}{_and_more(len(rows))}")
    own = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters())  # this process's parts
    broken = [name for name, p in own if not bool(p.detach().isfinite().all())]
    if broken:
        found.append(f"the parameter {broken[0]}{_and_more(len(broken))}: an earlier step broke it")
    else_ = "nothing that went in, so a ratio or a product overflowed"
    raise NotFinite(f"the loss is {loss.item()}; not finite: {'; '.join(found) or else_}")


def _place(where, micro, batch, tokenizer):
    """In the whole batch: sequence, position in the completion, token."""
    if micro.at is not None:
        row, position = micro.kept.nonzero()[int(where[0])].tolist()
    else:
        row, position = where.tolist()
        row = row if micro.rows is None else int(micro.rows[row])
    token = int(batch["input_ids"][row, batch["input_ids"].shape[1] - batch["mask"].shape[1] + position])
    return f"completion {row} of the micro-batch, position {position}, token {token} ({tokenizer.decode([token])!r})"


def _and_more(count):
    return "" if count == 1 else f", and {count - 1} more"
