"""Log-probs and losses over supports, the tokens that could have been sampled, against full logits with -inf outside of them."""

import copy
import dataclasses
import functools
import math
import pickle
import random
import re
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.loss_calls import draw_call, every_backend, interpreted, on_the_cpu
from support.problems import DEVICE, draw_problem, make_problem, packed, run
from support.seeds import each_seed
from support.token_supports import over_support
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch
from support.vocab_shards import sharded, spawn

from grpo_kernels import (
    FusedLinearGRPOLoss,
    GRPOLossConfig,
    TokenSupport,
    fused_linear_grpo_loss,
    linear_logprobs,
    linear_logprobs_at,
    reference,
)
from grpo_kernels import support as support_module
from grpo_kernels.backends import pytorch
from grpo_kernels.engine import ops
from grpo_kernels.losses.config import TRL_LOSS_TYPES
from grpo_kernels.support import Facts


def drawn(seed, dtype, backend, **fixed):
    p, needs, more, scale = draw_call(seed, dtype, backend)
    p = draw_problem(seed, dtype, **fixed) if fixed else p
    empty = random.Random(seed).choice([0.0, 0.0, 0.15, 1.0])
    p, support = over_support(p, seed, empty=empty, single=random.Random(seed).choice([0.0, 0.4]) * (1 - empty))
    return p, needs, {**more, "support": support}, scale


@every_backend
@each_seed(4000, 120, usual=24)
def test_float64_equals_the_reference(seed, backend):
    p, needs, more, scale = drawn(seed, torch.float64, backend)
    ours = run(fused_linear_grpo_loss, p, needs=needs, scale=scale, **more)
    truth = run(reference.grpo_loss, p, needs=needs, scale=scale, support=more["support"])
    assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"{needs} {more}")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_seed(5000, 64, usual=12)
def test_no_worse_than_full_logits_in_their_dtype(seed, dtype, backend):
    fixed = {"top_entropy_quantile": 1.0} if dtype == torch.bfloat16 else {}
    p, needs, more, scale = drawn(seed, dtype, backend, **fixed)
    while dtype == torch.bfloat16 and (p.hidden.shape[-1] < 8 or p.weight.shape[0] < 17):  # too few numbers to average rounding
        seed += 1000
        p, needs, more, scale = drawn(seed, dtype, backend, **fixed)
    ours = run(fused_linear_grpo_loss, p, needs=needs, scale=scale, **more).flat()
    theirs = run(reference.grpo_loss, p, needs=needs, scale=scale, support=more["support"]).flat()
    exact = run(reference.grpo_loss, p, dtype=torch.float64, needs=needs, scale=scale, support=more["support"]).flat()
    for name, truth in exact.items():
        if truth is None:
            assert ours[name] is None
        elif dtype == torch.float32 or not name.startswith("metric"):
            assert ours[name].dtype == theirs[name].dtype
            # of three rows PyTorch may have the luck of roundings that cancel: two of 2^-8 are allowed whatever it lost
            floor = 8e-3 if dtype == torch.bfloat16 else 1e-5 + 1e-7 / max(truth.double().norm().item(), 1e-30)
            assert_no_worse_than_torch(f"{needs} {name}", ours[name], theirs[name], truth, floor=floor)


@pytest.mark.cover("loss_type", "level")
@every_backend
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_loss(loss_type, level, layout, backend):
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.04, entropy_coef=0.01, max_completion_length=9,
                            temperature=0.8)  # fmt: skip
    p = make_problem(7, B=5, T=9, V=61, config=config, bias=True, lora=True, ratio="token", confident=False)
    p, support = over_support(packed(p) if layout == "packed" else p, 3)
    ours = run(fused_linear_grpo_loss, p, support=support, backend=backend)
    assert_all_close(ours.flat(), run(reference.grpo_loss, p, support=support).flat(), 1e-10)
    module = FusedLinearGRPOLoss(**dataclasses.asdict(config))
    positional, keywords, _ = p.arguments()
    del keywords["config"]
    assert torch.equal(module(*positional, **keywords, support=support, backend=backend).loss, ours.loss)


