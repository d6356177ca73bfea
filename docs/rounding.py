"""What tensor cores round: logits, log-probs, dH and dW summed as NVIDIA's accumulators do. An emulation, not a measurement.

    python -m docs.rounding      the tables of docs/precision.md, with more rows and columns

The last one is of ordinary products: what gradients lose between two phases.

Model: ``block`` products are added at once. They and the sum so far are aligned to the largest exponent among them (of a product:
that of one factor plus that of the other), cut off ``bits`` below it, added exactly, and the result is cut to a float32.
Known: exact products, truncation of both kinds (Fasi et al. 2021, doi 10.7717/peerj-cs.330). Blocks and bits: Khattak and Mikaitis
2025, arXiv 2512.07004, and Xie et al. 2025, arXiv 2511.10909, wgmma too. Both say that they equal the GPUs bit by bit.
Assumed: one accumulator takes all of K in order. Where cuBLAS divides K, errors are smaller.
"""

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch

from grpo_kernels import linear_logprobs
from grpo_kernels.bench import problem, shapes, workloads
from grpo_kernels.engine import products


@dataclass(frozen=True)
class Accumulator:
    name: str
    block: int
    bits: int
    nearest: bool = False  # to nearest, ties to even, where hardware cuts off
    promote: int = 0  # so many products go into one sum, and the sums into a float32 that rounds to nearest; 0: all


V100, A100, HOPPER = Accumulator("V100", 4, 23), Accumulator("A100", 8, 24), Accumulator("H100, H200, B200", 16, 25)
ROUNDING, OFTEN = replace(HOPPER, name="H100, if it rounded", nearest=True), replace(HOPPER, name="H100, every 128", promote=128)
IN_ORDER = Accumulator("IEEE float32, one by one", 1, 50, nearest=True)  # 50 bits hold the sum of two float32: one rounding


def dot(a, b, how):
    """The float32 that a sum of ``a * b`` over the last axis ends as, in float64; a and b hold bf16 or float16 values."""
    pieces = [(a[..., k : k + n], b[..., k : k + n]) for n in [how.promote or how.block] for k in range(0, a.shape[-1], n)]
    if how.promote:
        return np.float64(sum(np.float32(dot(x, y, replace(how, promote=0))) for x, y in pieces))
    total, whole = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1]), np.rint if how.nearest else np.trunc
    for piece in pieces:
        x, y = (np.ascontiguousarray(v, dtype=np.float64) for v in piece)
        of_x, of_y, of_total = ((v.view(np.int64) & (0x7FF << 52)).view(np.float64) for v in (x, y, total))  # 2^exponent
        unit = np.maximum(np.maximum((of_x * of_y).max(-1), of_total), 2.0**-900) * 2.0**-how.bits  # 2^-900 if all are 0
        total = (whole(x * y / unit[..., None]).sum(-1) + whole(total / unit)) * unit
        total = np.float64(np.float32(total)) if how.nearest else (total.view(np.int64) & -(1 << 29)).view(np.float64)
    return total


def inputs(rows, depth, vocab, outliers=6):
    """(hidden [R, D], head [V, D], softmax [R, V], dz [R, V]): the harness's, with the outliers that docs/precision.md tells of."""
    p = problem.make_problem(shapes.Shape(1, rows, depth, vocab), workloads.WORKLOADS["onpolicy"])
    gain, channels = (0.5 * torch.randn(depth) * bool(outliers)).exp(), torch.randperm(depth)[:outliers]
    outlying = 30 * torch.randn(outliers).sign() * (1 + 0.1 * torch.randn(rows, outliers))
    hidden = (p.hidden[0].float() * gain / gain.mean()).index_copy(1, channels, outlying).bfloat16()
    softmax = torch.cat([hidden.float() @ block.float().T for block in p.weight.split(4096)], 1).softmax(1)
    return hidden, p.weight, softmax, (torch.nn.functional.one_hot(softmax.multinomial(1)[:, 0], vocab) - softmax).bfloat16()


