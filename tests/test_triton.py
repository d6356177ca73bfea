"""The Triton backend beside what test_row_kernels.py asks of every backend: where results go, launches, choice, compiled code."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from support.problems import DEVICE, make_problem, run
from support.row_kernels import NAN, Terms, acc, make_tile
from support.tolerance import assert_all_close

from grpo_kernels import GRPOLossConfig, available_backends, backends, devices, fused_linear_grpo_loss
from grpo_kernels.backends import triton
from grpo_kernels.backends.statistics import TILE_COLUMNS, Pairs, Scored, Tile, new_statistics
from grpo_kernels.engine import ops, products
from grpo_kernels.losses.config import LogitTransform as Transform
from grpo_kernels.losses.terms import PolicyRows

if triton.why_unavailable():
    pytest.skip(triton.why_unavailable(), allow_module_level=True)

ROWS, COLUMNS = 3, 2048 * 2 + 37  # two full blocks and a rest


def make(rows=ROWS, dtype=torch.float32):
    """(tile, rows of the policy, Scored of NaN) on the device."""
    tile = Tile(make_tile(rows, COLUMNS, dtype).to(DEVICE), torch.randint(0, COLUMNS, (rows,), device=DEVICE), Transform())
    old, ref, advantages, w_policy, w_kl = torch.randn(5, rows, dtype=dtype, device=DEVICE)
    policy_rows = PolicyRows(w_policy.abs(), advantages, -old.abs() - 4, -ref.abs() - 4, w_kl.abs())
    return tile, policy_rows, Scored(*torch.full((3, rows), NAN, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_gradient_in_other_memory_is_that_of_the_tile_rounded_once(narrow):
    tile, rows, scored = make()
    logits, out = tile.values.clone(), torch.full((ROWS, COLUMNS), NAN, dtype=narrow, device=DEVICE)
    triton.policy(tile, out, rows, Terms(), scored)
    assert torch.equal(tile.values, logits)
    triton.policy(tile, tile.values, rows, Terms(), scored)
    # the interpreter cuts the mantissa of a float16 off
    expected = tile.values.to(narrow)
    torch.testing.assert_close(out, expected, rtol=0 if narrow == torch.bfloat16 or DEVICE != "cpu" else 2**-10, atol=6e-8)


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


def test_the_launch_shapes_are_pure_functions():
    for columns in (1, 37, 1024, 2047, 2048, 8192, 16_383, 32_000, 65_536, 151_936, 262_144):
        for element_size in (2, 4, 8):
            shape = triton.launch_shape(columns, element_size)
            assert shape == triton.launch_shape(columns, element_size)
            assert shape.block & (shape.block - 1) == 0 and shape.block // (32 * shape.warps) in (4, 8)
            assert shape.warps in (4, 8, 16)
            policy, step = triton.policy_shape(columns, element_size), triton.step(False, element_size)
            assert policy == triton.policy_shape(columns, element_size) and policy.tiles in (1, 2, 4)
            assert triton.policy_shape(columns, element_size, capability=80).tiles == min(policy.tiles, 2)
            assert policy.block == policy.tiles * step and policy.warps == 4 * policy.tiles and TILE_COLUMNS % step == 0
    assert triton.policy_shape(151_936, 4) == triton.PolicyShape(8192, 16, 4), "one row per multiprocessor, so that the second read is cached"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_a_row_is_dealt_out_changes_no_bit(monkeypatch, dtype):
    """Fixed tiles side by side or one after another, the last ones of them missing or ragged; rows that start anywhere."""
    torch.manual_seed(3)
    for columns in (2 * TILE_COLUMNS, 5 * TILE_COLUMNS + 77):
        memory, target = torch.randn(3 * columns + 5, device=DEVICE).to(dtype), torch.tensor([3, 4096 + 9, columns - 1], device=DEVICE)
        memory[2 * columns + 700] = 30.0
        one, found = torch.ones(3, device=DEVICE), []
        for tiles, stride, start in ((1, columns, 0), (2, columns, 0), (4, columns, 0), (4, columns + 2, 1)):
            monkeypatch.setattr(triton, "policy_shape", lambda *_, n=tiles: triton.PolicyShape(n * 2048, 4 * n, n))
            frame = torch.zeros(3 * stride + start, dtype=dtype, device=DEVICE)
            values = frame.as_strided((3, columns), (stride, 1), start)
            values.copy_(memory[: 3 * columns].view(3, columns))
            scored, out = Scored(*torch.full((3, 3), NAN, device=DEVICE)), torch.empty(3, columns, dtype=dtype, device=DEVICE)
            tile = Tile(values, target, Transform(1.3, None, 0.7))
            triton.policy(tile, out, PolicyRows(one, one), Terms(kind="linear"), scored)
            stats = new_statistics(3, torch.float32, DEVICE)
            triton.statistics(tile, stats)
            closed = Scored(*torch.full((3, 3), NAN, device=DEVICE))
            triton.close(stats, closed)
            assert torch.equal(torch.stack(closed), torch.stack(scored))
            found.append((torch.stack(scored), out))
        for scores, out in found[1:]:
            assert torch.equal(scores, found[0][0]) and torch.equal(out, found[0][1])


def test_the_launch_shape_over_two_tiles_is_a_pure_function():
    """A thread's part of a step is a whole number of its loads."""
    for columns in (None, 1, 37, 1024, 8192, 151_936):
        for element_size in (2, 4, 8):
            shape = triton.divergence_shape(columns, element_size)
            assert shape == triton.divergence_shape(columns, element_size)
            each, load = shape.block // (32 * shape.warps), 1 if columns is None else 16 // element_size
            assert shape.block & (shape.block - 1) == 0 and each % load == 0 and each in (4, 8)


