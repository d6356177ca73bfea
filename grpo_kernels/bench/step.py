"""One GRPO optimiser step of whole trainers: seconds, peak memory, and the head's share of the time.

`model` is the thin trainer's step without a head. The time that another step takes longer is the head's share of it, and the most
that any loss can save. Forward, loss, backward and optimiser are in the step; sampling is not. Each step runs in a fresh process.
"""

import math

from . import memory, record

VARIANTS = ("model", "thin trainer", "trl stock", "trl patched", "trl fused")
MODEL, STOCK, OURS = "model", "trl stock", ("thin trainer", "trl patched", "trl fused")
LENGTHS = (64, 256)
_TOLERANCE, _SMALLEST = 0.05, 0.01  # relative; of a loss that nearly cancels, of this
_LONGEST = 900.0  # seconds of a process


def measure(lengths, layers, rounds, say):
    """A row per length and variant."""
    for length in lengths:
        rows = {}
        for variant in VARIANTS:
            say(f"one step of {variant}, completions of {length}")
            try:
                module = f"grpo_kernels.bench.step_{'trl' if variant.startswith('trl') else 'process'}"
                found = memory.run(module, [variant, length, layers, rounds], _LONGEST)
            except memory.PointError as error:
                absent = "ModuleNotFoundError" in str(error) or "ImportError" in str(error)
                found = {"shape": None, "status": "absent" if absent else "failed", "note": str(error)}
            rows[variant] = record.row(variant, "grpo step", **found, kind="step", head_share=None)
        model, stock = rows[MODEL], rows[STOCK]
        for row in (row for row in rows.values() if row is not model and row["status"] == "ok"):
            if stock["status"] == "ok" and not agree(stock, row):
                row |= {"status": "wrong", "note": f"trains something else than stock: {_trained(row)}, {_trained(stock)}"}
            if model["status"] == "ok":
                row["head_share"] = max(0.0, 1 - model["median"] / row["median"])
        yield from rows.values()


def agree(stock, other):
    """Losses and norms of gradients, off-policy, where both depend on every log-prob; bf16 rounds differently in each."""
    pairs = zip(_trained(stock), _trained(other), strict=True)
    return all(math.isfinite(b) and abs(a - b) <= _TOLERANCE * max(abs(a), _SMALLEST) for a, b in pairs)


def _trained(row):
    return [*row["losses"], *row["gradients"]]
