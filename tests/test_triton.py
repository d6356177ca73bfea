"""The Triton backend beside what test_row_kernels.py asks of every backend: where results go, launches, choice, compiled code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import DEVICE, make_problem, run
from row_kernels import make_tile, new_stats
from test_row_kernels import Terms, Transform, log_probs
from tolerance import assert_all_close

from grpo_kernels import GRPOLossConfig, available_backends, backends, fused_linear_grpo_loss
from grpo_kernels.backends import triton
from grpo_kernels.backends.pytorch import statistics as torch_statistics
from grpo_kernels.engine import ops, products

if triton.why_unavailable():
    pytest.skip(triton.why_unavailable(), allow_module_level=True)

SENTINEL = 12345.0
ROWS, COLUMNS = 3, 2048 * 2 + 37  # two full blocks and a rest


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


def rows_of(n, device=DEVICE):
    vector = torch.randn(5, n, device=device)
    return SimpleNamespace(old=-vector[0].abs() - 4, ref=-vector[1].abs() - 4, advantages=vector[2], w_policy=vector[3].abs(),
                           w_kl=vector[4].abs(), w_entropy=None)  # fmt: skip


def in_frame(values, spare=11):
    """The values inside a larger block of memory whose every other element is the sentinel: (tile, frame)."""
    rows, columns = values.shape
    frame = torch.full((rows + 2, columns + spare), SENTINEL, dtype=values.dtype, device=values.device)
    tile = frame[1 : rows + 1, :columns]
    tile.copy_(values)
    return tile, frame


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_gradient_lies_over_the_logits_and_nothing_else_is_written(narrow):
    logits = make_tile(ROWS, COLUMNS, torch.float32).to(DEVICE)
    target, rows = torch.randint(0, COLUMNS, (ROWS,), device=DEVICE), rows_of(ROWS)
    logps, entropy = torch.empty(2, ROWS, device=DEVICE)
    plain = logits.clone()
    triton.policy(plain, target, rows, Terms(), Transform(), logps, entropy)

    tile, frame = in_frame(logits)
    out = tile.view(narrow)[:, :COLUMNS]
    triton.policy(tile, target, rows, Terms(), Transform(), logps, entropy, out=out)
    torch.testing.assert_close(out.float(), plain, rtol=2**-7 if narrow == torch.bfloat16 else 2**-10, atol=6e-8)
    assert (frame[0] == SENTINEL).all() and (frame[-1] == SENTINEL).all() and (frame[1:-1, COLUMNS:] == SENTINEL).all()
    # behind the gradient the second half of the logits stands as it was
    assert torch.equal(tile[:, COLUMNS // 2 + 1 :], logits[:, COLUMNS // 2 + 1 :])


def test_probabilities_go_to_memory_of_their_own():
    logits = make_tile(ROWS, COLUMNS, torch.float32).to(DEVICE)
    target = torch.randint(0, COLUMNS, (ROWS,), device=DEVICE)
    tile, tile_frame = in_frame(logits)
    out, out_frame = in_frame(torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE), spare=3)
    stats, expected = new_stats(ROWS, torch.float32).to(DEVICE), new_stats(ROWS, torch.float32).to(DEVICE)
    triton.statistics(tile, stats, target, Transform(softcap=5.0), probs=True, out=out)
    by_torch = logits.clone()
    torch_statistics(by_torch, expected, target, Transform(softcap=5.0), probs=True)
    torch.testing.assert_close(out.float(), by_torch, rtol=5e-3, atol=1e-9)
    torch.testing.assert_close(stats, expected)
    assert torch.equal(tile, logits)
    for frame in (tile_frame, out_frame):
        assert (frame[0] == SENTINEL).all() and (frame[-1] == SENTINEL).all() and (frame[1:-1, COLUMNS:] == SENTINEL).all()


def test_tiles_hold_float32_and_log_probs_are_never_rounded_to_bfloat16():
    """On exact products, the log-probs of bf16 inputs are float32's; a bf16 tile would be off by 1e-2."""
    p = make_problem(B=3, T=4, D=16, V=301, dtype=torch.bfloat16, config=GRPOLossConfig(), spread=4.0, confident=False)
    exact = run(fused_linear_grpo_loss, p, dtype=torch.float64, backend="torch").logps
    for backend in ("triton", "torch") if DEVICE != "cpu" else ("triton",):
        assert (run(fused_linear_grpo_loss, p, backend=backend).logps.cpu() - exact.cpu()).abs().max() < 1e-5
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, device=DEVICE)
    assert products.tile_dtype(weight, "triton") == torch.float32
    assert products.tile_dtype(weight.float(), "triton") == torch.float32 and products.tile_dtype(weight.double(), "triton").itemsize == 8
    if DEVICE == "cpu":
        assert products.tile_dtype(weight, "cpu") == products.tile_dtype(weight, "torch") == torch.bfloat16


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_float16_equals_the_other_backend(level, needs):
    config = GRPOLossConfig(importance_sampling_level=level, loss_type="grpo", beta=0.1)
    p = make_problem(B=3, T=4, D=16, V=67, dtype=torch.float16, config=config, bias=True)
    for workspace in (3000, None):
        ours = run(fused_linear_grpo_loss, p, needs=needs, backend="triton", workspace_bytes=workspace)
        truth = run(fused_linear_grpo_loss, p, dtype=torch.float64, needs=needs, backend="torch")
        assert_all_close(ours.flat(), truth.flat(), 4e-3)


