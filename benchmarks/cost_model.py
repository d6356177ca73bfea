"""What one GRPO step of the head costs a rank, by arithmetic: operations, bytes moved, bytes communicated.

    python -m benchmarks.cost_model      the tables of docs/scaling.md

Nothing here is measured. tests/test_cost_model.py holds the operations against the products of real calls and the bytes against
those that went through the collectives of real processes.

A data-parallel replica holds N kept tokens, of which T get a gradient. Its head is cut by rows over P ranks (tensor parallel),
and each part once more over F ranks that hold different tokens (FSDP). D depth, V vocabulary, e bytes of an element.
"""

from dataclasses import dataclass

from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, Problem, peak_bytes, plan

ELEMENT = 2  # bf16
FLOAT32 = 4
STATISTICS = 4  # float32 numbers a row
REFUSALS, COUNTS = 16 * 8, 3 * 8  # the exchanges before the first tile


@dataclass(frozen=True)
class Model:
    name: str
    depth: int
    vocab: int


MODELS = (
    Model("8B (D 4096, V 151,936)", 4096, 151_936),
    Model("70B (D 8192, V 128,256)", 8192, 128_256),
    Model("671B MoE (D 7168, V 129,280)", 7168, 129_280),
)
LAYOUTS = ((1, 8), (8, 1), (8, 8))  # P, F


@dataclass(frozen=True)
class Step:
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


def bytes_moved(model: Model, step: Step, tile_rows: int, ranks: int = 1) -> int:
    """To and from a GPU's memory in one pass, at least: the weight for each tile and product, dW's float32 sum, the tile itself.

    An element of the tile is written by its product (4), read twice by the row kernel (8; once where a cluster keeps the row),
    written as a gradient (2) and read by two products (4).
    """
    shard = -(-model.vocab // ranks) * model.depth
    tiles = -(-step.trained // tile_rows)
    weight = tiles * shard * (2 * ELEMENT + (2 * FLOAT32 if tiles > 1 else ELEMENT))
    per_element = FLOAT32 + 2 * FLOAT32 + ELEMENT + 2 * ELEMENT
    scored = (step.kept - step.trained) * (FLOAT32 + FLOAT32)
    return weight + -(-model.vocab // ranks) * (step.trained * per_element + scored)


def handed_to_collectives(model: Model, step: Step, element: int = ELEMENT, accumulate: int = FLOAT32) -> dict:
    """Bytes that one rank of a vocabulary-parallel head hands to each kind of collective, as `parallel.counted` counts them."""
    handed = {"sizes": REFUSALS + COUNTS, "statistics": STATISTICS * accumulate * step.kept}
    if step.trained:
        handed["dH"] = step.trained * model.depth * element
    if step.two_phases:
        handed["rows"] = step.kept
    return handed


def handed_to_data_parallel(tokens: int, means: int, quantile: bool, accumulate: int = FLOAT32) -> dict:
    """Bytes that one rank hands to the collectives over its ``data_parallel_group``: ``tokens`` is B T of the longest rank, masked
    ones too; ``means`` how many counts bnpo and the entropy bonus take: one each in two phases, two in one pass.
    """
    handed = {"sizes": REFUSALS}
    if means:
        handed["means"] = means * accumulate
    if quantile:
        handed["quantile"] = accumulate + 8 + tokens * accumulate  # a count, a length, the entropies
    return handed


def sent(model: Model, step: Step, tensor: int, sharded: int) -> dict:
    """Bytes that leave a rank with ring collectives, per step: of the vocabulary-parallel head, and of FSDP's shards of it.

    All-gather and reduce-scatter send (P - 1) / P of what all hold together, an all-reduce twice that. FSDP gathers the head once
    and reduces its gradient once: one pass needs no second gathering, since nothing is recomputed in the backward.
    """
    handed = handed_to_collectives(model, step)
    ring = (tensor - 1) / tensor
    head = -(-model.vocab // tensor) * model.depth * ELEMENT
    return {
        "statistics": handed["statistics"] * (tensor - 1),
        "dH": 2 * ring * handed.get("dH", 0),
        "head gathered": (sharded - 1) / sharded * head,
        "dW reduced": (sharded - 1) / sharded * head if step.trains_head else 0,
    }


def problem(model: Model, step: Step, workspace: int = DEFAULT_GPU_WORKSPACE_BYTES, ranks: int = 1) -> Problem:
    """What a GPU's rank asks of plan.py."""
    return Problem(
        live=step.trained, dead=step.kept - step.trained, vocab=-(-model.vocab // ranks), depth=model.depth, element_size=ELEMENT,
        tile_size=FLOAT32, needs_weight=step.trains_head, budget=workspace, sums_directly=True,
    )  # fmt: skip


def memory(model: Model, step: Step, workspace: int, ranks: int = 1) -> int:
    """Peak beyond weights and activations, by plan.py: dH, dW with its float32 sum, workspace. Full logits: N V / P elements."""
    return peak_bytes(problem(model, step, workspace, ranks), step.kept, two_phases=step.two_phases)


def tables(step: Step = Step(8192, 6144), workspace: int = DEFAULT_GPU_WORKSPACE_BYTES) -> str:
    """The tables of docs/scaling.md."""
    gib, mib = 2**30, 2**20
    lines = [
        "| model | TP x FSDP | rows of a tile | TFLOP | GiB moved | sent: statistics | dH | head gathered | dW reduced | peak "
        "| logits in bf16 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for tensor, sharded in LAYOUTS:
            out = sent(model, step, tensor, sharded)
            tile_rows = plan(problem(model, step, workspace, tensor)).tile_rows
            logits = step.kept * -(-model.vocab // tensor) * ELEMENT
            cells = [
                model.name, f"{tensor} x {sharded}", str(tile_rows), f"{operations(model, step, tensor) / 1e12:.1f}",
                f"{bytes_moved(model, step, tile_rows, tensor) / gib:.1f}", *(f"{size / mib:.1f} MiB" for size in out.values()),
                f"{memory(model, step, workspace, tensor) / gib:.2f} GiB", f"{logits / gib:.2f} GiB",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
