"""Which cases run: by default, with --exhaustive, with --fast and where tests are named; and what marks them."""

import os
from collections import Counter
from pathlib import Path

import pytest

SAMPLED = 5  # of a test's cases in Triton's interpreter one in so many runs, with --exhaustive too
NOT_USUAL = pytest.StashKey()  # what without_a_usual_case found
FAST = Path(__file__).parents[1] / "fast.txt"


def fast():
    """The lines of tests/fast.txt: a file, a test or one of its cases each."""
    return [line for line in FAST.read_text().splitlines() if line and not line.startswith("#")]


def chosen(items, arguments, which="usual", only_fast=False, where="."):
    """Those of ``items`` that run, as a set. A test that ``arguments`` name, FILE::TEST from the folder ``where``, does in any case.

    usual: neither cases marked exhaustive run, nor what a cover leaves of a test's combinations, of which one runs in Triton's
    interpreter, nor four in five of the other tests' cases there. exhaustive: all of these, and in the interpreter one in five of
    each test's cases. all: also those, as on a GPU.
    """
    always = named(items, arguments, where)
    lines = set(fast())
    _refuse_unknown(items, lines, always)
    others = [item for item in items if item not in always]
    found = {"usual": usual_cases, "exhaustive": exhaustive_cases, "all": set}[which](others)
    if only_fast:
        found = {item for item in others if item.nodeid in lines or (item in found and not lines.isdisjoint(_above(item.nodeid)))}
    return found | always


def named(items, arguments, where="."):
    """Those of ``items`` that FILE::TEST of ``arguments`` names from the folder ``where``, as a set."""
    tests = {(Path(where, file).resolve(), test) for file, found, test in (argument.partition("::") for argument in arguments) if found}
    return {item for item in items if any(item.path == file and item.nodeid.partition("::")[2].startswith(test) for file, test in tests)}


def without_a_usual_case(items):
    """Node ids of the tests none of whose cases `make test` runs."""
    # of cases without the marker a cover and a sample both keep one
    return {_above(item.nodeid)[1] for item in items} - {_above(item.nodeid)[1] for item in items if not item.get_closest_marker("exhaustive")}


def _above(nodeid):
    """The lines that a case may come under: its file and its test."""
    return nodeid.split("::")[0], nodeid.split("[")[0]


def _refuse_unknown(items, lines, by_name):
    """A line of fast.txt must be found in its file, where that has been read whole. A worker of xdist has nobody to tell."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    there = {item.nodeid for item in items} | {name for item in items for name in _above(item.nodeid)}
    missing = [line for line in lines if line.split("::")[0] in there and line not in there]
    if missing and not by_name:
        raise pytest.UsageError(f"tests/fast.txt names what is not there: {', '.join(sorted(missing))}")


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _in_the_interpreter(item):
    return any(str(value).startswith("triton") for value in _parameters(item).values())


def _sampled(items):
    """One in SAMPLED of a test's cases, where it has as many."""
    tests = {}
    for item in items:
        tests.setdefault(item.function, []).append(item)
    return {item for cases in tests.values() for item in (cases if len(cases) < SAMPLED else cases[::SAMPLED])}


def exhaustive_cases(items):
    interpreted = [item for item in items if _in_the_interpreter(item)]
    return set(items).difference(interpreted) | _sampled(interpreted) | usual_cases(items)


def usual_cases(items):
    covered, interpreted, found = {}, [], set()
    for item in items:
        alone = _in_the_interpreter(item)
        if item.get_closest_marker("exhaustive") or (alone and item.get_closest_marker("exhaustive_in_the_interpreter")):
            continue
        if _parameters(item) and item.get_closest_marker("cover"):
            covered.setdefault(item.function, ([], []))[alone].append(item)
        elif alone:
            interpreted.append(item)
        else:
            found.add(item)
    for compiled, in_the_interpreter in covered.values():
        cases = compiled or in_the_interpreter
        together = cases[0].get_closest_marker("cover").args
        # a value that comes up in several cases is one object
        places = cover([{name: id(value) for name, value in case.callspec.params.items()} for case in cases], together)
        found.update(cases[place] for place in places)
        found.update(in_the_interpreter[-1:] if compiled else ())
    return found | _sampled(interpreted)


def cover(cases, together=()):
    """Places of a few ``cases`` in which every value of every parameter comes up, as every combination of the parameters ``together``.

    A case is {parameter: which of its values}. Taken is always the case with most that no other one has; of equals the one whose
    values have been taken least, so that they mix.
    """

    def parts(case):
        alone = [(name, value) for name, value in case.items() if name not in together]
        joint = tuple((name, case[name]) for name in together if name in case)
        return {*alone, joint} if joint else set(alone)

    parts_of = list(map(parts, cases))
    taken = Counter()
    chosen, wanted = set(), set().union(*parts_of)
    while wanted:
        best = max(range(len(cases)), key=lambda i: (len(parts_of[i] & wanted), -sum(taken[part] for part in parts_of[i]), -i))
        chosen.add(best)
        wanted -= parts_of[best]
        taken.update(parts_of[best])
    return chosen


def usually(values, *usual):
    """``values`` for a parametrize of which ``usual`` run always and the others are exhaustive."""
    values = list(values)
    assert usual and all(value in values for value in usual), [value for value in usual if value not in values]
    return [pytest.param(value, marks=() if value in usual else pytest.mark.exhaustive) for value in values]


def values_that_run(request, test, parameter):
    """The values of ``parameter`` with which ``test`` of this file runs now: what a fixture has to prepare."""
    cases = [item for item in request.session.items if item.path == request.path and item.originalname == test]
    return [case.callspec.params[parameter] for case in cases]