@pytest.mark.exhaustive_in_the_interpreter
@every_backend
def test_bits_repeat_and_a_retained_graph_gives_them_again(backend):
    size = dict(B=3, T=7, V=61) if interpreted(backend) else dict(B=6, T=11, V=131)
    p, support = over_support(make_problem(**size, D=40, dtype=torch.float32, bias=True, lora=True), 5)
    first, second = (run(fused_linear_grpo_loss, p, support=support, backend=backend).flat() for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    positional, keywords, leaves = p.arguments()
    loss = fused_linear_grpo_loss(*positional, **keywords, support=support, backend=backend).loss
    wanted = [leaves[name] for name in p.leaves]
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    for a, b, name in zip(once, torch.autograd.grad(loss, wanted), p.leaves, strict=True):
        assert torch.equal(a, b) and torch.equal(a, first[f"gradient of {name}"]), name


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probs_and_entropy_are_differentiable_in_everything(dtype, backend):
    p = make_problem(B=4, T=9, V=61, dtype=dtype, bias=True, lora=True, config=GRPOLossConfig(softcap=4.0))
    p, support = over_support(p, 11)
    g, g_entropy = torch.randn(2, *p.mask.shape, dtype=torch.float64, device=DEVICE)

    def results(function, dtype):
        (hidden, weight, ids, _, mask), keywords, leaves = p.arguments(dtype)
        temperature = torch.linspace(0.6, 1.7, mask.numel(), device=DEVICE, dtype=keywords["old_logps"].dtype).view(mask.shape).requires_grad_()
        logps, entropy = function(hidden, weight, ids, mask, keywords["bias"], temperature, keywords["lora"])
        ((logps * g).sum() + (entropy * g_entropy).sum()).backward()
        return [logps, entropy, *(leaves[name].grad for name in p.leaves), temperature.grad]

    def ours(hidden, weight, ids, mask, bias, temperature, lora):
        return linear_logprobs(hidden, weight, ids, mask=mask, bias=bias, temperature=temperature, lora=lora, softcap=4.0, support=support,
                               backend=backend)  # fmt: skip

    def plain(hidden, weight, ids, mask, bias, temperature, lora):
        z = reference.hidden_to_logits(hidden.where(mask.bool().unsqueeze(-1), 0.0), weight, bias, lora)
        allowed = support.to_mask(len(weight)).view(*ids.shape, -1)
        return reference.logps_from_logits(z, ids, mask, p.config, temperature, allowed | ~mask.bool().unsqueeze(-1))

    exact = results(plain, torch.float64)
    for i, (x, theirs, truth) in enumerate(zip(results(ours, dtype), results(plain, dtype), exact, strict=True)):
        if dtype == torch.float64:
            assert_close(str(i), x, truth, 1e-10)
        else:
            assert_no_worse_than_torch(str(i), x, theirs, truth, floor=1e-5)


def test_supports_are_built_from_what_samplers_hand_over():
    allowed = torch.zeros(2, 3, 9, dtype=torch.bool)
    allowed[0, 0, [1, 4]] = allowed[0, 2, [8]] = allowed[1, 1, [0, 3, 5]] = True
    a = TokenSupport.from_mask(allowed)
    padded = torch.full((2, 3, 4), -1)
    padded[0, 0, :2], padded[0, 2, 0], padded[1, 1, 1:] = torch.tensor([1, 4]), 8, torch.tensor([0, 3, 5])
    b = TokenSupport.from_padded(padded)
    c = TokenSupport.from_sequences([([1, 4, 8], [0, 2, 2, 3]), ([0, 3, 5], [0, 0, 3])], length=3)
    for other in (b, c):
        assert torch.equal(a.ids, other.ids) and torch.equal(a.offsets, other.offsets)
    assert a.offsets.tolist() == [0, 2, 2, 3, 3, 6, 6] and a.ids.tolist() == [1, 4, 8, 0, 3, 5]
    assert torch.equal(a.to_mask(9).view(2, 3, 9), allowed | ~allowed.any(-1, keepdim=True))
    assert TokenSupport.from_sequences([([1, 4, 8], [0, 2, 2, 3]), ([0], [0, 1])]).lengths().tolist() == [2, 0, 1, 1]
    some = a.take(torch.tensor([4, 1, 0]))
    assert some.ids.tolist() == [0, 3, 5, 1, 4] and some.lengths().tolist() == [3, 0, 2]
    with pytest.raises(ValueError, match=r"sequence 1 must have at most 1 positions, got 2"):
        TokenSupport.from_sequences([([0], [0, 1]), ([0, 3], [0, 1, 2])], length=1)
    with pytest.raises(ValueError, match=r"offsets of sequence 0 must rise from 0 to 2, its token_ids, got \[0, 3\]"):
        TokenSupport.from_sequences([([0, 1], [0, 3])])


def test_supports_come_in_the_forms_that_samplers_use():
    class SamplingMask(NamedTuple):
        token_ids: object
        offsets: object

    plain = TokenSupport.from_sequences([([7, 3, 9], [0, 1, 3]), ([2], [0, 1])], length=3)
    given = [SamplingMask(np.array([7, 3, 9], np.int32), np.array([0, 1, 3])), TokenSupport(torch.tensor([2]), torch.tensor([0, 1]))]
    for masks in (given, [*given[:1], (torch.tensor([2]), (0, 1))]):
        found = TokenSupport.from_sequences(masks, length=3)
        assert torch.equal(found.ids, plain.ids) and torch.equal(found.offsets, plain.offsets)
    assert TokenSupport.from_sequences([None, given[0]], length=2).lengths().tolist() == [0, 0, 1, 2]
    assert plain.take(torch.tensor([True, False, False, True, False, True])).lengths().tolist() == [1, 1, 0]
    for wrong, kind, message in (
        ([None], ValueError, r"sequence 0 must have \(token_ids, offsets\) without a length"),
        (([1, 2, 3], [0, 1, 3], [4]), TypeError, r"sequence 0 must be \(token_ids, offsets\).*got list"),
        ({"token_ids": []}, TypeError, r"sequences must be a list.*got dict"),
        ([([1.5], [0, 1])], TypeError, r"token_ids of sequence 0 must be integers \[\.\.\], got torch.float32 \[1\]"),
        ([([[1], [2, 3]], [0, 1])], TypeError, r"token_ids of sequence 0 must be integers \[\.\.\], got list"),
        ([([1, 2, 3], [0, 2, 1, 3])], ValueError, r"got \[0, 2, 1, 3\]; they fall behind token 1"),
    ):
        with pytest.raises(kind, match=message):
            TokenSupport.from_sequences(wrong)
    for index in ([0, 1], slice(0, 1), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0.0])):
        with pytest.raises(TypeError, match=r"index must be an int64 tensor \[n\], or a bool one \[6\]"):
            plain.take(index)
    with pytest.raises(ValueError, match=r"index must be \[6\] as a bool tensor, got \[2\]"):
        plain.take(torch.tensor([True, False]))
    with pytest.raises(TypeError, match="got ndarray"):
        TokenSupport.from_mask(np.ones((2, 3), bool))


