"""Who computes the loss: a function problem -> a call without arguments that returns a `Result`.

What is made in the function is not timed; everything the call does is. A provider that cannot run, or not this workload, raises
`Absent` with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import backends
from ..divergence import fused_linear_distillation_loss
from ..logprobs import linear_logprobs
from ..loss import fused_linear_grpo_loss
from ..support import TokenSupport
from . import clock as clocks
from . import peers
from .floor import Floor
from .peers import Absent
from .problem import Problem, Result

PRODUCTS, OURS, FULL, TRL, LIGER = "products", "grpo_kernels", "full_logits", "trl", "liger"


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Problem], Callable[[], Result]]
    quick: bool = False  # in a quick run unless others are asked for
    logits: int = 0  # bytes of every logit of a head that are in memory together
    settings: dict = field(default_factory=dict)
    note: str | None = None  # what it was asked to do where that is not obvious

    @property
    def ours(self):
        return self.name.startswith(OURS)


def ours(backend="auto", batch_invariant=None):
    def make(p):
        try:
            resolved = backends.resolve(backend, p.hidden.device, p.hidden.dtype, p.shape.vocab)
        except RuntimeError as reason:
            raise Absent(str(reason)) from reason

        def fresh():
            # it remembers what the first call finds when it looks at the values, as only one call of a batch does
            return None if p.support is None else TokenSupport(p.support.ids, p.support.offsets)

        def logprobs():
            with torch.no_grad():
                out = linear_logprobs(p.hidden, p.weight, p.ids, mask=p.mask, backend=resolved, support=fresh(),
                                      batch_invariant=batch_invariant)  # fmt: skip
            return Result(logps=out.logps, entropy=out.entropy)

        def loss():
            hidden, weight = p.leaves()
            out = fused_linear_grpo_loss(
                hidden, weight, p.ids, p.advantages, p.mask, old_logps=p.old_logps, ref_logps=p.ref_logps, config=p.config,
                backend=resolved, support=fresh(), batch_invariant=batch_invariant,
            )  # fmt: skip
            out.loss.backward()
            return Result(out.loss.detach(), out.logps, hidden.grad, weight.grad, out.entropy)

        def divergence():
            hidden, weight = p.leaves()
            out = fused_linear_distillation_loss(hidden, weight, p.teacher_hidden, p.teacher_weight, mask=p.mask, backend=resolved)
            out.loss.backward()
            return Result(out.loss.detach(), None, hidden.grad, weight.grad, out.entropy)

        if p.heads == 2:
            if batch_invariant is not None:
                raise Absent("batch_invariant is no option of a divergence")
            return divergence
        return loss if p.workload.gradients else logprobs

    return make


_SCORES_ONLY = "asked for log-probs per token, under our objective in PyTorch"
PROVIDERS = {
    p.name: p
    for p in (
        Provider(PRODUCTS, lambda p: Floor(p, clocks.of(p.hidden.device.type)), quick=True),
        Provider(OURS, ours(), quick=True),
        *(Provider(f"{OURS}-{name}", ours(name)) for name in backends.available_backends()),
        Provider(f"{OURS}-invariant", ours(batch_invariant=True), note="batch_invariant=True"),
        Provider(f"{OURS}-any-order", ours(batch_invariant=False), note="batch_invariant=False: the libraries' products alone"),
        Provider(FULL, peers.full_logits, quick=True, logits=14),
        Provider("full_logits-compiled", lambda p: peers.full_logits(p, compiled=True), logits=14),
        Provider(TRL, peers.trl, quick=True, settings={"columns": peers.TRL_COLUMNS},
                 note=f"{_SCORES_ONLY}; over supports: full logits, masked; beside a teacher: its divergences"),
        Provider(LIGER, peers.liger, quick=True, settings={"compiled": False, "chunk_rows": peers.LIGER_ROWS}),
        Provider("liger-logits", peers.liger_from_logits, logits=8),
        Provider("verl", peers.verl, note=_SCORES_ONLY),
        Provider("cce", lambda p: peers.cross_entropy(p, "cut_cross_entropy", "cpu"), note=_SCORES_ONLY,
                 settings={"filter_eps": "default"}),
        Provider("torch-lce", lambda p: peers.cross_entropy(p, "torch.nn.functional"), logits=14,
                 note=f"{_SCORES_ONLY}; options=None, its reference path"),
    )
}  # fmt: skip


def default_names(quick, device):
    """All of them, our backends only where they are not what "auto" takes; a quick run has a few."""
    resolved = backends.resolve("auto", device, torch.bfloat16)
    return [name for name, p in PROVIDERS.items() if (p.quick or not quick) and name != f"{OURS}-{resolved}"]
