"""What is differentiable, and what says that it is not: second derivatives, the temperature, log-probs beside a loss, lse, func transforms."""

import inspect

import pytest
import torch
from support.problems import make_problem, packed, with_float32_chunks
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from grpo_kernels import (
    FusedLinearGRPOLoss,
    GRPOLossConfig,
    fused_linear_grpo_loss,
    grpo_loss_from_logits,
    linear_logprobs,
    objective,
    reference,
)
from grpo_kernels.losses.config import TRL_LOSS_TYPES

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_PHASES = GRPOLossConfig(importance_sampling_level="sequence")


def losses(p):
    """(name, scalar, hidden or logits) of every public function."""
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


# The temperature


def with_temperature(p, shape, dtype):
    """The problem's tensors in a dtype, and a temperature that wants a gradient."""
    positional, keywords, leaves = p.arguments(dtype)
    per_token = torch.float64 if dtype == torch.float64 else torch.float32
    value = p.temperature if shape == "per token" else torch.tensor(1.3)
    return positional, keywords, leaves, value.to(per_token, copy=True).requires_grad_()


OPTIONS = {
    "plain": {}, "softcap": {"softcap": 4.0}, "entropy": {"entropy_coef": 0.3}, "softcap and entropy": {"softcap": 4.0, "entropy_coef": -0.5},
    "sequence": {"importance_sampling_level": "sequence", "logit_scale": -0.7}, "banned": {"banned": 20, "entropy_coef": 0.3}, "quantile": {"top_entropy_quantile": 0.5, "entropy_coef": 0.3},
}  # fmt: skip


