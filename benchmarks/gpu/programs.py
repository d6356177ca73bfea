"""Parts `build`, `test` and `sanitizer`: other programs, their verdict and the end of what they print."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from .context import Skipped, row
from .providers import our_backends

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_gpu.py", "tests/test_row_kernels.py", "tests/test_triton.py", "tests/test_parity.py")
_TAIL = 25  # lines that are kept in the JSON


def run_build(context):
    if context.options.device == "cpu":
        raise Skipped("builds in place, which a run on the CPU leaves alone")
    seconds, code, lines = _run([sys.executable, "setup.py", "build_ext", "--inplace"], context.left())
    file = ROOT / "grpo_kernels" / "_build_info.json"
    error = (json.loads(file.read_text()) if file.exists() else {}).get("error")
    good = code == 0 and not error
    message = "" if good else error or f"exit status {code}: {lines[-1] if lines else 'no output'}"
    context.journal.row(_row("setup.py", "build", seconds, "ok" if good else "failed", message, lines))


def run_test(context):
    cuda = context.options.device == "cuda"
    # without a GPU the others run in Triton's interpreter, for minutes
    files = context.options.tests.split(",") if context.options.tests else TESTS if cuda else TESTS[:1]
    for i, file in enumerate(files):
        if not (ROOT / file).exists():
            context.journal.row(_row("pytest", file, None, "absent", "there is no such file", []))
            continue
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", file]
        if cuda and i and importlib.util.find_spec("xdist"):  # small problems: the host is what they wait for
            command += ["-n", "4"]
        share = context.left() / (len(files) - i)
        seconds, code, lines = _run(command, share, GRPO_KERNELS_TEST_DEVICE=context.options.device)
        counts = count(lines)
        status = "ok" if code == 0 else "failed"
        if cuda and code in (0, 5) and not counts.get("passed"):
            status = "failed"
        last = lines[-1] if lines else "no output"
        message = ", ".join(f"{n} {what}" for what, n in counts.items()) or f"exit status {code}: {last}"
        context.journal.row(_row("pytest", file, seconds, status, message, lines) | {"counts": counts})


def count(lines):
    """{"passed": 12, ...} from the last line of pytest that counts."""
    for line in reversed(lines):
        if re.search(r"\bin \d+(\.\d+)?s\b", line):
            return {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)", line)}
    return {}


def run_sanitizer(context):
    if context.options.device == "cpu":
        raise Skipped("compute-sanitizer watches GPUs")
    small = [sys.executable, "-m", "benchmarks.gpu.small"]
    tool = shutil.which("compute-sanitizer")
    # the caching allocator hands out parts of large blocks, in which an access past the end is no error
    tools = [("memcheck", ["--report-api-errors", "no"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), ("racecheck", [], {})]
    runs = [(name, check) for check in tools for name in our_backends(torch.device("cuda")) if name != "torch"]
    runs += [(name, ("synccheck", [], {})) for name, check in runs if name == "cuda" and check[0] == "racecheck"]
    for i, (backend, (check, options, more)) in enumerate(runs):
        more = {**more, "GRPO_KERNELS_BACKEND": backend}
        share = context.left() / (len(runs) - i)
        if check == "memcheck":  # by itself first: a wrong result is no matter of memory, and the kernels are compiled then
            seconds, code, lines = _run(small, share / 2, GRPO_KERNELS_BACKEND=backend)
            status = "ok" if code == 0 else "failed"
            message = lines[-1] if lines else f"exit status {code}"
            context.journal.row(_row(f"small, {backend}", "all paths", seconds, status, message, lines))
        if tool is None:
            message = "compute-sanitizer is not on the PATH"
            context.journal.row(_row(f"{check}, {backend}", "all paths", None, "absent", message, []))
            continue
        command = [tool, "--tool", check, *options, "--print-limit", "20", "--error-exitcode", "9", *small]
        seconds, code, lines = _run(command, share, **more)
        said = [line for line in lines if line.startswith("=========")]
        summary = next((line.strip("= ") for line in reversed(said) if "SUMMARY" in line), None)
        clean = summary is not None and code == 0
        message = summary or ("its time was over" if code is None else f"exit status {code} and no summary")
        status = "ok" if clean else "failed"
        context.journal.row(_row(f"{check}, {backend}", "all paths", seconds, status, message, said[:60] or lines))


def _row(provider, path, seconds, status, message, lines):
    times = [] if seconds is None else [seconds]
    return row(provider, path, None, times, peer=False, status=status, message=message, tail=lines[-_TAIL:])


def _run(command, seconds, **environment):
    """(seconds, exit status or None if its time was over, lines); everything it prints goes to the log as it comes."""
    print("$", " ".join(command), flush=True)
    start = time.monotonic()
    # a session of its own: who is killed while a grandchild lives on would leave its output open
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def stop(*_):
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(max(1.0, seconds), stop)
    timer.start()
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        print(lines[-1], flush=True)
    code = process.wait()
    timer.cancel()
    signal.signal(signal.SIGTERM, before)
    return time.monotonic() - start, None if late.is_set() else code, lines
