"""The fused functions against the reference: loss, log-probs, entropy, metrics and every gradient, all options, all backends."""

import dataclasses
import gc
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.loss_calls import (
    BACKENDS,
    PATHS,
    WORKSPACES,
    assert_kept_rows_and_layouts_agree,
    draw_call,
    every_backend,
    every_path,
    interpreted,
    on_the_cpu,
    random_needs,
)
from support.problems import DEVICE, HEAD_LEAVES, draw_problem, make_problem, policy_logps, run
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import (
    FusedLinearGRPOLoss,
    GRPOLossConfig,
    available_backends,
    fused_linear_grpo_loss,
    grpo_loss_from_logits,
    linear_logprobs,
    reference,
)
from grpo_kernels.engine import products
from grpo_kernels.losses.config import TRL_LOSS_TYPES


@every_backend
@pytest.mark.parametrize("block", range(20))
def test_float64_equals_the_reference(block, backend):
    for seed in range(15 * block, 15 * block + 15):
        p, needs, more, scale = draw_call(seed, torch.float64, backend)
        ours = run(fused_linear_grpo_loss, p, needs=needs, scale=scale, **more)
        truth = run(reference.grpo_loss, p, needs=needs, scale=scale)
        assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"seed {seed} {needs} {more}")


@every_backend
@pytest.mark.parametrize("block", range(20))
def test_float32_equals_the_reference(block, backend):
    """1e-5 of the norm of float64's result, or twice what PyTorch loses in float32 where a sum cancels."""
    for seed in range(1000 + 15 * block, 1000 + 15 * block + 15):
        p, needs, more, scale = draw_call(seed, torch.float32, backend)
        ours = run(fused_linear_grpo_loss, p, needs=needs, scale=scale, **more).flat()
        single = run(reference.grpo_loss, p, needs=needs, scale=scale).flat()
        exact = run(reference.grpo_loss, p, dtype=torch.float64, needs=needs, scale=scale).flat()
        assert ours.keys() == exact.keys()
        for name, truth in exact.items():
            if truth is None:
                assert ours[name] is None
                continue
            assert ours[name].dtype == single[name].dtype and ours[name].shape == truth.shape
            floor = 1e-5 + 1e-7 / max(truth.double().norm().item(), 1e-30)
            assert_no_worse_than_torch(f"seed {seed} {needs} {more} {name}", ours[name], single[name], truth, floor=floor)


@every_backend
@pytest.mark.parametrize("block", range(10))
def test_bfloat16_is_no_worse_than_pytorch_in_bfloat16(block, backend):
    for seed in range(2000 + 6 * block, 2000 + 6 * block + 6):
        rng = random.Random(seed)
        # an entropy or drift that rounding moves over its threshold changes which tokens train, in PyTorch as in ours
        fixed = dict(top_entropy_quantile=1.0)
        p = draw_problem(seed, torch.bfloat16, **fixed)
        if p.hidden.shape[-1] < 8 or p.weight.shape[0] < 17:
            continue
        needs, workspace = random_needs(rng, p), rng.choice(WORKSPACES)
        ours = run(fused_linear_grpo_loss, p, needs=needs, backend=backend, workspace_bytes=workspace).flat()
        theirs = run(reference.grpo_loss, p, needs=needs).flat()
        exact = run(reference.grpo_loss, p, dtype=torch.float64, needs=needs).flat()
        for name, truth in exact.items():
            if name.startswith("metric") or truth is None:
                continue
            assert ours[name].dtype == theirs[name].dtype
            assert_no_worse_than_torch(f"seed {seed} {needs} {workspace} {name}", ours[name], theirs[name], truth, floor=4e-3)


@every_backend
@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens(config, dtype, backend):
    """Ragged tails: several tiles, several blocks, an odd vocabulary, in a problem large enough to average rounding."""
    p = make_problem(B=6, T=23, D=64, V=1031, dtype=dtype, config=config, bias=True, banned=3, sampling=True, spread=3.0)
    theirs, exact = run(reference.grpo_loss, p).flat(), run(reference.grpo_loss, p, dtype=torch.float64).flat()
    if dtype == torch.float16 and backend == "cpu":
        with pytest.raises(RuntimeError, match=r"'cpu'.*float16.*backend='torch'"):
            run(fused_linear_grpo_loss, p, backend=backend)
        backend = "auto"
    for workspace in (400_000,) if interpreted(backend) else (60_000, 400_000, None):
        ours = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace).flat()
        for name, truth in exact.items():
            if not name.startswith("metric") or dtype == torch.float32:
                floor = 1e-5 if dtype == torch.float32 else 1e-3
                assert_no_worse_than_torch(f"{workspace} {name}", ours[name], theirs[name], truth, floor=floor)


