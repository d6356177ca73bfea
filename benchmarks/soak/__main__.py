"""python -m benchmarks.soak [PART ...] [--json FILE]: exit status 1 if a promise was broken."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from grpo_kernels.bench import record

RECORD = Path("benchmarks/results/soak.json")
PARTS = ("growth", "planner", "kill", "drift", "fuzz")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    p.add_argument("--json", type=Path, default=RECORD, metavar="FILE", help="parts found there are kept")
    p.add_argument("--seconds", type=float, default=600, help="of fuzzing (600)")
    p.add_argument("--seed", type=int, default=0)
    options = p.parse_args(argv)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        p.error(f"unknown part {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    kept = json.loads(options.json.read_text()) if options.json.exists() else []
    broken = False
    for name in options.parts or PARTS:
        start = time.monotonic()
        found = importlib.import_module(f"{__package__}.{name}").run(options)
        found = {"part": name, "seconds": round(time.monotonic() - start), **found, **record.environment()}
        broken |= not found["holds"]
        print(f"{name}: {'holds' if found['holds'] else 'BROKEN'} ({found['seconds']} s) {found['says']}", flush=True)
        kept = [r for r in kept if r["part"] != name] + [found]
        record.write(options.json, sorted(kept, key=lambda r: PARTS.index(r["part"])))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
