"""`linear_divergence` and `fused_linear_distillation_loss` against log_softmax of both models' full logits in plain PyTorch."""

import dataclasses
import functools
import gc
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import divergence_backends, gpu_loops
from support.divergence_backends import BACKENDS, each_seed_and_backend, on_the_cpu, slow
from support.operations import operations
from support.problems import DEVICE, with_float32_chunks
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import fused_linear_distillation_loss, linear_divergence, reference
from grpo_kernels.backends import pytorch
from grpo_kernels.backends.comparison import KINDS
from grpo_kernels.engine import chunks, plan, products

pytestmark = pytest.mark.usefixtures("one_thread")
INF, NAN = math.inf, math.nan
LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
FORMS = ("token", "loss")
WORKSPACES = (1, 2000, 12_000, 60_000, 400_000, None)
backend = divergence_backends.backend  # a fixture


each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@dataclasses.dataclass
class Case:
    """One call; tensors are float64 on the CPU, holding numbers that the dtypes can represent."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    g: torch.Tensor  # of the divergence in the per-token form
    dtype: torch.dtype = torch.float64
    teacher_dtype: torch.dtype = torch.float64
    options: dict = dataclasses.field(default_factory=dict)
    bias: torch.Tensor | None = None
    teacher_bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    num_items: object = None
    views: bool = False  # arguments are strided views with NaN between their elements
    scale: float = 1.0  # of the loss

    @property
    def leaves(self):
        return tuple(n for n in LEAVES if getattr(self, n) is not None)

    @property
    def kept(self):
        return torch.ones(self.hidden.shape[:-1], dtype=torch.bool) if self.mask is None else self.mask.bool()

    @property
    def rows(self):
        return int(self.kept.sum())

    def but(self, **changes):
        return dataclasses.replace(self, **changes)

    def arguments(self, needs=LEAVES, dtype=None):
        """(positional, keywords, leaves): fresh tensors; ``dtype`` in place of both models' own."""
        own, of_teacher = (dtype, dtype) if dtype else (self.dtype, self.teacher_dtype)
        vectors = torch.float64 if own == torch.float64 else torch.float32
        leaves = {n: getattr(self, n).to(DEVICE, own, copy=True).requires_grad_(n in needs) for n in self.leaves}
        view = strided if self.views else lambda x: x
        given = {n: view(x) for n, x in leaves.items()}
        teacher = [view(x.to(DEVICE, of_teacher, copy=True)) for x in (self.teacher_hidden, self.teacher_weight)]
        keywords = dict(self.options, bias=given.get("bias"), mask=None if self.mask is None else view(self.mask.to(DEVICE)))
        keywords["lora"] = None if self.lora_a is None else (given["lora_a"], given["lora_b"], 0.7)
        keywords["teacher_bias"] = None if self.teacher_bias is None else self.teacher_bias.to(DEVICE, of_teacher)
        if self.temperature is not None:
            keywords["temperature"] = view(self.temperature.to(DEVICE, vectors))
        return (given["hidden"], given["weight"], *teacher), keywords, leaves

    def loss_arguments(self, vectors):
        weights = None if self.weights is None else self.weights.to(DEVICE, vectors)
        return dict(weights=weights, num_items=self.num_items)


def strided(x):
    """The same numbers in every other place of memory."""
    if not x.dim():
        return x
    other = torch.full_like(x, True if x.dtype == torch.bool else NAN if x.is_floating_point() else 9).detach()
    return torch.stack([x, other], -1)[..., 0]


def vectors_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def fused(c, form, needs=LEAVES, **more):
    """Divergence, entropy, the loss where it is one, and every gradient."""
    positional, keywords, leaves = c.arguments(needs)
    found = {}
    if form == "token":
        out = linear_divergence(*positional, **keywords, **more)
        if out.divergence.requires_grad:
            (out.divergence * c.g.to(out.divergence)).sum().backward()
    else:
        out = fused_linear_distillation_loss(*positional, **keywords, **c.loss_arguments(vectors_of(c.dtype)), **more)
        if out.loss.requires_grad:
            (out.loss * c.scale).backward()
        found["loss"] = out.loss
        assert not out.divergence.requires_grad
    assert not out.entropy.requires_grad
    found |= {"divergence": out.divergence, "entropy": out.entropy}
    return {n: x.detach() for n, x in found.items()} | {f"d{n}": leaves[n].grad for n in c.leaves if n in needs}


def transformed(raw, bias, scale, softcap, temperature, kept):
    z = raw if bias is None else raw + bias.to(raw.dtype)
    z = scale * z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    banned = z == -INF
    z = z.masked_fill(banned, 0.0)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(z.dtype).expand(kept.shape).where(kept, 1.0).unsqueeze(-1)
    return (z / temperature).masked_fill(banned, -1e30)  # exp of it is 0, and 0 times it is


def plain(c, form, needs=LEAVES, dtype=None):
    """What `fused` must find, by autograd of both models' full logits."""
    (hidden, weight, teacher_hidden, teacher_weight), k, leaves = c.but(views=False).arguments(needs, dtype)
    kept = c.kept.to(DEVICE)
    hidden, teacher_hidden = (x.where(kept.unsqueeze(-1), 0.0) for x in (hidden, teacher_hidden))
    raw = hidden @ weight.T
    if k["lora"] is not None:
        a, b, scale = k["lora"]
        raw = raw + scale * (hidden @ a.T) @ b.T
    temperature = k.get("temperature", 1.0)
    z = transformed(raw, k["bias"], k.get("logit_scale", 1.0), k.get("softcap"), temperature, kept)
    y = (teacher_hidden @ teacher_weight.T).to(raw.dtype)  # the logits of both are kept in the student's dtype
    y = transformed(y, k["teacher_bias"], k.get("teacher_logit_scale", 1.0), k.get("teacher_softcap"), temperature, kept)
    lp, lq = z.log_softmax(-1), y.log_softmax(-1)
    kind, beta = k.get("kind", "reverse_kl"), k.get("beta", 0.5)
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    if kind == "jsd":
        lm = torch.logaddexp(lp + math.log(1 - beta), lq + math.log(beta))
        terms = beta * lq.exp() * (lq - lm) + (1 - beta) * lp.exp() * (lp - lm)
    else:
        terms = lp.exp() * (lp - lq) if kind == "reverse_kl" else lq.exp() * (lq - lp)
    divergence, entropy = (x.sum(-1).where(kept, 0.0) for x in (terms, -lp.exp() * lp))
    found = {}
    if form == "loss":
        u = kept.to(divergence.dtype) if c.weights is None else c.weights.to(divergence).where(kept, 0.0)
        items = c.num_items
        if items is None:
            items = u.sum() if u.sum() != 0 else 1.0
        elif isinstance(items, torch.Tensor):
            items = max(float(items), 1.0)
        total = found["loss"] = (u / items * divergence).sum()
        total = total * c.scale
    else:
        total = (divergence * c.g.to(divergence)).sum()
    if total.requires_grad:
        total.backward()
    found |= {"divergence": divergence, "entropy": entropy}
    return {n: x.detach() for n, x in found.items()} | {f"d{n}": leaves[n].grad for n in c.leaves if n in needs}


