"""What every test gets: two threads at most (one beside other workers), fixed seeds, and memory that nobody wrote reading as NaN.

Without a GPU the Triton kernels run in Triton's interpreter. GRPO_KERNELS_TEST_DEVICE=cuda puts the problems of the tests on
a GPU instead, where the same kernels are compiled.
"""

import gc
import os

import pytest
import torch

pytest.register_assert_rewrite("support")  # before it is imported: its failures then show values, as those of test files do

from support import cases  # noqa: E402

DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    from support import interpreter

    interpreter.mend()

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", 2)), torch.get_num_threads()))


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run the cases that are marked exhaustive, and more of those in Triton's interpreter")
    parser.addoption("--every-case", action="store_true", help="run every case, all of those in Triton's interpreter, too")
    parser.addoption("--fast", action="store_true", help="run the cases of tests/fast.txt alone")


def pytest_collection_finish():
    """The cases live to the end: the garbage collector, which tests call too, need not look at tens of thousands of them each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    which = "exhaustive" if config.getoption("--exhaustive") else "usual"
    which = "all" if DEVICE != "cpu" or config.getoption("--every-case") else which
    where = config.invocation_params.dir
    config.stash[cases.NOT_USUAL] = cases.without_a_usual_case(set(items) - cases.named(items, config.args, where))
    chosen = cases.chosen(items, config.args, which, config.getoption("--fast"), where)
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def pytest_configure(config):
    if config.getoption("--fast") and config.args_source != config.ArgsSource.ARGS:
        config.args = sorted({str(config.rootpath / line.split("::")[0]) for line in cases.fast()})
    config.addinivalue_line("filterwarnings", "ignore:cispo caps the importance ratio")  # of the many that draw a cispo's options
    config.addinivalue_line("markers", "unpoisoned: run with torch.empty as in production")
    config.addinivalue_line("markers", "cover(*together): of all combinations some run always, in which each value of each parameter comes up "
                                       "and all combinations of the parameters named here; the others are exhaustive")  # fmt: skip
    config.addinivalue_line("markers", "exhaustive(reason): `make test-all` runs it, `make test` does not: one case of many, or a whole test for this reason")
    config.addinivalue_line("markers", "exhaustive_in_the_interpreter: its cases in Triton's interpreter are exhaustive")
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
