"""GRPO's exact KL: the reference against a transcription of its sentence, the fused loss against the reference."""

import dataclasses
import math
import random

import pytest
import torch
from support import divergence_backends
from support.divergence_backends import each_seed_and_backend, on_the_cpu, slow
from support.loss_calls import random_needs
from support.operations import operations
from support.problems import DEVICE, draw_problem, make_problem, run
from support.seeds import each_seed
from support.token_supports import over_support
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import FusedLinearGRPOLoss, GRPOLossConfig, fused_linear_grpo_loss, objective, reference
from grpo_kernels.losses.config import TRL_LOSS_TYPES

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = math.nan, math.inf
LEVELS = ("token", "sequence")
WORKSPACES = (1, 3000, 30_000, None)
backend = divergence_backends.backend  # a fixture


def beside(p, seed=0, depth=None, dtype=None, bias=None):
    """The reference model's tensors as keywords, NaN where masked. A column that only the policy bans leaves the KL finite."""
    g = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    depth, dtype = depth or rng.choice([1, 5, 16]), dtype or p.dtype
    V, kept = p.weight.shape[0], p.mask.bool()
    hidden, weight = (torch.randn(*size, depth, generator=g, dtype=torch.float64) for size in (kept.shape, (V,)))
    hidden[~kept] = NAN
    found = {"ref_hidden": hidden, "ref_weight": weight * 2 / depth**0.5}
    if rng.random() < 0.5 if bias is None else bias:
        found["ref_bias"] = torch.randn(V, generator=g, dtype=torch.float64)
        if p.bias is not None and p.config.softcap is None and rng.random() < 0.5:
            found["ref_bias"][p.bias == -INF] = -INF
    return {n: x.to(DEVICE, dtype) for n, x in found.items()}


def exact(p, **changes):
    """The problem with an exact KL in its loss, and no ref_logps."""
    beta = p.config.beta or 0.3
    return dataclasses.replace(p.with_config(**{"kl_estimator": "exact", "beta": beta, **changes}), ref_logps=None)


def in_float64(keywords):
    return {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in keywords.items()}


# The reference against the sentence: beta KL(policy || reference)_t in place of beta k3_t


def kl_by_hand(p, ref, leaves, keywords):
    """[..] sum over the vocabulary of p (log p - log q), both behind the config's transform; 0 where masked."""
    c, kept = p.config, p.mask.bool()
    temperature = c.temperature if p.temperature is None else keywords["temperature"].where(kept, 1.0).unsqueeze(-1)

    def log_probs(h, weight, bias, extra=0.0):
        h = h.where(kept.unsqueeze(-1), 0.0)
        z = (h @ weight.T + (0.0 if bias is None else bias) + extra) * c.logit_scale
        z = z if c.softcap is None else torch.tanh(z / c.softcap) * c.softcap
        return (z / temperature).clamp(min=-1e30).log_softmax(-1)

    adapter = 0.0
    if p.lora_a is not None:
        h = leaves["hidden"].where(kept.unsqueeze(-1), 0.0)
        adapter = p.lora_scale * (h @ leaves["lora_a"].T) @ leaves["lora_b"].T
    lp = log_probs(leaves["hidden"], leaves["weight"], leaves.get("bias"), adapter)
    lq = log_probs(ref["ref_hidden"], ref["ref_weight"], ref.get("ref_bias"))
    return (lp.exp() * (lp - lq)).sum(-1).where(kept, 0.0)


def weights_by_hand(p, loss_type):
    """u of each token of [B, T]: what it counts for in the loss."""
    m = p.mask.double()
    B, per_sequence = m.shape[0], m.sum(1, keepdim=True).clamp(min=1)
    if loss_type in ("grpo", "sapo"):
        return m / per_sequence / B
    if loss_type == "luspo":
        return m / B
    if loss_type == "bnpo":
        return m / m.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return m / B / p.config.max_completion_length
    items = p.num_items
    if items is None or isinstance(items, torch.Tensor):
        items = max(1.0, float(m.sum() if items is None else items))
    return m / items


