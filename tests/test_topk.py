"""`topk_divergence` against full logits, over K tokens and over K + 1 bins, down to where a bin is empty."""

import math

import pytest
import torch
import torch.distributed as dist
from support.full_logits import TRANSFORMS, full_log_probs
from support.loss_calls import every_backend, interpreted, on_the_cpu
from support.problems import DEVICE, Problem, make_problem
from support.tolerance import assert_close, assert_no_worse_than_torch
from support.vocab_shards import sharded, spawn

from grpo_kernels import topk_divergence
from grpo_kernels.topk import _compared

KINDS = {"forward_kl": ("forward_kl", 0.5), "reverse_kl": ("reverse_kl", 0.5), "jsd": ("jsd", 0.5), "jsd 0.1": ("jsd", 0.1),
         "jsd 0": ("jsd", 0), "jsd 1": ("jsd", 1.0)}  # fmt: skip
every_kind = pytest.mark.parametrize("kind, beta", KINDS.values(), ids=KINDS)
with_and_without = pytest.mark.parametrize("tail", [True, False], ids=["tail", "no tail"])


def drawn(p, K, seed=0, apart=1.0, nones=True):
    """(ids, log-probs) of a teacher: the sampled token, others, some that are none; garbage where there is none."""
    g = torch.Generator().manual_seed(seed)
    log_p, kept, _ = full_log_probs(p, torch.float64)
    log_p, kept = log_p.detach().cpu(), kept.cpu()
    scores = torch.rand(log_p.shape, generator=g, dtype=torch.float64)
    scores.scatter_(-1, p.completion_ids.where(kept, 0).unsqueeze(-1), 2.0)
    ids = scores.topk(K, -1).indices
    logps = (log_p + apart * torch.randn(log_p.shape, generator=g, dtype=torch.float64)).log_softmax(-1).gather(-1, ids)
    if nones and K > 1:
        ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
        ids[0, 0] = -1
    ids[~kept] = -7
    logps[ids < 0] = math.nan
    per_token = torch.float64 if p.dtype == torch.float64 else torch.float32
    return ids.to(DEVICE), logps.to(DEVICE, per_token)


def ours(p, teacher, dtype=None, temperature=None, **more):
    (hidden, weight, _, _, mask), keywords, leaves = p.arguments(dtype)
    c = p.config
    found = topk_divergence(hidden, weight, *teacher, mask=mask, bias=keywords["bias"], lora=keywords["lora"], logit_scale=c.logit_scale,
                            softcap=c.softcap, temperature=c.temperature if temperature is None else temperature, **more)  # fmt: skip
    return found, leaves


def plain(p, teacher, dtype=None, temperature=None, **more):
    log_p, kept, leaves = full_log_probs(p, dtype, temperature)
    ids, log_q = teacher
    given = (ids >= 0) & kept.unsqueeze(-1)
    some = ids.where(given, 0)
    others = torch.ones_like(log_p).scatter_add(-1, some, -given.to(log_p.dtype)) > 0  # the tail's tokens, one by one
    rest = log_p.masked_fill(~others, -math.inf).logsumexp(-1)
    return between(log_p.gather(-1, some), rest, log_q.to(log_p.dtype), given, **more).where(kept, 0.0), leaves


def between(log_p, rest, log_q, given, kind, beta=0.5, tail=True):
    log_p, log_q = (x.masked_fill(~given, 0.0) for x in (log_p, log_q))
    p, q = (x.exp() * given for x in (log_p, log_q))
    if tail:
        q_tail = 1 - q.sum(-1)
        p, q = torch.cat([p, rest.exp().unsqueeze(-1)], -1), torch.cat([q, q_tail.unsqueeze(-1)], -1)
        log_p, log_q = torch.cat([log_p, rest.unsqueeze(-1)], -1), torch.cat([log_q, q_tail.log().unsqueeze(-1)], -1)
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return (q * (log_q - log_p)).sum(-1)
    if kind == "reverse_kl" or beta == 1:
        return (p * (log_p - log_q)).sum(-1)
    mixed = (1 - beta) * p + beta * q
    log_m = mixed.where(mixed > 0, 1.0).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


