"""The examples run as a newcomer would run them, and learn."""

import math
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


def test_the_first_snippet_of_the_readme_runs_as_it_stands(tmp_path):
    """And shows what a newcomer cannot guess: hidden states and the tokens that they predict are one position apart."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(snippet.splitlines()) <= 15
    assert "[:, :-1]" in snippet and "ids[:, 1:]" in snippet and ".backward()" in snippet
    path = tmp_path / "snippet.py"
    path.write_text(snippet)
    printed = [float(x) for x in run(path).split()]
    assert printed and all(map(math.isfinite, printed))