@pytest.mark.cover("loss_type", "level")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
@each_seed(0, 6, usual=6)
def test_the_reference_is_the_sentence(seed, loss_type, level):
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, beta=-0.4 if seed == 3 else 0.3,
                            max_completion_length=9,
                            entropy_coef=0.1 * (seed % 2), top_entropy_quantile=0.57 if seed == 4 else 1.0, logit_scale=1.3,
                            softcap=5.0 if seed == 5 else None, temperature=0.8)  # fmt: skip
    ratio, items = ((None, None), ("token", 7.5), ("sequence", torch.tensor(11)))[seed % 3]
    p = make_problem(seed, config=config, on_policy=seed % 3 == 0, bias=True, banned=2 * (seed != 5), lora=seed % 2 == 0,
                     temperature=seed == 2, ratio=ratio, sampling=True, num_items=items)  # fmt: skip
    ref = beside(p, seed)
    found = run(reference.grpo_loss, exact(p), **ref)
    positional, keywords, leaves = dataclasses.replace(p.with_config(beta=0.0), ref_logps=None).arguments()
    without = reference.grpo_loss(*positional, **keywords)
    kl = kl_by_hand(p, ref, leaves, keywords)
    loss = without.loss + config.beta * (weights_by_hand(p, loss_type) * kl).sum()
    loss.backward()
    truth = {"loss": loss.detach(), **{n: x.grad for n, x in leaves.items()}}
    assert_all_close({"loss": found.loss, **found.gradients}, truth, 1e-10)
    assert_close("kl", found.metrics["kl"], kl.sum() / p.mask.sum(), 1e-10)
    assert kl.max() > 0.1 and torch.equal(found.logps.detach(), without.logps.detach())


# The fused loss against the reference


def both(p, needs, scale, differentiable=False, reduction="loss_type", **more):
    """{name: value} of the fused loss and of the reference, under a loss of the caller's where that has terms of its own."""
    own = {n: more.pop(n) for n in ("backend", "workspace_bytes", "kept_rows") if n in more}
    results = []
    for function, extra in ((fused_linear_grpo_loss, own), (reference.grpo_loss, {})):
        positional, keywords, leaves = p.arguments(needs=needs)
        out = function(*positional, **keywords, **more, **extra, differentiable_logps=differentiable, reduction=reduction)
        total = out.loss * scale
        if reduction == "none":
            total = (total * torch.linspace(-1, 2, total.numel(), dtype=total.dtype, device=total.device).view(total.shape)).sum()
        if differentiable:
            total = total + 0.3 * (out.logps * 0.7 + out.entropy.square()).sum()
        if total.requires_grad:
            total.backward()
        named = {"loss": out.loss.detach(), "logps": out.logps.detach(), "entropy": out.entropy.detach(), **out.metrics}
        results.append(named | {f"d{n}": x.grad for n, x in leaves.items() if n in needs})
    return results


@each_seed_and_backend(0, 180, usual=30)
def test_float64_equals_the_reference(seed, backend):
    """Random options, layouts, reductions and needs."""
    rng = random.Random(seed * 31 + 7)
    p = exact(draw_problem(seed), beta=rng.choice([0.04, 0.5, -0.3]), use_bias_correction_kl=rng.random() < 0.5)
    more = beside(p, seed)
    if rng.random() < 0.25:
        more["kept_rows"] = p.kept_rows()
    needs = random_needs(rng, p)
    more |= dict(backend=backend, workspace_bytes=rng.choice(WORKSPACES), differentiable=rng.random() < 0.2,
                 reduction=rng.choice(["loss_type", "loss_type", "none"]))  # fmt: skip
    ours, truth = both(p, needs, rng.choice([1.0, 0.25, -3.0]), **more)
    assert "kl" in truth
    assert_all_close(ours, truth, 1e-10, hint=f"{needs} {[*more]} {p.config}")


