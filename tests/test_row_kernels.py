"""The row kernels of every backend, against float64 autograd of the formulas.

A backend that takes float32 logits of 16-bit inputs is tested a second time so ("over"): the logits in float32, the result in
the 16-bit dtype over their memory.
"""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from row_kernels import INF, acc, copy_of, each_dtype, each_kernels, make_tile, new_stats
from tolerance import assert_no_worse_than_torch

from grpo_kernels.backends import triton
from grpo_kernels.backends.statistics import finalize
from grpo_kernels.losses.coefficients import PolicyTerms
from grpo_kernels.losses.config import LogitTransform as Transform

# Rows and columns: one of each, ragged ends, exactly one block of 4096, several blocks and a rest.
SHAPES = [(1, 1), (1, 37), (3, 151), (2, 4096), (3, 8192 + 4096 + 77), (40, 65)]


Terms = functools.partial(PolicyTerms, kind="clipped", epsilon_high=0.28, use_bias_correction_kl=False)


TRANSFORMS = [
    Transform(),
    Transform(1.3, None, 0.7),
    Transform(-0.5, None, 1.0),
    Transform(1.3, 5.0, 0.7),
]


def interpreted(kernels):
    """Tens of milliseconds for a block."""
    return kernels.module is triton and triton.INTERPRETED


def make_options(rows, columns, dtype, biased, per_row, masked=True):
    bias = temperature = None
    if biased:
        bias = torch.randn(columns, dtype=acc(dtype))
        if masked:
            bias[torch.rand(columns) < 0.1] = -INF
        bias[0] = 0.5
    if per_row:
        temperature = torch.rand(rows, dtype=acc(dtype)) + 0.5
    return dict(bias=bias, temperature=temperature)


def make_target(rows, columns, options):
    target = torch.randint(0, columns, (rows,))
    if options["bias"] is not None:
        target[options["bias"][target] == -INF] = 0
    return target


def transformed(raw, transform, bias=None, temperature=None):
    y = raw if bias is None else raw + bias.to(raw.dtype)
    y = y * transform.logit_scale
    if transform.softcap is not None:
        y = transform.softcap * torch.tanh(y / transform.softcap)
    return y / (transform.temperature if temperature is None else temperature.to(raw.dtype).unsqueeze(1))


def assert_good(name, ours, by_torch, exact, floor=1e-6, slack=2.0):
    """At most twice the error of torch in `by_torch`'s dtype; the floor is for float32 sums, float64 has 1e-13."""
    floor = 1e-13 if by_torch.dtype == torch.float64 else floor
    assert_no_worse_than_torch(name, ours, by_torch, exact, slack, floor)


def assert_entropy(name, ours, by_torch, exact):
    """As above, but the entropy of a confident row is a difference of numbers near 1: one is added to all."""
    assert_good(name, ours.double() + 1, (by_torch.double() + 1).to(by_torch.dtype), exact + 1)


def log_probs(z, target):
    """(logps, entropy) by the plain expressions."""
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p.clamp(min=torch.finfo(z.dtype).min)).sum(1)
    return log_p.gather(1, target.unsqueeze(1)).squeeze(1), entropy


def gradient_of(raw, dtype, loss):
    """d loss(raw) / d raw by autograd in this dtype."""
    raw = raw.detach().to(dtype, copy=True).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(raw), raw)
    return gradient


# ---- statistics


