"""Random calls of the compiled kernels and of the public functions: a result or an error that says what was wrong, nothing else.

    python tests/support/fuzz.py SECONDS [libFuzzer's options]

With atheris its coverage of our Python guides the bytes; without it they come from a generator, seeded by FUZZ_SEED. Under a
library built with sanitizers (tests/test_sanitizers.py) a wild read or write ends the process.
"""

import importlib.util
import linecache
import os
import random
import sys
import time
import traceback
from pathlib import Path

import torch

_SIZES = (0, 1, 2, 3, 5, 8, 16, 17, 31, 64, 65, 130, 513)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
_EXPECTED = (ValueError, TypeError)  # what the public functions document, raised by themselves
_REFUSED = (AssertionError,)  # what the kernels' own wrappers say of arguments that no caller in the package makes
_PACKAGE = str(Path(importlib.util.find_spec("grpo_kernels").origin).parent)  # not imported: atheris instruments imports


class Bytes:
    """Choices out of a string of bytes; zeros behind its end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def byte(self):
        value = self.data[self.at] if self.at < len(self.data) else 0
        self.at += 1
        return value

    def of(self, options):
        return options[self.byte() % len(options)]

    def chance(self, n):
        return self.byte() % n == 0


def tensor(b, shape, dtype, generator):
    """Of this shape, perhaps strided, expanded, misaligned, or with a value that is not finite in it."""
    scale = b.of((1.0, 1.0, 1.0, 30.0, 1e4, 0.0))
    x = (torch.randn([s + 3 for s in shape], generator=generator) * scale).to(dtype)
    x = x[tuple(slice(b.byte() % 3, None) for _ in shape)][tuple(slice(0, s) for s in shape)]
    if b.chance(3):
        x = x.contiguous()
    if b.chance(6) and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if b.chance(8) and x.dim() and x.shape[0] > 1:
        x = x[:1].expand_as(x)
    if b.chance(10) and x.numel():
        x = x.clone()
        x[tuple(b.byte() % size for size in x.shape)] = b.of((float("nan"), float("inf"), -float("inf"), 1e30))
    return x


def rows_case(b, generator):
    """A row kernel of the CPU on a tile."""
    from grpo_kernels.backends import native
    from grpo_kernels.backends.statistics import Scored, Tile, new_statistics
    from grpo_kernels.losses.config import LogitTransform
    from grpo_kernels.losses.terms import KINDS, PolicyRows, PolicyTerms

    rows, columns, dtype = b.of(_SIZES), b.of(_SIZES), b.of(_DTYPES)
    values = tensor(b, (rows, columns), dtype, generator).clone()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    n = rows if b.byte() % 8 else b.of(_SIZES)
    isa, kind = b.of(native.isas()), b.of(("statistics", "gradient", "policy", "transpose"))
    if kind == "transpose":
        native.transpose(values, torch.empty(b.of((columns, rows)), n, dtype=b.of((dtype, dtype, torch.float32))), isa=isa)
        return
    vector = lambda: tensor(b, (n,), acc if b.byte() % 16 else torch.bfloat16, generator)  # noqa: E731
    optional = lambda: vector() if b.chance(2) else None  # noqa: E731
    target = torch.randint(-1, max(1, columns), (n,), generator=generator)
    if b.chance(5):
        target = target + b.of((10**12, -(10**12), columns))
    transform = LogitTransform(b.of((1.0, 0.5, -2.0, 0.0)), b.of((None, 5.0, 1e-3)), b.of((1.0, 0.7, 1e-3)))
    bias = tensor(b, (columns,), acc, generator) if b.chance(3) else None
    tile, scored = Tile(values, target, transform, bias, vector() if b.chance(4) else None), Scored(vector(), vector(), vector())
    out = b.of((values, values, values[:, 1:], values.to(b.of(_DTYPES), copy=True), tensor(b, (rows, columns), dtype, generator)))
    if kind == "statistics":
        native.statistics(tile, new_statistics(n, acc, "cpu"), isa=isa)
    elif kind == "policy":
        weights = PolicyRows(*(optional() for _ in range(6)))
        native.policy(tile, out, weights, PolicyTerms(b.of(KINDS), delta=b.of((float("inf"), 2.0))), scored, isa=isa)
    else:
        native.gradient(tile, out, scored, vector(), optional(), isa=isa)


def both_case(b, generator):
    """A row kernel of the CPU on two tiles."""
    from grpo_kernels.backends import native
    from grpo_kernels.backends.comparison import KINDS, Compared, DivergenceKind, new_comparison
    from grpo_kernels.backends.statistics import Scored, Tile
    from grpo_kernels.losses.config import LogitTransform

    rows, columns, dtype = b.of(_SIZES), b.of((*_SIZES, 4097, 8200)), b.of(_DTYPES)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    vector = lambda: tensor(b, (rows,), acc, generator) if b.byte() % 32 else None  # noqa: E731
    target = torch.randint(-1, max(1, columns), (rows,), generator=generator)
    temperature, plain, tiles = vector() if b.chance(4) else None, b.chance(2), []
    for _ in range(2):
        values = tensor(b, (rows, columns), dtype, generator).clone()
        transform = LogitTransform(b.of((1.0, 0.5, -2.0, 0.0)), b.of((None, 5.0, 1e-3)), b.of((1.0, 0.7, 1e-3)))
        bias = tensor(b, (columns,), acc, generator) if b.chance(3) and not plain else None
        tiles.append(Tile(values, target, LogitTransform() if plain else transform, bias, temperature))
    isa, divergence = b.of(native.isas()), DivergenceKind(b.of(KINDS), b.of((0.5, 0.01, 0.99)))
    scored, found = Scored(vector(), vector(), vector()), Compared(vector(), vector(), vector())
    out = b.of((tiles[0].values, tiles[0].values, tensor(b, (rows, columns), dtype, generator), tiles[0].values[:, 1:]))
    kernel = b.byte() % 4
    if kernel == 0:
        native.divergence_statistics(*tiles, new_comparison(b.of((rows, rows, 1)), acc, "cpu"), divergence.kind, isa=isa)
    elif kernel == 1:
        native.jensen_shannon(*tiles, scored, found.gap, torch.zeros(rows, 2, dtype=acc), divergence.beta, isa=isa)
    elif kernel == 2:
        native.divergence_gradient(*tiles, out, scored, found, vector(), divergence, vector(), vector(), isa=isa)
    else:
        native.divergence(*tiles, out, vector(), divergence, scored, found, isa=isa)


def loss_case(b, generator):
    """The whole loss, and its backward."""
    from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs

    B, T, D, V = b.of((0, 1, 2, 3)), b.of((0, 1, 2, 7)), b.of((1, 3, 8, 33)), b.of((1, 2, 17, 130))
    dtype = b.of(_DTYPES)
    hidden, weight = tensor(b, (B, T, D), dtype, generator), tensor(b, (V, D), dtype if b.byte() % 9 else torch.float32, generator)
    needs = b.byte()
    hidden, weight = hidden.detach().requires_grad_(bool(needs & 1)), weight.detach().requires_grad_(bool(needs & 2))
    ids = torch.randint(0, V, (B, T), generator=generator) + (V if b.chance(9) else 0)
    mask = torch.rand(B, T, generator=generator) < b.of((0.0, 0.5, 1.0))
    mask = mask.to(b.of((torch.bool, torch.int64, torch.float32, torch.uint8)))
    if b.chance(3):
        linear_logprobs(hidden, weight, ids, mask=mask if b.chance(2) else None, workspace_bytes=b.of((None, 1, 10_000)))
        return
    config = GRPOLossConfig(
        loss_type=b.of(("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")), max_completion_length=8,
        importance_sampling_level=b.of(("token", "token", "sequence")), beta=b.of((0.0, 0.1)), delta=b.of((None, 2.0)),
        entropy_coef=b.of((0.0, 0.1)), top_entropy_quantile=b.of((1.0, 0.5)), off_policy_mask_threshold=b.of((None, 0.5)),
        softcap=b.of((None, 5.0)), temperature=b.of((1.0, 0.5)),
    )  # fmt: skip
    per_token = lambda: tensor(b, (B, T), torch.float32, generator) if b.chance(2) else None  # noqa: E731
    advantages = tensor(b, b.of(((B,), (B, T), (B + 1,))), b.of((torch.float32, torch.float64)), generator)
    out = fused_linear_grpo_loss(
        hidden, weight, ids, advantages, mask, old_logps=per_token(), ref_logps=per_token(), config=config,
        workspace_bytes=b.of((None, 1, 5_000, 100_000)), backend=b.of(("auto", "auto", "torch")),
    )  # fmt: skip
    if out.loss.requires_grad:
        out.loss.backward()


def one(data):
    b = Bytes(data)
    generator = torch.Generator().manual_seed(b.byte() * 256 + b.byte())
    case = b.of((rows_case, both_case, loss_case, loss_case))
    refusals = _EXPECTED if case is loss_case else _REFUSED
    try:
        case(b, generator)
    except refusals as error:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        file = frame.f_code.co_filename
        if not file.startswith(_PACKAGE) or not linecache.getline(file, line).lstrip().startswith(("raise ", "assert ")):
            raise  # PyTorch's, not a check of ours


def main(seconds, arguments):
    torch.set_num_threads(1)
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None:
        dice, end, calls = random.Random(int(os.environ.get("FUZZ_SEED", "0"))), time.monotonic() + seconds, 0
        while time.monotonic() < end:
            one(dice.randbytes(dice.randint(4, 96)))
            calls += 1
        print(f"Done {calls} runs")
        return
    with atheris.instrument_imports(include=["grpo_kernels"]):
        import grpo_kernels.backends.native  # noqa: F401
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds:g}", "-max_len=96", "-rss_limit_mb=4096", *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
