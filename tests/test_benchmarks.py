"""The benchmark keeps running: a vocabulary of a thousand, one round, in seconds. Its figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# with every core spoken for, two threads wait for each other far longer than they compute
# and benchmarks cannot be run by a worker of pytest-xdist, which they would take themselves for
OUTER = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
ENVIRONMENT = {**OUTER, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_loss_benchmark_writes_a_row_for_every_provider_and_workload(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "rows.json"
    providers = "products,grpo_kernels,full_logits"
    options = ("--tiny", "--rounds=2", f"--providers={providers}", f"--rows={file}")
    table = python("-m", "pytest", "benchmarks", "-q", "--benchmark-only", *options)
    assert "x products" in table
    rows = json.loads(file.read_text())
    assert {(r["provider"], r["path"]) for r in rows} == {
        (p, w) for p in providers.split(",") for w in ("dense", "half", "frozen", "logprobs", "sequence")
    }
    keys = {"provider", "path", "shape", "median", "spread", "peak_bytes", "error", "versions", "commit"}
    assert all(keys <= r.keys() and r["median"] > 0 and r["rounds"] == 2 for r in rows)
    assert all(r["error"] is not None for r in rows if r["provider"] != "products")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak mark is a file of Linux")
def test_the_memory_benchmark_measures_its_process():
    shape = {"sequences": 8, "length": 16, "depth": 32, "vocab": 1009, "dtype": "bfloat16"}
    printed = python("-m", "benchmarks.memory", "--point", json.dumps(["grpo_kernels", "dense", shape]))
    row = json.loads(printed.splitlines()[-1])
    assert row["peak_bytes"] >= 0 and row["gradient_bytes"] == 2 * 128 * 32 + 6 * 1009 * 32
