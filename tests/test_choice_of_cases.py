"""Which cases run by default, with --exhaustive, and when they are named; and the decorators that mark the others."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.seeds import each_seed, grid

TESTS = Path(__file__).parent
CASES = """
import pytest
from support.seeds import each_seed, grid

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


def test_a_grid_runs_every_value_of_every_parameter_always():
    lists = dict(dtype=["float32", "bfloat16"], vocab=[1, 2, 3, 64, 65], given=[False, True], how=["once"])
    cases = cases_of(grid(**lists))
    assert len(cases) == len({values for values, _ in cases}) == 20
    always = [values for values, runs in cases if runs]
    assert len(always) == 5
    for place, options in enumerate(lists.values()):
        assert {values[place] for values in always} == set(options)


def test_marked_cases_run_when_they_are_asked_for(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n" + (TESTS / "conftest.py").read_text())

    def collected(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *arguments]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        return [line.split("::")[1] for line in out.splitlines() if "::" in line]

    seeds, interpreted = ([f"test_seeds[{seed}]" for seed in range(40, 44)], [f"test_interpreted[{i}-{name}]" for i in range(6) for name in ("torch", "triton")])
    some = [name for name in interpreted if "torch" in name or "[0" in name or "[5" in name]
    assert collected() == seeds[:2] + some
    assert collected("--exhaustive") == [*seeds, "test_long", *interpreted]
    assert collected("test_cases.py::test_long", "test_cases.py::test_seeds[43]") == ["test_long", "test_seeds[43]"]