@every_backend
def test_a_single_token_is_not_computed(backend, monkeypatch):
    """NaN in its hidden state does no harm, with kept_rows neither, and no row goes to a kernel."""
    p = make_problem(B=3, T=5, V=37, confident=False)
    p.hidden[:] = math.nan
    support = TokenSupport.from_padded(p.completion_ids.unsqueeze(-1)).to(DEVICE)
    call = functools.partial(run, fused_linear_grpo_loss, p.with_config(entropy_coef=0.1), support=support, backend=backend)
    for found in (call(), call(kept_rows=p.kept_rows())):
        assert not found.logps.any() and not found.entropy.any() and found.loss.isfinite()
        assert not any(found.gradients[name].any() for name in ("hidden", "weight"))
    assert not run(reference.grpo_loss, p, support=support).logps.any()
    rows = []
    monkeypatch.setattr(pytorch, "pair_logits", lambda pairs, *args, **options: rows.append(len(pairs.ranges)))
    run(fused_linear_grpo_loss, p, support=support, backend="torch", needs=())
    assert rows == [0]


@every_backend
@pytest.mark.parametrize("layout", ["transposed", "expanded", "wide rows"])
def test_heads_of_any_layout(layout, backend):
    """The kernels want adjacent columns and rows apart; of another head the rows that occur are copied, no more."""
    p = make_problem(B=3, T=5, V=37, D=16, bias=True, lora=True)
    p, support = over_support(p, 4, empty=0.0)
    if layout == "expanded":
        p.weight = p.weight[:1].expand(37, 16).clone()
    truth = run(reference.grpo_loss, p, support=support)
    positional, keywords, leaves = p.arguments()
    weight = leaves["weight"].detach()
    weight = {"transposed": lambda: weight.t().contiguous().t(), "expanded": lambda: weight[:1].expand(37, 16),
              "wide rows": lambda: torch.cat([weight, weight], 1)[:, :16]}[layout]().requires_grad_()  # fmt: skip
    out = fused_linear_grpo_loss(positional[0], weight, *positional[2:], **keywords, support=support, backend=backend)
    grads = torch.autograd.grad(out.loss, [positional[0], weight, leaves["bias"], leaves["lora_b"]])
    for name, x in zip(("hidden", "weight", "bias", "lora_b"), grads, strict=True):
        assert_close(name, x, truth.gradients[name], 1e-10)


