"""The digits of gradients that come from a stash: dz is rounded once, and the entropy's p (log p + entropy) does not cancel on flat rows.

Logits have standard deviations from 3e-3, a head before training, to 10, a confident model. Every backend, and every way to the
gradient: from a stash, recomputed, in one pass. Pass: at most twice the error of PyTorch from logits in the same dtype.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.problems import DEVICE, with_float32_chunks
from support.tolerance import assert_no_worse_than_torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs, objective
from grpo_kernels.engine import chunks, products

DEVIATIONS = (3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ROWS, DEPTH = 24, 32
BACKENDS = ["auto", "torch", "triton"] + (["float32 chunks"] if DEVICE == "cpu" else [])
LOSSES = {
    "sequence": GRPOLossConfig(importance_sampling_level="sequence", entropy_coef=30.0),
    "quantile": GRPOLossConfig(top_entropy_quantile=0.5, entropy_coef=30.0),
    "one pass": GRPOLossConfig(entropy_coef=30.0),
}
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """A backend's name; "float32 chunks" are the loops of a GPU, their products emulated."""
    if request.param == "float32 chunks":
        with_float32_chunks(monkeypatch)
        return "torch"
    return request.param


def drawn(deviation, dtype, vocab):
    """hidden [R, D], weight [V, D] and ids [R], whose logits have this standard deviation, no two rows exactly the same one."""
    torch.manual_seed(int(deviation * 1000))
    hidden = torch.randn(ROWS, DEPTH) * torch.linspace(0.5, 1.5, ROWS).unsqueeze(1)
    weight = torch.randn(vocab, DEPTH) * deviation / DEPTH**0.5
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), torch.randint(0, vocab, (ROWS,), device=DEVICE)


def gradients(hidden, weight, function, dtype=None):
    """d function(hidden, weight) in float32 sums, hidden and weight in this dtype."""
    hidden, weight = (x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in (hidden, weight))
    return torch.autograd.grad(function(hidden, weight), (hidden, weight))


def plain(hidden, weight, ids):
    """(logps, entropy) as PyTorch has them of logits in the inputs' dtype."""
    logits = hidden @ weight.T
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def compare(hint, ours, by_torch, exact):
    # lse arrives rounded: in float32, p is off by lse * 2^-24
    for name, *three in zip(("hidden", "weight"), ours, by_torch, exact, strict=True):
        assert_no_worse_than_torch(f"{hint}, gradient of {name}", *three, floor=4e-6)


