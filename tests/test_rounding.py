"""The emulated accumulators of docs/rounding.py against sums made by hand, and what their errors must look like."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from docs import rounding
from docs.rounding import A100, HOPPER, IN_ORDER, OFTEN, ROUNDING, V100, dot
from grpo_kernels import backends
from grpo_kernels.backends.statistics import Tile, finalize, new_statistics
from grpo_kernels.losses.config import LogitTransform

ALL = (V100, A100, HOPPER, ROUNDING, OFTEN, IN_ORDER)
ULP = 2.0**-23  # of 1


def total(products, how, start=0):
    """Products as given, times 1, after ``start`` in a block of its own."""
    before = [start] + [0.0] * (how.block - 1) if start else []
    return dot(np.array(before + list(products), dtype=np.float64), np.ones(len(before) + len(products)), how)


def bf16(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16().float().numpy()


@pytest.mark.parametrize("how", ALL, ids=lambda how: how.name)
def test_sums_that_float32_can_hold_are_exact(how):
    a, b = (np.random.default_rng(seed).integers(-8, 9, (7, 5, 100)).astype(np.float64) for seed in (0, 1))
    assert (dot(a, b, how) == (a * b).sum(-1)).all()
    assert (dot(a[:, :1], b[:1], how) == (a[:, :1] * b[:1]).sum(-1)).all()  # broadcast as a product of matrices does
    assert total([0.0] * 40, how) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_result_is_cut_off_where_ieee_would_round(sign):
    products = [sign, sign * 0.75 * ULP]
    assert total(products, HOPPER) == sign and total(products, ROUNDING) == total(products, IN_ORDER) == sign * (1 + ULP)
    assert total([sign, sign * 0.5 * ULP], ROUNDING) == sign  # a tie goes to the even one
    assert total([sign * (1 + 2.0**-7), sign * 0.5 * ULP] + [0.0] * 14 + [sign * ULP], ROUNDING) == sign * (1 + 2.0**-7 + ULP)


@pytest.mark.parametrize("how, block, bits", [(V100, 4, 23), (A100, 8, 24), (HOPPER, 16, 25)], ids=lambda p: getattr(p, "name", ""))
def test_small_products_beside_a_large_one_are_lost(how, block, bits):
    """What is less than 2^-bits of the largest of its block, and only that, and only in that block."""
    kept, lost = 2.0**-bits, 0.75 * 2.0**-bits
    assert total([1, -1, kept], how) == kept and total([1, -1, lost], how) == 0 and total([1, -1, 1.75 * kept], how) == kept
    alone = [lost] * block
    assert total([1] + [lost] * (block - 1), how) == 1
    assert total(alone, how) == block * lost
    # one block more is another alignment: 1 - 1 is over when the small ones come
    assert total([1, -1] + [0.0] * (block - 2) + alone, how) == block * lost
    # the sum so far is aligned like a product
    assert total(alone, how, start=1) == 1 and total([1, -1], how, start=1.75 * kept) == kept


def test_products_are_aligned_by_the_sum_of_exponents():
    """1.5 * 1.5 is above 2, but stands where 1 stands: 2^-25 beside it survives."""
    assert dot(np.array([1.5, -1.5, 1.0]), np.array([1.5, 1.5, 2.0**-25]), HOPPER) == 2.0**-25
    assert dot(np.array([2.0, -2.0, 1.0]), np.array([1.0, 1.0, 2.0**-25]), HOPPER) == 0


def test_a_crumb_of_the_other_sign_costs_a_whole_ulp():
    """Why a long sum of tiny products shrinks on a GPU that keeps bits beyond float32, and not on one that has none."""
    crumb = -(2.0**-25)
    assert total([crumb], HOPPER, start=1) == 1 - ULP / 2 and total([crumb], ROUNDING, start=1) == 1
    assert total([crumb], V100, start=1) == total([crumb], A100, start=1) == 1


def test_one_by_one_is_numpy_s_float32():
    a, b = bf16(40, 700), bf16(40, 700, seed=1)
    expected = np.zeros(40, np.float32)
    for k in range(700):
        expected += a[:, k] * b[:, k]
    assert (dot(a, b, IN_ORDER) == expected).all()


def test_promoted_sums_are_float32_sums_of_sums():
    a, b = bf16(40, 384), bf16(40, 384, seed=1)
    parts = [np.float32(dot(a[:, k : k + 128], b[:, k : k + 128], HOPPER)) for k in (0, 128, 256)]
    assert (dot(a, b, OFTEN) == (parts[0] + parts[1]) + parts[2]).all() and (dot(a, b, OFTEN) != dot(a, b, HOPPER)).any()


def shrinkage(depth, how, sign=1.0):
    a, b = (np.abs(bf16(500, depth, seed=seed)) for seed in (0, 1))
    exact = (a.astype(np.float64) * b).sum(1)
    return 1 - dot(sign * a, b, how) / (sign * exact)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("how", [V100, A100, HOPPER], ids=lambda how: how.name)
def test_truncation_shrinks_and_grows_with_the_depth(how, sign):
    found = [shrinkage(depth, how, sign) for depth in (256, 1024, 4096)]
    assert all((each >= 0).all() for each in found)  # never away from 0, of either sign
    # four times the depth: in proportion, and faster where early sums are so small that they keep most bits of a bf16 product
    assert 4 < found[1].mean() / found[0].mean() < 12 and 4 < found[2].mean() / found[1].mean() < 12


def test_rounding_has_no_side_and_grows_slower():
    found = [shrinkage(depth, ROUNDING) for depth in (256, 4096)]
    for each in found:
        assert abs(each.mean()) < 0.25 * each.std()
    assert found[1].std() / found[0].std() < 8 and abs(found[1]).mean() < 0.1 * shrinkage(4096, HOPPER).mean()
    assert shrinkage(4096, OFTEN).mean() < 0.1 * shrinkage(4096, HOPPER).mean()  # 128 at a time it is that of 128


def test_a_smaller_block_truncates_more_often():
    assert shrinkage(2048, replace(HOPPER, block=4)).mean() > 2 * shrinkage(2048, HOPPER).mean()


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    return rounding.inputs(24, 512, 400)


def test_inputs_are_what_docs_say(problem):
    hidden, head, softmax, dz = problem
    assert hidden.dtype == head.dtype == dz.dtype == torch.bfloat16 and torch.allclose(softmax.sum(1), torch.ones(24))
    size = hidden.float().abs().median(0).values.sort(descending=True).values
    assert (size[:6] > 20).all() and (size[6:] < 10).all()
    assert (dz.float().sum(1).abs() < 0.05).all() and ((dz > 0).sum(1) == 1).all()


def test_the_error_of_lse_from_drawn_columns_is_that_of_all_columns(problem):
    """Also with every column emulated: the log-prob's error is that of its logit minus that of lse."""
    hidden, head, softmax, _ = problem
    shrunk, sampled, _, unlikely, _ = rounding.log_prob_errors(HOPPER, hidden, head, softmax, draws=2000)
    a, b = hidden.float().numpy(), head.float().numpy()
    z, exact = dot(a[:, None], b[None], HOPPER), a.astype(np.float64) @ b.T.astype(np.float64)
    logps = [torch.from_numpy(each).log_softmax(1).numpy() for each in (z, exact)]
    error = logps[0] - logps[1]
    rows = np.arange(24)
    assert np.abs(unlikely - error[rows, rows]).max() < 0.1 * np.abs(error[rows, rows]).max()
    off = z - exact
    lse = (off - error)[:, 0]
    # the drawn token's own error is what is left
    drawn = softmax.multinomial(2002, replacement=True, generator=torch.Generator().manual_seed(0))[:, 0].numpy()
    assert np.abs(sampled - (off[rows, drawn] - lse)).max() < 0.1 * np.abs(unlikely).max()
    assert np.allclose(shrunk, (-off * np.sign(exact))[rows, drawn] / np.abs(exact[rows, drawn]).mean())