@pytest.mark.exhaustive_in_the_interpreter
@every_backend
def test_an_adapter_of_no_rank_and_many_rows(backend):
    """An empty adapter adds nothing; more rows than are summed at a time."""
    for rank, N in ((0, 6), (2, 40 if interpreted(backend) else 1500)):
        g = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (N, 19))
        lora = (torch.randn(rank, 8, dtype=torch.float64).requires_grad_(), torch.randn(19, rank, dtype=torch.float64).requires_grad_(), 0.5)
        ids = torch.randint(0, 19, (N,), generator=g)
        support = TokenSupport.from_padded(torch.stack([ids, (ids + 3) % 19], 1)).to(DEVICE)
        leaves = [hidden, weight, *lora[:2]]
        placed = [x.to(DEVICE) for x in leaves]
        logps = linear_logprobs(placed[0], placed[1], ids.to(DEVICE), lora=(*placed[2:], 0.5), support=support, backend=backend).logps
        z = reference.hidden_to_logits(hidden, weight, None, lora).gather(1, torch.stack([ids, (ids + 3) % 19], 1))
        exact = z.log_softmax(1)[:, 0]
        assert_close("logps", logps, exact, 1e-10)
        for a, b in zip(torch.autograd.grad(logps.sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True):
            assert_close(f"rank {rank}", a, b, 1e-10)


@on_the_cpu
def test_a_support_changed_before_the_backward_changes_nothing():
    p, support = over_support(make_problem(V=37), 1, empty=0.0)
    support = TokenSupport(support.ids.clone(), support.offsets.clone())
    positional, keywords, leaves = p.arguments()
    truth = run(fused_linear_grpo_loss, p, support=support)
    loss = fused_linear_grpo_loss(*positional, **keywords, support=support).loss
    support.ids.fill_(3)
    support.offsets.zero_()
    loss.backward()
    assert all(torch.equal(leaves[name].grad, truth.gradients[name]) for name in ("hidden", "weight"))


@every_backend
def test_garbage_of_masked_positions_of_any_size(backend):
    p = make_problem(V=37, confident=False)
    kept = p.mask.bool().flatten()
    ids = torch.stack([p.completion_ids, (p.completion_ids + 1) % 37], -1).view(-1, 2)
    for low, high in ((-5, 2**62 - 1), (torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max)):
        ids[~kept] = torch.tensor([low, high])
        support = TokenSupport(ids.flatten(), torch.arange(0, 2 * len(ids) + 1, 2)).to(DEVICE)
        ours, truth = (run(f, p, support=support, **more) for f, more in ((fused_linear_grpo_loss, {"backend": backend}), (reference.grpo_loss, {})))
        assert_all_close(ours.flat(), truth.flat(), 1e-10)
        assert run(fused_linear_grpo_loss, p, support=support, kept_rows=p.kept_rows(), backend=backend).loss.isfinite()


@on_the_cpu
def test_odd_supports():
    """Columns of a table as ids, int32 throughout, inference tensors, one position, a copy and a pickle."""
    p = make_problem(V=37, confident=False, masked=0.0, all_masked_sequence=False)
    table = torch.stack([p.completion_ids, (p.completion_ids + 1) % 37], -1).view(-1, 2)
    flat, ends = table.flatten(), torch.arange(0, 2 * len(table) + 1, 2)
    plain = run(fused_linear_grpo_loss, p, support=TokenSupport(flat, ends)).flat()
    with torch.inference_mode():
        inferred = TokenSupport(flat.clone(), ends.clone())
    strided = TokenSupport(torch.stack([flat, flat], 1)[:, 0], torch.stack([ends, ends], 1)[:, 0])
    made = TokenSupport(flat.int(), ends.int())
    for support in (strided, made, inferred, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        found = run(fused_linear_grpo_loss, p, support=support).flat()
        assert all(torch.equal(x, plain[name]) for name, x in found.items())
    hidden, weight = torch.randn(8), torch.randn(5, 8)
    token = torch.tensor(1)
    one = linear_logprobs(hidden, weight, token, support=TokenSupport(torch.tensor([1, 4]), torch.tensor([0, 2]))).logps
    assert_close("one", one, (weight[[1, 4]] @ hidden).log_softmax(0)[0], 1e-5)
    with pytest.raises(ValueError, match=r"got 99 at position \[\]"):
        linear_logprobs(hidden, weight, token, support=TokenSupport(torch.tensor([1, 99]), torch.tensor([0, 2])))
    assert TokenSupport.from_mask(torch.zeros(3, 0, dtype=torch.bool)).lengths().tolist() == [0, 0, 0]
    assert TokenSupport.from_padded(torch.zeros(3, 0, dtype=torch.int64)).positions == 3


@every_backend
def test_double_backward_is_refused_and_autocast_changes_no_bit(backend):
    p, support = over_support(make_problem(dtype=torch.float32, lora=True), 1)
    positional, keywords, leaves = p.arguments()
    loss = fused_linear_grpo_loss(*positional, **keywords, support=support, backend=backend).loss
    wanted = list(leaves.values())
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(loss, wanted, retain_graph=True), plain))
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(loss, wanted, create_graph=True)