def results(function, p, teacher, temperature=None, **more):
    divergence, leaves = function(p, teacher, temperature=temperature, **more)
    g = torch.Generator().manual_seed(1)
    (divergence * torch.randn(divergence.shape, generator=g).to(divergence)).sum().backward()
    found = [divergence.detach(), *(leaves[name].grad for name in p.leaves)]
    return found if temperature is None else [*found, temperature.grad]


@every_backend
@every_kind
@with_and_without
def test_float64_equals_full_logits(kind, beta, tail, backend):
    more = dict(kind=kind, beta=beta, tail=tail)
    for i, (K, config) in enumerate(zip((1, 2, 5, 17), (*TRANSFORMS.values(), TRANSFORMS["plain"]), strict=True)):
        p = make_problem(seed=i, B=3, T=5, V=41, config=config, bias=K != 1, lora=K == 5, garbage=True)
        teacher = drawn(p, K, seed=i)
        if K == 2:
            teacher = teacher[0].int(), teacher[1]
        wanted = results(plain, p, (teacher[0].long(), teacher[1]), **more)
        budget = 4000 if K == 5 else None
        for name, x, truth in zip(("divergence", *p.leaves), results(ours, p, teacher, backend=backend, workspace_bytes=budget, **more),
                                  wanted, strict=True):  # fmt: skip
            assert_close(f"K {K} {name}", x, truth, 1e-10)


@every_kind
@with_and_without
def test_temperatures_are_differentiable(kind, beta, tail):
    p = make_problem(B=3, T=6, V=61)
    teacher, found = drawn(p, 4), []
    for function in (ours, plain):
        temperature = (
            torch.linspace(0.6, 1.7, p.mask.numel(), dtype=torch.float64, device=DEVICE).view(p.mask.shape).requires_grad_()
        )
        found.append(results(function, p, teacher, temperature=temperature, kind=kind, beta=beta, tail=tail)[-1])
    assert_close("temperature", *found, 1e-10)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_no_worse_than_full_logits_in_their_dtype(kind, dtype, backend):
    """Adapter and bias too: what is left for the tail is right only if the tokens' logits are rounded as those of all others are."""
    p = make_problem(B=4, T=9, V=131 if interpreted(backend) else 1031, D=64, dtype=dtype, bias=True, lora=True)
    ids, logps = drawn(p, 6)
    for tail in (True, False):
        more = dict(kind=kind, tail=tail)
        exact, theirs = results(plain, p, (ids, logps), dtype=torch.float64, **more), results(plain, p, (ids, logps), **more)
        for i, (x, one, truth) in enumerate(
            zip(results(ours, p, (ids, logps), backend=backend, **more), theirs, exact, strict=True)
        ):
            assert x.dtype == one.dtype
            assert_no_worse_than_torch(f"tail {tail} {i}", x, one, truth, floor=1e-5 if dtype == torch.float32 else 4e-3)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_whose_tail_is_small(kind, dtype, backend):
    """The likeliest 16 tokens: 1e-2 is left for the others, of a half that the likeliest leaves. Torch sums them one by one."""
    p = make_problem(B=2, T=9, V=131 if interpreted(backend) else 515, D=64, dtype=dtype, spread=6.0, confident=False, lora=True,
                     masked=0.0, all_masked_sequence=False)  # fmt: skip
    log_p, *_ = full_log_probs(p, torch.float64)
    noisy = log_p.detach() + 0.5 * torch.randn(log_p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        DEVICE
    )
    logps, ids = noisy.log_softmax(-1).topk(16, -1)
    left = 1 - log_p.detach().gather(-1, ids).exp().sum(-1)
    assert left.median() < 0.03 and left.min() < 1e-3
    teacher = ids, logps.float()
    exact, theirs = results(plain, p, teacher, dtype=torch.float64, kind=kind), results(plain, p, teacher, kind=kind)
    for i, (x, one, truth) in enumerate(zip(results(ours, p, teacher, kind=kind, backend=backend), theirs, exact, strict=True)):
        assert_no_worse_than_torch(str(i), x, one, truth, floor=1e-5 if dtype == torch.float32 else 4e-3)


