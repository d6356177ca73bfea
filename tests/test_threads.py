"""Concurrent calls from several Python threads: the bits of one call after the other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs

THREADS, CALLS = 4, 6
pytestmark = pytest.mark.unpoisoned  # filling memory is a switch of the whole process


def work(seed, backend):
    """Loss, gradients and log-probs of calls of all shapes and paths."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(CALLS):
        T, V = 3 + (seed + i) % 5, 900 + 311 * ((seed * 7 + i) % 6)
        dtype = (torch.bfloat16, torch.float32)[i % 2]
        hidden, weight = (torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((4, T, 16), (V, 16)))
        ids, mask = torch.randint(0, V, (4, T), generator=g), torch.rand(4, T, generator=g) < 0.8
        config = GRPOLossConfig(importance_sampling_level=("token", "sequence")[i // 2 % 2])
        out = fused_linear_grpo_loss(
            hidden, weight, ids, torch.randn(4, generator=g), mask, old_logps=torch.full((4, T), -7.0), config=config, backend=backend,
            workspace_bytes=(None, 40_000)[i // 3 % 2],
        )  # fmt: skip
        out.loss.backward()
        with torch.no_grad():
            logps = linear_logprobs(hidden, weight, ids, backend=backend).logps
        found += [out.loss.detach(), hidden.grad, weight.grad, logps]
    return found


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_threads_do_not_disturb_each_other(backend):
    alone = [work(seed, backend) for seed in range(THREADS)]
    barrier = threading.Barrier(THREADS)

    def together(seed):
        barrier.wait()
        return work(seed, backend)

    for _ in range(3):
        with ThreadPoolExecutor(THREADS) as pool:
            for one, other in zip(alone, pool.map(together, range(THREADS)), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_error_in_one_thread_is_its_own():
    def wrong(_):
        with pytest.raises(ValueError, match="completion_ids"):
            fused_linear_grpo_loss(torch.randn(1, 2, 4), torch.randn(9, 4), torch.full((1, 2), 99), torch.ones(1), torch.ones(1, 2))

    expected = work(0, "auto")
    with ThreadPoolExecutor(2) as pool:
        right, bad = pool.submit(work, 0, "auto"), [pool.submit(wrong, i) for i in range(20)]
        assert all(torch.equal(a, b) for a, b in zip(right.result(), expected, strict=True))
        for one in bad:
            one.result()
