"""Options of the quick set, and its runs: workload outermost, then the provider."""

import gc

import pytest
import torch

from grpo_kernels.bench import clock as clocks
from grpo_kernels.bench.command import QUICK_TOKENS, QUICK_WORKLOADS
from grpo_kernels.bench.measure import checked, find_truth
from grpo_kernels.bench.peers import Absent
from grpo_kernels.bench.problem import make_problem
from grpo_kernels.bench.providers import PROVIDERS, default_names
from grpo_kernels.bench.shapes import TINY, Shape
from grpo_kernels.bench.workloads import WORKLOADS

pytest.importorskip("pytest_benchmark")


def pytest_addoption(parser):
    group = parser.getgroup("grpo-kernels")
    group.addoption("--workloads", default=",".join(QUICK_WORKLOADS), help="which, by comma")
    group.addoption("--providers", help="which, by comma")
    group.addoption("--tiny", action="store_true", help="a small vocabulary: seconds, to see that everything runs")


def pytest_generate_tests(metafunc):
    if "provider" in metafunc.fixturenames:
        option = metafunc.config.option
        names = option.providers.split(",") if option.providers else default_names(True, clocks.here().device)
        runs = [(workload, name) for workload in option.workloads.split(",") for name in names]
        metafunc.parametrize(("workload", "provider"), runs, ids=[f"{w}-{n}" for w, n in runs])


class Calls:
    """The calls of one workload at a time, each checked when it is first asked for."""

    def __init__(self, option):
        self.clock = clocks.here()
        self.shape = TINY if option.tiny else Shape().of(QUICK_TOKENS)
        self.workload, self.problem, self.shared = None, None, []

    def make(self, workload, name):
        """Skips the test where the provider cannot; raises where it is wrong."""
        if self.workload != workload:
            gc.collect()
            self.workload, self.problem = workload, make_problem(self.shape, WORKLOADS[workload], device=self.clock.device)
            self.known, why = find_truth(self.problem, self.clock, self.shared)
            if self.known is None:
                pytest.skip(why)
        try:
            call = checked(PROVIDERS[name], self.problem, self.known, {})
        except Absent as why:
            pytest.skip(f"{name}: {why}")

        def to_its_end():
            call()
            if self.clock.device.type == "cuda":
                torch.cuda.synchronize()

        return to_its_end


@pytest.fixture(scope="session")
def calls(request):
    return Calls(request.config.option)
