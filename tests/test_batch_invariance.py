"""The bits of a token: the same whatever else is in the call, by whatever way it is computed (docs/bits.md)."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import usually
from support.ranks import join, launch, leave

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs
from grpo_kernels.backends import native, triton
from grpo_kernels.engine import fixed_order, products

needs_product = pytest.mark.skipif(native.why_unavailable() is not None, reason="the products of a fixed order are compiled")
ROOT = Path(__file__).parents[1]
V, D, N = 9001, 72, 70
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
BACKENDS = ["torch", "cpu"]
WORKSPACES = [None, 1 << 21, 1 << 16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Problem:
    """Rows that many calls take some of, and what one call of all of them finds."""

    def __init__(self, dtype, backend, softcap=None, biased=False, adapted=False):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        self.hidden, self.weight = draw(N, D) * 2, draw(V, D) * D**-0.5 * 2
        self.ids = torch.randint(0, V, (N,), generator=generator)
        self.bias, self.lora = draw(V) if biased else None, (draw(4, D), draw(V, 4), 0.7) if adapted else None
        self.options = {"backend": backend, "batch_invariant": True}
        self.softcap, self.g = softcap, torch.randn(N, generator=generator)
        self.ref_hidden, self.ref_weight = draw(N, 5), draw(V, 5)
        self.whole = self.scored(range(N))
        self.gradients = self.trained(range(N))

    def scored(self, rows, workspace=None):
        """(logps, entropy, lse) of some rows, in this order."""
        rows = list(rows)
        return linear_logprobs(self.hidden[rows], self.weight, self.ids[rows], bias=self.bias, lora=self.lora, softcap=self.softcap,
                               workspace_bytes=workspace, return_lse=True, **self.options)  # fmt: skip

    def trained(self, rows, workspace=None, frozen=False):
        """(logps, entropy, lse, dH, dW) of a loss over two phases."""
        rows = list(rows)
        hidden, weight = self.hidden[rows].requires_grad_(), self.weight.clone().requires_grad_(not frozen)
        found = linear_logprobs(hidden, weight, self.ids[rows], bias=self.bias, lora=self.lora, softcap=self.softcap,
                                workspace_bytes=workspace, return_lse=True, **self.options)  # fmt: skip
        (found.logps * self.g[rows].to(found.logps.dtype)).sum().backward()
        return *(x.detach() for x in found), hidden.grad, weight.grad

    def in_one_pass(self, rows, padding=0, workspace=None, packed=False, **compared):
        """(logps, entropy, dH, dW): a sequence of some rows, padded or packed; ``compared``: with a reference too, by this config."""
        rows = list(rows)
        pad = lambda x: torch.cat([x, x[:1].expand(padding, *x.shape[1:])])  # noqa: E731
        hidden, weight = pad(self.hidden[rows]).requires_grad_(), self.weight.clone().requires_grad_()
        mask = torch.arange(len(rows) + padding) < len(rows)
        options = self.options | {"bias": self.bias, "lora": self.lora, "workspace_bytes": workspace,
                                  "config": GRPOLossConfig(loss_type="dapo", softcap=self.softcap, **compared), "num_items": N}  # fmt: skip
        if compared:
            ref = pad(self.ref_hidden[rows])
            options |= {"ref_hidden": ref if packed else ref[None], "ref_weight": self.ref_weight}
        ids, advantages = pad(self.ids[rows]), pad(self.g[rows])
        if packed:
            borders = torch.tensor([0, len(rows) // 2, len(rows) + padding], dtype=torch.int32)
            out = fused_linear_grpo_loss(hidden, weight, ids, advantages, mask, cu_seqlens=borders, **options)
        else:
            out = fused_linear_grpo_loss(hidden[None], weight, ids[None], advantages[None], mask[None], **options)
        out.loss.backward()
        kept = slice(0, len(rows))
        return out.logps.flatten()[kept], out.entropy.flatten()[kept], hidden.grad[kept], weight.grad


PROBLEMS = {}


def problem(*key):
    if key not in PROBLEMS:
        PROBLEMS[key] = Problem(*key)
    return PROBLEMS[key]


def assert_same(found, whole, rows, count):
    for ours, theirs in itertools.islice(zip(found, whole, strict=False), count):
        assert torch.equal(ours, theirs[list(rows)])


rows_of = st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True)


@pytest.mark.cover("dtype", "backend")
@needs_product
@each_dtype
@each_backend
@pytest.mark.parametrize("options", [(), (5.0, True, True)], ids=["plain", "all"])
def test_a_token_has_the_same_bits_in_every_call(dtype, backend, options):
    p = problem(dtype, backend, *options)

    @settings(max_examples=12, deadline=None)
    @given(rows=rows_of, workspace=st.sampled_from(WORKSPACES), threads=st.sampled_from([1, 2, 3]), padding=st.integers(0, 9), packed=st.booleans())
    def check(rows, workspace, threads, padding, packed):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert_same(p.scored(rows, workspace), p.whole, rows, 3)
            found = p.trained(rows, workspace)
            assert_same(found[:3], p.whole, rows, 3)
            assert torch.equal(found[3], p.gradients[3][rows]), "dH"
            assert_same(p.in_one_pass(rows, padding, workspace, packed), p.whole, rows, 2)
        finally:
            torch.set_num_threads(before)

    check()


@needs_product
@pytest.mark.parametrize("vocab", [7, 8, 32, 127, 600])
def test_a_weight_that_shows_no_order_does_not_speak_for_the_next(vocab):
    """oneDNN sums 72 bfloat16 in another order than ours; zeros, or few random numbers, do not show it. Sums that cancel do."""
    generator = torch.Generator().manual_seed(1)
    half = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    (h, weight), signs = (half(1024, 36), half(vocab, 36)), torch.tensor([1, -1]).repeat_interleave(36)
    h, weight = h.repeat(1, 2) * signs, weight.repeat(1, 2)
    fixed_order._agreements.clear()
    whole, alone = torch.empty(2, 1024, vocab, dtype=torch.bfloat16)
    products.write_logits(h, torch.zeros_like(weight), whole, fixed=True)
    for rows, step in ((whole, 1024), (alone, 64)):
        for i in range(0, 1024, step):
            products.write_logits(h[i : i + step], weight, rows[i : i + step], fixed=True)
    assert torch.equal(whole, alone)


@pytest.mark.skipif(native.why_unavailable() is not None or native.product_isas()[-1] != "amx", reason="it is free with AMX alone")
@each_backend
def test_by_default_bfloat16_has_it_too(backend):
    """More rows than a piece of oneDNN's has, at a depth at which its order depends on their number."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    hidden, weight, ids = draw(1100, D), draw(600, D) / 8, torch.randint(0, 600, (1100,), generator=generator)
    scored = lambda s, **more: linear_logprobs(hidden[s], weight, ids[s], backend=backend, **more).logps  # noqa: E731
    whole = scored(slice(None))
    for s in (slice(0, 1), slice(7, 40), slice(300, 900)):
        assert torch.equal(scored(s), whole[s]) and torch.equal(scored(s, workspace_bytes=1 << 16), whole[s])
    hidden.requires_grad_()
    assert torch.equal(scored(slice(None)), whole)
    assert not torch.equal(scored(slice(None), batch_invariant=False), whole)  # or the comparison sees nothing