@every_kind
def test_near_agreement_nothing_cancels(kind, beta):
    """The plain sum of float32 has no digit left at a divergence of 1e-9."""
    g = torch.Generator().manual_seed(0)
    kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, kind)
    z = torch.randn(200, 50, generator=g)
    for K in (1, 7, 47):  # the tail is nearly everything, or three tokens
        log_p = z.log_softmax(-1)[:, :K]
        log_q = log_p + 1e-5 * torch.randn(log_p.shape, generator=g)
        value, gradient = _compared(log_p, log_q, kind, beta, True, (1e-6, 1e-6))
        wide = log_p.double().requires_grad_()
        given = torch.ones(log_p.shape, dtype=torch.bool)
        args = torch.log1p(-wide.exp().sum(-1)), log_q.double(), given, kind, beta
        exact = between(wide, *args)
        assert 0 < exact.max() < 1e-8 and (value >= 0).all()
        assert_close(f"K {K}", value, exact, 1e-4, floor=2e-15)  # what cancels in float64
        assert_close(f"gradient, K {K}", gradient, torch.autograd.grad(exact.sum(), wide)[0], 1e-4, floor=0.0)
    same = z.log_softmax(-1)[:, :9]
    assert not any(x.any() for x in _compared(same, same, kind, beta, True, (1e-6, 1e-6)))


@every_kind
def test_a_tail_of_a_millionth_keeps_its_digits(kind, beta):
    kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, kind)
    g = torch.Generator().manual_seed(0)
    others = -14 - 3 * torch.rand(2, 50, 3, generator=g)
    rest = others.double().exp().sum(-1) + 1e-6 * torch.rand(2, 50, generator=g)
    log_p, log_q = torch.cat([torch.log1p(-rest).float().unsqueeze(-1), others], -1)
    value, gradient = _compared(log_p, log_q, kind, beta, True, (1e-6, 1e-6))
    wide, teacher = log_p.double().requires_grad_(), log_q.double()
    exact = between(wide, torch.log1p(-wide.exp().sum(-1)), teacher, torch.ones_like(log_p, dtype=torch.bool), kind, beta)
    torch.testing.assert_close(value, exact.detach(), rtol=2e-4, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), wide)[0], rtol=2e-4, atol=1e-11, check_dtype=False)


def small(**more):
    return make_problem(B=2, T=3, V=37, dtype=torch.float32, masked=0.0, all_masked_sequence=False, **more)


def finite_gradients(p, teacher, **more):
    found, *gradients = results(ours, p, teacher, **more)
    for name, gradient in zip(p.leaves, gradients, strict=True):
        assert gradient.isfinite().all(), name
    return found


@every_kind
@with_and_without
def test_empty_bins(kind, beta, tail):
    """Of a teacher of one token, of a student of one token, of the tail of a whole vocabulary, of positions without a token."""
    more, p = dict(kind=kind, beta=beta, tail=tail), small()
    student = full_log_probs(p)[0].detach()
    logps, ids = student.topk(3, -1)
    one = torch.full_like(logps, -math.inf)
    one[..., 0] = 0.0
    found = finite_gradients(p, (ids, one), **more)
    forward, reverse = kind == "forward_kl" or (kind, beta) == ("jsd", 0), kind == "reverse_kl" or (kind, beta) == ("jsd", 1)
    assert found.isinf().all() if reverse else found.isfinite().all()
    if forward:
        torch.testing.assert_close(found, -logps[..., 0], rtol=1e-5, atol=1e-6)

    for above in (0.0, 3e-7):  # a sum that rounding made 1 and more
        halves = torch.full_like(logps[..., :2], 0.5 + above).log()
        found = finite_gradients(p, (ids[..., :2], halves), **more)
        if forward:
            torch.testing.assert_close(found, -math.log(2) - logps[..., :2].mean(-1), rtol=1e-4, atol=3e-6)
        assert found.isfinite().all()

    whole = torch.arange(37, device=DEVICE).expand(2, 3, 37)
    teacher = torch.roll(student, 1, -1)
    found = finite_gradients(p, (whole, teacher), **more)
    everything = between(student, student[..., 0], teacher, torch.ones_like(whole, dtype=torch.bool), **{**more, "tail": False})
    torch.testing.assert_close(found, everything, rtol=1e-5, atol=1e-6)

    certain = Problem(**{**vars(p), "hidden": 200 * p.hidden})
    best = full_log_probs(certain)[0].detach()
    assert (best.max(-1).values == 0).any(), "the other tokens have not even 1e-38"
    for K in (1, 2):
        found = finite_gradients(certain, (best.topk(K, -1).indices, torch.full_like(logps[..., :K], -1.5)), **more)
        assert found.isfinite().all()

    for K in (0, 2):
        nothing = torch.full((2, 3, K), -1, device=DEVICE), torch.full((2, 3, K), math.nan, device=DEVICE)
        assert not finite_gradients(p, nothing, **more).any()