@every_backend
@every_path
def test_kept_rows_and_layouts_agree(config, backend):
    assert_kept_rows_and_layouts_agree(config, backend)


@every_backend
@every_path
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("rows_given", [False, True])
def test_nothing_kept_is_a_differentiable_zero(config, shape, rows_given, backend):
    B, T = shape
    p = make_problem(B=3, T=4, V=11, bias=True, lora=True, config=config, sampling=True)
    for name in ("hidden", "completion_ids", "mask", "old_logps", "ref_logps", "sampling_logps"):
        setattr(p, name, getattr(p, name)[:B, :T])
    p.advantages, p.mask = p.advantages[:B], torch.zeros(B, T)
    more = dict(kept_rows=p.kept_rows()) if rows_given else {}
    out = run(fused_linear_grpo_loss, p, backend=backend, **more)
    assert out.loss == 0 and out.logps.shape == shape and not out.logps.any() and not out.entropy.any()
    for name, gradient in out.gradients.items():
        if gradient is not None or name in ("hidden", "weight"):
            assert gradient.shape == getattr(p, name).shape and not gradient.any(), name
    assert out.metrics.keys() == run(reference.grpo_loss, p).metrics.keys()
    assert all(value == 0 for value in out.metrics.values()), out.metrics
    empty = dataclasses.replace(p, **{n: getattr(p, n).reshape(B * T, *getattr(p, n).shape[2:])[:0] for n in (
        "hidden", "completion_ids", "mask", "old_logps", "ref_logps", "sampling_logps")})  # fmt: skip
    empty.cu_seqlens = torch.zeros(B + 1, dtype=torch.int32)
    out = run(fused_linear_grpo_loss, empty, backend=backend)
    assert out.loss == 0 and out.logps.shape == (0,) and not out.gradients["weight"].any()


@every_backend
@pytest.mark.parametrize("vocab", [1, 2, 3, 63, 64, 65, 129])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_shapes_around_a_block(vocab, tokens, backend):
    for config in (PATHS["one pass, entropy"], PATHS["sequence"]):
        for depth in (1, 5):
            p = make_problem(B=1, T=tokens, D=depth, V=vocab, config=config, masked=0.0, zero_advantages=False)
            for workspace in (1, 5000, None):
                ours = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace)
                assert_all_close(ours.flat(), run(reference.grpo_loss, p).flat(), 1e-10, hint=f"{depth} {workspace}")


# Gradients that autograd asks for in other ways


@every_backend
@every_path
@pytest.mark.parametrize("needs", [HEAD_LEAVES, ("hidden",), ("weight",)], ids=["all", "frozen head", "frozen hidden"])
def test_a_retained_graph_gives_the_same_gradients_again(config, needs, backend):
    """The one pass scales its gradients in place and a leaf's .grad may be that very memory; the stash is overwritten."""
    p = make_problem(config=config, sampling=True)
    truth = run(reference.grpo_loss, p, needs=needs).gradients
    for workspace in (1, None):
        positional, keywords, leaves = p.arguments(needs=needs)
        loss = fused_linear_grpo_loss(*positional, **keywords, backend=backend, workspace_bytes=workspace).loss
        asked = {n: x for n, x in leaves.items() if x.requires_grad}
        handed_out = []
        for scale in (0.25, 3.0, 1.0, 1.0):
            handed_out.append((scale, torch.autograd.grad(loss * scale, list(asked.values()), retain_graph=True)))
        for scale, gradients in handed_out:
            for name, gradient in zip(asked, gradients, strict=True):
                assert_close(f"{name} times {scale}", gradient, truth[name] * scale, 1e-10)
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            for name, leaf in asked.items():
                assert_close(f"{name}, {times} times", leaf.grad, truth[name] * times, 1e-10)


