"""The examples run as a newcomer would run them, and learn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_custom_loop_learns_in_under_a_hundred_lines():
    assert len((EXAMPLES / "custom_loop.py").read_text().splitlines()) < 100
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", run(EXAMPLES / "custom_loop.py", "--steps", 25))]
    assert rewards[0] < 0.6 and rewards[-1] > 0.8


def test_trl_learns_the_same_stock_and_fused():
    pytest.importorskip("trl")
    lines = [run(EXAMPLES / "trl_grpo.py", "--trainer", name).splitlines()[-1] for name in ("fused", "stock")]
    assert len({line.split(":")[1] for line in lines}) == 1, lines
    first, last = map(float, re.findall(r"[\d.]+", lines[0]))
    assert last > first + 0.05
