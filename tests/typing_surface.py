"""The public names as a user calls them: `make lint` has mypy and pyright read this file. It is never run.

A line with an `ignore` is an error that both are to find: one that they do not find is an error, too.
"""

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import (
    FusedLinearGRPOLoss,
    GRPOLossConfig,
    GRPOLossOutput,
    LogProbs,
    LogProbsAndLse,
    TokenSupport,
    available_backends,
    fused_linear_grpo_loss,
    group_advantages,
    grpo_loss_from_logits,
    linear_logprobs,
    linear_logprobs_at,
    objective,
    reference,
    register_policy_term,
    topk_divergence,
)

hidden, weight, logits, rewards = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(2, 3, 11), torch.randn(2)
ids, group_ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.ones(2, 3)

reasons: dict[str, str | None] = available_backends()
version: str = grpo_kernels.__version__

old: LogProbs = linear_logprobs(hidden, weight, ids, mask=mask, temperature=0.7, softcap=30.0, backend="auto")
logps: Tensor = old.logps
entropy: Tensor = old.entropy
advantages: Tensor = group_advantages(rewards, group_ids, scale_rewards="group", aggregation="sum_then_normalize")

config = GRPOLossConfig(loss_type="dapo", epsilon_high=0.28, importance_sampling_level="token", beta=0.04, delta=None)
out: GRPOLossOutput = fused_linear_grpo_loss(
    hidden, weight, ids, advantages, mask, old_logps=logps, ref_logps=logps, num_items=3, config=config, lora=None, backend="cpu"
)
loss: Tensor = out.loss
metrics: dict[str, Tensor] = out.metrics
out = reference.grpo_loss(hidden, weight, ids, advantages, mask, old_logps=logps, config=config)
out = grpo_loss_from_logits(logits, ids, advantages, mask, config=config, inplace_backward=True)
value, more = objective(logps, entropy, advantages, mask, old_logps=logps, config=config)
loss = value + more["entropy"]

module: torch.nn.Module = FusedLinearGRPOLoss(loss_type="dapo", epsilon_high=0.28)
with_lse: LogProbsAndLse = linear_logprobs(hidden, weight, ids, return_lse=True)
lse: Tensor = with_lse.lse
out = FusedLinearGRPOLoss()(hidden, weight, ids, advantages, mask, old_logps=logps)
support: TokenSupport = TokenSupport.from_padded(ids.unsqueeze(-1)).take(ids.flatten()).to("cpu")
old = linear_logprobs(hidden, weight, ids, support=support)
old = linear_logprobs_at(hidden, weight, ids.unsqueeze(-1), mask=mask, temperature=0.7)
divergence: Tensor = topk_divergence(hidden, weight, ids.unsqueeze(-1), logps.unsqueeze(-1), kind="jsd", beta=0.1, tail=True, mask=mask)
out = fused_linear_grpo_loss(hidden, weight, ids, advantages, mask, support=TokenSupport.from_mask(logits > 0))


def squared(logps: Tensor, old_logps: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    return 0.5 * (logps - old_logps - advantages) ** 2


register_policy_term("squared", squared, aggregation="dapo", overwrite=True)

fused_linear_grpo_loss(hidden, weight, ids, advantages)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
fused_linear_grpo_loss(hidden, weight, ids, advantages, mask, old=logps)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
linear_logprobs(hidden, weight, [1, 2])  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
FusedLinearGRPOLoss(epsilonn=0.2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
FusedLinearGRPOLoss(importance_sampling_level="word")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
topk_divergence(hidden, weight, ids, logps, kind="kl")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
linear_logprobs(hidden, weight, ids, backend="gpu")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
GRPOLossConfig(epsilon="0.2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
GRPOLossConfig(epsilonn=0.2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
grpo_kernels.grpo_los  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
out.losses  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
