"""Which of a test's combinations of parameters run always."""

from collections import Counter

import pytest


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
