"""The backends that have row kernels over two tiles, as a fixture."""

import pytest

from grpo_kernels import available_backends, backends
from support import cuda_host
from support.problems import DEVICE, with_float32_chunks

WIDE = "float32 chunks"  # plain PyTorch's kernels in the loops that a GPU takes


def with_two_tiles():
    """The backends that can run here and have row kernels over two tiles; CUDA's on the host where there is no GPU."""
    names = [
        n for n, reason in available_backends().items() if reason is None and hasattr(backends.kernels(n), "divergence_statistics")
    ]
    if DEVICE != "cpu":
        return [n for n in names if n != "cpu"]
    on_the_host = cuda_host.why_unavailable() is None and hasattr(cuda_host, "divergence_statistics")
    return [*names, WIDE, *["cuda"] * on_the_host]


BACKENDS = with_two_tiles()


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """A backend's name, as the public functions take it."""
    if request.param == WIDE:
        with_float32_chunks(monkeypatch)
        return "torch"
    if request.param == "cuda" and DEVICE == "cpu":
        monkeypatch.setitem(backends._MODULES, "cuda", cuda_host)
        resolve = backends.resolve
        monkeypatch.setattr(backends, "resolve", lambda name, *more: name if name == "cuda" else resolve(name, *more))
    return request.param


on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="its tensors are on the CPU")


def each_seed_and_backend(first, count, usual):
    """Parametrizes ``seed`` and the fixture: each of ``count`` seeds on each backend, every fifth on the slow ones; ``usual`` always."""
    cases = [
        pytest.param(first + i, name, marks=() if i < usual else pytest.mark.exhaustive)
        for name in BACKENDS for i in range(0, count, 5 if slow(name) else 1)
    ]  # fmt: skip
    return pytest.mark.parametrize("seed, backend", cases, indirect=["backend"])


def slow(backend):
    return DEVICE == "cpu" and backend in ("triton", "cuda")