@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.cover
@each_dtype
@pytest.mark.parametrize("with_logps", [False, True])
def test_of_log_probs_and_entropies(backend, dtype, with_logps):
    slow = backend == "triton" and DEVICE == "cpu"
    vocab = 301 if slow else 3001
    for deviation in DEVIATIONS[:: 1 + slow]:
        hidden, weight, ids = drawn(deviation, dtype, vocab)
        g = torch.rand(2, ROWS, device=DEVICE)
        g[:, 3], g[1, 5] = 0, 0  # a row without any gradient, and one whose entropy has none

        def loss(found, g=g):
            logps, entropy = found
            return (g[1] * entropy).sum() + (1e-2 * deviation * g[0] * logps).sum() * with_logps  # noqa: B023

        exact, by_torch = (gradients(hidden, weight, lambda h, w: loss(plain(h, w, ids)), t) for t in (torch.float64, None))  # noqa: B023
        for workspace in (1, vocab * 80, None)[slow:]:  # nothing, a part and everything is stashed
            ours = gradients(hidden, weight, lambda h, w: loss(linear_logprobs(h, w, ids, backend=backend, workspace_bytes=workspace)))  # noqa: B023
            compare(f"{deviation} {workspace}", ours, by_torch, exact)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_of_log_probs_alone_in_bf16_no_digit_less_than_pytorch(backend, temperature):
    """dz, or onehot - p, is rounded once: a second rounding would cost 10 to 40 % more."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter cuts float32 off where a GPU rounds it to bf16")
    for deviation in DEVIATIONS[2:]:
        hidden, weight, ids = drawn(deviation, torch.bfloat16, 3001)
        g = torch.randn(ROWS, device=DEVICE)

        def truth(h, w):
            z = h @ w.T
            log_p = ((z if z.dtype == torch.float64 else z.float()) / temperature).log_softmax(-1)
            return (g * log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)).sum()  # noqa: B023

        def fused(h, w):
            return (g * linear_logprobs(h, w, ids, temperature=temperature, backend=backend).logps).sum()  # noqa: B023

        exact, by_torch = (gradients(hidden, weight, truth, t) for t in (torch.float64, None))
        for name, *three in zip(("hidden", "weight"), gradients(hidden, weight, fused), by_torch, exact, strict=True):
            assert_no_worse_than_torch(f"{deviation}, gradient of {name}", *three, slack=1.02)


@pytest.mark.cover("name")
@each_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_of_losses_with_an_entropy_bonus(backend, name, dtype):
    """With a bonus that dwarfs the policy's term."""
    slow = backend == "triton" and DEVICE == "cpu"
    config, vocab = LOSSES[name], 301 if slow else 3001
    for deviation in DEVIATIONS[:: 1 + 2 * slow]:
        hidden, weight, ids = drawn(deviation, dtype, vocab)
        B, shape = 4, (4, ROWS // 4)
        advantages, mask = torch.randn(B, device=DEVICE), torch.ones(shape, device=DEVICE)

        def truth(h, w):
            logps, entropy = (x.view(shape) for x in plain(h, w, ids))  # noqa: B023
            return objective(logps, entropy, advantages.to(logps.dtype), mask, config=config)[0]  # noqa: B023

        def fused(h, w):
            return fused_linear_grpo_loss(h.view(*shape, DEPTH), w, ids.view(shape), advantages, mask, config=config, backend=backend).loss  # noqa: B023

        exact, by_torch = (gradients(hidden, weight, truth, t) for t in (torch.float64, None))
        compare(f"{deviation}", gradients(hidden, weight, fused), by_torch, exact)


def test_float32_chunks_are_recomputed_for_an_entropy_alone(monkeypatch):
    """Where no entropy gets a gradient, not a logit more is made; and a loss that has a bonus makes no stash that it cannot use."""
    with_float32_chunks(monkeypatch)
    made = Counter()

    def multiply(a, b, out, *more, **options):
        made["logits"] += out.numel() * (out.shape[1] == 3001)
        of_engine(a, b, out, *more, **options)

    of_engine = products.multiply
    monkeypatch.setattr(products, "multiply", multiply)
    hidden, weight, ids = drawn(1.0, torch.bfloat16, 3001)

    def count(loss):
        made.clear()
        gradients(hidden, weight, lambda h, w: loss(*linear_logprobs(h, w, ids, backend="torch")))
        return made["logits"] / (ROWS * 3001)

    assert count(lambda logps, entropy: logps.sum()) == 1
    assert count(lambda logps, entropy: (logps + 0 * entropy).sum()) == 1
    assert count(lambda logps, entropy: (logps + entropy).sum()) == 2
    assert count(lambda logps, entropy: entropy[:2].sum()) == 1 + 2 / ROWS
    stashed, whole_rows = [], chunks.whole_rows
    monkeypatch.setattr(chunks, "whole_rows", lambda rows, *more: stashed.append(rows) or whole_rows(rows, *more))
    old = linear_logprobs(hidden, weight, ids).logps[None]
    for coefficient in (0.0, 0.1):
        stashed.clear()
        config = replace(LOSSES["sequence"], entropy_coef=coefficient)
        advantages, mask = torch.randn(1), torch.ones(1, ROWS)
        out = fused_linear_grpo_loss(hidden[None].clone().requires_grad_(), weight.clone().requires_grad_(), ids[None], advantages, mask,
                                     old_logps=old, config=config, backend="torch")  # fmt: skip
        assert (ROWS in stashed) == (coefficient == 0)
        out.loss.backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["head", "frozen head"])
def test_a_gradient_of_the_entropy_that_is_zero_makes_zeros(backend, frozen):
    """Not None: optimisers, DDP's hooks and torch.autograd.grad tell the two apart."""
    hidden, weight, ids = drawn(1.0, torch.bfloat16, 301)
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    (0 * linear_logprobs(hidden, weight, ids, backend=backend).entropy).sum().backward()
    for x in (hidden,) if frozen else (hidden, weight):
        assert x.grad is not None and not x.grad.any()


def test_compiled_float32_chunks_are_recomputed_for_an_entropy_alone(monkeypatch):
    """A compiled backward is handed zeros where nothing arrived: the op itself finds that out."""
    with_float32_chunks(monkeypatch)
    made, multiply = [], products.multiply

    def counting(a, b, out, *more, **options):
        made.append(out.shape[1] == 3001)
        multiply(a, b, out, *more, **options)

    monkeypatch.setattr(products, "multiply", counting)
    hidden, weight, ids = drawn(0.03, torch.bfloat16, 3001)
    for loss, times in ((lambda logps, entropy: logps.sum(), 1), (lambda logps, entropy: (logps + entropy).sum(), 2)):
        torch._dynamo.reset()
        made.clear()
        compiled = torch.compile(lambda h, w, loss=loss: loss(*linear_logprobs(h, w, ids, backend="torch")), fullgraph=True, backend="aot_eager")
        ours = gradients(hidden, weight, compiled)
        assert sum(made) == times
        exact, by_torch = (gradients(hidden, weight, lambda h, w, loss=loss: loss(*plain(h, w, ids)), t) for t in (torch.float64, None))
        compare("compiled", ours, by_torch, exact)
