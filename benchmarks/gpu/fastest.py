"""From a record to the table behind ``backend="auto"``: whose fused kernel was fastest, by compute capability and vocabulary."""

import json
from pathlib import Path

from grpo_kernels import backends

CANDIDATES = ("triton", "cuda")


def table(content) -> dict:
    """{capability: {V: backend}} of a record's part `kernels`; empty unless both candidates were timed."""
    best = {}
    for row in content["parts"].get("kernels", {}).get("rows", []):
        if row["path"] == "policy" and row["status"] == "ok" and row["provider"] in CANDIDATES:
            # rows per second: the tiles of two vocabularies differ in height
            speed = row["shape"]["rows"] / row["median"]
            best.setdefault(row["shape"]["vocab"], {})[row["provider"]] = speed
    chosen = {str(vocab): max(speeds, key=speeds.get) for vocab, speeds in sorted(best.items()) if len(speeds) == len(CANDIDATES)}
    return {".".join(map(str, content["capability"])): chosen} if chosen else {}


def write(content, path: Path = backends.FASTEST) -> bool:
    """Puts a record's table beside those of other devices; False if it has none."""
    new = table(content)
    if new:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **new}, indent=1) + "\n")
    return bool(new)
