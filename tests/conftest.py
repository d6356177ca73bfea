"""What every test gets: two threads at most, fixed seeds, and memory that nobody wrote reading as NaN."""

import os

import pytest
import torch

torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", 2)), torch.get_num_threads()))


def pytest_configure(config):
    config.addinivalue_line("markers", "unpoisoned: run with torch.empty as in production")


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