@pytest.mark.cover("backend")
@needs_product
@each_dtype
@each_backend
def test_a_row_of_the_gradient_is_the_same_beside_others(dtype, backend):
    p = problem(dtype, backend)
    whole = p.in_one_pass(range(N))[2]
    frozen = p.trained(range(N), frozen=True)[3]
    for rows, workspace in itertools.product(([3], [69, 0, 7], range(33, 70)), WORKSPACES):
        assert torch.equal(p.in_one_pass(rows, 5, workspace)[2], whole[list(rows)])
        assert torch.equal(p.trained(rows, workspace, frozen=True)[3], frozen[list(rows)])


@pytest.mark.cover("backend")
@needs_product
@each_dtype
@each_backend
def test_the_gradient_of_the_head_depends_on_the_order_of_rows_alone(dtype, backend):
    """Cut into pieces of 32 rows and more, padded, packed, by any number of threads."""
    p = problem(dtype, backend)
    two_phases, one_pass = p.gradients[4], p.in_one_pass(range(N))[3]
    before = torch.get_num_threads()
    try:
        for workspace, threads in ((None, 1), (1 << 21, 2), (1 << 21, 1), (3 << 20, 3)):
            torch.set_num_threads(threads)
            assert torch.equal(p.trained(range(N), workspace)[4], two_phases)
            assert torch.equal(p.in_one_pass(range(N), 7, workspace)[3], one_pass)
            assert torch.equal(p.in_one_pass(range(N), 0, workspace, packed=True)[3], one_pass)
    finally:
        torch.set_num_threads(before)
    if dtype != torch.float64:
        assert not torch.equal(p.trained(reversed(range(N)))[4], two_phases)  # or the comparison sees nothing


