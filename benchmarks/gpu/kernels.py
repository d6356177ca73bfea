"""`build`: nvcc, for the GPU that is there. `kernels`: the row kernels alone, as a share of the bandwidth of a copy.

A logit of a tile is 4 bytes read, and 2 written elsewhere where there is a gradient; whoever reads a row a second time from memory
pays for it in the share. A kernel is held against float64 on the first rows and then timed on two tiles in turn, so that none is
in the cache.
"""

import time

import torch

from grpo_kernels import backends, build_cuda, devices
from grpo_kernels.backends import native, pytorch
from grpo_kernels.backends.statistics import Scored, Tile, finalize, new_statistics
from grpo_kernels.losses.config import GRPOLossConfig, LogitTransform
from grpo_kernels.losses.terms import PolicyRows, kernel_terms, row_coefficient

from .decide import copy, timed
from .programs import Skipped
from .stage import read

BYTES = {"statistics": 4, "gradient": 6, "stash": 6, "policy": 6}
LOSS = GRPOLossConfig(beta=0.04)
SHAPES = ((1024, 151_936), (1280, 151_936), (6080, 32_000), (1516, 128_256), (741, 262_144))  # rows, V: 620 .. 780 MB of float32
TINY_SHAPES = ((8, 1009), (5, 127))
COMPARED, ALLOWED = 16, 1e-2  # rows; relative error, a tenth of it for what is float32


def build(stage):
    if stage.options.device == "cpu":
        raise Skipped("nvcc builds for the GPU that is there")
    start, (major, minor) = time.monotonic(), torch.cuda.get_device_capability()
    command = build_cuda.build(only=10 * major + minor)
    stage.row("program", "nvcc", "build", None, [time.monotonic() - start], command=command)


def run(stage):
    bandwidth = copy(stage)
    for rows, vocab in TINY_SHAPES if stage.tiny else SHAPES:
        for name in stage.backends:
            (calls, error), (others, _) = (launches(backends.kernels(name), rows, vocab, stage.clock.device) for _ in range(2))
            for kernel in calls:
                about = "kernel", name, kernel, {"rows": rows, "vocab": vocab}
                with stage.attempt(*about):
                    calls[kernel]()
                    found, allowed = error(kernel), ALLOWED / 10 if kernel == "statistics" else ALLOWED
                    assert found <= allowed, f"relative error {found:.1e}, more than {allowed:.0e}"
                    times = [s / 2 for s in timed(stage.clock, lambda: [both[kernel]() for both in (calls, others)])]  # noqa: B023
                    share = rows * vocab * BYTES[kernel] / min(times) / bandwidth
                    stage.row(*about, times, error=found, share=share, says=f"{share:.0%} of a copy")
    if stage.clock.device.type == "cuda":
        devices.adopt(read(stage.file))


def launches(module, rows, vocab, device):
    """({kernel: its launch on a tile of its own}, kernel -> the relative error of what it wrote first, by float64)."""
    uniform = lambda low, high: torch.empty(rows, device=device).uniform_(low, high)  # noqa: E731
    matrix = lambda dtype: torch.empty(rows, -(-vocab // 64) * 64, device=device, dtype=dtype)[:, :vocab]  # noqa: E731
    tile = Tile(matrix(torch.float32).normal_(0, 2.5), torch.randint(0, vocab, (rows,), device=device), LogitTransform())
    stats, first = (new_statistics(rows, torch.float32, device) for _ in range(2))
    pytorch.statistics(tile, first)
    scored, written, g = finalize(first), Scored(*torch.empty(3, rows, device=device)), uniform(-1, 1)
    near = [scored.logps + uniform(-width, width) for width in (0.3, 0.1)]
    policy = PolicyRows(uniform(0, 1 / rows), uniform(-1, 1), *near, uniform(0, 0.04 / rows))
    out = matrix(torch.float32 if module is native else torch.bfloat16)
    calls = {
        "statistics": lambda: module.statistics(tile, stats),
        "gradient": lambda: module.gradient(tile, out, scored, g),
        "stash": lambda: module.stash(tile, out, scored),
        "policy": lambda: module.policy(tile, out, policy, kernel_terms(LOSS, linear=False), written),
    }
    some = lambda x: x[:COMPARED].double()  # noqa: E731
    log_p, tokens = some(tile.values).log_softmax(1), tile.target[:COMPARED].unsqueeze(1)
    logps = log_p.gather(1, tokens).squeeze(1)
    away = -log_p.exp().scatter_add(1, tokens, -torch.ones_like(log_p[:, :1]))  # onehot - p
    rows_of = PolicyRows(*(some(x) for x in vars(policy).values() if x is not None))
    factor = {"gradient": some(g), "stash": torch.ones_like(logps), "policy": row_coefficient(logps, rows_of, LOSS, linear=False)}

    def error(kernel):
        ours = some(finalize(stats).logps) if kernel == "statistics" else some(out)
        exact = logps if kernel == "statistics" else away * factor[kernel].unsqueeze(1)
        return ((ours - exact).norm() / exact.norm()).item()

    return {kernel: call for kernel, call in calls.items() if hasattr(module, kernel)}, error
