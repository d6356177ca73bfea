"""What one GRPO step of the head costs a rank, by arithmetic: operations, bytes moved, bytes communicated.

    python -m benchmarks.cost_model      the tables of docs/scaling.md

Nothing here is measured. tests/test_cost_model.py holds the operations against the products of real calls and the bytes against
those that went through the collectives of real processes.

A data-parallel replica holds N kept tokens, of which T get a gradient. Its head is cut by rows over P ranks (tensor parallel),
and each part once more over F ranks that hold different tokens (FSDP). D depth, V vocabulary, e bytes of an element.
"""

from dataclasses import dataclass

from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEVICES, Problem, peak_bytes, plan, predict, steps

ELEMENT = 2  # bf16
FLOAT32 = 4
STATISTICS = 4  # float32 numbers a row
REFUSALS, COUNTS = 16 * 8, 3 * 8  # the exchanges before the first chunk


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


def handed_to_collectives(model: Model, step: Step, element: int = ELEMENT, accumulate: int = FLOAT32) -> dict:
    """Bytes that one rank of a vocabulary-parallel head hands to each kind of collective, as `distributed.counted` counts them."""
    handed = {"sizes": REFUSALS + COUNTS, "statistics": STATISTICS * accumulate * step.kept}
    if step.trained:
        handed["dH"] = step.trained * model.depth * element
    if step.two_phases:
        handed["rows"] = step.kept
    return handed


def handed_to_data_parallel(tokens: int, means: int, quantile: bool, accumulate: int = FLOAT32) -> dict:
    """Bytes that one rank hands to the collectives over its ``data_parallel_group``: ``tokens`` is B T of the longest rank, masked
    ones too; ``means`` how many counts bnpo and the entropy bonus take: one together, and one of the tokens above a quantile.
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
    """What an H200 of so many ranks asks of plan.py."""
    return Problem(
        live=step.trained, dead=step.kept - step.trained, vocab=-(-model.vocab // ranks), depth=model.depth, element_size=ELEMENT,
        tile_size=FLOAT32, needs_hidden=True, needs_weight=step.trains_head, budget=workspace, two_phases=step.two_phases,
        device=DEVICES["h200"],
    )  # fmt: skip


def tables(step: Step = Step(8192, 6144), workspace: int = DEFAULT_GPU_WORKSPACE_BYTES) -> str:
    """The tables of docs/scaling.md."""
    gib, mib = 2**30, 2**20
    lines = [
        "| model | TP x FSDP | R, r | TFLOP | GiB moved | ms | beside products | sent: statistics | dH | head gathered "
        "| dW reduced | peak | logits in bf16 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for tensor, sharded in LAYOUTS:
            asked, out = problem(model, step, workspace, tensor), sent(model, step, tensor, sharded)
            found, time = plan(asked), predict(asked)
            moved = sum(x.count * (x.read + x.written) for x in steps(asked, found))
            cells = [
                model.name, f"{tensor} x {sharded}", f"{found.buffer_rows}, {found.chunk_rows}",
                f"{operations(model, step, tensor) / 1e12:.1f}", f"{moved / gib:.1f}", f"{time.predicted_ms:.1f}",
                f"{time.ratio:.2f}", *(f"{size / mib:.1f} MiB" for size in out.values()),
                f"{peak_bytes(asked, step.kept) / gib:.2f} GiB", f"{step.kept * asked.vocab * ELEMENT / gib:.2f} GiB",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
