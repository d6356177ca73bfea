"""Shape and workload -> seeded tensors as workloads.py describes them, and the truth of their loss.

Hidden states are noise plus a multiple of the head's rows of the tokens that shall be likely: rows of a random head are nearly
orthogonal, so that those tokens' logits rise by that multiple and the others stay. The token of a row is one of the likely ones
with their probability, any other otherwise.

Old log-probs of a workload with supports are taken over them, as a sampler that keeps them returns its own.

A teacher's hidden states are made likewise from noise and a head of its own.
"""

import collections
import math
import operator
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

from .. import reference
from ..losses.config import GRPOLossConfig
from ..support import TokenSupport
from .shapes import Shape
from .workloads import FORK_TOKENS, FORKS, LIKELY, ODDS, Workload, draw_batch, draw_log_ratios, support_sizes

_ROWS = 128  # a step of 128 rows of a large vocabulary is above malloc's largest threshold: its memory goes back at once
_TRUTH_ROWS = 256  # tokens whose float64 logits are in memory together
_TRUTH_LOGITS = {1: 6, 2: 8}  # numbers that are kept of each of them, by the number of heads


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
    old_logps: torch.Tensor | None  # [B, T] float32
    ref_logps: torch.Tensor | None = None
    support: TokenSupport | None = None  # of [B * T]
    teacher_hidden: torch.Tensor | None = None  # [B, T, D]
    teacher_weight: torch.Tensor | None = None  # [V, D]

    def leaves(self):
        """Fresh (hidden, weight) on the same memory, requiring the gradients that the workload wants."""
        w = self.workload
        return self.hidden.detach().requires_grad_(w.gradients), self.weight.detach().requires_grad_(w.gradients and w.trains_head)

    @property
    def kept(self):
        return int(self.mask.sum())

    @property
    def heads(self):
        """Each has logits of every kept row."""
        return 1 if self.teacher_weight is None else 2

    @property
    def loss_scale(self):
        """Beside which an error of the loss is judged: a divergence is a sum of terms >= 0, the others are signed."""
        return 0.0 if self.heads == 2 else self.advantages.abs().mean().item()

    @property
    def live(self):
        """Kept tokens that get a gradient: of sequences whose advantage is not 0, unless there is a KL, and of high entropy."""
        live = self.kept if self.config.beta or self.heads == 2 else int((self.mask & (self.advantages != 0).unsqueeze(1)).sum())
        return live if self.config.top_entropy_quantile == 1 else min(live, math.ceil(self.config.top_entropy_quantile * self.kept))


def make_problem(shape: Shape, workload: Workload, seed=0, device="cpu") -> Problem:
    """The head and the hidden states are drawn on the device, by its own generator; everything small on the CPU."""
    g, large = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    shape = workload.laid_out(shape)
    B, T, D, V = shape.sequences, shape.length, shape.depth, shape.vocab
    dtype = getattr(torch, shape.dtype)
    weight = torch.empty(V, D, dtype=dtype, device=device).normal_(generator=large).mul_(D**-0.5)
    noise = torch.empty(B * T, D, device=device).normal_(generator=large)
    likely = _likely(B * T, V, g)
    hidden = _peaked(noise, weight, likely, likely.odds).to(dtype)
    ids = _sampled(likely, V, g).to(device)
    mask, advantages = draw_batch(workload, B, T, g)
    own = torch.Generator().manual_seed(seed + 1)  # so that everything else is what it is without supports
    support = _supports(ids.cpu(), likely.candidates, likely.used.bool(), V, own).to(device) if workload.supports else None
    logps = _logps(hidden, weight, ids, support).view(B, T) if workload.off_policy or workload.beta else None
    # rounded as the dtype rounds it: the bands of the ratios leave room for that
    old = logps - draw_log_ratios(workload.level, advantages, T, g).to(device) if workload.off_policy else None
    ref = logps - 0.5 * torch.randn(B, T, generator=g).to(device) if workload.beta else None
    teacher_hidden = teacher_weight = None
    if workload.teacher:
        own = torch.Generator().manual_seed(seed + 2)
        teacher_weight = torch.empty_like(weight).normal_(generator=large).mul_(D**-0.5)
        odds = likely.low + (likely.high - likely.low) * torch.rand(B * T, generator=own)
        teacher_hidden = _peaked(noise.normal_(generator=large), teacher_weight, likely, odds).to(dtype).view(B, T, D)
    hidden, ids, advantages, mask = hidden.view(B, T, D), ids.view(B, T), advantages.to(device), mask.to(device)
    return Problem(shape, workload, workload.config(), hidden, weight, ids, advantages, mask, old, ref, support, teacher_hidden,
                   teacher_weight)  # fmt: skip


