"""Tiles for tests of the row kernels, and every backend's kernels behind one face."""

import os

import cuda_host
import pytest
import torch

from grpo_kernels.backends import cuda, native, pytorch, triton

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_tile(rows, columns, dtype, spare=0, spread=3.0):
    """Random logits whose row stride exceeds the columns by `spare`."""
    wide = torch.empty(rows, columns + spare, dtype=dtype)
    wide.copy_(torch.randn(rows, columns + spare, dtype=torch.float64) * spread)
    return wide[:, :columns]


def copy_of(tile):
    """The same values at the same row stride."""
    return torch.empty_strided(tile.shape, tile.stride(), dtype=tile.dtype).copy_(tile)


def new_stats(rows, dtype):
    return torch.tensor([-INF, 0.0, 0.0, -INF], dtype=acc(dtype)).repeat(rows, 1)


class Kernels:
    """A backend's three functions for tensors on the CPU: on a GPU they work on copies, and what they wrote is brought back."""

    def __init__(self, name, module, device="cpu", over=False, **options):
        self.name, self.module, self.device, self.over, self.options = name, module, device, over, options

    def __repr__(self):
        return self.name

    def statistics(self, tile, stats, *args, probs=False, **more):
        return self._call(self.module.statistics, tile, (stats, *args), {"probs": probs, **more}, writes=probs)

    def gradient(self, tile, *args, **more):
        return self._call(self.module.gradient, tile, args, more)

    def policy(self, tile, *args, **more):
        return self._call(self.module.policy, tile, args, more)

    def _call(self, function, tile, args, more, writes=True):
        back = []

        def placed(value):
            if isinstance(value, torch.Tensor) and self.device != "cpu":
                back.append((value, value.to(self.device)))
                return back[-1][1]
            if type(value).__name__ in ("SimpleNamespace", "PolicyRows"):
                return type(value)(**{k: placed(v) for k, v in vars(value).items()})
            return value

        args, more = [placed(x) for x in args], {k: placed(v) for k, v in more.items()}
        over = self.over and tile.dtype == torch.bfloat16 and not more.get("from_probs")
        if over or self.device != "cpu":
            mine = torch.empty_strided(tile.shape, tile.stride(), dtype=torch.float32 if over else tile.dtype, device=self.device)
            mine.copy_(tile)
        else:
            mine = tile
        out = mine.view(tile.dtype)[:, : tile.shape[1]] if over and tile.shape[0] else None
        function(mine, *args, **more, **self.options, **({"out": out} if over and writes else {}))
        if mine is not tile and writes:
            tile.copy_(mine if out is None else out)
        for value, moved in back:
            if not value.is_leaf or value.dtype != torch.int64:
                value.copy_(moved)


def all_kernels():
    found = [Kernels("torch", pytorch, DEVICE), Kernels("torch-over", pytorch, DEVICE, over=True)]
    if native.why_unavailable() is None and DEVICE == "cpu":
        found += [Kernels(f"cpu-{isa}", native, isa=isa) for isa in native.isas()]
    if triton.why_unavailable() is None:
        found += [Kernels("triton", triton, DEVICE), Kernels("triton-over", triton, DEVICE, over=True)]
    if cuda.why_unavailable() is None and DEVICE != "cpu":
        found += [Kernels("cuda", cuda, DEVICE), Kernels("cuda-over", cuda, DEVICE, over=True)]
    if cuda_host.why_unavailable() is None and DEVICE == "cpu":  # 64 threads: several warps, and several steps in a short row
        twice, kept = {"variant": cuda_host.TWICE, "threads": 64}, {"variant": cuda_host.KEPT, "threads": 64, "cluster": 2}
        for name, options in ("cuda-shim", twice), ("cuda-shim-cluster", kept):
            found += [Kernels(name, cuda_host, **options), Kernels(f"{name}-over", cuda_host, over=True, **options)]
    return found


each_kernels = pytest.mark.parametrize("kernels", all_kernels(), ids=repr)


