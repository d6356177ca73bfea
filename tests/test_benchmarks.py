"""`grpo-kernels bench` on a vocabulary of a thousand, in seconds: its figures mean nothing here, but for the memory column."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_kernels import cli
from grpo_kernels.bench import clock as clocks
from grpo_kernels.bench import floor, measure, memory, providers, record, scaling, step, step_process, table, workloads
from grpo_kernels.bench.floor import Floor
from grpo_kernels.bench.problem import make_problem, truth
from grpo_kernels.bench.providers import PROVIDERS, Provider
from grpo_kernels.bench.shapes import TINY, Shape, parse
from grpo_kernels.bench.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
KEYS = {"provider", "path", "shape", "median", "spread", "peak_bytes", "error", "versions", "commit"}
# with every core spoken for, two threads wait for each other far longer than they compute
# and benchmarks cannot be run by a worker of pytest-xdist, which they would take themselves for
OUTER = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
ENVIRONMENT = {**OUTER, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak mark is a file of Linux")
pytestmark = pytest.mark.unpoisoned


def python(*arguments, **environment):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.exhaustive(reason="twenty seconds: measures two workloads in processes of their own")
@linux
def test_the_command_from_end_to_end(tmp_path, capsys):
    file, pictures = tmp_path / "rows.json", tmp_path / "pictures"
    options = ("bench", "--tiny", "--quick", "--rounds", "2", "--workloads", "dense,realistic", "--providers", "grpo_kernels,full_logits,cce")
    out = python("-m", "grpo_kernels", *options, "--json", str(file), "--plot", str(pictures))
    rows = json.loads(file.read_text())
    assert [(r["path"], r["provider"]) for r in rows] == [
        (w, p) for w in ("dense", "realistic") for p in ("products", "grpo_kernels", "full_logits", "cce")
    ]
    assert all(r.keys() >= KEYS and r["shape"]["vocab"] == 1009 for r in rows)
    for r in rows:
        if r["provider"] == "cce":
            assert r["status"] == "absent" and r["note"] in out
            continue
        assert r["status"] == "ok" and r["median"] > 0 and r["ratio"] > 0 and r["rounds"] == 2
        assert (r["error"] is None) == (r["peak_bytes"] is None) == (r["provider"] == "products")
        assert (r["settings"].keys() >= {"rows", "columns", "contiguous"}) == (r["provider"] == "products")
    assert "the fastest of" in out
    assert {f.name for f in pictures.iterdir()} == {"time.svg"}
    assert all(f.stat().st_size < 100_000 for f in pictures.iterdir())
    assert cli.main(["bench", "--from", str(file), "--plot", str(tmp_path / "again")]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("  grpo_kernels")] == [
        line for line in out.splitlines() if line.startswith("  grpo_kernels")
    ]
    assert (tmp_path / "again" / "time.svg").read_bytes() == (pictures / "time.svg").read_bytes()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--workloads", "dens"], ["'dens'", "did you mean dense"]),
        (["--providers", "ligr,trl"], ["'ligr'", "did you mean liger", "known are", "torch-lce"]),
        (["--providers", "nope"], ["'nope'", "known are", "torch-lce"]),
        (["--backend", "cuda"], ["--backend cuda", "--help"]),
        (["--shapes", "qwen2.5-0.6b"], ["'qwen2.5-0.6b'", "qwen2.5-0.5b"]),
        (["--shapes", "100x8x64"], ["multiples of 64", "100x8x64"]),
        (["--tokens", "100"], ["multiple of 64"]),
        (["--rounds", "0"], ["--rounds", "at least 1"]),
        (["--from", "nowhere.json"], ["nowhere.json"]),
        (["--workloads", ""], ["--workloads", "nothing"]),
        (["--json", "."], ["--json", "folder"]),
        (["--from", "x.json", "--json", "y.json"], ["--from", "--json"]),
        (["--step", "--workloads", "dense"], ["--step", "a workload of their own"]),
    ],
)
def test_what_is_wrong_is_named(capsys, argv, words):
    assert cli.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and len(err) < 700 and all(word in err for word in words), err


def test_shapes_by_name_and_by_numbers():
    assert parse("Qwen3-8B", 1024) == Shape(length=128, depth=4096, vocab=151_936)
    assert parse("64x16x101", 1024).fields() == {"tokens": 64, "depth": 16, "vocab": 101, "dtype": "bfloat16"}
    assert all(workloads.WORKLOADS[w].laid_out(parse(f"{n}x16x101", 0)).tokens == n for w in WORKLOADS for n in (64, 192, 512, 8192))


def found(*extra, workload="dense"):
    chosen = [PROVIDERS["products"], *extra]
    rows = measure.measure(TINY, WORKLOADS[workload], chosen, clocks.Cpu(), measure.Effort(2, memory=False))
    return {r["provider"]: r for r in rows}


def test_who_raises_or_is_wrong_is_shown_and_not_timed():
    calls = []

    def twice(p):
        right = PROVIDERS["full_logits"].make(p)

        def run():
            calls.append(p)
            result = right()
            return replace(result, d_weight=2 * result.d_weight)

        return run

    def raises(p):
        raise MemoryError("too much")

    rows = found(PROVIDERS["full_logits"], Provider("twice", twice), Provider("raises", raises))
    assert rows["full_logits"]["status"] == "ok" and rows["full_logits"]["ratio"] > 0
    assert rows["twice"]["status"] == "wrong" and "d_weight" in rows["twice"]["note"] and len(calls) == 1
    assert rows["raises"]["status"] == "out of memory" and "too much" in rows["raises"]["note"]
    text = "\n".join(table.table(list(rows.values())))
    assert "wrong: twice: error of d_weight" in text and "too much" in text


@pytest.mark.parametrize(
    "workload, spoilt, word",
    [
        ("logprobs", lambda r: replace(r, logps=torch.zeros_like(r.logps)), "logps"),
        ("logprobs", lambda r: replace(r, logps=r.logps + 0.2), "logps"),
        ("dense", lambda r: replace(r, d_weight=None), "d_weight"),
        ("dense", lambda r: replace(r, d_hidden=1.1 * r.d_hidden), "d_hidden"),
        ("realistic", lambda r: replace(r, d_hidden=torch.zeros_like(r.d_hidden)), "d_hidden"),
    ],
)
def test_a_result_that_is_not_what_was_asked_for_is_wrong(workload, spoilt, word):
    make = lambda p: lambda: spoilt(PROVIDERS["full_logits"].make(p)())  # noqa: E731
    row = found(Provider("spoilt", make), workload=workload)["spoilt"]
    assert row["status"] == "wrong" and word in row["note"] and row["median"] is None


def test_a_loss_without_the_kl_is_wrong():
    def without(p):
        return PROVIDERS["full_logits"].make(replace(p, config=replace(p.config, beta=0.0)))

    assert found(Provider("without", without), workload="kl")["without"]["status"] == "wrong"


def test_the_call_that_is_timed_is_the_one_that_was_checked():
    """A provider that is right for few tokens and does nothing for as many as are timed does not get through."""

    def lazy(p):
        right = PROVIDERS["full_logits"].make(p)
        return right if p.shape.tokens <= 64 else lambda: replace(right(), d_hidden=torch.zeros_like(p.hidden))

    assert found(Provider("lazy", lazy))["lazy"]["status"] == "wrong"


@linux
def test_what_crashes_or_hangs_ends_its_own_process_only(monkeypatch, tmp_path):
    script = tmp_path / "point.py"
    script.write_text("import os, sys, time\nos.kill(os.getpid(), 11) if sys.argv[1] == '\"dies\"' else time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "_ROOT", str(tmp_path))
    with pytest.raises(memory.PointError, match="-11"):
        memory.run("point", "dies")
    with pytest.raises(memory.TooLong, match="1 s"):
        memory.run("point", "hangs", 1)
    script.write_text("import json\nprint('answer: {\"a\": 1}')\nprint('bye')\n")
    assert memory.run("point", 0) == {"a": 1}


def test_who_is_too_slow_is_said_so(monkeypatch):
    answers = {"full_logits": 1.0, "liger": 61.0}

    def point(provider, workload, shape, longest):
        seconds = answers.get(provider, 0.1)
        if seconds > longest:
            raise memory.TooLong(f"its first call took {seconds:.0f} s")
        return {"peak_bytes": 2**20, "cold_seconds": seconds}

    monkeypatch.setattr(memory, "in_fresh_process", point)
    names = ("products", "full_logits", "liger")
    rows = measure.measure(TINY, WORKLOADS["dense"], [PROVIDERS[n] for n in names], clocks.Cpu(), measure.Effort(1))
    assert [r["status"] for r in rows] == ["ok", "ok", "too slow"] and "61 s" in rows[2]["note"]
    assert rows[1]["cold_seconds"] == 1.0 and rows[1]["peak_bytes"] == 2**20


def test_the_truth_is_shared_by_workloads_on_the_same_data():
    dense, frozen, sequence = (make_problem(TINY, WORKLOADS[w]) for w in ("dense", "frozen", "sequence"))
    shared = []
    known, _ = measure.find_truth(dense, clocks.Cpu(), shared)
    assert torch.equal(dense.hidden, frozen.hidden) and torch.equal(dense.old_logps, frozen.old_logps)
    assert measure.find_truth(frozen, clocks.Cpu(), shared)[0] is known
    of_frozen = []
    measure.find_truth(frozen, clocks.Cpu(), of_frozen)
    assert measure.find_truth(dense, clocks.Cpu(), of_frozen)[0].problem is dense, "of_frozen held no gradient of the head"
    assert measure.find_truth(sequence, clocks.Cpu(), shared)[0].problem is sequence and len(shared) == 1


def test_the_floor_multiplies_what_is_needed_and_no_more(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm:
                self.operations += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(floor, "COLUMNS", (None, 300))
    for workload, products in (("dense", 3), ("frozen", 2), ("logprobs", 1), ("realistic", None), ("entropy", None), ("divergence", 4)):
        p = make_problem(Shape(length=96, depth=32, vocab=1009), WORKLOADS[workload])
        found = Floor(p, clocks.Cpu())
        heights = {min(256, p.kept), min(512, p.kept), p.kept}
        assert found.way == min(found.seconds, key=found.seconds.get) and {way.rows for way in found.seconds} == heights
        assert len(found.seconds) == len(heights) * 2 * (2 if found.trains_head else 1)
        rows = p.kept + 2 * p.live if products is None else products * p.shape.tokens
        for way in found.seconds:
            with Count() as count:
                found.run(way)
            assert count.operations == rows * 32 * 1009, way


def test_the_floor_computes_what_it_says():
    """The products themselves, of each way: logits, dH and dW of dz = what stands in the tile."""
    p = make_problem(Shape(length=40, depth=32, vocab=1009, dtype="float32"), WORKLOADS["dense"])
    found = Floor(p, clocks.Cpu())
    whole = [way for way in found.seconds if way.rows == 320]
    assert len(whole) == len(found.seconds) / 2
    logits = found.rows @ p.weight.T
    for way in whole:
        if way.contiguous:
            floor._matrix(found.dz_t, 1009, 320).copy_(logits.T)
        found.run(way)
        torch.testing.assert_close(floor._matrix(found.z, 320, 1009), logits)
        torch.testing.assert_close(found.dh, logits @ p.weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.dw, logits.T @ found.rows, rtol=1e-4, atol=1e-3)


@pytest.mark.exhaustive(reason="ten seconds: trains stock and fused")
def test_the_step_benchmark_runs(monkeypatch, capsys):
    """One variant in a process of its own, as all are; the others here, where the libraries are loaded already."""
    pytest.importorskip("trl")
    from grpo_kernels.integrations.trl import unpatch_trl

    apart = memory.run

    def here(module, point, limit):
        if point[0] == "thin trainer":
            return apart(module, point, limit)
        trainer_of = importlib.import_module(module).trainer_of
        return json.loads(json.dumps(step_process.measure(trainer_of, *point)))

    monkeypatch.setattr(memory, "run", here)
    try:
        assert cli.main(["bench", "--step", "--tiny", "--rounds", "1"]) == 0
    finally:
        unpatch_trl()
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("one optimiser step"))
    names = ["model", "thin trainer", "trl stock", "trl patched", "trl fused"]
    assert all(line.startswith(name) for name, line in zip(names, lines[first + 1 :], strict=False)), lines


def test_rows_of_the_steps_that_failed_are_shown(tmp_path):
    fine = record.row("thin trainer", "grpo step", TINY, [1.0], kind="step", head_share=None)
    gone = record.row("trl stock", "grpo step", None, status="absent", note="no trl", kind="step", head_share=None)
    text = "\n".join(table.table([fine, gone]))
    assert "no trl" in text and "thin trainer" in text
    file = tmp_path / "rows.json"
    record.write(file, [fine | {"error": math.nan, "errors": {"loss": math.inf}}])
    assert json.loads(file.read_text(), parse_constant=pytest.fail)[0]["error"] is None


def test_a_step_must_train_what_stock_trains():

    stock = {"losses": [0.1, 0.2], "gradients": [3.0, 4.0]}
    assert step.agree(stock, {"losses": [0.101, 0.2], "gradients": [3.01, 4.0]})
    assert not step.agree(stock, {"losses": [0.1, 0.2], "gradients": [3.3, 4.0]})
    assert not step.agree(stock, {"losses": [0.1, 0.25], "gradients": [3.0, 4.0]})
    assert not step.agree(stock, {"losses": [0.1, math.nan], "gradients": [3.0, 4.0]})


def test_the_exit_status_is_about_ours(monkeypatch, capsys):
    def wrong(p):
        right = providers.ours()(p)
        return lambda: replace(right(), d_hidden=None)

    monkeypatch.setitem(PROVIDERS, "grpo_kernels", Provider("grpo_kernels", wrong))
    monkeypatch.setattr(memory, "in_fresh_process", lambda *a: {"peak_bytes": 1, "cold_seconds": 1.0})
    options = ["bench", "--tiny", "--rounds", "1", "--workloads", "dense", "--providers"]
    assert cli.main([*options, "grpo_kernels"]) == 1 and "wrong" in capsys.readouterr().out
    monkeypatch.setitem(PROVIDERS, "liger", Provider("liger", wrong))
    assert cli.main([*options, "liger"]) == 0 and "wrong" in capsys.readouterr().out


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_is_computed_right_by_ours_and_by_plain_pytorch(workload):
    rows = found(PROVIDERS["grpo_kernels"], PROVIDERS["grpo_kernels-torch"], PROVIDERS["full_logits"], workload=workload)
    if WORKLOADS[workload].supports:
        assert rows.pop("products")["status"] == "absent"
    assert all(r["status"] == "ok" for r in rows.values()), [r["note"] for r in rows.values()]


def test_ratios_are_taken_inside_of_a_round():
    assert record.ratios({0: 2.0, 1: 9.0, 5: 1.0}, {0: 1.0, 1: 3.0, 2: 7.0}) == [2.0, 3.0]
    r = record.row("x", "dense", TINY, [1.0, 2.0, 3.0, 4.0], ratios=[2.0, 3.0, 4.0])
    assert (r["median"], r["spread"], r["ratio"], r["ratio_spread"], r["ratio_range"]) == (2.5, 1.5, 3.0, 1.0, [2.0, 4.0])


def test_rounds_interleave_in_changing_orders(monkeypatch):
    monkeypatch.setattr(measure, "_SLOW", float("inf"))  # calls of microseconds: any of them may be held up
    monkeypatch.setattr(measure, "_MOST_CALLS", 1)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.rounds(calls, clocks.Cpu(), measure.Effort(6))
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, 18, 3)}) > 2, "nobody always follows the same one"
    assert all(set(t) == set(range(6)) for t in times.values())
    late = measure.rounds(calls, clocks.Cpu(), measure.Effort(3, until=0.0))
    assert all(set(t) == {0} for t in late.values()), "at least one round, whatever the time"


def test_the_realistic_batch_has_its_documented_moments():
    g = torch.Generator().manual_seed(0)
    rates = workloads.pass_rates(4000, g)
    assert abs(rates.mean() - 1 / 2) < 0.01 and abs(rates.var() - 1 / 8) < 0.005  # of Beta(1/2, 1/2)
    lengths = workloads.log_normal(4000, 0.3, 0.7, g)
    assert abs(lengths.median() - 0.3) < 0.01 and abs(lengths.log().std() - 0.7) < 0.02
    mask, advantages = workloads.draw_batch(WORKLOADS["realistic"], 8 * 2000, 64, g)
    groups = advantages.view(-1, 8)
    zero = (groups == 0).all(1).float().mean().item()
    exact = math.gamma(8.5) / math.gamma(9) / math.gamma(0.5) * 2  # E[p^8 + (1 - p)^8]
    assert abs(exact - 0.393) < 1e-3 and abs(zero - exact) < 0.03
    assert groups.sum(1).abs().max() < 1e-3
    prompt = mask.float().argmax(1).view(-1, 8)
    assert (prompt == prompt[:, :1]).all(), "a prompt is shared by its group"
    assert 0.25 < mask.float().mean() < 0.45


class Ticking(clocks.Cpu):
    """Calls that take what they return."""

    def __init__(self):
        self.readied = []

    def seconds(self, call, before=None, ahead=False):
        before()
        return call()

    def ready(self, size):
        self.readied.append(size)


def test_a_round_of_short_calls_takes_the_median_of_several_cold_ones():
    clock = Ticking()
    calls = {"short": iter([0.05] + [0.002] * 6 + [0.03, 0.001]).__next__, "long": lambda: 0.2}
    times = measure.rounds(calls, clock, measure.Effort(1), peaks={"short": 3}, cold=100)
    assert times == {"short": {0: 0.002}, "long": {0: 0.2}}
    assert sorted(clock.readied) == [0, 3] + [100] * 8


def test_supports_have_the_published_sizes():
    """8 in the mean, 2 in the median, 99 % below 82, 45 to 48 % of one token; as few positions as a quick run has come close."""
    for count, slack in ((512, 0.6), (1024, 0.4), (8192, 0.2), (100_000, 0.1)):
        sizes = workloads.support_sizes(count, 151_936, torch.Generator().manual_seed(count))
        assert sizes.dtype == torch.int64 and (sizes.diff() >= 0).all() and sizes[0] == 1
        assert abs(sizes.double().mean() - 8) < slack and sizes.median() == 2
        assert 0.45 < (sizes == 1).double().mean() < 0.48 and 0.99 <= (sizes < 82).double().mean() < 0.992
    assert workloads.support_sizes(1000, 5, torch.Generator()).max() == 5 and workloads.support_sizes(9, 1, torch.Generator()).max() == 1


@pytest.mark.parametrize("shape", [Shape(length=64, depth=256, vocab=8192), Shape(length=32, depth=8, vocab=64)], ids=str)
def test_a_support_holds_the_sampled_token_and_the_likely_ones(shape):
    p, dense = (make_problem(shape, WORKLOADS[w]) for w in ("support", "dense"))
    assert torch.equal(p.hidden, dense.hidden) and torch.equal(p.ids, dense.ids) and torch.equal(p.advantages, dense.advantages)
    assert not torch.equal(p.old_logps, dense.old_logps) and dense.support is None
    facts = p.support.facts()
    assert (facts.wrong, facts.repeats, facts.empty) == (None, False, 0) and 0 <= facts.lowest <= facts.highest < shape.vocab
    allowed, lengths = p.support.to_mask(shape.vocab), p.support.lengths()
    assert allowed.gather(1, p.ids.view(-1, 1)).all()
    assert (p.old_logps.flatten()[lengths == 1] != 0).all(), "minus the logarithm of the drawn ratio"
    of_dense, of_supports = (truth(q).logps.flatten().exp() for q in (dense, p))
    assert (of_supports >= of_dense - 1e-12).all() and (of_supports[lengths == 1] == 1).all()
    log_p = (p.hidden.double() @ p.weight.double().T).flatten(0, 1).log_softmax(-1)
    left = log_p.masked_fill(~allowed, -math.inf).logsumexp(1).exp()
    torch.testing.assert_close(of_supports, of_dense / left, rtol=1e-6, atol=1e-9)
    if shape.depth == 256:
        entropy = -(log_p.exp() * log_p).sum(1)
        assert entropy[lengths > 8].mean() > 4 * entropy[lengths == 1].mean()
        assert left.median() > 0.9, "most of the probability"


def test_workloads_over_supports_share_a_truth_of_their_own():
    support, frozen, logprobs, dense = (make_problem(TINY, WORKLOADS[w]) for w in ("support", "support-frozen", "support-logprobs", "dense"))
    shared = []
    known, _ = measure.find_truth(support, clocks.Cpu(), shared)
    assert all(measure.find_truth(p, clocks.Cpu(), shared)[0] is known for p in (frozen, logprobs))
    assert measure.find_truth(dense, clocks.Cpu(), shared)[0].problem is dense
    names = [workloads.over_the_vocabulary(w) for w in ("support", "support-frozen", "support-logprobs", "dense", "of an older record")]
    assert names == ["dense", "frozen", "logprobs", None, None]


def test_a_teacher_leaves_the_student_as_it_is_and_agrees_with_it_in_part():
    """The KL of the truth is that of plain PyTorch; large where the student errs, small in the median, as late in a training."""
    p, dense = (make_problem(Shape(length=64, depth=256, vocab=8192), WORKLOADS[w]) for w in ("divergence", "dense"))
    assert torch.equal(p.hidden, dense.hidden) and torch.equal(p.weight, dense.weight) and torch.equal(p.ids, dense.ids)
    assert p.old_logps is None and (p.heads, p.live) == (2, p.kept) and dense.heads == 1 and not torch.equal(p.teacher_weight, p.weight)
    hidden, weight = p.hidden.double().requires_grad_(), p.weight.double().requires_grad_()
    log_p, log_q = ((h @ w.T).log_softmax(-1) for h, w in ((hidden, weight), (p.teacher_hidden.double(), p.teacher_weight.double())))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    kl.mean().backward()
    exact = truth(p)
    for found, wanted in ((exact.loss, kl.mean()), (exact.d_hidden, hidden.grad), (exact.d_weight, weight.grad)):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-14)
    assert 0.1 < kl.mean() < 0.5 and 0.001 < kl.median() < 0.1 and (kl > 1).double().mean() > 0.02


@pytest.mark.exhaustive(reason="five seconds")
def test_who_compares_two_heads_is_right_and_the_others_say_why_not():
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    names = ("grpo_kernels-torch", "full_logits", "trl", "liger", "liger-logits", "torch-lce")
    rows = found(*(PROVIDERS[name] for name in names), workload="divergence")
    assert [rows[name]["status"] for name in names] == ["ok"] * 4 + ["absent"] * 2, [r["note"] for r in rows.values()]
    assert all(rows[name]["ratio"] > 0 for name in names[:4]) and rows["products"]["ratio"] == 1
    assert all(rows[name]["error"] < 0.04 for name in names[:4])
    assert rows["liger"]["settings"] == {"compiled": True, "chunk_rows": 128}
    # the other direction of the KL, a teacher that is the student, a loss that is not the mean
    swapped = Provider("swapped", lambda p: PROVIDERS["full_logits"].make(
        replace(p, hidden=p.teacher_hidden, weight=p.teacher_weight, teacher_hidden=p.hidden, teacher_weight=p.weight)))  # fmt: skip
    own = Provider("own", lambda p: PROVIDERS["full_logits"].make(replace(p, teacher_hidden=p.hidden, teacher_weight=p.weight)))
    twice = Provider("twice", lambda p: lambda: (lambda r: replace(r, loss=2 * r.loss))(PROVIDERS["full_logits"].make(p)()))
    assert {r["status"] for name, r in found(swapped, own, twice, workload="divergence").items() if name != "products"} == {"wrong"}


@pytest.mark.parametrize("workload", ["support", "support-frozen", "support-logprobs"])
def test_who_computes_over_supports_is_right_and_the_others_say_why_not(workload):
    pytest.importorskip("trl")
    names = ("grpo_kernels", "full_logits", "trl", "liger", "torch-lce")
    rows = found(*(PROVIDERS[name] for name in names), workload=workload)
    assert [rows[name]["status"] for name in names] == ["ok", "ok", "ok", "absent", "absent"], [r["note"] for r in rows.values()]
    assert "no product of matrices" in rows["products"]["note"] and rows["grpo_kernels"]["ratio"] is None
    assert all("sampling mask" in rows[name]["note"] or "imported" in rows[name]["note"] for name in ("liger", "torch-lce"))
    ignores = Provider("ignores", lambda p: PROVIDERS["full_logits"].make(replace(p, support=None)))
    assert found(ignores, workload=workload)["ignores"]["status"] == "wrong"


def test_the_table_says_how_much_faster_supports_are_than_the_vocabulary():
    rows = [record.row("grpo_kernels", path, TINY, [seconds], peak_bytes=2**20 + bytes)
            for path, seconds, bytes in (("frozen", 0.5, 0), ("support-frozen", 0.004, 128 * 32 * 2))]  # fmt: skip
    assert "  ours is 125 x as fast as in frozen; peak less dH and dW 1.0 MiB" in list(table.table(rows))
    assert not any("as fast as in" in line for line in table.table(rows[1:]))


def test_a_first_look_at_supports_is_in_the_time():
    p = make_problem(TINY, WORKLOADS["support"])
    PROVIDERS["grpo_kernels-torch"].make(p)()
    assert "_facts" not in vars(p.support)


def test_logits_look_like_a_trained_models():
    p = make_problem(Shape(length=64, depth=256, vocab=8192), WORKLOADS["logprobs"])
    exact = truth(p)
    low, high = exact.entropy.flatten().quantile(torch.tensor([0.5, 0.85], dtype=torch.float64)).tolist()
    assert low < 0.1 and high > 0.67
    assert exact.logps.mean() > -1.2


def test_the_ratios_reach_both_sides_of_the_clip_range():
    p = make_problem(Shape(length=64, depth=64, vocab=1009), WORKLOADS["dense"])
    ratio = (truth(p).logps - p.old_logps).exp()
    for sign in (1, -1):
        own = ratio[p.advantages * sign > 0]
        assert (own < 0.8).any() and ((own > 0.8) & (own < 1.2)).any() and (own > 1.2).any()


def test_exponents_on_made_up_data():
    assert scaling.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert scaling.slope([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert scaling.slope([1], [5]) is None and scaling.slope([], []) is None


def test_a_sweep_asks_for_larger_points_as_long_as_they_are_worth_it(monkeypatch):
    """Ours grows as the tokens do, plain PyTorch would take too long for the third point, who is wrong has no point."""

    def point(provider, workload, shape, longest):
        seconds = {"grpo_kernels": 1e-3, "full_logits": 0.4}[provider] * shape.tokens
        return {"peak_bytes": 100 * shape.tokens, "data_bytes": 1, "cold_seconds": seconds}

    monkeypatch.setattr(memory, "in_fresh_process", point)
    lazy = Provider("lazy", lambda p: lambda: replace(PROVIDERS["full_logits"].make(p)(), d_weight=torch.zeros_like(p.weight)))
    over = [("tokens", [TINY.of(n) for n in (64, 128, 256)])]
    rows = scaling.sweep([PROVIDERS["grpo_kernels"], PROVIDERS["full_logits"], lazy], over, clocks.Cpu(), lambda text: None)
    assert [r["status"] for r in rows] == ["wrong", "ok", "ok", "ok", "ok", "ok", "ok", "absent", "ok"]
    assert rows[0]["provider"] == "lazy" and "more than 60 s" in rows[7]["note"]
    ours, full = (r for r in rows if r["kind"] == "exponent")
    assert (ours["points"], full["points"]) == (3, 2) and ours["time_exponent"] == pytest.approx(1) == full["memory_exponent"]
    text = "\n".join(table.table(rows))
    assert "seconds ~ tokens^1.00" in text and "error of d_weight" in text and "would take more" in text


INDEPENDENT = """
import ctypes, json, sys, torch
from grpo_kernels import fused_linear_grpo_loss
from grpo_kernels.bench.problem import make_problem
from grpo_kernels.bench.shapes import TINY, Shape
from grpo_kernels.bench.workloads import WORKLOADS