# of N rows, on the CPU: candidates [N, FORK_TOKENS] and which of them are likely (0 or 1), between which odds, which, noise [N, 1]
_Likely = collections.namedtuple("_Likely", "candidates used low high odds spread")


def _likely(N, V, g):
    uniform = lambda *size: torch.rand(size, generator=g)  # noqa: E731
    spread = 1 + uniform(N, 1)
    kind = torch.bucketize(uniform(N), torch.tensor([FORKS, FORKS + LIKELY]), right=True)
    low, high = torch.tensor(list(ODDS.values()), dtype=torch.float32)[kind].unbind(1)
    odds = low + (high - low) * uniform(N)
    candidates = torch.randint(V, (N, FORK_TOKENS), generator=g)
    used = torch.ones(N, FORK_TOKENS)
    used[kind > 0, 1:] = 0.0  # of a fork all, else the first
    return _Likely(candidates, used, low, high, odds, spread)


def _peaked(noise, weight, likely, odds):
    """Hidden states [N, D] by which the likely tokens have these odds."""
    device, used = noise.device, likely.used
    # sum over exp of normal logits: ln V + variance / 2
    height = math.log(weight.shape[0]) + likely.spread.squeeze(1).square() / 2 + odds - used.sum(1).log()
    hidden = noise * likely.spread.to(device)
    for j in range(FORK_TOKENS):
        direction = weight[likely.candidates[:, j].to(device)].float()
        own = (hidden * direction).sum(1)  # of the noise: taken out, so that the odds are the ones drawn
        norm = direction.square().sum(1)
        hidden += direction * (used[:, j].to(device) * (height.to(device) - own) / norm).unsqueeze(1)
    return hidden


def _sampled(likely, V, g):
    """ids [N]: a likely token by the odds, else any."""
    N = len(likely.odds)
    which, by_chance = (torch.rand(N, generator=g) for _ in range(2))
    chosen = likely.candidates.gather(1, (which * likely.used.sum(1)).long().unsqueeze(1)).squeeze(1)
    return torch.where(by_chance < likely.odds.sigmoid(), chosen, torch.randint(V, (N,), generator=g))


def _supports(ids, candidates, used, vocab, g):
    """`TokenSupport` of [N]: token, candidates, any others; the smallest for rows of one candidate that was sampled."""
    N = len(ids)
    surprise = used.sum(1) + (candidates != ids.unsqueeze(1)).all(1)
    sizes = torch.empty(N, dtype=torch.int64)
    sizes[(surprise + torch.rand(N, generator=g)).argsort()] = support_sizes(N, vocab, g)
    chosen = []
    for row, size in enumerate(sizes.tolist()):
        known = [int(ids[row]), *candidates[row][used[row]].tolist()]
        distinct = dict.fromkeys(known[:size])
        while len(distinct) < size:  # drawn again where one came twice
            distinct.update(dict.fromkeys(torch.randint(vocab, (size - len(distinct),), generator=g).tolist()))
        chosen.extend(distinct)
    return TokenSupport.from_lengths(torch.tensor(chosen), sizes)


def serves(a: Problem, b: Problem) -> bool:
    """Whether the truth of a is one of b: the same tensors and loss, and at least the gradients."""
    drawn = lambda p: replace(p.workload, name="", about="", trains_head=True, gradients=True)  # noqa: E731
    wants = [(p.workload.gradients, p.workload.trains_head) for p in (a, b)]
    return a.shape == b.shape and drawn(a) == drawn(b) and all(map(operator.ge, *wants))


