"""`test` and `sanitize`: pytest, compute-sanitizer. Imports no PyTorch."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/test_{name}.py" for name in (
    "gpu", "row_kernels", "pair_kernels", "triton", "parity", "kept_rows", "autograd", "calls", "numerics", "logprobs",
)]  # fmt: skip
SMALL = "same_bits"  # of test_gpu.py: every path of the loss, with both backends, in one tile and in several
KERNELS = ("statistics_kernel", "gradient_kernel", "policy_kernel")  # in the names of ours, Triton's and CUDA C++'s


def limited(command, seconds, log, **variables):
    """The exit status, None if its time was over; all that it started is ended then, what it printed is at the end of the log."""
    told, process = [], None
    handler = signal.signal(signal.SIGTERM, lambda *_: told.append(True))  # its exit would lose a process that is being started
    try:
        with Path(log).open("ab") as file:
            variables = os.environ | variables
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True)
        signal.signal(signal.SIGTERM, handler)
        if told:
            signal.raise_signal(signal.SIGTERM)
        return process.wait(max(0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this process itself is told to end
        signal.signal(signal.SIGTERM, handler)
        for number in (signal.SIGTERM, signal.SIGKILL) if process else ():
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(3)


def pytest(stage, name, share, *arguments, before=(), **environment):
    """A row of its last line and what failed; with a sanitizer ``before`` it, of that one's summary."""
    log, start = Path(stage.options.log), time.monotonic()
    seconds, printed = (stage.deadline - start) * share, log.stat().st_size
    command = [*before, sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *arguments]
    code = limited(command, seconds, log, GRPO_KERNELS_TEST_DEVICE=stage.options.device, **environment)
    lines = log.read_bytes()[printed:].decode(errors="replace").splitlines() or ["nothing was printed"]
    said = [line for line in lines if line.startswith(("FAILED", "ERROR")) or "SUMMARY" in line]
    ran = stage.options.device == "cpu" or any(" passed" in line for line in lines[-20:])
    good = code == 0 and ran and (not before or any("SUMMARY" in line for line in said))
    note = "; ".join(line.strip("= ") for line in [*(["its time was over"] if code is None else []), *said[:9], lines[-1]])
    stage.row("program", "pytest", name, None, [time.monotonic() - start], status="ok" if good else "failed", note=note, says=note)


def test(stage):
    """What needs no inductor first, which compiles for minutes."""
    if stage.options.device == "cpu":
        return pytest(stage, "without a GPU", 1, TESTS[0])
    workers = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    for name, marked, share in ("without inductor", "not inductor", 0.8), ("inductor", "inductor", 1):
        pytest(stage, name, share, *TESTS, "-m", marked, *workers)


def sanitize(stage):
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if stage.options.device == "cpu" or tool is None:
        return "compute-sanitizer watches GPUs" if tool else "there is no compute-sanitizer"
    if stage.deadline - time.monotonic() < 90:
        return "less than 90 seconds are left; make gpu STAGE=sanitize"
    ours = [word for name in KERNELS for word in ("--kernel-name", f"kns={name}")]
    # the caching allocator hands out parts of large blocks, in which an access past the end is no error
    checks = [("memcheck", ["--report-api-errors", "no"], SMALL, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
              ("racecheck", ours, SMALL, {}), ("synccheck", ours, f"{SMALL} and cuda", {})]  # fmt: skip
    for i, (check, options, tests, environment) in enumerate(checks):
        before = [tool, "--tool", check, *options, "--print-limit", "20", "--error-exitcode", "9"]
        pytest(stage, check, 1 / (len(checks) - i), TESTS[0], "-k", tests, before=before, **environment)