def test_the_launch_shapes_of_pairs_are_pure_functions():
    assert triton.launch_shape(None, 4) == triton.launch_shape(None, 8) == triton.LaunchShape(128, 1)
    for rows in (1, 40, 1024, 8191, 8192, 65_536, 1 << 20):
        for count in (0, 1, 100, 10_000, 1 << 24):
            for element_size in (2, 4, 8):
                logits = triton.logits_shape(rows, count, element_size)
                sums = triton.sums_shape(rows, count, element_size)  # of so many columns
                assert logits == triton.logits_shape(rows, count, element_size)
                assert sums == triton.sums_shape(rows, count, element_size)
                for shape in (logits, sums):
                    assert all(n & (n - 1) == 0 for n in (logits.rows, shape.pairs, shape.block))
                    assert shape.block * element_size % (32 * 16) == 0, "whole 16-byte loads of each thread"
                assert 1 <= logits.programs <= 128 and 1 <= sums.rows <= 32 and sums.programs * sums.block >= count
    assert triton.sums_shape(1024, 4096, 2).rows == 1, "few rows, a program each"
    assert triton.sums_shape(1 << 20, 4096, 2).rows == 32, "most of them without a pair"


def make_pairs(dtype=torch.float32, start=0):
    """(Pairs, hidden, weight, g), the vectors ``start`` elements behind an aligned address."""
    lengths = torch.tensor([2, 0, 41, 1, 0, 9, 3, 100, 1, 16])
    last = lengths.cumsum(0)

    def moved(x):
        return torch.cat([x.new_zeros(start, *x.shape[1:]), x]).to(DEVICE)[start:]

    ids, rows, g = torch.randint(-1, 31, (int(last[-1]),)), torch.randperm(len(lengths)), torch.randn(int(last[-1]), dtype=acc(dtype))
    hidden, weight = (torch.randn(n, 150, dtype=torch.float64).to(dtype).to(DEVICE) for n in (len(lengths), 30))
    return Pairs(moved(ids), moved(torch.stack([last - lengths, last], 1)), moved(rows)), hidden, weight, moved(g)


def of_pairs(pairs, hidden, weight, g):
    logits, sums = torch.full_like(g, NAN), torch.zeros_like(hidden)
    triton.pair_logits(pairs, hidden, weight, logits, scale=0.3)
    triton.pair_sums(pairs, g, weight, sums, scale=0.3)
    return logits, sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_how_pairs_are_dealt_out_changes_no_bit(monkeypatch, dtype):
    problem, logits_shape, sums_shape = make_pairs(dtype), triton.logits_shape, triton.sums_shape
    logits, sums = of_pairs(*problem)
    assert not torch.isnan(logits).any()
    for rows, programs in ((32, 1), (4, 3), (1, 7)):
        monkeypatch.setattr(triton, "logits_shape", lambda *a, r=rows, p=programs: dataclasses.replace(logits_shape(*a), rows=r, programs=p))
        monkeypatch.setattr(triton, "sums_shape", lambda *a, r=rows: dataclasses.replace(sums_shape(*a), rows=r))
        again = of_pairs(*problem)
        assert torch.equal(again[0], logits) and torch.equal(again[1], sums)


