"""`linear_logprobs` against full logits: log-probs, entropy, every gradient, shapes, errors."""

import math
import random

import pytest
import torch
from support.loss_calls import WORKSPACES, every_backend, on_the_cpu
from support.problems import draw_problem
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close

from grpo_kernels import linear_logprobs, reference


def plain_logprobs(p):
    """lp and entropy through the full logits of the reference, differentiable."""
    _, keywords, leaves = p.arguments()
    h = leaves["hidden"].where(p.mask.bool().unsqueeze(-1), 0.0)
    z = reference.hidden_to_logits(h, leaves["weight"], keywords["bias"], keywords["lora"])
    lp, entropy = reference.logps_from_logits(z, p.completion_ids, p.mask, p.config, keywords["temperature"])
    return lp, entropy, leaves


def fused_logprobs(p, **more):
    _, keywords, leaves = p.arguments()
    temperature = p.config.temperature if p.temperature is None else keywords["temperature"]
    out = linear_logprobs(leaves["hidden"], leaves["weight"], p.completion_ids, mask=p.mask, bias=keywords["bias"],
                          temperature=temperature, logit_scale=p.config.logit_scale, softcap=p.config.softcap,
                          lora=keywords["lora"], **more)  # fmt: skip
    return out.logps, out.entropy, leaves


@on_the_cpu
@every_backend
@each_seed(0, 150, usual=30)
def test_linear_logprobs_under_any_loss(seed, backend):
    """Gradients of log-probs alone, of entropy alone, of both; some rows without a gradient."""
    rng, p = random.Random(seed), draw_problem(seed)
    workspace, which = rng.choice(WORKSPACES), rng.choice(["logps", "entropy", "both", "both"])
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, *p.mask.shape, generator=g, dtype=torch.float64)
    weights[:, torch.rand(p.mask.shape, generator=g) < 0.3] = 0.0
    results = []
    for logps, entropy, leaves in (fused_logprobs(p, backend=backend, workspace_bytes=workspace), plain_logprobs(p)):
        terms = {"logps": (logps * weights[0]).sum(), "entropy": (entropy.square() * weights[1]).sum()}
        (sum(terms.values()) if which == "both" else terms[which]).backward()
        results.append({"logps": logps, "entropy": entropy, **{n: x.grad for n, x in leaves.items()}})
    assert_all_close(*results, 1e-10, hint=f"{workspace} {which}")


@pytest.mark.cover("backend")
@on_the_cpu
@every_backend
@pytest.mark.parametrize("workspace", [1, 2000, None])
@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
def test_linear_logprobs_gradcheck(frozen, workspace, backend):
    """Against finite differences: logps and entropy, every leaf, softcap, temperature per token, -inf in the bias."""
    g = torch.Generator().manual_seed(5)

    def leaf(*shape, head=True):
        wanted = {"nothing": True, "head": not head, "hidden": head}[frozen]
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(wanted)

    hidden, weight, a, b = leaf(2, 3, 4, head=False), leaf(7, 4), leaf(2, 4), leaf(7, 2)
    bias = torch.tensor([0.1, -0.2, 0.0, -math.inf, 0.3, 0.0, 0.5], dtype=torch.float64)
    ids, mask = torch.tensor([[0, 1, 2], [6, 4, 5]]), torch.tensor([[True, True, False], [True, True, True]])
    temperature = torch.rand(2, 3, generator=g, dtype=torch.float64) + 0.5

    def function(hidden, weight, a, b):
        out = linear_logprobs(hidden, weight, ids, mask=mask, bias=bias, temperature=temperature, logit_scale=0.8, softcap=2.5,
                              lora=(a, b, 0.7), workspace_bytes=workspace, backend=backend)  # fmt: skip
        return out.logps, out.entropy

    # in the interpreter the directional derivative alone
    assert torch.autograd.gradcheck(function, (hidden, weight, a, b), fast_mode=backend == "triton")


@on_the_cpu
@every_backend
def test_linear_logprobs_shapes_and_gradients(backend):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=g)
    for shape in ((), (5,), (2, 3), (2, 3, 2), (0,), (2, 0)):
        hidden, ids = torch.randn(*shape, 4, generator=g, requires_grad=True), torch.randint(0, 9, shape, generator=g)
        out = linear_logprobs(hidden, weight, ids, backend=backend)
        z = (hidden @ weight.T).log_softmax(-1)
        assert out.logps.shape == out.entropy.shape == shape and out.logps.dtype == torch.float32
        assert_close("logps", out.logps, z.gather(-1, ids.unsqueeze(-1)).squeeze(-1), 1e-5)
        assert_close("entropy", out.entropy, -(z.exp() * z).sum(-1), 1e-5)
        (out.logps.sum() + out.entropy.sum()).backward()
        assert hidden.grad.shape == hidden.shape
        with torch.no_grad():
            assert not linear_logprobs(hidden, weight, ids, backend=backend).logps.requires_grad
    assert not linear_logprobs(hidden.detach(), weight, ids, backend=backend).logps.requires_grad


@pytest.mark.parametrize(
    "wrong, error, said",
    [
        (dict(token_ids=torch.zeros(2, 3)), TypeError, "token_ids.*int64.*float32"),
        (dict(token_ids=torch.zeros(2, 2, dtype=torch.long)), ValueError, r"token_ids.*\[2, 3\].*\[2, 2\]"),
        (dict(token_ids=torch.full((2, 3), 9)), ValueError, "token ids.*V = 9"),
        (dict(mask=torch.ones(2)), ValueError, r"mask.*\[2, 3\].*\[2\]"),
        (dict(mask=torch.full((2, 3), 0.5)), ValueError, "mask.*0 and 1"),
        (dict(temperature=0.0), ValueError, "temperature.*> 0.*0.0"),
        (dict(temperature="hot"), ValueError, "temperature.*hot"),
        (dict(temperature=torch.zeros(2, 3)), ValueError, "temperature.*> 0"),
        (dict(temperature=torch.ones(3)), ValueError, r"temperature.*\[2, 3\].*\[3\]"),
        (dict(softcap=-1.0), ValueError, "softcap.*> 0.*-1.0"),
        (dict(logit_scale=0), ValueError, "logit_scale.*0"),
        (dict(weight=torch.zeros(9, 5)), ValueError, r"weight.*D = 4.*\[9, 5\]"),
        (dict(weight=torch.zeros(9, 4, dtype=torch.bfloat16)), TypeError, "weight.*float32.*bfloat16"),
        (dict(hidden=torch.zeros(2, 3, 4, dtype=torch.long)), TypeError, "hidden.*int64"),
        (dict(backend="gpu"), ValueError, "backend.*'gpu'"),
        (dict(workspace_bytes=0), ValueError, "workspace_bytes.*0"),
    ],
)
def test_linear_logprobs_errors(wrong, error, said):
    good = dict(hidden=torch.zeros(2, 3, 4), weight=torch.zeros(9, 4), token_ids=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(error, match=said):
        linear_logprobs(**{**good, **wrong})