def draw(seed, dtype=torch.float64, **fixed):
    """Random shapes and options. ``fixed``: any of the choices below, by name."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    choose = lambda name, *options: fixed.get(name, rng.choice(options))  # noqa: E731
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    stored = lambda x, to=dtype: x.to(to).double()  # noqa: E731
    tokens = choose("tokens", (), (1,), (7,), (3, 5), (2, 0), (2, 3, 2), (4, 9))
    V, D, other = choose("V", 1, 2, 17, 64, 65, 101, 150), choose("D", 1, 4, 16), choose("teacher_D", 1, 5, 16, 24)
    teacher_dtype = choose("teacher_dtype", dtype, dtype, torch.float32, torch.bfloat16)
    apart = choose("apart", None, None, 0.3, 1e-3)
    hidden, weight = stored(randn(*tokens, D)), stored(randn(V, D) * 2 / D**0.5)
    if teacher_dtype != dtype:  # numbers whose products are exact in any dtype: such logits are rounded before the student's dtype
        teacher = [(torch.randint(-1, 2, size, generator=g) / 2).double() for size in ((*tokens, other), (V, other))]
    elif apart is not None and other == D:
        teacher = [stored(x + apart * randn(*x.shape), teacher_dtype) for x in (hidden, weight)]
    else:
        teacher = [stored(x, teacher_dtype) for x in (randn(*tokens, other), randn(V, other) * 2 / other**0.5)]
    c = Case(hidden, weight, *teacher, randn(*tokens), dtype, teacher_dtype)
    c.g = (c.g * (torch.rand(tokens, generator=g) < 0.8)).float().double()
    c.options = dict(kind=choose("kind", *KINDS, "jsd"), beta=choose("beta", 0, 0.1, 0.5, 0.9, 1.0))
    banned = choose("banned", 0, 0, min(3, V - 1))
    sign = 1.0 if banned else choose("sign", 1.0, -1.0)  # a bias of -inf times a negative scale would be inf
    c.options |= dict(logit_scale=sign * choose("scale", 1.0, 0.6, 1.7), softcap=choose("softcap", None, None, 3.0, 20.0))
    c.options |= dict(teacher_logit_scale=choose("teacher_scale", 1.0, 0.6, 1.7) * (1 if banned else choose("sign", 1.0, -1.0)),
                      teacher_softcap=choose("teacher_softcap", None, None, 4.0, 30.0))  # fmt: skip
    if (c.options["softcap"] is None) != (c.options["teacher_softcap"] is None):
        banned = 0  # a softcap makes finite what one of the two has as -inf: of that a test of its own
    if choose("has_bias", True, False) or banned:
        c.bias = stored(randn(V))
    if choose("has_teacher_bias", True, False) or banned:
        c.teacher_bias = stored(randn(V), teacher_dtype)
    for bias in (c.bias, c.teacher_bias) if banned else ():
        bias[V - banned :] = -INF
    if choose("lora", False, False, True):
        c.lora_a, c.lora_b = stored(randn(3, D) / D**0.5), stored(randn(V, 3) / 2)
    if choose("masked", False, True, True):
        c.mask = (torch.rand(tokens, generator=g) < choose("share", 0.0, 0.7, 0.7, 0.7)).to(
            rng.choice([torch.bool, torch.int64, torch.float32])
        )
        for x in (c.hidden, c.teacher_hidden):
            x[~c.kept] = NAN
    kind = choose("temperature", "none", "number", "0-dim", "token")
    if kind == "number":
        c.options["temperature"] = rng.choice([0.7, 1.6, 2])
    elif kind != "none":
        c.temperature = (torch.rand(tokens if kind == "token" else (), generator=g, dtype=torch.float64) + 0.6).float().double()
        if kind == "token":
            c.temperature[~c.kept] = -1.0
    if choose("weighted", True, False):
        c.weights = (randn(*tokens) * (torch.rand(tokens, generator=g) < 0.7)).float().double()
        c.weights[~c.kept] = NAN
        if c.weights[c.kept].sum().abs() < 0.3:
            c.weights = c.weights.abs()
    c.num_items = choose("num_items", None, 3.5, 7, torch.tensor(11), torch.tensor(0.25))
    c.views, c.scale = choose("views", False, False, True), choose("loss_scale", 1.0, 0.25, -3.0)
    return c


# choices of `draw` that leave nothing to chance: no options of the call, no transform of the logits
PLAIN = dict(masked=False, temperature="none", lora=False, views=False, weighted=False, num_items=None, beta=0.3)
UNTOUCHED = dict(softcap=None, teacher_softcap=None, sign=1.0, scale=1.0, teacher_scale=1.0)


def random_needs(rng, c):
    found = rng.choice(
        [LEAVES, LEAVES, ("hidden",), ("weight",), ("bias",), ("lora_a", "lora_b"), ("lora_a",), ("lora_b",), LEAVES[1:], ()]
    )
    return tuple(n for n in found if n in c.leaves)


# Random calls


@each_form
@each_seed_and_backend(0, 160, usual=24)
def test_float64_equals_autograd_of_full_logits(seed, form, backend):
    rng, c = random.Random(seed), draw(seed)
    needs, workspace = random_needs(rng, c), rng.choice(WORKSPACES)
    ours, truth = fused(c, form, needs, backend=backend, workspace_bytes=workspace), plain(c, form, needs, torch.float64)
    for name, value in truth.items():
        if value is None and not any(ours[n].any() for n in [name] if ours[n] is not None):
            continue  # no gradient reached it: autograd of nothing kept
        assert ours[name].dtype == torch.float64
        assert_close(f"{needs} {workspace} {name}", ours[name], value, 1e-10)


def test_the_draws_reach_every_option():
    cases = [draw(seed) for seed in range(160)]
    for name in ("bias", "teacher_bias", "lora_a", "mask", "weights", "temperature"):
        assert {getattr(c, name) is None for c in cases} == {False, True}, name
    for name in ("kind", "beta", "softcap", "teacher_softcap", "logit_scale", "teacher_logit_scale"):
        assert len({c.options[name] for c in cases}) >= 3, name
    assert {c.kept.any().item() for c in cases} == {False, True} and {c.views for c in cases} == {False, True}
    assert any(c.hidden.shape[-1] != c.teacher_hidden.shape[-1] for c in cases) and any(c.teacher_dtype != c.dtype for c in cases)
    assert any(
        (c.bias == -INF).any() and (c.teacher_bias == -INF).any()
        for c in cases
        if c.bias is not None and c.teacher_bias is not None
    )
    assert any((c.weights < 0).any() for c in cases if c.weights is not None)
    assert {type(c.num_items) for c in cases} == {type(None), int, float, torch.Tensor}


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@each_seed_and_backend(1000, 25, usual=6)
def test_each_dtype_is_no_worse_than_pytorch(seed, dtype, form, backend):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("it has no float16")
    rng = random.Random(seed)
    c = draw(seed, dtype, tokens=rng.choice([(3, 9), (17,)]), V=rng.choice([17, 65, 150]), D=16)
    workspace = rng.choice(WORKSPACES)
    ours, theirs, truth = (
        fused(c, form, backend=backend, workspace_bytes=workspace),
        plain(c, form),
        plain(c, form, dtype=torch.float64),
    )
    for name, exact in truth.items():
        if exact is None:
            continue
        assert (
            ours[name].dtype
            == theirs[name].dtype
            == (c.dtype if name.startswith("d") and name != "divergence" else torch.float32)
        )
        # a short sum may be rounded exactly by chance
        floor = 1e-5 if dtype == torch.float32 else 4e-3
        assert_no_worse_than_torch(f"{workspace} {c.options} {name}", ours[name], theirs[name], exact, floor=floor)


# Every way through the loops


def cut(rows, kind="reverse_kl", dtype=torch.float64, **more):
    return draw(5, dtype, **PLAIN | dict(tokens=(rows,), V=131, D=8, teacher_D=8, teacher_dtype=dtype, banned=0, kind=kind,
                                         temperature="token", lora=True, has_bias=True) | more)  # fmt: skip


@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.cover("backend")
@each_kind
def test_every_way_through_the_loops(kind, backend, monkeypatch):
    """Stash, recomputing and both; several buffers, several chunks in a buffer, several stripes, several blocks of columns."""
    plans, ways = [], set()

    def recorded(problem):
        plans.append((problem, plan.plan(problem)))
        return plans[-1][1]

    monkeypatch.setattr(chunks, "plan", recorded)
    several = ((30, (1, 3000, 30_000, 60_000, 90_000, None)), (600, (None, 700_000, 1_500_000)))
    for rows, workspaces in ((12, (1, 3000, 12_000, 30_000, None)),) if slow(backend) else several:
        c = cut(rows, kind)
        for form in FORMS:
            truth = plain(c, form, dtype=torch.float64)
            for workspace in workspaces:
                del plans[:]
                assert_all_close(
                    fused(c, form, backend=backend, workspace_bytes=workspace), truth, 1e-10, hint=f"{form} {rows} {workspace}"
                )
                for problem, found in plans:
                    stash, live = found.stash_rows, problem.live
                    if problem.stashes:
                        ways.add("stash" if stash == live else "both" if stash else "recompute")
                        ways |= {"stripes"} if live - stash > found.stripe_rows else set()
                        ways |= {"blocks"} if stash < live and found.recompute_columns < 131 else set()
                        ways |= {"spans"} if live - stash > found.recompute_rows else set()
                    else:
                        ways |= {"buffers"} if live > found.buffer_rows else {"direct"}
                    ways |= {"chunks"} if found.chunk_rows < min(found.buffer_rows, live) else set()
    wanted = {"stash", "recompute", "blocks", "buffers", "direct"} | ({"chunks"} if not slow(backend) else set())
    assert ways >= wanted, wanted - ways
    assert not {"stripes", "spans", "both"} - ways or slow(backend), ways


@pytest.mark.cover("backend", "kind")
@each_form
@each_kind
def test_rows_without_a_gradient_are_only_scored(kind, form, backend):
    """Their divergence and entropy are those of any row; rows that train stand before them in the engine."""
    c = cut(20, kind)
    c.mask = torch.arange(20) % 7 != 3
    c.g[::3], c.weights = 0.0, torch.linspace(-1, 2, 20, dtype=torch.float64).float().double()
    c.weights[1::3] = 0.0
    for workspace in (1, 9000, None):
        assert_all_close(fused(c, form, backend=backend, workspace_bytes=workspace), plain(c, form, dtype=torch.float64), 1e-10)


# Extremes


@pytest.mark.cover("backend", "kind")
@each_form
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def test_equal_heads_are_exactly_0_and_so_is_every_gradient(dtype, kind, form, backend):
    for options in ({}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": -1.3}):
        for workspace in (1, 3000, None):
            c = draw(7, dtype, **PLAIN, tokens=(9,), V=131, D=8, has_bias=True, banned=0, teacher_dtype=dtype)
            c.options = {
                "kind": kind,
                "beta": 0.3,
                **options,
                **{f"teacher_{n}": x for n, x in options.items() if n != "temperature"},
            }
            c = c.but(teacher_hidden=c.hidden, teacher_weight=c.weight, teacher_bias=c.bias, bias=c.bias)
            found = fused(c, form, backend=backend, workspace_bytes=workspace)
            assert found.pop("entropy").min() > 0
            assert not any(x.any() for x in found.values()), {n: x.abs().max().item() for n, x in found.items()}


@pytest.mark.cover("backend", "kind")
@each_kind
@pytest.mark.parametrize("size, digits", [(1e-2, 1e-4), (1e-3, 1e-4), (1e-4, 2e-3)])
def test_near_agreement_keeps_its_digits_in_float32(size, digits, kind, backend):
    """KLs of 1e-4, 1e-6 and 1e-8. The truth has the very float32 logits: what the product rounds is no matter of the divergence.
    In the last case logits of 6 differ by 200 of their roundings."""
    V, rows = 997, 12
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, V, generator=g) * 2
    other = logits + size * torch.randn(rows, V, generator=g)
    c = Case(torch.eye(rows).double(), logits.T.double(), torch.eye(rows).double(), other.T.double(), torch.ones(rows).double(),
             torch.float32, torch.float32, dict(kind=kind, beta=0.4))  # fmt: skip
    truth = plain(c, "token", dtype=torch.float64)
    for workspace in (1, 100_000, None):
        ours = fused(c, "token", backend=backend, workspace_bytes=workspace)
        value, exact = ours["divergence"].cpu().double(), truth["divergence"].cpu()
        assert (exact < 1.2 * size**2).all() and ((value - exact).abs() <= digits * exact).all()
        assert (ours["dweight"].cpu() - truth["dweight"].cpu()).norm() <= 10 * digits * truth["dweight"].cpu().norm()


@pytest.mark.cover("backend")
@each_kind
def test_near_agreement_but_for_the_likeliest_token(kind, backend):
    """Relative to the rows' maxima all other logits are apart by as much: the sums must not be those of cancelling terms."""
    V, rows = 997, 16
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(rows, V, generator=g) / 2
    other = logits + 1e-3 * torch.randn(rows, V, generator=g)
    other[torch.arange(rows), logits.argmax(1)] += 0.03
    c = Case(torch.eye(rows).double(), logits.T.double(), torch.eye(rows).double(), other.T.double(), torch.ones(rows).double(),
             torch.float32, torch.float32, dict(kind=kind, beta=0.4))  # fmt: skip
    exact = plain(c, "token", dtype=torch.float64)["divergence"].cpu()
    assert (exact < 1e-5).all() and (exact > 1e-7).all()
    for workspace in (1, 100_000, None):
        value = fused(c, "token", backend=backend, workspace_bytes=workspace)["divergence"].cpu().double()
        assert ((value - exact).abs() <= 1e-4 * exact).all()


