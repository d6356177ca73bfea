"""`build`: nvcc, for the GPU that is there. `kernels`: row kernels alone, as a share of the bandwidth of a copy. A logit counts 4
bytes read, and 2 written where there is a gradient; whoever reads a row a second time from memory pays for it in the share.
"""

import math

import torch

from grpo_kernels import backends, build_cuda
from grpo_kernels.backends import native, pytorch
from grpo_kernels.backends.statistics import Scored, Tile, finalize, new_statistics
from grpo_kernels.losses.config import GRPOLossConfig, LogitTransform
from grpo_kernels.losses.terms import PolicyRows, kernel_terms, row_coefficient

LOSS = GRPOLossConfig(beta=0.04)
SHAPES = ((1024, 151_936), (1280, 151_936), (6080, 32_000), (1516, 128_256), (741, 262_144))  # rows, V: 620 .. 780 MB of float32


def build(stage):
    if stage.options.device == "cpu":
        return "nvcc builds for the GPU that is there"
    major, minor = torch.cuda.get_device_capability()
    stage.row("program", "nvcc", "build", says=build_cuda.build(only=(10 * major + minor,)))


def run(stage):
    bandwidth = stage.copy()
    for rows, vocab in ((8, 1009), (5, 127)) if stage.tiny else SHAPES:
        for name in stage.backends:
            for kernel, (launch, results) in launches(backends.kernels(name), rows, vocab, stage.clock.device).items():
                about = "kernel", name, kernel, {"rows": rows, "vocab": vocab}
                with stage.attempt(*about):
                    launch()  # into NaN
                    ours, plain = results()
                    error = ((ours - plain).norm() / plain.norm()).item()
                    assert error <= (1e-3 if ours.dtype == torch.float32 else 1e-2), f"relative error {error:.1e}"
                    times = stage.timed(launch, 9)
                    share = rows * vocab * (4 if kernel == "statistics" else 6) / min(times) / bandwidth
                    stage.row(*about, times, error=error, share=share, says=f"{share:.0%} of a copy")


def launches(module, rows, vocab, device):
    """{kernel: (its launch on a tile, what gives its result and plain PyTorch's)}"""
    uniform = lambda low, high: torch.empty(rows, device=device).uniform_(low, high)  # noqa: E731
    matrix = lambda dtype: torch.empty(rows, -(-vocab // 64) * 64, device=device, dtype=dtype)[:, :vocab]  # noqa: E731
    tile = Tile(matrix(torch.float32).normal_(0, 2.5), torch.randint(0, vocab, (rows,), device=device), LogitTransform())
    stats, known = (new_statistics(rows, torch.float32, device) for _ in range(2))
    pytorch.statistics(tile, known)
    scored, written, g = finalize(known), Scored(*torch.empty(3, rows, device=device)), uniform(-1, 1)
    old, ref = scored.logps + uniform(-0.3, 0.3), scored.logps + uniform(-0.1, 0.1)
    policy = PolicyRows(uniform(0, 1 / rows), uniform(-1, 1), old, ref, uniform(0, 0.04 / rows))
    out, plain = matrix(torch.float32 if module is native else torch.bfloat16).fill_(math.nan), matrix(torch.float32)

    def gradient(g):
        """Without the target's column, whose 1 is all that a norm would see beside the softmax."""
        pytorch.gradient(tile, plain, scored, g)
        found = [x.scatter(1, tile.target.unsqueeze(1), 0.0) for x in (out, plain)]
        out.fill_(math.nan)
        return found

    found = {
        "statistics": (lambda: module.statistics(tile, stats), lambda: (finalize(stats).logps, scored.logps)),
        "gradient": (lambda: module.gradient(tile, out, scored, g), lambda: gradient(g)),
        "policy": (lambda: module.policy(tile, out, policy, kernel_terms(LOSS, linear=False), written),
                   lambda: gradient(row_coefficient(scored.logps, policy, LOSS, linear=False))),
    }  # fmt: skip
    return {kernel: both for kernel, both in found.items() if hasattr(module, kernel)}