@pytest.mark.cover("loss_type", "level")
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_every_loss_and_level(loss_type, level, on_policy, backend):
    variants = [{}, {"entropy_coef": 0.2}, {"top_entropy_quantile": 0.57}, {"off_policy_mask_threshold": 0.1}]
    for i, changes in enumerate(variants[: 1 if slow(backend) else 4]):
        config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=8, **changes)
        p = exact(make_problem(i, config=config, on_policy=on_policy, sampling=True, garbage=True, ratio="token", V=67))
        for workspace in (1, None):
            ours, truth = both(p, ("hidden", "weight"), 0.5, backend=backend, workspace_bytes=workspace, **beside(p, i))
            assert_all_close(ours, truth, 1e-10, hint=f"{changes} {workspace}")


@each_seed_and_backend(4000, 36, usual=10)
def test_over_supports(seed, backend):
    """The KL of both restricted to the support, beside rows over the whole vocabulary; a single token has none."""
    rng = random.Random(seed)
    p = draw_problem(seed)
    empty = rng.choice([0.0, 0.15, 0.5, 1.0])
    p, support = over_support(p, seed, empty=empty, single=rng.choice([0.0, 0.4]) * (1 - empty))
    p = exact(p)
    more = dict(beside(p, seed), support=support, backend=backend, workspace_bytes=rng.choice(WORKSPACES),
                reduction=rng.choice(["loss_type", "none"]), differentiable=rng.random() < 0.3)  # fmt: skip
    if rng.random() < 0.3:
        more["kept_rows"] = p.kept_rows()
    needs = random_needs(rng, p)
    ours, truth = both(p, needs, -0.5, **more)
    assert_all_close(ours, truth, 1e-10, hint=f"{needs} {p.config}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
def test_each_dtype_is_no_worse_than_pytorch(level, dtype, backend):
    config = GRPOLossConfig(loss_type="grpo", importance_sampling_level=level, entropy_coef=0.05, temperature=0.9)
    p = exact(make_problem(B=5, T=9, D=24, V=203, dtype=dtype, config=config, bias=True, lora=True, masked=0.3))
    ref = beside(p, 1, depth=16, bias=True)
    ref["ref_hidden"] = ref["ref_hidden"].nan_to_num()
    truth = run(reference.grpo_loss, p, dtype=torch.float64, **in_float64(ref)).flat()
    theirs = run(reference.grpo_loss, p, **ref).flat()
    for workspace in (40_000,) if slow(backend) else (1, 40_000, None):
        ours = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace, **ref).flat()
        for name, value in truth.items():
            if name.startswith("metric") and name != "metric kl":
                continue
            assert ours[name].dtype == theirs[name].dtype
            assert_no_worse_than_torch(
                f"{workspace} {name}", ours[name], theirs[name], value, floor=1e-5 if dtype == torch.float32 else 4e-3
            )


@pytest.mark.parametrize("output", ["logps", "entropy", "loss"])
def test_a_term_of_one_output_alone(output, backend):
    """No gradient comes for the others: not even of a KL that is inf, for a token that the reference bans."""
    p = exact(make_problem(bias=True))
    ref = beside(p, bias=True)
    if output != "loss":
        ref["ref_bias"][3] = -INF
    for workspace in (1, None):
        found = []
        for function, more in (
            (fused_linear_grpo_loss, dict(backend=backend, workspace_bytes=workspace)),
            (reference.grpo_loss, {}),
        ):
            positional, keywords, leaves = p.arguments()
            out = function(*positional, **keywords, **ref, **more, differentiable_logps=True)
            getattr(out, output).square().sum().backward()
            found.append({n: x.grad for n, x in leaves.items()})
        assert_all_close(*found, 1e-10)