@pytest.mark.cover("dtype", "backend")
@needs_product
@each_dtype
@each_backend
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_reference_beside_it_changes_no_bit(dtype, backend, level):
    p, exact = problem(dtype, backend), dict(kl_estimator="exact", beta=0.1, importance_sampling_level=level)
    for rows, workspace, packed in itertools.product((range(N), [69, 0, 7]), WORKSPACES, (False, True)):
        assert_same(p.in_one_pass(rows, 3, workspace, packed, **exact), p.whole, rows, 2)


PRINT_BITS = """
import hashlib, torch
from test_batch_invariance import Problem
p = Problem(getattr(torch, {dtype!r}), {backend!r})
print(hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in (*p.whole, *p.gradients))).hexdigest())
"""


@needs_product
@pytest.mark.parametrize("threads", usually([1, 2, 16], 16))
@pytest.mark.parametrize("dtype", usually(["float32", "bfloat16"], "bfloat16"))
def test_a_process_with_other_threads_has_the_same_bits(dtype, threads, capsys):
    code = PRINT_BITS.format(dtype=dtype, backend="cpu")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    theirs = subprocess.run([sys.executable, "-c", code], check=True, text=True, cwd=os.path.dirname(__file__), env=environment,
                            stdout=subprocess.PIPE).stdout  # fmt: skip
    exec(code, {})
    assert len(theirs) == 65 and capsys.readouterr().out == theirs


# Whole fixed tiles of each rank; the last of four holds nothing.
SHARDS = {1: (9001,), 2: (4096, 4905), 3: (4096, 4096, 809), 4: (4096, 0, 4096, 809)}


def of_a_rank(world, rank, folder, port):
    join(rank, port, world, 240)
    found = []
    for dtype, backend in itertools.product((torch.float32, torch.bfloat16), BACKENDS):
        p = Problem(dtype, backend, 5.0, True, True)
        first = sum(SHARDS[world][:rank])
        own = slice(first, first + SHARDS[world][rank])
        p.weight, p.bias, (a, b, scale), p.ref_weight = p.weight[own], p.bias[own], p.lora, p.ref_weight[own]
        p.lora = a, b[own], scale
        p.options["vocab_parallel_group"] = dist.group.WORLD
        for workspace in (None, 1 << 17):
            exact = dict(kl_estimator="exact", beta=0.1)
            one_pass = [p.in_one_pass(range(N), 3, workspace, **some)[:2] for some in ({}, exact)]
            for ours in (p.scored(range(N), workspace), p.trained(range(N), workspace)[:3], *one_pass):
                found.append(all(torch.equal(x, whole) for x, whole in zip(ours, p.whole, strict=False)))
    torch.save(found, Path(folder, str(rank)))
    leave()


@pytest.mark.exhaustive(reason="twenty seconds: up to four processes")
@needs_product
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_has_the_bits_of_one_process(world, tmp_path):
    launch(functools.partial(of_a_rank, world), str(tmp_path), world, 240)
    for rank in range(world):
        assert torch.load(tmp_path / str(rank)) == [True] * 32


@pytest.mark.exhaustive(reason="eight seconds in the interpreter")
@pytest.mark.parametrize("rows, workspace", [([3], None), ([69, 0, 7], 1 << 16)])
@pytest.mark.skipif(triton.why_unavailable() is not None or not triton.interpreted(), reason="Triton's interpreter is not there")
@needs_product
def test_tritons_kernels_keep_the_promise(rows, workspace):
    p = problem(torch.float32, "triton")
    assert_same(p.scored(rows, workspace), p.whole, rows, 3)
    assert_same(p.trained(rows, workspace)[:4], p.gradients, rows, 4)
    assert_same(p.in_one_pass(rows, 2, workspace), p.whole, rows, 2)


def test_the_option_is_checked(monkeypatch):
    hidden, weight, ids = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    for wrong in ("yes", 1, torch.tensor(True)):
        with pytest.raises(TypeError, match="batch_invariant must be None, True or False, got"):
            linear_logprobs(hidden, weight, ids, batch_invariant=wrong)
    with pytest.raises(RuntimeError, match="batch_invariant cannot be had, it needs compiled products: torch.float16 has none"):
        linear_logprobs(hidden.half(), weight.half(), ids, batch_invariant=True)
    monkeypatch.setattr(native, "why_unavailable", lambda: "there are none")
    with pytest.raises(RuntimeError, match="it needs compiled products: there are none"):
        linear_logprobs(hidden, weight, ids, backend="torch", batch_invariant=True)
    monkeypatch.setenv("GRPO_KERNELS_BATCH_INVARIANT", "on")
    with pytest.raises(ValueError, match="GRPO_KERNELS_BATCH_INVARIANT must be 0 or 1, got 'on'"):
        linear_logprobs(hidden, weight, ids)