def test_supports_next_to_as_large_as_the_vocabulary_are_warned_of_once():
    support_module._warn_of_width.cache_clear()
    hidden, weight = torch.randn(2, 4), torch.randn(3000, 4)
    wide = TokenSupport.from_mask(torch.ones(2, 3000, dtype=torch.bool).index_fill(1, torch.tensor([7]), False))
    with pytest.warns(UserWarning, match="more than 1000 tokens a position"):
        linear_logprobs(hidden, weight, torch.zeros(2, dtype=torch.int64), support=wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_logprobs(hidden, weight, torch.zeros(2, dtype=torch.int64), support=wide)


@on_the_cpu
def test_nothing_of_the_vocabularys_size_is_made(monkeypatch):
    """With a frozen head; and no row of logits ever."""
    p, support = over_support(make_problem(B=4, T=9, V=5003, D=24, dtype=torch.float32), 2, empty=0.0)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor))
            return out

    monkeypatch.setattr(ops, "_score", None)
    monkeypatch.setattr(ops, "_one_pass", None)
    positional, keywords, _ = p.arguments(needs=("hidden",))
    keywords |= {"support": support, "backend": "cpu"}
    fused_linear_grpo_loss(*positional, **keywords)  # the support is looked at
    with Sizes():
        fused_linear_grpo_loss(*positional, **keywords).loss.backward()
    largest = max(len(support.ids), p.hidden.numel())
    assert max(size for size in sizes if size != p.weight.numel()) <= largest
    assert sizes.count(p.weight.numel()) <= 4, "the weight is handed through, not copied"