def log_prob_errors(how, hidden, head, softmax, draws=64):
    """[R] each: what part of the mean logit a drawn token's is too near to 0; error of its log-prob, as it is and with all logits
    times 1 + the mean of that part; both for an unlikely token."""
    drawn = softmax.multinomial(draws + 2, replacement=True, generator=torch.Generator().manual_seed(0))
    drawn[:, -1] = torch.arange(len(hidden))
    a, b = hidden.float().numpy()[:, None], head[drawn].float().numpy()
    exact, found = np.einsum("rod,rnd->rn", a, b, dtype=np.float64), dot(a, b, how)
    shrunk = ((exact - found) * np.sign(exact) / abs(exact[:, 0]).mean())[:, 0]
    error = np.stack([found - exact, found * (1 + shrunk.mean()) - exact])
    lse = np.log(np.exp(error[..., 1:-1]).mean(-1))  # the softmax's mean of e^error is that of columns drawn from it
    return shrunk, *(error[..., 0] - lse), *(error[..., -1] - lse)


def product_errors(how, a, b):
    """Of each row of ``a @ b.T``, relative to its norm: (error of the sums, of the sums rounded to bf16)."""
    a, b = a.float().numpy()[:, None], b.float().numpy()
    exact, found = np.einsum("mok,nk->mn", a, b, dtype=np.float64), dot(a, b, how)
    errors = found - exact, torch.from_numpy(found).bfloat16().double().numpy() - exact
    return [np.linalg.norm(error, axis=1) / np.linalg.norm(exact, axis=1) for error in errors]


def two_phase_errors(deviation, temperature, rows=128, vocab=20_001, depth=256):
    """Relative error of dW of log-probs: PyTorch's and ours from bf16 logits, ours from float32 ones (emulated)."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, depth).bfloat16()
    head = (torch.randn(vocab, depth) * deviation / depth**0.5).bfloat16()
    tokens, g = torch.randint(0, vocab, (rows,)), torch.randn(rows)

    def through_logits(weight):
        z = hidden.to(weight.dtype) @ weight.T
        log_p = ((z if z.dtype == torch.float64 else z.float()) / temperature).log_softmax(-1)
        return log_p.gather(1, tokens.unsqueeze(1)).squeeze(1)

    def ours(weight):
        return linear_logprobs(hidden, weight, tokens, backend="torch", temperature=temperature).logps

    def gradient(function, dtype=torch.bfloat16):
        weight = head.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad((function(weight) * g).sum(), weight)[0].double()

    exact, found = gradient(through_logits, torch.float64), [gradient(through_logits), gradient(ours)]
    with mock.patch.object(products, "FLOAT32_TILES", ("torch",)):
        found.append(gradient(ours))
    return [((x - exact).norm() / exact.norm()).item() for x in found]


def show(name, how, errors):
    cells = (f"{abs(e).mean():.1e}, {(e**2).mean() ** 0.5:.1e}, {abs(e).max():.1e}".replace("e-0", "e-") for e in errors)
    print(f"| {name} | {how.name} | {' | '.join(cells)} |", flush=True)


def main(rows=128, depths=(896, 2048, 4096, 8192), vocab=151_936, dw_rows=6144, channels=32):
    torch.manual_seed(0)
    print("| mean, rms, largest | | logits shrink by | log-prob | scaled | unlikely token's | scaled |\n" + "|---" * 7 + "|")
    for depth, outliers in (*((depth, 6) for depth in depths), (depths[-2], 0)):
        given = inputs(rows, depth, vocab, outliers)[:3]
        for how in (V100, A100, HOPPER, ROUNDING, replace(HOPPER, name="H100, K in halves", promote=depth // 2), OFTEN, IN_ORDER):
            show(f"D {depth}{'' if outliers else ', no outliers'}", how, log_prob_errors(how, *given))
    (_, head, _, dz), (hidden, _, _, many) = inputs(16, depths[0], vocab), inputs(dw_rows, depths[0], 4096)
    print("| | | error relative to the row | rounded to bf16 |\n" + "|---" * 4 + "|")
    for name, a, b in (("dH", dz, head[:, :channels].T), ("dW", many.T[:channels], hidden[:, :channels].T)):
        for how in (V100, A100, HOPPER, ROUNDING, OFTEN, IN_ORDER):
            show(name, how, product_errors(how, a, b))
    print("| deviation, temperature | PyTorch, bf16 logits | ours, bf16 logits | ours, float32 logits |\n" + "|---" * 4 + "|")
    for deviation in (3.0, 1.0, 0.1):
        errors = two_phase_errors(deviation, 0.7)
        print(f"| {deviation:g}, 0.7 | " + " | ".join(f"{e:.1e}".replace("e-0", "e-") for e in errors) + " |")


if __name__ == "__main__":
    main()
