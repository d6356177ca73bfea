"""What calls share and leave behind: no memory, nothing written into inputs, the same bits each time."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.loss_calls import PATHS, every_backend, every_path, interpreted
from support.problems import make_problem, run
from support.tolerance import assert_all_close, assert_close

from grpo_kernels import fused_linear_grpo_loss, reference
from grpo_kernels.engine import products


@every_backend
@every_path
def test_calls_that_overlap_share_no_memory(config, backend, monkeypatch):
    """A tile's memory is kept for the next call: never for one that comes while it is still in use, even twice in use."""
    monkeypatch.setattr(products, "_HUGE_PAGE_BYTES", 1)
    problems = [make_problem(seed, B=4, T=5 + seed, V=41, config=config, sampling=True) for seed in range(3)]
    truth = [run(reference.grpo_loss, p).gradients for p in problems]
    calls = []
    for p in problems:
        positional, keywords, leaves = p.arguments()
        calls.append((fused_linear_grpo_loss(*positional, **keywords, backend=backend).loss, leaves))
    for times in (1, 2):
        for i in (1, 0, 2):
            loss, leaves = calls[i]
            loss.backward(retain_graph=True)
            run(fused_linear_grpo_loss, problems[2 - i], backend=backend)
            for name, leaf in leaves.items():
                assert_close(f"{name} of {i}, {times} times", leaf.grad, truth[i][name] * times, 1e-10)


@every_backend
@pytest.mark.parametrize("path", ["one pass", "sequence"])
def test_calls_from_several_threads(path, backend, monkeypatch):
    if interpreted(backend):
        pytest.skip("Triton's interpreter is not made for several threads")
    monkeypatch.setattr(products, "_HUGE_PAGE_BYTES", 1)
    problems = [make_problem(seed, B=4, T=6, V=301, config=PATHS[path]) for seed in range(4)]
    truth = [run(reference.grpo_loss, p).flat() for p in problems]

    def repeat(i):
        return [run(fused_linear_grpo_loss, problems[i], backend=backend).flat() for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(repeat, range(4))):
            for result in results:
                assert_all_close(result, truth[i], 1e-10)


@pytest.mark.cover("backend")
@every_backend
@every_path
def test_nothing_of_the_call_outlives_it(config, backend):
    """Logits, stash and gradients go when the output goes."""
    p = make_problem(B=4, T=16, V=301, config=config, sampling=True)
    positional, keywords, _ = p.arguments()
    gc.collect()

    def big():
        return sum(1 for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() >= 301 * 16)

    before = big()
    out = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
    out.loss.backward()
    metrics = out.metrics
    del out
    gc.collect()
    assert big() <= before + 1 and metrics  # weight.grad


@every_backend
def test_inputs_are_not_written(backend):
    for config in PATHS.values():
        p = make_problem(config=config, bias=True, lora=True, sampling=True, ratio="token", temperature=True)
        positional, keywords, leaves = p.arguments()
        tensors = [x for x in (*positional, *keywords.values(), *leaves.values()) if isinstance(x, torch.Tensor)]
        before = [x.detach().clone() for x in tensors]
        out = fused_linear_grpo_loss(*positional, **keywords, backend=backend)
        (out.loss * 2).backward()
        assert all(torch.equal(a, b.nan_to_num()) for a, b in zip([x.nan_to_num() for x in before], tensors, strict=True))


@pytest.mark.cover("backend", "dtype")
@every_backend
@every_path
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_twice_gives_the_same_bits(config, dtype, backend):
    size = dict(B=4, T=7, V=131) if interpreted(backend) else dict(B=6, T=17, V=517)
    p = make_problem(**size, D=48, dtype=dtype, config=config, bias=True, lora=True, sampling=True, garbage=True)
    for workspace in (30_000,) if interpreted(backend) else (1, 30_000, None):
        first = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace).flat()
        for _ in range(2):
            again = run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace).flat()
            for name, value in first.items():
                assert torch.equal(value, again[name]), name
