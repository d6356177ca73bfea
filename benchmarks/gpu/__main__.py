"""The command line: stage after stage, each a process of its own, then a short table. This process never touches the GPU.

    python -m benchmarks.gpu [--stage decide,test=300] [--device cpu --tiny] | --show FILE... | --adopt FILE...

A stage writes rows into <device>-<stage>.json under $OUT, else under benchmarks/results (--tiny: outputs), each as soon as it is
known; what it prints goes to <device>-log.txt. One that fails, or is ended at its limit, stops no other. Exit status: 1 if one did.
"""

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .programs import ROOT, limited

PEERS = ("full_logits", "trl", "liger", "liger-logits", "verl", "cce", "torch-lce", "full_logits-compiled")  # a process each
STAGES = {  # seconds; who runs it
    "decide": (60, "benchmarks.gpu.decide:run"),
    "build": (40, "benchmarks.gpu.kernels:build"),
    "kernels": (45, "benchmarks.gpu.kernels:run"),
    "test": (150, "benchmarks.gpu.programs:test"),
    "plan": (45, "benchmarks.gpu.decide:tune"),
    **{f"peers:{name}": (60 if "compiled" in name else 40, "benchmarks.gpu.decide:peer") for name in PEERS},
    "sanitize": (600, "benchmarks.gpu.programs:sanitize"),  # what is left of the minutes
}


def parser():
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a GPU can decide, stage by stage.")
    p.add_argument("--stage", default="decide,build,kernels,test,plan,peers,sanitize", help="some, peers:trl too; NAME=SECONDS")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="small shapes: seconds, to see that everything runs")
    p.add_argument("--minutes", type=float, default=9.5, help="of all stages together")
    p.add_argument("--show", nargs="+", metavar="FILE", help="print the table of these records, measure nothing")
    p.add_argument("--adopt", nargs="+", metavar="FILE", help="plan with what these records say of a device from now on")
    for hidden in ("--run", "--record", "--log", "--start", "--seconds"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    return p


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments)
    if options.run or options.show or options.adopt:
        return importlib.import_module("benchmarks.gpu.stage").main(options)
    limits = {name: limit for name, _, limit in (item.partition("=") for item in options.stage.split(","))}
    if unknown := limits.keys() - STAGES.keys() - {name.split(":")[0] for name in STAGES}:
        parser().error(f"--stage knows no {', '.join(unknown)}")
    place = os.environ.get("OUT") or ROOT / ("outputs" if options.tiny else "benchmarks/results")
    folder, slug = Path(place).absolute(), slug_of(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    log, end, codes, files = folder / f"{slug}-log.txt", time.monotonic() + 60 * options.minutes, [], {}
    for name, (usual, function) in STAGES.items():
        stage, _, peer = name.partition(":")
        if not {name, stage} & limits.keys() or (options.tiny and peer in PEERS[2:]):
            continue
        start, files[stage] = time.monotonic(), folder / f"{slug}-{stage}.json"
        seconds = min(float(limits.get(name) or limits.get(stage) or usual), end - start)
        command = [sys.executable, "-u", "-m", "benchmarks.gpu", *arguments, "--run", function, "--stage", name, "--log", log]
        command += ["--record", files[stage], "--start", f"{start}", "--seconds", f"{seconds}"]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}  # a record says what it ran on
        codes.append(limited(command, seconds, log, **hidden))
        ended = "its time was over" if codes[-1] is None else f"exit status {codes[-1]}"
        last = log.read_bytes()[-500:].decode(errors="replace").strip().splitlines()[-1:] if codes[-1] else []
        print(f"{name}: {ended}, {time.monotonic() - start:.0f} of {seconds:.0f} s", *last, flush=True)
    print(f"\n{folder}/{slug}-*.json, and what the stages printed: {log}", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--show", *files.values()], cwd=ROOT)
    return 0 if set(codes) == {0} else 1


def slug_of(device):
    """NVIDIA H200 -> h200, the beginning of the files' names."""
    tool, asked = shutil.which("nvidia-smi") if device == "cuda" else None, ["--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run([tool, *asked], capture_output=True, text=True).stdout if tool else ""
    return re.sub(r"[^a-z0-9]+", "-", (name or device).split("\n")[0].lower().removeprefix("nvidia "))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends what it has started
    sys.exit(main())
