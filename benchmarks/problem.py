"""Shapes and workloads -> seeded tensors whose log-probs look like a policy's, and the truth of their loss.

Logits: row r of hidden is drawn with a standard deviation s_r uniform in [1, 4], the head with 1 / sqrt(D), so logits have
standard deviation s_r: at V = 151,936 the entropy runs from 11 down to some 4 nats. Tokens are sampled from the softmax.

Ratios: old log-probs are the policy's own minus the logarithm of a ratio drawn from three bands, below, inside and above the
clip range and further from its bounds than bf16 logits can move them. Fresh random old log-probs would clip every token and
let a gradient of zeros pass.
"""

import math
from dataclasses import dataclass, replace

import torch

from grpo_kernels import GRPOLossConfig, reference

BELOW, INSIDE, ABOVE = (0.35, 0.7), (0.92, 1.08), (1.4, 1.8)
_ROWS = 128  # a step of 128 rows of a large vocabulary is above malloc's largest threshold: its memory goes back at once


@dataclass(frozen=True)
class Shape:
    sequences: int = 8  # B
    length: int = 128  # T
    depth: int = 896  # D
    vocab: int = 151_936  # V
    dtype: str = "bfloat16"

    @property
    def tokens(self):
        return self.sequences * self.length

    def __str__(self):
        return f"{self.tokens}x{self.depth}x{self.vocab} {self.dtype}"


@dataclass(frozen=True)
class Workload:
    """What is asked for. The defaults are the case least favourable to a library that skips work."""

    name: str
    half_padding: bool = False  # half of the tokens are masked, sequences differ in length
    half_idle: bool = False  # every other sequence has advantage 0, and half of the kept tokens
    trains_head: bool = True
    gradients: bool = True  # False: log-probs only, under no_grad
    level: str = "token"


WORKLOADS = {
    w.name: w
    for w in (
        Workload("dense"),
        Workload("half", half_padding=True, half_idle=True),
        Workload("frozen", trains_head=False),
        Workload("logprobs", gradients=False),
        Workload("sequence", level="sequence"),
    )
}


@dataclass(frozen=True)
class Problem:
    shape: Shape
    workload: Workload
    config: GRPOLossConfig
    hidden: torch.Tensor  # [B, T, D]
    weight: torch.Tensor  # [V, D]
    ids: torch.Tensor  # [B, T]
    advantages: torch.Tensor  # [B]
    mask: torch.Tensor  # [B, T] bool
    old_logps: torch.Tensor  # [B, T] float32

    def leaves(self):
        """Fresh (hidden, weight) on the same memory, requiring the gradients that the workload wants."""
        w = self.workload
        return self.hidden.detach().requires_grad_(w.gradients), self.weight.detach().requires_grad_(w.gradients and w.trains_head)

    @property
    def kept(self):
        return int(self.mask.sum())

    @property
    def live(self):
        """Kept tokens of sequences whose advantage is not 0."""
        return int((self.mask & (self.advantages != 0).unsqueeze(1)).sum())