@pytest.mark.cover("backend", "kind")
@each_form
@each_kind
def test_columns_of_minus_infinity(kind, form, backend):
    """Whole blocks that both ban count nothing; one that only one of the two bans is inf, or nothing, as the sums say."""
    V = 400
    c = draw(2, **PLAIN, **UNTOUCHED, tokens=(6,), V=V, D=8, teacher_D=5, banned=3, kind=kind)
    both, of_teacher, of_student = slice(0, 130), slice(200, 203), slice(300, 303)
    for bias in (c.bias, c.teacher_bias):
        bias[:] = torch.randn(V)
        bias[both] = -INF
    for workspace in (1, 20_000, None):
        ours, truth = fused(c, form, backend=backend, workspace_bytes=workspace), plain(c, form, dtype=torch.float64)
        assert_all_close(ours, truth, 1e-10)
        assert not ours["dweight"][both].any() and not ours["dbias"][both].any()
        for column, who, infinite in ((of_teacher, "teacher_bias", "reverse_kl"), (of_student, "bias", "forward_kl")):
            one = c.but(**{who: getattr(c, who).clone()})
            getattr(one, who)[column] = -INF
            if kind == infinite:
                found = fused(one, form, (), backend=backend, workspace_bytes=workspace)
                assert (found["divergence"] == INF).all() and found["entropy"].isfinite().all()
                assert form == "token" or found["loss"] == INF
            else:
                ours, truth = fused(one, form, backend=backend, workspace_bytes=workspace), plain(one, form, dtype=torch.float64)
                assert_all_close(ours, truth, 1e-10, hint=who)


@pytest.mark.cover("backend", "kind")
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_logits_of_ten_thousand(dtype, kind, backend):
    c = draw(11, dtype, **PLAIN, **UNTOUCHED, tokens=(8,), V=300, D=16, teacher_D=16, apart=0.3, banned=0, has_bias=False,
             has_teacher_bias=False, kind=kind, teacher_dtype=dtype)  # fmt: skip
    c.hidden, c.teacher_hidden = c.hidden * 4096, c.teacher_hidden * 4096
    for form in FORMS:
        truth = plain(c, form, dtype=torch.float64)
        assert c.hidden.matmul(c.weight.T).abs().max() > 1e4
        for workspace in (1, 20_000, None):
            ours = fused(c, form, backend=backend, workspace_bytes=workspace)
            # such a logit is known to 1e-3 in float32, to 1e-11 in float64, and hidden is as large: where the student is certain of
            # its token no more is left of a gradient
            single = dtype == torch.float32
            assert_all_close(ours, truth, 2e-3 if single else 1e-9, floor=1e-4 * c.hidden.norm() if single else 5e-6)


