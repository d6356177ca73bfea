"""The row kernels of every backend, against float64 autograd of the formulas.

A backend that takes float32 logits of 16-bit inputs is tested a second time so ("wide"): the logits in float32, the result in
the 16-bit dtype, in other memory.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from support.row_kernels import INF, NAN, Terms, acc, each_dtype, each_kernels, each_policy, log_probs, make_tile, new_stats
from support.tolerance import assert_no_worse_than_torch

from grpo_kernels.backends import triton
from grpo_kernels.backends.statistics import Scored, Tile, finalize
from grpo_kernels.losses.config import LogitTransform as Transform
from grpo_kernels.losses.terms import PolicyRows

# Rows and columns: one of each, ragged ends, exactly one block of 4096, several blocks and a rest.
SHAPES = [(1, 1), (1, 37), (3, 151), (2, 4096), (3, 8192 + 4096 + 77), (40, 65)]


TRANSFORMS = [
    Transform(),
    Transform(1.3, None, 0.7),
    Transform(-0.5, None, 1.0),
    Transform(1.3, 5.0, 0.7),
]


def interpreted(kernels):
    """Tens of milliseconds for a block."""
    return kernels.module is triton and triton.interpreted()


def make_logits(rows, columns, dtype, transform, biased=False, per_row=False, spare=0):
    """A Tile of random logits with its targets; a bias masks a tenth of the vocabulary, but where a negative scale forbids it."""
    values = make_tile(rows, columns, dtype, spare)
    bias = temperature = None
    target = torch.randint(0, columns, (rows,))
    if biased:
        bias = torch.randn(columns, dtype=acc(dtype))
        if transform.logit_scale > 0:
            bias[torch.rand(columns) < 0.1] = -INF
        bias[0] = 0.5
        target[bias[target] == -INF] = 0
    if per_row:
        temperature = torch.rand(rows, dtype=acc(dtype)) + 0.5
    return Tile(values, target, transform, bias, temperature)


def transformed(raw, tile):
    transform = tile.transform
    y = raw if tile.bias is None else raw + tile.bias.to(raw.dtype)
    y = y * transform.logit_scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    return y / (transform.temperature if tile.temperature is None else tile.temperature.to(raw.dtype).unsqueeze(1))


def assert_good(name, ours, by_torch, exact, floor=1e-6, slack=2.0):
    """At most twice the error of torch in `by_torch`'s dtype; the floor is for float32 sums, float64 has 1e-13."""
    floor = 1e-13 if by_torch.dtype == torch.float64 else floor
    assert_no_worse_than_torch(name, ours, by_torch, exact, slack, floor)


def assert_entropy(name, ours, by_torch, exact):
    """As above, but the entropy of a confident row is a difference of numbers near 1: one is added to all."""
    assert_good(name, ours.double() + 1, (by_torch.double() + 1).to(by_torch.dtype), exact + 1)


def gradient_of(raw, dtype, loss):
    """d loss(raw) / d raw by autograd in this dtype."""
    raw = raw.detach().to(dtype, copy=True).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(raw), raw)
    return gradient


def scores(tile, dtype):
    """(logps, entropy) of whole rows by the plain expressions, in this dtype."""
    return log_probs(transformed(tile.values.to(dtype), tile), tile.target)


def exactly_scored(tile):
    """What `gradient` is given, rounded once."""
    z = transformed(tile.values.double(), tile)
    logps, entropy = log_probs(z, tile.target)
    # near p = 1 the digits of the log-prob are those of the other columns
    others = torch.logsumexp(z.scatter(1, tile.target.unsqueeze(1), -INF), 1) - z.gather(1, tile.target.unsqueeze(1)).squeeze(1)
    logps = torch.where(logps > -1e-3, -torch.nn.functional.softplus(others), logps)
    return Scored(*(x.to(acc(tile.values.dtype)) for x in (logps, z.logsumexp(1), entropy)))


# ---- statistics