def test_the_launch_shape_is_a_pure_function():
    for columns in (1, 37, 1024, 2047, 2048, 8192, 16_383, 32_000, 65_536, 151_936, 262_144):
        for element_size in (2, 4, 8):
            for reads in (1, 2):
                shape = triton.launch_shape(columns, element_size, reads)
                assert shape == triton.launch_shape(columns, element_size, reads)
                assert shape.block & (shape.block - 1) == 0 and shape.block // (32 * shape.warps) in (4, 8)
                assert shape.warps in (4, 8, 16, 32)
    assert triton.launch_shape(151_936, 4, 2).warps == 32, "one row per multiprocessor, so that the second read is cached"


def test_the_backend_is_chosen_by_device_and_named_ones_are_never_replaced(monkeypatch):
    monkeypatch.delenv("GRPO_KERNELS_BACKEND", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert available_backends()["triton"] is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert backends.resolve("auto", gpu, dtype) == ("torch" if triton.INTERPRETED else "triton")
    if triton.INTERPRETED:
        assert backends.resolve("auto", cpu, torch.float32) in ("cpu", "torch"), "the interpreter is for those who name it"
        assert backends.resolve("triton", cpu, torch.float32) == "triton"
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            backends.resolve("triton", gpu, torch.float32)
        monkeypatch.setattr(triton, "INTERPRETED", False)
        assert "TRITON_INTERPRET=1" in available_backends()["triton"] or torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="'triton' cannot be used"):
            backends.resolve("triton", cpu, torch.float32)
    monkeypatch.setattr(triton, "kernels", None)
    assert "pip install triton" in available_backends()["triton"]
    assert backends.resolve("auto", gpu, torch.float32) == "torch"


def test_a_record_chooses_between_triton_and_cuda(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))  # benchmarks/ is no part of the package
    from benchmarks.gpu import fastest

    def row(provider, vocab, seconds, rows=100, status="ok", path="policy"):
        return dict(provider=provider, path=path, shape={"rows": rows, "vocab": vocab}, median=seconds, status=status)

    rows = [row("triton", 32_000, 1.0), row("cuda", 32_000, 2.0), row("triton", 151_936, 2.0), row("cuda", 151_936, 1.0),
            row("triton", 262_144, 1.0), row("cuda", 999, 1.0, status="wrong"), row("cuda", 32_000, 0.1, path="gradient")]  # fmt: skip
    content = {"capability": [9, 0], "parts": {"kernels": {"rows": rows}}}
    path = tmp_path / "fastest.json"
    path.write_text('{"8.0": {"32000": "triton"}}')
    assert fastest.write(content, path) and not fastest.write({"capability": [9, 0], "parts": {}}, path)
    found = json.loads(path.read_text())
    assert found == {"8.0": {"32000": "triton"}, "9.0": {"32000": "triton", "151936": "cuda"}}

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: None)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("GRPO_KERNELS_BACKEND", raising=False)
    choose = lambda vocab: backends.resolve("auto", gpu, torch.bfloat16, vocab)  # noqa: E731
    monkeypatch.setattr(backends, "_fastest", {})
    assert choose(151_936) == "triton", "without a record"
    monkeypatch.setattr(backends, "_fastest", found)
    assert [choose(vocab) for vocab in (1000, 32_000, 128_256, 262_144)] == ["triton", "triton", "cuda", "cuda"]
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: "no" if name == "cuda" else None)
    assert choose(151_936) == "triton"
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: "no" if name == "triton" else None)
    assert choose(32_000) == "cuda"