@every_backend
def test_one_dense_product_serves_the_rows_without_a_support(backend):
    """In one pass and in two phases: dW of both sides is one tensor, and all rows empty is a call without a support."""
    for config in (GRPOLossConfig(), GRPOLossConfig(importance_sampling_level="sequence")):
        p = make_problem(B=4, T=9, V=61, config=config)
        nothing = TokenSupport(torch.zeros(0, dtype=torch.int64), torch.zeros(p.mask.numel() + 1, dtype=torch.int64)).to(DEVICE)
        ours, plain = (run(fused_linear_grpo_loss, p, backend=backend, **more).flat() for more in ({"support": nothing}, {}))
        assert all(torch.equal(x, plain[name]) for name, x in ours.items())
        everything = TokenSupport.from_mask(torch.ones(p.mask.numel(), 61, dtype=torch.bool)).to(DEVICE)
        ours = run(fused_linear_grpo_loss, p, backend=backend, support=everything).flat()
        assert all(torch.equal(x, plain[name]) for name, x in ours.items())


def wrong_supports(p):
    """name -> (support, kept_rows may find it, message)."""
    ids = p.completion_ids.reshape(-1)
    N = len(ids)
    pairs = torch.stack([ids, (ids + 1) % 37], 1)
    place = int(p.mask.bool().reshape(-1).nonzero()[3])
    where = rf"position \[{place // 6}, {place % 6}\]"
    even = torch.arange(0, 2 * N + 1, 2)

    def changed(column, value):
        out = pairs.clone()
        out[place, column] = value
        return TokenSupport(out.reshape(-1), even)

    other = (int(ids[place]) + 2) % 37
    falling = even.clone()
    falling[4] = 13
    return {
        "token outside": (changed(0, other), rf"completion_ids must be among support\.ids.*got {int(ids[place])} at {where}, whose support is \[{other}, "),
        "twice": (changed(1, int(ids[place])), rf"support\.ids must name a token once in a range, got {int(ids[place])} twice at {where}"),
        "too large": (changed(1, 37), rf"support\.ids must be in \[0, V = 37\).*got 37 at {where}"),
        "negative": (changed(1, -1), rf"support\.ids must be in \[0, V = 37\).*got -1 at {where}"),
        "falls": (TokenSupport(pairs.reshape(-1), falling), rf"support\.offsets must rise from 0 to {2 * N}.*fall behind position 4"),
        "too short": (TokenSupport(pairs.reshape(-1)[:-1], even), rf"support\.offsets must rise from 0 to {2 * N - 1}.*got 0 to {2 * N}"),
        "starts late": (TokenSupport(torch.cat([ids[:1], pairs.reshape(-1)]), even + 1), r"must rise from 0 .*got 1 to"),
    }  # fmt: skip


WRONG = ("token outside", "twice", "too large", "negative", "falls", "too short", "starts late")


@every_backend
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_its_place(name, backend):
    p = make_problem(confident=False)
    support, message = wrong_supports(p)[name]
    support = support.to(DEVICE)
    for function in (functools.partial(fused_linear_grpo_loss, backend=backend), reference.grpo_loss):
        with pytest.raises(ValueError, match=message):
            run(function, p, support=support)
    for level in ("token", "sequence"):
        q = p.with_config(importance_sampling_level=level)
        found = run(fused_linear_grpo_loss, q, support=support, kept_rows=p.kept_rows(), backend=backend)
        assert found.loss.isnan() and all(x.isnan().any() for x in found.gradients.values())
    # where it is masked, it is nobody's business; offsets are
    if name not in ("falls", "too short", "starts late"):
        p.mask[:] = False
        p.mask[-1, -1] = True
        run(fused_linear_grpo_loss, p, support=support, backend=backend)