def test_of_one_draw_the_error_is_the_difference_of_two_logits(problem):
    hidden, head, softmax, _ = problem
    a, b = hidden.float().numpy(), head.float().numpy()
    off = dot(a[:, None], b[None], HOPPER) - a.astype(np.float64) @ b.T.astype(np.float64)
    token, other, _ = softmax.multinomial(3, replacement=True, generator=torch.Generator().manual_seed(0)).T.numpy()
    rows, found = np.arange(24), rounding.log_prob_errors(HOPPER, hidden, head, softmax, draws=1)
    assert np.allclose(found[1], (off[rows, token] - off[rows, other]), rtol=0, atol=1e-12)
    assert np.allclose(found[3], (off[rows, rows] - off[rows, other]), rtol=0, atol=1e-12)
    # towards 0 from below as from above
    assert (rounding.log_prob_errors(HOPPER, hidden, -head, softmax, draws=1)[0] == found[0]).all() and found[0].mean() > 0


def test_a_temperature_takes_out_most_of_it(problem):
    hidden, head, softmax, _ = problem
    _, _, _, unlikely, scaled = rounding.log_prob_errors(HOPPER, hidden, head, softmax)
    assert np.abs(scaled).mean() < 0.6 * np.abs(unlikely).mean()


def test_gradients_are_off_by_bf16_and_little_else(problem):
    hidden, head, _, dz = problem
    for a, b in ((dz, head[:, :16].T), (dz.T[:20], hidden[:, :16].T)):
        summed, rounded = rounding.product_errors(HOPPER, a, b)
        exact = a.double() @ b.double().T
        assert (summed > 0).all() and summed.max() < 1e-5
        assert np.allclose(rounded, ((exact.bfloat16().double() - exact).norm(dim=1) / exact.norm(dim=1)).numpy(), rtol=0.1)