def loss(p):
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    if sys.argv[1] == "full_logits":
        lp = (h @ w.T).float().log_softmax(-1).gather(-1, p.ids.unsqueeze(-1)).squeeze(-1)
        ratio, A = (lp - p.old_logps).exp(), p.advantages.unsqueeze(1)
        (-torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A).sum() / p.mask.sum()).backward()
    else:
        fused_linear_grpo_loss(h, w, p.ids, p.advantages, p.mask, old_logps=p.old_logps, config=p.config).loss.backward()

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

loss(make_problem(TINY, WORKLOADS["dense"]))
p = make_problem(Shape(**json.loads(sys.argv[2])), WORKLOADS["dense"])
ctypes.CDLL(None).malloc_trim(0)  # what the making of the data left with malloc
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
loss(p)
print(status("VmHWM") - before)
"""


@pytest.mark.exhaustive(reason="ten seconds: measures in processes of its own")
@linux
@pytest.mark.parametrize("provider", ["grpo_kernels", "full_logits"])
def test_the_memory_column_agrees_with_an_independent_measurement(provider, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shape = Shape(length=64, depth=256, vocab=65_536)
    column = memory.in_fresh_process(provider, "dense", shape, 60)["peak_bytes"]
    fields = json.dumps({"sequences": 8, "length": 64, "depth": 256, "vocab": 65_536})
    independent = int(python("-c", INDEPENDENT, provider, fields).split()[-1])
    assert column == pytest.approx(independent, rel=0.10), (column / 2**20, independent / 2**20)


@pytest.mark.exhaustive(reason="six seconds of processes")
@linux
def test_a_point_that_fails_says_why():
    with pytest.raises(memory.PointError, match="cut_cross_entropy"):
        memory.in_fresh_process("cce", "dense", TINY, 60)


@pytest.mark.exhaustive(reason="five seconds: runs pytest")
def test_the_quick_set_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    options = ("--benchmark-only", "-k", "(dense or logprobs) and not trl and not liger")
    assert "6 passed" in python("-m", "pytest", "benchmarks/test_loss.py", "-q", *options, GRPO_KERNELS_BENCH_TINY="1")


def test_a_commit_tells_sources_apart(tmp_path, monkeypatch):
    """Of a checkout, of one that was changed, of a copy without its history; what was measured of a GPU changes no source."""
    package = tmp_path / "grpo_kernels"
    package.mkdir()
    (package / "a.py").write_text("1")
    monkeypatch.setattr(record, "_PACKAGE", package)
    monkeypatch.delenv("GRPO_KERNELS_COMMIT", raising=False)

    def commit():
        record.commit.cache_clear()
        return record.commit()

    bare = commit()
    assert bare.startswith("+") and len(bare) == 9 and commit() == bare
    monkeypatch.setenv("GRPO_KERNELS_COMMIT", "0123abc")
    assert commit() == f"0123abc{bare}"
    monkeypatch.delenv("GRPO_KERNELS_COMMIT")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = commit()
    assert "+" not in clean and len(clean) >= 7
    (package / "devices.json").write_text("{}")
    assert commit() == clean
    (package / "a.py").write_text("2")
    changed = commit()
    assert changed.startswith(f"{clean}+") and not changed.endswith(bare)
    record.commit.cache_clear()
