"""Gradients in the ways that autograd asks for them: retained, accumulated, scaled, under autocast, of some leaves, of none."""

import pytest
import torch
from support.loss_calls import PATHS, every_backend, every_path, interpreted, on_the_cpu
from support.problems import HEAD_LEAVES, make_problem, run
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, reference


@pytest.mark.cover("backend", "needs")
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
def test_lora_without_a_gradient_of_the_rest(backend):
    """The adapter's gradients do not lean on dW or dH being formed."""
    p = make_problem(lora=True, bias=True)
    truth = run(reference.grpo_loss, p).gradients
    for path in ("one pass", "sequence"):
        q = p.with_config(**{**vars(PATHS[path]), "beta": 0.0})
        truth = run(reference.grpo_loss, q).gradients
        for needs in (("lora_a",), ("lora_b",), ("bias",), ("weight", "lora_a"), ("hidden", "lora_b")):
            for workspace in (1,) if interpreted(backend) else (1, None):
                ours = run(fused_linear_grpo_loss, q, needs=needs, backend=backend, workspace_bytes=workspace).gradients
                for name in needs:
                    assert_close(f"{path} {needs} {name}", ours[name], truth[name], 1e-10)


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
