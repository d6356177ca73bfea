"""What one GRPO step of the head costs a rank, by arithmetic: operations, bytes moved, bytes communicated.

    python -m docs.cost_model      the table of docs/scaling.md

Nothing here is measured. tests/test_cost_model.py holds the operations against the products of real calls and the bytes against
those that went through the collectives of real processes.

A data-parallel replica holds N kept tokens, of which T get a gradient. Its head is cut by rows over P ranks (tensor parallel),
and each part once more over F ranks that hold different tokens (FSDP). D depth, V vocabulary, e bytes of an element.
"""

from collections import namedtuple
from typing import NamedTuple

from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEVICES, Problem, peak_bytes, plan, predict, steps

ELEMENT, FLOAT32 = 2, 4  # bytes; hidden states and weights are bf16
STATISTICS = 4  # float32 numbers a row
REFUSALS, COUNTS = 16 * 8, 3 * 8  # bytes of the exchanges before the first chunk
LAYOUTS = ((1, 8), (8, 1), (8, 8))  # P, F
COLUMNS = ("model", "TP x FSDP", "R, r", "TFLOP", "GiB moved", "ms", "beside products", "sent: statistics", "dH", "head gathered",
           "dW reduced", "peak", "logits in bf16")  # fmt: skip
KEPT, TRAINED = 8192, 6144  # tokens of the table in docs/scaling.md
Model = namedtuple("Model", "name depth vocab")
MODELS = (Model("8B", 4096, 151_936), Model("70B", 8192, 128_256), Model("671B MoE", 7168, 129_280))


class Step(NamedTuple):
    """N kept tokens of a replica, T of them trained; ``recomputed`` rows (no stash in two phases) pay for their logits twice."""

    kept: int
    trained: int
    recomputed: int = 0
    trains_head: bool = True
    two_phases: bool = False


def operations(model: Model, step: Step, ranks: int = 1) -> int:
    """Floating-point operations of the products, of one rank of a tensor-parallel group."""
    product = 2 * -(-model.vocab // ranks) * model.depth
    return product * (step.kept + step.recomputed + step.trained * (2 if step.trains_head else 1))


def handed_to_collectives(model: Model, step: Step, element: int = ELEMENT, accumulate: int = FLOAT32) -> dict:
    """Bytes that one rank of a vocabulary-parallel head hands to each kind of collective, as `distributed.counted` counts them."""
    handed = {"sizes": REFUSALS + COUNTS, "statistics": STATISTICS * accumulate * step.kept,
              "dH": step.trained * model.depth * element, "rows": step.kept if step.two_phases else 0}  # fmt: skip
    return {kind: size for kind, size in handed.items() if size}


def handed_to_data_parallel(tokens: int, means: int, quantile: bool, accumulate: int = FLOAT32) -> dict:
    """The same over a ``data_parallel_group``.

    ``tokens`` is B T of the longest rank, masked ones too. ``means`` is how often counts of a mean are exchanged: bnpo and the
    entropy bonus together once, tokens above a quantile once more. The quantile takes a count, a length and the entropies.
    """
    handed = {"sizes": REFUSALS, "means": means * accumulate, "quantile": quantile * (accumulate + 8 + tokens * accumulate)}
    return {kind: size for kind, size in handed.items() if size}


def sent(model: Model, step: Step, tensor: int, sharded: int) -> dict:
    """Bytes that leave a rank with ring collectives, per step: of the vocabulary-parallel head, and of FSDP's shards of it.

    All-gather and reduce-scatter send (P - 1) / P of what all hold together, an all-reduce twice that. FSDP gathers the head once
    and reduces its gradient once: one pass needs no second gathering, since nothing is recomputed in the backward.
    """
    handed = handed_to_collectives(model, step)
    head = (sharded - 1) / sharded * -(-model.vocab // tensor) * model.depth * ELEMENT
    return {"statistics": handed["statistics"] * (tensor - 1), "dH": 2 * (tensor - 1) / tensor * handed.get("dH", 0),
            "head gathered": head, "dW reduced": head if step.trains_head else 0}  # fmt: skip


def problem(model: Model, step: Step, ranks: int = 1) -> Problem:
    """What an H200 of so many ranks asks of plan.py."""
    return Problem(
        live=step.trained, dead=step.kept - step.trained, vocab=-(-model.vocab // ranks), depth=model.depth, element_size=ELEMENT,
        tile_size=FLOAT32, needs_hidden=True, needs_weight=step.trains_head, budget=DEFAULT_GPU_WORKSPACE_BYTES,
        two_phases=step.two_phases, device=DEVICES["h200"],
    )  # fmt: skip


def row(model: Model, step: Step, tensor: int, sharded: int) -> tuple:
    asked, gib = problem(model, step, tensor), 2**30
    found, time = plan(asked), predict(asked)
    moved = sum(x.count * (x.read + x.written) for x in steps(asked, found))
    return (
        f"{model.name} (D {model.depth}, V {model.vocab:,})", f"{tensor} x {sharded}", f"{found.buffer_rows}, {found.chunk_rows}",
        f"{operations(model, step, tensor) / 1e12:.1f}", f"{moved / gib:.1f}", f"{time.predicted_ms:.1f}", f"{time.ratio:.2f}",
        *(f"{size / 2**20:.1f} MiB" for size in sent(model, step, tensor, sharded).values()),
        f"{peak_bytes(asked, step.kept) / gib:.2f} GiB", f"{step.kept * asked.vocab * ELEMENT / gib:.2f} GiB",
    )  # fmt: skip


def table() -> str:
    rows = [row(model, Step(KEPT, TRAINED), *layout) for model in MODELS for layout in LAYOUTS]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows))


if __name__ == "__main__":
    print(table())