@pytest.mark.cover("options", "backend")
@pytest.mark.parametrize("shape", ["per token", "0-dim"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["head", "nothing else"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_temperature_of_a_loss_is_differentiable(shape, options, frozen, backend):
    """Against plain autograd of the reference in float64, with confident rows, masked rows and several blocks of the vocabulary."""
    banned, options = options.get("banned", 0), {k: v for k, v in options.items() if k != "banned"}
    p = make_problem(B=4, T=5, D=8, V=300, temperature=True, bias=True, lora=True, garbage=shape == "per token", banned=banned,
                     config=GRPOLossConfig(**options))  # fmt: skip

    def gradients(loss, **more):
        positional, keywords, leaves, temperature = with_temperature(p, shape, torch.float64)
        if frozen:
            for x in leaves.values():
                x.requires_grad_(False)
        out = loss(*positional, **keywords | {"temperature": temperature} | more)
        out.loss.backward()
        return {"loss": out.loss, "temperature": temperature.grad, **{n: x.grad for n, x in leaves.items()}}

    truth = gradients(reference.grpo_loss)
    assert truth["temperature"].isfinite().all() and truth["temperature"].any()
    assert_all_close(gradients(fused_linear_grpo_loss, backend=backend, workspace_bytes=1), truth, 1e-10)


@pytest.mark.parametrize("shape", ["per token", "0-dim"])
@pytest.mark.parametrize("options", [v for k, v in OPTIONS.items() if k != "banned"], ids=str)
def test_the_temperature_of_logits_is_differentiable(shape, options):
    p = make_problem(B=4, T=5, D=8, V=300, temperature=True, garbage=shape == "per token", config=GRPOLossConfig(**options))
    positional, keywords, leaves, temperature = with_temperature(p, shape, torch.float64)
    reference.grpo_loss(*positional, **keywords | {"temperature": temperature}).loss.backward()
    truth, temperature.grad = temperature.grad, None
    logits = positional[0].where(p.mask.unsqueeze(-1), 0.0) @ positional[1].T
    keywords.pop("bias"), keywords.pop("lora")
    for x in (logits, logits.detach()):
        grpo_loss_from_logits(x, *positional[2:], **keywords | {"temperature": temperature}).loss.backward()
        assert_close("temperature", temperature.grad, truth, 1e-10)
        temperature.grad = None


@pytest.mark.parametrize("shape", ["per token", "0-dim"])
@pytest.mark.parametrize("softcap, offset", [(None, 0.0), (None, 300.0), (4.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("workspace_bytes", [1, 10**7], ids=["blocks", "stash"])
def test_the_temperature_of_log_probs_is_differentiable(shape, softcap, dtype, offset, workspace_bytes):
    """Confident rows, flat rows, and logits that share an offset; several blocks of the vocabulary, and one."""
    p = make_problem(B=4, T=5, D=8, V=300, temperature=True, bias=True, config=GRPOLossConfig(softcap=softcap))
    p.bias += offset
    p.hidden[1] *= 1e-2
    draw = torch.Generator().manual_seed(3)
    g = [torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2)]

    def gradient(function, dtype):
        positional, keywords, leaves, temperature = with_temperature(p, shape, dtype)
        hidden, weight, ids, _, mask = positional
        logps, entropy = function(hidden, weight, ids, mask, keywords["bias"], temperature)
        return [torch.autograd.grad((gx.to(x) * x).sum(), temperature, retain_graph=True)[0]
                for gx, x in zip(g, (logps, entropy), strict=True)]  # fmt: skip

    def plain(hidden, weight, ids, mask, bias, temperature):
        z = reference.hidden_to_logits(hidden, weight, bias, None)
        return reference.logps_from_logits(z, ids, mask, p.config, temperature.expand(ids.shape))

    def ours(hidden, weight, ids, mask, bias, temperature):
        return linear_logprobs(hidden, weight, ids, mask=mask, bias=bias, temperature=temperature, softcap=softcap,
                               workspace_bytes=workspace_bytes)  # fmt: skip

    exact = gradient(plain, torch.float64)
    for name, a, b, c in zip(("logps", "entropy"), gradient(ours, dtype), gradient(plain, dtype), exact, strict=True):
        assert_no_worse_than_torch(name, a, b, c, floor=1e-6 if dtype == torch.float32 else 1e-10)


def test_a_temperature_without_gradient_leaves_no_trace():
    p = make_problem(B=2, T=3, V=11, temperature=True)
    hidden, weight, ids, _, mask = p.arguments(needs=())[0]
    for temperature in (p.temperature, torch.tensor(0.7), 0.7):
        assert not linear_logprobs(hidden, weight, ids, mask=mask, temperature=temperature).logps.requires_grad
    with torch.no_grad():
        out = linear_logprobs(hidden, weight, ids, mask=mask, temperature=p.temperature.requires_grad_())
    assert not out.logps.requires_grad


# Log-probs and entropy beside the loss


@pytest.mark.parametrize("options", [{}, {"importance_sampling_level": "sequence"}, {"entropy_coef": 0.2}], ids=str)
@pytest.mark.parametrize("needs", [("hidden", "weight", "bias"), ("hidden",)], ids=str)
def test_log_probs_and_entropy_keep_their_graph_on_request(options, needs):
    """A term made of them trains every kept token, also those whose own advantage is 0."""
    p = make_problem(B=4, T=5, D=8, V=300, bias=True, config=GRPOLossConfig(**options))
    found = []
    for loss in (fused_linear_grpo_loss, FusedLinearGRPOLoss(**options), reference.grpo_loss):
        positional, keywords, leaves = p.arguments(needs=needs)
        keywords |= {"differentiable_logps": True}
        if isinstance(loss, FusedLinearGRPOLoss):
            keywords.pop("config")
        out = loss(*positional, **keywords)
        (out.loss + 0.1 * out.entropy.mean() + (out.logps**2).sum()).backward()
        found.append({"loss": out.loss, "logps": out.logps, **{n: leaves[n].grad for n in needs}})
    assert_all_close(found[0], found[2], 1e-10)
    assert_all_close(found[1], found[2], 1e-10)


def test_log_probs_of_a_loss_from_logits_keep_their_graph_on_request():
    p = make_problem(B=4, T=5, D=8, V=300)
    positional, keywords, leaves = p.arguments()
    keywords.pop("bias"), keywords.pop("lora")
    found = []
    for more in ({}, {"differentiable_logps": True}):
        logits = (positional[0] @ positional[1].T).detach().requires_grad_()
        out = grpo_loss_from_logits(logits, *positional[2:], **keywords, **more)
        assert out.logps.requires_grad == out.entropy.requires_grad == bool(more)
        found.append(torch.autograd.grad(out.entropy.sum() if more else out.loss, logits)[0])
    z = logits.detach().requires_grad_()
    log_p = z.log_softmax(-1)
    truth = torch.autograd.grad((-(log_p.exp() * log_p).sum(-1) * p.mask).sum(), z)[0]
    assert_close("gradient of the entropy", found[1], truth, 1e-10)


def test_the_output_says_that_its_log_probs_are_detached():
    p = make_problem(B=2, T=3, V=11)
    positional, keywords, _ = p.arguments()
    out = fused_linear_grpo_loss(*positional, **keywords)
    assert "detached; differentiable_logps=True" in repr(out) and repr(out).startswith("GRPOLossOutput(loss=tensor(")
    assert "detached" not in repr(fused_linear_grpo_loss(*positional, **keywords, differentiable_logps=True))
    with pytest.raises(TypeError, match="differentiable_logps must be True or False, got str"):
        fused_linear_grpo_loss(*positional, **keywords, differentiable_logps="yes")


# What a loss takes as constants


CONSTANTS = ("advantages", "old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps", "num_items", "mask")


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("public", ["fused", "reference", "logits"])
def test_a_gradient_that_would_be_lost_is_refused_by_name(name, public):
    p = make_problem(B=3, T=4, V=11, ratio="token", sampling=True, mask_dtype=torch.float64, num_items=torch.tensor(7.0),
                     config=GRPOLossConfig(beta=0.1, off_policy_mask_threshold=0.5))  # fmt: skip

    def call(config=p.config, given=None):
        (hidden, weight, ids, advantages, mask), keywords, _ = p.arguments()
        named = keywords | {"advantages": advantages, "mask": mask, "config": config}
        named[name] = named[name].detach().requires_grad_() if given is None else given(named[name])
        function = {"fused": fused_linear_grpo_loss, "reference": reference.grpo_loss, "logits": grpo_loss_from_logits}[public]
        if public == "logits":
            named.pop("bias"), named.pop("lora")
        head = (hidden @ weight.T,) if public == "logits" else (hidden, weight)
        return function(*head, ids, **named)

    with pytest.raises(ValueError, match=rf"{name} must not require a gradient.*pass {name}\.detach\(\)"):
        call()
    plain = call(given=lambda x: x).loss
    with torch.no_grad():
        assert call().loss == plain
    unread = GRPOLossConfig(loss_type="grpo")
    if name in ("ref_logps", "sampling_logps", "num_items"):
        assert call(unread).loss.isfinite()  # what a loss does not read is ignored


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_objective_refuses_them_too(name):
    p = make_problem(B=3, T=4, V=11, ratio="token", sampling=True, mask_dtype=torch.float64, num_items=torch.tensor(7.0),
                     config=GRPOLossConfig(beta=0.1, off_policy_mask_threshold=0.5))  # fmt: skip
    (_, _, _, advantages, mask), keywords, _ = p.arguments()
    given = keywords | {"advantages": advantages, "mask": mask}
    given = {k: given[k] for k in inspect.signature(objective).parameters if k in given}
    given[name] = given[name].detach().requires_grad_()
    logps = given["old_logps"].detach() + 0.1
    with pytest.raises(ValueError, match=rf"{name} must not require a gradient.*pass {name}\.detach\(\)"):
        objective(logps, logps.exp(), **given)


def test_a_loss_a_token_of_a_frozen_head_does_not_ask_how_the_loss_is_weighed():
    """Advantages whose weighed coefficients vanish in float32 train all the same."""
    p = make_problem(B=3, T=4, D=8, V=60, dtype=torch.float32)
    found = []
    for scale in (1.0, 1e-20):
        positional, keywords, leaves = p.arguments(needs=("hidden",))
        keywords |= {"num_items": 1e30, "reduction": "none"}
        out = fused_linear_grpo_loss(*positional[:3], positional[3] * scale, positional[4], **keywords)
        out.loss.sum().backward()
        found.append(leaves["hidden"].grad / scale)
    assert found[0].any()
    assert_close("hidden", found[1], found[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_temperature_of_16_bits_gets_the_sum_rounded_once(dtype):
    p = make_problem(B=4, T=64, D=8, V=60, dtype=torch.float32)
    (hidden, weight, ids, _, mask), _, _ = p.arguments()
    temperature = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    linear_logprobs(hidden, weight, ids, mask=mask, temperature=temperature).logps.sum().mul(1e-5).backward()
    exact = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    linear_logprobs(hidden.double(), weight.double(), ids, mask=mask, temperature=exact).logps.sum().mul(1e-5).backward()
    assert temperature.grad == exact.grad.to(dtype)


def test_a_mask_of_log_probs_may_not_require_a_gradient():
    with pytest.raises(ValueError, match=r"mask must not require a gradient"):
        linear_logprobs(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), mask=torch.ones(2, requires_grad=True))


# The log-sum-exp


LSE_OPTIONS = {
    "plain": {}, "softcap": {"softcap": 4.0}, "scale and temperature": {"logit_scale": -0.7, "temperature": 1.7},
    "per token": {"temperature": True, "softcap": 5.0, "logit_scale": 1.3}, "banned": {"banned": 20},
}  # fmt: skip
COMBINED = {
    "z-loss": lambda logps, entropy, lse: (lse**2).mean(),
    "target's logit": lambda logps, entropy, lse: (logps + lse).sum(),
    "all": lambda logps, entropy, lse: (logps * entropy).sum() + (lse**2).mean() + (entropy * lse).sum(),
    "no lse": lambda logps, entropy, lse: (logps * entropy).sum(),
}


def lse_call(p, whose, dtype, combine, **more):
    """Results and gradients of log-probs with lse, ours or plain autograd over full logits."""
    (hidden, weight, ids, _, mask), keywords, leaves = p.arguments(dtype)
    c, t, lora = p.config, keywords["temperature"], keywords["lora"]
    if t is not None:
        leaves["temperature"] = t = t.clone().requires_grad_()
    if whose == "ours":
        out = linear_logprobs(hidden, weight, ids, mask=mask, bias=keywords["bias"], lora=lora, temperature=c.temperature if t is None else t,
                              logit_scale=c.logit_scale, softcap=c.softcap, return_lse=True, **more)  # fmt: skip
        logps, entropy, lse = out
        assert out.lse is lse and linear_logprobs(hidden, weight, ids, mask=mask)._fields == ("logps", "entropy")
    else:
        z = reference.hidden_to_logits(hidden.where(mask.unsqueeze(-1), 0.0), weight, keywords["bias"], lora)
        logps, entropy = reference.logps_from_logits(z, ids, mask, c, t)
        z = c.logit_scale * z.to(torch.promote_types(dtype, torch.float32))
        z = z if c.softcap is None else c.softcap * torch.tanh(z / c.softcap)
        lse = (z / (c.temperature if t is None else t.unsqueeze(-1))).logsumexp(-1).where(mask, 0.0)
    combine(logps, entropy, lse).backward()
    return {"logps": logps, "entropy": entropy, "lse": lse, **{n: x.grad for n, x in leaves.items()}}


def lse_problem(dtype=torch.float64, temperature=False, banned=0, **config):
    p = make_problem(B=4, T=5, D=8, V=300, dtype=dtype, bias=True, lora=True, banned=banned, temperature=temperature is True,
                     config=GRPOLossConfig(**config, **({} if temperature in (True, False) else {"temperature": temperature})))  # fmt: skip
    p.hidden[1] *= 2**-7  # flat rows
    return p


@pytest.mark.cover("options", "backend")
@pytest.mark.parametrize("combine", COMBINED.values(), ids=COMBINED)
@pytest.mark.parametrize("options", LSE_OPTIONS.values(), ids=LSE_OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("workspace_bytes", [1, 10**7], ids=["recomputed", "stash"])
def test_lse_and_its_gradients(combine, options, backend, workspace_bytes):
    """Confident, flat and masked rows; rows whose coefficients of logps and lse cancel; several blocks of the vocabulary."""
    p = lse_problem(**options)
    assert_all_close(lse_call(p, "ours", torch.float64, combine, backend=backend, workspace_bytes=workspace_bytes),
                     lse_call(p, "plain", torch.float64, combine), 1e-9)  # fmt: skip


@pytest.mark.cover("backend", "dtype")
@pytest.mark.parametrize("name", ["z-loss", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("backend", ["torch", "cpu", "float32 chunks"])
def test_lse_is_as_exact_as_pytorch(name, dtype, softcap, backend, monkeypatch):
    p = lse_problem(dtype, softcap=softcap)
    if backend == "float32 chunks":
        with_float32_chunks(monkeypatch)
        backend = "torch"
    ours, torchs, exact = (lse_call(p, whose, d, COMBINED[name], **more)
                           for whose, d, more in (("ours", dtype, {"backend": backend}), ("plain", dtype, {}), ("plain", torch.float64, {})))  # fmt: skip
    for quantity, truth in exact.items():
        assert_no_worse_than_torch(quantity, ours[quantity], torchs[quantity], truth, floor=1e-6 if dtype == torch.float32 else 1e-3)
    flat = [x["hidden"][1] for x in (ours, torchs, exact)]
    assert_no_worse_than_torch("flat rows", *flat, floor=1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ()], ids=str)
def test_lse_of_a_frozen_head_and_without_gradients(needs):
    p = lse_problem()
    (hidden, weight, ids, _, mask), keywords, leaves = p.arguments(needs=needs)
    out = linear_logprobs(hidden, weight, ids, mask=mask, return_lse=True)
    truth = (hidden @ weight.T).logsumexp(-1).where(mask, 0.0)
    assert_close("lse", out.lse, truth, 1e-12)
    assert out.lse.requires_grad == bool(needs)
    for name in needs:
        ours, exact = (torch.autograd.grad(x.square().sum(), leaves[name])[0] for x in (out.lse, truth))
        assert_close(name, ours, exact, 1e-10)
    with pytest.raises(TypeError, match="return_lse must be True or False, got int"):
        linear_logprobs(hidden, weight, ids, return_lse=1)


# One loss a token


PER_TOKEN = [GRPOLossConfig(loss_type=name, importance_sampling_level=level, beta=0.1, delta=2.2, epsilon_high=0.28, max_completion_length=7)
             for name in TRL_LOSS_TYPES for level in ("token", "sequence")]  # fmt: skip
PER_TOKEN += [GRPOLossConfig(entropy_coef=0.3, top_entropy_quantile=0.6), GRPOLossConfig(loss_type="grpo", off_policy_mask_threshold=0.1)]


@pytest.mark.cover("config")
@pytest.mark.parametrize("config", PER_TOKEN, ids=lambda c: f"{c.loss_type}-{c.importance_sampling_level}-{c.entropy_coef}")
@pytest.mark.parametrize("packed_rows", [False, True])
def test_one_loss_a_token(config, packed_rows):
    """Weighed as the loss_type does they are its loss; gradients by any weights are those of the reference, by three functions."""
    p = make_problem(B=4, T=5, D=8, V=60, config=config, ratio="token", sampling=True)
    whole = reference.grpo_loss(*(a := p.arguments())[0], **a[1])
    p = packed(p) if packed_rows else p
    g = torch.randn(p.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for function in (reference.grpo_loss, fused_linear_grpo_loss):
        positional, keywords, leaves = p.arguments()
        out = function(*positional, **keywords, reduction="none")
        assert out.loss.shape == p.mask.shape and not out.loss[~p.mask].any()
        (out.loss * g).sum().backward()
        found.append({"loss": out.loss, "policy_loss": out.metrics["policy_loss"], **{n: x.grad for n, x in leaves.items()}})
    assert_all_close(found[1], found[0], 1e-10)
    assert_close("policy_loss", found[1]["policy_loss"], whole.metrics["policy_loss"], 1e-10)
    if not packed_rows:
        logits = positional[0].detach() @ positional[1].detach().T
        keywords.pop("bias"), keywords.pop("lora")
        out = grpo_loss_from_logits(logits, *positional[2:], **keywords, reduction="none")
        assert_close("from logits", out.loss, found[0]["loss"], 1e-10)
        m = p.mask.double()
        weights = {"grpo": m / m.sum(1, keepdim=True).clamp(min=1) / 4, "luspo": m / 4, "dr_grpo": m / 28}
        u = weights.get({"sapo": "grpo"}.get(config.loss_type, config.loss_type), m / m.sum())
        active = m * (whole.entropy >= torch.quantile(whole.entropy[p.mask].float(), 1 - config.top_entropy_quantile).double())
        bonus = -config.entropy_coef * whole.entropy * active  # which the loss divides by the quantile's tokens
        assert_close("weighed", (u * (out.loss - bonus)).sum() + bonus.sum() / active.sum(), whole.loss, 1e-10)


@pytest.mark.parametrize("function", [fused_linear_grpo_loss, reference.grpo_loss])
def test_another_reduction_is_refused(function):
    positional, keywords, _ = make_problem(B=2, T=3, V=11).arguments()
    with pytest.raises(ValueError, match="reduction must be 'loss_type' or 'none', got 'mean'"):
        function(*positional, **keywords, reduction="mean")


# Transforms of torch.func


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
@pytest.mark.parametrize("public", ["loss", "log-probs", "logits"])
def test_transforms_of_torch_func_are_refused_in_a_sentence(transform, public):
    """The reference takes them."""
    p = make_problem(B=2, T=3, V=11)
    (hidden, weight, ids, advantages, mask), keywords, _ = p.arguments(needs=())
    functions = {
        "loss": lambda h: fused_linear_grpo_loss(h, weight, ids, advantages, mask, **keywords).loss,
        "log-probs": lambda h: linear_logprobs(h, weight, ids, mask=mask).logps.sum(),
        "logits": lambda z: grpo_loss_from_logits(z, ids, advantages, mask).loss,
        "reference": lambda h: reference.grpo_loss(h, weight, ids, advantages, mask, **keywords).loss,
    }

    def transformed(name, x):
        if transform == "vmap":
            return torch.func.vmap(functions[name])(x.unsqueeze(0))
        return torch.func.grad(functions[name])(x) if transform == "grad" else torch.func.jvp(functions[name], (x,), (x,))[1]

    with pytest.raises(TypeError, match=r"(hidden|logits) must be a plain tensor, got one inside of a torch\.func transform"):
        transformed(public, hidden @ weight.T if public == "logits" else hidden)
    assert transformed("reference", hidden).isfinite().all()


def test_what_a_transform_hides_in_is_named():
    """A 0-dim temperature, an adapter, a dual tensor of forward mode."""
    hidden, weight, ids = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([1, 2, 3])
    a, b = torch.randn(2, 4), torch.randn(9, 2)
    cases = {
        "temperature": lambda: torch.func.vmap(lambda t: linear_logprobs(hidden, weight, ids, temperature=t).logps)(torch.ones(2)),
        "lora": lambda: torch.func.grad(lambda a: linear_logprobs(hidden, weight, ids, lora=(a, b, 1.0)).logps.sum())(a),
        "hidden": lambda: linear_logprobs(forward_ad.make_dual(hidden, torch.ones_like(hidden)), weight, ids),
    }
    for name, case in cases.items():
        with forward_ad.dual_level(), pytest.raises(TypeError, match=f"{name} must be a plain tensor"):
            case()
    with pytest.raises(TypeError, match="temperature must be a plain tensor"):
        torch.func.jvp(lambda t: linear_logprobs(hidden, weight, ids, temperature=t).logps.sum(), (torch.tensor(1.0),), (torch.tensor(1.0),))