@every_kind
@with_and_without
def test_tokens_that_one_of_both_forbids(kind, beta, tail):
    more, p = dict(kind=kind, beta=beta, tail=tail), small(bias=True, banned=2)
    ids = torch.tensor([35, 1, 36]).expand(2, 3, 3).clone()
    banned = torch.tensor([-1.0, -2.0, -math.inf]).expand(2, 3, 3)  # one by the student alone, one by both
    found = finite_gradients(p, (ids.to(DEVICE), banned.to(DEVICE)), **more)
    forward, reverse = kind == "forward_kl" or (kind, beta) == ("jsd", 0), kind == "reverse_kl" or (kind, beta) == ("jsd", 1)
    assert found.isinf().all() if forward else found.isfinite().all()
    ids[..., 0] = 2
    teachers = torch.tensor([-math.inf, -2.0, -math.inf]).expand(2, 3, 3)
    found = finite_gradients(p, (ids.to(DEVICE), teachers.to(DEVICE)), **more)
    assert found.isinf().all() if reverse else found.isfinite().all()


def test_nan_is_told_where_it_counts():
    p = small()
    ids, logps = drawn(p, 3, nones=False)
    logps[0, 0, 1] = math.nan
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        for tail in (True, False):
            assert results(ours, p, (ids, logps), kind=kind, tail=tail)[0].isnan().nonzero().tolist() == [[0, 0]]
    p.mask[0, 0] = False
    found = finite_gradients(p, (ids, logps))
    assert found.isfinite().all() and found[0, 0] == 0


def test_teachers_of_any_dtype_and_shape():
    p = small()
    ids, logps = drawn(p, 3, nones=False)
    (hidden, weight, *_), _, _ = p.arguments()
    wide = topk_divergence(hidden, weight, ids, logps)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.testing.assert_close(topk_divergence(hidden, weight, ids, logps.to(dtype)), wide, rtol=0.05, atol=0.02)
    with torch.no_grad():
        # a product of fewer rows has other bits on some CPUs
        fewer = topk_divergence(hidden[0], weight, ids[0].int(), logps[0])
        torch.testing.assert_close(fewer, wide.detach()[0], rtol=1e-5, atol=1e-6)
        one = topk_divergence(hidden[0, 0], weight, ids[0, 0], logps[0, 0])
    assert one.shape == () and not one.requires_grad and wide.requires_grad
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(wide.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(kind="kl"), ValueError, "kind must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        (dict(kind=None), TypeError, "kind must be a string, got NoneType"),
        (dict(tail=1), TypeError, "tail must be True or False, got int"),
        (dict(kind="jsd", beta=1.5), ValueError, r"beta must be in \[0, 1\], got 1.5"),
        (dict(kind="jsd", beta=math.nan), ValueError, r"beta must be in \[0, 1\], got nan"),
        (dict(kind="jsd", beta="0.5"), TypeError, r"beta must be a number in \[0, 1\], got str"),
        (dict(ids=lambda x: x.float()), TypeError, r"teacher_ids must be int64 or int32, got torch.float32"),
        (dict(ids=lambda x: x.tolist()), TypeError, r"teacher_ids must be a tensor, got list"),
        (
            dict(ids=lambda x: x[:, :2], logps=lambda x: x[:, :2]),
            ValueError,
            r"teacher_ids must be .* = \[2, 3, K\], got \[2, 2, 3\]",
        ),
        (dict(ids=lambda x: x[0, 0, 0], logps=lambda x: x[0, 0, 0]), ValueError, r"teacher_ids must be \[\.\., K\], got a 0-dim"),
        (
            dict(ids=lambda x: x + 37),
            ValueError,
            r"teacher_ids must be in \[0, V = 37\), or -1 for none, and none twice .* at 6 positions",
        ),
        (
            dict(ids=lambda x: x[..., [0, 1, 0]]),
            ValueError,
            r"teacher_ids must be in .* and none twice in a position.* at 6 positions",
        ),
        (dict(logps=lambda x: x[..., :2]), ValueError, r"teacher_logps must have shape \[2, 3, 3\], got \[2, 3, 2\]"),
        (dict(logps=lambda x: x.long()), TypeError, r"teacher_logps must be float32 or .*, got torch.int64"),
        (
            dict(logps=lambda x: x.requires_grad_()),
            ValueError,
            r"teacher_logps must not require a gradient.*teacher_logps.detach\(\)",
        ),
        (dict(temperature=0.0), ValueError, "temperature must be"),
        (dict(backend="gpu"), ValueError, "backend must be one of"),
    ],
)
def test_what_is_wrong_is_named(changes, error, message):
    p = small()
    (hidden, weight, *_), _, _ = p.arguments()
    ids, logps = drawn(p, 3, nones=False)
    changes = dict(changes)
    ids, logps = changes.pop("ids", lambda x: x)(ids), changes.pop("logps", lambda x: x)(logps)
    with pytest.raises(error, match=message):
        topk_divergence(hidden, weight, ids, logps, **changes)