def test_a_reference_of_another_dtype(backend):
    """Numbers whose products are exact in 16 bits: only the dtype differs."""
    p = exact(make_problem(B=3, T=5, V=67, dtype=torch.float32))
    g = torch.Generator().manual_seed(0)
    ref = [torch.randint(-1, 2, size, generator=g).to(DEVICE) / 2 for size in ((3, 5, 6), (67, 6))]
    for level in LEVELS:
        q = p.with_config(importance_sampling_level=level)
        a, b = (run(fused_linear_grpo_loss, q, backend=backend, ref_hidden=ref[0].to(dtype), ref_weight=ref[1].to(dtype))
                for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
        assert_all_close(a.flat(), b.flat(), 1e-6)


# What it leaves alone


@pytest.mark.exhaustive_in_the_interpreter
def test_the_bias_correction_of_k3_changes_nothing(backend):
    for level in LEVELS:
        p = exact(make_problem(config=GRPOLossConfig(importance_sampling_level=level)))
        one, other = (
            run(fused_linear_grpo_loss, p.with_config(use_bias_correction_kl=x), backend=backend, **beside(p))
            for x in (False, True)
        )
        assert all(torch.equal(x, other.flat()[n]) for n, x in one.flat().items())


@pytest.mark.parametrize("function", [fused_linear_grpo_loss, reference.grpo_loss], ids=["fused", "reference"])
def test_what_the_loss_does_not_read_is_ignored(function):
    p = make_problem(config=GRPOLossConfig(beta=0.2))
    poison = dict(ref_hidden=torch.full((9, 1), NAN), ref_weight="nothing", ref_bias=3)
    own = dict(backend="torch") if function is fused_linear_grpo_loss else {}
    for config in (p.config, GRPOLossConfig(), GRPOLossConfig(kl_estimator="exact")):  # k3, no KL, no KL
        q = dataclasses.replace(p, config=config)
        plain, poisoned = run(function, q, **own), run(function, q, **own, **poison)
        assert all(torch.equal(x, poisoned.flat()[n]) for n, x in plain.flat().items())
        assert ("kl" in plain.metrics) == (config.beta != 0)
    # and ref_logps where the KL is exact, even one that wants a gradient
    q, ref = exact(p), beside(p)
    plain = run(function, q, **own, **ref)
    positional, keywords, leaves = q.arguments()
    keywords["ref_logps"] = torch.full(p.mask.shape, NAN, dtype=torch.float64, device=DEVICE, requires_grad=True)
    out = function(*positional, **keywords, **own, **ref)
    out.loss.backward()
    assert torch.equal(out.loss, plain.loss) and torch.equal(leaves["weight"].grad, plain.gradients["weight"])


@pytest.mark.exhaustive_in_the_interpreter
def test_the_reference_model_gets_no_gradient_and_a_clean_row_no_nan(backend):
    for level in LEVELS:
        p = exact(make_problem(config=GRPOLossConfig(importance_sampling_level=level)))
        ref = {n: x.requires_grad_() for n, x in beside(p, bias=True).items()}
        assert ref["ref_hidden"].isnan().any()
        found = run(fused_linear_grpo_loss, p, backend=backend, **ref)
        assert all(x.grad is None for x in ref.values()) and all(x.isfinite().all() for x in found.flat().values())
        kept = p.mask.nonzero()[2]
        ref = {n: x.detach().clone() for n, x in ref.items()}
        ref["ref_hidden"][kept[0], kept[1], 0] = NAN
        found = run(fused_linear_grpo_loss, p, backend=backend, **ref)
        assert found.loss.isnan() and found.metrics["kl"].isnan() and found.gradients["weight"].isnan().any()
        assert found.logps.isfinite().all()


def test_equal_models_have_no_kl_and_no_gradient_of_it(backend):
    for dtype in (torch.float32, torch.bfloat16):
        for level in LEVELS:
            p = exact(
                make_problem(
                    dtype=dtype, bias=True, config=GRPOLossConfig(loss_type="sapo", importance_sampling_level=level, softcap=9.0)
                )
            )
            p.advantages = torch.zeros_like(p.advantages)
            ref = dict(
                ref_hidden=p.hidden.to(DEVICE, dtype), ref_weight=p.weight.to(DEVICE, dtype), ref_bias=p.bias.to(DEVICE, dtype)
            )
            found = run(fused_linear_grpo_loss, p, backend=backend, **ref)
            assert found.loss == 0 and found.metrics["kl"] == 0
            assert not any(x.any() for x in found.gradients.values())


@pytest.mark.parametrize("reduction", ["loss_type", "none"])
def test_nothing_kept(reduction, backend):
    for level in LEVELS:
        p = exact(make_problem(B=3, T=4, V=11, bias=True, config=GRPOLossConfig(importance_sampling_level=level)))
        p.mask = torch.zeros(3, 4)
        ours, truth = both(p, ("hidden", "weight", "bias"), 1.0, backend=backend, reduction=reduction, **beside(p))
        assert not any(x.any() for x in ours.values() if x is not None) and ours.keys() == truth.keys()


def test_the_module_takes_it(backend):
    p = exact(make_problem())
    ref = beside(p)
    positional, keywords, _ = p.arguments()
    keywords.pop("config")
    out = FusedLinearGRPOLoss(beta=p.config.beta, kl_estimator="exact")(*positional, **keywords, **ref, backend=backend)
    assert torch.equal(out.loss, run(fused_linear_grpo_loss, p, backend=backend, **ref).loss)


@on_the_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows_given", [False, True])
def test_it_compiles_without_a_graph_break(level, rows_given):
    torch._dynamo.reset()
    p = exact(make_problem(B=3, T=5, D=8, V=33, config=GRPOLossConfig(importance_sampling_level=level)))
    ref, more = beside(p), dict(kept_rows=p.kept_rows()) if rows_given else {}
    compiled = torch.compile(fused_linear_grpo_loss, fullgraph=True, backend="aot_eager")
    results = [run(f, p, backend="torch", **ref, **more).flat() for f in (fused_linear_grpo_loss, compiled)]
    assert_all_close(*results, 1e-10)
    torch._dynamo.reset()


@pytest.mark.unpoisoned
def test_the_same_call_twice_gives_the_same_bits(backend):
    for level in LEVELS:
        size = dict(B=3, T=7, V=131) if slow(backend) else dict(B=4, T=17, V=517)
        p = exact(make_problem(**size, D=48, dtype=torch.bfloat16, config=GRPOLossConfig(importance_sampling_level=level)))
        ref = beside(p, depth=16)
        for workspace in (30_000,) if slow(backend) else (1, 30_000, None):
            one, other = (
                run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace, **ref).flat() for _ in range(2)
            )
            assert all(torch.equal(x, other[n]) for n, x in one.items())


