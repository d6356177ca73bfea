"""Which cases run by default, with --exhaustive, with --fast and when they are named; what the fast ones reach."""

import ast
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import NOT_USUAL, chosen, cover, fast, named, usually, without_a_usual_case
from support.seeds import each_seed

import grpo_kernels
from grpo_kernels.losses.config import LOSS_TYPES

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent
MARKER, REASON = re.compile(r"pytest\.mark\.exhaustive\b"), re.compile(r"reason='[^']+'")
CASES = """
import pytest
from support.seeds import each_seed

@each_seed(40, 4, usual=2)
def test_seeds(seed):
    pass

@pytest.mark.exhaustive(reason="a minute")
def test_long():
    pass

@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", range(6))
def test_interpreted(shape, backend):
    pass

@pytest.mark.parametrize("kernels", ["triton-wide"])
@each_seed(0, 7, usual=5)
def test_drawn(seed, kernels):
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


def exhaustive_tests():
    """{node id: the reason that its marker or that of its file gives}"""
    found = {}
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        of_file = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for marker in [*node.decorator_list, *of_file]:
                    marks = marker.elts if isinstance(marker, ast.List) else [marker]
                    found |= {f"tests/{path.name}::{node.name}": REASON.search(ast.unparse(mark)) for mark in marks if MARKER.match(ast.unparse(mark))}
    return found


def test_every_test_has_a_usual_case_or_its_marker_says_why_not(request):
    """Of the files that were collected with this one: by `make test` all."""
    found = exhaustive_tests()
    assert request.config.stash[NOT_USUAL] <= found.keys()
    assert all(found.values()), [test for test, reason in found.items() if not reason]
    elsewhere = ("tests/test_sanitizers.py", "tests/test_peers.py")
    count = len([test for test in found if not test.startswith(elsewhere)])
    for text in ("CONTRIBUTING.md", "Makefile"):
        assert f"every test by at least one case, except {count} long ones" in (TESTS.parent / text).read_text().lower(), count


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


def test_marked_cases_run_when_they_are_asked_for(pytester):
    items = pytester.getitems(CASES)

    def names(*more):
        ran = chosen(items, *more)
        return [item.name for item in items if item in ran]

    seeds, interpreted = ([f"test_seeds[{seed}]" for seed in range(40, 44)], [f"test_interpreted[{i}-{name}]" for i in range(6) for name in ("torch", "triton")])
    some = [name for name in interpreted if "torch" in name or "[0" in name or "[5" in name]
    drawn = [f"test_drawn[{seed}-triton-wide]" for seed in (0, 5)]
    covered = [f"test_covered[{b}-{a}]" for b in "xyz" for a in "xy"]
    assert names([]) == [*seeds[:2], *some, drawn[0], "test_covered[x-x]", "test_covered[y-y]", "test_covered[z-x]"]
    assert names([], "exhaustive") == [*seeds, "test_long", *some, *drawn, *covered]
    assert names([], "all") == [item.name for item in items] and names([], "usual", True) == []
    file = items[0].nodeid.split("::")[0]
    assert without_a_usual_case(items) == {f"{file}::test_long"}
    given = {"test_long", "test_covered[x-y]", "test_drawn[6-triton-wide]"}
    for only_fast in (False, True):
        for spelled, where in ((file, "."), (f"./{file}", "."), (str(items[0].path), "/"), (f"../{items[0].path.parent.name}/{file}", items[0].path.parent)):
            found = names([f"{spelled}::{name}" for name in given], "usual", only_fast, where)
            assert set(found) - set(names([], "usual", only_fast)) == given
            assert {item.name for item in named(items, [f"{spelled}::test_long", str(items[0].path)], where)} == {"test_long"}


def test_what_is_usual_is_one_of_the_values():
    marks = {case.values[0]: bool(case.marks) for case in usually({"a": 1, "b": 2, "c": 3}, "a", "c")}
    assert marks == {"a": False, "b": True, "c": False}
    with pytest.raises(AssertionError):
        usually(["a"], "b")


@pytest.fixture(scope="module")
def fast_cases():
    """Their ids, by a pytest of their own: it refuses a line of the list that is no test."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "--fast"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.exhaustive(reason="fifteen seconds: collects the tests once more")
def test_the_fast_cases_reach_every_loss_and_backend(fast_cases):
    parameters = {part for case in fast_cases if "[" in case for part in case.split("[")[1].rstrip("]").split("-")}
    assert set(LOSS_TYPES) <= parameters
    assert {"torch", "cpu", "triton"} <= parameters and any("test_cuda_parity" in case for case in fast_cases)
    assert all(any(case.startswith(line) for case in fast_cases) for line in fast())


def test_the_fast_cases_reach_every_public_function_and_integration():
    """By the names in the tests and in what these call, in their file and in tests/support."""
    functions, imported = {}, set()
    for file in {line.split("::")[0] for line in fast()}:
        tree = ast.parse((TESTS.parent / file).read_text())
        functions[file] = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        imported |= {alias.name if node.module == "grpo_kernels.integrations" else node.module.split(".")[-1] for node in ast.walk(tree)
                     if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_kernels.integrations") for alias in node.names}  # fmt: skip
    shared = {}
    for path in (TESTS / "support").glob("*.py"):
        shared |= {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    waiting = [tuple(line.split("[")[0].split("::")) for line in fast() if "::" in line]
    seen, used = set(waiting), set()
    while waiting:
        file, name = waiting.pop()
        node = functions[file].get(name) or shared.get(name)
        nodes = list(ast.walk(node)) if node else []
        names = {x.id for x in nodes if isinstance(x, ast.Name)} | {x.attr for x in nodes if isinstance(x, ast.Attribute)}
        used |= names
        new = {(file, other) for other in names | {x.arg for x in nodes if isinstance(x, ast.arg)}} - seen  # arguments may be fixtures
        seen |= new
        waiting += new
    outputs = {"DistillationOutput", "Divergence", "GRPOLossOutput", "LogProbs", "LogProbsAndLse"}
    assert set(grpo_kernels.__all__) - outputs <= used
    folder = Path(grpo_kernels.__file__).parent / "integrations"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= imported