@every_backend
@every_path
def test_a_weight_changed_before_backward_is_an_error_or_does_not_matter(config, backend):
    """An optimiser's step between forward and backward must never leave gradients of a mixture."""
    p = make_problem(config=config, sampling=True)
    truth = run(reference.grpo_loss, p).gradients
    for times in (1, 2):
        positional, keywords, leaves = p.arguments()
        loss = fused_linear_grpo_loss(*positional, **keywords, backend=backend).loss
        if times == 2:
            loss.backward(retain_graph=True)
            leaves["hidden"].grad = leaves["weight"].grad = None
        with torch.no_grad():
            leaves["weight"].mul_(1.5)
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified" in str(error)
            continue
        assert_close("hidden", leaves["hidden"].grad, truth["hidden"], 1e-10)
        assert_close("weight", leaves["weight"].grad, truth["weight"], 1e-10)


@every_backend
@every_path
def test_gradients_accumulate_over_calls(config, backend):
    """Two losses on the same leaves, and backward through hidden states that something else made."""
    p = make_problem(config=config, sampling=True)
    results = {}
    for name, function in (("ours", fused_linear_grpo_loss), ("truth", reference.grpo_loss)):
        positional, keywords, leaves = p.arguments()
        base = leaves["hidden"]
        hidden = torch.tanh(base) + base
        one = function(hidden, *positional[1:], **keywords).loss
        two = function(hidden * 0.5, *positional[1:], **keywords).loss
        (one * 0.5 + two.square()).backward()
        results[name] = {n: x.grad for n, x in leaves.items()}
    assert_all_close(results["ours"], results["truth"], 1e-9)


@every_backend
@every_path
def test_calls_that_overlap_share_no_memory(config, backend, monkeypatch):
    """A tile's memory is kept for the next call: never for one that comes while it is still in use, even twice in use."""
    monkeypatch.setattr(products, "_HUGE_PAGE_BYTES", 1)
    problems = [make_problem(seed, B=4, T=5 + seed, V=41, config=config, sampling=True) for seed in range(3)]
    truth = [run(reference.grpo_loss, p).gradients for p in problems]
    calls = []
    for p in problems:
        positional, keywords, leaves = p.arguments()
        calls.append((fused_linear_grpo_loss(*positional, **keywords, backend=backend).loss, leaves))
    for times in (1, 2):
        for i in (1, 0, 2):
            loss, leaves = calls[i]
            loss.backward(retain_graph=True)
            run(fused_linear_grpo_loss, problems[2 - i], backend=backend)
            for name, leaf in leaves.items():
                assert_close(f"{name} of {i}, {times} times", leaf.grad, truth[i][name] * times, 1e-10)


@every_backend
@pytest.mark.parametrize("path", ["one pass", "sequence"])
def test_calls_from_several_threads(path, backend, monkeypatch):
    if interpreted(backend):
        pytest.skip("Triton's interpreter is not made for several threads")
    monkeypatch.setattr(products, "_HUGE_PAGE_BYTES", 1)
    problems = [make_problem(seed, B=4, T=6, V=301, config=PATHS[path]) for seed in range(4)]
    truth = [run(reference.grpo_loss, p).flat() for p in problems]

    def repeat(i):
        return [run(fused_linear_grpo_loss, problems[i], backend=backend).flat() for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(repeat, range(4))):
            for result in results:
                assert_all_close(result, truth[i], 1e-10)