@pytest.mark.cover("backend", "kind")
@each_form
@each_kind
def test_both_almost_certain_of_the_same_token(kind, form, backend):
    """p and q within 1e-5 of 1: the tail is all that differs. Gradients to an ulp of p, which is what z - y - gap is known to."""
    g = torch.Generator().manual_seed(1)
    V, D, rows = 97, 8, 12
    weight, other = torch.randn(V, D, generator=g), torch.randn(V, D, generator=g)
    bias, teacher_bias = torch.zeros(V), torch.zeros(V)
    bias[5], teacher_bias[5] = 24.0, 25.0
    hidden, teacher_hidden = (0.5 * torch.randn(rows, D, generator=g) for _ in range(2))
    c = Case(hidden.double(), weight.double(), teacher_hidden.double(), other.double(), torch.ones(rows).double(), torch.float32,
             torch.float32, dict(kind=kind, beta=0.3), bias.double(), teacher_bias.double())  # fmt: skip
    exact = plain(c, form, dtype=torch.float64)
    assert (1 - exact["divergence"].neg().exp()).max() < 1e-5
    single = plain(c, form)
    one = c.g / (rows if form == "loss" else 1)  # the gradient of a row's token alone, were p its factor
    ulp = {"dhidden": one.unsqueeze(1) * c.weight[5], "dbias": one, "dweight": one.unsqueeze(1) * c.hidden}
    for workspace in (1, 9000, None):
        ours = fused(c, form, backend=backend, workspace_bytes=workspace)
        for name, truth in exact.items():
            if name in ulp:
                error, budget = ((x[name].cpu().double() - truth.cpu()).norm() for x in (ours, single))
                # logits that are made twice, in tiles of other heights, may differ by an ulp of z, which is 24 and more
                known = torch.finfo(torch.float32).eps * 26 if (form, workspace) == ("token", 9000) else 2e-7
                assert error <= 2 * budget + known * ulp[name].norm(), name
            else:
                assert_no_worse_than_torch(name, ours[name], single[name], truth, floor=2e-4)
        assert (ours["divergence"] >= 0).all()


@each_form
def test_one_column_and_a_row_alone(form, backend):
    for kind in KINDS:
        for V, tokens in ((1, (5,)), (1, ()), (2, (1,)), (131, (1,)), (131, ())):
            c = draw(3, tokens=tokens, V=V, D=4, teacher_D=6, masked=False, banned=0, kind=kind, beta=0.4, weighted=False)
            for workspace in (1, None):
                ours = fused(c, form, backend=backend, workspace_bytes=workspace)
                assert_all_close(ours, plain(c, form, dtype=torch.float64), 1e-10)
                assert ours["divergence"].shape == tokens
                if V == 1:
                    assert not any(x.any() for x in ours.values())


@pytest.mark.cover("backend", "form")
@each_form
@pytest.mark.parametrize("tokens", [(0,), (3, 0), (0, 4), (3, 4)])
def test_nothing_kept_is_a_differentiable_0(tokens, form, backend):
    c = draw(4, tokens=tokens, V=65, D=4, lora=True, has_bias=True, masked=True, share=0.0, weighted=False, num_items=None)
    c.mask = torch.zeros(tokens)
    for needs in (LEAVES, ("hidden",), ("weight",), ()):
        ours = fused(c, form, needs, backend=backend)
        assert ours["divergence"].shape == ours["entropy"].shape == tokens
        for name, x in ours.items():
            assert x is not None and not x.any(), name
            if name.startswith("d") and name != "divergence":
                assert x.shape == getattr(c, name[1:]).shape


# What is not finite


@pytest.mark.cover("backend", "kind")
@each_form
@each_kind
def test_nan_stays_in_its_row(kind, form, backend):
    clean = cut(12, kind)
    clean.mask = torch.arange(12) != 4
    for name in ("hidden", "teacher_hidden"):
        c = clean.but(**{name: getattr(clean, name).clone()})
        getattr(c, name)[4] = NAN  # masked
        for workspace in (1,) if slow(backend) else (1, None):
            ours, truth = (fused(x, form, backend=backend, workspace_bytes=workspace) for x in (c, clean))
            assert all(torch.equal(ours[n], truth[n]) for n in truth)
        getattr(c, name)[6, 2] = NAN
        for workspace in (1,) if slow(backend) else (1, None):
            ours, truth = (fused(x, form, backend=backend, workspace_bytes=workspace) for x in (c, clean))
            bad = torch.arange(12) == 6
            assert ours["divergence"][bad].isnan().all() and torch.equal(ours["divergence"][~bad], truth["divergence"][~bad])
            assert form == "token" or ours["loss"].isnan()
            assert ours["dweight"].isnan().any()
            if form == "token":
                assert ours["dhidden"][bad].isnan().any() and ours["dhidden"][~bad].isfinite().all()
    for name in ("weight", "teacher_weight"):
        c = clean.but(**{name: getattr(clean, name).clone()})
        getattr(c, name)[70, 1] = NAN
        ours = fused(c, form, backend=backend)
        assert ours["divergence"][c.kept].isnan().all() and not ours["divergence"][4]


@each_kind
def test_a_row_of_weight_0_hides_no_nan_of_its_own_and_spreads_none(kind, backend):
    """Its divergence is NaN to see; loss and gradients have no part of it."""
    c = cut(8, kind)
    c.hidden[3], c.weights = NAN, torch.ones(8, dtype=torch.float64)
    c.weights[3] = 0.0
    found = fused(c, "loss", backend=backend)
    assert found["divergence"][3].isnan() and found["loss"].isfinite()
    assert all(found[n].isfinite().all() for n in found if n not in ("divergence", "entropy"))
    c.g[3] = 0.0
    for workspace in (1, 6000):
        found = fused(c, "token", ("weight", "bias"), backend=backend, workspace_bytes=workspace)
        assert found["dbias"].isfinite().all() and found["dweight"].isfinite().all()


# Determinism, graphs, memory


@pytest.mark.cover("backend", "kind")
@each_form
@each_kind
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_call_twice_gives_the_same_bits(dtype, kind, form, backend):
    c = draw(
        21, dtype, tokens=(3, 9), V=261, D=48, teacher_D=24, lora=True, has_bias=True, banned=0, kind=kind, beta=0.3, masked=True
    )
    for workspace in (40_000,) if slow(backend) else (1, 40_000, None):
        first, again = (fused(c, form, backend=backend, workspace_bytes=workspace) for _ in range(2))
        assert all(torch.equal(x.nan_to_num(7.0), again[n].nan_to_num(7.0)) for n, x in first.items())


@pytest.mark.cover("backend")
@each_form
def test_a_gradient_comes_where_it_is_asked_for_only(form, backend):
    c = cut(11)
    c.lora_a = c.lora_a[:, :8]
    whole = plain(c, form, dtype=torch.float64)
    for needs in (
        ("hidden",),
        ("weight",),
        ("bias",),
        ("lora_a",),
        ("lora_b",),
        ("lora_a", "lora_b"),
        ("hidden", "bias"),
        ("weight", "lora_a"),
    ):
        for workspace in (9000,) if slow(backend) else (1, 9000, None):
            ours = fused(c, form, needs, backend=backend, workspace_bytes=workspace)
            assert_all_close(ours, {n: x for n, x in whole.items() if n in ours}, 1e-10, hint=f"{needs} {workspace}")
            positional, keywords, leaves = c.arguments(needs)
            out = functions[form](c, positional, keywords, backend=backend, workspace_bytes=workspace)
            asked = [leaves[n] for n in needs]
            assert len(torch.autograd.grad(out.sum(), asked)) == len(needs)


def _value(form):
    def call(c, positional, keywords, **more):
        if form == "token":
            return linear_divergence(*positional, **keywords, **more).divergence
        return fused_linear_distillation_loss(*positional, **keywords, **more).loss

    return call


functions = {form: _value(form) for form in FORMS}


@each_form
def test_without_gradients_there_is_no_graph(form, backend):
    c = cut(11)
    trained = fused(c, form, backend=backend)
    positional, keywords, leaves = c.arguments()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = functions[form](c, positional, keywords, backend=backend)
        assert not out.requires_grad and out.grad_fn is None
        assert_close("value", out, trained["loss" if form == "loss" else "divergence"], 1e-12)
    positional, keywords, _ = c.arguments(())
    assert functions[form](c, positional, keywords, backend=backend).grad_fn is None
    # a teacher that is trained elsewhere is a constant here
    positional, keywords, leaves = c.arguments()
    teacher = [x.clone().requires_grad_() for x in positional[2:]]
    bias = torch.zeros(131, dtype=torch.float64, device=DEVICE, requires_grad=True)
    out = functions[form](c, (*positional[:2], *teacher), keywords | {"teacher_bias": bias}, backend=backend)
    out.sum().backward()
    assert all(x.grad is None for x in (*teacher, bias)) and leaves["weight"].grad is not None


