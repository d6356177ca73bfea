"""The truth of every test: full logits, plain autograd, any float dtype, written to be read beside the specification."""

from typing import Any

import torch

from .call import GRPOLossOutput, LossArguments, TokenLoss
from .checks import raise_bad_values, value_flags
from .distributed import group_in_use, validate_across_ranks
from .losses.config import GRPOLossConfig
from .support import wrong_token, wrong_values
from .teacher import TeacherArguments


def grpo_loss(
    hidden: torch.Tensor, weight: torch.Tensor, completion_ids: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *,
    config: GRPOLossConfig = GRPOLossConfig(), **options: Any,  # noqa: B008
) -> GRPOLossOutput:  # fmt: skip
    """The GRPO loss through the full [B, T, V] logits. Position t of hidden predicts token t.

    A causal model's last ``hidden[:, :-1]`` stand beside ``ids[:, 1:]``: shift before the call, nothing is shifted here.
    Same arguments, results and errors as `fused_linear_grpo_loss`.

    Plain autograd all the way: differentiable in hidden, weight, bias, lora and temperature, any number of times. ``kept_rows``,
    ``workspace_bytes``, ``backend`` and ``batch_invariant`` are accepted and change nothing; ``vocab_parallel_group`` must be None.
    """
    reference = TeacherArguments.of_reference(config, *(options.pop(f"ref_{name}", None) for name in ("hidden", "weight", "bias")))
    given = LossArguments(hidden, weight, completion_ids, mask, config, advantages=advantages, teacher=reference, **options)
    if given.vocab_parallel_group is not None or given.sequence_parallel:
        raise ValueError("vocab_parallel_group must be None: the reference holds the whole vocabulary")
    with validate_across_ranks(group_in_use(config, given.data_parallel_group), hidden, "data_parallel_group"):
        args = given.checked()
        loss = TokenLoss(args, wait=True)
        raise_bad_values(value_flags(args, weight.shape[0], loss).tolist(), weight.shape[0])
        allowed = None if args.support is None else _allowed(args)
    loss.weigh()

    kept = mask.bool()
    z = hidden_to_logits(args.hidden.where(kept.unsqueeze(-1), 0.0), args.weight, args.bias, args.lora)
    logps, entropy = logps_from_logits(z, completion_ids, mask, config, args.temperature, allowed)
    kl = None
    if (ref := args.teacher) is not None:
        y = hidden_to_logits(ref.hidden.where(kept.unsqueeze(-1), 0.0), ref.weight, ref.bias, None).to(z.dtype)
        z, y = (restricted(transformed(x, config, kept, args.temperature), allowed) for x in (z, y))
        kl = divergence_from_logits(z, y, "reverse_kl").where(kept, 0.0)
    loss, metrics = loss(logps, entropy, kl)
    return GRPOLossOutput.of(loss, logps, entropy, metrics, args.differentiable_logps)


def _allowed(args):
    """[.., V] bool: the tokens that could have been sampled; all of them where masked."""
    support, kept, vocab, tokens = args.support, args.mask.reshape(-1).bool(), args.weight.shape[0], args.mask.shape
    if message := wrong_values(support, support.facts(), kept, vocab, tokens):
        raise ValueError(message)
    mask, ids = support.to_mask(vocab), args.completion_ids.reshape(-1)
    if not mask[kept.nonzero().squeeze(1), ids[kept]].all():
        raise ValueError(wrong_token(support, kept, ids, tokens, args.ids_name))
    return (mask | ~kept.unsqueeze(1)).view(*tokens, vocab)


def hidden_to_logits(hidden, weight, bias, lora):
    z = hidden @ weight.T
    if lora is not None:
        a, b, scale = lora
        z = z + scale * ((hidden @ a.T) @ b.T)
    return z if bias is None else z + bias.to(z.dtype)


def logps_from_logits(z, token_ids, mask, config, temperature=None, allowed=None):
    """[..., V] raw logits -> (logps, entropy) [...], float32 (float64 stays), 0 where the mask is 0.

    ``allowed`` [..., V] bool: the logits of the others are -inf.
    """
    kept = mask.bool()
    z = restricted(transformed(z, config, kept, temperature), allowed)
    token = token_ids.where(kept, 0).long().unsqueeze(-1)
    target = z.gather(-1, token).squeeze(-1)
    # lp = -softplus(lse_others - z[token]): the difference z[token] - lse would cancel near p = 1
    # the lowest finite number and not -inf, so that a row whose other logits are all -inf keeps a gradient
    others = z.scatter(-1, token, torch.finfo(z.dtype).min).logsumexp(-1)
    logps = -torch.logaddexp(torch.zeros_like(target), others - target)
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.where(log_p > -float("inf"), 0.0)).sum(-1)
    return logps.where(kept, 0.0), entropy.where(kept, 0.0)


def transformed(z, config, kept, temperature=None):
    """Raw logits [.., V] -> those behind scale, softcap and temperature, 0 where masked; in float32 at least."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)).where(kept.unsqueeze(-1), 0.0)
    z = config.logit_scale * z
    if config.softcap is not None:
        z = config.softcap * torch.tanh(z / config.softcap)
    if temperature is None:
        return z / config.temperature
    banned = z == -float("inf")  # the temperature's gradient would be 0 times it
    z = z.masked_fill(banned, 0.0) / temperature.to(z.dtype).where(kept, 1.0).unsqueeze(-1)
    return z.masked_fill(banned, -float("inf"))


def restricted(z, allowed):
    if allowed is None:
        return z
    z = z.where(allowed.sum(-1, keepdim=True) != 1, 0.0)  # a single token is certain, whatever its logit
    return z.masked_fill(~allowed, -float("inf"))


def divergence_from_logits(z, y, kind, beta=0.5):
    """[..] divergence of p = softmax(z) from q = softmax(y); a column that both ban counts nothing."""
    both = (z == -float("inf")) & (y == -float("inf"))
    p, q = (x.masked_fill(both, torch.finfo(x.dtype).min / 4).log_softmax(-1) for x in (z, y))
    if kind != "jsd":
        return _kl(p, q) if kind == "reverse_kl" else _kl(q, p)
    share = torch.tensor(beta, dtype=z.dtype, device=z.device)
    m = torch.logaddexp(p + torch.log1p(-share), q + share.log())
    return beta * _kl(q, m) + (1 - beta) * _kl(p, m)


def _kl(a, b):
    """Of log-probs; where a is 0, the term is."""
    some = a.exp() > 0
    return (a.exp() * (a - b).where(some, 0.0)).sum(-1)
