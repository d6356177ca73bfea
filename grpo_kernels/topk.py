"""`topk_divergence`: how far a student is from a teacher of whom K tokens a position are known, on the pair kernels.

p and q are the probabilities of student and teacher, of K tokens and, with ``tail``, of all others together as one more bin. Over
these bins both sum to 1, and the KLs are summed over the terms of `backends.comparison`, which do not cancel near p = q.

The log-prob of the likeliest token keeps its digits near p = 1. So the tail 1 - sum p is taken as (1 - the largest) - the others. A
difference below a rounding of 1 - the largest is noise, and a tail counts as at least that: a sum of p that is rounded to 1 would
make a KL of inf, and a gradient of p / tail. On the CPU a tile of 16-bit inputs has rounded logits, and the sum over the vocabulary
is theirs; the K logits are rounded alike, or the tail would be the difference of the roundings.
"""

import math
from typing import Any

import torch

from .backends.comparison import bend
from .checks import FLOAT_DTYPES, Backend, check_group, check_shape, check_tensor, refuse_transforms
from .checks import kind as kind_of
from .distributed import group_of, validate_across_ranks
from .engine.ops import differentiable_once
from .logprobs import logprobs_at
from .losses.config import GRPOLossConfig
from .losses.objective import refuse_lost_gradients
from .teacher import Kind, divergence_of

_NOISE = 8  # roundings that a logit, and so a p, has seen
_LEAST = 1e-28  # of a tail of which nothing is left
_FAR = 80.0  # a log-ratio beyond which the smaller of p and q is no digit of their mixture


def topk_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logps: torch.Tensor,
    *,
    kind: Kind = "forward_kl",
    tail: bool = True,
    beta: float = 0.5,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    vocab_parallel_group: Any = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Divergence of a head from a teacher's K tokens a position: distillation from a server that returns no more of its teacher.

    Equals, with ``p = z.softmax(-1).gather(-1, teacher_ids)`` of the z of `linear_logprobs` and ``q = teacher_logps.exp()``, both
    with their tail ``1 - p.sum(-1)`` as one more bin: ``(q * (q / p).log()).sum(-1)`` for ``forward_kl``, the same with p and q
    exchanged for ``reverse_kl``, ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = (1 - beta) p + beta q`` for ``jsd``.

    Args:
        teacher_ids: [.., K] int64 or int32 in [0, V), none twice in a position, where the mask is 1; -1 is none.
        teacher_logps: [.., K] float32, float64, bfloat16 or float16; the teacher's log-probs of these tokens over its whole
            vocabulary, at the same temperature. May hold -inf. A constant.
        kind: ``forward_kl`` KL(teacher || student), ``reverse_kl`` KL(student || teacher) or ``jsd``.
        tail: all other tokens are one bin. False leaves them out: a sum over K tokens that is not normalised and may be negative,
            for ``forward_kl`` that of verl 0.9.1's forward_kl_topk without its clamp of log-probs.
        beta: of jsd, in [0, 1]; 0 is the forward and 1 the reverse KL, as in TRL.
        hidden, weight, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
            workspace_bytes, backend: as in `linear_logprobs_at`.

    Returns:
        [..] float32 (float64 for float64), 0 where masked; differentiable once in hidden, weight, bias, lora and temperature. inf
        where a token's log-prob is -inf: the teacher's in a reverse KL, the student's in a forward one; the gradient is finite
        there, without that term. Costs what `linear_logprobs_at` costs.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
        RuntimeError: a named backend cannot be used, or the call is traced by torch.compile.

    Source: Agarwal et al. 2024, arXiv:2306.13649, equation 1, for jsd.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("topk_divergence cannot be used under torch.compile: call it inside of torch.compiler.disable")
    check_group("vocab_parallel_group", vocab_parallel_group)
    group = group_of(weight, vocab_parallel_group)
    with validate_across_ranks(group, hidden) as meeting:
        divergence = _check(teacher_ids, teacher_logps, kind, tail, beta)
        kind, beta = divergence.kind, divergence.beta
        meeting.facts = {"kind": kind, "tail": int(tail), "beta": repr(beta)}
    # an id that no vocabulary has: told together with the other wrong ones, without a look at the device of its own
    ids = teacher_ids.masked_fill(_repeated(teacher_ids), -2)
    logps, _, stored = logprobs_at(
        hidden, weight, ids, mask, bias, temperature, logit_scale, softcap, lora, vocab_parallel_group, sequence_parallel,
        workspace_bytes, backend, ids_name="teacher_ids", as_in_tiles=tail,
    )  # fmt: skip
    given = ids >= 0 if mask is None else (ids >= 0) & mask.bool().unsqueeze(-1)
    student, teacher = (x.to(logps.dtype).masked_fill(~given, -math.inf) for x in (logps, teacher_logps))
    noise = [max(_NOISE * torch.finfo(logps.dtype).eps, torch.finfo(dtype).eps) for dtype in (stored, teacher_logps.dtype)]
    divergence = _Divergence.apply(student, teacher, kind, beta, tail, noise)
    return divergence if mask is None else divergence.where(mask.bool(), 0.0)


