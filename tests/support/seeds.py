"""Seeds as cases by name, of which the first run always and the others in `make test-all`."""

import pytest


def each_seed(first, count, usual):
    """Parametrizes ``seed``: each of ``count`` seeds from ``first`` on is a case of its own, the first ``usual`` of them run always."""
    assert 0 < usual <= count, "at least one seed runs always"
    marks = [() if i < usual else pytest.mark.exhaustive for i in range(count)]
    return pytest.mark.parametrize("seed", [pytest.param(first + i, marks=mark) for i, mark in enumerate(marks)])
