"""The fused loss against the reference: loss, log-probs, entropy, metrics and every gradient, all options, all backends."""

import dataclasses
import random

import pytest
import torch
from support.loss_calls import (
    BACKENDS,
    PATHS,
    WORKSPACES,
    draw_call,
    every_backend,
    every_path,
    interpreted,
    on_the_cpu,
    random_needs,
)
from support.problems import draw_problem, make_problem, run
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import FusedLinearGRPOLoss, GRPOLossConfig, available_backends, fused_linear_grpo_loss, reference
from grpo_kernels.losses.config import TRL_LOSS_TYPES


@every_backend
@each_seed(0, 300, usual=60)
def test_float64_equals_the_reference(seed, backend):
    p, needs, more, scale = draw_call(seed, torch.float64, backend)
    ours = run(fused_linear_grpo_loss, p, needs=needs, scale=scale, **more)
    truth = run(reference.grpo_loss, p, needs=needs, scale=scale)
    assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"{needs} {more}")


@every_backend
@each_seed(1000, 300, usual=60)
def test_float32_equals_the_reference(seed, backend):
    """1e-5 of the norm of float64's result, or twice what PyTorch loses in float32 where a sum cancels."""
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
        assert_no_worse_than_torch(f"{needs} {more} {name}", ours[name], single[name], truth, floor=floor)


def draw_large(seed):
    """A problem with enough numbers in a row for rounding to average out."""
    while True:
        # an entropy or drift that rounding moves over its threshold changes which tokens train, in PyTorch as in ours
        p = draw_problem(seed, torch.bfloat16, top_entropy_quantile=1.0)
        if p.hidden.shape[-1] >= 8 and p.weight.shape[0] >= 17:
            return p
        seed += 1000


@every_backend
@each_seed(2000, 60, usual=20)
def test_bfloat16_is_no_worse_than_pytorch_in_bfloat16(seed, backend):
    rng, p = random.Random(seed), draw_large(seed)
    needs, workspace = random_needs(rng, p), rng.choice(WORKSPACES)
    ours = run(fused_linear_grpo_loss, p, needs=needs, backend=backend, workspace_bytes=workspace).flat()
    theirs = run(reference.grpo_loss, p, needs=needs).flat()
    exact = run(reference.grpo_loss, p, dtype=torch.float64, needs=needs).flat()
    for name, truth in exact.items():
        if name.startswith("metric") or truth is None:
            continue
        assert ours[name].dtype == theirs[name].dtype
        assert_no_worse_than_torch(f"{needs} {workspace} {name}", ours[name], theirs[name], truth, floor=4e-3)


@pytest.mark.cover("backend", "dtype")
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


@pytest.mark.cover("backend", "config")
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


@pytest.mark.cover("backend", "tokens")
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


@on_the_cpu
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_auto_is_one_of_the_named_backends(loss_type):
    p = make_problem(config=GRPOLossConfig(loss_type=loss_type, max_completion_length=9), dtype=torch.float32)
    auto = run(fused_linear_grpo_loss, p).flat()
    named = [run(fused_linear_grpo_loss, p, backend=b).flat() for b in BACKENDS]
    assert any(all(torch.equal(auto[n], other[n]) for n in auto) for other in named)


def test_a_backend_that_is_asked_for_and_absent_is_an_error_with_the_remedy():
    p = make_problem()
    for name, reason in available_backends().items():
        if reason is not None:
            with pytest.raises(RuntimeError, match=name):
                run(fused_linear_grpo_loss, p, backend=name)
    assert set(available_backends()) >= {"torch", "cpu"} and available_backends()["torch"] is None