@on_the_cpu
@every_backend
@every_path
def test_strides_views_and_expanded_inputs(config, backend):
    p = make_problem(B=4, T=6, config=config, bias=True, lora=True, sampling=True)
    truth = run(reference.grpo_loss, p)

    def call(function, needs):
        leaves = {n: getattr(p, n).clone() for n in p.leaves}
        wide = torch.zeros(p.weight.shape[0], 2 * p.weight.shape[1], dtype=torch.float64)
        wide[:, ::2] = leaves["weight"]
        views = dict(
            hidden=leaves["hidden"].transpose(0, 1).contiguous().transpose(0, 1), weight=wide[:, ::2],
            bias=torch.stack([leaves["bias"]] * 2, 1)[:, 1], lora_a=leaves["lora_a"].T.contiguous().T,
            lora_b=leaves["lora_b"].T.contiguous().T,
        )  # fmt: skip
        for name in needs:
            views[name].requires_grad_()
        ids = p.completion_ids.T.contiguous().T
        old = torch.stack([p.old_logps] * 3, -1)[..., 1]
        out = function(views["hidden"], views["weight"], ids, p.advantages.repeat_interleave(2)[::2], p.mask.T.contiguous().T,
                       bias=views["bias"], lora=(views["lora_a"], views["lora_b"], p.lora_scale), old_logps=old,
                       ref_logps=p.ref_logps, sampling_logps=p.sampling_logps, config=p.config)  # fmt: skip
        out.loss.backward()
        return {n: views[n].grad for n in needs}, out

    def ours(*a, **k):
        return fused_linear_grpo_loss(*a, **k, backend=backend, workspace_bytes=9000)

    gradients, out = call(ours, p.leaves)
    assert_all_close(gradients, truth.gradients, 1e-10)
    assert_close("loss", out.loss, truth.loss, 1e-10)

    expanded = p.hidden[:1, :1].expand(4, 6, -1)
    for function in (ours, reference.grpo_loss):
        base = p.hidden[:1, :1].clone().requires_grad_()
        function(base.expand(4, 6, -1), p.weight, p.completion_ids, p.advantages[:1].expand(4), p.mask, config=GRPOLossConfig(
            loss_type=config.loss_type)).loss.backward()  # fmt: skip
        if function is ours:
            first = base.grad
    assert expanded.stride()[:2] == (0, 0)
    assert_close("expanded", first, base.grad, 1e-10)


@every_backend
def test_lora_without_a_gradient_of_the_rest(backend):
    """The adapter's gradients do not lean on dW or dH being formed."""
    p = make_problem(lora=True, bias=True)
    truth = run(reference.grpo_loss, p).gradients
    for path in ("one pass", "sequence"):
        q = p.with_config(**{**vars(PATHS[path]), "beta": 0.0})
        truth = run(reference.grpo_loss, q).gradients
        for needs in (("lora_a",), ("lora_b",), ("bias",), ("weight", "lora_a"), ("hidden", "lora_b")):
            for workspace in (1, None):
                ours = run(fused_linear_grpo_loss, q, needs=needs, backend=backend, workspace_bytes=workspace).gradients
                for name in needs:
                    assert_close(f"{path} {needs} {name}", ours[name], truth[name], 1e-10)


# What must not be computed


@every_backend
@every_path
def test_no_graph_and_no_gradient_work_without_need(config, backend):
    p = make_problem(config=config, sampling=True)
    positional, keywords, _ = p.arguments(needs=())
    out = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
    assert not out.loss.requires_grad and out.loss.grad_fn is None
    positional, keywords, _ = p.arguments()
    with torch.no_grad():
        quiet = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
    with torch.inference_mode():
        quieter = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss) and torch.equal(quieter.loss, out.loss)
    trained = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
    assert trained.loss.requires_grad and not trained.logps.requires_grad and not trained.entropy.requires_grad
    assert not any(x.requires_grad for x in trained.metrics.values())
    assert_close("loss", quiet.loss, trained.loss, 1e-12)


@every_backend
@every_path
def test_nothing_of_the_call_outlives_it(config, backend):
    """Logits, stash and gradients go when the output goes."""
    p = make_problem(B=4, T=16, V=301, config=config, sampling=True)
    positional, keywords, _ = p.arguments()
    gc.collect()

    def big():
        return sum(1 for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() >= 301 * 16)

    before = big()
    out = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
    out.loss.backward()
    metrics = out.metrics
    del out
    gc.collect()
    assert big() <= before + 1 and metrics  # weight.grad


@every_backend
def test_inputs_are_not_written(backend):
    for config in PATHS.values():
        p = make_problem(config=config, bias=True, lora=True, sampling=True, ratio="token", temperature=True)
        positional, keywords, leaves = p.arguments()
        tensors = [x for x in (*positional, *keywords.values(), *leaves.values()) if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in tensors]
        out = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
        (out.loss * 2).backward()
        assert all(torch.equal(a, b.nan_to_num()) for a, b in zip([x.nan_to_num() for x in before], tensors, strict=True))


# Numbers


@every_backend
@every_path
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_twice_gives_the_same_bits(config, dtype, backend):
    p = make_problem(B=6, T=17, D=48, V=517, dtype=dtype, config=config, bias=True, lora=True, sampling=True, garbage=True)
    for workspace in (30_000,) if interpreted(backend) else (1, 30_000, None):
        first = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace).flat()
        for _ in range(2):
            again = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace).flat()
            for name, value in first.items():
                assert torch.equal(value, again[name]), name


