"""Seeded problems for tests and benchmarks: every branch of the loss is planted, none is left to chance.

Log-probs of random logits at a large V are so far from random old log-probs that every ratio is clipped and a gradient
of zeros passes. Here the old, reference and sampler's log-probs are made from the policy's own, so that ratios land in
chosen bands below, inside and above the clip range, away from its bounds by more than bf16 logits can move them.
"""

import dataclasses
import math
import os
import random
from dataclasses import dataclass, field

import torch

from grpo_kernels import GRPOLossConfig
from grpo_kernels.engine import operands, plan, products
from grpo_kernels.losses.config import TRL_LOSS_TYPES

# ratios: below, inside and above every clip range drawn here, and beyond every delta
BANDS = ((0.35, 0.7), (0.87, 1.13), (1.35, 1.8), (2.6, 4.5))

# p = 1 / (1 + exp(-gap)) is then within 5e-7 of 1
CONFIDENT_GAP = 14.5
DEVICE = os.environ.get("GRPO_KERNELS_TEST_DEVICE", "cpu")  # where calls are made; problems are drawn on the CPU
HEAD_LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")


@dataclass
class Problem:
    """The arguments of one call; tensors are float64 on the CPU, holding numbers that ``dtype`` can represent."""

    hidden: torch.Tensor  # [B, T, D], or [N, D] when packed
    weight: torch.Tensor  # [V, D]
    completion_ids: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    dtype: torch.dtype = torch.float64
    config: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    bias: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    lora_scale: float = 0.5
    temperature: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    importance_sampling_ratio: torch.Tensor | None = None
    sampling_logps: torch.Tensor | None = None
    num_items: object = None
    cu_seqlens: torch.Tensor | None = None

    @property
    def leaves(self):
        return tuple(name for name in HEAD_LEAVES if getattr(self, name) is not None)

    @property
    def kept(self):
        return int(self.mask.bool().sum())

    def arguments(self, dtype=None, needs=HEAD_LEAVES):
        """(positional, keywords, leaves): fresh tensors; the head in ``dtype``, per-token tensors in float32 or float64."""
        dtype = dtype or self.dtype
        per_token = torch.float64 if dtype == torch.float64 else torch.float32

        def placed(value, dtype=None):
            return value.to(DEVICE, dtype) if isinstance(value, torch.Tensor) else value

        leaves = {n: getattr(self, n).to(DEVICE, dtype, copy=True).requires_grad_(n in needs) for n in self.leaves}
        lora = None if self.lora_a is None else (leaves["lora_a"], leaves["lora_b"], self.lora_scale)
        keywords = dict(config=self.config, num_items=placed(self.num_items), cu_seqlens=placed(self.cu_seqlens),
                        bias=leaves.get("bias"), lora=lora)  # fmt: skip
        for name in ("temperature", "old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps"):
            keywords[name] = placed(getattr(self, name), per_token)
        positional = (leaves["hidden"], leaves["weight"], placed(self.completion_ids), placed(self.advantages, per_token),
                      placed(self.mask))  # fmt: skip
        return positional, keywords, leaves

    def with_config(self, **changes):
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def kept_rows(self):
        return self.mask.bool().flatten().nonzero().squeeze(1).to(DEVICE)


@dataclass
class Result:
    """Everything a call gives back, under one name each."""

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    metrics: dict
    gradients: dict

    def flat(self):
        named = {"loss": self.loss, "logps": self.logps, "entropy": self.entropy}
        named.update({f"metric {k}": v for k, v in self.metrics.items()})
        named.update({f"gradient of {k}": v for k, v in self.gradients.items()})
        return named


def run(function, problem, *, dtype=None, needs=HEAD_LEAVES, scale=1.0, **more) -> Result:
    """Calls a loss on a problem, runs ``(loss * scale).backward()`` and collects what came."""
    positional, keywords, leaves = problem.arguments(dtype, needs)
    out = function(*positional, **{**keywords, **more})
    if out.loss.requires_grad:
        (out.loss * scale).backward()
    gradients = {n: x.grad for n, x in leaves.items() if n in needs}
    return Result(out.loss.detach(), out.logps, out.entropy, out.metrics, gradients)


