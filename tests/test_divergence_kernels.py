"""The row kernels over two tiles of every backend that has them, against float64."""

import math

import pytest
import torch
from support.row_kernels import DEVICE, INF, NAN, acc, all_kernels, each_dtype
from support.tolerance import assert_no_worse_than_torch

from grpo_kernels.backends.comparison import KINDS, Compared, DivergenceKind, bend, compare, merged_comparisons, new_comparison
from grpo_kernels.backends.statistics import Scored, Tile
from grpo_kernels.losses.config import LogitTransform

KERNELS = [k for k in all_kernels() if hasattr(k.module, "divergence_statistics")]
each = pytest.mark.parametrize("kernels", KERNELS, ids=repr)
whole_rows = pytest.mark.parametrize("kernels", [k for k in KERNELS if hasattr(k.module, "divergence")], ids=repr)
each_kind = pytest.mark.parametrize("kind", KINDS)
TRANSFORMS = {
    "plain": (LogitTransform(), LogitTransform(), False, False),
    "all": (LogitTransform(0.7, 5.0, 1.3), LogitTransform(1.2, 8.0, 1.3), True, True),
    "bias": (LogitTransform(-1.0), LogitTransform(), True, False),
}
SHAPES = [(1, "plain"), (7, "all"), (64, "bias"), (333, "plain"), (333, "all"), (9001, "plain")]
each_shape = pytest.mark.parametrize("columns, transform", SHAPES)
BETA = 0.3


