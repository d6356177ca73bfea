"""log sum p^2, mean logit and top-1 beside the log-probs, against full logits; and that they cost nothing when not asked for."""

import functools
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from support.cases import usually
from support.ranks import join, launch, leave

from grpo_kernels import backends, linear_logprobs
from grpo_kernels.backends import native
from grpo_kernels.engine import diagnostics
from grpo_kernels.engine.diagnostics import NAMES
from grpo_kernels.logprobs import token_statistics

CASES = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "bias": {"bias": True},
    "temperature": {"temperature": True},
    "negative scale": {"logit_scale": -1.3},
    "all": {"softcap": 6.0, "bias": True, "temperature": True, "logit_scale": 0.7},
}


def problem(dtype=torch.float64, vocab=611):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 6, 8, dtype=dtype), torch.randn(vocab, 8, dtype=dtype)
    ids = torch.randint(0, vocab, (3, 6))
    return hidden, weight, ids, torch.rand(3, 6) > 0.2


def full(hidden, weight, options):
    z = hidden @ weight.T
    z = options.get("logit_scale", 1.0) * (z if options.get("bias") is None else z + options["bias"])
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    return z if options.get("temperature") is None else z / options["temperature"].unsqueeze(-1)


@pytest.mark.cover("name", "backend")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("trained", ["head", "hidden", "nothing"])
@pytest.mark.parametrize("workspace_bytes", [1, 10**7])
def test_equal_full_logits(name, backend, trained, workspace_bytes):
    """Several blocks of the vocabulary, and the target on its best token for half of the rows."""
    hidden, weight, ids, mask = problem()
    options = dict(CASES[name])
    if options.get("bias"):
        options["bias"] = torch.randn(weight.shape[0], dtype=torch.float64)
    if options.get("temperature"):
        options["temperature"] = 0.5 + torch.rand(ids.shape)
    z = full(hidden, weight, options)
    ids[:, ::2] = z.argmax(-1)[:, ::2]
    weight.requires_grad_(trained == "head")
    hidden.requires_grad_(trained != "nothing")
    logps, entropy, squares, mean, top, norm = token_statistics(
        hidden, weight, ids, mask=mask, backend=backend, workspace_bytes=workspace_bytes, diagnostics=NAMES, **options
    )
    log_p = z.log_softmax(-1)
    zero = lambda x: x.where(mask, torch.zeros((), dtype=x.dtype))  # noqa: E731
    torch.testing.assert_close(logps.detach(), zero(log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(squares, zero((2 * log_p).logsumexp(-1)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, zero(z.mean(-1)), rtol=1e-9, atol=1e-9)
    p = log_p.exp()
    score = torch.nn.functional.one_hot(ids, p.shape[-1]) - p
    torch.testing.assert_close(norm, zero(score.square().sum(-1)), rtol=1e-9, atol=1e-9)
    assert torch.equal(top, (z.argmax(-1) == ids) & mask) and 0 < top.sum() < mask.sum()
    assert not any(x.requires_grad for x in (squares, mean, top, norm))
    assert logps.requires_grad == (trained != "nothing")
    if trained != "nothing":
        plain = linear_logprobs(hidden, weight, ids, mask=mask, backend=backend, workspace_bytes=workspace_bytes, **options)
        torch.testing.assert_close(plain.logps, logps, rtol=1e-12, atol=1e-12)
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        g = torch.randn(logps.shape, dtype=torch.float64)
        ours, theirs = (torch.autograd.grad((g * x).sum(), inputs) for x in (logps, plain.logps))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_tie_is_won_by_the_first_token():
    """As argmax has it: equal logits in one block and in different ones."""
    hidden, weight = torch.ones(1, 3, 1), torch.zeros(9000, 1)
    weight[[5, 8000]] = 2.0
    weight[6] = 2.0
    top = token_statistics(hidden, weight, torch.tensor([[5, 6, 8000]]), diagnostics=("is_top1",), workspace_bytes=1)[4]
    assert top.tolist() == [[True, False, False]]


def test_what_is_not_finite_is_not_top():
    hidden, weight = torch.ones(1, 2, 1), torch.zeros(50, 1)
    hidden[0, 0] = float("nan")
    top = token_statistics(hidden, weight, torch.tensor([[0, 0]]), diagnostics=("is_top1",))[4]
    assert top.tolist() == [[False, True]]
    assert token_statistics(hidden, weight, torch.tensor([[0, 0]]))[2:] == [None] * 4


@pytest.mark.cover("backend")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("workspace_bytes", [20_000, 10**7])
def test_the_sum_of_squares_costs_no_read(monkeypatch, backend, trained, workspace_bytes):
    """It is a statistic of the row kernels' one walk; the other diagnostics are what reads a tile again."""
    hidden, weight, ids, mask = problem(torch.float32, 4201)
    weight.requires_grad_(trained)
    kernels, read = backends.kernels(backend), []
    statistics = kernels.statistics

    def counted(tile, stats, **options):
        read.append(tile.values.numel())
        statistics(tile, stats, **options)

    def again(*args):
        raise AssertionError("a tile is read again")

    monkeypatch.setattr(kernels, "statistics", counted)
    monkeypatch.setattr(diagnostics, "transformed", again)
    def call(*names):
        return token_statistics(hidden, weight, ids, mask=mask, backend=backend, workspace_bytes=workspace_bytes, diagnostics=names)

    plain = call()
    assert sum(read) == mask.sum() * 4201
    reads, read[:] = read[:], []
    found = call("log_sum_sq_probs", "score_sq_norm")
    assert read == reads
    for a, b in zip(plain[:2], found[:2], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="read again"):
        call("is_top1")


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_squares_keeps_its_digits(backend, dtype):
    """A confident row has log sum p^2 near 0, a flat one -log V: both to the digits of the log-probs, and so 1 - 2 p + sum p^2."""
    vocab = 5000
    hidden, weight = torch.zeros(1, 3, 2, dtype=dtype), torch.zeros(vocab, 2, dtype=dtype)
    weight[7, 0] = 1.0
    hidden[0, 0, 0], hidden[0, 1, 0] = 24.0, 29.25
    found, *_, norm = token_statistics(hidden, weight, torch.full((1, 3), 7), backend=backend, diagnostics=NAMES)[2:]
    others = (vocab - 1) * (-hidden[..., 0].double()).exp()  # relative to the target
    exact = torch.log1p(others.square() / (vocab - 1)) - 2 * torch.log1p(others)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-15)
    rest = others / (1 + others)  # 1 - p
    torch.testing.assert_close(norm.double(), rest.square() * (1 + 1 / (vocab - 1)), rtol=1e-5, atol=0)
    assert -4e-7 < found[0, 0] < 0 and -4e-9 < found[0, 1] < 0 and abs(found[0, 2] + math.log(vocab)) < 1e-5


def test_is_top1_is_not_of_a_row_with_nan_in_an_earlier_block():
    hidden, weight = torch.ones(1, 1, 1), torch.zeros(9000, 1)
    weight[3], weight[8000] = float("nan"), 2.0
    assert not token_statistics(hidden, weight, torch.tensor([[8000]]), diagnostics=("is_top1",), workspace_bytes=1)[4].item()


# Whole fixed tiles of each rank, one of which may hold nothing; and, last, where no tile ends.
SHARDS = {2: [(4096, 4905), (17, 8984)], 4: [(4096, 0, 4096, 809), (3, 5000, 3000, 998)]}


def sharded_case(dtype):
    """Most likely tokens on the first and the last rank, a tie over a border, a row with NaN, banned tokens; half of all ids best."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 6, 8, dtype=dtype), torch.randn(9001, 8, dtype=dtype)
    bias = torch.zeros(9001, dtype=dtype)
    bias[torch.randperm(9001)[:300]] = -float("inf")
    weight[[5, 8500]] = 3 * weight[7]
    hidden[0, 0], hidden[0, 1], hidden[1, 5] = 9 * weight[5], 4 * weight[8999], float("nan")
    bias[[5, 8500, 8999]] = 0
    ids = (hidden @ weight.T + bias).argmax(-1)
    ids[:, 3:] = torch.randint(0, 9001, (2, 3))
    return hidden, weight, ids, bias


def sharded(world, rank, folder, port):
    join(rank, port, world, 240)
    wrong = []
    for dtype, backend, sizes in itertools.product((torch.float32, torch.bfloat16), ("torch", "cpu"), SHARDS[world]):
        hidden, weight, ids, bias = sharded_case(dtype)
        first = sum(sizes[:rank])
        own = slice(first, first + sizes[rank])
        for trained, workspace in itertools.product((False, True), (None, 1 << 17)):
            options = dict(workspace_bytes=workspace, backend=backend, diagnostics=NAMES, batch_invariant=True, softcap=20.0)
            whole, part = (x.clone().requires_grad_(trained) for x in (weight, weight[own]))
            alone = token_statistics(hidden, whole, ids, bias=bias, **options)
            ours = token_statistics(hidden, part, ids, bias=bias[own], vocab_parallel_group=dist.group.WORLD, **options)
            tiles = sizes is SHARDS[world][0]
            for name, a, b in zip(("logps", "entropy", *NAMES), ours, alone, strict=True):
                exact = name == "is_top1" or (tiles and name != "mean_logits")
                close = torch.equal(a.nan_to_num(7), b.nan_to_num(7)) if exact else torch.allclose(a, b, 1e-5, 1e-6, equal_nan=True)
                if not close:
                    wrong.append((dtype, backend, sizes, trained, workspace, name, a, b))
    top = alone[4]
    wrong += [] if top[0, 0] and top[0, 1] and not top[1, 5] else [top]
    try:
        names = NAMES if rank else NAMES[:1]
        token_statistics(hidden, weight[own], ids, vocab_parallel_group=dist.group.WORLD, diagnostics=names)
    except ValueError as error:
        wrong += [] if "diagnostics must be the same on all ranks" in str(error) else [str(error)]
    else:
        wrong.append("no error")
    torch.save(wrong, f"{folder}/{rank}")
    leave()


@pytest.mark.exhaustive(reason="five seconds: four processes")
@pytest.mark.skipif(native.why_unavailable() is not None, reason="there are no compiled products")
@pytest.mark.parametrize("world", usually([2, 4], 4))
def test_a_sharded_vocabulary_has_those_of_one_process(world, tmp_path):
    """To the bit where ranks meet between fixed tiles, but for the mean, a sum in the order of the ranks."""
    launch(functools.partial(sharded, world), str(tmp_path), world, 240)
    assert [torch.load(tmp_path / str(rank)) for rank in range(world)] == [[]] * world


def test_one_diagnostic_alone_is_what_it_is_among_all():
    from grpo_kernels.engine.diagnostics import NAMES
    from grpo_kernels.logprobs import token_statistics

    arguments = torch.randn(5, 8), torch.randn(37, 8), torch.arange(5)
    among = token_statistics(*arguments, diagnostics=NAMES)[2:]
    for i, name in enumerate(NAMES):
        alone = token_statistics(*arguments, diagnostics=(name,))[2:]
        assert torch.equal(alone[i], among[i]) and all(x is None for j, x in enumerate(alone) if j != i)