def test_a_wrong_kind_is_refused():
    p = make_problem()
    N = p.mask.numel()
    support = TokenSupport(p.completion_ids.reshape(-1), torch.arange(N + 1))
    positional, keywords, _ = p.arguments()
    call = functools.partial(fused_linear_grpo_loss, *positional, **keywords)
    for given, kind, message in (
        (p.mask, TypeError, "support must be a TokenSupport or None, got Tensor"),
        (TokenSupport(support.ids[:-1], support.offsets[:-1]), ValueError, rf"support\.offsets must have {N + 1} entries.*got {N}"),
        (support.to("meta"), ValueError, "support must be on cpu as hidden is, got meta"),
    ):
        with pytest.raises(kind, match=message):
            call(support=given)
    for ids, offsets, kind, message in (
        (support.ids.float(), support.offsets, TypeError, r"support\.ids must be an int32 or int64 tensor, got torch\.float32"),
        (support.ids.view(1, -1), support.offsets, ValueError, r"support\.ids must be 1-D, got \[1, 24\]"),
        (support.ids, support.offsets.tolist(), TypeError, r"support\.offsets must be an int32 or int64 tensor, got list"),
        (support.ids, support.offsets[:0], ValueError, r"support\.offsets must have an entry more"),
    ):
        with pytest.raises(kind, match=message):
            TokenSupport(ids, offsets)
    hidden, weight, ids = positional[:3]
    with pytest.raises(ValueError, match="return_lse must be False with a support"):
        linear_logprobs(hidden, weight, ids, mask=p.mask, support=support, return_lse=True)


def test_a_support_is_looked_at_once_and_again_when_it_was_changed(monkeypatch):
    looks, look = [], Facts.of
    monkeypatch.setattr(Facts, "of", lambda support: looks.append(support) or look(support))
    p, support = over_support(make_problem(), 1, empty=0.0)
    support = TokenSupport(support.ids.clone(), support.offsets.clone())
    looks.clear()
    for _ in range(3):
        run(fused_linear_grpo_loss, p, support=support)
    assert len(looks) == 1
    support.ids[:] = 0
    with pytest.raises(ValueError, match=r"must (be among|name a token once)"):
        run(fused_linear_grpo_loss, p, support=support)
    assert len(looks) == 2


@on_the_cpu
def test_compiled_calls_are_refused_by_name():
    p, support = over_support(make_problem(dtype=torch.float32), 1)
    positional, keywords, _ = p.arguments()
    with pytest.raises(RuntimeError, match="support cannot be used under torch.compile"):
        torch.compile(lambda: fused_linear_grpo_loss(*positional, **keywords, support=support).loss, backend="eager", fullgraph=True)()


@on_the_cpu
def test_dw_has_fresh_pages_and_they_read_as_zeros():
    """Above 8 MiB it is memory of the system's own, of which only the rows that occur are touched."""
    p = make_problem(V=70_001, D=32, dtype=torch.float32, confident=False)
    support = TokenSupport.from_padded(torch.stack([p.completion_ids, torch.full_like(p.completion_ids, 70_000)], -1))
    found = run(fused_linear_grpo_loss, p, support=support)
    exact = run(reference.grpo_loss, p, dtype=torch.float64, support=support)
    dw = found.gradients["weight"]
    assert_close("dW", dw, exact.gradients["weight"], 1e-5)
    dw += 1  # of an optimiser that works in place
    untouched = torch.ones(70_001, dtype=torch.bool)
    untouched[support.ids] = False
    assert (dw[untouched] == 1).all() and not (dw[~untouched] == 1).all()


