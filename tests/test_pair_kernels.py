"""The pair kernels, and the row kernels over ranges, of every backend against float64."""

import math

import pytest
import torch
from support.problems import DEVICE
from support.row_kernels import all_kernels

from grpo_kernels.backends.statistics import Pairs, Tile, finalize, new_statistics
from grpo_kernels.losses.config import LogitTransform

KERNELS = [k for k in all_kernels() if hasattr(k.module, "pair_logits") and not k.wide and not k.apart]
each = pytest.mark.parametrize("kernels", KERNELS, ids=repr)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
LENGTHS = {  # of the ranges
    "one row": [3], "mixed": [1, 0, 8, 2, 1, 17, 0, 33, 5], "long": [2, 700, 0, 129, 64], "none": [0, 0], "no rows": [],
}  # fmt: skip


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(lengths, V, K, dtype, seed=0, rows=True, bad=True):
    """(pairs, hidden, weight, g, bias): ranges in shuffled order with gaps between them, some ids outside of the weight."""
    g = torch.Generator().manual_seed(seed)
    R, gap = len(lengths), 3
    first = torch.tensor([gap + sum(lengths[:r]) + gap * r for r in range(R)], dtype=torch.int64)
    M = sum(lengths) + gap * (R + 1)
    order = torch.randperm(R, generator=g)
    ranges = torch.stack([first, first + torch.tensor(lengths, dtype=torch.int64)], 1)[order].contiguous()
    ids = torch.randint(0, V, (M,), generator=g)
    if bad:
        ids[torch.rand(M, generator=g) < 0.1] = V + 5
        ids[torch.rand(M, generator=g) < 0.1] = -1
    N = R + 4
    where = torch.randperm(N, generator=g)[:R].contiguous() if rows else None
    hidden, weight = (torch.randn(n, K + 3, generator=g).to(dtype)[:, :K] for n in (N, V))
    if dtype == torch.float64:
        hidden, weight = hidden.contiguous(), weight.contiguous()
    return Pairs(ids, ranges, where), hidden, weight, torch.randn(M, generator=g).to(acc(dtype)), torch.randn(V, generator=g).to(acc(dtype))


def placed(*tensors):
    moved = [None if x is None else x.to(DEVICE) for x in tensors]
    return moved[0] if len(moved) == 1 else moved


def on_device(pairs):
    return Pairs(*placed(pairs.ids, pairs.ranges, pairs.rows))


def by_pair(pairs):
    for r, (first, last) in enumerate(pairs.ranges.tolist()):
        row = r if pairs.rows is None else int(pairs.rows[r])
        for j in range(first, last):
            yield r, row, j, int(pairs.ids[j])


def exact_logits(pairs, hidden, weight, before, scale, bias, add):
    out = before.double().clone()
    for _, row, j, v in by_pair(pairs):
        if not 0 <= v < len(weight):
            out[j] = out[j] if add else -math.inf
            continue
        z = scale * (hidden[row].double() @ weight[v].double()) + (0 if bias is None else bias[v].double())
        out[j] = out[j] + z if add else z
    return out


def exact_sums(pairs, g, source, before, scale, add):
    out, met = before.double().clone(), set()
    for r, row, j, v in by_pair(pairs):
        if not 0 <= row < len(out):
            continue
        if r not in met and not add:
            out[row] = 0
        met.add(r)
        if 0 <= v < len(source):
            out[row] += scale * g[j].double() * source[v].double()
    return out


def close(found, exact, dtype, size):
    """size: of the sums' parts."""
    eps = {torch.float32: 4e-7, torch.float64: 1e-15, torch.bfloat16: 8e-3}[dtype]
    found = found.cpu().double()
    assert torch.equal(found.isfinite(), exact.isfinite())
    keep = exact.isfinite()
    assert (found - exact)[keep].abs().max() <= eps * size if keep.any() else True


@pytest.mark.cover("kernels", "dtype", "way")
@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("K", [1, 3, 64, 200])
@pytest.mark.parametrize("way", ["plain", "bias", "add", "in place"])
def test_logits_of_pairs(kernels, dtype, lengths, K, way):
    dtype = DTYPES[dtype]
    pairs, hidden, weight, before, bias = drawn(LENGTHS[lengths], 37, K, dtype, rows=way != "in place")
    scale, bias, add = 1.0 if way == "plain" else 0.7, bias if way == "bias" else None, way == "add"
    if bias is not None:
        bias[::5] = -math.inf
    exact = exact_logits(pairs, hidden, weight, before, scale, bias, add)
    out = placed(before.clone())
    kernels.module.pair_logits(on_device(pairs), *placed(hidden, weight), out, scale=scale, bias=placed(bias), add=add, **kernels.options)
    outside = torch.ones(len(before), dtype=torch.bool)
    for _, _, j, _ in by_pair(pairs):
        outside[j] = False
    assert torch.equal(out.cpu()[outside], before[outside])
    close(out, exact, acc(dtype), 8 * math.sqrt(K) + 8)


