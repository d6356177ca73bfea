"""What a part has done so far: one JSON object per line, written before and after every step.

    {"begin": key}     about to run it; if this is the last line, it is what ended the process
    {"row": {...}}     a result
    {"done": key}      nothing of this key is to be repeated
    {"status": ..., "message": ...}
"""

import json
from pathlib import Path

RESTART = 75  # exit status: the device no longer answers this process, and a fresh one can go on


class Journal:
    """Appends, and knows what an earlier process of the same part left behind."""

    def __init__(self, path):
        self.path = Path(path)
        self.done, self.crashed, self.seen = set(), None, set()
        last = None
        for line in read(self.path):
            last = line
            if "done" in line:
                self.done.add(line["done"])
            elif "row" in line:
                self.seen.add(key_of(line["row"]))
        if last is not None and "begin" in last:
            self.crashed = last["begin"]

    def begin(self, key):
        self._write({"begin": key})

    def row(self, row):
        self.seen.add(key_of(row))
        self._write({"row": row})

    def finish(self, key):
        self.done.add(key)
        self._write({"done": key})

    def note(self, status, message):
        self._write({"status": status, "message": message})

    def _write(self, line):
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def key_of(row):
    """What a row is about, as one string."""
    shape = ",".join(f"{k}={v}" for k, v in (row["shape"] or {}).items())
    return f"{row['path']}|{shape}|{row['provider']}"


def read(path):
    """The lines of a journal; one that was cut off in the middle is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
