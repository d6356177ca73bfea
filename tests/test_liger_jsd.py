"""`integrations.liger.LigerFusedLinearJSDLoss` against the class it stands in for, both against full logits in float64."""

import functools
import inspect
import itertools
import math
import random
import re

import pytest
import torch
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels.integrations.liger import LigerFusedLinearJSDLoss

peer = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
Theirs = functools.partial(peer.LigerFusedLinearJSDLoss, compiled=False)

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, E, V, DRAWS = 24, 16, 11, 131, 40
LEAVES = ("student_input", "student_weight", "student_bias")
GRID = dict(
    weight_hard_loss=[0.5, 0.0, 0.3, 1.0], weight_soft_loss=[0.5, 0.7, 1.0, 0.0], ignore_index=[-100, 3],
    temperature=[1.0, 1.0, 2.0, 0.7], chunk_size=[5, 1024], return_soft_hard_loss=[False, True],
    bias=[(), ("student_bias",), ("teacher_bias",), ("student_bias", "teacher_bias")], missing=[0, 0, 0, 7],
    frozen=[(), (), ("student_weight",), ("student_input", "student_bias")], scale=[1.0, -0.5], ignored=[0.0, 0.3, 0.3, 1.0],
    sequences=[False, True],
)  # fmt: skip
OPTIONS = inspect.signature(LigerFusedLinearJSDLoss).parameters.keys()


@functools.cache
def draws(beta):
    """DRAWS settings in which every value of every option comes up equally often."""
    rng = random.Random(f"{beta}")
    decks = {name: (values * DRAWS)[:DRAWS] for name, values in GRID.items()}
    for deck in decks.values():
        rng.shuffle(deck)
    return [dict(zip(decks, hand, strict=True)) for hand in zip(*decks.values(), strict=True)]