def with_float32_chunks(monkeypatch, device=plan.DEVICES["h200"]):
    """The loops as a GPU takes them: products of 16-bit inputs write float32, emulated, and the plan is this device's."""
    monkeypatch.setattr(products, "FLOAT32_TILES", ("torch", "triton"))
    monkeypatch.setattr(operands, "device_of", lambda _: device)


def make_problem(
    seed=0, B=4, T=6, D=16, V=37, *, dtype=torch.float64, config=None, on_policy=False, masked=0.25, mask_dtype=torch.bool,
    per_token_advantages=False, zero_advantages=True, all_masked_sequence=True, confident=True, garbage=False,
    bias=False, banned=0, lora=False, temperature=False, ratio=None, sampling=False, num_items=None, spread=2.0,
) -> Problem:  # fmt: skip
    """One problem.

    Args:
        masked: share of tokens masked at random, beside the padding on the right.
        zero_advantages: the first sequence (or every fifth token) has advantage 0.
        all_masked_sequence: the last of three or more sequences has no kept token.
        confident: plant rows with p within 1e-6 of 1 (not possible under a softcap).
        garbage: NaN in every per-token input where the mask is 0.
        banned: number of columns whose bias is -inf; never the sampled token's.
        ratio: None, "sequence" ([B, 1]) or "token" ([B, T]).
        spread: standard deviation of the logits, about.
    """
    config = config or GRPOLossConfig()
    g = torch.Generator().manual_seed(seed)
    work = torch.float64 if V * D < 10**7 else torch.float32  # a benchmark's head in float64 would not fit beside it

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=g, dtype=work) * std

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=g, dtype=work) * (high - low) + low

    def stored(x):
        return x.to(dtype).to(work)

    mask = uniform(0, 1, B, T) >= masked
    lengths = torch.randint(max(1, T // 2), T + 1, (B,), generator=g) if masked else torch.full((B,), T)
    mask &= torch.arange(T) < lengths[:, None]
    if all_masked_sequence and B > 2:
        mask[-1] = False
    ids = torch.randint(0, V, (B, T), generator=g)
    if 2 * banned < V:
        ids %= V - banned
    p = Problem(
        hidden=stored(normal(B, T, D)), weight=stored(normal(V, D, std=spread / math.sqrt(D))), completion_ids=ids,
        advantages=_advantages(normal, B, T, per_token_advantages, zero_advantages), mask=mask.to(mask_dtype), dtype=dtype,
        config=config, num_items=num_items,
    )  # fmt: skip
    if bias or banned:
        p.bias = stored(normal(V, std=0.5))
        if 2 * banned < V:
            p.bias[V - banned :] = -math.inf
    if lora:
        p.lora_a, p.lora_b = stored(normal(3, D, std=D**-0.5)), stored(normal(V, 3))
    if temperature:
        p.temperature = uniform(0.6, 1.8, B, T).float().to(work)
    if confident and config.softcap is None and V > 1 and D >= 4 and T > 1:
        _plant_confident_rows(p, stored)

    lp = policy_logps(p)
    if not on_policy:
        p.old_logps = lp - _log_ratios(g, mask, config, work)
    p.ref_logps = lp + normal(B, T, std=0.5)
    if sampling:
        p.sampling_logps = lp + _drift(uniform, mask, config, B, T)
        p.sampling_logps[:, T // 2] = math.nan if T > 1 else 0.0
    if ratio is not None:
        p.importance_sampling_ratio = uniform(0.3, 1.5, B, 1 if ratio == "sequence" else T)
        if B > 1:
            p.importance_sampling_ratio[B // 2] *= 0.0
    if garbage:
        for name in ("hidden", "old_logps", "ref_logps", "sampling_logps", "temperature", "advantages"):
            value = getattr(p, name)
            if value is not None and value.shape[:2] == mask.shape:
                value[~mask] = math.nan
        p.completion_ids[~mask] = V + 12345
    for name in ("old_logps", "ref_logps", "sampling_logps", "importance_sampling_ratio", "advantages"):
        value = getattr(p, name)
        if value is not None:
            setattr(p, name, value.float().to(work) if dtype != torch.float64 else value)
    return p


def policy_logps(p: Problem, rows=64):
    """[B, T] log-probs by the plain expression, a few rows at a time so that a benchmark's shapes fit too."""
    hidden, ids = p.hidden.reshape(-1, p.hidden.shape[-1]), p.completion_ids.reshape(-1, 1)
    temperature = None if p.temperature is None else p.temperature.reshape(-1, 1)
    out = torch.zeros(hidden.shape[0], dtype=hidden.dtype)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        z = _logits(p, hidden[part], None if temperature is None else temperature[part])
        out[part] = z.log_softmax(-1).gather(1, ids[part]).squeeze(1)
    return out.view(p.completion_ids.shape)


def _logits(p, hidden, temperature):
    c = p.config
    z = hidden @ p.weight.T
    if p.lora_a is not None:
        z = z + p.lora_scale * (hidden @ p.lora_a.T) @ p.lora_b.T
    z = c.logit_scale * (z if p.bias is None else z + p.bias)
    if c.softcap is not None:
        z = c.softcap * torch.tanh(z / c.softcap)
    return z / (c.temperature if temperature is None else temperature)


def _advantages(normal, B, T, per_token, zeros):
    advantages = normal(B, T if per_token else 1)
    advantages = torch.where(advantages.abs() < 0.3, 0.7, advantages)
    advantages[1::2] = -advantages[1::2].abs()
    advantages[2::2] = advantages[2::2].abs()
    if zeros:
        if per_token:
            advantages.view(-1)[::5] = 0.0
        elif B > 1:
            advantages[0] = 0.0
    return advantages if per_token else advantages.squeeze(1)


def _log_ratios(g, mask, config, work):
    """[B, T] values of d = lp - old whose ratios, at the level the config asks for, walk through the bands."""
    B, T = mask.shape

    def banded(*shape):
        band = torch.tensor(BANDS, dtype=work)[torch.randint(0, len(BANDS), shape, generator=g)]
        low, high = band.log().unbind(-1)
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=work)

    if config.loss_type == "vespo":
        return banded(B, T) / max(T, 1)  # vespo adds them up; phi is nothing beyond a sum of 2
    if not config.sequence_level:
        return banded(B, T)
    noise = torch.randn(B, T, generator=g, dtype=work) * 0.3
    kept = mask.to(work)
    noise = noise - (noise * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return banded(B, 1) + noise


def _drift(uniform, mask, config, B, T):
    """sampler's minus policy's log-probs: sequences on either side of the off-policy threshold by at least 0.1."""
    side = torch.where(torch.arange(B).unsqueeze(1) % 4 < 2, 0.3, -0.3)
    return (config.off_policy_mask_threshold or 0.0) + side + uniform(-0.1, 0.1, B, T)


def _plant_confident_rows(p, stored):
    """Scales one row in each of two sequences along the longest row of the head, which is then its own arg max."""
    usable = p.weight.norm(dim=1)
    if p.bias is not None:
        usable = usable.where(p.bias.isfinite(), -1.0)
    token = int(usable.argmax())
    for b in {0, p.mask.shape[0] // 2}:
        t = int(p.mask[b].bool().int().argmax()) if p.mask[b].any() else 0
        temperature = None if p.temperature is None else p.temperature[b, t].view(1, 1)
        sign = math.copysign(1.0, p.config.logit_scale)
        low, high = 0.0, 200.0
        for _ in range(60):
            middle = (low + high) / 2
            z = _logits(p, sign * middle * p.weight[token].unsqueeze(0), temperature)[0]
            rest = torch.cat([z[:token], z[token + 1 :]]).logsumexp(0)
            low, high = (middle, high) if z[token] - rest < CONFIDENT_GAP else (low, middle)
        p.hidden[b, t] = stored(sign * high * p.weight[token])
        p.completion_ids[b, t] = token


def packed(p: Problem, seed=0) -> Problem:
    """The same problem without the columns right of each sequence's end, tokens laid end to end.

    Per-token advantages of as many tokens as sequences would read as one per sequence: such a problem stays padded.
    """
    B, T = p.mask.shape
    g = torch.Generator().manual_seed(seed)
    last = (p.mask.bool() * torch.arange(1, T + 1)).amax(1) if T else torch.zeros(B, dtype=torch.long)
    lengths = torch.minimum(last + torch.randint(0, 2, (B,), generator=g), torch.tensor(T))
    if p.advantages.dim() == 2 and lengths.sum() == B:
        return p
    inside = torch.arange(T) < lengths[:, None]
    per_token = ("hidden", "completion_ids", "mask", "temperature", "old_logps", "ref_logps", "sampling_logps")
    changes = {n: getattr(p, n)[inside] for n in per_token if getattr(p, n) is not None}
    for name in ("advantages", "importance_sampling_ratio"):
        value = getattr(p, name)
        if value is not None and value.dim() == 2 and (name == "advantages" or value.shape[1] != 1):
            changes[name] = value[inside]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return dataclasses.replace(p, cu_seqlens=cu_seqlens, **changes)


def draw_config(rng: random.Random, tokens=0, **fixed) -> GRPOLossConfig:
    """Random options. ``tokens`` keeps the entropy quantile off the ranks where rounding would decide who is in."""
    quantile = 1.0
    if rng.random() < 0.25:
        quantile = rng.choice([0.0, 0.31, 0.57, 0.83])
        rank = (1 - quantile) * max(tokens - 1, 0)
        if quantile > 0 and not 0.02 < rank % 1 < 0.98:
            quantile = 1.0
    options = dict(
        loss_type=rng.choice(TRL_LOSS_TYPES),
        importance_sampling_level=rng.choice(["token", "token", "sequence"]),
        epsilon=rng.choice([0.2, 0.25]),
        epsilon_high=rng.choice([None, 0.28, 0.2, 2.1, 5.5]),
        delta=rng.choice([None, None, 0.79, 1.24, 2.2, 6.0]),
        beta=rng.choice([0.0, 0.0, 0.04, -0.3]),
        use_bias_correction_kl=rng.random() < 0.5,
        temperature=rng.choice([1.0, 0.7, 1.5]),
        logit_scale=rng.choice([1.0, 1.0, 0.6, -1.3]),
        softcap=rng.choice([None, None, 4.0, 30.0]),
        entropy_coef=rng.choice([0.0, 0.0, 0.02, -0.3]),
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=rng.choice([None, None, None, 0.1]),
        max_completion_length=rng.choice([7, 20]),
        sapo_temperature_pos=rng.choice([1.0, 0.7]),
        sapo_temperature_neg=rng.choice([1.05, 2.3]),
        vespo_k_pos=rng.choice([2.0, 1.3]),
        vespo_lambda_pos=rng.choice([3.0, 1.1]),
        vespo_k_neg=rng.choice([3.0, 0.4]),
        vespo_lambda_neg=rng.choice([2.0, 0.9]),
    )
    return GRPOLossConfig(**{**options, **fixed})


def draw_problem(seed, dtype=torch.float64, **fixed) -> Problem:
    """A random problem with random options: what the parity tests run by the hundred. ``fixed`` are config fields."""
    rng = random.Random(seed)
    masked = rng.choice([0.0, 0.25, 0.6])
    shape = dict(B=rng.choice([1, 2, 4, 5]), T=rng.choice([1, 2, 6, 9]), D=rng.choice([4, 8, 16]),
                 V=rng.choice([1, 2, 17, 37, 64, 101]))  # fmt: skip
    banned = rng.choice([0, 0, 2])
    arguments = dict(
        **shape, dtype=dtype, masked=masked, on_policy=rng.random() < 0.35, bias=rng.random() < 0.3, banned=banned,
        mask_dtype=rng.choice([torch.bool, torch.int64, torch.float32]), per_token_advantages=rng.random() < 0.3,
        all_masked_sequence=rng.random() < 0.6, garbage=rng.random() < 0.5, lora=rng.random() < 0.25,
        temperature=rng.random() < 0.25, ratio=rng.choice([None, None, "sequence", "token"]), sampling=rng.random() < 0.5,
        num_items=rng.choice([None, None, 7.5, torch.tensor(11), torch.tensor(0.25)]),
    )  # fmt: skip
    # the mask does not depend on the config, and the config needs the number of kept tokens
    tokens = make_problem(seed, **arguments).kept
    config = draw_config(rng, tokens, **fixed)
    if banned:  # a negative scale would turn the bias of -inf into +inf
        config = dataclasses.replace(config, logit_scale=abs(config.logit_scale))
    p = make_problem(seed, **arguments, config=config)
    return packed(p, seed) if rng.random() < 0.25 else p
