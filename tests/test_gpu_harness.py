"""`make gpu` without a GPU: every stage on the CPU at tiny shapes, whose figures mean nothing, and what becomes of those that fail."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import decide, fit, kernels, programs  # noqa: E402
from benchmarks.gpu import stage as module  # noqa: E402
from benchmarks.gpu.stage import Stage, read  # noqa: E402
from grpo_kernels import build_cuda, devices  # noqa: E402
from grpo_kernels.backends import native, row_kernels_triton  # noqa: E402
from grpo_kernels.bench import record  # noqa: E402
from grpo_kernels.bench.problem import truth  # noqa: E402
from grpo_kernels.engine import cost, operands, plan, products  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu") != "cpu", reason="a GPU runs the stages themselves")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """(exit status, {stage: rows}, what was printed) of the command, whose stages may also be functions of a file here."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # with every core spoken for, two threads wait for each other
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))

    def run(*arguments, code=""):
        (tmp_path / "own_stages.py").write_text(textwrap.dedent(code))
        status = command.main(["--device", "cpu", "--tiny", *arguments])
        files = (tmp_path / "out").glob("cpu-*.json")
        return status, {file.stem.removeprefix("cpu-"): read(file) for file in files}, capfd.readouterr().out

    return run


@pytest.fixture
def stage(tmp_path):
    """A stage in this process."""
    return make_stage(tmp_path)


def make_stage(folder, name="decide", **more):
    words = [f"--{key}={value}" for key, value in {"record": folder / f"cpu-{name}.json", "log": folder / "log", "seconds": 600, **more}.items()]
    (folder / "log").touch()
    stage = Stage(command.parser().parse_args(["--device=cpu", "--tiny", f"--stage={name}", f"--start={time.monotonic()}", *words]))
    stage.run("builtins", "id")  # opens the device
    return stage


def rows_of(stage, kind):
    return [r for r in read(stage.file) if r.get("kind") == kind]


@pytest.mark.exhaustive(reason="half a minute: runs make gpu from its first stage to its last")
def test_every_stage_runs_on_the_cpu(run):
    status, found, printed = run()
    verdicts = {r["path"]: (r["status"], r["note"]) for rows in found.values() for r in rows if r.get("kind") == "stage"}
    assert status == 0, (verdicts, printed)
    skipped = {name for name, (status, _) in verdicts.items() if status == "skipped"}
    assert {"build", "sanitize"} <= skipped <= {"build", "sanitize", "peers:trl"}
    peers = {name for name in command.STAGES if name.startswith("peers:")}
    assert verdicts.keys() == command.STAGES.keys() - peers | {"peers:full_logits", "peers:trl"}
    assert found.keys() == {name.partition(":")[0] for name in command.STAGES}

    of = {name: [(r.get("kind"), r["provider"], r["path"]) for r in rows] for name, rows in found.items()}
    for depth in ("D 32", "D 16"):
        assert {("product", what, depth) for what in ("logits", "dH", "dW")} <= set(of["decide"])
    ours = decide.OURS + "-cpu" if native.why_unavailable() is None else decide.OURS + "-torch"
    for path in decide.PATHS:
        assert (None, ours, path) in of["decide"] and (None, "products", path) in of["decide"]
    assert {("rate", "device", "copy"), ("error", ours, "log-probs, D 32")} <= set(of["decide"])
    assert any(kind == "kernel" for kind, *_ in of["kernels"]) and any(kind == "height" for kind, *_ in of["plan"])
    assert ("program", "pytest", "without a GPU") in of["test"]
    for path in ("dense beside full_logits", "dense beside trl") if "peers:trl" not in skipped else ():
        assert {(None, "products", path), (None, "grpo_kernels", path), (None, path.split()[-1], path)} <= set(of["peers"])
    for r in (r for rows in found.values() for r in rows):
        assert {"device", "commit", "versions", "date", "status"} <= r.keys() and r["device"] == "cpu"
    predicted = [r for r in found["decide"] if r["provider"] == ours and r["path"] == "dense"]
    assert predicted and all(r["predicted"] > 0 for r in predicted)
    assert "log-probs" in printed and len(printed) < 12_000


