"""What every test gets: two threads at most (one beside other workers), fixed seeds, and memory that nobody wrote reading as NaN.

Without a GPU the Triton kernels run in Triton's interpreter. GRPO_KERNELS_TEST_DEVICE=cuda puts the problems of the tests on
a GPU instead, where the same kernels are compiled.
"""

import os

import pytest
import torch

pytest.register_assert_rewrite("support")  # before it is imported: its failures then show values, as those of test files do

from support.cases import cover  # noqa: E402

DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    from support import interpreter

    interpreter.mend()

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", 2)), torch.get_num_threads()))


SAMPLED = 5  # of the cases in Triton's interpreter that a test has, one in so many runs always


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the cases marked exhaustive, and all in Triton's interpreter")


def pytest_collection_modifyitems(config, items):
    """Leaves out what runs with --exhaustive alone: marked cases, what a cover leaves of a test's combinations, and four in five of
    the other tests' cases in Triton's interpreter.

    A test whose name is given, FILE::TEST, runs in any case, and on a GPU everything does.
    """
    if DEVICE != "cpu" or config.getoption("--exhaustive"):
        return
    named = [argument for argument in config.args if "::" in argument]
    covered, interpreted, left_out = {}, {}, set()
    for item in items:
        parameters = getattr(item, "callspec", _NoCases).params
        if any(item.nodeid.startswith(argument) for argument in named):
            continue
        if item.get_closest_marker("exhaustive"):
            left_out.add(item)
        elif parameters and item.get_closest_marker("cover"):
            covered.setdefault(item.function, []).append(item)
        elif any(str(value).startswith("triton") for value in parameters.values()):
            interpreted.setdefault(item.function, []).append(item)
    for cases in covered.values():
        together = cases[0].get_closest_marker("cover").args
        # a value that comes up in several cases is one object
        chosen = cover([{name: id(value) for name, value in case.callspec.params.items()} for case in cases], together)
        left_out.update(case for i, case in enumerate(cases) if i not in chosen)
    for cases in interpreted.values():
        if len(cases) >= SAMPLED:
            left_out.update(case for i, case in enumerate(cases) if i % SAMPLED)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


class _NoCases:
    params = {}  # noqa: RUF012


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:cispo caps the importance ratio")  # of the many that draw a cispo's options
    config.addinivalue_line("markers", "unpoisoned: run with torch.empty as in production")
    config.addinivalue_line("markers", "cover(*together): of all combinations some run always, in which each value of each parameter comes up "
                                       "and all combinations of the parameters named here; the others are exhaustive")  # fmt: skip
    config.addinivalue_line("markers", "exhaustive: one case of many; `make test-all` runs it, `make test` does not")
    config.addinivalue_line("markers", "inductor: compiles for seconds; `make gpu` runs it last")


@pytest.fixture
def one_thread():
    """For tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch.empty and its kin, those inside torch's own operators included, are filled with NaN (or the largest integer)."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
