"""What every test gets: two threads at most (one beside other workers), fixed seeds, and memory that nobody wrote reading as NaN.

Without a GPU the Triton kernels run in Triton's interpreter. GRPO_KERNELS_TEST_DEVICE=cuda puts the problems of the tests on
a GPU instead, where the same kernels are compiled.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.mend()

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", 2)), torch.get_num_threads()))


SAMPLED = 5


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help=f"run all cases in Triton's interpreter, not one in {SAMPLED}")


def pytest_collection_modifyitems(config, items):
    """The interpreter takes milliseconds for a row: of a test's cases there, one in SAMPLED runs, spread over all parameters."""
    if DEVICE != "cpu" or config.getoption("--exhaustive"):
        return
    cases, left_out = {}, []
    for item in items:
        if any("triton" in str(value) for value in getattr(item, "callspec", _NoCases).params.values()):
            cases.setdefault(item.function, []).append(item)
    for group in cases.values():
        if len(group) >= SAMPLED:
            left_out += [item for i, item in enumerate(group) if i % SAMPLED]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


class _NoCases:
    params = {}  # noqa: RUF012


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:cispo caps the importance ratio")  # of the many that draw a cispo's options
    config.addinivalue_line("markers", "unpoisoned: run with torch.empty as in production")
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