@on_the_cpu
@every_backend
@pytest.mark.parametrize(
    "options",
    [dict(loss_type="sapo"), dict(loss_type="cispo"), dict(loss_type="sapo", importance_sampling_level="sequence"),
     dict(loss_type="sapo", off_policy_mask_threshold=9.0)],
    ids=["one pass", "one pass, cispo", "two phases", "two phases, token level"],
)  # fmt: skip
@pytest.mark.parametrize("workspace", [1, None])
def test_confident_rows_keep_three_digits_of_gradient(options, workspace, backend):
    """p within 1e-6 of 1: `target - lse` cancels in float32, -softplus does not. Off-policy and on, hidden and weight."""
    for on_policy in (False, True):
        p = make_problem(B=4, T=5, D=24, V=61, dtype=torch.float32, config=GRPOLossConfig(**options), sampling=True,
                         zero_advantages=False, on_policy=on_policy, masked=0.0)  # fmt: skip
        exact = run(reference.grpo_loss, p, dtype=torch.float64)
        confident = p.mask & (-torch.expm1(exact.logps) < 1e-6)
        assert confident.sum() >= 2 and (exact.gradients["hidden"][confident].norm(dim=-1) > 0).all()
        for needs in (HEAD_LEAVES, ("hidden",)):
            ours = run(fused_linear_grpo_loss, p, needs=needs, backend=backend, workspace_bytes=workspace)
            got, want = (r.gradients["hidden"][confident].double() for r in (ours, exact))
            assert ((got - want).norm(dim=-1) <= 1e-3 * want.norm(dim=-1)).all(), needs
            lp, truth = ours.logps[confident].double(), exact.logps[confident]
            assert ((lp - truth).abs() <= 1e-3 * truth.abs()).all()
        # only the confident rows train: the head's gradient has nothing else to hide behind
        alone = dataclasses.replace(p, mask=confident)
        got = run(fused_linear_grpo_loss, alone, backend=backend, workspace_bytes=workspace).gradients["weight"]
        want = run(reference.grpo_loss, alone, dtype=torch.float64).gradients["weight"]
        assert_close("weight", got, want, 1e-3, floor=0.0)


@every_backend
@pytest.mark.parametrize("offset", [0.0, 3e4, -3e4])
def test_logits_with_a_common_offset(offset, backend):
    """`lse - sum p z` would lose every digit of the entropy."""
    p = make_problem(dtype=torch.float32, bias=True, config=GRPOLossConfig(entropy_coef=0.1))
    p.bias = (p.bias + offset).float().double()
    theirs, exact = run(reference.grpo_loss, p).flat(), run(reference.grpo_loss, p, dtype=torch.float64).flat()
    ours = run(fused_linear_grpo_loss, p, backend=backend).flat()
    for name in ("logps", "entropy", "gradient of hidden", "gradient of weight"):
        assert_no_worse_than_torch(name, ours[name], theirs[name], exact[name], floor=1e-5)


@every_backend
@every_path
def test_extreme_logits_give_finite_results(config, backend):
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (0.0, 1e-20, 1e2, 1e4):
            p = make_problem(B=3, T=4, D=8, V=21, confident=False, on_policy=True, config=config, dtype=dtype)
            p.hidden = (p.hidden * scale).to(dtype).double()
            p.sampling_logps = p.ref_logps = policy_logps(p).float().double()
            for workspace in (1, None):
                out = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace)
                for name, value in out.flat().items():
                    assert value.isfinite().all(), f"{name} at scale {scale}, {dtype}"
                    assert name != "logps" or (value <= 0).all()
                    assert name != "entropy" or (value >= -1e-6).all()


@every_backend
@every_path
def test_a_vocabulary_of_one_and_a_banned_rest(config, backend):
    one = make_problem(B=2, T=3, V=1, config=config)
    banned = make_problem(B=2, T=3, V=300, bias=True, config=config)
    banned.bias[1:] = -math.inf
    banned.bias[0], banned.completion_ids[:] = 0.3, 0
    for p in (one, banned):
        for dtype in (torch.float32, torch.float64):
            for workspace in (1, None):
                ours = run(fused_linear_grpo_loss, p, dtype=dtype, backend=backend, workspace_bytes=workspace)
                assert not ours.logps.any() and not ours.entropy.any()
                for name, gradient in ours.gradients.items():
                    assert not gradient.any(), f"{name} {gradient}"