def test_ranges_and_pairs_start_at_any_element():
    torch.manual_seed(1)
    expected = of_pairs(*make_pairs())
    torch.manual_seed(1)
    found = of_pairs(*make_pairs(start=1))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    values = torch.randn(3001, device=DEVICE)
    ranges = torch.tensor([[0, 1], [1, 3], [3, 2500], [2501, 2630], [2630, 3000]], device=DEVICE)
    target = torch.tensor([0, 1, 130, 127, 369], device=DEVICE)
    stats = new_statistics(10, torch.float32, DEVICE).view(2, 5, 4)
    triton.statistics(Tile(values[:3000], target, Transform(), ranges=ranges), stats[0])
    triton.statistics(Tile(torch.cat([values[:1], values])[1:], target, Transform(), ranges=ranges), stats[1])
    assert torch.equal(stats[0], stats[1]) and stats.isfinite().all()
    for (first, last), column, row in zip(ranges.tolist(), target.tolist(), stats[0], strict=True):
        x = values[first:last].double()
        assert row[0] == x.max() and row[3] == x[column]
        torch.testing.assert_close(row[1].double(), (x - x.max()).exp().sum() - (x[column] - x.max()).exp(), rtol=1e-5, atol=1e-6)


def test_an_empty_range_leaves_statistics_alone():
    values, ranges = torch.randn(4, device=DEVICE), torch.tensor([[4, 4], [0, 4]], device=DEVICE)
    stats = torch.stack([torch.tensor([1.0, 2.0, -0.5, 0.5]), torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])]).to(DEVICE)
    before = stats.clone()
    triton.statistics(Tile(values, torch.zeros(2, dtype=torch.int64, device=DEVICE), Transform(), ranges=ranges), stats)
    torch.testing.assert_close(stats[0], before[0], rtol=1e-6, atol=0)
    assert stats[1, 0] == values.max() and stats[1, 3] == values[0]


def test_the_backend_is_chosen_by_device_and_named_ones_are_never_replaced(monkeypatch):
    monkeypatch.delenv("GRPO_KERNELS_BACKEND", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert available_backends()["triton"] is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert backends.resolve("auto", gpu, dtype) == ("torch" if triton.interpreted() else "triton")
    if triton.interpreted():
        assert backends.resolve("auto", cpu, torch.float32) in ("cpu", "torch"), "the interpreter is for those who name it"
        assert backends.resolve("triton", cpu, torch.float32) == "triton"
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            backends.resolve("triton", gpu, torch.float32)
        monkeypatch.setattr(triton, "interpreted", lambda: False)
        assert "TRITON_INTERPRET=1" in available_backends()["triton"] or torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="'triton' cannot be used"):
            backends.resolve("triton", cpu, torch.float32)
    monkeypatch.setattr(triton, "_import_error", lambda: "ImportError: libtriton.so")
    assert "pip install triton" in available_backends()["triton"]
    assert backends.resolve("auto", gpu, torch.float32) == "torch"


def test_a_record_chooses_between_triton_and_cuda(monkeypatch, tmp_path):
    def row(provider, vocab, seconds, rows=100, status="ok", path="policy"):
        return dict(kind="kernel", provider=provider, path=path, shape={"rows": rows, "vocab": vocab}, median=seconds, status=status,
                    device="NVIDIA H200")  # fmt: skip

    rows = [row("triton", 32_000, 1.0), row("cuda", 32_000, 2.0), row("triton", 151_936, 2.0), row("cuda", 151_936, 1.0),
            row("triton", 262_144, 1.0), row("cuda", 262_144, 1.0, status="wrong"), row("cuda", 32_000, 0.1, path="gradient")]  # fmt: skip
    file = tmp_path / "devices.json"
    file.write_text('{"NVIDIA A100": {"tflops": 240.0, "fastest": {"32000": "triton"}}}')
    devices.adopt(rows, file)
    devices.adopt([], file)
    found = json.loads(file.read_text())
    assert found["NVIDIA H200"] == {"fastest": {"32000": "triton", "151936": "cuda"}}
    assert found["NVIDIA A100"] == {"tflops": 240.0, "fastest": {"32000": "triton"}}

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.delenv("GRPO_KERNELS_BACKEND", raising=False)
    choose = lambda vocab: backends.resolve("auto", gpu, torch.bfloat16, vocab)  # noqa: E731
    monkeypatch.setattr(devices, "FILE", tmp_path / "none.json")
    assert choose(151_936) == "triton", "without a record"
    monkeypatch.setattr(devices, "FILE", file)
    assert [choose(vocab) for vocab in (1000, 32_000, 128_256, 262_144)] == ["triton", "triton", "cuda", "cuda"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    assert choose(151_936) == "triton", "a record of other devices"
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: "no" if name == "cuda" else None)
    assert choose(151_936) == "triton"
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: "no" if name == "triton" else None)
    assert choose(32_000) == "cuda"


