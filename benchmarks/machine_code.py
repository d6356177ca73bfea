"""Machine code, read from what nvdisasm prints: registers, spills, the loops of a kernel, their accesses, the clocks of a turn."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_ELSEWHERE = ("LDS", "STS", "LDC", "ULDC", "LDCU", "LDL", "STL")  # shared, constant and local memory
_TURNS = 4  # of a loop until what is under way at its end no longer changes


@dataclass(frozen=True)
class Kernel:
    registers: int
    spills: int  # accesses to local memory in a loop; one outside, once for a row, costs nothing that shows
    loops: list[tuple[list[str], list[str]]]


def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a file of machine code, by their mangled names."""
    resources = dict(re.findall(r"Function (\S+):\s+(.*)", run(_TOOLS / "cuobjdump", "-res-usage", cubin)))
    kernels = {}
    for part in re.split(r"\.section\s+\.text\.", run(_TOOLS / "nvdisasm", "-c", "-ndf", cubin))[1:]:
        name, text = part.split(",", 1)
        registers = int(re.search(r"\bREG:(\d+)", resources[name])[1])
        code, found = _loops(text)
        again = {at for first, last in found for at in range(first, last + 1)}
        kernels[name] = Kernel(registers, sum(code[at].startswith(("LDL", "STL")) for at in again), loops(text))
    return kernels


def run(*command) -> str:
    """What a command prints. Raises RuntimeError with its complaints where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def loops(text: str) -> list[tuple[list[str], list[str]]]:
    """Of each innermost loop the instructions, without predicates, and those of them that the shortest way round executes.

    Most turns jump over the rest: the block that holds the row's target, a bias or a softcap that is not there.
    """
    code, found = _loops(text)
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b for c, d in found if (c, d) != (a, b))]
    return [(code[a : b + 1], [code[at] for at in found[a, b]]) for a, b in inner]


def _loops(text):
    """(all instructions, {(first, last) of each loop: the shortest way round})."""
    code, labels, jumps, ends = [], {}, {}, set()
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@\S+\s+)?(\w[^;]*?)\s*;", line):
            if not match[1] and re.match(r"BRA `|EXIT|RET", match[2]):
                ends.add(len(code))
            if target := re.match(r"BRA\b.*`\((\.L_\w+)\)", match[2]):
                jumps[len(code)] = target[1]
            code.append(match[2])
    jumps = {at: labels[label] for at, label in jumps.items()}
    return code, {(to, at): way for at, to in jumps.items() if to <= at and (way := _way(to, at, jumps, ends))}


def _way(first, last, jumps, ends):
    """The shortest way from one instruction to another that does not leave their range; None where there is none."""
    ways, ahead = {first: [first]}, [first]
    for at in ahead:  # breadth first
        for to in ([] if at in ends else [at + 1]) + ([jumps[at]] if at in jumps else []):
            if first <= to <= last and to not in ways:
                ways[to] = [*ways[at], to]
                ahead.append(to)
    return ways.get(last)


def accesses(loop: list[str]) -> tuple[list[int], list[int]]:
    """Bytes a thread moves by each load and each store of global memory; ValueError on atomics, async copies, generic addresses."""
    widths = {"LDG": [], "STG": []}
    for op in loop:
        name, *parts = op.split()[0].split(".")
        if name in widths:
            widths[name].append(next((_BYTES[part] for part in parts if part in _BYTES), 4))
        elif re.match(r"LD|ST|ATOM|RED(?!UX)|UBLK|UTMA", name) and name not in _ELSEWHERE:
            raise ValueError(f"cannot judge {op}")
    return widths["LDG"], widths["STG"]


def streaming(kernel: Kernel) -> list[list[str]]:
    """The ways round the loop that reads and the one that writes; a row's ragged end, or writing zeros, takes shorter ones."""
    longest = {}
    for loop in sorted((way for _, way in kernel.loops), key=len):
        loads, stores = accesses(loop)
        longest |= {"writes" if stores else "reads": loop} if loads or stores else {}
    return list(longest.values())


def turn(loop: list[str], latency: float) -> float:
    """Clocks of a turn of one warp that issues an instruction a clock and waits where a load younger than ``latency`` is used."""
    steps = []
    for op in loop:
        registers, width = [int(n) for n in re.findall(r"\bR(\d+)\b", op)], sum(accesses([op])[0])
        steps.append((registers, [registers[0] + word for word in range(-(-width // 4))]))
    clock, ends, ready = 0.0, [], {}
    for _ in range(2 * _TURNS):
        for touched, loaded in steps:
            clock = max([clock + 1, *(ready.pop(register, 0) for register in touched)])
            ready.update(dict.fromkeys(loaded, clock + latency))
        ends.append(clock)
    return (ends[-1] - ends[_TURNS - 1]) / _TURNS
