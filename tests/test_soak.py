"""The parts of `make soak` on a few steps, and what breaks their promises."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.soak import __main__ as soak
from benchmarks.soak import drift, growth, kill, planner
from grpo_kernels.bench import memory

OPTIONS = SimpleNamespace(seed=0, seconds=1)
pytestmark = pytest.mark.unpoisoned


@pytest.mark.exhaustive(reason="ten seconds: measures a run in a process of its own")
def test_growth_counts_bytes_and_tensors(monkeypatch):
    found = growth.run(OPTIONS, steps=6, settled=2)
    assert [step for step, *_ in found["points"]] == [1, 2, 3, 4, 5, 6] and "steps 2 to 6" in found["says"]
    assert all(size > 2**26 and tensors > 50 for _, size, tensors in found["points"])
    for last, holds in (((9, growth.ALLOWED, 5), True), ((9, growth.ALLOWED + 1, 5), False), ((9, 0, 6), False)):
        monkeypatch.setattr(memory, "run", lambda *_, last=last: [(1, 0, 0), (2, 0, 5), (3, 2**30, 9), last])
        assert growth.run(OPTIONS, settled=2)["holds"] == holds


@pytest.mark.exhaustive(reason="six seconds")
def test_planner_measures_calls_beside_their_formula(monkeypatch):
    chosen = sorted(planner.cases(0, 60), key=lambda case: math.prod(case[0][:3]))[:2]  # the fastest
    monkeypatch.setattr(planner, "cases", lambda seed, count: chosen)
    found = planner.run(OPTIONS, count=2)
    assert found["holds"] and 0.1 < found["median_ratio"] <= found["largest_ratio"] <= planner.LARGEST
    monkeypatch.setattr(memory, "run", lambda *_: [1.06 * planned for _, planned in chosen])
    assert not planner.run(OPTIONS, count=2)["holds"]


@pytest.mark.exhaustive(reason="a minute: trains in three processes, one after the other")
def test_a_run_that_is_killed_ends_as_an_unbroken_one(monkeypatch):
    found = kill.run(SimpleNamespace(seed=1), kills=1, steps=16)  # killed after 0.13 of its training
    assert found["holds"] and found["kills"] == len(found["moments"]) == 1 and "bit by bit" in found["says"]


def test_weights_of_another_run_break_the_promise(monkeypatch, tmp_path):
    def live(folder, steps, seconds=kill._LIMIT):
        (tmp_path / folder / "model.safetensors").write_bytes(random.randbytes(8))
        return seconds < kill._LIMIT, 1.0, "passed over"

    monkeypatch.setattr(kill, "live", live)
    found = kill.run(OPTIONS, kills=2)
    assert not found["holds"] and (found["kills"], found["passed_over"]) == (2, 3) and "others than" in found["says"]


@pytest.mark.exhaustive(reason="five seconds")
def test_both_ways_are_trained_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(drift, "PICTURE", tmp_path / "drift.png")
    monkeypatch.setattr(drift, "WINDOW", 1)
    warm = drift.demo.warm_up
    monkeypatch.setattr(drift.demo, "warm_up", lambda *a: warm(*a, most_steps=40))
    found = drift.run(OPTIONS, seeds=(0,), steps=4)
    ours, exact = found["curves"]["entropy"].values()
    assert len(ours[0]) == 2 and np.allclose(ours, exact, rtol=0.05) and ours != exact
    assert (tmp_path / "drift.png").stat().st_size > 10_000


def test_curves_are_apart_where_means_differ_by_more_than_seeds():
    exact = drift.smooth([[0.0] * 10 + [1.0] * 10 + [9.0], [1.0] * 10 + [3.0] * 10 + [9.0]])
    assert exact.tolist() == [[0, 1], [1, 3]]
    found = drift.compare(exact + np.array([0.9, -1.9]), exact)
    assert found["holds"] and found["spread"] == 1 and found["apart"] == pytest.approx(1.9)
    assert not drift.compare(exact + np.array([1.1, 0]), exact)["holds"]


def test_parts_are_kept_beside_each_other_and_a_broken_one_is_the_exit_status(monkeypatch, tmp_path, capsys):
    file = tmp_path / "soak.json"
    parts = {name: lambda options, holds=name != "kill": {"holds": holds, "says": "so"} for name in soak.PARTS}
    monkeypatch.setattr(soak, "PARTS", parts)
    assert soak.main(["kill", "--json", str(file)]) == 1 and "kill: BROKEN" in capsys.readouterr().out
    assert soak.main(["fuzz", "growth", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [r["part"] for r in rows] == ["growth", "kill", "fuzz"] and all("commit" in r for r in rows)
    with pytest.raises(SystemExit):
        soak.main(["kil"])


@pytest.mark.exhaustive(reason="six seconds")
def test_fuzzing_starts_and_counts():
    found = soak.fuzz(OPTIONS)
    assert found["holds"] and found["says"].startswith("Done ") and int(found["says"].split()[1]) > 0
