"""python -m benchmarks.soak [PART ...] [--json FILE]: exit status 1 if a promise was broken."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from grpo_kernels.bench import record

from . import drift, growth, kill, planner


def fuzz(options):
    """Random calls of the compiled kernels and of the public functions, guided by coverage where atheris is installed."""
    command = [sys.executable, "tests/support/fuzz.py", str(options.seconds), f"-seed={options.seed + 1}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "FUZZ_SEED": str(options.seed)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    runs = [line for line in said.splitlines() if line.startswith("Done ")]
    return {"holds": done.returncode == 0, "says": runs[-1] if runs else said[-2000:], "atheris": "INFO: Running with" in said}


PARTS = {"growth": growth.run, "planner": planner.run, "kill": kill.run, "drift": drift.run, "fuzz": fuzz}


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    p.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    p.add_argument("--json", type=Path, default=Path("benchmarks/results/soak.json"), help="parts found there are kept")
    p.add_argument("--seconds", type=int, default=600, help="of fuzzing (600)")
    p.add_argument("--seed", type=int, default=0)
    options = p.parse_args(argv)
    rows = {r["part"]: r for r in json.loads(options.json.read_text())} if options.json.exists() else {}
    names = options.parts or PARTS
    for name in names:
        start = time.monotonic()
        found = PARTS[name](options)
        rows[name] = {"part": name, "seconds": round(time.monotonic() - start), **found, **record.environment()}
        print(f"{name}: {'holds' if found['holds'] else 'BROKEN'} ({rows[name]['seconds']} s) {found['says']}", flush=True)
        record.write(options.json, [rows[part] for part in PARTS if part in rows])
    return 0 if all(rows[name]["holds"] for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
