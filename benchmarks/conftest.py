"""Options, the order of the runs, and the table at the end."""

import gc
from pathlib import Path

import pytest
import torch

from grpo_kernels.products import tile_memory

from . import record, report
from .check import accept, errors
from .problem import WORKLOADS, Shape, make_problem, tiny, truth
from .providers import PRODUCTS, PROVIDERS

pytest.importorskip("pytest_benchmark")


def pytest_addoption(parser):
    group = parser.getgroup("grpo-kernels")
    group.addoption("--rows", help="write the figures to this JSON file")
    group.addoption("--rounds", type=int, default=9, help="timings per provider (slow peers take at most 3)")
    group.addoption("--workloads", default=",".join(WORKLOADS), help="which, by comma")
    group.addoption("--providers", default=",".join(PROVIDERS), help="which, by comma")
    group.addoption("--tiny", action="store_true", help="a small vocabulary: seconds, to see that everything runs")


def pytest_configure(config):
    config.option.benchmark_quiet = True  # one line per timing would be hundreds; the table is the terminal summary
    config.option.benchmark_disable_gc = True


def pytest_generate_tests(metafunc):
    """Workload outermost, then the round, then the provider: what one round compares ran within seconds of each other.

    Each round starts with another provider, so that nobody always follows the one that leaves the caches worst.
    """
    if "timing" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    names = [name for name in option.providers.split(",") if PROVIDERS[name].missing() is None]
    runs = []
    for workload in option.workloads.split(","):
        for i in range(option.rounds):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                if i < (PROVIDERS[name].rounds or option.rounds):
                    runs.append(pytest.param((workload, name), id=f"{workload}-{i}-{name}"))
    metafunc.parametrize("timing", runs)


class Session:
    """The calls of one workload at a time, each checked when it is first asked for, and the times of all."""

    def __init__(self, option):
        self.shape = tiny() if option.tiny else Shape()
        self.workload, self.problem, self.truth, self.calls = None, None, None, {}
        self.times, self.details = {}, {}

    def call(self, workload, name):
        if self.workload != workload:
            self.calls, self.problem, self.truth = {}, None, None
            gc.collect()
            self.workload = workload
            self.problem = make_problem(self.shape, WORKLOADS[workload])
            self.truth = truth(self.problem)
        if name not in self.calls:
            self.calls[name] = PROVIDERS[name].make(self.problem)
            self._check(workload, name)
        return self.calls[name]

    def _check(self, workload, name):
        call = self.calls[name]
        if call is None:
            return
        tile_memory.block = None  # or the tile of an earlier workload would not count
        gc.collect()
        measured = record.reset_peak()
        before = record.resident() if measured else 0
        result = call()
        peak_bytes = record.resident("VmHWM") - before if measured else None
        found = {}
        if name != PRODUCTS:
            found = errors(result, self.truth)
            accept(name, found, WORKLOADS[workload].gradients)
        self.details[workload, name] = {"found": found, "peak_bytes": peak_bytes}

    def rows(self):
        return [
            record.row(name, workload, self.shape, times, settings=PROVIDERS[name].settings, **self.details[workload, name])
            for (workload, name), times in self.times.items()
        ]


@pytest.fixture(scope="session")
def bench_session(request):
    torch.manual_seed(0)
    request.config.grpo_session = session = Session(request.config.option)
    return session


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "grpo_session", None)
    if session is None or not session.times:
        return
    rows = session.rows()
    terminalreporter.write_line("")
    for line in report.table(rows):
        terminalreporter.write_line(line)
    for name, provider in PROVIDERS.items():
        if provider.missing():
            terminalreporter.write_line(f"{name} left out: {provider.missing()}")
    if config.option.rows:
        record.write(Path(config.option.rows), rows)
