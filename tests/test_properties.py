"""Every public function over drawn shapes, strides, dtypes, options and workspaces: the reference's answer, whatever the memory looks like.

The reference gets contiguous float64 copies of what the functions get strided, expanded, sliced, misaligned or empty.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_kernels import (
    FusedLinearGRPOLoss,
    GRPOLossConfig,
    fused_linear_grpo_loss,
    group_advantages,
    grpo_loss_from_logits,
    linear_logprobs,
    objective,
    reference,
)

EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "sliced", "transposed", "misaligned", "huge stride", "expanded")
# relative to the norm of the tensor; loose enough for bf16 logits of peaked rows, far below any wrong term
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.08}


def laid_out(x, how):
    """The same values in other memory."""
    if how == "sliced":
        room = torch.full([2 * s + 1 for s in x.shape], 77).to(x.dtype)
        view = room[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if how == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "misaligned":
        return torch.full((x.numel() + 1,), 1).to(x.dtype)[1:].view(x.shape).copy_(x)
    if how == "huge stride" and x.dim() > 1:
        room = torch.empty(x.shape[0], 4096, dtype=x.dtype)
        wide = x.numel() // max(1, x.shape[0])
        return room[:, :wide].copy_(x.reshape(x.shape[0], wide)).view(x.shape) if 0 < wide <= 4096 else x.contiguous()
    if how == "expanded" and x.dim() > 1 and x.shape[0] > 1 and bool((x == x[:1]).all()):
        return x[:1].expand_as(x)
    return x.contiguous()


@st.composite
def problems(draw, with_logits=False):
    B, T = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    D, V = draw(st.sampled_from([1, 2, 5, 16, 33])), draw(st.sampled_from([1, 2, 7, 64, 101, 300]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    randn = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    scale = draw(st.sampled_from([0.3, 1.0, 4.0]))
    hidden, weight = (scale * randn(B, T, D)).to(dtype), randn(V, D).to(dtype)
    if with_logits:
        hidden = (scale * randn(B, T, V)).to(dtype)
    if draw(st.booleans()) and B:
        hidden = hidden[:1].expand_as(hidden).clone()  # so that an expanded view can stand for it
    kept = torch.rand(B, T, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    ids = torch.randint(0, V, (B, T), generator=g)
    # 0.9 of them within the clip range or far from its bounds: rounded logits must not decide on which side a token is
    policy = (hidden.double() if with_logits else hidden.double() @ weight.double().T).log_softmax(-1)
    lp = policy.gather(-1, ids.unsqueeze(-1)).squeeze(-1) if V else randn(B, T)
    ratio = torch.tensor([-0.9, 0.02, 0.03, -0.02, 0.8])[torch.randint(0, 5, (B, T), generator=g)].double()
    advantages = randn(B) * (torch.rand(B, generator=g) > 0.3)
    if draw(st.booleans()):
        advantages = randn(B, T)
    options = dict(
        loss_type=draw(st.sampled_from(LOSSES)), importance_sampling_level=draw(st.sampled_from(["token", "token", "sequence"])),
        beta=draw(st.sampled_from([0.0, 0.1])), delta=draw(st.sampled_from([None, 3.0])), entropy_coef=draw(st.sampled_from([0.0, 0.0, 0.05])),
        use_bias_correction_kl=draw(st.booleans()), max_completion_length=8, temperature=draw(st.sampled_from([1.0, 0.8])),
        softcap=draw(st.sampled_from([None, None, 8.0])), logit_scale=draw(st.sampled_from([1.0, 0.5])),
    )  # fmt: skip
    layout = lambda: draw(st.sampled_from(LAYOUTS))  # noqa: E731
    return dict(
        hidden=hidden, weight=weight, ids=ids, mask=kept, advantages=advantages, old=lp - ratio if draw(st.booleans()) else None,
        ref=lp + 0.1 * randn(B, T), num_items=draw(st.sampled_from([None, 7, 3.5])), config=GRPOLossConfig(**options), dtype=dtype,
        layouts=[layout() for _ in range(7)], mask_dtype=draw(st.sampled_from(MASKS)), workspace=draw(st.sampled_from([None, 1, 3000, 50_000])),
        backend=draw(st.sampled_from(["auto", "torch"])), needs=(draw(st.booleans()), draw(st.booleans())), module=draw(st.booleans()),
    )  # fmt: skip


def close(ours, exact, dtype, what, factor=1.0):
    assert ours.shape == exact.shape, what
    assert not ours.isnan().any(), f"NaN in {what}"
    size = exact.double().norm().item()
    error = (ours.double() - exact.double()).norm().item()
    assert error <= CLOSE[dtype] * factor * max(size, 1e-2 if dtype != torch.float64 else 1e-9), f"{what}: off by {error:.2e} of {size:.2e}"


def given_tensors(p, hidden):
    """Keyword arguments in the drawn memory, and their contiguous float64 twins."""
    lay = p["layouts"]
    narrow = torch.float64 if p["dtype"] == torch.float64 else torch.float32
    ours = dict(
        old_logps=None if p["old"] is None else laid_out(p["old"].to(narrow), lay[0]),
        ref_logps=laid_out(p["ref"].to(narrow), lay[1]), num_items=p["num_items"], config=p["config"],
    )  # fmt: skip
    exact = {k: v.double().contiguous() if isinstance(v, torch.Tensor) else v for k, v in ours.items()}
    positional = (laid_out(p["ids"], lay[2]), laid_out(p["advantages"].to(narrow), lay[3]), laid_out(p["mask"].to(p["mask_dtype"]), lay[4]))
    exact_positional = (p["ids"], p["advantages"].to(narrow).double(), p["mask"])
    return positional, ours, exact_positional, exact


def compare(ours, exact, leaves, exact_leaves, dtype):
    slack = 3.0 if dtype == torch.bfloat16 else 1.0
    close(ours.loss, exact.loss, dtype, "loss", slack)
    mask_of = exact.logps != 0
    close(ours.logps.where(mask_of, 0), exact.logps, dtype, "logps")
    assert ours.loss.requires_grad == any(x.requires_grad for x in leaves)
    if not ours.loss.requires_grad:
        return
    ours.loss.backward()
    exact.loss.backward()
    for x, y, name in zip(leaves, exact_leaves, ("hidden", "weight"), strict=False):
        if x.requires_grad:
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
            close(x.grad, y.grad, dtype, f"gradient of {name}", slack)


@EXAMPLES
@given(problems())
def test_the_loss(p):
    positional, keywords, exact_positional, exact_keywords = given_tensors(p, p["hidden"])
    hidden = laid_out(p["hidden"], p["layouts"][5]).detach().requires_grad_(p["needs"][0])
    weight = laid_out(p["weight"], p["layouts"][6]).detach().requires_grad_(p["needs"][1])
    exact_leaves = [x.double().detach().requires_grad_(n) for x, n in zip((p["hidden"], p["weight"]), p["needs"], strict=True)]
    call = fused_linear_grpo_loss
    if p["module"]:
        call = FusedLinearGRPOLoss(**vars(keywords.pop("config")))
    ours = call(hidden, weight, *positional, **keywords, workspace_bytes=p["workspace"], backend=p["backend"])
    exact = reference.grpo_loss(*exact_leaves, *exact_positional, **exact_keywords)
    compare(ours, exact, (hidden, weight), exact_leaves, p["dtype"])


@EXAMPLES
@given(problems(with_logits=True), st.booleans())
def test_the_loss_from_logits(p, inplace):
    positional, keywords, exact_positional, exact_keywords = given_tensors(p, p["hidden"])
    logits = laid_out(p["hidden"], p["layouts"][5]).detach().requires_grad_(p["needs"][0])
    eye = torch.eye(logits.shape[-1], dtype=torch.float64)
    exact_logits = p["hidden"].double().requires_grad_(p["needs"][0])
    ours = grpo_loss_from_logits(logits, *positional, **keywords, backend=p["backend"], inplace_backward=inplace and p["layouts"][5] != "expanded")
    exact = reference.grpo_loss(exact_logits, eye, *exact_positional, **exact_keywords)
    compare(ours, exact, (logits,), (exact_logits,), p["dtype"])


@EXAMPLES
@given(problems())
def test_the_log_probs(p):
    hidden = laid_out(p["hidden"], p["layouts"][0]).detach().requires_grad_(p["needs"][0])
    weight = laid_out(p["weight"], p["layouts"][1]).detach().requires_grad_(p["needs"][1])
    mask = laid_out(p["mask"].to(p["mask_dtype"]), p["layouts"][2])
    c = p["config"]
    ours = linear_logprobs(
        hidden, weight, laid_out(p["ids"], p["layouts"][3]), mask=mask, temperature=c.temperature, logit_scale=c.logit_scale, softcap=c.softcap,
        workspace_bytes=p["workspace"], backend=p["backend"],
    )  # fmt: skip
    exact_leaves = [x.double().detach().requires_grad_(n) for x, n in zip((p["hidden"], p["weight"]), p["needs"], strict=True)]
    z = exact_leaves[0] @ exact_leaves[1].T * c.logit_scale
    z = z if c.softcap is None else c.softcap * torch.tanh(z / c.softcap)
    log_p = (z / c.temperature).log_softmax(-1)
    keep = p["mask"]
    logps = log_p.gather(-1, p["ids"].unsqueeze(-1)).squeeze(-1).where(keep, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1).where(keep, 0.0)
    close(ours.logps, logps, p["dtype"], "logps")
    close(ours.entropy, entropy, p["dtype"], "entropy", 3.0)
    assert ours.logps.requires_grad == any(p["needs"])
    if any(p["needs"]):
        (ours.logps.double().sum() + 0.3 * ours.entropy.double().sum()).backward()
        (logps.sum() + 0.3 * entropy.sum()).backward()
        for x, y, name in zip((hidden, weight), exact_leaves, ("hidden", "weight"), strict=True):
            if x.requires_grad:
                close(x.grad, y.grad, p["dtype"], f"gradient of {name}", 3.0)


@EXAMPLES
@given(problems())
def test_the_objective_does_not_care_how_its_tensors_lie(p):
    positional, keywords, exact_positional, exact_keywords = given_tensors(p, p["hidden"])
    lp, entropy = p["ref"].clone(), p["ref"].abs()
    _, advantages, mask = positional
    ours, metrics = objective(laid_out(lp, p["layouts"][0]), laid_out(entropy, p["layouts"][1]), advantages, mask, **keywords)
    exact, exact_metrics = objective(lp, entropy, *exact_positional[1:], **exact_keywords)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-9) and metrics.keys() == exact_metrics.keys()
    assert all(metrics[k].item() == pytest.approx(v.item(), rel=1e-6, abs=1e-9, nan_ok=True) for k, v in exact_metrics.items())


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(math.nan), st.floats(-1e3, 1e3)), st.floats(-10, 10)), min_size=0, max_size=12),
    st.sampled_from(["group", "batch", "none"]), st.sampled_from(["sum_then_normalize", "normalize_then_sum"]), st.booleans(),
)  # fmt: skip
def test_the_advantages_of_a_group_do_not_depend_on_the_order_of_its_rows(rows, scale, aggregation, several):
    groups = torch.tensor([r[0] for r in rows], dtype=torch.long)
    rewards = torch.tensor([[r[1], r[2]] if several else [r[1]] for r in rows], dtype=torch.float64).reshape(len(rows), 1 + several)
    options = dict(scale_rewards=scale, aggregation=aggregation)
    found = group_advantages(rewards, groups, **options)
    assert found.shape == (len(rows),) and found.isfinite().all()
    order = torch.randperm(len(rows))
    torch.testing.assert_close(group_advantages(rewards[order], groups[order], **options), found[order], atol=1e-7, rtol=1e-7)
    unscored = rewards.isnan().all(1)
    assert (found[unscored] == 0).all()
