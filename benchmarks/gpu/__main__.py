"""The command line: stage after stage, each a process of its own, then a short table. This process never touches the GPU.

    python -m benchmarks.gpu [--stage decide,test=300] [--minutes 9.5] [--commit HASH] [--device cpu --tiny]
    python -m benchmarks.gpu --show FILE...     --adopt FILE...

A stage writes rows into <device>-<stage>.json under $OUT or benchmarks/results, each as soon as it is known; what it prints goes
to <device>-log.txt. One that fails, or is ended at its limit, stops no other. Exit status: 1 if one did.
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .programs import ROOT, limited

STAGES = {  # seconds, 560 together; who runs it
    "decide": (60, "benchmarks.gpu.decide:run"),
    "build": (40, "benchmarks.gpu.kernels:build"),
    "kernels": (45, "benchmarks.gpu.kernels:run"),
    "test": (150, "benchmarks.gpu.programs:test"),
    "plan": (45, "benchmarks.gpu.decide:tune"),
    "peers": (120, "benchmarks.gpu.decide:peer"),
    "sanitize": (100, "benchmarks.gpu.programs:sanitize"),
}
# a process each, which it may take down; the one that waits for inductor last
PEERS = ("full_logits", "trl", "liger", "liger-logits", "verl", "cce", "torch-lce", "full_logits-compiled")


def parser():
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a GPU can decide, stage by stage.")
    p.add_argument("--stage", default=",".join(STAGES), help="only these, by comma; NAME=SECONDS sets a limit")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="small shapes: seconds, to see that everything runs")
    p.add_argument("--minutes", type=float, default=9.5, help="of all stages together")
    p.add_argument("--commit", help="recorded as the commit where git does not know it")
    p.add_argument("--show", nargs="+", metavar="FILE", help="print the table of these records, measure nothing")
    p.add_argument("--adopt", nargs="+", metavar="FILE", help="plan with what these records say of a device from now on")
    for hidden in ("--run", "--record", "--log", "--start", "--seconds", "--provider"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    return p


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments)
    if options.run or options.show or options.adopt:
        return importlib.import_module("benchmarks.gpu.stage").main(options)
    chosen = [item.partition("=") for item in options.stage.split(",")]
    if unknown := [name for name, *_ in chosen if name not in STAGES]:
        parser().error(f"--stage must be of {', '.join(STAGES)}, got {', '.join(unknown)}")
    if options.commit:
        os.environ["GRPO_KERNELS_COMMIT"] = options.commit
    folder, slug = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").absolute(), slug_of(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    log, end, codes, files = folder / f"{slug}-log.txt", time.monotonic() + 60 * options.minutes, [], []
    for name, _, limit in chosen:
        files.append(folder / f"{slug}-{name}.json")
        usual, function = STAGES[name]
        over = min(end, time.monotonic() + float(limit or usual))
        providers = [None] if name != "peers" else PEERS[:2] if options.tiny else PEERS
        for i, provider in enumerate(providers):
            start = time.monotonic()
            seconds = (over - start) / (len(providers) - i)
            command = [sys.executable, "-u", "-m", "benchmarks.gpu", *arguments, "--run", function, "--stage", name, "--log", log]
            command += ["--record", files[-1], "--start", f"{start}", "--seconds", f"{seconds}"]
            codes.append(limited(command + ["--provider", provider] * bool(provider), seconds, log))
            ended = "its time was over" if codes[-1] is None else f"exit status {codes[-1]}"
            print(f"{name} {provider or ''}: {ended}, {time.monotonic() - start:.0f} of {seconds:.0f} s", flush=True)
    print(f"\n{folder}/{slug}-*.json, and what the stages printed: {log}", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--show", *files], cwd=ROOT)
    return 0 if set(codes) == {0} else 1


def slug_of(device):
    """NVIDIA H200 -> h200, the beginning of the files' names."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return device
    name = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], stdout=subprocess.PIPE, text=True).stdout
    return re.sub(r"[^a-z0-9]+", "-", name.strip().split("\n")[0].lower().removeprefix("nvidia ")).strip("-") or device


if __name__ == "__main__":
    sys.exit(main())
