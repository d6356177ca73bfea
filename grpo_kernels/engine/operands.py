"""The inputs of the loops in chunks.py: the head, the rows, and the outputs that are wanted; and how these pass through an op."""

import functools
import json
from dataclasses import dataclass, fields

import torch

from ..backends.comparison import DivergenceKind
from ..distributed import VocabShard
from ..losses.config import GRPOLossConfig, LogitTransform
from ..losses.terms import PolicyRows
from ..tracing import constant
from .fixed_order import fixed_products
from .plan import Problem, device_of
from .products import tile_dtype


@dataclass(frozen=True)
class Head:
    """The head's tensors: z = h W^T + lora_scale (h A^T) B^T + bias. In a vocabulary-parallel group this rank's rows of them."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None = None  # [V]
    lora_a: torch.Tensor | None = None  # [r, D]
    lora_b: torch.Tensor | None = None  # [V, r]

    @property
    def tensors(self):
        return self.weight, self.bias, self.lora_a, self.lora_b


@dataclass(frozen=True)
class Teacher:
    """What a call compares its rows with: y = teacher_hidden teacher_weight^T + bias. It gets no gradient."""

    hidden: torch.Tensor  # [M, D'], the same rows
    weight: torch.Tensor  # [V, D'], of any float dtype
    bias: torch.Tensor | None = None  # [V]

    @property
    def tensors(self):
        return [self.hidden, self.weight, self.bias]


@dataclass(frozen=True)
class Rows:
    """The rows of a call: hidden of all tokens, which of them are computed, and per-row tensors in the order of ``index``."""

    hidden: torch.Tensor  # [M, D]
    index: torch.Tensor  # [N] int64 into the tokens: the kept rows, those that need a gradient (the live ones) in front
    live: int
    target: torch.Tensor  # [N] int64, relative to this rank's first row of the vocabulary
    temperature: torch.Tensor | None = None  # [N] acc
    policy: PolicyRows | None = None  # of the live rows: what their coefficient is made of

    @property
    def tensors(self):
        vectors = () if self.policy is None else vars(self.policy).values()
        return [self.index, self.target, self.temperature, *vectors]

    @staticmethod
    def of(hidden, tensors, live):
        index, target, temperature, *vectors = tensors
        return Rows(hidden, index, live, target, temperature, PolicyRows(*vectors) if vectors else None)


@dataclass(frozen=True)
class Work:
    """What a call wants besides its tensors, and where it runs; numbers and a string at the boundary of an op."""

    transform: LogitTransform
    backend: str
    budget: int  # bytes of workspace
    needs: tuple[bool, ...]  # which gradients are wanted, of (hidden, weight, bias, lora A, lora B)
    lora_scale: float = 1.0
    shard: VocabShard | None = None
    config: GRPOLossConfig | None = None  # one pass: the loss; None: the gradient of the log-prob itself
    linear: bool = False  # the coefficients are given, see `losses.objective.linear_coefficients`
    diagnostics: tuple[bool, ...] = (False,) * 5  # of `diagnostics.NAMES`, and the variance of log p
    divergence: DivergenceKind | None = None  # from a `Teacher`; one pass: its gradient is ``rows.policy.w_kl``
    teacher_transform: LogitTransform | None = None
    batch_invariant: bool | None = False  # products in an order that no shape changes; None: where that is free
    own_statistics: bool = False  # beside a teacher: a row is scored as without one, by one more read of its tile

    @property
    def needs_weight(self):
        return self.needs[1] or self.needs[2] or self.needs[4]

    @property
    def needs_squares(self):
        return self.diagnostics[0] or self.diagnostics[3]


def encoded(work: Work) -> tuple[list[float], str]:
    """What `decoded` reads: the numbers, which may be symbols under torch.compile, and everything else as one string."""
    numbers = []
    return numbers, _joined(*[_without_numbers(getattr(work, name), numbers) for name in FIELDS])


def _without_numbers(value, numbers):
    if type(value) in _NESTED:
        return tuple([_without_numbers(getattr(value, name), numbers) for name in _NESTED[type(value)]])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    numbers.append(value * 1.0)
    return "#int" if isinstance(value, int) else "#float"


@constant  # which would trace the writing of JSON
def _joined(*values):
    return json.dumps(values)


@functools.lru_cache(1024)
def decoded(numbers: tuple[float, ...], work: str) -> Work:
    rest = iter(numbers)

    def restored(value, kind=None):
        if isinstance(value, list):
            parts = [restored(part) for part in value]
            return tuple(parts) if kind is None else kind(*parts)
        return {"#int": int, "#float": float}[value](next(rest)) if value in ("#int", "#float") else value

    values = {name: restored(value, _KINDS.get(name)) for name, value in zip(FIELDS, json.loads(work), strict=True)}
    return Work(**values)


FIELDS = tuple(field.name for field in fields(Work))
_KINDS = {"transform": LogitTransform, "shard": VocabShard, "config": GRPOLossConfig, "divergence": DivergenceKind,
          "teacher_transform": LogitTransform}  # fmt: skip
_NESTED = {kind: tuple(field.name for field in fields(kind)) for kind in _KINDS.values()}


def can_sync(like) -> bool:
    """False under torch.compile and while a CUDA graph is captured: nothing may synchronise with the host then."""
    if torch.compiler.is_compiling():
        return False
    return not (getattr(like, "is_cuda", False) and torch.cuda.is_current_stream_capturing())


def problem_of(weight, work: Work, live, dead, two_phases=False, teacher=()) -> Problem:
    """What a call asks of the planner; all ranks of a sharded vocabulary plan with its widest part, so that they cut rows alike.

    ``teacher``: `Teacher.tensors`, or nothing.
    """
    vocab = weight.shape[0] if work.shard is None else work.shard.widest
    return Problem(
        live=live, dead=dead, vocab=vocab, depth=weight.shape[1], element_size=weight.element_size(),
        tile_size=tile_dtype(weight, work.backend).itemsize, needs_hidden=work.needs[0], needs_weight=work.needs_weight,
        budget=work.budget, two_phases=two_phases, device=device_of(weight.device), sums_weight=work.needs[1],
        teacher_depth=teacher[1].shape[1] if teacher else 0, teacher_size=teacher[1].element_size() if teacher else 0,
        mixes=work.divergence is not None and work.divergence.kind == "jsd",
        fixed=fixed_products(work.batch_invariant, weight),
    )  # fmt: skip
