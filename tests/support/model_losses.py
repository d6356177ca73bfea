"""Losses of a transformers model through its logits and through its fused head."""

import torch

from grpo_kernels import TokenSupport
from support.tolerance import assert_all_close, assert_close

B, T, V = 3, 7, 32


def batch(rows=B, seed=1):
    """Token ids, padding on the left of the second sequence, labels: a prompt of 2 and a few tokens of tools left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (rows, T), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, :2] = 0
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, 4] = labels[1, 2:5] = -100
    return ids, attention, labels


def temperatures(rows=B):
    return torch.linspace(0.6, 1.7, rows * T).reshape(rows, T)


def statistics(logits, target, temperature=1.0):
    """Every output but the loss from full logits [B, T, V] and the labels of the same positions."""
    z = logits.float() / (temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature)
    mask = target != -100
    log_p = z.log_softmax(-1)
    chosen = log_p.gather(-1, target.where(mask, 0).unsqueeze(-1)).squeeze(-1)
    found = {
        "log_probs": chosen,
        "entropy": -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1).detach(),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == target,
        "score_sq_norm": (1 - 2 * chosen.exp() + (2 * log_p).exp().sum(-1)).detach(),
    }
    return {name: x.where(mask, 0) if x.dtype.is_floating_point else x & mask for name, x in found.items()} | {"label_mask": mask}


def truncated(logits, left):
    return logits.masked_fill(~left & left.any(-1, keepdim=True), -torch.inf)


def through_logits(model, ids, attention, labels, temperature=1.0, num_items=None, left=None):
    """What the fused call must return, from an ordinary call."""
    plain = model(input_ids=ids, attention_mask=attention, use_cache=False)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, 1:]
    logits = plain.logits[:, :-1] if left is None else truncated(plain.logits[:, :-1], left[:, 1:])
    out = statistics(logits, labels[:, 1:], temperature)
    out["loss"] = -out["log_probs"].sum() / (out["label_mask"].sum() if num_items is None else num_items)
    if getattr(plain, "aux_loss", None) is not None:
        out["aux_loss"] = plain.aux_loss
        out["loss"] = out["loss"] + model.config.router_aux_loss_coef * plain.aux_loss
    return out


def mixed_loss(out):
    """Every differentiable output, each token with a weight of its own."""
    w = torch.linspace(-1, 2, out["log_probs"].numel()).reshape(out["log_probs"].shape)
    return (w * out["log_probs"]).sum() + (w.flip(-1) * out["entropy"]).sum() + 3 * out["loss"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare(model, tolerance=1e-5, left=None, **options):
    """Fused against full logits on one model: every output, and the gradient of every parameter."""
    ids, attention, labels = batch()
    truth = through_logits(model, ids, attention, labels, left=left, **options)
    exact = gradients(model, mixed_loss(truth))
    options["num_items_in_batch"] = options.pop("num_items", None)
    options["support"] = None if left is None else TokenSupport.from_mask(left)
    ours = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True, **options)
    ours = {name: x for name, x in ours.items() if x is not None}
    assert ours.keys() >= {"log_probs", "entropy", "loss", "label_mask"}
    for name, value in ours.items():
        assert value.dtype == truth[name].dtype
        assert_close(name, value, truth[name], tolerance)
    found = gradients(model, mixed_loss(ours))
    assert_all_close(found, exact, tolerance, floor=2e-6)
    assert max(g.norm() for g in exact.values() if g is not None) > 1e-2
    return ours, found