@pytest.mark.cover("backend", "needs")
@each_form
@pytest.mark.parametrize("needs", [LEAVES, ("hidden",), ("weight",)], ids=["all", "frozen head", "frozen hidden"])
def test_a_retained_graph_gives_the_same_gradients_again(needs, form, backend):
    c = cut(13, "jsd")
    truth = plain(c.but(g=torch.ones(13, dtype=torch.float64), scale=1.0), form, needs, torch.float64)
    for workspace in (1, 9000, 40_000, None):
        positional, keywords, leaves = c.arguments(needs)
        value = functions[form](c, positional, keywords, backend=backend, workspace_bytes=workspace).sum()
        asked = {n: x for n, x in leaves.items() if x.requires_grad}
        handed_out = [(s, torch.autograd.grad(value * s, list(asked.values()), retain_graph=True)) for s in (0.25, 3.0, 1.0)]
        for scale, gradients in handed_out:
            for name, gradient in zip(asked, gradients, strict=True):
                assert_close(f"{name} times {scale}", gradient, truth[f"d{name}"] * scale, 1e-10)
        for times in (1, 2):
            value.backward(retain_graph=times == 1)
            for name, leaf in asked.items():
                assert_close(f"{name}, {times} times", leaf.grad, truth[f"d{name}"] * times, 1e-10)
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


def test_a_retained_graph_of_other_rows_each_time(backend):
    """Rows without a gradient are dropped from the stash: not from the one that is kept."""
    c = cut(13, "jsd")
    for workspace in (1, 40_000, None):
        positional, keywords, leaves = c.arguments()
        divergence = functions["token"](c, positional, keywords, backend=backend, workspace_bytes=workspace)
        for rows in (slice(4, None), slice(0, 13, 3), slice(0, 5)):
            g = torch.zeros(13, dtype=torch.float64)
            g[rows] = torch.arange(1.0, 14.0, dtype=torch.float64)[rows]
            truth = plain(c.but(g=g), "token", dtype=torch.float64)
            found = torch.autograd.grad(divergence, list(leaves.values()), g.to(DEVICE), retain_graph=True)
            for name, gradient in zip(leaves, found, strict=True):
                assert_close(f"{name} {rows}", gradient, truth[f"d{name}"], 1e-10)


@pytest.mark.cover("backend")
@each_form
@pytest.mark.parametrize("needs", [LEAVES, ("hidden",)], ids=["all", "frozen head"])
def test_a_second_derivative_is_refused(needs, form, backend):
    c = cut(5)
    positional, keywords, leaves = c.arguments(needs)
    value = functions[form](c, positional, keywords, backend=backend).sum()
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(value, leaves["hidden"], create_graph=True)
    assert torch.autograd.grad(value, leaves["hidden"])[0].any()


@each_form
def test_a_weight_changed_before_backward_is_an_error_or_does_not_matter(form, backend):
    c = cut(9)
    truth = plain(c.but(g=torch.ones(9, dtype=torch.float64), scale=1.0), form, dtype=torch.float64)
    for needs, workspace in ((LEAVES, 1), (LEAVES, None), (("hidden",), None)):
        for index in (1, 3):
            positional, keywords, leaves = c.arguments(needs)
            value = functions[form](c, positional, keywords, backend=backend, workspace_bytes=workspace).sum()
            with torch.no_grad():
                positional[index].mul_(1.5)
            try:
                value.backward()
            except RuntimeError as error:
                assert "modified" in str(error)
                continue
            for name in (n for n in needs if n in leaves):
                assert_close(name, leaves[name].grad, truth[f"d{name}"], 1e-10)


@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.cover("backend")
@each_form
@pytest.mark.parametrize("needs", [LEAVES, ("hidden",)], ids=["all", "frozen head"])
def test_nothing_of_the_call_outlives_it(needs, form, backend):
    c = cut(40)
    positional, keywords, leaves = c.arguments(needs)

    def big():
        gc.collect()
        return sum(1 for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() >= 131 * 8)

    before = big()
    out = functions[form](c, positional, keywords, backend=backend)
    out.sum().backward()
    kept = out.detach()
    assert big() <= before + 1 and out.grad_fn is not None  # weight.grad
    del out
    assert big() <= before + 1 and kept.isfinite().all()


@each_form
def test_inputs_are_not_written(form, backend):
    for workspace in (1, 9000, None):
        c = cut(12, "jsd")
        positional, keywords, leaves = c.arguments()
        tensors = [x for x in (*positional, *keywords.values(), *leaves.values()) if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in tensors]
        (functions[form](c, positional, keywords, backend=backend, workspace_bytes=workspace).sum() * 2).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.exhaustive_in_the_interpreter
def test_calls_that_overlap_share_no_memory(backend, monkeypatch):
    """A tile's memory is kept for the next call, never for one that comes while it is still in use."""
    monkeypatch.setattr(products, "_HUGE_PAGE_BYTES", 1)
    cases = [cut(n, kind) for n, kind in ((9, "forward_kl"), (12, "reverse_kl"), (10, "jsd"))]
    for form in FORMS:
        calls = []
        for c in cases:
            positional, keywords, leaves = c.arguments()
            calls.append((functions[form](c, positional, keywords, backend=backend).sum(), leaves))
        for times in (1, 2):
            for i in (1, 0, 2):
                value, leaves = calls[i]
                value.backward(retain_graph=True)
                fused(cases[2 - i], form, backend=backend)
                truth = plain(
                    cases[i].but(g=torch.ones(len(cases[i].g), dtype=torch.float64), scale=1.0), form, dtype=torch.float64
                )
                for name, leaf in leaves.items():
                    assert_close(f"{name} of {i}, {times} times", leaf.grad, truth[f"d{name}"] * times, 1e-10)


# The loss's weights


@pytest.mark.cover("backend", "kind")
@each_kind
@pytest.mark.parametrize(
    "items", [None, 3, 0.5, torch.tensor(9), torch.tensor(0.25), torch.tensor(2.5, dtype=torch.float64)], ids=str
)
def test_weights_and_num_items(items, kind, backend):
    c = cut(14, kind)
    c.mask = torch.arange(14) % 5 != 2
    for weights in (None, torch.linspace(-1, 2, 14), torch.zeros(14), (torch.arange(14) % 2).double(), -torch.ones(14)):
        c.weights, c.num_items = None if weights is None else weights.float().double(), items
        ours, truth = fused(c, "loss", backend=backend), plain(c, "loss", dtype=torch.float64)
        assert_all_close(ours, truth, 1e-10, hint=f"{weights} {items}")
        if weights is not None and not weights.any():
            assert ours["loss"] == 0 and not any(ours[f"d{n}"].any() for n in c.leaves) and ours["divergence"].any()


def test_the_loss_is_the_weighted_sum_of_the_per_token_form(backend):
    c = cut(14, "jsd")
    c.weights, c.num_items = torch.rand(14, dtype=torch.float64), 5
    loss, token = fused(c, "loss", backend=backend), fused(c, "token", backend=backend)
    assert_close("divergence", loss["divergence"], token["divergence"], 1e-14)
    assert_close("loss", loss["loss"], (token["divergence"] * c.weights.to(DEVICE)).sum() / 5, 1e-13)


# Around the functions: autocast, compiled, transformed


