"""The GPU harness runs from end to end without a GPU: tiny shapes, whose figures mean nothing."""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.gpu import __main__ as harness  # noqa: E402
from benchmarks.gpu import parts, table  # noqa: E402

TINY = ("--device", "cpu", "--tiny", "--rounds", "2")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    # with every core spoken for, two threads wait for each other far longer than they compute
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

    def run(*arguments):
        status = harness.main([*TINY, *arguments])
        (file,) = tmp_path.glob("*-gpu.json")
        return status, json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_paths_and_a_part_that_raises(run, monkeypatch):
    monkeypatch.setitem(parts.PARTS, "broken", parts.Part("nowhere:run", 10))  # unknown to the process that is to run it
    names = ["ours-auto", "full-logits"]
    status, content, printed = run("--part", "broken,paths", "--paths", "one_pass,logprobs", "--providers", ",".join(names))

    assert status == 1 and content["parts"]["broken"]["status"] == "failed" and "broken" in content["parts"]["broken"]["message"]
    part = content["parts"]["paths"]
    assert part["status"] == "ok" and part["seconds"] > 0, part
    assert {"device", "capability", "torch", "triton", "cuda", "driver", "versions", "commit", "date"} <= content.keys()
    keys = {"provider", "path", "shape", "median", "spread", "peak_bytes", "error", "ratio"}
    assert all(keys <= r.keys() for r in part["rows"])
    good = {(r["provider"], r["path"]): r for r in part["rows"] if r["status"] == "ok"}
    assert good.keys() == {(name, path) for name in (*names, "products-whole") for path in ("one_pass", "logprobs")}
    for (name, path), r in good.items():
        assert r["median"] > 0 and r["ratio"] > 0 and r["rounds"] == 2 and r["products"] == (3 if path == "one_pass" else 1)
        assert name == "products-whole" or 0 < r["error"] < 0.1
    assert "ours-auto" in printed and len(printed) < 10_000


def context(tmp_path, names=None):
    from benchmarks.gpu.context import Context
    from benchmarks.gpu.device import Cpu
    from benchmarks.gpu.journal import Journal

    options = argparse.Namespace(tiny=True, rounds=2, providers=names)
    return Context(options, Cpu(), Journal(tmp_path / "journal"), time.monotonic() + 60)


@pytest.fixture
def base():
    import torch

    from benchmarks.gpu.inputs import make_base
    from grpo_kernels.bench.shapes import Shape

    return make_base(Shape(8, 4, 16, 101), torch.device("cpu"))


def verdicts(c):
    from benchmarks.gpu.journal import read

    return {line["row"]["provider"]: line["row"] for line in read(c.journal.path) if "row" in line}


def test_who_is_wrong_is_recorded_and_not_timed(tmp_path, base):
    from benchmarks.gpu.inputs import PATHS
    from benchmarks.gpu.measure import measure
    from benchmarks.gpu.providers import Provider
    from grpo_kernels.bench.peers import full_logits

    calls = []

    def twice(p):
        right = full_logits(p)

        def run():
            result = right()
            calls.append(p)
            return replace(result, d_weight=2 * result.d_weight)

        return run

    def raises(p):
        raise MemoryError("too much")

    c = context(tmp_path)
    providers = [Provider("right", full_logits), Provider("twice", twice), Provider("raises", raises)]
    measure(c, base, PATHS["one_pass"], providers, c.deadline)
    found = verdicts(c)
    assert found["right"]["status"] == "ok" and found["right"]["rounds"] == 2
    assert found["twice"]["status"] == "wrong" and "d_weight" in found["twice"]["message"] and len(calls) == 1
    assert found["raises"]["status"] == "failed" and "too much" in found["raises"]["message"]


def test_a_process_goes_on_behind_what_ended_the_last_one(tmp_path, base):
    from benchmarks.gpu.context import row
    from benchmarks.gpu.inputs import PATHS
    from benchmarks.gpu.journal import key_of
    from benchmarks.gpu.measure import measure, shape_of
    from benchmarks.gpu.providers import Provider
    from grpo_kernels.bench.peers import full_logits

    providers = [Provider("right", full_logits), Provider("deadly", lambda p: pytest.fail("it was run again"))]
    first = context(tmp_path)
    first.journal.finish(f"logprobs|{shape_of(base.shape)}")
    first.journal.begin(key_of(row("deadly", "one_pass", shape_of(base.shape))))
    second = context(tmp_path)
    for path in ("logprobs", "one_pass"):
        measure(second, base, PATHS[path], providers, second.deadline)
    found = verdicts(second)
    assert found["deadly"]["status"] == "crashed" and found["right"]["status"] == "ok"
    assert {r["path"] for r in found.values()} == {"one_pass"}


@pytest.mark.parametrize(("lives", "status"), [(["restart", "ok"], "ok"), (["crashed"] * 9, "failed"), (["too late"], "failed")])
def test_a_part_lives_again_until_it_ends_by_itself(tmp_path, monkeypatch, lives, status):
    left = list(lives)
    monkeypatch.setattr(parts, "_live", lambda *a: left.pop(0))
    assert parts.run_part("paths", 60, [], tmp_path / "none", tmp_path / "log")["status"] == status
    assert len(lives) - len(left) == min(len(lives), 5)


def test_the_table_is_short_whatever_happened():
    rows = [
        {"provider": f"p{i}", "path": path, "shape": {"tokens": 1, "depth": 2, "vocab": 3}, "status": "failed", "message": "x" * 300,
         "median": None, "ratio": None, "peak_bytes": None, "error": None}
        for i in range(40) for path in ("one_pass", "logprobs", "frozen", "idle40")
    ]  # fmt: skip
    facts = dict.fromkeys(("device", "torch", "triton", "cuda", "driver", "commit"), "?")
    part = {"status": "failed", "seconds": 1.0, "message": "m" * 500, "rows": rows}
    assert len(table.table({**facts, "parts": {"paths": part, "shapes": part, "kernels": part, "sweep": part}})) <= table.LIMIT
