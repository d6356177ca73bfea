"""What was measured on a kind of GPU, by its full name: constants of the cost model, and whose fused kernel was the faster.

    {"NVIDIA H200": {"tflops": 745.0, ..., "fastest": {"151936": "cuda"}, "commit": "...", "date": "..."}}

`make gpu` writes devices.json where it runs; `python -m benchmarks.gpu --adopt FILE...` writes it from records of such a run.
"""

import functools
import json
import math
from pathlib import Path

FILE = Path(__file__).with_name("devices.json")
CONSTANTS = ("tflops", "float32_tflops", "bandwidth", "exposed", "launch", "l2_share")  # fields of engine.cost.Device
_MAY_BE_0 = ("exposed", "launch")


def constants(name: str) -> dict:
    """What replaces the data sheet's numbers of this GPU; {} where nothing was measured."""
    return {key: value for key, value in _read(FILE).get(name, {}).items() if key in CONSTANTS}


def fastest(name: str) -> dict:
    """{V: the backend whose fused kernel was the faster there} of this GPU."""
    return _read(FILE).get(name, {}).get("fastest", {})


@functools.cache
def _read(path):
    try:
        return {name: _checked(entry) for name, entry in json.loads(path.read_text()).items()} if path.exists() else {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no record of devices ({error}); delete it, `make gpu STAGE=plan` writes another") from error


def _checked(entry):
    for name in CONSTANTS:
        value = entry.get(name, 1.0)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (value == 0 and name in _MAY_BE_0))):
            raise ValueError(f"{name} is {value!r}")
    fastest = {int(vocab): backend for vocab, backend in entry.get("fastest", {}).items()}
    if unknown := set(fastest.values()) - {"triton", "cuda"}:
        raise ValueError(f"the fastest is {unknown.pop()!r}")
    return {**entry, "fastest": fastest}


def adopt(rows, file: Path = FILE) -> None:
    """Writes what rows of `make gpu` say of their devices: rows of kind device, and the fused kernels where both were timed."""
    known, speeds = dict(_read.__wrapped__(file)), {}
    for r in (r for r in rows if r["status"] == "ok"):
        if r.get("kind") == "device":
            known.setdefault(r["device"], {}).update(r["constants"], commit=r["commit"], date=r["date"])
        elif (r.get("kind"), r["path"]) == ("kernel", "policy"):
            # rows per second: the tiles of two vocabularies differ in height
            speed = r["shape"]["rows"] / r["median"]
            speeds.setdefault(r["device"], {}).setdefault(str(r["shape"]["vocab"]), {})[r["provider"]] = speed
    for name, found in speeds.items():
        if both := {vocab: max(speed, key=speed.get) for vocab, speed in found.items() if len(speed) == 2}:
            known.setdefault(name, {})["fastest"] = both
    if known:
        new = file.with_suffix(".new")
        new.write_text(json.dumps({name: _checked(entry) for name, entry in known.items()}, indent=1) + "\n")
        new.replace(file)
