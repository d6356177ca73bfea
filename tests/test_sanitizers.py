"""The compiled CPU kernels built with ASan and UBSan: their own test suites, and random calls; and random calls that coverage guides."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from support.cuda_host import sanitizer_libraries

from grpo_kernels.backends import native

ROOT = Path(__file__).parent.parent
SECONDS = {"fuzz": 60, "fuzz under sanitizers": 10}
FLAGS = "-g1 -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
pytestmark = [
    pytest.mark.exhaustive(reason="make sanitize runs them"),
    pytest.mark.unpoisoned,
    pytest.mark.skipif(native.why_unavailable() is not None, reason="there is no compiled extension"),
]


def outer():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the package, its extension built with sanitizers once for all workers, and the environment to run it in."""
    libraries = sanitizer_libraries()
    if libraries is None:
        pytest.skip("g++ has no sanitizer libraries")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "sanitized"
    with FileLock(shared / "sanitized.lock"):
        if not folder.exists():
            _build(folder)
    environment = {**outer(), "LD_PRELOAD": " ".join(libraries), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    # torch and Python leak at exit by design; a fault is to end the process with its own status
    environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_odr_violation=0:exitcode=99:malloc_context_size=2:quarantine_size_mb=16"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1:exitcode=99"
    return folder, environment


def _build(folder):
    for name in ("grpo_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    flags = {"GRPO_KERNELS_CXXFLAGS": FLAGS, "GRPO_KERNELS_BUILD_CUDA": "0"}
    done = subprocess.run(build, cwd=folder, env={**outer(), **flags}, capture_output=True, text=True)
    (library,) = (folder / "grpo_kernels").glob("_native*.so")
    assert b"__asan" in library.read_bytes() and b"__ubsan" in library.read_bytes(), done.stdout + done.stderr


def run(folder, environment, *command):
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def test_the_sanitizers_see_a_wild_write(sanitized):
    folder, environment = sanitized
    code = ("import torch; from grpo_kernels.backends import native as n; t = torch.zeros(1, 64); "
            "f = n.params.transpose(t, torch.zeros(64, 1)); f.matrix.rows = 4; n._native.transpose('', 1, f)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


def test_the_kernels_own_tests_under_sanitizers(sanitized):
    files = ("tests/test_native.py", "tests/test_row_kernels.py", "tests/test_pair_kernels.py")
    out = run(*sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--exhaustive", *files, "-k", "test_native or cpu")
    assert " passed" in out and "failed" not in out
    assert int(out.rsplit(" passed", 1)[0].split()[-1]) > 2000, out[-500:]


def test_the_kernels_over_two_tiles_under_sanitizers(sanitized):
    some = "cpu and (whole or ranges or banned or large or (gradient and entropy))"
    out = run(*sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--exhaustive", "tests/test_divergence_kernels.py", "-k", some)
    assert " passed" in out and "failed" not in out
    assert int(out.rsplit(" passed", 1)[0].split()[-1]) > 500, out[-500:]


def test_the_product_under_sanitizers(sanitized):
    some = "33-47-65 or nan or nothing or stride"
    out = run(*sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--exhaustive", "tests/test_products_cpu.py", "-k", some)
    assert " passed" in out and "failed" not in out
    assert int(out.rsplit(" passed", 1)[0].split()[-1]) > 30, out[-500:]  # 37 on a CPU without AMX


def test_random_calls_under_sanitizers(sanitized):
    folder, environment = sanitized
    code = "import sys; sys.modules['atheris'] = None; sys.path.insert(0, 'tests'); from support import fuzz; fuzz.main(float(sys.argv[1]), [])"
    out = run(folder, environment, "-c", code, str(SECONDS["fuzz under sanitizers"]))
    assert int(out.split()[-2]) > 100, out


def test_random_calls_guided_by_coverage():
    pytest.importorskip("atheris")
    environment = {**outer(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/support/fuzz.py", str(SECONDS["fuzz"]), "-seed=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Done " in done.stderr + done.stdout
