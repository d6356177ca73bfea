"""Calls drawn from a seed, with their truth: every loss in every dtype in turn, most with a gradient, one in eight degenerate.

Of eight seeds in a row the first seven are regular: tokens are kept, advantages differ from 0, and one token at least is inside of
the clip range. The losses take turns over the regular seeds, and a loss has another dtype each time. The eighth seed is degenerate.
"""

import functools
import math
import random
from dataclasses import dataclass

import torch

from grpo_kernels import GRPOLossConfig, reference
from grpo_kernels.losses.config import LOSS_TYPES
from grpo_kernels.losses.covariance import marked_tokens
from grpo_kernels.losses.terms import TERMS, beyond_trust_region
from support import rounding_bounds
from support.objective_calls import prepared

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DEGENERATE = ("no sequences", "no tokens", "nothing kept", "one row", "one column", "no advantage", "no gradient wanted")
REGULAR = len(LOSS_TYPES) * len(DTYPES)
USUAL = REGULAR + (REGULAR - 1) // 7  # seeds from 0 on: each loss in each dtype once, and the degenerate ones between them
MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "sliced", "transposed", "misaligned", "huge stride", "expanded")


@dataclass(frozen=True)
class Draw:
    """Contiguous tensors: hidden and weight in ``dtype``, per-token ones in float64 (float32 numbers, but for a float64 draw)."""

    hidden: torch.Tensor  # [B, T, D]; the logits [B, T, V] where there is no weight
    weight: torch.Tensor | None
    ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor  # [B] or [B, T]
    old: torch.Tensor | None
    ref: torch.Tensor
    num_items: float | None
    config: GRPOLossConfig
    dtype: torch.dtype
    needs: tuple  # whether hidden and weight want a gradient
    kind: str  # regular, or one of DEGENERATE

    @property
    def narrow(self):
        """The dtype of per-token tensors."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def leaves(self):
        return {name: x for name, x in (("hidden", self.hidden), ("weight", self.weight)) if x is not None}

    @property
    def tokens(self):
        """The positional arguments behind the head, and the keywords."""
        return (self.ids, self.advantages, self.mask), dict(old_logps=self.old, ref_logps=self.ref, num_items=self.num_items, config=self.config)


def kind_of(seed):
    """(kind, place among those of its kind)."""
    block, place = divmod(seed, 8)
    return ("regular", 7 * block + place) if place < 7 else (DEGENERATE[block % len(DEGENERATE)], block)


def drawn(seed, with_logits=False):
    """The first draw of this seed whose rounding does not decide which tokens a loss cuts."""
    kind, place = kind_of(seed)
    turn, loss = divmod(place, len(LOSS_TYPES))
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        p = _draw(rng, g, LOSS_TYPES[loss], DTYPES[(loss // 2 + turn) % len(DTYPES)], kind, with_logits)
        if kind != "regular" or _steady(p, g):
            return p


def _draw(rng, g, loss_type, dtype, kind, with_logits):
    B, T = rng.choice([2, 3, 4]), rng.choice([3, 4, 6])
    D, V = rng.choice([1, 2, 5, 16, 33]), rng.choice([2, 7, 64, 101, 300])
    B, T = {"no sequences": (0, T), "no tokens": (B, 0), "one row": (1, 1)}.get(kind, (B, T))
    V = 1 if kind == "one column" else V
    config = _config(rng, loss_type)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    by_call = TERMS[loss_type].scope == "call"
    alike = rng.random() < 0.3 and not by_call  # equal sequences, so that expanded views can stand for them

    def per_token(x):
        return x[:1].expand_as(x).contiguous() if alike and B and rng.random() < 0.6 else x

    # of the logits: at 2, half a unit of a bfloat16 product moves no ratio over a bound of the clip range, nor a gradient by 5 %
    scale = rng.choice([0.3, 1.0, 4.0] if with_logits or dtype != torch.bfloat16 else [0.3, 1.0, 2.0])
    hidden, weight = randn(B, T, D) * scale, None if with_logits else (randn(V, D) / math.sqrt(D)).to(dtype)
    hidden = per_token(randn(B, T, V) * scale if with_logits else hidden).to(dtype)
    ids = per_token(torch.randint(0, V, (B, T), generator=g))
    mask = torch.rand(B, T, generator=g) < rng.choice([0.4, 0.8, 0.8, 1.0])
    if B > 2 and rng.random() < 0.3:
        mask[-1] = False
    mask[:1, :1] = True  # the token that trains whatever else is drawn
    mask = per_token(mask) & (kind != "nothing kept")
    shape = (B, T) if rng.random() < 0.5 else (B,)
    advantages = randn(*shape)
    advantages = advantages.where(advantages.abs() > 0.3, 0.7) * (torch.rand(shape, generator=g) > 0.2)
    advantages[(slice(0, 1),) * len(shape)] = rng.choice([-0.8, 0.9])
    advantages = per_token(advantages) * (kind != "no advantage")

    # far from the bounds of the clip range: rounded logits must not decide on which side of one a token, or a sequence's mean, is
    log_ratio = torch.tensor([-0.9, 0.02, 0.03, -0.02, 0.8], dtype=torch.float64)[torch.randint(0, 5, (B, T), generator=g)]
    log_ratio[:1, :1] = 0.02
    log_ratio = per_token(log_ratio)
    if config.sequence_level or loss_type == "gspo":
        log_ratio = log_ratio[:, :1].expand(B, T)
    if loss_type == "vespo":  # whose weight of a sequence is nothing beyond a sum of 2
        log_ratio = log_ratio / max(T, 1)
    z = hidden.double() if weight is None else hidden.double() @ weight.double().T
    lp, _ = reference.logps_from_logits(z, ids, torch.ones(B, T), config)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    advantages, old, ref = (x.to(narrow).double() for x in (advantages, lp - log_ratio, per_token(lp + 0.1 * randn(B, T))))
    needs = rng.choice([(True, True), (True, True), (True, False), (False, True)]) if weight is not None else (True,)
    return Draw(
        hidden, weight, ids, mask, advantages, old if rng.random() < 0.75 else None, ref, rng.choice([None, 7, 3.5]), config, dtype,
        tuple(need and kind != "no gradient wanted" for need in needs), kind,
    )  # fmt: skip


def _config(rng, loss_type):
    # the cap of cispo is epsilon_high itself; clip_cov cuts all tokens in its range, for which of some it cuts hangs on their bits
    return GRPOLossConfig(
        loss_type=loss_type, importance_sampling_level=rng.choice(["token", "token", "sequence"]),
        epsilon_high=rng.choice([None, 1.6] if loss_type == "cispo" else [None, 0.3]), delta=rng.choice([None, 3.0, 1.7]),
        beta=rng.choice([0.0, 0.1]), use_bias_correction_kl=rng.random() < 0.5, entropy_coef=rng.choice([0.0, 0.0, 0.05]),
        temperature=rng.choice([1.0, 0.8]), softcap=rng.choice([None, None, 8.0]), logit_scale=rng.choice([1.0, 0.5]),
        max_completion_length=8, dro_beta=0.7, clip_cov_ratio=1.0, clip_cov_lb=0.2, clip_cov_ub=2.0, kl_cov_ratio=0.3, ppo_kl_coef=0.6,
    )  # fmt: skip


def _steady(p, g):
    """Whether moved log-probs cut or penalise the same tokens, and not all kept ones; whether the first token is not certain.

    Where all tokens are certain their p - 1 cancels in float32; tests/test_numerics.py has such rows.
    """
    c = p.config
    z = p.hidden.double() if p.weight is None else p.hidden.double() @ p.weight.double().T
    lp, _ = reference.logps_from_logits(z, p.ids, p.mask, c)
    if lp[0, 0] > math.log(0.9):
        return False
    if c.loss_type not in ("dppo_tv", "dppo_kl", "clip_cov", "kl_cov"):
        return True
    inputs = dict(mask=p.mask, advantages=p.advantages, **({} if p.old is None else {"old_logps": p.old}))

    def cut(lp):
        if TERMS[c.loss_type].scope == "call":
            return marked_tokens(lp, prepared(inputs, c), c)[p.mask]
        A = p.advantages if p.advantages.dim() == 2 else p.advantages.unsqueeze(1).expand(lp.shape)
        return beyond_trust_region(lp, lp if p.old is None else p.old, A, c)[p.mask]

    by = 0.04 if p.dtype == torch.bfloat16 else 1e-3
    moved = (lp + by * (2 * torch.rand(lp.shape, generator=g, dtype=lp.dtype) - 1) for _ in range(8))
    return not cut(lp).all() and all(torch.equal(cut(x), cut(lp)) for x in moved)


def laid_out(x, how):
    """The same values in other memory, never in x's own: a backward in place would write over it."""
    x = x.clone(memory_format=torch.contiguous_format)
    if how == "sliced":
        room = torch.full([2 * s + 1 for s in x.shape], 77).to(x.dtype)
        view = room[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if how == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "misaligned":
        return torch.full((x.numel() + 1,), 1).to(x.dtype)[1:].view(x.shape).copy_(x)
    if how == "huge stride" and x.dim() > 1:
        room = torch.empty(x.shape[0], 4096, dtype=x.dtype)
        wide = x.numel() // max(1, x.shape[0])
        return room[:, :wide].copy_(x.reshape(x.shape[0], wide)).view(x.shape) if 0 < wide <= 4096 else x
    if how == "expanded" and x.dim() > 1 and x.shape[0] > 1 and bool((x == x[:1]).all()):
        return x[:1].expand_as(x)
    return x


class Memory:
    """Puts the tensors of one call in memory of a drawn kind each."""

    def __init__(self, seed, backend):
        self.rng = random.Random(f"{seed} {backend}")

    def of(self, x):
        return None if x is None else laid_out(x, self.rng.choice(LAYOUTS))

    def of_leaves(self, p):
        return [self.of(x).detach().requires_grad_(need) for x, need in zip(p.leaves.values(), p.needs, strict=True)]

    def of_tokens(self, p):
        """Draw.tokens, the mask in a drawn dtype."""
        per_token = {name: self.of(None if x is None else x.to(p.narrow)) for name, x in (("old_logps", p.old), ("ref_logps", p.ref))}
        positional = self.of(p.ids), self.of(p.advantages.to(p.narrow)), self.of(p.mask.to(self.rng.choice(MASKS)))
        return positional, dict(per_token, num_items=p.num_items, config=p.config)


@dataclass(frozen=True)
class Truth:
    """name -> result in float64, gradients last, and what rounding may make of each."""

    results: dict
    rounded: list
    sizes: dict


def gradients(leaves, names):
    return {f"gradient of {name}": x.grad for name, x in zip(names, leaves, strict=True) if x.requires_grad}


def named(out):
    """name -> result of a loss."""
    return {"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **{f"metric {k}": v for k, v in out.metrics.items()}}


def exact_loss(p):
    leaves = [x.double().requires_grad_(need) for x, need in zip(p.leaves.values(), p.needs, strict=True)]
    positional, keywords = p.tokens
    weight = leaves[1] if p.weight is not None else torch.eye(p.hidden.shape[-1], dtype=torch.float64)
    return with_gradients(named(reference.grpo_loss(leaves[0], weight, *positional, **keywords)), leaves, p)


def with_gradients(results, leaves, p):
    """The first result goes backward."""
    first = next(iter(results.values()))
    assert first.requires_grad == any(p.needs)
    if first.requires_grad:
        first.backward()
    return results | gradients(leaves, p.leaves)


def total(logps, entropy, coins=None):
    """What stands for a loss of log-probs and entropies alone."""
    return logps.double().sum() + 0.3 * entropy.double().sum(), {}


def exact_logps(p):
    hidden, weight = leaves = [x.double().requires_grad_(need) for x, need in zip(p.leaves.values(), p.needs, strict=True)]
    c = p.config
    z = hidden @ weight.T * c.logit_scale
    z = z if c.softcap is None else c.softcap * torch.tanh(z / c.softcap)
    log_p = (z / c.temperature).log_softmax(-1)
    logps = log_p.gather(-1, p.ids.unsqueeze(-1)).squeeze(-1).where(p.mask, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1).where(p.mask, 0.0)
    return with_gradients(dict(loss=total(logps, entropy)[0], logps=logps, entropy=entropy), leaves, p)


@functools.lru_cache(4)  # the backends of a seed come one behind the other
def loss_and_truth(seed, with_logits=False):
    """(draw, its truth)."""
    p = drawn(seed, with_logits)
    positional, keywords = p.tokens
    sizes = rounding_bounds.sizes_of_kl(p.mask, p.config, p.num_items)
    return p, Truth(exact_loss(p), _rounded(p, rounding_bounds.loss_terms(*positional, **keywords)), sizes)


@functools.lru_cache(4)
def logps_and_truth(seed):
    p = drawn(seed)
    return p, Truth(exact_logps(p), _rounded(p, total), {})


def _rounded(p, terms):
    weight = None if p.weight is None else p.weight.double()
    return rounding_bounds.runs(p.dtype, p.hidden.double(), weight, p.ids, p.mask, p.config, terms)