@pytest.mark.cover("kernels", "dtype", "way")
@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("K", [1, 3, 64, 200])
@pytest.mark.parametrize("way", ["plain", "acc", "add", "add acc", "in place"])
def test_sums_over_pairs(kernels, dtype, lengths, K, way):
    dtype = DTYPES[dtype]
    pairs, hidden, weight, g, _ = drawn(LENGTHS[lengths], 37, K, dtype, rows=way != "in place")
    if pairs.rows is not None and len(pairs.rows) > 2:
        pairs.rows[0], pairs.rows[1] = -1, len(hidden)  # left alone
    g[(pairs.ids < 0) | (pairs.ids >= 37)] = math.nan  # counts nothing
    before = torch.randn(hidden.shape).to(acc(dtype) if "acc" in way else dtype)
    exact = exact_sums(pairs, g, weight, before, 0.7, "add" in way)
    out = placed(before.clone())
    kernels.module.pair_sums(on_device(pairs), *placed(g, weight), out, scale=0.7, add="add" in way, **kernels.options)
    touched = {row for _, row, _, _ in by_pair(pairs)}
    for row in set(range(len(before))) - touched:
        assert torch.equal(out[row].cpu(), before[row])
    longest = max(LENGTHS[lengths], default=0)
    close(out, exact, out.dtype, 10 * math.sqrt(longest) + 10)
    again = placed(before.clone())
    kernels.module.pair_sums(on_device(pairs), *placed(g, weight), again, scale=0.7, add="add" in way, **kernels.options)
    assert torch.equal(out, again)


@pytest.mark.cover("kernels", "dtype")
@each
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [[3], [1, 8, 2, 1, 17, 33, 5], [2, 9000, 129, 64]], ids=["one", "mixed", "long"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_row_kernels_over_ranges_are_those_of_the_rows_alone(kernels, dtype, lengths, softcap, per_row):
    """Every range as a tile of its own, by plain PyTorch in float64."""
    dtype = DTYPES[dtype]
    pairs, _, _, values, _ = drawn(lengths, 37, 4, dtype, rows=False)
    values *= 3
    R = len(lengths)
    target = torch.tensor([(2 * r) % (last - first) for r, (first, last) in enumerate(pairs.ranges.tolist())])
    if softcap is None:
        first, last = max(pairs.ranges.tolist(), key=lambda ends: ends[1] - ends[0])
        values[last - 1] = -math.inf  # a banned token; nobody's target
        target[target == last - first - 1] = 0
    temperature = 0.5 + torch.rand(R, dtype=dtype) if per_row else None
    transform = LogitTransform(-1.3 if softcap else 1.3, softcap, 0.8)
    tile = Tile(placed(values), placed(target), transform, None, placed(temperature), placed(pairs.ranges))
    stats = new_statistics(R, dtype, DEVICE)
    kernels.module.statistics(tile, stats, **kernels.options)
    scored = finalize(stats)
    g, g_entropy = torch.randn(R, dtype=dtype), torch.randn(R, dtype=dtype)
    g[R // 2], g_entropy[R // 2] = 0.0, 0.0
    out = placed(values.clone())
    kernels.module.gradient(Tile(out, placed(target), transform, None, placed(temperature), placed(pairs.ranges)), out, scored,
                            *placed(g, g_entropy), **kernels.options)  # fmt: skip
    outside = torch.ones(len(values), dtype=torch.bool)
    eps = 3e-5 if dtype == torch.float32 else 1e-12
    for r, (first, last) in enumerate(pairs.ranges.tolist()):
        outside[first:last] = False
        raw = values[first:last].double().requires_grad_()
        y = transform.logit_scale * raw
        y = y if softcap is None else softcap * torch.tanh(y / softcap)
        z = y / (transform.temperature if temperature is None else temperature[r].double())
        log_p = z.log_softmax(0)
        logps, entropy = log_p[target[r]], -(log_p.exp() * log_p.where(log_p > -math.inf, 0.0)).sum()
        assert abs(scored.logps[r].item() - logps.item()) <= eps * (1 + abs(logps.item()))
        assert abs(scored.entropy[r].item() - entropy.item()) <= eps * 10
        p = log_p.exp()
        dz = g[r] * (torch.nn.functional.one_hot(target[r], last - first) - p)
        dz = dz - g_entropy[r] * (p * (log_p + entropy)).where(p != 0, 0.0)
        slope = 1.0 if softcap is None else 1 - torch.tanh(transform.logit_scale * raw / softcap) ** 2
        dz = dz * slope * transform.logit_scale / (transform.temperature if temperature is None else temperature[r])
        dz = dz.where(dz == dz, 0.0).detach()
        assert (out[first:last].cpu().double() - dz).abs().max() <= eps * 10
    assert torch.equal(out.cpu()[outside], values[outside])