class Drawn:
    """Logits of both, their tiles, and the truth in float64."""

    def __init__(self, rows, columns, dtype, transform="plain", apart=1.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        student, teacher, bias, temperature = TRANSFORMS[transform]
        self.dtype, self.transforms = dtype, (student, teacher)
        z = randn(rows, columns) * 3
        self.values = [x.to(dtype) for x in (z, z + apart * randn(rows, columns))]
        self.target = torch.randint(0, columns, (rows,), generator=g)
        self.target[::3] = -1
        self.bias = [(randn(columns)).to(acc(dtype)) if bias else None for _ in range(2)]
        self.temperature = (torch.rand(rows, generator=g) + 0.5).to(acc(dtype)) if temperature else None
        self.g = [randn(rows).to(acc(dtype)) for _ in range(3)]

    def ban(self, of, columns):
        """-inf by the bias."""
        for i in of:
            self.bias[i] = torch.zeros(self.values[i].shape[1], dtype=acc(self.dtype)) if self.bias[i] is None else self.bias[i]
            self.bias[i][columns] = -INF
        return self

    def transformed(self, i, values, dtype=torch.float64):
        t = self.transforms[i]
        y = values.to(dtype)
        y = t.logit_scale * (y if self.bias[i] is None else y + self.bias[i].to(dtype))
        y = y if t.softcap is None else t.softcap * torch.tanh(y / t.softcap)
        return y / (t.temperature if self.temperature is None else self.temperature.to(dtype).unsqueeze(1))

    def plain(self, divergence, dtype=torch.float64, g=None, g_entropy=None):
        """(value, gap, own, logps, lse, entropy, gradient of the student's raw logits with g_divergence) in plain PyTorch."""
        raw = self.values[0].to(dtype, copy=True).requires_grad_()
        z, y = self.transformed(0, raw, dtype), self.transformed(1, self.values[1], dtype)
        both = (z == -INF) & (y == -INF)  # of whose gradient autograd makes nan
        lp, lq = (x.masked_fill(both, -1e5).log_softmax(1) for x in (z, y))

        def kl(a, b):
            return torch.where(a > -INF, a.exp() * (a - b).where(a > -INF, 0.0), 0.0).sum(1)

        own = kl(lp, lq)
        if divergence.kind == "jsd":
            b = torch.tensor(divergence.beta, dtype=dtype)
            lm = torch.logsumexp(torch.stack([lp + torch.log1p(-b), lq + b.log()]), 0)
            own = kl(lp, lm)
            value = b * kl(lq, lm) + (1 - b) * own
        else:
            value = kl(lq, lp) if divergence.kind == "forward_kl" else own
        entropy = -(lp.exp() * lp.where(lp > -INF, 0.0)).sum(1)
        has = self.target >= 0
        logps = lp.gather(1, self.target.clamp(min=0).unsqueeze(1)).squeeze(1)
        loss = (self.g[0].to(dtype) * value).sum()
        loss = loss if g is None else loss + (g.to(dtype) * logps)[has].sum()
        loss = loss if g_entropy is None else loss + (g_entropy.to(dtype) * entropy).sum()
        loss.backward()
        lse = z.logsumexp(1)
        return [x.detach() for x in (value, lse - y.logsumexp(1), own, logps, lse, entropy)] + [raw.grad]

    def tiles(self, kernels, columns=slice(None), ranges=None, values=None):
        wide = kernels.wide and self.dtype == torch.bfloat16
        move = lambda x: None if x is None else x.to(DEVICE, copy=True)  # noqa: E731
        first = columns.start or 0
        found = []
        for i in range(2):
            x = self.values[i][:, columns] if values is None else values[i]
            x = x.float() if wide else x
            if ranges is None:
                frame = torch.full((x.shape[0] + 2, x.shape[1] + 5), NAN, dtype=x.dtype, device=DEVICE)
                frame[1:-1, : x.shape[1]] = x.to(DEVICE)
                x = frame[1:-1, : x.shape[1]]
            else:
                x = move(x)
            bias = None if self.bias[i] is None or ranges is not None else move(self.bias[i][columns].contiguous())
            target = move(self.target - first if ranges is None else self.target)
            found.append(Tile(x, target, self.transforms[i], bias, move(self.temperature), ranges))
        return found

    def out(self, kernels, student):
        if not kernels.apart:
            return student.values
        return torch.full((student.values.shape[0], student.values.shape[1] + 3), NAN, dtype=self.dtype, device=DEVICE)[
            :, : student.values.shape[1]
        ]


def compared(kernels, drawn, divergence, blocks=1):
    """(Scored, Compared) by the statistics kernels over blocks of columns."""
    rows, columns = drawn.values[0].shape
    dtype = acc(torch.float32 if kernels.wide and drawn.dtype == torch.bfloat16 else drawn.dtype)
    stats = new_comparison(rows, dtype, DEVICE)
    step = -(-columns // blocks)
    cuts = [slice(a, min(a + step, columns)) for a in range(0, columns, step)]
    for cut in cuts:
        kernels.module.divergence_statistics(*drawn.tiles(kernels, cut), stats, divergence.kind, **kernels.options)
    scored, found = compare(stats, divergence.kind)
    if divergence.kind == "jsd":
        sums = torch.zeros(rows, 2, dtype=dtype, device=DEVICE)
        for cut in cuts:
            kernels.module.jensen_shannon(*drawn.tiles(kernels, cut), scored, found.gap, sums, divergence.beta, **kernels.options)
        found = Compared(found.gap, *(x.contiguous() for x in sums.unbind(1)))
    return scored, found


def close(name, found, exact, eps, size=1.0):
    found, exact = found.detach().cpu().double(), exact.double()
    assert torch.equal(found.isfinite(), exact.isfinite()), name
    keep = exact.isfinite()
    error = (found - exact)[keep].abs() / (exact[keep].abs() + size)
    assert not len(error) or error.max() <= eps, f"{name}: {error.max():.2e}"


@pytest.mark.cover("kernels", "dtype", "kind")
@each
@each_dtype
@each_kind
@each_shape
@pytest.mark.parametrize("blocks", [1, 3])
def test_statistics(kernels, dtype, kind, columns, transform, blocks):
    drawn, divergence = Drawn(5, columns, dtype, transform), DivergenceKind(kind, BETA)
    scored, found = compared(kernels, drawn, divergence, blocks)
    value, gap, own, logps, lse, entropy, _ = drawn.plain(divergence)
    eps = 1e-11 if dtype == torch.float64 else 4e-6
    close("value", found.value, value, eps)
    close("gap", found.gap, gap, eps)
    close("lse", scored.lse, lse, eps)
    close("entropy", scored.entropy, entropy, eps)
    has = drawn.target >= 0
    close("logps", scored.logps[has.to(DEVICE)], logps[has], eps)
    if kind != "forward_kl":
        close("own", found.own, own, eps)


@pytest.mark.cover("kernels", "kind")
@each
@each_kind
@pytest.mark.parametrize("apart, spread", [(1e-2, 3.0), (1.4e-3, 3.0), (1.4e-3, 0.1), (3e-4, 0.1)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_near_agreement_nothing_cancels(kernels, kind, apart, spread, blocks):
    """The divergence is a sum of terms of both signs: at 1e-6 and less it keeps four digits in float32."""
    drawn, divergence = Drawn(4, 9001, torch.float32), DivergenceKind(kind, BETA)
    drawn.values[0] = drawn.values[0] * (spread / 3)
    drawn.values[1] = drawn.values[0] + apart * torch.randn(4, 9001, generator=torch.Generator().manual_seed(3))
    scored, found = compared(kernels, drawn, divergence, blocks)
    value, *_, gradient = drawn.plain(divergence)
    assert 0 < value.max() < 1e-4
    assert ((found.value.cpu() - value).abs() <= 1e-4 * value).all()
    student, teacher = drawn.tiles(kernels)
    out = drawn.out(kernels, student)
    kernels.module.divergence_gradient(student, teacher, out, scored, found, drawn.g[0].to(DEVICE), divergence, **kernels.options)
    same = drawn.plain(divergence, torch.float32)[-1]
    assert_no_worse_than_torch(kind, out, same, gradient)


@pytest.mark.cover("kernels", "dtype")
@each
@each_dtype
@each_kind
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equal_rows_have_no_divergence_and_no_gradient(kernels, dtype, kind, transform):
    drawn, divergence = Drawn(5, 333, dtype, transform), DivergenceKind(kind, BETA)
    drawn.values[1], drawn.bias[1] = drawn.values[0].clone(), drawn.bias[0]
    drawn.transforms = (drawn.transforms[0],) * 2
    scored, found = compared(kernels, drawn, divergence, 3)
    assert (found.value == 0).all() and (found.gap == 0).all()
    student, teacher = drawn.tiles(kernels)
    out = drawn.out(kernels, student)
    kernels.module.divergence_gradient(student, teacher, out, scored, found, drawn.g[0].to(DEVICE), divergence, **kernels.options)
    assert (out == 0).all()


@pytest.mark.cover("kernels", "dtype", "kind")
@each
@each_dtype
@each_kind
@each_shape
@pytest.mark.parametrize("beside", ["alone", "g and g_entropy"])
def test_gradient(kernels, dtype, kind, transform, columns, beside):
    drawn, divergence = Drawn(6, columns, dtype, transform), DivergenceKind(kind, BETA)
    drawn.target = drawn.target.clamp(min=0)
    g, g_entropy = drawn.g[1] if beside != "alone" else None, drawn.g[2] if "entropy" in beside else None
    *_, exact = drawn.plain(divergence, g=g, g_entropy=g_entropy)
    *_, same = drawn.plain(divergence, acc(dtype), g, g_entropy)
    scored, found = compared(kernels, drawn, divergence)
    student, teacher = drawn.tiles(kernels)
    out, before = drawn.out(kernels, student), teacher.values.clone()
    move = lambda x: None if x is None else x.to(DEVICE)  # noqa: E731
    kernels.module.divergence_gradient(
        student, teacher, out, scored, found, move(drawn.g[0]), divergence, move(g), move(g_entropy), **kernels.options
    )
    assert torch.equal(teacher.values, before)
    # of distributions far apart, log p - log m and its mean under p are both - log(1 - beta), and what is left is their rounding
    slack = 4 if kind == "jsd" else 2
    assert_no_worse_than_torch("dz", out, same.to(out.dtype), exact, slack, floor=1e-5)


@each
@each_kind
def test_rows_of_no_gradient_become_zeros(kernels, kind):
    drawn, divergence = Drawn(4, 333, torch.float32), DivergenceKind(kind, BETA)
    scored, found = compared(kernels, drawn, divergence)
    student, teacher = drawn.tiles(kernels)
    out, g = drawn.out(kernels, student), drawn.g[0].to(DEVICE)
    g[1] = 0
    found = Compared(*(x.clone() for x in found))
    found.own[1] = NAN
    found.gap[1] = NAN
    kernels.module.divergence_gradient(student, teacher, out, scored, found, g, divergence, **kernels.options)
    assert (out[1] == 0).all() and (out[0] != 0).any() and out.isfinite().all()


@pytest.mark.cover("kernels", "banned")
@each
@each_dtype
@each_kind
@pytest.mark.parametrize("banned", ["both", "student", "teacher", "first block of both", "first block of the student"])
def test_banned_columns(kernels, dtype, kind, banned):
    """-inf in both: as if the column were not there. In one: what plain PyTorch says."""
    columns = slice(0, 112) if "block" in banned else slice(5, 333, 7)
    of = [i for i, name in enumerate(("student", "teacher")) if name in banned or "both" in banned]
    drawn, divergence = Drawn(5, 333, dtype).ban(of, columns), DivergenceKind(kind, BETA)
    drawn.target[:] = -1
    scored, found = compared(kernels, drawn, divergence, 3)
    value, *_, gradient = drawn.plain(divergence)
    infinite = kind == ("forward_kl" if 0 in of else "reverse_kl") and len(of) == 1
    if infinite:
        assert (found.value.cpu() == INF).all()
        return
    close("value", found.value, value, 1e-11 if dtype == torch.float64 else 4e-6)
    student, teacher = drawn.tiles(kernels)
    out = drawn.out(kernels, student)
    kernels.module.divergence_gradient(student, teacher, out, scored, found, drawn.g[0].to(DEVICE), divergence, **kernels.options)
    kept = drawn.bias[of[0]] != -INF
    assert out[:, ~kept.to(DEVICE)].abs().max() <= (0 if 0 in of else INF)
    eps = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 4e-3}[dtype]
    exact = gradient.nan_to_num(nan=0.0)
    assert (out.cpu().double() - exact).norm() <= eps * exact.norm()


@each
@each_kind
@pytest.mark.parametrize("banned", [0, 1])
def test_a_column_banned_in_one_may_be_the_target(kernels, kind, banned):
    drawn = Drawn(5, 333, torch.float64, apart=1e-2).ban([banned], slice(0, 112))
    drawn.target[:] = 6
    value, gap, *_ = drawn.plain(DivergenceKind(kind, BETA))
    found = compared(kernels, drawn, DivergenceKind(kind, BETA), 3)[1]
    close("value", found.value, value, 1e-11)
    close("gap", found.gap, gap, 1e-11)


@each
@each_kind
def test_large_logits(kernels, kind):
    drawn, divergence = Drawn(5, 333, torch.float32), DivergenceKind(kind, BETA)
    drawn.values = [x * 3000 for x in drawn.values]
    scored, found = compared(kernels, drawn, divergence, 3)
    value, *_ = drawn.plain(divergence)
    close("value", found.value, value, 4e-6)
    student, teacher = drawn.tiles(kernels)
    out = drawn.out(kernels, student)
    kernels.module.divergence_gradient(student, teacher, out, scored, found, drawn.g[0].to(DEVICE), divergence, **kernels.options)
    assert out.isfinite().all()


@pytest.mark.cover("kernels", "kind")
@each
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_ranges(kernels, kind, dtype):
    lengths = [3, 1, 40, 2, 300, 7]
    divergence, drawn = DivergenceKind(kind, BETA), Drawn(6, 1, dtype)
    g = torch.Generator().manual_seed(5)
    flat = [torch.randn(sum(lengths), generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]
    ends = torch.tensor(lengths).cumsum(0)
    ranges = torch.stack([ends - torch.tensor(lengths), ends], 1).contiguous().to(DEVICE)
    drawn.target = torch.tensor([1, 0, -1, 1, 17, 6])
    if kernels.wide or kernels.apart:
        pytest.skip("ranges are float32 or float64, in place")
    student, teacher = drawn.tiles(kernels, ranges=ranges, values=flat)
    stats = new_comparison(6, acc(dtype), DEVICE)
    kernels.module.divergence_statistics(student, teacher, stats, kind, **kernels.options)
    scored, found = compare(stats, kind)
    if kind == "jsd":
        sums = torch.zeros(6, 2, dtype=acc(dtype), device=DEVICE)
        kernels.module.jensen_shannon(student, teacher, scored, found.gap, sums, BETA, **kernels.options)
        found = Compared(found.gap, *(x.contiguous() for x in sums.unbind(1)))
    kernels.module.divergence_gradient(
        student, teacher, student.values, scored, found, drawn.g[0].to(DEVICE), divergence, **kernels.options
    )
    eps = 1e-10 if dtype == torch.float64 else 1e-5
    for r, (first, last) in enumerate(ranges.tolist()):
        one = Drawn(1, last - first, dtype)
        one.values, one.target, one.g[0] = [x[first:last].unsqueeze(0) for x in flat], torch.tensor([-1]), drawn.g[0][r : r + 1]
        value, *_, gradient = one.plain(divergence)
        close("value", found.value[r : r + 1], value, eps)
        close("dz", student.values[first:last], gradient[0], eps)


@pytest.mark.cover("kernels", "dtype")
@whole_rows
@each_dtype
@each_kind
@pytest.mark.parametrize("columns", [64, 9001])
def test_equal_whole_rows_have_no_gradient(kernels, dtype, kind, columns):
    drawn = Drawn(5, columns, dtype)
    drawn.values[1], drawn.target[:] = drawn.values[0].clone(), -1
    student, teacher = drawn.tiles(kernels)
    out, vectors = drawn.out(kernels, student), torch.full((6, 5), NAN, dtype=acc(student.values.dtype), device=DEVICE)
    vectors = Scored(*vectors[:3]), Compared(*vectors[3:])
    kernels.module.divergence(student, teacher, out, drawn.g[0].to(DEVICE), DivergenceKind(kind, BETA), *vectors, **kernels.options)
    assert (out == 0).all() and (vectors[1].value == 0).all()


@pytest.mark.cover("kernels", "dtype", "kind")
@whole_rows
@each_dtype
@each_kind
@each_shape
def test_whole_rows_at_once(kernels, dtype, kind, transform, columns):
    drawn, divergence = Drawn(9, columns, dtype, transform), DivergenceKind(kind, BETA)
    drawn.target[:] = -1
    value, gap, own, _, lse, entropy, exact = drawn.plain(divergence)
    *_, same = drawn.plain(divergence, acc(dtype))
    student, teacher = drawn.tiles(kernels)
    out = drawn.out(kernels, student)
    vectors = torch.full((6, 9), NAN, dtype=acc(student.values.dtype), device=DEVICE)
    scored, found = Scored(*vectors[:3]), Compared(*vectors[3:])
    kernels.module.divergence(student, teacher, out, drawn.g[0].to(DEVICE), divergence, scored, found, **kernels.options)
    eps = 1e-11 if dtype == torch.float64 else 4e-6
    close("value", found.value, value, eps)
    close("gap", found.gap, gap, eps)
    close("lse", scored.lse, lse, eps)
    close("entropy", scored.entropy, entropy, eps)
    if kind != "forward_kl":
        close("own", found.own, own, eps)
    # of distributions far apart, log p - log m and its mean under p are both - log(1 - beta), and what is left is their rounding
    slack = 4 if kind == "jsd" else 2
    assert_no_worse_than_torch("dz", out, same.to(out.dtype), exact, slack, floor=1e-5)
    again = drawn.out(kernels, student) if kernels.apart else None
    if again is not None:
        kernels.module.divergence(student, teacher, again, drawn.g[0].to(DEVICE), divergence, scored, found, **kernels.options)
        assert torch.equal(out, again)


@pytest.mark.cover("kernels", "kind")
@each
@each_kind
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_parts_merge_in_any_order(kernels, kind, order):
    """Of ranks: one of them has only banned columns."""
    drawn = Drawn(5, 300, torch.float64).ban([0, 1], slice(0, 100))
    drawn.values[1][:, 150] += 50  # the teacher's maximum is far from the student's
    parts = []
    for cut in (slice(0, 100), slice(100, 200), slice(200, 300)):
        stats = new_comparison(5, torch.float64, DEVICE)
        kernels.module.divergence_statistics(*drawn.tiles(kernels, cut), stats, kind, **kernels.options)
        parts.append(stats)
    whole = parts[order[0]]
    for i in order[1:]:
        whole = merged_comparisons(whole, parts[i], kind)
    value, gap, *_ = drawn.plain(DivergenceKind("reverse_kl" if kind == "jsd" else kind))
    found = compare(whole, kind)[1]
    close("gap", found.gap, gap, 1e-10)
    if kind != "jsd":
        close("value", found.value, value, 1e-10)


def test_bend_near_0():
    for dtype, eps in ((torch.float32, 3e-7), (torch.float64, 1e-13)):
        x = torch.cat([torch.linspace(-0.3, 0.3, 4001, dtype=torch.float64), torch.tensor([1e-15, -3.0, 3.0], dtype=torch.float64)])
        x = x.to(dtype).double()
        exact = torch.stack([sum((-v) ** n / float(math.factorial(n)) for n in range(2, 40)) for v in x])
        found = bend(x.to(dtype), torch.ones_like(x).to(dtype), (-x).exp().to(dtype))
        near = x.abs() < 0.124
        assert ((found - exact).abs()[near] <= eps * exact[near]).all()
        assert ((found - exact).abs() <= eps * (1 + exact)).all()
