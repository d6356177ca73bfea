"""What is differentiable, and what says that it is not: second derivatives, the temperature, log-probs beside a loss, lse, func transforms."""

import pytest
import torch
from problems import make_problem
from torch.utils.checkpoint import checkpoint

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, grpo_loss_from_logits, linear_logprobs, reference

TWO_PHASES = GRPOLossConfig(importance_sampling_level="sequence")


def losses(p):
    """(name, scalar, hidden or logits) of every door."""
    positional, keywords, leaves = p.arguments()
    hidden, weight, ids, _, mask = positional
    yield "one pass", fused_linear_grpo_loss(*positional, **keywords).loss, hidden
    yield "two phases", fused_linear_grpo_loss(*positional, **keywords | {"config": TWO_PHASES}).loss, hidden
    yield "logps", linear_logprobs(hidden, weight, ids, mask=mask).logps.sum(), hidden
    yield "entropy", linear_logprobs(hidden, weight, ids, mask=mask).entropy.sum(), hidden
    yield "frozen head", linear_logprobs(hidden, weight.detach(), ids, mask=mask).logps.sum(), hidden
    logits = (hidden @ weight.T).detach().requires_grad_()
    keywords.pop("bias"), keywords.pop("lora")
    yield "logits", grpo_loss_from_logits(logits, *positional[2:], **keywords).loss, logits


@pytest.mark.parametrize("index", range(6))
def test_a_gradient_penalty_is_refused(index):
    """once_differentiable alone would let it pass: the incoming gradient, 1, needs no gradient."""
    name, loss, x = list(losses(make_problem(B=2, T=3, V=11)))[index]
    with pytest.raises(RuntimeError, match=r"create_graph must be False.*reference\.grpo_loss"):
        torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.autograd.grad(loss, x)[0].any(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_no_graph_of_the_backward(reentrant):
    p = make_problem(B=2, T=3, V=11)
    positional, keywords, leaves = p.arguments()

    def losses_of(hidden):
        out = fused_linear_grpo_loss(hidden, *positional[1:], **keywords | {"config": TWO_PHASES})
        return out.loss + linear_logprobs(hidden, positional[1], positional[2], mask=positional[4]).logps.sum()

    found = []
    for run in (losses_of, lambda hidden: checkpoint(losses_of, hidden, use_reentrant=reentrant)):
        found.append(torch.autograd.grad(run(leaves["hidden"] * 1.0), leaves["hidden"]) if not reentrant else None)
        if reentrant:  # torch.autograd.grad does not go through a reentrant one
            leaves["hidden"].grad = leaves["weight"].grad = None
            run(leaves["hidden"] * 1.0).backward()
            found[-1] = (leaves["hidden"].grad,)
    assert torch.equal(found[0][0], found[1][0])
