"""Checkpoints that are known to be whole: sealed behind their last byte, checked before their first is used.

A run that is killed while it writes leaves a folder without a seal. The seal lists every file with its size and checksum, and is
put in place in one step.
"""

import json
import os
import re
import zlib
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK = 2**22


class Unusable(ValueError):
    """A checkpoint that cannot be resumed: the message says why, and names one that can where there is one."""


def seal(folder):
    """Declares ``folder`` complete as it is now, once all of it is on the disk."""
    folder = Path(folder)
    for file in _files(folder):
        _flush(file)
    files = {str(file.relative_to(folder)): [file.stat().st_size, _checksum(file)] for file in _files(folder)}
    new = folder / f"{SEAL}.new"
    new.write_text(json.dumps(files, indent=0, sort_keys=True))
    _flush(new)
    new.replace(folder / SEAL)
    _flush(folder)


def check(folder):
    """Raises Unusable unless ``folder`` holds, byte by byte, what it held when it was sealed; names the newest one that does."""
    if (wrong := what_is_wrong(folder)) is None:
        return
    if own := _by_step(Path(folder)):
        whole = next((str(inner) for inner in own if what_is_wrong(inner) is None), None)
        offer = f"resume from its newest whole one, {whole}" if whole else "none of those in it is whole"
        raise Unusable(f"checkpoint {folder}: it is the folder of a run, not a checkpoint; {offer}")
    others = [other for other in _by_step(Path(folder).parent) if other != Path(folder)]
    whole = next((str(other) for other in others if what_is_wrong(other) is None), None)
    offer = f"resume from {whole}" if whole else "there is no other one beside it that is whole"
    raise Unusable(f"checkpoint {folder}: {wrong}; {offer}")


def check_kind(folder, fsdp):
    """Raises Unusable if ``folder`` was written under FSDP and the run is not, or the other way round."""
    sharded = any(path.name.startswith(FSDP_MODEL_NAME) for path in Path(folder).iterdir())
    if sharded != fsdp:
        kinds = ("without FSDP", "under FSDP")
        raise Unusable(f"checkpoint {folder} must be resumed {kinds[sharded]}, as it was written, got a run {kinds[fsdp]}")


def newest(output_dir) -> str | None:
    """The newest complete checkpoint of a run; None where there is none at all.

    Raises:
        Unusable: there are checkpoints, and none of them is whole.
    """
    found = _by_step(Path(output_dir))
    for folder in found:
        if (wrong := what_is_wrong(folder)) is None:
            return str(folder)
        print(f"checkpoint {folder}: {wrong}; passed over")
    if found:
        raise Unusable(f"no checkpoint of {output_dir} is whole; remove them to start anew")
    return None


def step_of(folder) -> int:
    """Optimiser steps behind a checkpoint; -1 for None."""
    return -1 if folder is None else int(_NAME.fullmatch(Path(folder).name)[1])


def what_is_wrong(folder) -> str | None:
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((folder / SEAL).read_text())
        expected = {name: (int(size), int(checksum)) for name, (size, checksum) in files.items()}
    except FileNotFoundError:
        return f"it has no {SEAL}: the run ended while it was written"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"its {SEAL} cannot be read"
    for name, (size, checksum) in expected.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {SEAL} names {name!r}, outside of it"
        if not file.is_file():
            return f"{name!r} is missing"
        if file.stat().st_size != size:
            return f"{name!r} has {file.stat().st_size} bytes of {size}"
        if _checksum(file) != checksum:
            return f"{name!r} is not what was written"
    return None


def _by_step(output_dir):
    """Folders of checkpoints, the last step first."""
    if not output_dir.is_dir():
        return []
    found = [folder for folder in output_dir.iterdir() if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def _files(folder):
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in (SEAL, f"{SEAL}.new")]


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path):
    found = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found
