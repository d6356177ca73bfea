"""The fused functions on the CUDA C++ kernels, whose source runs on the host: random problems, every path, 16-bit inputs."""

import random

import pytest
import torch
from support import cuda_host
from support.loss_calls import PATHS, random_needs
from support.problems import DEVICE, draw_problem, make_problem, run
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_no_worse_than_torch

from grpo_kernels import backends, fused_linear_grpo_loss, grpo_loss_from_logits, reference

if cuda_host.why_unavailable() or DEVICE != "cpu":
    pytest.skip(cuda_host.why_unavailable() or "test_parity.py takes the backend on a GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    """backend="cuda" takes CPU tensors, and the kernels behind it are the shim's."""
    monkeypatch.setitem(backends._MODULES, "cuda", cuda_host)
    resolve = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda name, *more: name if name == "cuda" else resolve(name, *more))


@each_seed(0, 120, usual=24)
def test_float64_equals_the_reference(seed):
    rng = random.Random(seed)
    p = draw_problem(seed)
    needs, workspace = random_needs(rng, p), rng.choice((1, 700, 20_000, None))
    ours = run(fused_linear_grpo_loss, p, needs=needs, backend="cuda", workspace_bytes=workspace)
    truth = run(reference.grpo_loss, p, needs=needs)
    assert_all_close(ours.flat(), truth.flat(), 1e-10, hint=f"{needs} {workspace}")


@pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_path_is_no_worse_than_pytorch(config, dtype):
    p = make_problem(B=6, T=7, D=24, V=203, dtype=dtype, config=config, bias=True, lora=True, temperature=True)
    exact, plain = run(reference.grpo_loss, p, dtype=torch.float64).flat(), run(reference.grpo_loss, p).flat()
    floor = 2e-3 if dtype != torch.float32 else 1e-5
    for workspace in (1, 30_000, None):
        first, again = (run(fused_linear_grpo_loss, p, backend="cuda", workspace_bytes=workspace) for _ in range(2))
        for name, value in first.flat().items():
            assert torch.equal(value, again.flat()[name]), f"{name}: not the same bits"
            if name.startswith("gradient"):
                assert_no_worse_than_torch(f"{name} {workspace}", value, plain[name], exact[name], floor=floor)


@pytest.mark.parametrize("inplace", [False, True])
def test_given_logits(inplace):
    p = make_problem(B=3, T=5, V=203, config=PATHS["sequence"])
    gradients = []
    for backend in ("cuda", "torch"):
        logits = (p.hidden @ p.weight.T).requires_grad_()
        held = logits * 1
        grpo_loss_from_logits(held, p.completion_ids, p.advantages, p.mask, old_logps=p.old_logps, ref_logps=p.ref_logps,
                              config=p.config, backend=backend, inplace_backward=inplace).loss.backward()  # fmt: skip
        gradients.append({"dlogits": logits.grad})
    assert_all_close(*gradients, 1e-10)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("config", [PATHS["one pass"], PATHS["sequence"]], ids=["one pass", "sequence"])
def test_nan_is_a_nan_loss(config, where):
    p = make_problem(B=3, T=4, V=101, config=config)
    getattr(p, where).view(-1)[5] = float("nan")
    p.mask[0] = True
    assert run(fused_linear_grpo_loss, p, backend="cuda").loss.isnan()
