"""Tiles for tests of the row kernels, and every backend's kernels behind one face."""

import functools
import os
from dataclasses import fields, replace

import pytest
import torch

from grpo_kernels.backends import cuda, native, pytorch, statistics, triton
from grpo_kernels.losses.terms import PolicyTerms
from support import cuda_host

INF, NAN = float("inf"), float("nan")
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


def new_stats(rows, dtype):
    return statistics.new_statistics(rows, acc(dtype), "cpu")


def in_frame(rows, columns, stride, dtype, device):
    """(matrix [R, C] of this row stride, the memory around it); all of it NaN."""
    frame = torch.full((rows + 2, stride), NAN, dtype=dtype, device=device)
    return frame[1:-1, :columns], frame


class Kernels:
    """A backend's row kernels for tensors on the CPU; what they are given stays as it is, what they write is returned.

    They work in place; with `apart` in other memory, which was NaN; with `wide` also on float32 logits of 16-bit inputs. Memory
    around a matrix is NaN and must remain so.
    """

    def __init__(self, name, module, device="cpu", apart=False, wide=False, **options):
        self.name, self.module, self.device, self.apart, self.wide, self.options = name, module, device, apart, wide, options

    def __repr__(self):
        return self.name

    def statistics(self, tile, stats):
        """Folds into `stats`."""
        mine, frame = self._placed(tile, self.wide)
        before, moved = frame.clone(), self._moved(stats)
        self.module.statistics(mine, moved, **self.options)
        torch.testing.assert_close(frame, before, rtol=0, atol=0, equal_nan=True)
        stats.copy_(moved)

    def closed(self, stats):
        scored = statistics.Scored(*torch.full((3, len(stats)), NAN, dtype=stats.dtype, device=self.device))
        self.module.close(self._moved(stats), scored, **self.options)
        return statistics.Scored(*(x.cpu() for x in scored))

    def squared(self, stats):
        """(Scored, sum of p^2 over all but the target) of statistics with squares."""
        *scored, squared = torch.full((4, len(stats)), NAN, dtype=stats.dtype, device=self.device)
        self.module.close(self._moved(stats), statistics.Scored(*scored), squared, **self.options)
        return statistics.Scored(*(x.cpu() for x in scored)), squared.cpu()

    def gradient(self, tile, scored, g, g_entropy=None):
        return self._written(self.module.gradient, tile, self._all_moved(scored), self._moved(g), self._moved(g_entropy))

    def policy(self, tile, rows, terms):
        """(gradient, Scored)"""
        rows = replace(rows, **{field.name: self._moved(getattr(rows, field.name)) for field in fields(rows)})
        scored = statistics.Scored(*torch.full((3, tile.target.numel()), NAN, dtype=acc(tile.values.dtype), device=self.device))
        out = self._written(self.module.policy, tile, rows, terms, scored)
        return out, statistics.Scored(*(x.cpu() for x in scored))

    def _written(self, function, tile, *args):
        mine, frame = self._placed(tile, self.wide)
        out, outside, (rows, columns) = mine.values, frame, tile.values.shape
        if self.apart:
            out, outside = in_frame(rows, columns, columns + 3, tile.values.dtype, self.device)
            before = frame.clone()
        function(mine, out, *args, **self.options)
        assert outside[[0, -1]].isnan().all() and outside[:, columns:].isnan().all(), "written outside of the matrix"
        if self.apart:
            torch.testing.assert_close(frame, before, rtol=0, atol=0, equal_nan=True)
        return out.cpu()

    def _placed(self, tile, wide):
        values = tile.values
        (rows, columns), dtype = values.shape, torch.float32 if wide and values.dtype == torch.bfloat16 else values.dtype
        matrix, frame = in_frame(rows, columns, max(columns, values.stride(0)), dtype, self.device)
        matrix.copy_(values)
        others = {name: self._moved(getattr(tile, name)) for name in ("target", "bias", "temperature")}
        return replace(tile, values=matrix, **others), frame

    def _moved(self, value):
        return None if value is None else value.to(self.device, copy=True)

    def _all_moved(self, scored):
        return statistics.Scored(*map(self._moved, scored))


def all_kernels():
    found = [Kernels("torch", pytorch, DEVICE), Kernels("torch-wide", pytorch, DEVICE, apart=True, wide=True)]
    if native.why_unavailable() is None and DEVICE == "cpu":
        for isa in native.isas():
            found += [Kernels(f"cpu-{isa}", native, isa=isa), Kernels(f"cpu-{isa}-apart", native, apart=True, isa=isa)]
    if triton.why_unavailable() is None:
        found += [Kernels("triton", triton, DEVICE), Kernels("triton-wide", triton, DEVICE, apart=True, wide=True)]
    if cuda.why_unavailable() is None and DEVICE != "cpu":
        found += [Kernels("cuda", cuda, DEVICE), Kernels("cuda-wide", cuda, DEVICE, apart=True, wide=True)]
    if cuda_host.why_unavailable() is None and DEVICE == "cpu":  # 64 threads: several warps, and several steps in a short row
        twice, kept = {"variant": cuda_host.TWICE, "threads": 64}, {"variant": cuda_host.KEPT, "threads": 64, "cluster": 2}
        for name, options in ("cuda-shim", twice), ("cuda-shim-cluster", kept):
            found += [Kernels(name, cuda_host, **options), Kernels(f"{name}-wide", cuda_host, apart=True, wide=True, **options)]
    return found


each_kernels = pytest.mark.parametrize("kernels", all_kernels(), ids=repr)
each_policy = pytest.mark.parametrize("kernels", [k for k in all_kernels() if hasattr(k.module, "policy")], ids=repr)


Terms = functools.partial(PolicyTerms, kind="clipped", epsilon_high=0.28, use_bias_correction_kl=False)


def log_probs(z, target):
    """(logps, entropy) by the plain expressions."""
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p.clamp(min=torch.finfo(z.dtype).min)).sum(1)
    return log_p.gather(1, target.unsqueeze(1)).squeeze(1), entropy