def test_what_nobody_reads_is_not_refused():
    p = small()
    ids, logps = drawn(p, 3, nones=False)
    (hidden, weight, *_), _, _ = p.arguments()
    with torch.no_grad():
        topk_divergence(hidden, weight, ids, logps.requires_grad_(), kind="reverse_kl", beta="none")
    mask = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    ids[0], logps = 10**6, logps.detach()
    assert not topk_divergence(hidden, weight, ids, logps, mask=mask)[0].any()


def test_compiled_is_refused():
    p = small()
    ids, logps = drawn(p, 3, nones=False)
    (hidden, weight, *_), _, _ = p.arguments()
    with pytest.raises(RuntimeError, match="topk_divergence cannot be used under torch.compile"):
        torch.compile(lambda: topk_divergence(hidden, weight, ids, logps), backend="eager", fullgraph=True)()


def shards_agree(rank, world):
    wrong, group = [], dist.group.WORLD
    for backend in ("torch", "cpu"):
        for kind, tail in (("forward_kl", True), ("reverse_kl", True), ("jsd", False)):
            p = make_problem(B=3, T=5, V=53, bias=True, lora=True, config=TRANSFORMS["scaled"])
            teacher, more = drawn(p, 5), dict(kind=kind, tail=tail, backend=backend)
            q, own = sharded(p, rank, world)
            found = results(ours, q, teacher, vocab_parallel_group=group, **more)
            for name, x, truth in zip(("divergence", *p.leaves), found, results(ours, p, teacher, **more), strict=True):
                truth = truth[own] if name in ("weight", "bias", "lora_b") else truth
                if x.numel() and (x - truth).abs().max() > 1e-10:
                    wrong.append((backend, kind, name, float((x - truth).abs().max())))
    errors = []
    for changes in (dict(kind=("forward_kl", "jsd")[rank]), dict(tail=(True, 1)[rank])):
        try:
            ours(q, teacher, vocab_parallel_group=group, **changes)
        except Exception as error:
            errors.append((type(error).__name__, str(error)))
    return wrong, errors


@on_the_cpu
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_equal_one_process_and_hear_of_a_refusal(tmp_path):
    for rank, (wrong, errors) in enumerate(spawn(tmp_path, 2, shards_agree)):
        assert wrong == [], f"rank {rank}: {wrong[:5]}"
        (kind, said), (other, refused) = errors
        assert kind == "ValueError" and said.startswith("kind must be the same on all ranks of vocab_parallel_group")
        assert other == ("RuntimeError", "TypeError")[rank] and ("rank 1 of vocab" if rank == 0 else "tail must be") in refused