@every_backend
@pytest.mark.parametrize("poisoned", ["hidden", "weight", "old_logps", "ref_logps"])
@every_path
def test_nan_is_kept_in_rows_that_train_nothing(config, poisoned, backend):
    """Rows without a gradient are scored only; their NaN must reach the loss, and with it the gradients."""
    if poisoned == "ref_logps" and config.beta == 0:
        pytest.skip("not used")
    p = make_problem(B=4, T=5, V=33, config=config, sampling=True)
    t = int(p.mask[0].int().argmax())
    assert p.advantages[0] == 0
    getattr(p, poisoned)[(3, 2) if poisoned == "weight" else (0, t)] = math.nan
    ours, truth = run(fused_linear_grpo_loss, p, backend=backend), run(reference.grpo_loss, p)
    assert ours.loss.isnan() and truth.loss.isnan()
    assert ours.gradients["weight"].isnan().any() and ours.gradients["hidden"].isnan().any()


@every_backend
@every_path
def test_bad_values_with_kept_rows_are_a_nan_loss(config, backend):
    """kept_rows promises no synchronisation: nothing can be raised, and nothing wild be read."""
    good = make_problem(B=4, T=5, V=33, config=config, sampling=True)
    rows = good.kept_rows()
    for name, value in (("completion_ids", 33), ("completion_ids", -1), ("completion_ids", 2**60), ("advantages", math.nan)):
        bad = dataclasses.replace(good, **{name: getattr(good, name).clone()})
        getattr(bad, name)[(1,) if name == "advantages" else (1, int(good.mask[1].int().argmax()))] = value
        assert run(fused_linear_grpo_loss, bad, backend=backend, kept_rows=rows).loss.isnan(), (name, value)
    bad = dataclasses.replace(good, mask=good.mask.double() * 2)
    assert run(fused_linear_grpo_loss, bad, backend=backend, kept_rows=rows).loss.isnan()


@every_backend
@pytest.mark.parametrize("rows", [[0, 10**6], [-1, 2], [0, 20], [2**62]])
def test_kept_rows_out_of_range_never_read_wild(rows, backend):
    p = make_problem(B=4, T=5, V=33)
    try:
        out = run(fused_linear_grpo_loss, p, backend=backend, kept_rows=torch.tensor(rows, device=DEVICE))
    except (ValueError, IndexError, RuntimeError):
        return
    assert out.loss.isnan()


# Doors