def test_the_command_prints_a_table_of_everybody(capsys):
    rounding.main(rows=8, depths=(64, 128), vocab=300, dw_rows=64, channels=4)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [len(line) for line in lines].count(7) == 3 * 7  # two depths, and one without outliers
    assert sum(line[0] in ("| dH", "| dW") for line in lines) == 2 * 6
    assert not any("nan" in cell or "inf" in cell for line in lines for cell in line)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_on_exact_logits_our_log_probs_are_within_what_the_promise_leaves_to_them(backend):
    """The 5e-7 of docs/precision.md: float32 logits of a whole vocabulary, log-probs of drawn tokens, rms against float64."""
    if reason := backends.available_backends()[backend]:
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(48, 151_936, generator=g)
    z[:, :4] += torch.linspace(16, 26, 48).unsqueeze(1)
    token = z.softmax(1).multinomial(1, generator=g)
    exact = z.double().log_softmax(1).gather(1, token).squeeze(1)
    stats = new_statistics(48, torch.float32, "cpu")
    backends.kernels(backend).statistics(Tile(z, token.squeeze(1), LogitTransform()), stats)
    assert exact.min() < -3 and (finalize(stats).logps - exact).square().mean().sqrt() < 5e-7


def test_docs_hold_what_the_command_prints_first():
    docs = (Path(__file__).parent.parent / "docs" / "precision.md").read_text()
    printed = re.search(r"\| D 896 \| H100, H200, B200 \| (\S+) \| \S+, \S+, \S+ \| (\S+), ", docs)
    torch.manual_seed(0)
    found = rounding.log_prob_errors(HOPPER, *rounding.inputs(32, 896, 151_936)[:3])
    # a quarter of the rows; not the drawn tokens' log-probs, whose mean a single token moves
    assert [float(x) for x in printed.groups()] == pytest.approx([found[0].mean(), np.abs(found[3]).mean()], rel=0.1)
