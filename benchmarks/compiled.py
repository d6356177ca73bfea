"""What the compiler makes of the Triton kernels: compiled for three architectures without a GPU, judged by the machine code.

``python -m benchmarks.compiled`` (``make kernels``) prints a row for each kernel and architecture: registers of a thread, bytes
spilled and bytes of local memory, shared memory of a program, programs that fit a multiprocessor at once, and the narrowest
global load and store inside the streaming loops, in bytes. It fails where something is spilled or an access is narrower than 16
bytes.

The kernels are launched by the backend's own functions, caught on their way: what is judged is what a user gets.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_kernels.backends import row_kernels_triton
from grpo_kernels.backends import triton as backend
from grpo_kernels.backends.statistics import Scored, Tile, new_statistics
from grpo_kernels.losses.config import LogitTransform
from grpo_kernels.losses.terms import PolicyRows, PolicyTerms

from .occupancy import blocks_at_once

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.int64: "i64",
}  # fmt: skip
PLAIN, SOFTCAP = LogitTransform(1.0, None, 1.0), LogitTransform(1.0, 30.0, 1.0)
WIDE, NARROW = 151_936, 8192  # a row of Qwen's vocabulary; a column block of scoring
ROWS = 2


@dataclass(frozen=True)
class Caught:
    """A launch that was stopped before it happened."""

    kernel: object
    arguments: dict
    options: dict


class _Catcher:
    """Stands in for the module of the kernels; keeps the launch instead of making it."""

    def __init__(self):
        self.caught = None

    def __getattr__(self, name):
        kernel = getattr(row_kernels_triton, name)
        if not isinstance(kernel, triton.JITFunction):
            return kernel

        class Launcher:
            def __getitem__(_, grid):
                def launch(*args, num_warps, **constants):
                    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
                    self.caught = Caught(kernel, given, {"num_warps": num_warps})

                return launch

        return Launcher()


def caught(call: Callable[[], None]) -> Caught:
    real, backend.kernels = backend.kernels, _Catcher()
    try:
        call()
        return backend.kernels.caught
    finally:
        backend.kernels = real


def compiled(launch: Caught, architecture: int):
    """The compiled kernel, specialised as a launch with these arguments would be."""
    names, signature, constants, attributes = launch.kernel.arg_names, {}, {}, {}

    def describe(value, path, constexpr=False):
        if value is None or constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + _TYPES[value.dtype]
        if isinstance(value, tuple):
            return type(value)(*(describe(member, (*path, i)) for i, member in enumerate(value)))
        if isinstance(value, float):
            return "fp64"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    for i, name in enumerate(names):
        signature[name] = describe(launch.arguments[name], (i,), constexpr=name.isupper())
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def loops(ptx: str) -> list[list[str]]:
    """The lines of each loop of a kernel: from a label to a branch back to it."""
    lines, labels, found = ptx.splitlines(), {}, []
    for number, line in enumerate(lines):
        if match := re.match(r"(\$?\w+):", line.strip()):
            labels[match[1]] = number
        elif (match := re.search(r"\bbra(?:\.uni)?\s+(\$?\w+)", line)) and match[1] in labels:
            found.append(lines[labels[match[1]] : number])
    return found


def accesses(lines: list[str]) -> dict[str, list[int]]:
    """Bytes a thread moves by each global load and store, in the order of the text.

    Raises ValueError on an access that is neither known to be global nor known to be something else: atomics, asynchronous
    copies, generic addresses.
    """
    widths = {"ld": [], "st": []}
    for operation in re.findall(r"(?<![\w.%])(?:ld|st|red|atom|cp)\.[\w.:]+", "\n".join(lines)):
        kind, *parts = operation.replace("::", "_").split(".")
        if kind in widths and {"shared", "shared_cta", "param", "const", "local"} & set(parts):
            continue
        bits = re.fullmatch(r"[a-z]+(\d+)(?:x(\d))?", parts[-1])
        if kind not in widths or "global" not in parts or bits is None:
            raise ValueError(f"cannot judge {operation}")
        vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        widths[kind].append(int(bits[1]) * int(bits[2] or 1) // 8 * vector)
    return widths


def narrowest(ptx: str, kind: str) -> int:
    """Bytes of the narrowest global load (``ld``) or store (``st``) inside a loop; 0 if there is none."""
    return min((width for loop in loops(ptx) for width in accesses(loop)[kind]), default=0)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL of a kernel in machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def row(name: str, architecture: int) -> dict:
    launch = caught(CASES[name])
    kernel = compiled(launch, architecture)
    used, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
    warps = launch.options["num_warps"]
    return {
        "kernel": name,
        "arch": f"sm_{architecture}",
        "block": launch.arguments["BLOCK"],
        "warps": warps,
        "registers": used["REG"],
        "spills": len(re.findall(r"\b(?:ld|st)\.local", ptx)) + used["STACK"],
        "local": used["LOCAL"],
        "shared": kernel.metadata.shared,
        "programs": blocks_at_once(used["REG"], warps),
        "load": narrowest(ptx, "ld"),
        "store": narrowest(ptx, "st"),
    }


def faults(found: dict) -> list[str]:
    """What must not be: spills, and accesses below 16 bytes."""
    problems = [f"{key} is {found[key]}" for key in ("spills", "local") if found[key]]
    problems += [f"{key}s of {found[key]} bytes in a loop" for key in ("load", "store") if 0 < found[key] < 16]
    if not found["load"]:
        problems.append("no load was found in any loop")
    return problems


def _shown(key, value):
    return "-" if key in ("load", "store") and not value else value


def _tile(columns, transform, values, stride=None, bias=False, temperature=False):
    """Rows on 128 bytes, as the engine lays them out, unless a stride is given."""
    values = torch.zeros(ROWS, stride or -(-columns // 32) * 32, dtype=values)[:, :columns]
    return Tile(values, torch.zeros(ROWS, dtype=torch.int64), transform, torch.zeros(columns) if bias else None,
                _vector() if temperature else None)  # fmt: skip


def _vector():
    return torch.zeros(ROWS)


def _out(tile, dtype):
    """The tile's own memory where the dtype is its own, as where float32 is trained or a stash becomes a gradient."""
    values = tile.values
    return values if dtype == values.dtype else torch.zeros(ROWS, values.stride(0), dtype=dtype)[:, : values.shape[1]]