@each_kernels
@each_dtype
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_statistics(kernels, dtype, transform):
    for (rows, columns), (biased, per_row) in itertools.product(SHAPES, [(False, False), (True, False), (False, True)]):
        tile = make_tile(rows, columns, dtype, spare=columns % 3)
        options = make_options(rows, columns, dtype, biased, per_row, transform.logit_scale > 0)
        target = make_target(rows, columns, options)
        stats = new_stats(rows, dtype)
        before = tile.clone()
        kernels.statistics(tile, stats, target, transform, **options)
        assert torch.equal(tile, before)
        logps, lse, entropy = finalize(stats.double())

        z = transformed(tile.double(), transform, **options)
        exact_logps, exact_entropy = log_probs(z, target)
        torch_logps, torch_entropy = log_probs(transformed(tile, transform, **options), target)
        name = f"{rows}x{columns} biased={biased} per_row={per_row}"
        assert_good(f"logps {name}", logps, torch_logps, exact_logps)
        assert_entropy(f"entropy {name}", entropy, torch_entropy, exact_entropy)
        torch.testing.assert_close(stats[:, 0].double(), z.amax(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse, z.logsumexp(1), rtol=1e-6, atol=4e-6)


@each_kernels
@each_dtype
def test_statistics_fold_column_blocks(kernels, dtype):
    transform, rows, columns = Transform(1.3, None, 0.7), 9, 3 * 4096 + 501
    tile = make_tile(rows, columns, dtype)
    tile[1] += torch.linspace(-40, 40, columns).to(dtype)  # every block raises the maximum
    tile[2] -= torch.linspace(-40, 40, columns).to(dtype)
    tile[3] = -INF
    tile[3, 9000] = 1.0
    options = make_options(rows, columns, dtype, True, True)
    options["bias"][9000] = 0.0
    target = torch.tensor([0, 1, columns - 1, 9000, 4095, 4096, 700, 701, 8000])
    target[options["bias"][target] == -INF] = 0
    bounds = [0, 1, 700, 701, 5000, 9100, columns]
    stats = new_stats(rows, dtype)
    for start, end in itertools.pairwise(bounds):
        block = options | {"bias": options["bias"][start:end].contiguous()}
        kernels.statistics(tile[:, start:end], stats, target - start, transform, **block)
    z = transformed(tile.double(), transform, **options)
    exact_logps, exact_entropy = log_probs(z, target)
    logps, _, entropy = finalize(stats.double())
    torch.testing.assert_close(logps, exact_logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy, exact_entropy, rtol=2e-6, atol=1e-5)


@each_kernels
@each_dtype
def test_statistics_of_masked_vocabulary(kernels, dtype):
    columns = 3 * 4096
    tile = make_tile(4, columns, dtype)
    tile[0, :4096] = -INF
    tile[1, 4096:8192] = -INF
    tile[2] = -INF
    tile[3, 4096:] = -INF
    target = torch.tensor([5000, 3, 7, 5])
    stats = new_stats(4, dtype)
    kernels.statistics(tile, stats, target, Transform())
    assert stats[2].tolist() == [-INF, 0.0, 0.0, -INF]
    exact_logps, exact_entropy = log_probs(tile.double(), target)
    kept = [0, 1, 3]
    logps, _, entropy = finalize(stats.double())
    torch.testing.assert_close(logps[kept], exact_logps[kept], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy[kept], exact_entropy[kept], rtol=2e-6, atol=1e-5)
    stats = new_stats(4, dtype)
    kernels.statistics(tile, stats, torch.full((4,), 0), Transform())
    assert finalize(stats)[0][0] == -INF


@each_kernels
@each_dtype
def test_statistics_far_from_zero_and_confident(kernels, dtype):
    """A shared offset costs no digits, and a log-prob near 0 keeps three."""
    tile = make_tile(3, 5001, dtype, spread=2.0)
    tile[0] = (tile[0] * 8).round() / 8 + 512
    tile[1, 4321] = 32.0
    tile[2, 0] = 40.0
    target = torch.tensor([17, 4321, 0])
    stats = new_stats(3, dtype)
    kernels.statistics(tile, stats, target, Transform())
    logps, _, entropy = finalize(stats)
    exact_logps, exact_entropy = log_probs(tile.double(), target)
    torch.testing.assert_close(logps[:1].double(), exact_logps[:1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-7)
    others = torch.logsumexp(tile.double().scatter(1, target.unsqueeze(1), -INF), 1) - tile.double().gather(
        1, target.unsqueeze(1)
    ).squeeze(1)
    confident = -torch.nn.functional.softplus(others)[1:]
    assert (confident.abs() < 1e-6).all() and (confident < 0).all()
    torch.testing.assert_close(logps[1:].double(), confident, rtol=1e-4, atol=0)


@each_kernels
@each_dtype
def test_nan_stays_in_its_row(kernels, dtype):
    for where, value in itertools.product((0, 100, 4096 + 5, 8200), (float("nan"), INF)):
        tile = make_tile(3, 8201, dtype)
        tile[1, where] = value
        stats = new_stats(3, dtype)
        kernels.statistics(tile, stats, torch.tensor([1, 2, 3]), Transform())
        logps, _, entropy = finalize(stats)
        assert logps.isnan().tolist() == [False, True, False]
        assert entropy.isnan().tolist() == [False, True, False]


@each_kernels
@each_dtype
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_probs(kernels, dtype, transform):
    for (rows, columns), biased in itertools.product(SHAPES, (False, True)):
        tile = make_tile(rows, columns, dtype, spare=columns % 2)
        options = make_options(rows, columns, dtype, biased, biased, transform.logit_scale > 0)
        target = make_target(rows, columns, options)
        expected = torch.softmax(transformed(tile.double(), transform, **options), 1)
        by_torch = torch.softmax(transformed(tile, transform, **options), 1)
        kernels.statistics(tile, new_stats(rows, dtype), target, transform, **options, probs=True)
        assert_good(f"{rows}x{columns}", tile, by_torch, expected, slack=1.2)
        if biased and transform.softcap is None and transform.logit_scale > 0:
            assert (tile[:, options["bias"] == -INF] == 0).all()


# ---- gradient


def forward(kernels, tile, target, transform, options):
    """What `gradient` is given: lse, logps and entropy of whole rows."""
    stats = new_stats(tile.shape[0], tile.dtype)
    kernels.statistics(tile, stats, target, transform, **options)
    logps, lse, entropy = finalize(stats)
    return lse, logps, entropy


@each_kernels
@each_dtype
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("from_probs", [False, True])
def test_gradient(kernels, dtype, transform, with_entropy, from_probs):
    for (rows, columns), biased in itertools.product(SHAPES, (False, True)):
        if columns == 1 or (interpreted(kernels) and rows * columns > 4096 and not biased):
            continue  # the gradient of one column is zero: nothing to compare
        tile = make_tile(rows, columns, dtype, spare=columns % 2)
        options = make_options(rows, columns, dtype, biased, biased, transform.logit_scale > 0)
        target = make_target(rows, columns, options)
        g = torch.randn(rows, dtype=acc(dtype))
        g_entropy = torch.randn(rows, dtype=acc(dtype)) if with_entropy else None

        def loss(raw, options=options, target=target, g=g, g_entropy=g_entropy):
            logps, entropy = log_probs(transformed(raw, transform, **options), target)
            total = (g.to(raw.dtype) * logps).sum()
            return total if g_entropy is None else total + (g_entropy.to(raw.dtype) * entropy).sum()

        exact, by_torch = gradient_of(tile, torch.float64, loss), gradient_of(tile, dtype, loss)
        lse, logps, entropy = forward(kernels, tile, target, transform, options)
        ours = copy_of(tile)
        if from_probs:
            kernels.statistics(ours, new_stats(rows, dtype), target, transform, **options, probs=True)
        kernels.gradient(ours, target, lse, logps, entropy, g, g_entropy, transform, **options, from_probs=from_probs)
        # lse arrives rounded, so that p is off by lse * 2^-24
        assert_good(f"{rows}x{columns} biased={biased}", ours, by_torch, exact, floor=4e-6)


@each_kernels
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(kernels):
    p = torch.tensor([[1.0, 1.0078125, 3.0, 0.0, 2.0**-120]], dtype=torch.bfloat16)
    for g in (1.001953125, 1.005859375, 1.0 + 2.0**-9, float("nan")):
        zero, scale = torch.zeros(1), torch.tensor([-g])
        ours = p.clone()
        kernels.gradient(ours, torch.tensor([-1]), zero, zero, zero, scale, None, Transform(), from_probs=True)
        expected = (p.float() * g).bfloat16()
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())
    payload = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # all bits set
    for from_probs, columns in itertools.product((False, True), (5, 200)):
        ours = torch.ones(1, columns, dtype=torch.bfloat16)
        kernels.gradient(ours, torch.tensor([-1]), zero, zero, zero, payload, None, Transform(), from_probs=from_probs)
        assert ours.isnan().all()


@each_kernels
@each_dtype
@pytest.mark.parametrize("from_probs", [False, True])
def test_gradient_edge_rows(kernels, dtype, from_probs):
    columns, nan = 300, float("nan")
    for transform, with_entropy in itertools.product((Transform(), Transform(softcap=5.0)), (False, True)):
        z = make_tile(5, columns, dtype)
        target = torch.tensor([3, 4, 299, -1, columns])
        lse, logps, entropy = forward(kernels, z, target.clamp(0, columns - 1), transform, dict(bias=None, temperature=None))
        tile = torch.softmax(transformed(z.double(), transform), 1).to(dtype) if from_probs else z.clone()
        tile[0] = nan
        g = torch.tensor([0.0, nan, 1.0, 1.0, 1.0], dtype=acc(dtype))
        g_entropy = torch.zeros_like(g) if with_entropy else None
        ours = tile.clone()
        kernels.gradient(ours, target, lse, logps, entropy, g, g_entropy, transform, from_probs=from_probs)
        assert (ours[0] == 0).all() and ours[1].isnan().all()
        assert torch.isfinite(ours[2:]).all()
        assert ours[2, 299] > 0 and (ours[3:] <= 0).all()  # no target in this tile: nothing but -g p
    if not from_probs:
        return
    # p that rounded to 0 has gradient 0, whatever log p is
    tile = torch.zeros(1, columns, dtype=dtype)
    tile[0, 7] = 1.0
    one, zero = torch.ones(1, dtype=acc(dtype)), torch.zeros(1, dtype=acc(dtype))
    for softcap in (None, 5.0):
        ours = tile.clone()
        kernels.gradient(ours, torch.tensor([7]), one, zero, zero, one, one, Transform(softcap=softcap), from_probs=True)
        assert (ours == 0).all()


@each_kernels
@each_dtype
def test_a_gradient_of_the_entropy_alone(kernels, dtype):
    """A row whose log-prob trains nothing is not idle while its entropy does."""
    columns, transform = 211, Transform(1.3, 5.0, 0.7)
    z, target = make_tile(2, columns, dtype), torch.tensor([3, 4])
    none = dict(bias=None, temperature=None)
    lse, logps, entropy = forward(kernels, z, target, transform, none)
    zero, g_entropy = torch.zeros(2, dtype=acc(dtype)), torch.tensor([1.0, 0.0], dtype=acc(dtype))

    def loss(raw):
        return log_probs(transformed(raw, transform), target)[1][0]

    exact, by_torch = gradient_of(z, torch.float64, loss), gradient_of(z, dtype, loss)
    ours = z.clone()
    kernels.gradient(ours, target, lse, logps, entropy, zero, g_entropy, transform)
    assert_good("gradient", ours, by_torch, exact, floor=4e-6)
    assert (ours[1] == 0).all() and (ours[0] != 0).any()
    rows = SimpleNamespace(old=None, ref=None, advantages=zero, w_policy=zero, w_kl=None, w_entropy=g_entropy)
    ours = z.clone()
    kernels.policy(ours, target, rows, Terms(), transform, torch.empty_like(zero), torch.empty_like(zero))
    assert_good("policy", ours, by_torch, exact, floor=4e-6)
    assert (ours[1] == 0).all()


# ---- policy


def objective_of_rows(logps, entropy, rows, terms):
    """Sum over rows of w_policy s + w_kl k3 + w_entropy entropy, transcribed from the formulas of the specification."""

    def exp(x):
        return torch.exp(x + (x.clamp(-80, 80) - x).detach())

    w = exp(logps - (logps.detach() if rows.old is None else rows.old))
    A = rows.advantages
    if terms.kind == "clipped":
        free = w if terms.delta is None else w.clamp(max=terms.delta)
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
    rows = SimpleNamespace(
        old=None if on_policy else logps - ratio.log(),
        ref=logps + 0.5 * torch.randn(n, dtype=torch.float64) if kl else None,
        advantages=advantages,
        w_policy=torch.rand(n, dtype=torch.float64) + 0.5,
        w_kl=torch.rand(n, dtype=torch.float64) if kl else None,
        w_entropy=torch.randn(n, dtype=torch.float64) * 0.1 if entropy else None,
    )
    return as_dtype(rows, acc(dtype))


def as_dtype(rows, dtype):
    return SimpleNamespace(**{k: None if v is None else v.to(dtype) for k, v in vars(rows).items()})


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
        low, high, delta = 1 - terms.epsilon_low, 1 + terms.epsilon_high, terms.delta or INF
        for sign in (1, -1):
            passes = RATIOS.le(min(high, delta)) if sign > 0 else RATIOS.ge(low) & RATIOS.le(max(high, delta))
            assert passes.any() and (not passes.all())
    assert (RATIOS.lt(0.8).sum(), RATIOS.gt(1.28).sum()) == (2, 4)


@each_kernels
@each_dtype
@pytest.mark.parametrize("terms", POLICIES, ids=str)
def test_policy(kernels, dtype, terms):
    n = RATIOS.numel() * ADVANTAGES.numel()
    cases = itertools.product([(151, 0), (4096 + 77, 3)], TRANSFORMS[:2] + TRANSFORMS[3:], (False, True))
    for (columns, spare), transform, plain in cases:
        if interpreted(kernels) and columns > 4096 and (plain or transform.softcap is None):
            continue
        tile = make_tile(n, columns, dtype, spare)
        options = make_options(n, columns, dtype, not plain, not plain)
        target = make_target(n, columns, options)
        tile[5::7] = 0.0  # confident rows: p of the target is 1 - 3e-4 or nearer
        tile[torch.arange(n)[5::7], target[5::7]] = 16.0
        exact_logps, exact_entropy = log_probs(transformed(tile.double(), transform, **options), target)
        rows = make_rows(exact_logps, dtype, on_policy=False, kl=not plain or terms.kind == "linear", entropy=not plain)

        def loss(raw, options=options, target=target, rows=rows, transform=transform):
            logps, entropy = log_probs(transformed(raw, transform, **options), target)
            return objective_of_rows(logps, entropy, as_dtype(rows, raw.dtype), terms)

        exact, by_torch = gradient_of(tile, torch.float64, loss), gradient_of(tile, dtype, loss)
        torch_logps, torch_entropy = log_probs(transformed(tile, transform, **options), target)
        logps, entropy = (torch.full((n,), float("nan"), dtype=acc(dtype)) for _ in range(2))
        kernels.policy(tile, target, rows, terms, transform, logps, entropy, **options)
        name = f"{columns} {transform} plain={plain}"
        assert_good(f"logps {name}", logps, torch_logps, exact_logps)
        assert_entropy(f"entropy {name}", entropy, torch_entropy, exact_entropy)
        # float32 rounds the ratio, and so the coefficient, by as much as the log-prob is large
        assert_good(f"gradient {name}", tile, by_torch, exact, floor=2e-6)


@each_kernels
@pytest.mark.parametrize("terms", POLICIES, ids=str)
def test_policy_on_policy_is_exact_in_float64(kernels, terms):
    n, columns = 30, 211
    tile = make_tile(n, columns, torch.float64)
    target = torch.randint(0, columns, (n,))
    exact_logps, _ = log_probs(tile, target)
    rows = make_rows(exact_logps, torch.float64, on_policy=True)

    def loss(raw):
        return objective_of_rows(*log_probs(raw, target), rows, terms)

    exact = gradient_of(tile, torch.float64, loss)
    logps, entropy = torch.empty(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    kernels.policy(tile, target, rows, terms, Transform(), logps, entropy)
    torch.testing.assert_close(tile, exact, rtol=1e-10, atol=1e-13)


def one_token(kernels, terms, old, advantage, w_policy=1.0, ref=None):
    """The coefficient c of a row of two equal logits, where logps is log(1/2): dz of the target is c / 2."""
    rows = SimpleNamespace(
        old=torch.tensor([old], dtype=torch.float64),
        ref=None if ref is None else torch.tensor([ref], dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        w_policy=torch.tensor([w_policy], dtype=torch.float64),
        w_kl=None if ref is None else torch.ones(1, dtype=torch.float64),
        w_entropy=None,
    )
    tile = torch.zeros(1, 2, dtype=torch.float64)
    out = torch.empty(2, 1, dtype=torch.float64)
    kernels.policy(tile, torch.tensor([0]), rows, terms, Transform(), out[0], out[1])
    return tile[0, 0].item() * 2


@each_kernels
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


@each_kernels
@each_dtype
def test_confident_rows_keep_their_digits(kernels, dtype):
    """log p and 1 - p of a target whose p is within 1e-9 of 1, where both cancel to nothing if computed from p."""
    columns, target, one = 5001, torch.tensor([7, 5000]), torch.ones(2, dtype=acc(dtype))
    tile = torch.zeros(2, columns, dtype=dtype)
    tile[[0, 1], target] = torch.tensor([30.0, 20.0], dtype=dtype)
    others = (columns - 1) * torch.tensor([-30.0, -20.0], dtype=torch.float64).exp()
    rows = SimpleNamespace(old=None, ref=None, advantages=one, w_policy=one, w_kl=None, w_entropy=None)
    logps, entropy = torch.empty_like(one), torch.empty_like(one)
    kernels.policy(tile, target, rows, Terms(kind="linear"), Transform(), logps, entropy)
    torch.testing.assert_close(logps.double(), -others.log1p(), rtol=1e-4, atol=0)
    torch.testing.assert_close(tile[[0, 1], target].double(), others / (1 + others), rtol=5e-3, atol=0)


@each_kernels
@each_dtype
def test_policy_rows_without_gradient_become_zero(kernels, dtype):
    tile = make_tile(4, 4097, dtype)
    tile[3, 4000] = float("nan")
    one = torch.ones(4, dtype=acc(dtype))
    w = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=acc(dtype))
    rows = SimpleNamespace(old=None, ref=None, advantages=one, w_policy=w, w_kl=None, w_entropy=0 * one)
    logps, entropy = torch.empty_like(one), torch.empty_like(one)
    kernels.policy(tile, torch.arange(4), rows, Terms(), Transform(), logps, entropy)
    assert (tile[0] == 0).all() and (tile[2] == 0).all() and (tile[1] != 0).any() and tile[3].isnan().all()
    assert logps.isnan().tolist() == entropy.isnan().tolist() == [False, False, False, True]