def _check(ids, logps, kind, tail, beta):
    refuse_transforms({"teacher_ids": ids, "teacher_logps": logps})
    check_tensor("teacher_ids", ids, None, (torch.int64, torch.int32))
    check_tensor("teacher_logps", logps, ids.device, FLOAT_DTYPES)
    if ids.dim() < 1:
        raise ValueError("teacher_ids must be [.., K], got a 0-dim tensor")
    check_shape("teacher_logps", logps, ids.shape)
    refuse_lost_gradients(GRPOLossConfig(), teacher_logps=logps)
    if not isinstance(tail, bool):
        raise TypeError(f"tail must be True or False, got {kind_of(tail)}")
    return divergence_of(kind, beta)


def _repeated(ids):
    """[.., 1] whether a position has a token twice."""
    ordered = ids.sort(-1).values
    return ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1, keepdim=True)


class _Divergence(torch.autograd.Function):
    """Written down with its derivative: a recorded one would be NaN at p = 0 and q = 0, and keep a dozen [.., K] tensors."""

    @staticmethod
    def forward(ctx, student, teacher, *rest):
        divergence, gradient = _compared(student, teacher, *rest)
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        (gradient,) = ctx.saved_tensors
        g = g.unsqueeze(-1)
        return (g * gradient).where(g != 0, 0.0), *[None] * 5


def _compared(log_p, log_q, kind, beta, tail, noise):
    """(divergence [..], its gradient to log_p [.., K]) of log-probs [.., K], -inf where there is no token.

    With d f / d log p of every bin, ``slope``, log_p of a token has slope - p / p_tail * the tail's slope.
    """
    log_p, log_q = (torch.nn.functional.pad(x, (0, 1), value=-math.inf) for x in (log_p, log_q))
    p, q = log_p.exp(), log_q.exp()
    x = torch.where(log_p == log_q, 0.0, log_p - log_q)
    if tail:
        p_tail, q_tail = _tail(log_p, p, noise[0]), _tail(log_q, q, noise[1])
        excess = _difference(p, q, x).sum(-1, keepdim=True) / p_tail  # q_tail / p_tail - 1
        x_tail = torch.where(excess.abs() < 0.5, -torch.log1p(excess), (p_tail / q_tail).log())
        for whole, last in ((p, p_tail), (q, q_tail), (x, x_tail)):
            whole[..., -1:] = last
    if kind == "forward_kl":
        terms = bend(-x, q, p) if tail else (-q * x).where(q != 0, 0.0)
        slope = _difference(p, q, x) if tail else -q
        of_tail = -torch.expm1(-x[..., -1:])
    elif kind == "reverse_kl":
        terms = bend(x, p, q) if tail else (p * x).where(p != 0, 0.0)
        slope = ((x if tail else x + 1) * p).where((p != 0) & (x != math.inf), 0.0)
        of_tail = x[..., -1:]
    else:
        x, mixed = x.clamp(-_FAR, _FAR), (1 - beta) * p + beta * q
        log_pm, log_qm = -torch.log1p(beta * torch.expm1(-x)), -torch.log1p((1 - beta) * torch.expm1(x))
        terms = beta * bend(log_qm, q, mixed) + (1 - beta) * bend(log_pm, p, mixed)
        slope, of_tail = (1 - beta) * p * log_pm, (1 - beta) * log_pm[..., -1:]
    gradient = slope - p * of_tail if tail else slope
    return terms.sum(-1), gradient[..., :-1]


def _tail(logs, p, noise):
    """[.., 1] 1 - sum p."""
    largest, place = logs.max(-1, keepdim=True)
    rest = -torch.expm1(largest)
    found = rest - p.scatter(-1, place, 0.0).sum(-1, keepdim=True)
    return found.maximum(noise * rest).clamp(min=_LEAST)


def _difference(p, q, x):
    """p - q, given x = log p - log q."""
    return torch.where(x < 0, q * torch.expm1(x), -p * torch.expm1(-x))
