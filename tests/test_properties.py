"""Every public function over drawn shapes, strides, dtypes, options and workspaces: the reference's answer, whatever the memory looks like.

The reference gets contiguous float64 copies of what the functions get strided, expanded, sliced, misaligned or empty.
How far a result may be from the reference's is measured on each call's own numbers (support/rounding_bounds.py).
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import rounding_bounds

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
    B, T = draw(st.sampled_from([0, 1, 2, 3, 4, 4])), draw(st.sampled_from([0, 1, 3, 4, 6, 6]))
    D, V = draw(st.sampled_from([1, 2, 5, 16, 33])), draw(st.sampled_from([1, 2, 7, 64, 101, 300]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    randn = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    # of the logits: at 2, half a unit of a bfloat16 product moves no ratio over a bound of the clip range, nor a gradient by 5 %
    scale = draw(st.sampled_from([0.3, 1.0, 4.0] if with_logits or dtype != torch.bfloat16 else [0.3, 1.0, 2.0]))
    hidden, weight = (scale * randn(B, T, D)).to(dtype), (randn(V, D) / math.sqrt(D)).to(dtype)
    if with_logits:
        hidden = (scale * randn(B, T, V)).to(dtype)
    if draw(st.booleans()) and B:
        hidden = hidden[:1].expand_as(hidden).clone()  # so that an expanded view can stand for it
    kept = torch.rand(B, T, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.8, 0.8, 1.0]))
    ids = torch.randint(0, V, (B, T), generator=g)
    policy = (hidden.double() if with_logits else hidden.double() @ weight.double().T).log_softmax(-1)
    lp = policy.gather(-1, ids.unsqueeze(-1)).squeeze(-1) if V else randn(B, T)
    advantages = randn(B) * (torch.rand(B, generator=g) > 0.3)
    if draw(st.booleans()):
        advantages = randn(B, T)
    # far from the bounds of the clip range: rounded logits must not decide on which side of one a token, or a sequence's mean, is
    log_ratio = torch.tensor([-0.9, 0.02, 0.03, -0.02, 0.8], dtype=torch.float64)[torch.randint(0, 5, (B, T), generator=g)]
    options = dict(
        loss_type=draw(st.sampled_from(LOSSES)), importance_sampling_level=draw(st.sampled_from(["token", "token", "sequence"])),
        beta=draw(st.sampled_from([0.0, 0.1])), delta=draw(st.sampled_from([None, 3.0])), entropy_coef=draw(st.sampled_from([0.0, 0.0, 0.05])),
        use_bias_correction_kl=draw(st.booleans()), max_completion_length=8, temperature=draw(st.sampled_from([1.0, 0.8])),
        softcap=draw(st.sampled_from([None, None, 8.0])), logit_scale=draw(st.sampled_from([1.0, 0.5])),
    )  # fmt: skip
    if options["importance_sampling_level"] == "sequence":
        log_ratio = log_ratio[:, :1].expand(B, T)
    layout = lambda: draw(st.sampled_from(LAYOUTS))  # noqa: E731
    return dict(
        hidden=hidden, weight=weight, ids=ids, mask=kept, advantages=advantages, old=lp - log_ratio if draw(st.booleans()) else None,
        ref=lp + 0.1 * randn(B, T), num_items=draw(st.sampled_from([None, 7, 3.5])), config=GRPOLossConfig(**options), dtype=dtype,
        layouts=[layout() for _ in range(7)], mask_dtype=draw(st.sampled_from(MASKS)), workspace=draw(st.sampled_from([None, 1, 3000, 50_000])),
        backend=draw(st.sampled_from(["auto", "torch"])), needs=(draw(st.booleans()), draw(st.booleans())), module=draw(st.booleans()),
    )  # fmt: skip


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


def compare(p, ours, exact, leaves, exact_leaves, terms, sizes=None):
    """Loss or log-probs with their gradients, ``ours`` and ``exact`` by name; the first of each is what goes backward."""
    dtype, backward = p["dtype"], next(iter(ours))
    assert ours[backward].requires_grad == any(x.requires_grad for x in leaves)
    if ours[backward].requires_grad:
        ours[backward].backward()
        exact[backward].backward()
        for x, y, name in zip(leaves, exact_leaves, ("hidden", "weight"), strict=False):
            if x.requires_grad:
                assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
                ours[f"gradient of {name}"], exact[f"gradient of {name}"] = x.grad, y.grad
    weight = p["weight"].double() if len(leaves) == 2 else None
    rounded = rounding_bounds.runs(dtype, p["hidden"].double(), weight, p["ids"], p["mask"], p["config"], terms)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    rounding_bounds.assert_within_rounding(ours, exact, rounded, narrow, sizes)


def compare_losses(p, ours, exact, leaves, exact_leaves, positional, keywords):
    ours, exact = (
        {"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **{f"metric {k}": v for k, v in out.metrics.items()}}
        for out in (ours, exact)
    )
    sizes = rounding_bounds.sizes_of_kl(p["mask"], p["config"], p["num_items"])
    compare(p, ours, exact, leaves, exact_leaves, rounding_bounds.loss_terms(*positional, **keywords), sizes)


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
    compare_losses(p, ours, exact, (hidden, weight), exact_leaves, exact_positional, exact_keywords)


@EXAMPLES
@given(problems(with_logits=True), st.booleans())
def test_the_loss_from_logits(p, inplace):
    positional, keywords, exact_positional, exact_keywords = given_tensors(p, p["hidden"])
    logits = laid_out(p["hidden"].clone(), p["layouts"][5]).detach().requires_grad_(p["needs"][0])
    eye = torch.eye(logits.shape[-1], dtype=torch.float64)
    exact_logits = p["hidden"].double().requires_grad_(p["needs"][0])
    ours = grpo_loss_from_logits(logits, *positional, **keywords, backend=p["backend"], inplace_backward=inplace and p["layouts"][5] != "expanded")
    exact = reference.grpo_loss(exact_logits, eye, *exact_positional, **exact_keywords)
    compare_losses(p, ours, exact, (logits,), (exact_logits,), exact_positional, exact_keywords)


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

    def total(logps, entropy, coins=None):
        return logps.double().sum() + 0.3 * entropy.double().sum(), {}

    assert ours.logps.requires_grad == any(p["needs"])
    compare(
        p, dict(loss=total(ours.logps, ours.entropy)[0], logps=ours.logps, entropy=ours.entropy),
        dict(loss=total(logps, entropy)[0], logps=logps, entropy=entropy), (hidden, weight), exact_leaves, total,
    )  # fmt: skip


def five_percent_off(g):
    return g * 1.05


def all_zeros(g):
    return g * 0


def a_value_where_the_truth_is_zero(g):
    """The first element that is 0 becomes a thousandth of the largest, or a thousandth."""
    g, at = g.clone(), (g == 0).flatten().nonzero()
    if len(at):
        g.view(-1)[at[0]] = max(1e-3 * g.abs().max().item(), 1e-3)
    return g


@pytest.mark.parametrize("wrong", [five_percent_off, all_zeros, a_value_where_the_truth_is_zero])
@pytest.mark.parametrize("test, function", [(test_the_loss, "fused_linear_grpo_loss"), (test_the_log_probs, "linear_logprobs")])
def test_wrong_gradients_are_refused(test, function, wrong, monkeypatch):
    """The tests above, run on functions whose gradients are wrong, fail. (In bfloat16 a gradient may cancel until 5 % is its rounding.)"""
    right, changed = globals()[function], []

    def change(g):
        other = wrong(g.contiguous())
        changed.append(not torch.equal(other, g))
        return other

    def broken(hidden, weight, *rest, **keywords):
        for x in (hidden, weight):
            if x.requires_grad:
                x.register_hook(change)
        return right(hidden, weight, *rest, **keywords)

    monkeypatch.setitem(globals(), function, broken)
    refused = {dtype: [] for dtype in (torch.float64, torch.float32, torch.bfloat16)}

    @settings(EXAMPLES, max_examples=40)
    @given(problems())
    def each(p):
        changed.clear()
        try:
            test.hypothesis.inner_test({**p, "module": False})
        except AssertionError as error:
            assert "gradient of" in str(error)
            refused[p["dtype"]].append(True)
        else:
            if any(changed):
                refused[p["dtype"]].append(False)

    each()
    for dtype, found in refused.items():
        least = 0.9 if (dtype, wrong) == (torch.bfloat16, five_percent_off) else 1.0
        assert found and sum(found) >= least * len(found), f"{dtype}: {sum(found)} of {len(found)}"


@EXAMPLES
@given(problems())
def test_the_objective_does_not_care_how_its_tensors_lie(p):
    positional, keywords, exact_positional, exact_keywords = given_tensors(p, p["hidden"])
    lp, entropy = p["ref"].clone(), p["ref"].abs()
    _, advantages, mask = positional
    ours, metrics = objective(laid_out(lp, p["layouts"][0]), laid_out(entropy, p["layouts"][1]), advantages, mask, **keywords)
    exact, exact_metrics = objective(lp, entropy, *exact_positional[1:], **exact_keywords)
    assert metrics.keys() == exact_metrics.keys()
    for name, truth in {"loss": exact, **exact_metrics}.items():
        torch.testing.assert_close({"loss": ours, **metrics}[name], truth, rtol=1e-12, atol=0, equal_nan=True, msg=name)


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
    # rewards up to 1e3 are centred; what rounding leaves of that is divided by a standard deviation, 1e-4 at least
    torch.testing.assert_close(group_advantages(rewards[order], groups[order], **options), found[order], atol=1e-7, rtol=1e-12)
    unscored = rewards.isnan().all(1)
    assert (found[unscored] == 0).all()
