"""Which cases run by default, with --exhaustive, and when they are named."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import cover
from support.seeds import each_seed

TESTS = Path(__file__).parent
CASES = """
import pytest
from support.seeds import each_seed

@each_seed(40, 4, usual=2)
def test_seeds(seed):
    pass

@pytest.mark.exhaustive
def test_long():
    pass

@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", range(6))
def test_interpreted(shape, backend):
    pass

@pytest.mark.cover
@pytest.mark.parametrize("a", "xy")
@pytest.mark.parametrize("b", "xyz")
def test_covered(a, b):
    pass
"""


def cases_of(decorator):
    """[(values, whether it runs always)]"""
    return [(parameters.values, not parameters.marks) for parameters in decorator.args[1]]


def test_each_seed_is_a_case_and_the_first_run_always():
    assert cases_of(each_seed(5, 3, usual=1)) == [((5,), True), ((6,), False), ((7,), False)]
    assert all(always for _, always in cases_of(each_seed(0, 2, usual=2)))
    for usual in (0, 3):
        with pytest.raises(AssertionError, match="at least one seed runs always"):
            each_seed(0, 2, usual=usual)


def test_a_cover_has_every_value_and_every_combination_that_is_asked_for():
    counts = dict(dtype=2, vocab=5, given=2, backend=3)
    cases = [dict(zip(counts, values, strict=True)) for values in itertools.product(*map(range, counts.values()))]
    for together, size in ((), 5), (("dtype", "backend"), 6), (("vocab", "backend"), 15), (tuple(counts), 60):
        chosen = [cases[i] for i in cover(cases, together)]
        assert len(chosen) == size
        for name, count in counts.items():
            assert {case[name] for case in chosen} == set(range(count))
        assert len({tuple(case[name] for name in together) for case in chosen}) == math.prod(counts[name] for name in together)
    assert cover(cases[:1]) == {0} and cover([{"a": 0}, {"a": 1, "b": 0}, {"a": 1}]) == {0, 1}


def test_marked_cases_run_when_they_are_asked_for(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n" + (TESTS / "conftest.py").read_text())

    def collected(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *arguments]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        return [line.split("::")[1] for line in out.splitlines() if "::" in line]

    seeds, interpreted = ([f"test_seeds[{seed}]" for seed in range(40, 44)], [f"test_interpreted[{i}-{name}]" for i in range(6) for name in ("torch", "triton")])
    some = [name for name in interpreted if "torch" in name or "[0" in name or "[5" in name]
    covered = [f"test_covered[{b}-{a}]" for b in "xyz" for a in "xy"]
    assert collected() == [*seeds[:2], *some, "test_covered[x-x]", "test_covered[y-y]", "test_covered[z-x]"]
    assert collected("--exhaustive") == [*seeds, "test_long", *interpreted, *covered]
    assert collected("test_cases.py::test_long", "test_cases.py::test_covered[x-y]") == ["test_long", "test_covered[x-y]"]