BROKEN = """
    import subprocess, sys, time

    def raises(stage):
        stage.row("rate", "device", "before", None, [1.0])
        raise RuntimeError("on purpose")

    def hangs(stage):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=False)
        stage.row("rate", "device", str(child.pid), None, [1.0])
        time.sleep(60)

    def dies(stage):
        stage.row("rate", "device", "before", None, [1.0])
        import os; os.abort()

    def wrong(stage):
        with stage.attempt("kernel", "triton", "policy"):
            assert 1 == 2, "not the same"
        with stage.attempt("kernel", "triton", "statistics"):
            stage.row("kernel", "triton", "statistics", None, [1.0])

    def good(stage):
        stage.row(None, "trl", "dense", {"tokens": 1, "depth": 2, "vocab": 3}, status="failed", note="its own")
"""


@pytest.mark.exhaustive(reason="twenty seconds: six processes, one after the other")
def test_a_stage_that_fails_stops_no_other_and_leaves_its_rows(run, monkeypatch):
    for name in ("raises", "hangs", "dies", "wrong", "good"):
        monkeypatch.setitem(command.STAGES, name, (30, f"own_stages:{name}"))
    monkeypatch.setitem(command.STAGES, "missing", (30, "no_such_module:run"))
    start = time.monotonic()
    status, found, printed = run("--stage", "raises,hangs=9,dies,missing,wrong,good", code=BROKEN)
    verdicts = {name: (rows[0]["status"], rows[0]["note"]) for name, rows in found.items()}
    assert status == 1 and time.monotonic() - start < 120
    assert verdicts["raises"] == ("failed", "RuntimeError: on purpose") and found["raises"][1]["path"] == "before"
    assert verdicts["hangs"] == ("unfinished", "ended from outside") and 1 < found["hangs"][0]["seconds"] <= 9
    with pytest.raises(ProcessLookupError):
        os.kill(int(found["hangs"][1]["path"]), 0)
    assert verdicts["dies"] == ("unfinished", "ended from outside") and found["dies"][1]["path"] == "before"
    assert verdicts["missing"][0] == "failed" and "no_such_module" in verdicts["missing"][1]
    assert verdicts["wrong"] == ("failed", "triton policy wrong")
    assert [(r["path"], r["status"]) for r in found["wrong"][1:]] == [("policy", "wrong"), ("statistics", "ok")]
    assert verdicts["good"] == ("ok", ""), "another library's failure is its own"
    assert "hangs: its time was over" in printed and "dies: exit status -6" in printed and "good: exit status 0" in printed


@pytest.mark.exhaustive(reason="ten seconds: two stages that sleep")
def test_limits_share_the_minutes(run, monkeypatch):
    for name in ("first", "second"):
        monkeypatch.setitem(command.STAGES, name, (30, "own_stages:sleep"))
    start = time.monotonic()
    code = "import time\ndef sleep(stage): time.sleep(60)\n"
    status, _, printed = run("--stage", "first=100,second", "--minutes", "0.1", code=code)
    assert status == 1 and time.monotonic() - start < 30 and printed.count("its time was over") == 2
    with pytest.raises(SystemExit):
        command.main(["--stage", "nonsense"])


