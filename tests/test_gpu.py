"""What only a GPU can show: sizes beyond the interpreter, no host synchronisation, CUDA graphs, memory, compiled models."""

import pytest
import torch
from support.problems import make_problem, run
from support.tolerance import assert_all_close, assert_close

from grpo_kernels import GRPOLossConfig, backends, fused_linear_grpo_loss, linear_logprobs
from grpo_kernels.backends.statistics import Tile, finalize, new_statistics
from grpo_kernels.engine import products
from grpo_kernels.losses.config import LogitTransform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GIB = 2**30
PATHS = {
    "one pass": GRPOLossConfig(beta=0.05, delta=2.2),
    "on-policy": GRPOLossConfig(),
    "sequence": GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence", beta=0.05),
    "entropy": GRPOLossConfig(loss_type="cispo", entropy_coef=0.1, epsilon_high=2.1),
    "quantile": GRPOLossConfig(top_entropy_quantile=0.57),
}
every_path = pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = backends.available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def inputs(rows, depth, vocab, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(1, rows, depth, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(vocab, depth, generator=g, device="cuda") * 3 / depth**0.5).to(dtype)
    ids = torch.randint(0, vocab, (1, rows), generator=g, device="cuda")
    return hidden, weight, ids


def exact_logprobs(hidden, weight, ids, rows):
    """(logps, entropy) in float64 of the given rows."""
    z = hidden[0, rows].double() @ weight.double().T
    log_p = z.log_softmax(-1)
    return log_p.gather(1, ids[0, rows].unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(1)


def test_products_write_and_add_float32():
    """The facts that the plan for a GPU stands on, on this PyTorch."""
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.bfloat16, torch.float16):
        assert products.float32_products(device, dtype), "torch.mm(out_dtype=torch.float32)"
        a, b = (torch.randn(64, 64, device="cuda").to(dtype) for _ in range(2))
        out = torch.ones(64, 64, device="cuda")
        products.multiply(a, b, out, add=True, alpha=0.5)
        assert_close("sum", out, 1 + 0.5 * a.double() @ b.double(), 1e-6)
    print("float32 sums:", products.float32_sums(device, torch.bfloat16))


@pytest.mark.parametrize("vocab", [151_936, 262_144, 128_257])
def test_large_vocabularies(backend, vocab):
    hidden, weight, ids = inputs(257, 128, vocab)
    out = linear_logprobs(hidden, weight, ids, backend=backend)
    rows = torch.tensor([0, 100, 256], device="cuda")
    logps, entropy = exact_logprobs(hidden, weight, ids, rows)
    assert (out.logps[0, rows] - logps).abs().max() < 1e-5 and (out.entropy[0, rows] - entropy).abs().max() < 1e-4


def test_a_tile_beyond_two_to_the_31_elements(backend):
    """Row offsets in 64 bits: 17,000 rows of 131,072 columns in one tile."""
    rows, vocab, kernels = 17_000, 131_072, backends.kernels(backend)
    tile = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16)
    for part in tile.split(1000):
        part.normal_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    stats = new_statistics(rows, torch.float32, "cuda")
    kernels.statistics(Tile(tile, target, LogitTransform()), stats)
    scored = finalize(stats)
    last = tile[-3:].double()
    assert_close("lse", scored.lse[-3:], last.logsumexp(1), 1e-6)
    g = torch.zeros(rows, device="cuda")
    g[-1] = 1.0
    expected = torch.nn.functional.one_hot(target[-1], vocab) - last[-1].softmax(0)
    kernels.gradient(Tile(tile, target, LogitTransform()), tile, scored, g)
    assert_close("gradient", tile[-1], expected, 1e-2)
    assert not tile[: rows - 1].any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_seventy_thousand_rows(backend, level):
    """More rows than a grid's second axis has, and than one tile holds."""
    rows, depth, vocab = 70_000, 64, 4099
    hidden, weight, ids = inputs(rows, depth, vocab)
    hidden, ids = hidden.view(70, 1000, depth), ids.view(70, 1000)
    advantages, mask = torch.linspace(-1, 1, 70, device="cuda"), torch.ones(70, 1000, device="cuda", dtype=torch.bool)
    config = GRPOLossConfig(importance_sampling_level=level, loss_type="grpo")
    results = []
    for name, dtype in ((backend, torch.bfloat16), ("torch", torch.float32)):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        with torch.no_grad():
            old = linear_logprobs(h, w, ids, backend=name).logps if not results else results[0]["old"]
        out = fused_linear_grpo_loss(h, w, ids, advantages, mask, old_logps=old, config=config, backend=name)
        out.loss.backward()
        results.append({"loss": out.loss, "logps": out.logps, "dH": h.grad, "dW": w.grad, "old": old})
    ours, truth = results
    assert_all_close({k: ours[k] for k in ("logps", "old")}, {k: truth[k] for k in ("logps", "old")}, 1e-5)
    assert_all_close({k: ours[k] for k in ("dH", "dW")}, {k: truth[k] for k in ("dH", "dW")}, 8e-3)