@on_the_cpu
@each_form
def test_autocast_casts_once_and_returns_gradients_in_the_parameters_dtype(form, backend):
    c = draw(31, torch.bfloat16, tokens=(23,), V=101, D=16, teacher_D=8, teacher_dtype=torch.bfloat16, lora=True, has_bias=True,
             banned=0, softcap=None, views=False)  # fmt: skip
    exact, theirs = plain(c, form, dtype=torch.float64), plain(c, form)
    single = c.but(dtype=torch.float32, teacher_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused(single, form, backend=backend)
    for name, truth in exact.items():
        assert ours[name].dtype == torch.float32
        assert_no_worse_than_torch(name, ours[name], theirs[name], truth, floor=4e-3)
    positional, keywords, _ = single.arguments()
    mixed = positional[0], positional[1], positional[2].bfloat16(), positional[3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functions[form](c, mixed, keywords, backend=backend).isfinite().all()
    with pytest.raises(TypeError, match="teacher_weight must be torch.bfloat16 as teacher_hidden is"):
        functions[form](c, mixed, keywords, backend=backend)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.cover
@on_the_cpu
@each_form
@pytest.mark.parametrize("needs", [LEAVES, ("hidden",)], ids=["all", "frozen head"])
def test_it_compiles_without_a_graph_break(needs, form, fresh_compiler):
    for workspace in (1, None) if needs == LEAVES else (None,):
        c = cut(9, "jsd" if form == "loss" else "forward_kl", dtype=torch.float64)
        c.mask = torch.arange(9) != 3
        c.hidden[3] = c.teacher_hidden[3] = NAN

        def step(positional, keywords, c=c, workspace=workspace):
            value = functions[form](c, positional, keywords, backend="torch", workspace_bytes=workspace)
            return (value * torch.arange(1.0, 10.0) if form == "token" else value * 3).sum()

        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            positional, keywords, leaves = c.arguments(needs)
            value = function(positional, keywords)
            value.backward()
            results.append({"value": value, **{n: x.grad for n, x in leaves.items()}})
        assert_all_close(*results, 1e-10)


@each_form
@pytest.mark.parametrize(
    "name", ["hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "temperature", "mask"]
)
def test_transforms_of_torch_func_are_refused_in_a_sentence(name, form):
    c = cut(3)
    c.teacher_bias, c.mask = torch.zeros(131, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    positional, keywords, _ = c.arguments(())
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    given = dict(zip(names, positional, strict=True)) | {n: x for n, x in keywords.items() if x is not None}

    def value(x):
        now = given | {name: x}
        return functions[form](c, [now.pop(n) for n in names], now, backend="torch").sum()

    for transform in (lambda: torch.func.grad(value)(given[name]), lambda: torch.func.vmap(value)(given[name].unsqueeze(0)),
                      lambda: torch.func.jvp(value, (given[name],), (given[name],))):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name} must be a plain tensor"):
            transform()


# Errors


def wrong(**changes):
    return changes


F, BF = torch.float32, torch.bfloat16
TOKENS, V, D, OTHER = (4, 3), 11, 5, 7
BAD = [
    (wrong(hidden=None), TypeError, "hidden must be a tensor"),
    (wrong(hidden=torch.tensor(1.0)), ValueError, "hidden must be [..., D], got a 0-dim tensor"),
    (wrong(hidden=torch.ones(4, 3, D, dtype=torch.int64)), TypeError, "hidden must be float32"),
    (wrong(weight=torch.ones(V, D + 1)), ValueError, "weight must be [V, D = 5]"),
    (wrong(weight=torch.ones(V, D, dtype=BF)), TypeError, "weight must be torch.float32 as hidden is"),
    (wrong(weight=torch.ones(0, D), teacher_weight=torch.ones(0, OTHER)), ValueError, "weight must be [V, D = 5]"),
    (wrong(teacher_hidden=None), TypeError, "teacher_hidden must be a tensor, got NoneType"),
    (wrong(teacher_hidden=torch.ones(4, 2, OTHER)), ValueError, "teacher_hidden must be [.., D'] = [4, 3, D'], got [4, 2, 7]"),
    (wrong(teacher_hidden=torch.ones(12, OTHER)), ValueError, "teacher_hidden must be [.., D']"),
    (wrong(teacher_hidden=torch.tensor(1.0)), ValueError, "teacher_hidden must be [.., D']"),
    (wrong(teacher_hidden=torch.ones(*TOKENS, 0), teacher_weight=torch.ones(V, 0)), ValueError, "teacher_hidden must be"),
    (wrong(teacher_hidden=torch.ones(*TOKENS, OTHER, dtype=torch.int32)), TypeError, "teacher_hidden must be float32"),
    (wrong(teacher_weight=None), TypeError, "teacher_weight must be a tensor"),
    (wrong(teacher_weight=torch.ones(V + 1, OTHER)), ValueError,
     "teacher_weight must be [V, D'] = [11, 7], got [12, 7]"),
    (wrong(teacher_weight=torch.ones(V, D)), ValueError, "teacher_weight must be [V, D'] = [11, 7]"),
    (wrong(teacher_weight=torch.ones(V * OTHER)), ValueError, "teacher_weight must be [V, D']"),
    (wrong(teacher_weight=torch.ones(V, OTHER, dtype=BF)), TypeError, "teacher_weight must be torch.float32 as teacher_hidden is"),
    (wrong(teacher_weight=torch.ones(V, OTHER, device="meta")), ValueError, "teacher_weight must be on cpu as hidden is, got meta"),
    (wrong(bias=torch.ones(V + 1)), ValueError, "bias must have shape [11]"),
    (wrong(teacher_bias=torch.ones(V, 1)), ValueError, "teacher_bias must have shape [11]"),
    (wrong(teacher_bias=torch.ones(V, dtype=torch.int64)), TypeError, "teacher_bias must be float32"),
    (wrong(mask=torch.ones(4)), ValueError, "mask must have shape [4, 3]"),
    (wrong(mask=torch.full(TOKENS, 2.0)), ValueError, "mask must hold only 0 and 1, got other values at 12 positions"),
    (wrong(mask=[1]), TypeError, "mask must be a bool or 0/1 tensor"),
    (wrong(kind="kl"), ValueError, "kind must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
    (wrong(kind=1), TypeError, "kind must be a string, got int"),
    (wrong(beta=-0.1, kind="jsd"), ValueError, "beta must be in [0, 1], got -0.1"),
    (wrong(beta=1.5, kind="jsd"), ValueError, "beta must be in [0, 1], got 1.5"),
    (wrong(beta=NAN, kind="jsd"), ValueError, "beta must be in [0, 1], got nan"),
    (wrong(beta=True, kind="jsd"), TypeError, "beta must be a number in [0, 1], got bool"),
    (wrong(beta=torch.tensor(0.5), kind="jsd"), TypeError, "beta must be a number"),
    (wrong(temperature=0.0), ValueError, "temperature must be > 0, got 0.0"),
    (wrong(temperature=-1), ValueError, "temperature must be > 0, got -1"),
    (wrong(temperature="hot"), ValueError, "temperature must be a finite number > 0, got 'hot'"),
    (wrong(temperature=torch.ones(4)), ValueError, "temperature must have shape [4, 3] or []"),
    (wrong(temperature=torch.zeros(TOKENS)), ValueError,
     "temperature must be > 0 and finite where the mask is 1, got others at 12 positions"),
    (wrong(temperature=torch.ones(TOKENS, dtype=torch.int64)), TypeError, "temperature must be float32"),
    (wrong(temperature=torch.ones(TOKENS, requires_grad=True)), ValueError,
     "temperature must not require a gradient, a divergence has none for it; pass temperature.detach()"),
    (wrong(logit_scale=0), ValueError, "logit_scale must be a finite number other than 0, got 0"),
    (wrong(softcap=-2.0), ValueError, "softcap must be > 0 or None, got -2.0"),
    (wrong(teacher_logit_scale=INF), ValueError, "teacher_logit_scale must be a finite number other than 0, got inf"),
    (wrong(teacher_softcap=0.0), ValueError, "teacher_softcap must be > 0 or None, got 0.0"),
    (wrong(lora=torch.ones(3)), TypeError, "lora must be a tuple"),
    (wrong(lora=(torch.ones(2, D + 1), torch.ones(V, 2), 1.0)), ValueError, "lora A must be [r, D = 5]"),
    (wrong(lora=(torch.ones(2, D), torch.ones(V, 3), 1.0)), ValueError, "lora B must have shape [11, 2]"),
    (wrong(workspace_bytes=0), ValueError, "workspace_bytes must be > 0"),
    (wrong(workspace_bytes=1e6), TypeError, "workspace_bytes must be an integer"),
    (wrong(backend="fast"), ValueError, "backend must be one of"),
    (wrong(vocab_parallel_group=3), TypeError, "vocab_parallel_group must be a torch.distributed group"),
]  # fmt: skip
BAD_LOSS = [
    (wrong(weights=torch.ones(4)), ValueError, "weights must have shape [4, 3], got [4]"),
    (wrong(weights=torch.ones(TOKENS, dtype=torch.int64)), TypeError, "weights must be float32"),
    (wrong(weights=2.0), TypeError, "weights must be a tensor, got float"),
    (
        wrong(weights=torch.ones(TOKENS, requires_grad=True)),
        ValueError,
        "weights must not require a gradient, there is none for it; pass weights.detach()",
    ),
    (wrong(num_items=0), ValueError, "num_items must be > 0 and finite, got 0"),
    (wrong(num_items=-2.0), ValueError, "num_items must be > 0 and finite, got -2.0"),
    (wrong(num_items=NAN), ValueError, "num_items must be > 0 and finite, got nan"),
    (wrong(num_items=INF), ValueError, "num_items must be > 0 and finite, got inf"),
    (wrong(num_items=torch.ones(2)), ValueError, "num_items must be a number or a 0-dim tensor, got shape [2]"),
    (wrong(num_items=torch.tensor(True)), TypeError, "num_items must be a real number"),
    (wrong(num_items="3"), TypeError, "num_items must be a number > 0"),
    (wrong(num_items=True), TypeError, "num_items must be a number > 0"),
]


def erring(form, changes):
    good = dict(hidden=torch.ones(*TOKENS, D), weight=torch.ones(V, D), teacher_hidden=torch.ones(*TOKENS, OTHER),
                teacher_weight=torch.ones(V, OTHER), backend="torch")  # fmt: skip
    given = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not x.requires_grad else x
             for n, x in {**good, **changes}.items()}  # fmt: skip
    head = [given.pop(n) for n in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
    return (linear_divergence if form == "token" else fused_linear_distillation_loss)(*head, **given)


@on_the_cpu
@pytest.mark.parametrize(
    "form, changes, error, said", [(form, *case) for form in FORMS for case in BAD] + [("loss", *case) for case in BAD_LOSS]
)
def test_what_is_wrong_is_named(form, changes, error, said):
    with pytest.raises(error, match="^" + re.escape(said)):
        erring(form, changes)
    erring(form, {})


@on_the_cpu
def test_what_is_harmless_is_no_error():
    with torch.no_grad():  # where nothing could be lost
        erring("token", wrong(temperature=torch.ones(TOKENS, requires_grad=True)))
        erring("loss", wrong(weights=torch.ones(TOKENS, requires_grad=True)))
    erring("token", wrong(temperature=torch.ones((), requires_grad=False), beta=0, kind="jsd"))
    erring("loss", wrong(num_items=torch.tensor(3), weights=torch.ones(TOKENS, dtype=torch.float16)))
    erring("token", wrong(mask=torch.zeros(TOKENS), temperature=torch.full(TOKENS, NAN)))
    erring("token", wrong(teacher_hidden=torch.ones(*TOKENS, OTHER, dtype=BF), teacher_weight=torch.ones(V, OTHER, dtype=BF)))


def test_an_end_of_jsd_is_a_kl(backend):
    """As in TRL: beta 0 is the forward KL, beta 1 the reverse one, to the bit."""
    for form in FORMS:
        for beta, kind in ((0, "forward_kl"), (0.0, "forward_kl"), (1, "reverse_kl")):
            one, other = (fused(cut(7, k).but(options=dict(cut(7).options, kind=k, beta=b)), form, backend=backend)
                          for k, b in (("jsd", beta), (kind, 0.3)))  # fmt: skip
            assert all(torch.equal(x, other[n]) for n, x in one.items())


@each_seed(0, 30, usual=10)
def test_the_reference_of_logits_agrees(seed):
    """Inside of (0, 1): what the ends of jsd mean is a matter of the functions."""
    c = draw(seed, **PLAIN, **UNTOUCHED)
    given = (c.hidden, c.weight, c.bias), (c.teacher_hidden, c.teacher_weight, c.teacher_bias)
    z, y = (h @ w.T + (0.0 if bias is None else bias) for h, w, bias in given)
    found = reference.divergence_from_logits(z, y, c.options["kind"], 0.3)
    assert_close("divergence", found, plain(c, "token", (), torch.float64)["divergence"].cpu(), 1e-10)


# What runs: products, memory, the plan's steps


P, Q, W = 13, 17, 211  # D, D' and V, primes


def counted(form, needs, kind, backend, workspace=None, grad=True, dtype=torch.float32, weights=None, **more):
    c = draw(8, dtype, **PLAIN | dict(masked=True, share=0.7), tokens=(2, 7), V=W, D=P, teacher_D=Q, teacher_dtype=dtype,
             has_bias=True, banned=0, kind=kind)  # fmt: skip
    c.weights = weights
    positional, keywords, _ = c.arguments(needs)
    keywords |= {} if weights is None else {"weights": weights}

    def call():
        with torch.set_grad_enabled(grad):
            value = functions[form](c, positional, keywords, backend=backend, workspace_bytes=workspace, **more).sum()
            if value.requires_grad:
                value.backward()

    return c, operations(call)


def of(student, teacher):
    """Operations a row of so many NVD of the student and NVD' of the teacher."""
    return W * (student * P + teacher * Q)


@pytest.mark.exhaustive(reason="ten seconds: counts the products of nineteen calls")
@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.cover("backend")
@on_the_cpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind, dtype", [("reverse_kl", torch.bfloat16), ("jsd", torch.float32)])
def test_products(dtype, kind, backend):
    """6NVD + 2NVD' in one pass and within the stash, 4NVD + 2NVD' of a frozen head, 8NVD + 4NVD' beyond the stash."""
    both, no_hidden = ("hidden", "weight"), ("weight",)
    cases = [
        ("loss", both, (1, None), (6, 2)), ("token", both, (None,), (6, 2)), ("token", both, (1,), (8, 4)),
        ("loss", ("hidden",), (1, None), (4, 2)), ("token", ("hidden",), (1, None), (4, 2)),
        ("loss", no_hidden, (1, None), (4, 2)), ("token", no_hidden, (None,), (4, 2)), ("token", no_hidden, (1,), (6, 4)),
        ("loss", ("bias",), (1, None), (2, 2)), ("token", (), (1, None), (2, 2)), ("loss", (), (1, None), (2, 2)),
    ]  # fmt: skip
    for form, needs, workspaces, wanted in cases[:: 3 if slow(backend) else 1]:
        for workspace in workspaces:
            c, found = counted(form, needs, kind, backend, workspace, dtype=dtype)
            assert found == c.rows * of(*wanted), (form, needs, workspace, found / c.rows / W)
    for form in FORMS:
        c, found = counted(form, both, kind, backend, grad=False, dtype=dtype)
        assert found == c.rows * of(2, 2)


@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.unpoisoned
@on_the_cpu
def test_products_of_a_part_of_the_stash(backend):
    """Between the two budgets the count falls from 8 + 4 to 6 + 2, and is that of whole rows."""
    shares = []
    for workspace in (1, 10_000, 16_000, 24_000, 32_000, None):
        c, found = counted("token", ("hidden", "weight"), "jsd", backend, workspace)
        extra = found - c.rows * of(6, 2)
        assert extra % of(2, 2) == 0
        shares.append(extra // of(2, 2))
    assert shares == sorted(shares, reverse=True) and shares[0] == c.rows and shares[-1] == 0
    assert any(0 < x < c.rows for x in shares)


@pytest.mark.exhaustive_in_the_interpreter
@pytest.mark.unpoisoned
@on_the_cpu
@each_kind
def test_products_of_rows_that_train_nothing(kind, backend):
    weights = torch.ones(2, 7)
    weights[0, 3:] = 0.0
    c, found = counted("loss", ("hidden", "weight"), kind, backend, weights=weights)
    live = int((c.kept & (weights != 0)).sum())
    assert 0 < live < c.rows and found == live * of(6, 2) + (c.rows - live) * of(2, 2)
    positional, keywords, _ = c.but(weights=None).arguments(("hidden", "weight"))

    def call():
        out = linear_divergence(*positional, **keywords, backend=backend, workspace_bytes=1)
        (out.divergence * weights).sum().backward()

    assert operations(call) == c.rows * of(2, 2) + live * of(6, 2)


@on_the_cpu
def test_a_teacher_of_another_dtype_costs_the_same_products(backend):
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        c = draw(
            8, dtype, tokens=(9,), V=W, D=P, teacher_D=Q, teacher_dtype=other, masked=False, lora=False, views=False, weighted=False
        )
        positional, keywords, _ = c.arguments(("hidden", "weight"))
        total = operations(
            lambda p=positional, k=keywords: fused_linear_distillation_loss(*p, **k, backend=backend).loss.backward()
        )
        assert total == 9 * of(6, 2)


MIB = 2**20
MEMORY_SCRIPT = """
import json, sys
import torch
from grpo_kernels import fused_linear_distillation_loss, linear_divergence
from grpo_kernels.backends import pytorch

torch.set_num_threads(1)
pytorch._SLAB_ELEMENTS = 1 << 17  # whose float32 temporaries are no part of the workspace
V, D, other, budget, backend, cases = json.loads(sys.argv[1])

def call(n, v, form, dtype, teacher_dtype, needs, kind):
    dtype, teacher_dtype = getattr(torch, dtype), getattr(torch, teacher_dtype)
    hidden = torch.randn(n, D).to(dtype).requires_grad_("hidden" in needs)
    weight = (torch.randn(v, D) / D**0.5).to(dtype).requires_grad_("weight" in needs)
    teacher = torch.randn(n, other).to(teacher_dtype), (torch.randn(v, other) / other**0.5).to(teacher_dtype)
    def peak(line):
        return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(line))
    open("/proc/self/clear_refs", "w").write("5")
    before = peak("VmRSS")
    more = dict(kind=kind, workspace_bytes=budget, backend=backend)
    if form == "loss":
        loss = fused_linear_distillation_loss(hidden, weight, *teacher, **more).loss
    else:
        loss = linear_divergence(hidden, weight, *teacher, **more).divergence.sum()
    if loss.requires_grad:
        loss.backward()
    assert loss.isfinite()
    return peak("VmHWM") - before

for n, *case in cases:
    call(64, 256, *case)  # libraries, threads, compiled kernels
    print(call(n, V, *case))
"""
BIG_V, BIG_D, BIG_OTHER, BUDGET, SLACK = 3072, 64, 48, 6 * MIB, 12 * MIB
BOTH = ["hidden", "weight"]
MEMORY = {
    "loss, float32 teacher": ("loss", "bfloat16", "float32", BOTH, "jsd"),
    "per token": ("token", "bfloat16", "bfloat16", BOTH, "forward_kl"),
    "per token, float32, jsd": ("token", "float32", "float32", BOTH, "jsd"),
    "frozen head": ("token", "bfloat16", "bfloat16", ["hidden"], "reverse_kl"),
    "no gradient, jsd": ("token", "bfloat16", "bfloat16", [], "jsd"),
}
COUNTS = (256, 1792)
MEASURED = "cpu" if "cpu" in BACKENDS else "torch"


@pytest.fixture(scope="module")
def peaks():
    keys = [(name, tokens) for name in MEMORY for tokens in COUNTS]
    arguments = json.dumps([BIG_V, BIG_D, BIG_OTHER, BUDGET, MEASURED, [[tokens, *MEMORY[name]] for name, tokens in keys]])
    # freed memory goes back at once, so that the peak is what was held and not what malloc kept; but for the slabs' 512 KiB, whose
    # page faults would take minutes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "8388608", "MALLOC_ARENA_MAX": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    out = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, arguments], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return dict(zip(keys, map(int, out.stdout.split()), strict=True))


@on_the_cpu
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak mark cannot be reset here")
@pytest.mark.parametrize("case", MEMORY)
def test_the_peak_is_the_documented_one_and_does_not_grow_with_tokens(case, peaks):
    form, dtype, other, needs, kind = MEMORY[case]
    e, two_phases = getattr(torch, dtype).itemsize, form == "token"
    for tokens in COUNTS:
        rows = (tokens, 0) if needs else (0, tokens)
        teacher = dict(teacher_depth=BIG_OTHER, teacher_size=getattr(torch, other).itemsize, mixes=kind == "jsd")
        problem = plan.Problem(*rows, BIG_V, BIG_D, e, e, "hidden" in needs, "weight" in needs, BUDGET, two_phases, **teacher)
        allowed = plan.peak_bytes(problem, tokens)
        assert peaks[case, tokens] <= allowed + SLACK, (
            f"{tokens} tokens: {peaks[case, tokens] / MIB:.1f} MiB, documented {allowed / MIB:.1f}"
        )
    few, many = COUNTS
    growth = (many - few) * BIG_D * e * ("hidden" in needs) * (1 + (two_phases and needs == ["hidden"]))
    assert 2 * (many - few) * BIG_V * e > SLACK  # by which the logits of both would grow
    assert peaks[case, many] - peaks[case, few] <= growth + SLACK / 2


class Recorder(gpu_loops.Recorder):
    """Products, and row kernels over two tiles, of a call."""

    def __init__(self, monkeypatch):
        self.products, self.kernels = Counter(), Counter()
        self.of_engine = products.multiply
        for module in (chunks, products):
            monkeypatch.setattr(module, "multiply", self.multiply)
        for name in ("divergence_statistics", "jensen_shannon", "divergence_gradient"):
            monkeypatch.setattr(pytorch, name, self.kernel(name, getattr(pytorch, name)))

    def kernel(self, name, function):
        @functools.wraps(function)
        def call(tile, teacher, out, *more, **options):
            written = out.numel() * out.element_size() if name == "divergence_gradient" else 0
            read = sum(x.values.numel() * x.values.element_size() for x in (tile, teacher))
            self.kernels[(name, read, written)] += 1
            return function(tile, teacher, out, *more, **options)

        return call


def planned(problem):
    """The same two counts of a plan's steps; one launch of `divergence` is three kernels in plain PyTorch."""
    wanted, kernels = Counter(), Counter()
    for step in plan.steps(problem, plan.plan(problem)):
        read, tiles = step.read + step.cached, 2 * step.m * step.n * problem.tile_size
        if step.k:
            out = step.written + step.cached
            size = out // (step.m * step.n)
            operands = (
                (step.m + step.n) * step.k * (problem.teacher_size if step.what == "teacher logits" else problem.element_size)
            )
            assert out % (step.m * step.n) == 0 and step.read - operands in (0, out), step
            wanted[(step.m, step.n, step.k, size, step.read > operands)] += step.count
        elif step.what in ("divergence", "statistics", "gradient"):
            walks = {"divergence": 2 + problem.mixes, "statistics": 1 + problem.mixes, "gradient": 1}[step.what]
            assert read == walks * tiles and step.written == (step.what != "statistics") * step.m * step.n * problem.element_size, (
                step
            )
            if step.what != "gradient":
                kernels[("divergence_statistics", tiles, 0)] += step.count
                if problem.mixes:
                    kernels[("jensen_shannon", tiles, 0)] += step.count
            if step.what != "statistics":
                kernels[("divergence_gradient", tiles, step.written)] += step.count
    return wanted, kernels


@pytest.mark.cover("needs", "workspace")
@on_the_cpu
@each_form
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("workspace", [1, 100_000, 200_000, 400_000, None])
@pytest.mark.parametrize(
    "needs", [("hidden", "weight"), ("hidden",), ("weight",), ()], ids=["all", "frozen head", "frozen hidden", "none"]
)
def test_the_steps_of_a_plan_are_what_runs(needs, workspace, kind, form, monkeypatch):
    seen = []

    def recorded(problem):
        seen.append(problem)
        return plan.plan(problem)

    with_float32_chunks(monkeypatch, gpu_loops.GPU)
    monkeypatch.setattr(chunks, "plan", recorded)
    c = draw(9, torch.bfloat16, **PLAIN, tokens=(67,), V=509, D=40, teacher_D=24, teacher_dtype=torch.bfloat16, has_bias=True,
             banned=0, kind=kind)  # fmt: skip
    recorder = Recorder(monkeypatch)
    positional, keywords, _ = c.arguments(needs)
    value = functions[form](c, positional, keywords, backend="torch", workspace_bytes=workspace).sum()
    if needs:
        value.backward()
    problem = seen[0]
    assert (problem.live, problem.dead) == ((67, 0) if needs else (0, 67)) and problem.teacher_depth == 24
    wanted, kernels = planned(problem)
    assert recorder.products == wanted
    assert recorder.kernels == kernels
