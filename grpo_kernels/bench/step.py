"""The loss in its place: one GRPO optimiser step of whole trainers around it, seconds and peak memory, and the head's share.

`model` is the same step with a loss that needs no head: what of a trainer's step lies above it is the head's share, and the most
that any loss can save. Forward, loss, backward and optimiser are in the step; sampling is not.
"""

import math

from . import memory, record

VARIANTS = ("model", "thin trainer", "trl stock", "trl patched", "trl fused")
MODEL = VARIANTS[0]
LENGTHS = (64, 256)
_TOLERANCE, _SMALLEST = 0.05, 0.01  # relative; of a loss that nearly cancels, of this
_LONGEST = 900.0  # seconds of a process
PROCESS = {"own": "grpo_kernels.bench.step_process", "trl": "grpo_kernels.bench.step_trl"}


def measure(lengths, layers, rounds, progress):
    rows = []
    progress.more(len(lengths) * len(VARIANTS))
    for length in lengths:
        found = {}
        for variant in VARIANTS:
            progress.say(f"one step of {variant}, completions of {length}")
            about = {"kind": "step", "head_share": None}
            module = PROCESS["trl" if variant.startswith("trl") else "own"]
            try:
                fields = memory.run(module, [variant, length, layers, rounds], _LONGEST)
                found[variant] = record.row(variant, "grpo step", fields.pop("shape"), fields.pop("times"), **about | fields)
                rows.append(found[variant])
            except memory.PointError as error:
                missing = any(word in str(error) for word in ("ModuleNotFoundError", "ImportError"))
                status = "absent" if missing else "failed"
                rows.append(record.row(variant, "grpo step", None, status=status, note=str(error), **about))
            progress.step()
        model, stock = found.pop(MODEL, None), found.get("trl stock")
        for row in found.values():
            if stock and not agree(stock, row):
                row |= {"status": "wrong", "note": f"trains something else than stock: {_trained(row)}, {_trained(stock)}"}
            if model:
                row["head_share"] = max(0.0, 1 - model["median"] / row["median"])
    return rows


def agree(stock, other):
    """Losses and norms of gradients, off-policy, where both depend on every log-prob; bf16 rounds differently in each."""
    pairs = list(zip(_trained(stock), _trained(other), strict=True))
    return all(math.isfinite(b) and abs(a - b) <= _TOLERANCE * max(abs(a), _SMALLEST) for a, b in pairs)


def _trained(row):
    return [*row["losses"], *row["gradients"]]