# objective, errors, products


def test_objective_takes_the_kl():
    """With its gradient; equal to the reference that makes it."""
    for level in LEVELS:
        p = exact(make_problem(config=GRPOLossConfig(importance_sampling_level=level, entropy_coef=0.1)))
        ref = beside(p)
        truth = run(reference.grpo_loss, p, **ref)
        positional, keywords, leaves = p.arguments()
        h = leaves["hidden"].where(positional[4].unsqueeze(-1), 0.0)
        logps, entropy = reference.logps_from_logits(h @ leaves["weight"].T, positional[2], positional[4], p.config)
        kl = kl_by_hand(p, {n: x.cpu() for n, x in ref.items()}, {n: x.cpu() for n, x in leaves.items()}, keywords).to(DEVICE)
        kl = torch.where(positional[4], kl, NAN)  # what is there under the mask does not matter
        loss, metrics = objective(logps, entropy, *positional[3:], old_logps=keywords["old_logps"], kl=kl, config=p.config)
        loss.backward()
        assert_close("loss", loss, truth.loss, 1e-10)
        assert_all_close({n: x.grad for n, x in leaves.items()}, truth.gradients, 1e-10)
        assert_all_close(metrics, truth.metrics, 1e-10)
        with pytest.raises(ValueError, match=r"kl must be given when beta != 0 \(beta = 0.3\), got None"):
            objective(logps, entropy, *positional[3:], ref_logps=logps.detach(), config=p.config)
        # k3 does not read it
        k3 = dataclasses.replace(p.config, kl_estimator="k3")
        given = logps.detach(), entropy.detach(), *positional[3:]
        first, second = (objective(*given, ref_logps=given[0] - 1, kl=x, config=k3)[0] for x in (None, kl.detach() * NAN))
        assert torch.equal(first, second)