@pytest.mark.cover("kernels", "dtype")
@each_kernels
@each_dtype
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_statistics(kernels, dtype, transform):
    for (rows, columns), (biased, per_row) in itertools.product(SHAPES, [(False, False), (True, False), (False, True)]):
        tile, stats = make_logits(rows, columns, dtype, transform, biased, per_row, columns % 3), new_stats(rows, dtype)
        kernels.statistics(tile, stats)
        logps, lse, entropy = finalize(stats.double())
        exact_logps, exact_entropy = scores(tile, torch.float64)
        torch_logps, torch_entropy = scores(tile, dtype)
        name = f"{rows}x{columns} biased={biased} per_row={per_row}"
        assert_good(f"logps {name}", logps, torch_logps, exact_logps)
        assert_entropy(f"entropy {name}", entropy, torch_entropy, exact_entropy)
        z = transformed(tile.values.double(), tile)
        torch.testing.assert_close(stats[:, 0].double(), z.amax(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats[:, 3].double(), z.gather(1, tile.target.unsqueeze(1)).squeeze(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, z.logsumexp(1), rtol=1e-6, atol=4e-6)


@each_kernels
@each_dtype
def test_statistics_fold_column_blocks(kernels, dtype):
    rows, columns = 9, 3 * 4096 + 501
    tile = make_logits(rows, columns, dtype, Transform(1.3, None, 0.7), True, True)
    tile.values[1] += torch.linspace(-40, 40, columns).to(dtype)  # every block raises the maximum
    tile.values[2] -= torch.linspace(-40, 40, columns).to(dtype)
    tile.values[3] = -INF
    tile.values[3, 9000] = 1.0
    tile.bias[9000] = 0.0
    tile.target.copy_(torch.tensor([0, 1, columns - 1, 9000, 4095, 4096, 700, 701, 8000]))
    tile.target[tile.bias[tile.target] == -INF] = 0
    bounds = [0, 1, 700, 701, 5000, 9100, columns]
    stats = new_stats(rows, dtype)
    for start, end in itertools.pairwise(bounds):
        values, bias = tile.values[:, start:end], tile.bias[start:end].contiguous()
        kernels.statistics(replace(tile, values=values, target=tile.target - start, bias=bias), stats)
    exact_logps, exact_entropy = scores(tile, torch.float64)
    logps, _, entropy = finalize(stats.double())
    torch.testing.assert_close(logps, exact_logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy, exact_entropy, rtol=2e-6, atol=1e-5)


@each_kernels
@each_dtype
def test_statistics_of_masked_vocabulary(kernels, dtype):
    columns = 3 * 4096
    values = make_tile(4, columns, dtype)
    values[0, :4096] = -INF
    values[1, 4096:8192] = -INF
    values[2] = -INF
    values[3, 4096:] = -INF
    tile, stats = Tile(values, torch.tensor([5000, 3, 7, 5]), Transform()), new_stats(4, dtype)
    kernels.statistics(tile, stats)
    assert stats[2].tolist() == [-INF, 0.0, 0.0, -INF]
    exact_logps, exact_entropy = scores(tile, torch.float64)
    kept = [0, 1, 3]
    logps, _, entropy = finalize(stats.double())
    torch.testing.assert_close(logps[kept], exact_logps[kept], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy[kept], exact_entropy[kept], rtol=2e-6, atol=1e-5)
    stats = new_stats(4, dtype)
    kernels.statistics(replace(tile, target=torch.zeros_like(tile.target)), stats)
    assert finalize(stats).logps[0] == -INF


@each_kernels
@each_dtype
def test_statistics_far_from_zero_and_confident(kernels, dtype):
    """A shared offset costs no digits, and a log-prob near 0 keeps three."""
    values = make_tile(3, 5001, dtype, spread=2.0)
    values[0] = (values[0] * 8).round() / 8 + 512
    values[1, 4321] = 32.0
    values[2, 0] = 40.0
    tile, stats = Tile(values, torch.tensor([17, 4321, 0]), Transform()), new_stats(3, dtype)
    kernels.statistics(tile, stats)
    logps, _, entropy = finalize(stats)
    exact_logps, exact_entropy = scores(tile, torch.float64)
    torch.testing.assert_close(logps[:1].double(), exact_logps[:1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-7)
    confident = exactly_scored(tile).logps[1:]
    assert (confident.abs() < 1e-6).all() and (confident < 0).all()
    torch.testing.assert_close(logps[1:], confident, rtol=1e-4, atol=0)


@each_kernels
@each_dtype
def test_nan_stays_in_its_row(kernels, dtype):
    for where, value in itertools.product((0, 100, 4096 + 5, 8200), (NAN, INF)):
        values, stats = make_tile(3, 8201, dtype), new_stats(3, dtype)
        values[1, where] = value
        kernels.statistics(Tile(values, torch.tensor([1, 100, 3]), Transform()), stats)
        logps, _, entropy = finalize(stats)
        assert logps.isnan().tolist() == [False, True, False]
        assert entropy.isnan().tolist() == [False, True, False]


# ---- gradient


@pytest.mark.cover("kernels", "dtype")
@each_kernels
@each_dtype
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradient_of_log_probs_whose_targets_are_elsewhere(kernels, dtype, transform):
    """Rows of a sharded vocabulary whose target is another rank's: no column is the target's."""
    for (rows, columns), biased in itertools.product(SHAPES, (False, True)):
        if interpreted(kernels) and rows * columns > 4096 and not biased:
            continue
        tile = make_logits(rows, columns, dtype, transform, biased, biased, columns % 2)
        elsewhere = tile.target.clone()
        elsewhere[::3] = columns

        def loss(raw, tile=tile, elsewhere=elsewhere):
            z = transformed(raw, tile)
            here = elsewhere < z.shape[1]
            return z.gather(1, tile.target.unsqueeze(1))[here].sum() - z.logsumexp(1).sum()

        exact, by_torch = (gradient_of(tile.values, t, loss) for t in (torch.float64, dtype))
        ours = kernels.gradient(replace(tile, target=elsewhere), exactly_scored(tile), torch.ones(rows, dtype=acc(dtype)))
        assert_good(f"{rows}x{columns} biased={biased}", ours, by_torch, exact, floor=4e-6)
        if biased and transform.softcap is None and transform.logit_scale > 0:
            assert (ours[:, tile.bias == -INF] == 0).all()


@pytest.mark.cover("kernels", "dtype")
@each_kernels
@each_dtype
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient(kernels, dtype, transform, with_entropy):
    for (rows, columns), biased in itertools.product(SHAPES, (False, True)):
        if columns == 1 or (interpreted(kernels) and rows * columns > 4096 and not biased):
            continue  # the gradient of one column is zero: nothing to compare
        tile = make_logits(rows, columns, dtype, transform, biased, biased, columns % 2)
        g = torch.randn(rows, dtype=acc(dtype))
        g_entropy = torch.randn(rows, dtype=acc(dtype)) if with_entropy else None

        def loss(raw, tile=tile, g=g, g_entropy=g_entropy):
            logps, entropy = log_probs(transformed(raw, tile), tile.target)
            total = (g.to(raw.dtype) * logps).sum()
            return total if g_entropy is None else total + (g_entropy.to(raw.dtype) * entropy).sum()

        exact, by_torch = gradient_of(tile.values, torch.float64, loss), gradient_of(tile.values, dtype, loss)
        scored = exactly_scored(tile)
        ours = kernels.gradient(tile, scored, g, g_entropy)
        # lse arrives rounded, so that p is off by lse * 2^-24
        assert_good(f"{rows}x{columns} biased={biased}", ours, by_torch, exact, floor=4e-6)


@each_kernels
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(kernels):
    z = torch.tensor([[0.0, -INF, -200.0, 0.0]], dtype=torch.bfloat16)  # exp(z) is exactly 1 and 0
    scored, nowhere = Scored(*torch.zeros(3, 1)), torch.tensor([-1])
    for g in (1.001953125, 1.005859375, 1.0 + 2.0**-9, 3.0 * 2.0**-120, NAN):
        ours = kernels.gradient(Tile(z, nowhere, Transform()), scored, torch.tensor([g]))
        expected = (-z.float().exp() * g).bfloat16()
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())
    payload = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # all bits set
    for columns in (5, 200):
        tile = Tile(torch.ones(1, columns, dtype=torch.bfloat16), nowhere, Transform())
        assert kernels.gradient(tile, scored, payload).isnan().all()


@each_kernels
@each_dtype
def test_gradient_edge_rows(kernels, dtype):
    columns = 300
    for transform, with_entropy in itertools.product((Transform(), Transform(softcap=5.0)), (False, True)):
        tile = Tile(make_tile(5, columns, dtype), torch.tensor([3, 4, 299, -1, columns]), transform)
        scored = exactly_scored(replace(tile, target=tile.target.clamp(0, columns - 1)))
        tile.values[0] = NAN
        g = torch.tensor([0.0, NAN, 1.0, 1.0, 1.0], dtype=acc(dtype))
        ours = kernels.gradient(tile, scored, g, torch.zeros_like(g) if with_entropy else None)
        assert (ours[0] == 0).all() and ours[1].isnan().all()
        assert torch.isfinite(ours[2:]).all()
        assert ours[2, 299] > 0 and (ours[3:] <= 0).all()  # no target in this tile: nothing but -g p


@each_kernels
@each_dtype
def test_a_gradient_of_the_entropy_alone(kernels, dtype):
    """A row whose log-prob trains nothing is not idle while its entropy does."""
    tile = Tile(make_tile(2, 211, dtype), torch.tensor([3, 4]), Transform(1.3, 5.0, 0.7))
    zero, g_entropy = torch.zeros(2, dtype=acc(dtype)), torch.tensor([1.0, 0.0], dtype=acc(dtype))

    def loss(raw):
        return log_probs(transformed(raw, tile), tile.target)[1][0]

    exact, by_torch = gradient_of(tile.values, torch.float64, loss), gradient_of(tile.values, dtype, loss)
    found = {"gradient": kernels.gradient(tile, exactly_scored(tile), zero, g_entropy)}
    if hasattr(kernels.module, "policy"):
        found["policy"], _ = kernels.policy(tile, PolicyRows(zero, zero, w_entropy=g_entropy), Terms())
    for name, ours in found.items():
        assert_good(name, ours, by_torch, exact, floor=4e-6)
        assert (ours[1] == 0).all() and (ours[0] != 0).any()


@pytest.mark.cover("kernels", "dtype")
@each_kernels
@each_dtype
def test_a_gradient_of_the_entropy_at_a_confident_token(kernels, dtype):
    """log p is -2e-6, which z - lse loses: in float32 64 - lse is 0. The token's gradient, p (log p + entropy), is then off by 7%."""
    values = make_tile(2, 211, dtype, spread=1.0)
    values[0, 7] = values[1, 200] = 64.0
    values[:, 50:53] = 50.0
    tile = Tile(values, torch.tensor([7, 200]), Transform())
    zero, g_entropy = torch.zeros(2, dtype=acc(dtype)), torch.tensor([1.0, -0.5], dtype=acc(dtype))
    exact = gradient_of(values, torch.float64, lambda raw: (g_entropy.double() * log_probs(raw, tile.target)[1]).sum())
    found = {"gradient": kernels.gradient(tile, exactly_scored(tile), zero, g_entropy)}
    if hasattr(kernels.module, "policy"):
        found["policy"], _ = kernels.policy(tile, PolicyRows(zero, zero, w_entropy=g_entropy), Terms())
    for name, ours in found.items():
        at_token = (x.gather(1, tile.target.unsqueeze(1)) for x in (ours.double(), exact))
        torch.testing.assert_close(*at_token, rtol=0.015, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---- policy


def objective_of_rows(logps, entropy, rows, terms):
    """Sum over rows of w_policy s + w_kl k3 + w_entropy entropy, transcribed from the formulas of the specification."""

    def exp(x):
        return torch.exp(x + (x.clamp(-80, 80) - x).detach())

    w = exp(logps - (logps.detach() if rows.old is None else rows.old))
    A = rows.advantages
    if terms.kind == "clipped":
        free = w.clamp(max=terms.delta)
        s = -torch.min(free * A, w.clamp(1 - terms.epsilon_low, 1 + terms.epsilon_high) * A)
    elif terms.kind == "cispo":
        s = -w.clamp(max=terms.epsilon_high).detach() * A * logps
    elif terms.kind == "sapo":
        tau = torch.where(A > 0, terms.sapo_temperature_pos, terms.sapo_temperature_neg * torch.ones_like(A))
        s = -4 / tau * torch.sigmoid(tau * (w - 1)) * A
    else:
        s = logps
    total = (rows.w_policy * s).sum()
    if rows.ref is not None:
        k3 = exp(rows.ref - logps) - (rows.ref - logps) - 1
        total = total + (rows.w_kl * k3 * (w if terms.use_bias_correction_kl else 1)).sum()
    return total if rows.w_entropy is None else total + (rows.w_entropy * entropy).sum()


RATIOS = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.1, 1.27, 1.29, 1.6, 2.5, 9.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64)


def make_rows(logps, dtype, on_policy=False, kl=True, entropy=True):
    """Every pair of ratio and sign of the advantage; weights of both signs."""
    n = RATIOS.numel() * ADVANTAGES.numel()
    ratio, advantages = RATIOS.repeat(ADVANTAGES.numel()), ADVANTAGES.repeat_interleave(RATIOS.numel())
    rows = PolicyRows(
        old=None if on_policy else logps - ratio.log(),
        ref=logps + 0.5 * torch.randn(n, dtype=torch.float64) if kl else None,
        advantages=advantages,
        w_policy=torch.rand(n, dtype=torch.float64) + 0.5,
        w_kl=torch.rand(n, dtype=torch.float64) if kl else None,
        w_entropy=torch.randn(n, dtype=torch.float64) * 0.1 if entropy else None,
    )
    return as_dtype(rows, acc(dtype))


def as_dtype(rows, dtype):
    return PolicyRows(**{k: None if v is None else v.to(dtype) for k, v in vars(rows).items()})


POLICIES = [
    Terms(),
    Terms(delta=1.5),
    Terms(delta=1.2),
    Terms(use_bias_correction_kl=True),
    Terms(kind="cispo", epsilon_high=1.4),
    Terms(kind="sapo", use_bias_correction_kl=True),
    Terms(kind="linear"),
]


def test_ratios_reach_every_branch():
    """Every clipped variant has rows that pass and rows that do not, for both signs of A."""
    for terms in POLICIES[:3]:
        low, high, delta = 1 - terms.epsilon_low, 1 + terms.epsilon_high, terms.delta
        for sign in (1, -1):
            passes = RATIOS.le(min(high, delta)) if sign > 0 else RATIOS.ge(low) & RATIOS.le(max(high, delta))
            assert passes.any() and (not passes.all())
    assert (RATIOS.lt(0.8).sum(), RATIOS.gt(1.28).sum()) == (2, 4)


@pytest.mark.cover("terms", "dtype")
@each_policy
@each_dtype
@pytest.mark.parametrize("terms", POLICIES, ids=str)
def test_policy(kernels, dtype, terms):
    n = RATIOS.numel() * ADVANTAGES.numel()
    cases = itertools.product([(151, 0), (4096 + 77, 3)], TRANSFORMS[:2] + TRANSFORMS[3:], (False, True))
    for (columns, spare), transform, plain in cases:
        if interpreted(kernels) and columns > 4096 and (plain or transform.softcap is None):
            continue
        tile = make_logits(n, columns, dtype, transform, not plain, not plain, spare)
        confident = torch.arange(n)[5::7]  # p of the target is 1 - 3e-4 or nearer
        tile.values[confident] = 0.0
        tile.values[confident, tile.target[confident]] = 16.0
        exact_logps, exact_entropy = scores(tile, torch.float64)
        rows = make_rows(exact_logps, dtype, on_policy=False, kl=not plain or terms.kind == "linear", entropy=not plain)

        def loss(raw, tile=tile, rows=rows):
            logps, entropy = log_probs(transformed(raw, tile), tile.target)
            return objective_of_rows(logps, entropy, as_dtype(rows, raw.dtype), terms)

        exact, by_torch = gradient_of(tile.values, torch.float64, loss), gradient_of(tile.values, dtype, loss)
        torch_logps, torch_entropy = scores(tile, dtype)
        ours, scored = kernels.policy(tile, rows, terms)
        name = f"{columns} {transform} plain={plain}"
        assert_good(f"logps {name}", scored.logps, torch_logps, exact_logps)
        assert_entropy(f"entropy {name}", scored.entropy, torch_entropy, exact_entropy)
        exact_lse, torch_lse = (transformed(tile.values.to(t), tile).logsumexp(1) for t in (torch.float64, dtype))
        assert_good(f"lse {name}", scored.lse, torch_lse, exact_lse)
        # float32 rounds the ratio, and so the coefficient, by as much as the log-prob is large
        assert_good(f"gradient {name}", ours, by_torch, exact, floor=2e-6)


@each_policy
@pytest.mark.parametrize("terms", POLICIES, ids=str)
def test_policy_on_policy_is_exact_in_float64(kernels, terms):
    n, columns = 30, 211
    tile = make_logits(n, columns, torch.float64, Transform())
    rows = make_rows(scores(tile, torch.float64)[0], torch.float64, on_policy=True)

    def loss(raw):
        return objective_of_rows(*log_probs(raw, tile.target), rows, terms)

    exact = gradient_of(tile.values, torch.float64, loss)
    torch.testing.assert_close(kernels.policy(tile, rows, terms)[0], exact, rtol=1e-10, atol=1e-13)


def one_token(kernels, terms, old, advantage, w_policy=1.0, ref=None):
    """The coefficient c of a row of two equal logits, where logps is log(1/2): dz of the target is c / 2."""
    number = lambda x: None if x is None else torch.tensor([x], dtype=torch.float64)  # noqa: E731
    rows = PolicyRows(number(w_policy), number(advantage), number(old), number(ref), None if ref is None else number(1.0))
    out, _ = kernels.policy(Tile(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), Transform()), rows, terms)
    return out[0, 0].item() * 2


@each_policy
def test_coefficient_at_its_edges(kernels):
    half = torch.tensor(0.5, dtype=torch.float64).log().item()
    on_bound = Terms(epsilon_low=0.0, epsilon_high=0.0)
    for advantage in (2.0, -2.0):  # a ratio of exactly 1 on both bounds: clamp passes the gradient at its bounds
        assert one_token(kernels, on_bound, half, advantage) == pytest.approx(-advantage)
        assert one_token(kernels, replace(on_bound, delta=1.0), half, advantage) == pytest.approx(-advantage)
    for kind in ("clipped", "cispo", "sapo"):
        assert one_token(kernels, Terms(kind=kind), -200.0, 0.0) == 0  # A = 0 where the ratio is e^80
        assert one_token(kernels, Terms(kind=kind), float("nan"), 0.0) != one_token(kernels, Terms(kind=kind), float("nan"), 0.0)
    assert one_token(kernels, Terms(), -200.0, 1.0) == 0  # clipped away
    huge = one_token(kernels, Terms(), -200.0, -1.0)
    assert huge == pytest.approx(torch.tensor(80.0, dtype=torch.float64).exp().item())
    assert one_token(kernels, Terms(kind="linear"), 0.0, 0.0, w_policy=3.0) == pytest.approx(3.0)
    kl = one_token(kernels, Terms(), half, 0.0, ref=300.0)
    assert kl == pytest.approx(-torch.tensor(80.0, dtype=torch.float64).exp().item())


@each_policy
@each_dtype
def test_confident_rows_keep_their_digits(kernels, dtype):
    """log p and 1 - p of a target whose p is within 1e-9 of 1, where both cancel to nothing if computed from p."""
    columns, target, one = 5001, torch.tensor([7, 5000]), torch.ones(2, dtype=acc(dtype))
    values = torch.zeros(2, columns, dtype=dtype)
    values[[0, 1], target] = torch.tensor([30.0, 20.0], dtype=dtype)
    others = (columns - 1) * torch.tensor([-30.0, -20.0], dtype=torch.float64).exp()
    tile = Tile(values, target, Transform())
    out, scored = kernels.policy(tile, PolicyRows(one, one), Terms(kind="linear"))
    torch.testing.assert_close(scored.logps.double(), -others.log1p(), rtol=1e-4, atol=0)
    for ours in (out, kernels.gradient(tile, scored, one)):
        torch.testing.assert_close(ours[[0, 1], target].double(), others / (1 + others), rtol=5e-3, atol=0)


@each_policy
@each_dtype
def test_policy_rows_without_gradient_become_zero(kernels, dtype):
    values = make_tile(4, 4097, dtype)
    values[3, 4000] = NAN
    one = torch.ones(4, dtype=acc(dtype))
    w = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=acc(dtype))
    out, scored = kernels.policy(Tile(values, torch.arange(4), Transform()), PolicyRows(w, one, w_entropy=0 * one), Terms())
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any() and out[3].isnan().all()
    assert all(x.isnan().tolist() == [False, False, False, True] for x in scored)