def make_problem(shape: Shape, workload: Workload, seed=0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    B, T, D, V = shape.sequences, shape.length, shape.depth, shape.vocab
    dtype = getattr(torch, shape.dtype)
    spread = 1 + 3 * torch.rand(B * T, 1, generator=g)
    hidden = (torch.randn(B * T, D, generator=g) * spread).to(dtype)
    weight = torch.empty(V, D, dtype=dtype)
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=g) / math.sqrt(D))

    positive = torch.arange(B) % 4 < 2
    advantages = (0.5 + torch.rand(B, generator=g)) * torch.where(positive, 1.0, -1.0)
    mask = torch.ones(B, T, dtype=torch.bool)
    if workload.half_padding:
        # lengths in mirrored pairs, so that half of all tokens is kept, by trained and by idle sequences alike
        share = torch.rand(B // 4, generator=g) * 0.5 + 0.25
        short = (share * T).long()
        lengths = torch.stack([short, short, T - short, T - short], 1).flatten()
        mask = torch.arange(T) < lengths.unsqueeze(1)
    if workload.half_idle:
        advantages[::2] = 0.0

    ids, logps = _sampled(hidden, weight, g)
    config = GRPOLossConfig(loss_type="dapo", importance_sampling_level=workload.level)
    return Problem(
        shape, workload, config, hidden.view(B, T, D), weight, ids.view(B, T), advantages, mask,
        logps.view(B, T) - _log_ratios(workload.level, advantages, T, g),
    )  # fmt: skip


@torch.no_grad()
def _sampled(hidden, weight, g):
    """Tokens drawn from the softmax of the logits, and their log-probs [N]."""
    ids, logps = [], []
    for h in hidden.split(_ROWS):
        log_p = (h @ weight.T).float().log_softmax(-1)
        total = log_p.exp().cumsum_(-1)
        u = torch.rand(h.shape[0], 1, generator=g) * total[:, -1:]
        ids.append(torch.searchsorted(total, u).clamp_(max=weight.shape[0] - 1))
        logps.append(log_p.gather(1, ids[-1]))
    return torch.cat(ids), torch.cat(logps)


def _log_ratios(level, advantages, T, g):
    """[B, T] logarithms of new over old probability.

    Token level: eight tokens in ten inside the clip range, one below, one above, whatever the advantage. Sequence level: off
    policy on the side where clipping keeps the gradient, since a clipped sequence is work that may be skipped.
    """
    B = advantages.shape[0]

    def drawn(bands):
        low, high = torch.tensor(bands).log().unbind(-1)
        return low + (high - low) * torch.rand(low.shape, generator=g)

    if level == "token":
        choice = torch.randint(0, 10, (B, T), generator=g)
        return drawn([[BELOW if c == 0 else ABOVE if c == 1 else INSIDE for c in row] for row in choice.tolist()])
    outer = [[(BELOW if a > 0 else ABOVE) if b % 2 else INSIDE] for b, a in enumerate(advantages.tolist())]
    noise = 0.1 * torch.randn(B, T, generator=g)
    return drawn(outer) + noise - noise.mean(1, keepdim=True)


@dataclass
class Result:
    """What a provider computed; None is what the workload does not ask for, or the provider does not return."""

    loss: torch.Tensor | None = None
    logps: torch.Tensor | None = None  # [B, T]
    d_hidden: torch.Tensor | None = None  # [B, T, D]
    d_weight: torch.Tensor | None = None  # [V, D]


def truth(problem: Problem) -> Result:
    """The tested reference in float64, a sequence at a time: with num_items fixed, dapo is a sum over sequences."""
    p, w = problem, problem.workload
    weight = p.weight.double().requires_grad_(w.gradients and w.trains_head)
    result = Result(torch.zeros((), dtype=torch.float64), torch.empty(p.mask.shape, dtype=torch.float64))
    if w.gradients:
        result.d_hidden = torch.zeros(p.hidden.shape, dtype=torch.float64)
    for b in range(p.shape.sequences):
        s = slice(b, b + 1)
        hidden = p.hidden[s].double().requires_grad_(w.gradients)
        with torch.set_grad_enabled(w.gradients):
            out = reference.grpo_loss(
                hidden, weight, p.ids[s], p.advantages[s].double(), p.mask[s], old_logps=p.old_logps[s].double(),
                num_items=p.kept, config=p.config,
            )  # fmt: skip
        if w.gradients:
            out.loss.backward()
            result.d_hidden[s] = hidden.grad
        result.loss += out.loss.detach()
        result.logps[s] = out.logps
    result.d_weight = weight.grad
    return result


def tiny(shape=Shape()):
    """The same benchmark in seconds, to see that it still runs."""
    return replace(shape, length=16, depth=32, vocab=1009)