class Call:
    """One call by liger's names; every tenth teacher is the student itself."""

    def __init__(self, seed, beta, **setting):
        s = {**draws(beta)[seed % DRAWS], **setting}
        self.options = {name: value for name, value in s.items() if name in OPTIONS} | {"beta": beta}
        self.frozen, self.scale = s["frozen"], s["scale"]
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, std=1.0):
            return torch.randn(*shape, generator=g) * std

        labels = torch.randint(0, V, (N,), generator=g)
        labels[torch.rand(N, generator=g) < s["ignored"]] = s["ignore_index"]
        self.tensors = t = dict(
            student_input=normal(N, D), student_weight=normal(V, D, std=2 * D**-0.5), teacher_input=normal(N, E),
            teacher_weight=normal(V + s["missing"], E, std=2 * E**-0.5), true_labels=labels,
            student_bias=normal(V) if "student_bias" in s["bias"] else None,
            teacher_bias=normal(V + s["missing"]) if "teacher_bias" in s["bias"] else None,
        )  # fmt: skip
        t["student_input"][0] = 14 * t["student_weight"][labels[0]] / t["student_weight"][labels[0]].norm()  # p close to 1
        if seed % 10 == 0 and not s["missing"]:
            t |= {f"teacher_{name}": t[f"student_{name}"] for name in ("input", "weight", "bias")}
        if s["sequences"]:
            for name in ("student_input", "teacher_input", "true_labels"):
                t[name] = t[name].unflatten(0, (4, N // 4))

    def run(self, which, **changes):
        """{"loss", "soft", "hard", "gradient of student_input", ...} of a class called with these options and tensors."""
        tensors = {**self.tensors, **changes}
        needs = [n for n in LEAVES if tensors[n] is not None and n not in self.frozen]
        for name in needs:
            tensors[name] = tensors[name].clone().requires_grad_()
        out = which(**self.options)(**tensors)
        terms = out if isinstance(out, tuple) else (out,)
        assert isinstance(out, tuple) == self.options["return_soft_hard_loss"] and all(x.shape == () for x in terms)
        (terms[0] * self.scale).backward()
        named = dict(zip(("loss", "soft", "hard"), (x.detach() for x in terms), strict=False))
        return named | {f"gradient of {n}": tensors[n].grad for n in needs}

    def exact(self):
        """The definition over full logits, in float64, by autograd."""
        o, t = self.options, {n: x.double() if x is not None and x.is_floating_point() else x for n, x in self.tensors.items()}
        leaves = {n: t[n].clone().requires_grad_() for n in LEAVES if t[n] is not None and n not in self.frozen}
        t |= leaves
        z, y = (t[f"{side}_input"] @ t[f"{side}_weight"].T + (0.0 if t[f"{side}_bias"] is None else t[f"{side}_bias"])
                for side in ("student", "teacher"))  # fmt: skip
        kept = t["true_labels"] != o["ignore_index"]
        count = kept.sum().clamp(min=1)
        hard = -z.log_softmax(-1).gather(-1, t["true_labels"].where(kept, 0).unsqueeze(-1)).squeeze(-1)
        z = torch.nn.functional.pad(z, (0, y.shape[-1] - z.shape[-1]))
        lp, lq = ((x / o["temperature"]).log_softmax(-1) for x in (z, y))
        p, q, beta = lp.exp(), lq.exp(), o["beta"]
        if beta in (0, 1):
            soft = ((q * (lq - lp)) if beta == 0 else (p * (lp - lq))).sum(-1)
        else:
            lm = torch.log((1 - beta) * p + beta * q)
            soft = (beta * q * (lq - lm) + (1 - beta) * p * (lp - lm)).sum(-1)
        soft, hard = ((x * kept).sum() / count for x in (soft, hard))
        loss = o["weight_hard_loss"] * hard + o["weight_soft_loss"] * soft
        (loss * self.scale).backward()
        named = dict(loss=loss.detach(), soft=soft.detach(), hard=hard.detach())
        named = named if o["return_soft_hard_loss"] else {"loss": named["loss"]}
        return named | {f"gradient of {n}": x.grad for n, x in leaves.items()}


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@each_seed(0, DRAWS, usual=8)
def test_equals_liger(seed, beta):
    """Rule 10: at most twice liger's own error, and never far from liger."""
    call = Call(seed, beta)
    ours, theirs, exact = call.run(LigerFusedLinearJSDLoss), call.run(Theirs), call.exact()
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        hint = f"{call.options} {name}"
        # where p is close to 1 exp(z - lse) is off by eps lse, which is more than the gradient of that row
        floor = 5e-5 if truth.norm() > 1e-3 else 1e-3
        assert_no_worse_than_torch(hint, ours[name], theirs[name], truth, floor=floor)
        assert_close(hint, ours[name], theirs[name], 2e-3, floor=1e-6)


def test_the_draws_reach_every_path():
    """One pass and two, all and no tokens ignored, a term that weighs nothing, the student's columns too few."""
    options = [(d["temperature"] == 1 and not d["missing"], d["weight_hard_loss"] != 0, d["return_soft_hard_loss"])
               for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for d in draws(beta)]  # fmt: skip
    assert set(options) == set(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("setting", [dict(temperature=1.0, missing=0), dict(temperature=0.8, missing=7)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_float64(beta, setting):
    call = Call(1, beta, weight_hard_loss=0.4, weight_soft_loss=0.6, return_soft_hard_loss=True, frozen=(), ignored=0.3, **setting)
    doubles = {n: x.double() for n, x in call.tensors.items() if x is not None and x.is_floating_point()}
    ours = call.run(LigerFusedLinearJSDLoss, **doubles)
    assert all(x.dtype == torch.float64 for x in ours.values())
    assert_all_close(ours, call.exact(), 1e-10)


@pytest.mark.cover
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("student, heads", list(itertools.product([torch.bfloat16, torch.float32], repeat=2)))
def test_dtypes_that_differ(student, heads, temperature):
    """Of student, teacher and heads, which liger's products refuse."""
    call = Call(2, 0.4, weight_hard_loss=0.4, temperature=temperature, return_soft_hard_loss=True, frozen=(), ignored=0.3, missing=0,
                bias=("student_bias",))  # fmt: skip
    stored = {n: x.to(torch.bfloat16) for n, x in call.tensors.items() if x is not None and x.is_floating_point()}
    call.tensors |= {n: x.float() for n, x in stored.items()}
    exact, theirs = call.exact(), call.run(Theirs, **stored)
    dtypes = dict(student_input=student, teacher_input=torch.float32, student_weight=heads, teacher_weight=heads, student_bias=heads)
    ours = call.run(LigerFusedLinearJSDLoss, **{n: call.tensors[n].to(dtype) for n, dtype in dtypes.items()},
                    true_labels=call.tensors["true_labels"].int())  # fmt: skip
    for name, truth in exact.items():
        leaf = name.removeprefix("gradient of ")
        assert ours[name].dtype == dtypes.get(leaf, torch.float32)
        assert_no_worse_than_torch(f"{student} {heads} {name}", ours[name], theirs[name], truth, floor=4e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_stands_beside_an_ignored_label_does_not_matter(temperature):
    call = Call(3, 0.5, temperature=temperature, missing=0, weight_hard_loss=0.5, weight_soft_loss=0.5, ignored=0.3, sequences=False)
    ignored = call.tensors["true_labels"] == call.options["ignore_index"]
    garbage = {n: call.tensors[n].masked_fill(ignored.unsqueeze(1), math.nan) for n in ("student_input", "teacher_input")}
    clean, ours = call.run(LigerFusedLinearJSDLoss), call.run(LigerFusedLinearJSDLoss, **garbage)
    assert ignored.any() and all(torch.equal(ours[n], clean[n]) for n in clean)
    assert "gradient of student_input" not in clean or not clean["gradient of student_input"][ignored].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_columns_that_both_heads_ban(temperature):
    """In liger -inf less -inf is NaN."""
    whole = Call(4, 0.5, temperature=temperature, missing=0, weight_hard_loss=0.5, frozen=(), ignored=0.3,
                 bias=("student_bias", "teacher_bias"))  # fmt: skip
    banned = V - 9
    whole.tensors["true_labels"] = whole.tensors["true_labels"].clamp(max=banned - 1)
    for side in ("student", "teacher"):
        whole.tensors[f"{side}_bias"][banned:] = -math.inf
    ours = whole.run(LigerFusedLinearJSDLoss)
    assert whole.run(Theirs)["loss"].isnan()
    for side, name in itertools.product(("student", "teacher"), ("weight", "bias")):
        whole.tensors[f"{side}_{name}"] = whole.tensors[f"{side}_{name}"][:banned]
    exact = whole.exact()
    for name, x in ours.items():
        if name in ("gradient of student_weight", "gradient of student_bias"):
            assert not x[banned:].any()
            x = x[:banned]
        assert_close(name, x, exact[name], 1e-5)


def test_equal_heads_are_exactly_nothing():
    for beta in (0.0, 0.5, 1.0):
        call = Call(0, beta, ignored=0.3, weight_hard_loss=0.0, return_soft_hard_loss=False, missing=0, frozen=(), weight_soft_loss=1.0)
        assert all(not x.any() for x in call.run(LigerFusedLinearJSDLoss).values())


def test_the_interface_is_ligers():
    def shape(function):
        return [(q.name, q.kind, q.default) for q in inspect.signature(function).parameters.values()]

    assert shape(LigerFusedLinearJSDLoss.__init__) == shape(peer.LigerFusedLinearJSDLoss.__init__)
    assert shape(LigerFusedLinearJSDLoss.forward) == shape(peer.LigerFusedLinearJSDLoss.forward)
    for options in ({}, dict(weight_hard_loss=0.1, beta=0.9, compiled=False, chunk_size=8, return_soft_hard_loss=True)):
        ours, theirs = LigerFusedLinearJSDLoss(**options), peer.LigerFusedLinearJSDLoss(**options)
        assert {n: getattr(ours, n) for n in OPTIONS} == {n: getattr(theirs, n) for n in OPTIONS}
        assert not list(ours.parameters()) and not ours.state_dict() and "beta=" in repr(ours)


def test_positional_arguments_and_attributes_assigned_between_calls():
    call = Call(5, 0.5, bias=("student_bias", "teacher_bias"), missing=0, weight_soft_loss=0.7)
    results = []
    for module in (LigerFusedLinearJSDLoss(), Theirs()):
        module.temperature, module.beta, module.weight_hard_loss, module.return_soft_hard_loss = 0.8, 0.2, 0.9, True
        results.append(dict(enumerate(module(*call.tensors.values()))))
    assert_all_close(*results, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_graph_without_a_gradient_to_take(temperature):
    call = Call(6, 0.5, temperature=temperature, weight_hard_loss=0.5, return_soft_hard_loss=True)
    module = LigerFusedLinearJSDLoss(**call.options)
    assert not any(x.requires_grad for x in module(**call.tensors))
    call.tensors["student_input"] = call.tensors["student_input"].clone().requires_grad_()
    trained = module(**call.tensors)
    assert [x.requires_grad for x in trained] == [True, False, False]
    with torch.no_grad():
        scored = module(**call.tensors)
    assert not any(x.requires_grad for x in scored)
    assert_all_close(dict(enumerate(scored)), dict(enumerate(trained)), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_are_read_only_where_the_cross_entropy_is_wanted(temperature):
    call = Call(7, 0.5, temperature=temperature, weight_hard_loss=0.0, return_soft_hard_loss=False, ignored=0.3)
    clean = call.run(LigerFusedLinearJSDLoss)
    kept = call.tensors["true_labels"] != call.options["ignore_index"]
    call.tensors["true_labels"] = call.tensors["true_labels"].masked_fill(kept, V + 5)
    assert torch.equal(call.run(LigerFusedLinearJSDLoss)["loss"], clean["loss"])
    call.options["weight_hard_loss"] = 0.5
    with pytest.raises(ValueError, match="token ids must be in"):
        call.run(LigerFusedLinearJSDLoss)


def test_a_temperature_of_zero_is_refused_as_liger_does():
    for C in (LigerFusedLinearJSDLoss, Theirs):
        with pytest.raises(AssertionError, match="(?i)temperature"):
            C(temperature=0)


@pytest.mark.parametrize(
    "options, wrong, error, said",
    [
        (dict(temperature=-1.0), {}, ValueError, "temperature.*-1.0"),
        (dict(beta=1.5), {}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        (dict(beta="half"), {}, TypeError, r"beta must be a number in \[0, 1\], got str"),
        ({}, dict(student_input=torch.zeros(D)), ValueError, r"student_input must be \[N, D\] or \[B, T, D\], got \[16\]"),
        ({}, dict(student_input=None), TypeError, "student_input.*NoneType"),
        ({}, dict(student_weight=torch.zeros(D, V)), ValueError, r"student_weight must be \[V, 16\], got \[16, 131\]"),
        ({}, dict(student_weight=torch.zeros(V + 1, D)), ValueError, "teacher_weight must have at least the student's V = 132 rows, got 131"),
        ({}, dict(teacher_input=torch.zeros(N - 1, E)), ValueError, r"teacher_input must be \[24, D'\], got \[23, 11\]"),
        ({}, dict(teacher_weight=torch.zeros(V, D)), ValueError, r"teacher_weight must be \[V', 11\], got \[131, 16\]"),
        ({}, dict(true_labels=torch.zeros(N)), TypeError, "true_labels.*int64.*float32"),
        ({}, dict(true_labels=torch.zeros(N + 1, dtype=torch.long)), ValueError, r"true_labels must be \[24\], got \[25\]"),
        ({}, dict(student_bias=torch.zeros(V - 1)), ValueError, r"student_bias must be \[131\], got \[130\]"),
        ({}, dict(teacher_bias=torch.zeros(V - 1)), ValueError, r"teacher_bias must be \[131\], got \[130\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options, wrong, error, said):
    call = Call(8, 0.5, missing=0, sequences=False, bias=(), temperature=1.0)
    with pytest.raises(error) as caught:
        LigerFusedLinearJSDLoss(**options)(**{**call.tensors, **wrong})
    assert re.search(said, str(caught.value)), caught.value
