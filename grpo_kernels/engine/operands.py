"""What the loops are handed: the head, the rows, and what is wanted of them; how these cross the boundary of an op."""

import functools
import json
from dataclasses import dataclass, fields

import torch

from ..distributed import VocabShard
from ..losses.config import GRPOLossConfig, LogitTransform
from ..losses.terms import PolicyRows
from .plan import Plan, Problem, device_of
from .plan import plan as make_plan
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
class Rows:
    """The rows of a call: hidden of all tokens, which of them are computed, and their per-row tensors, in the order of ``index``."""

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
    """What a call wants besides its tensors, and where it runs; one string at the boundary of an op."""

    transform: LogitTransform
    backend: str
    budget: int  # bytes of workspace
    needs: tuple[bool, ...]  # which gradients are wanted, of (hidden, weight, bias, lora A, lora B)
    lora_scale: float = 1.0
    shard: VocabShard | None = None
    config: GRPOLossConfig | None = None  # one pass: the loss; None: the gradient of the log-prob itself
    linear: bool = False  # the coefficients are given, see `losses.objective.linear_coefficients`
    diagnostics: tuple[bool, ...] = (False,) * 3

    @property
    def needs_weight(self):
        return self.needs[1] or self.needs[2] or self.needs[4]


def encoded(work: Work) -> str:
    """The string that `decoded` reads; torch.compile, which knows nothing of JSON, sees a function of plain constants."""
    values = []
    for value in (getattr(work, name) for name in _FIELDS):
        plain = value is None or isinstance(value, (str, int, float, tuple))
        values.append(value if plain else tuple([getattr(value, name) for name in _NESTED[type(value)]]))
    return _joined(*values)


@torch.compiler.assume_constant_result
def _joined(*values):
    return json.dumps(values)


@torch.compiler.assume_constant_result
def decoded(work: str) -> Work:
    return _decoded(work)


@functools.lru_cache(1024)
def _decoded(work):
    values = dict(zip(_FIELDS, json.loads(work), strict=True))
    for name, kind in (("transform", LogitTransform), ("shard", VocabShard), ("config", GRPOLossConfig)):
        values[name] = None if values[name] is None else kind(*values[name])
    return Work(**values)


_FIELDS = tuple(field.name for field in fields(Work))
_NESTED = {kind: tuple(field.name for field in fields(kind)) for kind in (LogitTransform, VocabShard, GRPOLossConfig)}


def can_sync(like) -> bool:
    """False under torch.compile and while a CUDA graph is captured: nothing may synchronise with the host then."""
    if torch.compiler.is_compiling():
        return False
    return not (getattr(like, "is_cuda", False) and torch.cuda.is_current_stream_capturing())


def plan_of(weight, work: Work, live, dead, two_phases=False) -> Plan:
    """The plan of a call; all ranks of a sharded vocabulary plan with its widest part, so that they cut the rows alike."""
    vocab = weight.shape[0] if work.shard is None else work.shard.widest
    return make_plan(
        Problem(
            live=live, dead=dead, vocab=vocab, depth=weight.shape[1], element_size=weight.element_size(),
            tile_size=tile_dtype(weight, work.backend).itemsize, needs_hidden=work.needs[0], needs_weight=work.needs_weight,
            budget=work.budget, two_phases=two_phases, device=device_of(weight.device),
        )
    )  # fmt: skip
