"""What a multiprocessor takes and does, by arithmetic: blocks at once, and the clocks that the loops of a kernel want for a logit.

Sources: CUDA C++ Programming Guide, technical specifications and throughput of arithmetic instructions per compute capability;
data sheets of the GPUs, from whose float32 rate the clock follows.
"""

import sys
from collections import Counter, namedtuple

from . import machine_code

# Of a load while memory is busy, in seconds: an assumption, 2.5 x what it takes an idle H100 (479 clocks: Luo et al., arXiv
# 2402.13499). Little's law then wants 25 KB in flight on each multiprocessor of an H200, 13 KB on an A100, 38 KB on a B200.
LATENCY = 700e-9

# bandwidth in bytes a second; the last three of a multiprocessor; a block takes 1 KiB of shared memory more than it asks for
GPU = namedtuple("GPU", "multiprocessors bandwidth clock threads blocks shared")
GPUS = {
    "80": GPU(108, 2.039e12, 1.41e9, 2048, 32, 164 << 10),  # A100, 80 GB
    "86": GPU(84, 0.768e12, 1.80e9, 1536, 16, 100 << 10),  # RTX A6000
    "89": GPU(142, 0.864e12, 2.52e9, 1536, 24, 100 << 10),  # L40S
    "90": GPU(132, 4.8e12, 1.98e9, 2048, 32, 228 << 10),  # H200
    "100": GPU(148, 8.0e12, 1.98e9, 2048, 32, 228 << 10),  # B200
    "120": GPU(188, 1.792e12, 2.60e9, 1536, 24, 100 << 10),  # RTX PRO 6000
}


def blocks_at_once(registers: int, warps: int, shared: int = 0, architecture: str = "80") -> int:
    """Blocks of so many warps, registers a thread and bytes of shared memory that fit together."""
    gpu, of_a_warp = GPUS[architecture.rstrip("a")], -(-registers * 32 // 256) * 256  # of 65536 registers of 32 bits
    return min(gpu.blocks, gpu.threads // (32 * warps), 65536 // (of_a_warp * warps), gpu.shared // (shared + 1024))


def judged(code, warps: int, shared: int, architecture: str, size: int, out_size: int, bias: bool = False, tiles: int = 1) -> dict:
    """What a kernel takes of a multiprocessor, and its clocks for 1000 logits of ``size`` bytes with results of ``out_size``.

    ``out_size`` is 0 where what a loop stores are no results.

    flight   bytes that the resident warps' loads have under way, on average over a turn: of the loop that has least
    memory   clocks for the bytes read and written at the whole bandwidth, as if no cache held anything
    latency  of the resident warps' turns, side by side, if a load takes LATENCY and all else an issue slot
    issue    of all instructions, four a clock
    mufu     of the special functions, half a warp a clock

    With two ``tiles`` a logit is one of each. The loops are added up: multiprocessors are in different ones at a time. A bias comes
    from a cache, but is charged as memory.
    """
    gpu, clocks, flight = GPUS[architecture.rstrip("a")], dict.fromkeys(("memory", "latency", "issue", "mufu"), 0.0), []
    blocks, latency = blocks_at_once(code.registers, warps, shared, architecture), LATENCY * gpu.clock
    for loop in machine_code.streaming(code):
        loads, stores = machine_code.accesses(loop)
        widest, turn = max(loads, default=0), machine_code.turn(loop, latency)
        results = sum(stores) / out_size if out_size else 0
        logits = 32 * (results or widest * loads.count(widest) / (tiles * (size + 4 * bias)))  # of a warp's turn
        read, resident = tiles * size * bool(loads), max(blocks, 1) * warps
        clocks["memory"] += (read + out_size * bool(stores)) * gpu.multiprocessors * gpu.clock / gpu.bandwidth
        clocks["latency"] += turn / (logits * resident)
        clocks["issue"] += len(loop) / 4 / logits
        clocks["mufu"] += 2 * sum(op.startswith("MUFU") for op in loop) / logits
        flight += [logits * read * resident * latency / turn] * bool(loads)
    clocks = {key: round(1000 * value) for key, value in clocks.items()}
    return {"registers": code.registers, "spills": code.spills, "blocks": blocks, "flight": round(min(flight, default=0)), **clocks,
            "binds": max(clocks, key=clocks.get), "must_stream": size == 4 and not bias and architecture.rstrip("a") != "100"}


def faults(found: dict) -> list[str]:
    """What must not be: spills, no room, accesses below 16 bytes, waiting for loads while memory is idle.

    A kernel may wait on tiles of 16 bits, which a GPU's logits are not, with a bias, and on sm_100, which wants more than 32 KB.
    Over ranges it may wait, too, and since they start anywhere, its accesses are of single elements.
    """
    wanted = found.get("aligned", 16)
    problems = [f"{found['spills']} spilled registers are moved in a loop"] * (found["spills"] > 0)
    problems += ["no multiprocessor takes a block"] * (found["blocks"] == 0)
    narrow = [key for key in ("load", "store") if 0 < found.get(key, wanted) < wanted]
    problems += [f"{key}s of {found[key]} bytes in a loop" for key in narrow]
    problems += ["no instruction multiplies matrices in any loop"] * (found.get("multiplies") == 0)
    problems += ["no load was found in any loop"] * (found.get("load") == 0)
    waits = found["must_stream"] and found["binds"] == "latency"
    if waits:
        problems.append(f"{found['latency']} clocks for {found['memory']} of memory's: {found['flight']} bytes in flight")
    return problems


def report(rows: list[dict], what: str) -> int:
    """Prints rows, what binds them and what is wrong with them; 1 where something is."""
    columns = [key for key in rows[0] if key not in ("kernel", "must_stream", "aligned")]
    width = max(len(row["kernel"]) for row in rows)
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print(f"{row['kernel']:<{width}} " + " ".join(f"{row[key]:>9}" for key in columns))
    bad = [f"{row['kernel']} on {row['arch']}: {problem}" for row in rows for problem in faults(row)]
    bound = ", ".join(f"{count} by {key}" for key, count in Counter(row["binds"] for row in rows).most_common())
    print(f"{what}: {len(rows)} compiled, bound {bound}; {f'{len(bad)} faults' if bad else 'no fault'}")
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    return 1 if bad else 0