def test_wrong_arguments_are_refused():
    tile, target, stats = torch.zeros(3, 8, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE), new_stats(3, torch.float32).to(DEVICE)
    vectors = [torch.zeros(3, device=DEVICE)] * 4
    bad = [
        lambda: triton.statistics(tile.T, stats, target, Transform()),
        lambda: triton.statistics(tile, stats[:2], target, Transform()),
        lambda: triton.statistics(tile, stats.double(), target, Transform()),
        lambda: triton.statistics(tile, stats, target.int(), Transform()),
        lambda: triton.statistics(tile, stats, target, Transform(), bias=torch.zeros(7, device=DEVICE)),
        lambda: triton.statistics(tile, stats.to("meta"), target, Transform()),
        lambda: triton.gradient(tile, target, *vectors, None, Transform(), out=tile[:, :4]),
        lambda: triton.gradient(tile, target, *vectors, None, Transform(), out=tile.view(-1)[: 3 * 8].view(torch.bfloat16)[:24].view(3, 8)),
        lambda: triton.gradient(tile, target, *[v[:2] for v in vectors], None, Transform()),
    ]
    for call in bad:
        with pytest.raises(AssertionError):
            call()


def test_a_row_of_the_policy_kernel_equals_the_objective_of_its_log_probs():
    """One launch against three of the readable backend, at a width of several blocks."""
    logits = make_tile(4, COLUMNS, torch.float64).to(DEVICE)
    target, rows = torch.randint(0, COLUMNS, (4,), device=DEVICE), rows_of(4)
    rows = SimpleNamespace(**{k: None if v is None else v.double() for k, v in vars(rows).items()})
    exact, _ = log_probs(logits, target)
    results = []
    for kernels in (triton, backends.kernels("torch")):
        tile, out = logits.clone(), torch.empty(2, 4, dtype=torch.float64, device=DEVICE)
        kernels.policy(tile, target, rows, Terms(delta=1.5), Transform(), *out)
        results.append({"dz": tile, "logps": out[0], "entropy": out[1]})
    assert_all_close(*results, 1e-12)
    torch.testing.assert_close(results[0]["logps"], exact, rtol=1e-12, atol=1e-12)


def test_scaling_in_place():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(3 * 8192 + 5, device=DEVICE).to(dtype)
        for scale in (1.0, -0.25, 0.0, float("nan")):
            scale, ours = torch.tensor(scale, dtype=accumulate, device=DEVICE), x.clone()
            triton.scale_(ours, scale)
            torch.testing.assert_close(ours, (x.to(accumulate) * scale).to(dtype), rtol=0, atol=0, equal_nan=True)
    triton.scale_(torch.empty(0, device=DEVICE), torch.ones((), device=DEVICE))


def test_stash_rows_are_moved_to_the_front_in_order():
    stash = torch.arange(12.0).repeat_interleave(3).view(12, 3)
    for kept in ([0, 1, 2], [3, 7, 11], [11], list(range(1, 12)), []):
        moved = ops._compacted(stash.clone(), torch.tensor(kept, dtype=torch.long))
        assert torch.equal(moved, stash[kept])


@pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter")
def test_without_the_interpreter_the_reason_is_given():
    code = ("import torch; from grpo_kernels import fused_linear_grpo_loss as f; z = torch.zeros;"
            "f(z(1, 1, 2), z(3, 2), z(1, 1).long(), z(1), z(1, 1), backend='triton')")  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    run_alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "RuntimeError: backend 'triton' cannot be used: there is no GPU" in run_alone.stderr
