"""Paths through the library -> tensors on the device, and the truth that everybody is held against.

Logits are noise of standard deviation 1 to 4, ratios those of ``grpo_kernels.bench.workloads``, drawn on the device: at
8192 x 4096 x 151,936 a CPU takes minutes. The head, the hidden states and the tokens are shared by all paths of a shape.
"""

import math
from dataclasses import dataclass, replace

import torch

from grpo_kernels import GRPOLossConfig, backends
from grpo_kernels.bench.problem import Problem
from grpo_kernels.bench.problem import truth as exact
from grpo_kernels.bench.shapes import Shape
from grpo_kernels.bench.workloads import Workload, draw_log_ratios
from grpo_kernels.engine.operands import Work, problem_of
from grpo_kernels.engine.plan import plan
from grpo_kernels.losses.config import LogitTransform

SAMPLE = 256  # rows whose log-probs are known in float64
CHECKED = 512  # tokens of the copy on which gradients are checked
_ROWS = 256


@dataclass(frozen=True)
class Path(Workload):
    """What is asked for, and the products that it takes."""

    beta: float = 0.0
    idle: float = 0.0  # share of the rows whose advantage is 0
    stash: bool = False  # the workspace has room for the stash of all rows
    recompute: bool = False  # two phases within the default workspace: the floor multiplies by the head twice

    def products(self, rows, live):
        """Matrix products of [rows, D] with [D, V] that no method can do without."""
        of_live = (1 + self.trains_head + self.recompute) * self.gradients
        return 1 + of_live * live / rows


PATHS = {
    p.name: p
    for p in (
        Path("one_pass"),
        Path("one_pass_kl", beta=0.04),
        Path("two_phase_stash", level="sequence", stash=True),
        Path("two_phase_recompute", level="sequence", recompute=True),
        Path("frozen", trains_head=False),
        Path("logprobs", gradients=False),
        Path("idle40", idle=0.4),
    )
}


@dataclass(frozen=True)
class Base:
    """What all paths of a shape share."""

    shape: Shape
    hidden: torch.Tensor  # [B, T, D]
    weight: torch.Tensor  # [V, D]
    ids: torch.Tensor  # [B, T]
    logps: torch.Tensor  # [B, T] float32, of products in float32
    sample: torch.Tensor  # [S] rows of the flattened tokens
    exact_logps: torch.Tensor  # [S] float64
    exact_entropy: torch.Tensor  # [S] float64


@torch.no_grad()
def make_base(shape: Shape, device, seed=0) -> Base:
    g = torch.Generator(device).manual_seed(seed)
    B, T, D, V = shape.sequences, shape.length, shape.depth, shape.vocab
    normal = lambda *size: torch.randn(size, generator=g, device=device)  # noqa: E731
    hidden = torch.empty(B * T, D, dtype=getattr(torch, shape.dtype), device=device)
    for rows in hidden.split(1024):
        rows.copy_(normal(*rows.shape) * (1 + 3 * torch.rand(rows.shape[0], 1, generator=g, device=device)))
    weight = hidden.new_empty(V, D)
    for rows in weight.split(8192):
        rows.copy_(normal(*rows.shape) / math.sqrt(D))

    wide, ids, logps = weight.float(), [], []
    for h in hidden.split(_ROWS):
        log_p = (h.float() @ wide.T).log_softmax(-1)
        # argmax of log p + Gumbel noise is a sample of p
        ids.append((log_p - torch.empty_like(log_p).exponential_(generator=g).log_()).argmax(1))
        logps.append(log_p.gather(1, ids[-1].unsqueeze(1)).squeeze(1))
    del wide
    ids = torch.cat(ids)
    sample = torch.linspace(0, B * T - 1, min(SAMPLE, B * T), device=device).long()
    exact_logps, exact_entropy = exact_scores(hidden[sample], weight, ids[sample])
    return Base(
        shape, hidden.view(B, T, D), weight, ids.view(B, T), torch.cat(logps).view(B, T), sample, exact_logps, exact_entropy
    )


@torch.no_grad()
def exact_scores(hidden, weight, ids):
    """(log-probs, entropies) [S] in float64, of the very bits of the inputs."""
    wide, logps, entropy = weight.double(), [], []
    for h, token in zip(hidden.split(_ROWS // 4), ids.split(_ROWS // 4), strict=True):
        log_p = (h.double() @ wide.T).log_softmax(-1)
        logps.append(log_p.gather(1, token.unsqueeze(1)).squeeze(1))
        entropy.append(-(log_p.exp() * log_p).sum(1))
    return torch.cat(logps), torch.cat(entropy)


def make_problem(base: Base, path: Path, seed=1) -> Problem:
    g = torch.Generator().manual_seed(seed)
    B, T = base.ids.shape
    sequence = torch.arange(B)
    advantages = (0.5 + torch.rand(B, generator=g)) * torch.where(sequence % 4 < 2, 1.0, -1.0)
    # spread over the batch, as groups without a winner are
    advantages[((sequence + 1) * path.idle + 0.5).floor() > (sequence * path.idle + 0.5).floor()] = 0.0
    old = base.logps - draw_log_ratios(path.level, advantages, T, g).to(base.logps.device)
    ref = base.logps - 0.1 * torch.randn(B, T, generator=g).to(base.logps.device) if path.beta else None
    config = GRPOLossConfig(loss_type="dapo", importance_sampling_level=path.level, beta=path.beta)
    device = base.logps.device
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    problem = Problem(
        base.shape, path, config, base.hidden, base.weight, base.ids, advantages.to(device), mask, old, ref_logps=ref
    )
    return replace(problem, workspace=stash_workspace(problem)) if path.stash else problem


def smaller(problem: Problem, tokens=CHECKED) -> Problem:
    """The first tokens of every sequence, the same head."""
    p, length = problem, max(1, min(problem.shape.length, tokens // problem.shape.sequences))
    cut = lambda x: None if x is None else x[:, :length].contiguous()  # noqa: E731
    return replace(
        p, shape=replace(p.shape, length=length), hidden=cut(p.hidden), ids=cut(p.ids), mask=cut(p.mask),
        old_logps=cut(p.old_logps), ref_logps=cut(p.ref_logps),
    )  # fmt: skip


def stash_workspace(p: Problem) -> int:
    """The smallest budget, in steps of a tenth, whose plan stashes every row."""
    backend = backends.resolve("auto", p.hidden.device, p.hidden.dtype)
    budget = p.kept * p.shape.vocab * p.weight.element_size()
    for _ in range(30):
        budget = int(budget * 1.1)
        work = Work(LogitTransform(), backend, budget, (True, True, False, False, False))
        if plan(problem_of(p.weight, work, p.kept, 0, two_phases=True)).stash_rows >= p.kept:
            return budget
    raise AssertionError(f"no plan stashes {p.kept} rows within {budget} bytes")


def truth(p: Problem):
    """Eight sequences at a time: some 512 tokens are checked, whatever their number."""
    return exact(p, sequences=8)