def test_wrong_arguments_are_refused():
    tile, rows, scored = make()
    values, g, stats = tile.values, scored.lse, new_statistics(ROWS, torch.float32, DEVICE)
    square, frame = torch.zeros(ROWS, ROWS, device=DEVICE), torch.zeros(2 * ROWS, COLUMNS, device=DEVICE)
    narrow = values.view(torch.bfloat16)[:, :COLUMNS]
    changed = lambda **changes: dataclasses.replace(tile, **changes)  # noqa: E731
    bad = {
        "tile's columns": lambda: triton.statistics(changed(values=square.T), stats),
        "stats": lambda: triton.statistics(tile, stats[:2]),
        "stats ": lambda: triton.statistics(tile, stats.double()),
        " stats": lambda: triton.statistics(tile, stats.to("meta")),
        "target": lambda: triton.statistics(changed(target=tile.target.int()), stats),
        "bias": lambda: triton.statistics(changed(bias=torch.zeros(7, device=DEVICE)), stats),
        "temperature": lambda: triton.statistics(changed(temperature=g.double()), stats),
        "g must": lambda: triton.gradient(tile, values, scored, g[:2]),
        "lse": lambda: triton.gradient(tile, values, scored._replace(lse=g[:2]), g),
        "out must": lambda: triton.gradient(tile, values[:, :4], scored, g),
        "out": lambda: triton.gradient(tile, torch.empty(ROWS, COLUMNS, dtype=torch.float64, device=DEVICE), scored, g),
        "out's columns": lambda: triton.gradient(tile, values[:1].expand(ROWS, -1), scored, g),
        "own memory": lambda: triton.gradient(tile, narrow, scored, g),
        "other": lambda: triton.gradient(changed(values=frame[:ROWS]), frame[1 : ROWS + 1], scored, g),
        "other memory": lambda: triton.policy(tile, narrow, rows, Terms(), scored),
        "entropy": lambda: triton.policy(tile, values, rows, Terms(), scored._replace(entropy=g.bfloat16())),
        "advantages": lambda: triton.policy(tile, values, dataclasses.replace(rows, advantages=None), Terms(), scored),
        "w_kl": lambda: triton.policy(tile, values, dataclasses.replace(rows, w_kl=None), Terms(), scored),
    }
    pairs, hidden, weight, factors = make_pairs()
    replaced = lambda **changes: dataclasses.replace(pairs, **changes)  # noqa: E731
    bad |= {
        "ids": lambda: triton.pair_sums(replaced(ids=pairs.ids.int()), factors, weight, hidden),
        "ranges": lambda: triton.pair_sums(replaced(ranges=pairs.ranges[:, :1]), factors, weight, hidden),
        "rows": lambda: triton.pair_logits(replaced(rows=pairs.rows[1:]), hidden, weight, factors),
        "per_pair": lambda: triton.pair_logits(pairs, hidden, weight, factors[1:]),
        "per_row": lambda: triton.pair_logits(pairs, hidden[:, 1:], weight, factors),
        "whole rows": lambda: triton.policy(changed(values=g, ranges=pairs.ranges[:ROWS].contiguous()), g, rows, Terms(), scored),
    }
    tile.values[:] = 1.0
    for name, call in bad.items():
        with pytest.raises(AssertionError, match=name.strip()):
            call()
    assert (tile.values == 1).all()


def test_tiles_without_rows_launch_nothing():
    tile, rows, scored = make(rows=0)
    triton.statistics(tile, new_statistics(0, torch.float32, DEVICE))
    triton.gradient(tile, tile.values, scored, scored.lse)
    triton.policy(tile, tile.values, rows, Terms(), scored)


def test_the_same_input_gives_the_same_bits():
    tile, rows, scored = make()
    out = torch.empty(2, ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
    triton.policy(tile, out[0], rows, Terms(), scored)
    once = torch.stack(scored)
    triton.policy(tile, out[1], rows, Terms(), scored)
    assert torch.equal(out[0], out[1]) and torch.equal(once, torch.stack(scored))


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
