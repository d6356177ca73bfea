"""The loss in its place: one GRPO optimiser step of whole trainers around it, seconds and peak memory, and the head's share.

`model` is the same step with a loss that needs no head: what of a trainer's step lies above it is the head's share, and the most
that any loss can save. Forward, loss, backward and optimiser are in the step; sampling is not.
"""

import math

from . import memory, record

VARIANTS = ("model", "thin trainer", "trl stock", "trl patched", "trl fused")
MODEL = VARIANTS[0]
LENGTHS = (64, 256, 512)
PROCESS = {"own": "grpo_kernels.bench.step_process", "trl": "grpo_kernels.bench.step_trl"}


def measure(lengths, layers, rounds, progress):
    rows = []
    for length in lengths:
        found = {}
        for variant in VARIANTS:
            progress.say(f"one step of {variant}, completions of {length}")
            about = {"kind": "step", "head_share": None}
            try:
                fields = memory.run(PROCESS["trl" if variant.startswith("trl") else "own"], [variant, length, layers, rounds])
            except memory.PointError as error:
                missing = any(word in str(error) for word in ("ModuleNotFoundError", "ImportError"))
                status = "absent" if missing else "failed"
                rows.append(record.row(variant, "grpo step", None, status=status, note=str(error), **about))
                progress.step()
                continue
            times, losses = fields.pop("times"), fields["losses"]
            row = record.row(variant, "grpo step", fields.pop("shape"), times, **about | fields)
            found[variant] = row
            stock = found.get("trl stock")
            if stock and variant.startswith("trl") and not _agree(stock["losses"], losses):
                row |= {"status": "wrong", "note": f"trains something else than stock: {losses}, {stock['losses']}"}
            if MODEL in found and variant != MODEL:
                row["head_share"] = max(0.0, 1 - found[MODEL]["median"] / row["median"])
            rows.append(row)
            progress.step()
    return rows


def _agree(stock, other):
    return all(math.isfinite(b) and abs(a - b) <= 0.02 * max(1, abs(a)) for a, b in zip(stock, other, strict=True))