@torch.no_grad()
def _logps(hidden, weight, ids, support):
    """Log-probs [N] float32, of logits in the inputs' dtype."""
    found = []
    for rows in torch.arange(len(ids), device=ids.device).split(_ROWS):
        z = (hidden[rows] @ weight.T).float()
        if support is not None:
            z.masked_fill_(~support.take(rows).to_mask(len(weight)), -float("inf"))
        found.append(-cross_entropy(z, ids[rows], reduction="none"))
    return torch.cat(found)


@dataclass
class Result:
    """What a provider computed; None is what the workload does not ask for, or the provider does not return."""

    loss: torch.Tensor | None = None
    logps: torch.Tensor | None = None  # [B, T]
    d_hidden: torch.Tensor | None = None  # [B, T, D]
    d_weight: torch.Tensor | None = None  # [V, D]
    entropy: torch.Tensor | None = None  # [B, T]


def truth(p: Problem) -> Result:
    """The tested reference in float64, some sequences at a time: with num_items fixed, dapo is a sum over sequences."""
    if p.heads == 2:
        return _truth_beside_a_teacher(p)
    w, device, sequences = p.workload, p.hidden.device, _together(p)
    weight = p.weight.double().requires_grad_(w.gradients and w.trains_head)
    zeros = lambda *size: torch.zeros(size, dtype=torch.float64, device=device)  # noqa: E731
    result = Result(zeros(), zeros(*p.mask.shape), entropy=zeros(*p.mask.shape))
    if w.gradients:
        result.d_hidden = zeros(*p.hidden.shape)
    positions = torch.arange(p.mask.numel(), device=device).view(p.mask.shape)
    for start in range(0, p.shape.sequences, sequences):
        s = slice(start, start + sequences)
        support = None if p.support is None else p.support.take(positions[s].flatten())
        double = lambda x: None if x is None else x[s].double()  # noqa: E731, B023
        hidden = double(p.hidden).requires_grad_(w.gradients)
        with torch.set_grad_enabled(w.gradients):
            out = reference.grpo_loss(
                hidden, weight, p.ids[s], double(p.advantages), p.mask[s], old_logps=double(p.old_logps),
                ref_logps=double(p.ref_logps), num_items=p.kept, config=p.config, support=support,
            )  # fmt: skip
        if w.gradients:
            out.loss.backward()
            result.d_hidden[s] = hidden.grad
        result.loss += out.loss.detach()
        result.logps[s], result.entropy[s] = out.logps, out.entropy
    result.d_weight = weight.grad
    return result


def _truth_beside_a_teacher(p):
    weight, teacher = p.weight.double().requires_grad_(p.workload.trains_head), p.teacher_weight.double()
    result = Result(weight.new_zeros(()), d_hidden=torch.zeros_like(p.hidden, dtype=torch.float64))
    for s in torch.arange(p.shape.sequences, device=weight.device).split(_together(p)):
        hidden = p.hidden[s].double().requires_grad_()
        found = reference.divergence_from_logits(hidden @ weight.T, p.teacher_hidden[s].double() @ teacher.T, "reverse_kl")
        loss = (found * p.mask[s]).sum() / p.kept
        loss.backward()
        result.loss += loss.detach()
        result.d_hidden[s] = hidden.grad
    result.d_weight = weight.grad
    return result


def truth_bytes(p: Problem) -> int:
    """What `truth` takes at most: weights, the gradient and one more, logits and what autograd keeps of them."""
    rows = min(p.shape.tokens, _together(p) * p.shape.length)
    heads = p.heads - 1 + (1 if not p.workload.gradients else 2 if rows == p.shape.tokens else 3)
    return 8 * p.shape.vocab * (heads * p.shape.depth + (_TRUTH_LOGITS[p.heads] + (p.support is not None)) * rows)


def _together(p):
    """Sequences whose float64 logits are in memory together; all, where a quantile is one of the whole batch."""
    return p.shape.sequences if p.config.top_entropy_quantile < 1 else max(1, _TRUTH_ROWS // p.shape.length)
