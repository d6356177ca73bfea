"""What the compiler makes of the Triton kernels: compiled for three architectures without a GPU, judged by the machine code.

``python -m benchmarks.compiled`` (``make kernels``) prints a row for each kernel and architecture: registers of a thread, bytes
spilled and bytes of local memory, shared memory of a program, programs that fit a multiprocessor at once, and the narrowest
global load and store inside the streaming loops, in bytes, and the loops that write over their own input without a barrier. It
fails where something is spilled, an access is narrower than 16 bytes, or a barrier is missing.

The kernels are launched by the backend's own functions, caught on their way: what is judged is what a user gets.
"""

import dataclasses
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
from grpo_kernels.backends.pytorch import new_statistics
from grpo_kernels.losses.coefficients import PolicyRows, PolicyTerms
from grpo_kernels.losses.config import LogitTransform

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
        self.Rows = row_kernels_triton.Rows
        self.caught = None

    def __getattr__(self, name):
        kernel = getattr(row_kernels_triton, name)

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


_BARRIER = re.compile(r"\bbar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?\s+0\s*;")


def unguarded(ptx: str) -> int:
    """Loops in which no barrier of all threads stands between an iteration's last load and its first store.

    Over a row's own memory one thread would overtake another there. A compiler may turn a loop, so that its text begins
    anywhere in an iteration: what follows the last store of the text is the iteration's beginning.
    """
    count = 0
    for loop in loops(ptx):
        stores = [i for i, line in enumerate(loop) if accesses([line])["st"]]
        if not stores:
            continue
        turned = loop[stores[-1] + 1 :] + loop[: stores[-1] + 1]
        loads = [i for i, line in enumerate(turned) if accesses([line])["ld"]]
        first = next(i for i, line in enumerate(turned) if accesses([line])["st"])
        count += bool(loads) and not any(map(_BARRIER.search, turned[loads[-1] : first]))
    return count


def missing_barriers(launch: Caught, architecture: int, ptx: str) -> int:
    """How many barriers a kernel that writes over its input lacks beside one that does not: one in the loop, one in the tail."""
    if not launch.arguments["OVERLAY"]:
        return 0
    twin = compiled(dataclasses.replace(launch, arguments=launch.arguments | {"OVERLAY": False}), architecture)
    more = len(_BARRIER.findall(ptx)) - len(_BARRIER.findall(twin.asm["ptx"]))
    return max(0, 2 - more)


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
        "unguarded": (unguarded(ptx) if launch.arguments["OVERLAY"] else 0) + missing_barriers(launch, architecture, ptx),
    }


def faults(found: dict) -> list[str]:
    """What must not be: spills, accesses below 16 bytes, a gradient written over logits that somebody may still read."""
    problems = [f"{key} is {found[key]}" for key in ("spills", "local", "unguarded") if found[key]]
    problems += [f"{key}s of {found[key]} bytes in a loop" for key in ("load", "store") if 0 < found[key] < 16]
    if not found["load"]:
        problems.append("no load was found in any loop")
    return problems


def _shown(key, value):
    return "-" if key in ("load", "store") and not value else value


def _vector():
    return torch.zeros(ROWS)


def _statistics(columns=WIDE, transform=PLAIN, tile=torch.float32, probs=None, **options):
    """``probs`` is the dtype of a stash."""

    def call():
        z = torch.zeros(ROWS, columns, dtype=tile)
        out = None if probs is None or probs == tile else torch.zeros(ROWS, columns, dtype=probs)
        backend.statistics(z, new_statistics(ROWS, torch.float32, "cpu"), torch.zeros(ROWS, dtype=torch.int64), transform,
                           probs=probs is not None, out=out, **_optional(columns, **options))  # fmt: skip

    return call


def _gradient(columns=WIDE, transform=PLAIN, tile=torch.float32, gradient=torch.bfloat16, entropy=False, probs=False, **options):
    def call():
        z = torch.zeros(ROWS, columns, dtype=tile)
        backend.gradient(z, torch.zeros(ROWS, dtype=torch.int64), _vector(), _vector(), _vector(), _vector(),
                         _vector() if entropy else None, transform, from_probs=probs, out=_over(z, gradient),
                         **_optional(columns, **options))  # fmt: skip

    return call


def _policy(kind="clipped", columns=WIDE, transform=PLAIN, tile=torch.float32, gradient=torch.bfloat16, kl=True, entropy=False,
            **options):  # fmt: skip
    def call():
        z = torch.zeros(ROWS, columns, dtype=tile)
        linear = kind == "linear"
        rows = PolicyRows(_vector(), None if linear else _vector(), None if linear else _vector(),
                          *((_vector(), _vector()) if kl else (None, None)), _vector() if entropy else None)  # fmt: skip
        terms = PolicyTerms(kind, use_bias_correction_kl=not linear)
        backend.policy(z, torch.zeros(ROWS, dtype=torch.int64), rows, terms, transform, _vector(), _vector(),
                       out=_over(z, gradient), **_optional(columns, **options))  # fmt: skip

    return call


def _over(tile, dtype):
    return None if dtype == tile.dtype else tile.view(dtype)[:, : tile.shape[1]]


def _optional(columns, bias=False, temperature=False):
    return {"bias": torch.zeros(columns) if bias else None, "temperature": _vector() if temperature else None}


CASES = {
    "statistics": _statistics(),
    "statistics, column block": _statistics(NARROW),
    "statistics, softcap": _statistics(NARROW, SOFTCAP),
    "statistics, bias, temperature": _statistics(bias=True, temperature=True),
    "statistics, bf16 tile": _statistics(NARROW, tile=torch.bfloat16),
    "statistics, bf16 stash": _statistics(probs=torch.bfloat16),
    "statistics, softcap, bf16 stash": _statistics(probs=torch.bfloat16, transform=SOFTCAP),
    "gradient": _gradient(),
    "gradient, column block": _gradient(NARROW),
    "gradient, entropy, softcap, bias": _gradient(NARROW, SOFTCAP, entropy=True, bias=True),
    "gradient, float32": _gradient(gradient=torch.float32),
    "gradient of a stash": _gradient(tile=torch.bfloat16, probs=True),
    "gradient of a stash, entropy, softcap": _gradient(tile=torch.bfloat16, probs=True, entropy=True, transform=SOFTCAP),
    "policy, clipped, KL": _policy(),
    "policy, clipped, V 32k": _policy(columns=32_000),
    "policy, clipped, bias, entropy, temperature": _policy(bias=True, entropy=True, temperature=True),
    "policy, cispo, softcap": _policy("cispo", transform=SOFTCAP),
    "policy, sapo": _policy("sapo"),
    "policy, linear": _policy("linear", kl=False),
    "policy, linear, KL, entropy, softcap": _policy("linear", transform=SOFTCAP, entropy=True),
    "policy, float32": _policy(gradient=torch.float32),
    "policy, bf16 tile": _policy(tile=torch.bfloat16),
    "policy, fp16 over float32": _policy(gradient=torch.float16),
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
    print("programs: that fit a multiprocessor at once; load, store: bytes of the narrowest access in a loop (-: there is none);")
    print("unguarded: writes over a row's own memory without a barrier")
    print(f"triton {triton.__version__}, V {WIDE}: {len(rows)} kernels compiled, {f'{len(bad)} faults' if bad else 'no fault'}")
    for problem in bad:
        print(problem, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