@every_path
def test_the_same_call_twice_gives_the_same_bits(backend, config):
    p = make_problem(B=6, T=40, D=64, V=5003, dtype=torch.bfloat16, config=config)
    for workspace in (2_000_000, None):
        first, again = (run(fused_linear_grpo_loss, p, backend=backend, workspace_bytes=workspace).flat() for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


@every_path
def test_nothing_synchronises_with_kept_rows(backend, config):
    """The forward, for every path; the backward of one pass. (A two-phase backward reads once which rows have a gradient.)"""
    p = make_problem(B=4, T=16, D=32, V=503, dtype=torch.bfloat16, config=config)
    positional, keywords, _ = p.arguments()
    keywords |= dict(kept_rows=p.kept_rows(), backend=backend)
    fused_linear_grpo_loss(*positional, **keywords).loss.backward()  # compiles, and asks once what the products can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fused_linear_grpo_loss(*positional, **keywords)
        if config in (PATHS["one pass"], PATHS["on-policy"], PATHS["entropy"]):
            out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.loss.isfinite()


@every_path
@pytest.mark.parametrize("packed_layout", [False, True])
def test_a_cuda_graph_captures_forward_and_backward(backend, config, packed_layout):
    from support.problems import packed

    p = make_problem(B=4, T=16, D=32, V=503, dtype=torch.bfloat16, config=config)
    p = packed(p) if packed_layout else p
    positional, keywords, leaves = p.arguments()
    keywords |= dict(kept_rows=p.kept_rows(), backend=backend)

    def step():
        for leaf in leaves.values():
            leaf.grad = None
        out = fused_linear_grpo_loss(*positional, **keywords)
        out.loss.backward()
        return out.loss, *(leaf.grad for leaf in leaves.values())

    expected = [x.detach().clone() for x in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    # bf16 gradients: without a graph rows that train nothing are left out, which changes the order of the sums
    for ours, truth in zip(results, expected, strict=True):
        assert_close("replayed", ours, truth, 2e-3)
    with torch.no_grad():  # other numbers in the same memory
        positional[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    changed = [x.detach().clone() for x in results]
    for ours, truth in zip(changed, step(), strict=True):
        assert_close("replayed with other numbers", ours, truth, 2e-3)


@pytest.mark.inductor
@every_path
def test_compiled_without_a_graph_break(backend, config):
    torch._dynamo.reset()
    p = make_problem(B=4, T=16, D=32, V=503, dtype=torch.bfloat16, config=config)
    plain = run(fused_linear_grpo_loss, p, backend=backend)
    compiled = torch.compile(lambda *a, **k: fused_linear_grpo_loss(*a, **k, backend=backend), fullgraph=True)
    assert_all_close(run(compiled, p).flat(), plain.flat(), 2e-3)


@pytest.mark.parametrize("path", ["one pass", "recomputed", "frozen", "log-probs"])
def test_peak_memory_is_the_documented_one(backend, path):
    """Beyond the inputs: the gradients that are asked for, the float32 sums behind them, and the workspace.

    A quarter of the rows has advantage 0 and is only scored.
    """
    rows, depth, vocab = 4096, 1024, 151_936
    hidden, weight, ids = inputs(rows, depth, vocab)
    advantages = (torch.arange(rows, device="cuda") % 4 != 0).float().unsqueeze(0)
    mask = torch.ones(1, rows, device="cuda", dtype=torch.bool)
    old = torch.full((1, rows), -5.0, device="cuda")
    config = GRPOLossConfig(importance_sampling_level="sequence" if path == "recomputed" else "token", loss_type="grpo")
    advantages = advantages[:, 1] if path == "recomputed" else advantages

    def call():
        if path == "log-probs":
            with torch.no_grad():
                return linear_logprobs(hidden, weight, ids, backend=backend)
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(path != "frozen")
        fused_linear_grpo_loss(h, w, ids, advantages, mask, old_logps=old, config=config, backend=backend).loss.backward()
        return h.grad, w.grad

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()  # noqa: F841 - the gradients live until the peak is read
    peak = torch.cuda.max_memory_allocated() - before
    dh, dw, workspace = rows * depth * 2, vocab * depth * 2, 0.75 * GIB
    documented = {"one pass": dh + 2 * dw, "recomputed": dh + dw, "frozen": dh, "log-probs": 0}[path] + workspace
    assert peak <= documented + 0.05 * GIB, f"{peak / GIB:.2f} GiB, documented {documented / GIB:.2f}"


def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    hidden, weight, ids = (x.to("cuda:1") for x in inputs(8, 16, 301))
    assert linear_logprobs(hidden, weight, ids, backend=backend).logps.isfinite().all()


def test_auto_takes_the_triton_kernels():
    if backends.available_backends()["triton"] is not None:
        pytest.skip("needs Triton")
    assert backends.resolve("auto", torch.device("cuda"), torch.bfloat16) == "triton"