def test_who_ends_the_command_ends_its_stages(tmp_path):
    """SIGTERM, as a limit from outside sends it: a stage is in a session of its own and would run on."""
    import psutil

    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--stage", "decide"]
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 1
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_what_cannot_be_started_leaves_sigterm_as_it_was(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        programs.limited([tmp_path / "nothing"], 1, tmp_path / "log")
    assert signal.getsignal(signal.SIGTERM) == before
    assert programs.limited([sys.executable, "-c", "pass"], 30, tmp_path / "log") == 0
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.exhaustive(reason="five seconds: a stage in a process of its own")
def test_one_library_alone(run, monkeypatch):
    for name in command.STAGES:
        monkeypatch.setitem(command.STAGES, name, (30, "own_stages:nothing"))
    status, found, _ = run("--stage", "peers:trl=20", code="def nothing(stage): return 'absent'")
    assert status == 0 and [(r["path"], r["status"], r["note"]) for r in found.pop("peers")] == [("peers:trl", "skipped", "absent")] and not found


def test_a_rerun_merges_with_what_the_same_commit_measured_on_the_same_device(tmp_path, monkeypatch):
    first = make_stage(tmp_path)
    for path, value in (("copy", 1.0), ("launch", 2.0)):
        first.row("rate", "device", path, None, [value])
    first.row("rate", "device", "copy", {"bytes": 8}, [3.0])
    assert first.end("ok") == 0
    again = make_stage(tmp_path)
    again.row("rate", "device", "copy", None, [5.0])
    found = {(r["path"], str(r["shape"])): r["median"] for r in rows_of(again, "rate")}
    assert found == {("copy", "None"): 5.0, ("launch", "None"): 2.0, ("copy", "{'bytes': 8}"): 3.0}
    assert [r["status"] for r in rows_of(again, "stage")] == ["unfinished"]
    here = record.environment()
    for key, value in (("commit", "fedcba9"), ("device", "another")):
        monkeypatch.setattr(record, "environment", lambda: here)
        make_stage(tmp_path).row("rate", "device", "copy", None, [1.0])
        assert rows_of(make_stage(tmp_path), "rate")
        monkeypatch.setattr(record, "environment", lambda key=key, value=value: here | {key: value})
        assert rows_of(make_stage(tmp_path), "rate") == []


def test_a_record_is_left_alone_where_the_device_does_not_answer(tmp_path, monkeypatch):
    make_stage(tmp_path).row("rate", "device", "copy", None, [1.0])
    before = (tmp_path / "cpu-decide.json").read_text()
    monkeypatch.setattr(module.clock, "of", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_stage(tmp_path)
    assert (tmp_path / "cpu-decide.json").read_text() == before


@pytest.mark.exhaustive(reason="four seconds: a process of its own")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_stage_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["--stage", "build"]) == 1
    assert "build: exit status 1" in (printed := capfd.readouterr().out) and "there is no GPU" in printed


@pytest.fixture
def as_on_a_gpu(stage, monkeypatch):
    """The stage where products write float32 and the plan is an H200's: what the engine does there, in plain PyTorch."""
    device = replace(plan.DEVICES["h200"], l2=1 << 16)
    monkeypatch.setattr(products, "FLOAT32_TILES", ("torch", "triton"))
    for module, name in ((operands, "device_of"), (plan, "device_of"), (cost, "data_sheet")):
        monkeypatch.setattr(module, name, lambda _: device)
    stage.backends, stage.ours = ["torch"], "grpo_kernels-torch"
    monkeypatch.setenv("GRPO_KERNELS_WORKSPACE_MB", "0.3")
    return stage


@pytest.mark.exhaustive(reason="a quarter of a minute")
def test_decide_and_plan_as_on_a_gpu(as_on_a_gpu, tmp_path):
    stage = as_on_a_gpu
    decide.run(stage)
    found = rows_of(stage, "product")
    assert {way for r in found for way in r["planned"]} == {"float32", "sum"} and {r["provider"] for r in found} == {"logits", "dH", "dW"}
    assert all(r["ways"].keys() == {"16-bit", "float32", "sum"} and r["median"] > 0 and "*" in r["says"] for r in found)
    shapes = {(r["path"], *r["shape"].values()) for r in found}
    for depth in stage.depths:  # all of them, and no other
        wanted = set()
        for name in decide.PATHS:
            problem = decide.asked(stage, name, depth)
            wanted |= {(f"D {depth}", s.m, s.n, s.k) for s in plan.steps(problem, plan.plan(problem)) if s.k}
        assert {s for s in shapes if s[0] == f"D {depth}"} == wanted
    assert stage.end("ok") == 0, read(stage.file)[0]

    later = make_stage(tmp_path, "plan")
    later.backends, later.ours = stage.backends, stage.ours
    decide.tune(later)
    (row,) = rows_of(later, "device")
    assert row["constants"].keys() == set(devices.CONSTANTS) and len(row["steps"]) == 3 * len(found)
    heights = rows_of(later, "height")
    assert len({(r["shape"]["r"], r["shape"]["R"]) for r in heights}) > 2 and all(r["median"] > 0 and r["predicted"] > 0 for r in heights)
    assert {r["shape"]["depth"] for r in heights if r["says"].endswith("*")} == set(stage.depths)
    assert not rows_of(later, "product"), "decide's are used"


def test_heights_are_plans_that_the_engine_can_follow(as_on_a_gpu, monkeypatch):
    from grpo_kernels.engine import chunks

    tried = []
    as_on_a_gpu.shape = replace(as_on_a_gpu.shape, length=40)  # 320 rows: fewer than some heights
    monkeypatch.setenv("GRPO_KERNELS_WORKSPACE_MB", "4")
    provider = replace(decide.PROVIDERS[as_on_a_gpu.ours], make=lambda p: lambda: tried.append(chunks.plan(None)))
    monkeypatch.setitem(decide.PROVIDERS, as_on_a_gpu.ours, provider)
    decide.heights(as_on_a_gpu, 32, plan.DEVICES["h200"])
    problem = replace(decide.asked(as_on_a_gpu, "dense", 32), device=plan.DEVICES["h200"])
    chosen = plan.plan(problem)
    assert tried[0] == chosen and chunks.plan is plan.plan and len(set(tried)) == len(rows_of(as_on_a_gpu, "height")) > 2
    for one in tried:
        assert 1 <= one.chunk_rows <= one.buffer_rows <= chosen.buffer_rows and one.direct == (problem.live <= one.buffer_rows)
    for r, one in zip(rows_of(as_on_a_gpu, "height"), dict.fromkeys(tried), strict=True):
        steps = plan.steps(problem, one)
        assert r["predicted"] == pytest.approx(sum(s.count * cost.seconds(problem, s) for s in steps))


@pytest.mark.exhaustive(reason="it runs pytest, ten seconds")
def test_tests_on_a_gpu_leave_inductor_to_the_end(stage, monkeypatch):
    asked = []
    monkeypatch.setattr(programs, "pytest", lambda stage, name, share, *arguments: asked.append((share, arguments)))
    stage.options.device = "cuda"
    programs.test(stage)
    (first, before), (rest, after) = asked
    assert first < 1 == rest and set(programs.TESTS) <= set(before) & set(after)
    assert before[before.index("-m") + 1] == "not inductor" and after[after.index("-m") + 1] == "inductor"
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", str(ROOT / programs.TESTS[0]), "-m", "inductor"]
    found = [line for line in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines() if "::" in line]
    assert found and all("test_compiled_without_a_graph_break" in line for line in found)
    for file in programs.TESTS:
        source = (ROOT / file).read_text()
        assert source.count("torch.compile(") == source.count("@pytest.mark.inductor")


def test_the_sanitizer_watches_every_check(stage, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(programs, "pytest", lambda stage, name, share, *arguments, before, **more: asked.append((name, before, arguments, more)))
    assert "GPUs" in programs.sanitize(stage) or "no compute-sanitizer" in programs.sanitize(stage)
    stage.options.device = "cuda"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs.shutil, "which", lambda name, path: f"{tmp_path}/{name}")
    stage.deadline = time.monotonic() + 60
    assert "STAGE=sanitize" in programs.sanitize(stage) and not asked, "a minute is too little"
    stage.deadline += 60
    programs.sanitize(stage)
    assert [name for name, *_ in asked] == ["memcheck", "racecheck", "synccheck"]
    for name, before, arguments, more in asked:
        assert before[:3] == [f"{tmp_path}/compute-sanitizer", "--tool", name] and arguments[0] == programs.TESTS[0]
        assert ("PYTORCH_NO_CUDA_MEMORY_CACHING" in more) == (name == "memcheck") != ("kns=policy_kernel" in before)


def test_products_have_the_layouts_of_the_engine(as_on_a_gpu, monkeypatch):
    """Strides of both operands and of the output, as the loops hand them to `multiply`."""
    from grpo_kernels.engine import chunks

    stage, seen = as_on_a_gpu, set()

    def watched(a, b, out, add=False, alpha=1.0, **order):
        seen.add((*((tuple(x.shape), x.stride()) for x in (a, b, out)), out.dtype))
        multiply(a, b, out, add, alpha, **order)

    multiply = products.multiply
    for module in (chunks, products):
        monkeypatch.setattr(module, "multiply", watched)
    monkeypatch.setattr(chunks, "_stride", lambda columns, run: chunks.padded(columns, 2))  # which is another on a CPU,
    monkeypatch.setattr(native, "why_unavailable", lambda: "as on a GPU")  # where dz is transposed by a copy
    for name in decide.PATHS:
        planned = []
        monkeypatch.setattr(chunks, "plan", lambda problem, planned=planned: planned.append(problem) or plan.plan(problem))
        decide.PROVIDERS[stage.ours].make(decide.make_problem(stage.shape, decide.WORKLOADS[name]))()
        unused = {"sums_weight": True} | ({"two_phases": False} if name == "logprobs" else {})
        assert replace(planned[0], **unused) == decide.asked(stage, name, stage.shape.depth), "what is asked of the planner"
    engine, seen = seen, set()
    monkeypatch.setattr(decide, "multiply", watched)
    decide.products(stage, stage.shape.depth)
    assert engine and engine <= seen
    assert {product[:2] for product in engine} == {product[:2] for product in seen}


def test_log_probs_are_judged_by_the_product(stage, monkeypatch):
    provider = decide.PROVIDERS[stage.ours]
    for factor, status in ((1.0, "ok"), (1.05, "ok"), (1.2, "wrong")):

        def worse(p, factor=factor):
            exact = truth(p).logps
            return lambda: replace(provider.make(p)(), logps=exact + factor * (provider.make(p)().logps - exact))

        monkeypatch.setitem(decide.PROVIDERS, stage.ours, replace(provider, make=worse))
        decide.log_probs(stage, 32)
        (row,) = rows_of(stage, "error")
        assert row["status"] == status and row["ours max"] > row["ours rms"] > 0 and "shrunk" in row, row
    assert "of the product" in row["note"] and stage.end("ok") == 1


def scaled(tile, out, before):
    out *= 1.02


def softmax_off(tile, out, before):
    """All but the target's column by 5 %, which the norm of a whole row would not see."""
    own = out.gather(1, tile.target.unsqueeze(1))
    out.mul_(1.05).scatter_(1, tile.target.unsqueeze(1), own)


def end_unwritten(tile, out, before):
    out[:, -3:] = before[:, -3:]


@pytest.mark.parametrize("spoil", [scaled, softmax_off, end_unwritten])
def test_a_wrong_kernel_is_not_timed(stage, monkeypatch, spoil):
    module = kernels.backends.kernels(stage.backends[0])
    real = module.gradient

    def off(tile, out, *more):
        before = out.clone()
        real(tile, out, *more)
        spoil(tile, out, before)

    monkeypatch.setattr(module, "gradient", off)
    kernels.run(stage)
    found = rows_of(stage, "kernel")
    assert {r["path"]: r["status"] for r in found if r["shape"]["rows"] == 8}["gradient"] == "wrong"
    assert all((r["status"] == "ok") == (r["median"] is not None) == (r["path"] != "gradient") for r in found)
    assert {r["path"] for r in found} == {k for k in ("statistics", "gradient", "policy") if hasattr(module, k)} and all(r["share"] > 0 for r in found if r["status"] == "ok")
    assert stage.end("ok") == 1


@pytest.mark.exhaustive(reason="it runs pytest, ten seconds")
def test_pytest_is_summed_up(stage, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import time\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_slow(): time.sleep(60)\n")
    arguments = (str(file), "-c", os.devnull, "--rootdir", str(tmp_path))
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text('#!/bin/sh\n"$@"\nresult=$?\necho "========= ERROR SUMMARY: 3 errors"\nexit $result\n')
    sanitizer.chmod(0o755)
    file.with_name("test_skipped.py").write_text("import pytest\ndef test_it(): pytest.skip('no GPU')\n")
    seconds = 1 / 200
    for name, share, selected, before in (("good", 1, "good", ()), ("bad", 1, "good or bad", ()), ("slow", seconds, "good or slow", ()),
                                          ("none", 1, "nothing", ()), ("sanitized", 1, "good", (str(sanitizer),)),
                                          ("silent", 1, "good", ("env",))):  # fmt: skip
        programs.pytest(stage, name, share, *arguments, "-k", selected, before=before)
    stage.options.device = "cuda"
    programs.pytest(stage, "skipped", 1, str(file.with_name("test_skipped.py")), *arguments[1:])
    programs.pytest(stage, "good on a GPU", 1, *arguments, "-k", "good")
    found = {r["path"]: (r["status"], r["note"]) for r in rows_of(stage, "program")}
    assert found["skipped"][0] == "failed" and "1 skipped" in found["skipped"][1] and found["good on a GPU"][0] == "ok"
    assert found["good"][0] == "ok" and "1 passed" in found["good"][1]
    assert found["bad"][0] == "failed" and "test_bad" in found["bad"][1] and "1 failed, 1 passed" in found["bad"][1]
    assert found["slow"][0] == "failed" and found["slow"][1].startswith("its time was over")
    assert found["none"][0] == "failed", "nothing was selected"
    assert found["sanitized"][0] == "ok" and "3 errors" in found["sanitized"][1]
    assert found["silent"][0] == "failed", "a sanitizer that said nothing has watched nothing"


def test_the_sanitizer_watches_kernels_by_their_names():
    source = (ROOT / "csrc" / "row_kernels_cuda.cuh").read_text()
    for name in programs.KERNELS:
        assert hasattr(row_kernels_triton, name) and f" {name}(" in source
    assert f"the_{programs.SMALL}" in (ROOT / programs.TESTS[0]).read_text()
    for file in programs.TESTS:
        assert (ROOT / file).exists()


def test_the_table_is_short_whatever_happened(tmp_path, capsys):
    shape = {"tokens": 1, "depth": 2, "vocab": 3, "dtype": "bfloat16"}
    rows = [record.row(f"p{i}", path, shape, status="failed", note="x" * 300) for i in range(60) for path in decide.PATHS]
    rows += [record.row("stage", "decide", None, kind="stage", status="failed", note="m" * 500, seconds=60.0)]
    record.write(tmp_path / "a.json", rows)
    assert not command.main(["--show", str(tmp_path / "a.json"), str(tmp_path / "missing.json")])
    printed = capsys.readouterr().out
    assert len(printed) <= 9500 and printed.startswith("decide") and "cut" in printed


# ---- constants of a device ----

PLANTED = replace(plan.DEVICES["h200"], tflops=655.0, exposed=0.2, bandwidth=3.9e12, launch=3e-6, float32_tflops=44.0, l2_share=0.375)


def planted():
    """(rates, products) of a device with PLANTED's constants, every product off by up to 3 %, one in nine by far."""
    g = torch.Generator().manual_seed(0)
    measured = []
    for D in (4096, 2048, 896):
        for what, m, n, k in (("logits", 512, 151_936, D), ("logits", 128, 151_936, D), ("logits", 512, 12_672, D),
                              ("dH", 1536, D, 151_936), ("dH", 1024, D, 151_936), ("dW", 151_936, D, 4096), ("dW", 25_344, D, 5888)):  # fmt: skip
            for way in fit.WAYS:
                noise = 1 + 0.06 * (torch.rand((), generator=g).item() - 0.5)
                measured.append(((what, m, n, k, way), noise * cost.seconds(*fit.product(PLANTED, what, m, n, k, way))))
    measured = [(of, seconds * (1 if i % 9 else 3)) for i, (of, seconds) in enumerate(measured)]
    rates = {"copy": PLANTED.bandwidth, "launch": 1 / PLANTED.launch, "cube float32": PLANTED.float32_tflops * 1e12}
    for path, share in fit.SHARES.items():
        size = share * PLANTED.l2
        speed = 2.1 * PLANTED.bandwidth if share <= PLANTED.l2_share else 1.2 * PLANTED.bandwidth
        rates[path] = size / (size / speed + PLANTED.launch)
    return rates, measured


def test_the_fit_finds_planted_constants():
    rates, measured = planted()
    found = fit.fit(plan.DEVICES["h200"], rates, measured)
    assert found.tflops == pytest.approx(PLANTED.tflops, rel=0.02) and found.exposed == pytest.approx(PLANTED.exposed, abs=0.05)
    assert (found.bandwidth, found.launch, found.float32_tflops, found.l2_share) == pytest.approx((3.9e12, 3e-6, 44.0, 0.375))
    assert (found.name, found.multiprocessors, found.l2) == (PLANTED.name, PLANTED.multiprocessors, PLANTED.l2)
    cold = lambda size: size / (size / PLANTED.bandwidth + PLANTED.launch)  # noqa: E731
    nothing_hot = {**rates, **{path: cold(share * PLANTED.l2) for path, share in fit.SHARES.items()}}
    assert fit.fit(plan.DEVICES["h200"], nothing_hot, measured).l2_share == 1 / 8
    one_late = {**nothing_hot, "8/8 of L2": 3 * PLANTED.bandwidth}
    assert fit.fit(plan.DEVICES["h200"], one_late, measured).l2_share == 1 / 8, "what is behind a cold share is noise"


def test_a_fit_that_cannot_be_believed_is_refused():
    rates, measured = planted()
    with pytest.raises(ValueError, match="2 products"):
        fit.fit(plan.DEVICES["h200"], rates, [*measured[:2], (measured[2][0], 0.0)])
    sheet = plan.DEVICES["h200"]
    assert fit.inside(sheet, fit.fit(sheet, rates, measured))
    assert not fit.inside(sheet, fit.fit(sheet, rates, [(of, 9 * seconds) for of, seconds in measured]))


@pytest.fixture
def record_of_devices(tmp_path, monkeypatch):
    """devices.json of its own, and a machine with an H200 and both kinds of kernels."""
    from types import SimpleNamespace

    file = tmp_path / "devices.json"
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(devices, "FILE", file)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: properties.name)
    forget = lambda: (devices._read.cache_clear(), cost._device.cache_clear())  # noqa: E731
    forget()
    yield SimpleNamespace(file=file, forget=forget, gpu=torch.device("cuda", 0))
    forget()


def device_row(**constants):
    known = {name: getattr(PLANTED, name) for name in devices.CONSTANTS} | constants
    return record.row("NVIDIA H200", "constants", None, kind="device", constants=known) | {"device": "NVIDIA H200", "commit": "0123abc"}


def test_the_planner_follows_what_was_measured(record_of_devices):
    assert plan.device_of(record_of_devices.gpu) == plan.DEVICES["h200"], "without a record the data sheet"
    devices.adopt([device_row()], record_of_devices.file)
    record_of_devices.forget()
    found = plan.device_of(record_of_devices.gpu)
    assert found == PLANTED and found.cache == int(PLANTED.l2 * 0.375)
    ask = lambda device: plan.Problem(8192, 0, 151_936, 4096, 2, 4, True, True, plan.DEFAULT_GPU_WORKSPACE_BYTES, device=device)  # noqa: E731
    before, after = plan.predict(ask(plan.DEVICES["h200"])).predicted_ms, plan.predict(ask(found)).predicted_ms
    assert after > 1.1 * before, "fewer TFLOP/s take longer"
    for constant, value in (("exposed", 0.9), ("launch", 1e-4), ("bandwidth", 1e12)):
        assert plan.predict(ask(replace(found, **{constant: value}))).predicted_ms > after, constant
    for k in (151_936, 0):
        step = cost.Step("dH" if k else "policy", 1, 1536, 4096, k, 10**9, 0)
        times = [cost.seconds(ask(replace(found, launch=launch)), step) for launch in (0.0, 1e-3)]
        assert times[1] - times[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("text", ["{", "[]", '{"NVIDIA H200": 3}', '{"NVIDIA H200": {"tflops": -1}}', '{"NVIDIA H200": {"tflops": "many"}}',
                                  '{"NVIDIA H200": {"launch": NaN}}', '{"NVIDIA H200": {"bandwidth": Infinity}}', '{"NVIDIA H200": {"fastest": {"32000": "torch"}}}',
                                  '{"NVIDIA H200": {"fastest": {"all": "cuda"}}}'])  # fmt: skip
def test_a_broken_record_of_devices_is_an_error_that_names_it(text, record_of_devices):
    record_of_devices.file.write_text(text)
    with pytest.raises(ValueError, match=r"devices\.json is no record.*make gpu STAGE=plan"):
        plan.device_of(record_of_devices.gpu)
    for read_it in (lambda: devices.fastest("NVIDIA H200"), lambda: devices.adopt([device_row()], record_of_devices.file)):
        with pytest.raises(ValueError, match=r"devices\.json"):
            read_it()
    assert record_of_devices.file.read_text() == text
    assert plan.device_of(torch.device("cpu")) is plan.DEVICES["cpu"], "a CPU needs none"


def test_constants_that_the_planner_would_refuse_are_not_written(record_of_devices):
    with pytest.raises(ValueError, match="tflops is None"):
        devices.adopt([device_row(tflops=None)], record_of_devices.file)
    assert not record_of_devices.file.exists()


def test_records_are_adopted_from_files(tmp_path, record_of_devices, monkeypatch):
    record.write(tmp_path / "h200-plan.json", [device_row()])
    timed = [record.row(name, "policy", {"rows": 10, "vocab": 32_000}, [s], kind="kernel") | {"device": "NVIDIA H200"}
             for name, s in (("triton", 2.0), ("cuda", 1.0))]  # fmt: skip
    record.write(tmp_path / "h200-kernels.json", timed)
    monkeypatch.setattr(devices.adopt, "__defaults__", (record_of_devices.file,))
    assert not command.main(["--adopt", str(tmp_path / "h200-plan.json"), str(tmp_path / "h200-kernels.json")])
    entry = json.loads(record_of_devices.file.read_text())["NVIDIA H200"]
    assert entry["fastest"] == {"32000": "cuda"} and entry["tflops"] == 655.0 and entry["commit"] == "0123abc"


def test_nvcc_is_asked_for_one_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cuda, "_run", lambda line: pytest.fail("nothing needs to be asked"))
    for capability, expected in ((90, "sm_90a"), (80, "sm_80"), (103, "sm_103")):
        line = build_cuda.command("nvcc", ROOT / "csrc" / build_cuda.SOURCES[0], tmp_path / "a.so", (capability,))
        assert [word for word in line if "gencode" in word] == [f"-gencode=arch=compute_{expected[3:]},code={expected}"]


# ---- peer_shims ----


def test_shims_stand_in_for_what_cannot_be_imported(tmp_path):
    for name, text in {
        "trl/__init__.py": "", "trl/trainer/__init__.py": "", "trl/trainer/utils.py": "import no_such_package",
        "trl/kernels.py": "def backward():\n    from trl.trainer.utils import maybe_gather_lm_head_ctx\n    with maybe_gather_lm_head_ctx(1):\n        return 2",
        "verl/__init__.py": "import no_such_package", "verl/utils/__init__.py": "import no_such_package",
        "verl/utils/kernel/__init__.py": "", "verl/utils/kernel/linear_cross_entropy.py": "linear_cross_entropy = 3",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = """if 1:
        from benchmarks.gpu import peer_shims
        for library in ("liger", "trl", "verl"):
            peer_shims.install(library)
        import trl.kernels
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
        print(trl.kernels.backward(), linear_cross_entropy)
    """
    paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path)
    assert done.stdout.split() == ["2", "3"], done.stderr


def test_no_shim_is_in_the_wheel():
    for path in (ROOT / "grpo_kernels" / "bench").glob("*.py"):
        assert "sys.modules" not in path.read_text(), path
