"""The reference itself, against the plain expressions of the specification."""

import dataclasses
import math

import pytest
import torch
from support.problems import draw_problem, make_problem, packed, run
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close

from grpo_kernels import GRPOLossConfig, objective, reference
from grpo_kernels.losses.config import TRL_LOSS_TYPES


def plain_log_probs(p):
    """(lp, entropy) with one softmax over the full logits, differentiable; 0 where masked."""
    _, keywords, leaves = p.arguments(torch.float64)
    kept = p.mask.bool()
    h = leaves["hidden"].where(kept.unsqueeze(-1), 0.0)
    z = h @ leaves["weight"].T
    if p.lora_a is not None:
        z = h @ (leaves["weight"] + p.lora_scale * leaves["lora_b"] @ leaves["lora_a"]).T
    if p.bias is not None:
        z = z + leaves["bias"]
    z = p.config.logit_scale * z
    if p.config.softcap is not None:
        z = p.config.softcap * torch.tanh(z / p.config.softcap)
    temperature = p.config.temperature if p.temperature is None else p.temperature.where(kept, 1.0).unsqueeze(-1)
    log_p = (z / temperature).log_softmax(-1)
    lp = log_p.gather(-1, p.completion_ids.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return lp.where(kept, 0.0), entropy.where(kept, 0.0), keywords, leaves


def draw_padded(seed):
    while (p := draw_problem(seed)).cu_seqlens is not None:
        seed += 1000
    return p


@each_seed(0, 200, usual=40)
def test_equals_the_objective_of_plain_log_probs(seed):
    """Loss, log-probs, entropy, metrics and every gradient of random problems in float64."""
    p = draw_padded(seed)
    ours = run(reference.grpo_loss, p).flat()
    lp, entropy, keywords, leaves = plain_log_probs(p)
    names = ("old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps", "num_items", "config")
    loss, metrics = objective(lp, entropy, p.advantages, p.mask, **{n: keywords[n] for n in names})
    loss.backward()
    truth = {"loss": loss, "logps": lp, "entropy": entropy, **{f"metric {n}": x for n, x in metrics.items()},
             **{f"gradient of {n}": x.grad for n, x in leaves.items()}}  # fmt: skip
    # a confident row's log-prob cancels in log_softmax, not in the reference
    assert_all_close(ours, truth, 1e-9, floor=1e-9)


@each_seed(0, 100, usual=20)
def test_packed_equals_padded(seed):
    p = draw_padded(seed)
    while (q := packed(p, seed)).cu_seqlens is None:  # per-token advantages that would read as one per sequence
        seed += 1000
        p = draw_padded(seed)
    padded, flat = run(reference.grpo_loss, p), run(reference.grpo_loss, q)
    kept = p.mask.bool()
    assert flat.logps.shape == q.mask.shape
    for name in ("logps", "entropy"):
        setattr(padded, name, getattr(padded, name)[kept])
        setattr(flat, name, getattr(flat, name)[q.mask.bool()])
    padded.gradients["hidden"] = padded.gradients["hidden"][kept]
    flat.gradients["hidden"] = flat.gradients["hidden"][q.mask.bool()]
    assert_all_close(flat.flat(), padded.flat(), 1e-11)


def test_confident_rows_keep_their_digits_in_float32():
    p = make_problem(B=4, T=5, D=16, V=37, dtype=torch.float32, zero_advantages=False, config=GRPOLossConfig(loss_type="cispo"))
    exact, single = run(reference.grpo_loss, p, dtype=torch.float64), run(reference.grpo_loss, p)
    confident = p.mask & (-torch.expm1(exact.logps) < 1e-6)
    assert confident.sum() >= 2
    assert ((single.logps - exact.logps)[confident] / exact.logps[confident]).abs().max() < 1e-3
    rows = single.gradients["hidden"][confident].double(), exact.gradients["hidden"][confident]
    assert ((rows[0] - rows[1]).norm(dim=1) < 1e-3 * rows[1].norm(dim=1)).all()


def test_extreme_logits_stay_finite():
    for dtype in (torch.float32, torch.float64):
        for scale in (0.0, 1e-20, 1.0, 1e3, 1e6):
            p = make_problem(B=3, T=4, D=8, V=21, confident=False, on_policy=scale > 1e3)
            p.hidden, p.ref_logps = p.hidden * scale, p.ref_logps * 0
            beta = 0.0 if p.old_logps is None else 0.1  # gradients of e^80 times 1e6 are beyond float32
            out = run(reference.grpo_loss, p.with_config(beta=beta, entropy_coef=0.1, use_bias_correction_kl=False), dtype=dtype)
            for name, value in out.flat().items():
                assert value.isfinite().all(), f"{name} at scale {scale}"


def test_one_column_and_a_banned_rest():
    """p = 1: log-prob 0, entropy 0, no gradient of either and no NaN."""
    one = make_problem(B=2, T=3, V=1, on_policy=True)
    banned = make_problem(B=2, T=3, V=5, on_policy=True, bias=True)
    banned.bias[1:] = -math.inf
    banned.completion_ids[:] = 0
    for p in (one, banned):
        out = run(reference.grpo_loss, p.with_config(entropy_coef=0.5))
        assert not out.logps.any() and not out.entropy.any()
        for name, gradient in out.gradients.items():
            assert not gradient.any(), name


@pytest.mark.parametrize("dtype, result", [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                           (torch.bfloat16, torch.float32), (torch.float16, torch.float32)])  # fmt: skip
def test_dtypes(dtype, result):
    p = make_problem(B=3, T=4, V=21, dtype=dtype, bias=True, lora=True, config=GRPOLossConfig(beta=0.1))
    out = run(reference.grpo_loss, p)
    assert {out.loss.dtype, out.logps.dtype, out.entropy.dtype} == {result}
    assert {x.dtype for x in out.metrics.values()} == {result}
    assert all(g.dtype == dtype for g in out.gradients.values())
    exact = run(reference.grpo_loss, p, dtype=torch.float64)
    assert_close("loss", out.loss, exact.loss, {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1))


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_a_gradient_of_gradients_and_a_second_backward(loss_type):
    p = make_problem(B=3, T=4, V=21, config=GRPOLossConfig(loss_type=loss_type, max_completion_length=4))
    positional, keywords, leaves = p.arguments()
    loss = reference.grpo_loss(*positional, **keywords).loss
    first = torch.autograd.grad(loss, leaves["hidden"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaves["hidden"])[0])


def test_garbage_under_the_mask_changes_nothing():
    clean = make_problem(B=4, T=6, seed=3, temperature=True, sampling=True, config=GRPOLossConfig(beta=0.1))
    dirty = make_problem(B=4, T=6, seed=3, temperature=True, sampling=True, config=GRPOLossConfig(beta=0.1), garbage=True)
    assert dirty.hidden.isnan().any() and dirty.old_logps.isnan().any() and dirty.completion_ids.max() > 12345
    for (name, a), b in zip(run(reference.grpo_loss, dirty).flat().items(), run(reference.grpo_loss, clean).flat().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name


def test_options_that_change_nothing_change_nothing():
    p = make_problem(B=4, T=6)
    plain = run(reference.grpo_loss, p).flat()
    for more in (dict(workspace_bytes=1000), dict(backend="cpu"), dict(kept_rows=p.kept_rows())):
        for name, value in run(reference.grpo_loss, p, **more).flat().items():
            assert torch.equal(value, plain[name]), (name, more)
    ignored = dataclasses.replace(p, config=GRPOLossConfig(sapo_temperature_pos=9, vespo_k_pos=7, max_completion_length=3))
    assert torch.equal(run(reference.grpo_loss, ignored).loss, plain["loss"])