BAD = [
    (dict(ref_hidden=None), ValueError, r"^ref_hidden must be given with kl_estimator='exact' and beta != 0 \(ref_logps are for 'k3'\), got None"),
    (dict(ref_weight=None), ValueError, r"^ref_weight must be given with kl_estimator='exact' and beta != 0 \(ref_logps are for 'k3'\), got None"),
    (dict(ref_hidden=torch.ones(4, 5, 16)), ValueError, r"^ref_hidden must be \[\.\., D'\] = \[4, 6, D'\], got \[4, 5, 16\]"),
    (dict(ref_hidden=torch.ones(4, 6, 3)), ValueError, r"^ref_weight must be \[V, D'\] = \[37, 3\], got"),
    (dict(ref_weight=torch.ones(38, 16)), ValueError, r"^ref_weight must be \[V, D'\] = \[37, 16\].*got \[38, 16\]"),
    (
        dict(ref_weight=torch.ones(37, 16).bfloat16()),
        TypeError,
        r"^ref_weight must be torch.float32 as ref_hidden is, got torch.bfloat16",
    ),
    (dict(ref_bias=torch.ones(36)), ValueError, r"^ref_bias must have shape \[37\], got \[36\]"),
    (dict(ref_bias=[0.0] * 37), TypeError, r"^ref_bias must be a tensor, got list"),
    (
        dict(temperature=torch.ones(4, 6, requires_grad=True)),
        ValueError,
        r"^temperature must not require a gradient, a divergence has none",
    ),
]


@on_the_cpu
@pytest.mark.parametrize("function", [fused_linear_grpo_loss, reference.grpo_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("changes, error, said", BAD)
def test_what_is_wrong_is_named(changes, error, said, function):
    p = exact(make_problem(dtype=torch.float32))
    positional, keywords, _ = p.arguments()
    keywords |= dict(ref_hidden=torch.ones(4, 6, 16), ref_weight=torch.ones(37, 16), backend="torch")
    function(*positional, **keywords)
    with pytest.raises(error, match=said):
        function(*positional, **{**keywords, **changes})
    with pytest.raises(ValueError, match="^kl_estimator must be one of k3, exact, got 'k2'"):
        GRPOLossConfig(kl_estimator="k2")


P, Q, V = 13, 17, 211


@pytest.mark.exhaustive_in_the_interpreter
@on_the_cpu
def test_one_pass_stays_one_pass(backend):
    """6NVD + 2NVD', and a frozen head 4NVD + 2NVD'; what needs two phases is recomputed: 8NVD + 4NVD'."""
    one_pass = [dict(), dict(loss_type="cispo"), dict(loss_type="sapo"), dict(entropy_coef=0.1), dict(loss_type="luspo", delta=2.2)]
    two_phases = [dict(importance_sampling_level="sequence"), dict(loss_type="vespo"), dict(top_entropy_quantile=0.57)]
    for changes in (one_pass + two_phases)[:: 3 if slow(backend) else 1]:
        for on_policy in (False, True):
            p = exact(make_problem(B=4, T=5, D=P, V=V, dtype=torch.float32, config=GRPOLossConfig(**changes), on_policy=on_policy))
            ref = beside(p, depth=Q)
            ref["ref_hidden"] = ref["ref_hidden"].nan_to_num()
            again = changes in two_phases and (not on_policy or "top_entropy_quantile" in changes)
            for needs, wanted, twice in (
                (("hidden", "weight"), (6, 2), (8, 4)),
                (("hidden",), (4, 2), (6, 4)),
                ((), (2, 2), (2, 2)),
            ):
                positional, keywords, _ = p.arguments(needs=needs)

                def call(positional=positional, keywords=keywords, ref=ref, needs=needs):
                    loss = fused_linear_grpo_loss(*positional, **keywords, **ref, backend=backend).loss
                    if needs:
                        loss.backward()

                student, teacher = twice if again else wanted
                assert operations(call) == p.kept * V * (student * P + teacher * Q), (changes, on_policy, needs)
