"""`linear_logprobs_at`, K tokens a position over the whole vocabulary, against full logits."""

import math

import pytest
import torch
import torch.distributed as dist
from support.full_logits import TRANSFORMS, full_log_probs
from support.loss_calls import every_backend, on_the_cpu
from support.problems import DEVICE, make_problem, with_float32_chunks
from support.tolerance import assert_close, assert_no_worse_than_torch
from support.vocab_shards import sharded, spawn

from grpo_kernels import linear_logprobs, linear_logprobs_at
from grpo_kernels.engine import chunks


def drawn_ids(p, K, seed=0):
    """The sampled token, the likeliest one, one twice, and some that are none; garbage where masked."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, p.weight.shape[0], (*p.mask.shape, K), generator=g)
    ids[..., :1] = p.completion_ids.where(p.mask.bool(), 0).unsqueeze(-1)
    if K > 2:
        ids[..., 1] = ids[..., 2]
        ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
        ids[0, 0] = -1
    ids[~p.mask.bool()] = -7
    return ids.to(DEVICE)


def ours(p, ids, backend, dtype=None, temperature=None, **more):
    (hidden, weight, _, _, mask), keywords, leaves = p.arguments(dtype)
    c = p.config
    out = linear_logprobs_at(hidden, weight, ids, mask=mask, bias=keywords["bias"], lora=keywords["lora"], backend=backend,
                             logit_scale=c.logit_scale, softcap=c.softcap, temperature=c.temperature if temperature is None else temperature,
                             **more)  # fmt: skip
    return out, leaves


def plain(p, ids, dtype=None, temperature=None):
    log_p, kept, leaves = full_log_probs(p, dtype, temperature)
    entropy = -(log_p.exp() * log_p.where(log_p > -math.inf, 0.0)).sum(-1).where(kept, 0.0)
    return (log_p.gather(-1, ids.clamp(min=0)).where((ids >= 0) & kept.unsqueeze(-1), 0.0), entropy), leaves


def results(function, p, ids, *args, entropy_gradient=True, **more):
    (logps, entropy), leaves = function(p, ids, *args, **more)
    g = torch.Generator().manual_seed(1)
    weights, of_entropy = torch.randn(logps.shape, generator=g).to(logps), torch.randn(entropy.shape, generator=g).to(entropy)
    ((weights * logps).sum() + entropy_gradient * (of_entropy * entropy).sum()).backward()
    return [logps.detach(), entropy.detach(), *(leaves[name].grad for name in p.leaves)]


@every_backend
@pytest.mark.parametrize("K", [0, 1, 5, 70])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("budget", [4000, None])
def test_float64_equals_full_logits(K, transform, budget, backend):
    p = make_problem(K, B=3, T=6, V=61, config=TRANSFORMS[transform], bias=K != 1, lora=K == 5, garbage=True)
    ids = drawn_ids(p, K)
    found = results(ours, p, ids, backend, workspace_bytes=budget)
    for i, (x, truth) in enumerate(zip(found, results(plain, p, ids), strict=True)):
        assert_close(str(i), x, truth, 1e-10)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_worse_than_full_logits_in_their_dtype(dtype, backend):
    p = make_problem(B=4, T=16, V=1031, D=64, dtype=dtype, bias=True, banned=3)
    ids = drawn_ids(p, 6)
    ids[ids >= 1028] = 5  # a banned one has a log-prob of -inf
    exact, theirs = results(plain, p, ids, dtype=torch.float64), results(plain, p, ids)
    for i, (x, one, truth) in enumerate(zip(results(ours, p, ids, backend), theirs, exact, strict=True)):
        assert x.dtype == one.dtype
        assert_no_worse_than_torch(str(i), x, one, truth, floor=1e-5 if dtype == torch.float32 else 4e-3)


@every_backend
def test_one_token_is_linear_logprobs_to_the_last_digits(backend):
    """Near p = 1 too, where log_softmax has lost them: the problem has rows within 1e-6 of it."""
    p = make_problem(B=4, T=9, V=61, dtype=torch.float32)
    assert p.completion_ids.numel()
    (at, entropy), _ = ours(p, p.completion_ids.unsqueeze(-1).to(DEVICE), backend)
    (hidden, weight, token_ids, _, mask), _, _ = p.arguments()
    one = linear_logprobs(hidden, weight, token_ids, mask=mask, backend=backend)
    torch.testing.assert_close(at.squeeze(-1), one.logps, rtol=1e-6, atol=0)
    assert torch.equal(entropy, one.entropy) and (one.logps[mask.bool()] > -1e-5).any()


@every_backend
def test_temperatures_are_differentiable(backend):
    p = make_problem(B=3, T=6, V=61)
    ids, found = drawn_ids(p, 4), []
    for function, args in ((ours, (backend,)), (plain, ())):
        temperature = torch.linspace(0.6, 1.7, p.mask.numel(), dtype=torch.float64, device=DEVICE).view(p.mask.shape).requires_grad_()
        results(function, p, ids, *args, temperature=temperature)
        found.append(temperature.grad)
    assert_close("temperature", *found, 1e-10)


def test_wide_chunks_need_no_second_score(monkeypatch):
    """As on a GPU, whose stash of 16-bit inputs is of no use to a gradient of lse: there is none."""
    with_float32_chunks(monkeypatch)
    p = make_problem(B=4, T=8, V=131, D=32, dtype=torch.bfloat16)
    ids, scored, score = drawn_ids(p, 5), [], chunks.Run.logits
    monkeypatch.setattr(chunks.Run, "logits", lambda run, *args: scored.append(args[0].shape[0]) or score(run, *args))
    exact, theirs = results(plain, p, ids, dtype=torch.float64), results(plain, p, ids)
    found = results(ours, p, ids, "torch", entropy_gradient=False)
    assert sum(scored) == p.kept, "6NVD: each row's logits are made once"
    for i, x in enumerate(found[:2]):
        assert_no_worse_than_torch(str(i), x, theirs[i], exact[i])


def test_banned_tokens_and_none_at_all():
    p = make_problem(B=2, T=3, V=37, bias=True, banned=4, masked=0.0, all_masked_sequence=False)
    ids = torch.full((2, 3, 3), -1)
    ids[0, 0], ids[0, 1] = torch.tensor([34, 35, 1]), torch.tensor([34, 34, 36])
    found = results(ours, p, ids, "auto")
    assert found[0][0, 0].isinf().tolist() == [True, True, False] and found[0][0, 1].isinf().all() and not found[0][1].any()
    assert_close("the likely one", found[0][0, 0, 2], plain(p, ids)[0][0][0, 0, 2], 1e-10)
    for x in found[2:]:
        assert x.isfinite().all()


def test_a_banned_token_leaves_the_temperature_its_gradient():
    p = make_problem(B=2, T=3, V=37, bias=True, banned=4, masked=0.0, all_masked_sequence=False)
    ids = torch.tensor([34, 1, 2]).expand(2, 3, 3).clone()
    ids[1, 2] = -1
    p.bias[0] = -math.inf  # the target of a row without a token
    temperature = torch.full((2, 3), 0.8, dtype=torch.float64, requires_grad=True)
    (logps, _), _ = ours(p, ids, "auto", temperature=temperature)
    p.bias = p.bias.clamp(min=-1e9)  # with -inf the plain expression has NaN
    (exact, _), _ = plain(p, ids.clamp(min=1), temperature=temperature)
    found, = torch.autograd.grad(logps[..., 1:].sum(), temperature)
    wanted, = torch.autograd.grad(exact[..., 1:].where(ids[..., 1:] > 0, 0.0).sum(), temperature)
    assert_close("temperature", found, wanted, 1e-10)


def test_no_graph_where_nothing_asks_for_one():
    p = make_problem(B=2, T=3, V=37)
    with torch.no_grad():
        (logps, entropy), _ = ours(p, drawn_ids(p, 3), "auto")
    assert not logps.requires_grad and not entropy.requires_grad and logps.dtype == torch.float64


@pytest.mark.parametrize("wrong, message", [(37, r"ids must be in \[0, V = 37\), or -1 for none"), (-2, r"ids must be in .* at 1 positions")])
def test_a_wrong_id_is_an_error(wrong, message):
    p = make_problem(B=2, T=3, V=37, masked=0.0, all_masked_sequence=False)
    ids = drawn_ids(p, 3)
    ids[1, 2, 1] = wrong
    with pytest.raises(ValueError, match=message):
        ours(p, ids, "auto")
    p.mask[1, 2] = False
    ours(p, ids, "auto")


def test_wrong_kinds_are_refused():
    p = make_problem()
    with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch.float32"):
        ours(p, drawn_ids(p, 3).float(), "auto")
    with pytest.raises(ValueError, match=r"ids must be \[\.\., K\] = \[4, 6, K\], got \[2, 6, 3\]"):
        ours(p, drawn_ids(p, 3)[:2], "auto")
    (hidden, weight, *_), _, _ = p.arguments()
    ids = drawn_ids(p, 3)
    with pytest.raises(RuntimeError, match="cannot be used under torch.compile"):
        torch.compile(lambda: linear_logprobs_at(hidden, weight, ids), backend="eager", fullgraph=True)()


def shards_agree(rank, world):
    wrong = []
    for name, transform in TRANSFORMS.items():
        for backend in ("torch", "cpu"):
            p = make_problem(B=3, T=6, V=53, bias=True, lora=True, config=transform)
            ids = drawn_ids(p, 5)
            q, own = sharded(p, rank, world)
            alone = results(ours, p, ids, backend)
            for i, (x, truth) in enumerate(zip(results(ours, q, ids, backend, vocab_parallel_group=dist.group.WORLD), alone, strict=True)):
                kind = ["logps", "entropy", *p.leaves][i]
                truth = truth[own] if kind in ("weight", "bias", "lora_b") else truth
                if x.numel() and (x - truth).abs().max() > 1e-10:
                    wrong.append((name, backend, kind, float((x - truth).abs().max())))
    return wrong


@pytest.mark.exhaustive(reason="ten seconds: three processes")
@on_the_cpu
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_sharded_vocabulary_equals_one_process(tmp_path):
    for rank, wrong in enumerate(spawn(tmp_path, 3, shards_agree)):
        assert wrong == [], f"rank {rank}: {wrong[:5]}"