def _scored():
    return Scored(_vector(), _vector(), _vector())


def statistics(columns=WIDE, transform=PLAIN, values=torch.float32, stride=None, **options):
    def call():
        tile = _tile(columns, transform, values, stride, **options)
        backend.statistics(tile, new_statistics(ROWS, torch.float32, "cpu"))

    return call


def _gradient(columns=WIDE, transform=PLAIN, values=torch.float32, out=torch.bfloat16, entropy=False, from_stash=False, **options):
    def call():
        tile = _tile(columns, transform, values, **options)
        backend.gradient(tile, _out(tile, out), _scored(), _vector(), _vector() if entropy else None, from_stash)

    return call


def _stash(columns=WIDE, transform=PLAIN, values=torch.float32, out=torch.bfloat16, **options):
    def call():
        tile = _tile(columns, transform, values, **options)
        backend.stash(tile, _out(tile, out), _scored())

    return call


def _policy(kind="clipped", columns=WIDE, transform=PLAIN, values=torch.float32, out=torch.bfloat16, kl=True, entropy=False,
            **options):  # fmt: skip
    def call():
        tile, linear = _tile(columns, transform, values, **options), kind == "linear"
        rows = PolicyRows(_vector(), *([None] * 2 if linear else [_vector()] * 2), *([_vector()] * 2 if kl else [None] * 2),
                          _vector() if entropy else None)  # fmt: skip
        backend.policy(tile, _out(tile, out), rows, PolicyTerms(kind, use_bias_correction_kl=not linear), _scored())

    return call


CASES = {
    "statistics": statistics(),
    "statistics, odd V": statistics(WIDE + 1),
    "statistics, column block": statistics(NARROW),
    "statistics, softcap": statistics(NARROW, SOFTCAP),
    "statistics, bias, temperature": statistics(bias=True, temperature=True),
    "statistics, bf16": statistics(NARROW, values=torch.bfloat16),
    "gradient": _gradient(),
    "gradient, odd V": _gradient(WIDE + 1),
    "gradient, column block": _gradient(NARROW),
    "gradient, softcap": _gradient(transform=SOFTCAP),
    "gradient, entropy": _gradient(entropy=True),
    "gradient, entropy, softcap, bias": _gradient(entropy=True, transform=SOFTCAP, bias=True),
    "gradient, float32 in place": _gradient(out=torch.float32),
    "stash": _stash(),
    "stash, odd V": _stash(WIDE + 1),
    "stash, softcap, bias": _stash(transform=SOFTCAP, bias=True),
    "stash, float32 in place": _stash(out=torch.float32),
    "gradient from a stash": _gradient(values=torch.bfloat16, from_stash=True),
    "gradient from a stash, softcap": _gradient(values=torch.bfloat16, from_stash=True, transform=SOFTCAP),
    "gradient from a stash, entropy": _gradient(values=torch.bfloat16, from_stash=True, entropy=True),
    "gradient from a stash, entropy, softcap": _gradient(values=torch.bfloat16, from_stash=True, entropy=True, transform=SOFTCAP),
    "policy, clipped, KL": _policy(),
    "policy, clipped, odd V": _policy(columns=WIDE + 1),
    "policy, clipped, V 32k": _policy(columns=32_000),
    "policy, clipped, bias": _policy(bias=True),
    "policy, clipped, bias, entropy, temperature": _policy(bias=True, entropy=True, temperature=True),
    "policy, clipped, bias, entropy, softcap": _policy(bias=True, entropy=True, transform=SOFTCAP),
    "policy, cispo, softcap": _policy("cispo", transform=SOFTCAP),
    "policy, sapo": _policy("sapo"),
    "policy, linear": _policy("linear", kl=False),
    "policy, linear, KL, entropy, softcap": _policy("linear", transform=SOFTCAP, entropy=True),
    "policy, float32 in place": _policy(out=torch.float32),
    "policy, float32 in place, entropy, softcap": _policy(out=torch.float32, entropy=True, transform=SOFTCAP),
    "policy, bf16 in place": _policy(values=torch.bfloat16),
    "policy, fp16": _policy(out=torch.float16),
}


def main() -> int:
    jobs = [(name, architecture) for name in CASES for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(row, *zip(*jobs, strict=True)))
    columns = list(rows[0])
    width = max(map(len, CASES))
    print(f"{'kernel':<{width}} " + " ".join(f"{key:>9}" for key in columns[1:]))
    bad = []
    for found in rows:
        print(f"{found['kernel']:<{width}} " + " ".join(f"{_shown(key, found[key]):>9}" for key in columns[1:]))
        bad += [f"{found['kernel']} on {found['arch']}: {problem}" for problem in faults(found)]
    print("programs: that fit a multiprocessor at once; load, store: bytes of the narrowest access in a loop (-: there is none)")
    print(f"triton {triton.__version__}, V {WIDE}: {len(rows)} kernels compiled, {f'{len(bad)} faults' if bad else 'no fault'}")
    for problem in bad:
        print(problem, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