def shards_refuse(rank, world):
    """What each rank hears where one of them has another support, or a wrong one."""
    p = make_problem(V=53, confident=False, masked=0.0, all_masked_sequence=False)
    ids = p.completion_ids.flatten()
    pairs = torch.stack([ids, (ids + 1) % 53], 1)
    q, _ = sharded(p, rank, world)
    N, heard = len(ids), []
    plain = TokenSupport(pairs.flatten(), torch.arange(0, 2 * N + 1, 2))
    empty = TokenSupport(pairs[1:].flatten(), torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(0, 2 * N - 1, 2)]))
    other = TokenSupport(torch.stack([ids, (ids + 2) % 53], 1).flatten(), plain.offsets)
    twice = TokenSupport(torch.stack([ids, ids], 1).flatten(), plain.offsets)
    for wrong in (empty, other, twice):
        try:
            run(fused_linear_grpo_loss, q, support=wrong if rank else plain, vocab_parallel_group=dist.group.WORLD)
            heard.append(None)
        except ValueError as error:
            heard.append(str(error))
    (hidden, weight, *_), _, _ = q.arguments()
    for wrong in (torch.zeros(*p.mask.shape, 3 + rank, dtype=torch.int64), torch.zeros(*p.mask.shape, 3) if rank else torch.zeros(*p.mask.shape, 3).long()):
        try:
            linear_logprobs_at(hidden, weight, wrong, vocab_parallel_group=dist.group.WORLD)
            heard.append(None)
        except (ValueError, TypeError, RuntimeError) as error:
            heard.append(str(error))
    return heard


@on_the_cpu
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_ranks_that_disagree_all_hear_of_it(tmp_path):
    for heard in spawn(tmp_path, 2, shards_refuse):
        for message in heard[:3]:
            assert re.search("must be the same on all ranks.*support", message), message
        assert "ids of a position must be the same" in heard[3] and re.search("refused|ids must be int64", heard[4])


def shards_agree(rank, world):
    wrong = []
    for seed in range(6):
        for backend in ("torch", "cpu"):
            p = make_problem(seed, B=4, T=7, V=53, bias=True, lora=seed % 2 == 0, temperature=seed % 3 == 0,
                             config=GRPOLossConfig(beta=0.04, entropy_coef=0.02 * (seed % 2), softcap=5.0 if seed == 3 else None,
                                                   importance_sampling_level=("token", "sequence")[seed % 2]))  # fmt: skip
            p, support = over_support(p, seed, empty=(0.0, 0.2)[seed % 2])
            alone = run(fused_linear_grpo_loss, p, backend=backend, support=support).flat()
            q, own = sharded(p, rank, world)
            ours, again = (run(fused_linear_grpo_loss, q, backend=backend, support=support, vocab_parallel_group=dist.group.WORLD).flat()
                           for _ in range(2))  # fmt: skip
            for quantity, x in ours.items():
                truth = alone[quantity]
                truth = truth[own] if quantity.split()[-1] in ("weight", "bias", "lora_b") else truth
                error = (x - truth).abs().max() if x.numel() else torch.zeros(())
                if error > 1e-10 or not torch.equal(x, again[quantity]):
                    wrong.append((seed, backend, quantity, float(error)))
    return wrong


@on_the_cpu
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_a_sharded_vocabulary_equals_one_process(tmp_path, world):
    """Three ranks: the last has no row of the vocabulary at all, and takes part."""
    for rank, wrong in enumerate(spawn(tmp_path, world, shards_agree)):
        assert wrong == [], f"rank {rank}: {wrong[:5]}"


@on_the_cpu
def test_rows_that_cannot_train_are_scored_alone(monkeypatch):
    """Their pairs are in the logits, and in no sum."""
    p = make_problem(B=4, T=8, V=61, masked=0.0, all_masked_sequence=False, confident=False)
    p.advantages[:2] = 0.0
    support = TokenSupport.from_padded(torch.stack([p.completion_ids, (p.completion_ids + 1) % 61, (p.completion_ids + 2) % 61], -1))
    handed = {"pair_logits": [], "pair_sums": []}
    for name, calls in handed.items():
        kernel = getattr(pytorch, name)

        def counted(pairs, *args, kernel=kernel, calls=calls, **options):
            calls.append(int((pairs.ranges[:, 1] - pairs.ranges[:, 0])[pairs.rows < 61].sum()))
            return kernel(pairs, *args, **options)

        monkeypatch.setattr(pytorch, name, counted)
    run(fused_linear_grpo_loss, p, support=support, backend="torch")
    assert handed == {"pair_logits": [96], "pair_sums": [48, 48]}  # of dW: those of a row of the weight
