"""Which cases of a test run always and which in `make test-all` alone, where the test does not list them by hand."""

import itertools

import pytest


def each_seed(first, count, usual):
    """Parametrizes ``seed``: each of ``count`` seeds from ``first`` on is a case of its own, the first ``usual`` of them run always."""
    assert 0 < usual <= count, "at least one seed runs always"
    marks = [() if i < usual else pytest.mark.exhaustive for i in range(count)]
    return pytest.mark.parametrize("seed", [pytest.param(first + i, marks=mark) for i, mark in enumerate(marks)])


def grid(**values):
    """Parametrizes every combination of ``values``; a cover in which each value of each parameter comes up runs always.

    Case i of the cover takes value i of each parameter, round and round, so that it is as long as the longest list.
    """
    names, lists = list(values), [list(options) for options in values.values()]
    longest = max(map(len, lists))
    cover = {tuple(i % len(options) for options in lists) for i in range(longest)}
    cases = []
    for places in itertools.product(*(range(len(options)) for options in lists)):
        case = [options[place] for options, place in zip(lists, places, strict=True)]
        cases.append(pytest.param(*case, marks=() if places in cover else pytest.mark.exhaustive))
    return pytest.mark.parametrize(", ".join(names), cases)
