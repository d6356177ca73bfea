"""Options of the quick set, and its runs: workload outermost, then the provider."""

import gc

import pytest

from grpo_kernels.bench import clock as clocks
from grpo_kernels.bench.check import accept, errors
from grpo_kernels.bench.command import QUICK_TOKENS, QUICK_WORKLOADS
from grpo_kernels.bench.peers import Absent
from grpo_kernels.bench.problem import checked_part, make_problem, truth
from grpo_kernels.bench.providers import PRODUCTS, PROVIDERS, default_names
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
        self.workload = self.problem = self.part = self.truth = None

    def make(self, workload, name):
        """Skips the test where the provider cannot; raises where it is wrong."""
        if self.workload != workload:
            self.problem = self.part = self.truth = None
            gc.collect()
            self.workload, self.problem = workload, make_problem(self.shape, WORKLOADS[workload], device=self.clock.device)
            self.part = checked_part(self.problem)
            self.truth = truth(self.part)
        provider = PROVIDERS[name]
        try:
            if name != PRODUCTS:
                found = errors(provider.make(self.part)(), self.truth, self.part.advantages.abs().mean().item())
                accept(name, found, WORKLOADS[workload].gradients)
            return provider.make(self.problem)
        except Absent as why:
            pytest.skip(f"{name}: {why}")


@pytest.fixture(scope="session")
def calls(request):
    return Calls(request.config.option)