@every_path
def test_the_module_is_the_function(config):
    p = make_problem(config=config, sampling=True)
    module = FusedLinearGRPOLoss(**vars(config))

    def through_the_module(*positional, config, **keywords):
        return module(*positional, **keywords)

    for (name, a), b in zip(run(through_the_module, p).flat().items(), run(fused_linear_grpo_loss, p).flat().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name
    assert config.loss_type in repr(module) and not list(module.parameters())


def reference_from_logits(logits, *positional, **keywords):
    """The reference with the logits as hidden states and the identity as head."""
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return reference.grpo_loss(logits, head, *positional, **keywords)


def logits_problem(p):
    """(logits, positional, keywords) of a problem, with the head's work already done."""
    positional, keywords, _ = p.arguments(needs=())
    hidden = positional[0].where(p.mask.bool().unsqueeze(-1), 0.0)
    z = reference.hidden_to_logits(hidden, positional[1], keywords.pop("bias"), keywords.pop("lora"))
    return z, positional[2:], keywords


@on_the_cpu
@every_backend
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("block", range(8))
def test_loss_from_logits_equals_the_reference(block, inplace, backend):
    """The caller holds the logits: same loss, and their gradient, written over them only if that was asked for."""
    for seed in range(20 * block, 20 * block + 20):
        p = draw_problem(seed)
        if p.bias is not None and not p.bias.isfinite().all():
            p.bias = None  # the identity as head cannot make a logit of -inf
        z, positional, keywords = logits_problem(p)
        results = []
        for function, more in ((grpo_loss_from_logits, dict(backend=backend, inplace_backward=inplace)),
                               (reference_from_logits, {})):  # fmt: skip
            leaf = z.clone().requires_grad_()
            logits = leaf * 1.0  # what arrives in practice is no leaf, and a leaf cannot be overwritten
            out = function(logits, *positional, **keywords, **more)
            assert torch.equal(logits, z), "the forward must not write"
            (out.loss * 0.25).backward()
            results.append({"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **out.metrics, "dz": leaf.grad})
            if function is grpo_loss_from_logits:
                assert inplace or torch.equal(logits, z)
        assert_all_close(*results, 1e-10, hint=f"seed {seed}")


@on_the_cpu
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_from_logits_of_a_shifted_slice(dtype, backend):
    """logits[:, :-1] of a model's output, a vocabulary padded on the right, in the dtype they come in."""
    p = make_problem(B=4, T=7, V=61, dtype=dtype, banned=0, config=PATHS["one pass"])
    z, positional, keywords = logits_problem(p)
    for function in (grpo_loss_from_logits, reference_from_logits):
        whole = torch.full((4, 8, 64), 7.0, dtype=dtype).index_put((torch.tensor(0),), torch.tensor(3.0, dtype=dtype))
        whole[:, :-1, :61] = z.detach()
        whole.requires_grad_()
        more = dict(backend=backend) if function is grpo_loss_from_logits else {}
        out = function(whole[:, :-1, :61], *positional, **keywords, **more)
        out.loss.backward()
        if function is grpo_loss_from_logits:
            ours, loss = whole.grad.clone(), out.loss
    assert ours.dtype == dtype and not ours[:, -1].any() and not ours[..., 61:].any()
    assert_close("loss", loss, out.loss, 1e-5)
    assert_close("dlogits", ours, whole.grad, 1e-5 if dtype == torch.float32 else 8e-3)


@on_the_cpu
@every_backend
def test_loss_from_logits_errors_and_empty_batches(backend):
    p = make_problem(B=3, T=4, V=11, dtype=torch.float32)
    z, positional, keywords = logits_problem(p)
    good = dict(zip(("logits", "completion_ids", "advantages", "mask"), (z, *positional), strict=True), **keywords)
    for wrong, error, said in (
        (dict(logits=None), TypeError, "logits.*NoneType"), (dict(logits=z.long()), TypeError, "logits.*int64"),
        (dict(logits=z[0]), ValueError, r"logits.*\[B, T, V\].*\[4, 11\]"),
        (dict(logits=z[..., :0]), ValueError, r"logits.*\[3, 4, 0\]"),
        (dict(completion_ids=positional[0] + 11), ValueError, "token ids.*V = 11"),
        (dict(mask=p.mask[:2]), ValueError, r"mask.*\[3, 4\].*\[2, 4\]"),
        (dict(config=GRPOLossConfig(beta=1.0), ref_logps=None), ValueError, "ref_logps.*beta"),
        (dict(backend="cudnn"), ValueError, "backend.*'cudnn'"), (dict(workspace_bytes=-1), ValueError, "workspace_bytes"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            grpo_loss_from_logits(**{**good, **wrong})
    for shape in ((0, 4), (3, 0), (3, 4)):
        logits = torch.zeros(*shape, 11, requires_grad=True)
        out = grpo_loss_from_logits(logits, torch.zeros(shape, dtype=torch.long), torch.ones(shape[0]), torch.zeros(shape),
                                    config=PATHS["sequence"], ref_logps=torch.zeros(shape), backend=backend)  # fmt: skip
        out.loss.backward()
        assert out.loss == 0 and not logits.grad.any()
    bad = {**good, "completion_ids": torch.full((3, 4), 99), "kept_rows": p.kept_rows()}
    assert grpo_loss_from_logits(**bad, backend=backend).loss.isnan()


@on_the_cpu
@every_backend
@pytest.mark.parametrize("path", ["one pass", "sequence"])
def test_autocast_casts_once_and_returns_gradients_in_the_parameters_dtype(path, backend):
    p = make_problem(dtype=torch.bfloat16, bias=True, lora=True, config=PATHS[path])
    exact = run(reference.grpo_loss, p, dtype=torch.float64).flat()
    results = {}
    for name, function in (("ours", fused_linear_grpo_loss), ("theirs", reference.grpo_loss)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[name] = run(function, p, dtype=torch.float32).flat()
    for name, truth in exact.items():
        if not name.startswith("metric"):
            assert results["ours"][name].dtype == torch.float32, name
            assert_no_worse_than_torch(name, results["ours"][name], results["theirs"][name], truth, floor=4e-3)
    # mixed dtypes are legal under autocast only
    positional, keywords, _ = p.arguments(torch.float32)
    mixed = (positional[0].bfloat16(), *positional[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_linear_grpo_loss(*mixed, **keywords, backend=backend).loss.isfinite()
    with pytest.raises(TypeError, match="weight"):
        fused_linear_grpo_loss(*mixed, **keywords, backend=backend)


# linear_logprobs


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
@pytest.mark.parametrize("block", range(10))
def test_linear_logprobs_under_any_loss(block, backend):
    """Gradients of log-probs alone, of entropy alone, of both; some rows without a gradient."""
    for seed in range(15 * block, 15 * block + 15):
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
        assert_all_close(*results, 1e-10, hint=f"seed {seed} {workspace} {which}")


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
def test_linear_logprobs_shapes_and_doors(backend):
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


def test_a_backend_that_is_asked_for_and_absent_is_an_error_with_the_remedy():
    p = make_problem()
    for name, reason in available_backends().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=name):
                run(fused_linear_grpo_loss, p, backend=name)
    assert set(available_backends()) >= {"torch", "cpu"} and available_backends()["torch"] is None


@on_the_cpu
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_auto_is_one_of_the_named_backends(loss_type):
    p = make_problem(config=GRPOLossConfig(loss_type=loss_type, max_completion_length=9), dtype=torch.float32)
    auto = run(fused_linear_grpo_loss, p).flat()
    named = [run(fused_linear_grpo_loss, p, backend=b).flat() for b in BACKENDS]
    assert any(all(torch.equal(auto[n], other[n]) for n in auto) for other in named)


@on_the_cpu
@every_path
@pytest.mark.parametrize("ends", [(0, 4, 3), (1, 2, 3), (0, 2, 2), (0, 9, 3)])
def test_wrong_ends_of_sequences_with_kept_rows_are_a_nan_loss(config, ends):
    """Without them an exception; with them nothing is read back, and nothing is read or written out of place."""
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(0, 11, (3,), generator=g), torch.ones(3, dtype=torch.bool)
    lp = -torch.rand(3, generator=g)
    arguments = [torch.randn(3, 4, generator=g), torch.randn(11, 4, generator=g), ids, torch.ones(2), mask]
    more = dict(config=config, old_logps=lp, ref_logps=lp, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 3"):
        fused_linear_grpo_loss(*arguments, **more)
    assert fused_linear_grpo_loss(*arguments, **more, kept_rows=torch.arange(3)).loss.isnan()
    more["cu_seqlens"] = torch.tensor((0, 2, 3), dtype=torch.int32)
    assert fused_linear_grpo_loss(*arguments, **more, kept_rows=torch.arange(3)).loss.isfinite()


@pytest.mark.parametrize("dtype, scale", [(torch.float16, 65536.0), (torch.bfloat16, 1 / 3)])
def test_a_loss_scale_is_not_rounded_where_the_graph_is_retained(dtype, scale):
    """65536, a gradient scaler's first scale, is infinite in float16."""
    p = make_problem(B=4, T=6, D=16, V=101, dtype=dtype, config=GRPOLossConfig(), zero_advantages=False)
    gradients = []
    for retained in (False, True):
        positional, keywords, leaves = p.arguments()
        (fused_linear_grpo_loss(*positional, **keywords).loss * scale).backward(retain_graph=retained)
        gradients.append(leaves["weight"].grad)
    assert gradients[0].isfinite().all() and torch.equal(*gradients)


def test_a_nan_stays_in_its_row_where_live_rows_were_moved_to_the_front():
    """Of two sequences the second trains alone; the first one's NaN must not reach its gradient of hidden."""
    p = make_problem(B=2, T=3, D=8, V=33, dtype=torch.float64, config=PATHS["sequence"], masked=0.0)
    p = p.with_config(beta=0.0)
    p.advantages = torch.tensor([0.0, 1.0], dtype=torch.float64)
    p.hidden[0, 0] = torch.nan
    for workspace in (1, None):
        ours = run(fused_linear_grpo_loss, p, workspace_bytes=workspace).gradients["hidden"].isnan().any(-1)
        assert torch.equal(ours, run(reference.grpo_loss, p).gradients["hidden"].isnan().any(-1))
