"""A call, described once: its arguments checked, and from them the head, the rows, and what is wanted of them.

Shapes, types, devices and combinations cost nothing to check. Values (token ids, mask, advantages, temperature) need a look at
the data: every such check is a count, and the counts are read together with those of the rows in one host synchronisation.
"""

import math
import numbers
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch

from . import backends
from .distributed import (
    QuantileOnly,
    VocabShard,
    gathered_sequence,
    group_in_use,
    group_of,
    of_dtensors,
    token_count,
    top_tokens_over_ranks,
    validate_across_ranks,
)
from .engine.operands import Head, Rows, Work, can_sync
from .engine.plan import default_budget
from .engine.products import accumulation_dtype
from .engine.temperature import with_temperature_gradient
from .losses.config import GRPOLossConfig
from .losses.objective import depends_on_its_row_alone, evaluate, known_zero, linear_coefficients, prepare, weighed_over
from .losses.terms import PolicyRows

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Reduction = Literal["loss_type", "none"]
Backend = Literal["auto", "torch", "cpu", "triton", "cuda"]
BACKENDS = get_args(Backend)
_DIVIDED_BY_ITEMS = ("dapo", "cispo", "vespo")
_BAD_VALUES = (
    "mask must hold only 0 and 1, got other values at {} positions",
    "token ids must be in [0, V = {vocab}) where the mask is 1, got others at {} positions (completion_ids / token_ids); "
    "ids of -100 need a mask of 0: mask=(ids != -100)",
    "advantages must be finite where the mask is 1, got nan or inf at {} positions",
    "temperature must be > 0 and finite where the mask is 1, got others at {} positions",
    "cu_seqlens must rise from 0 to N without falling, got {} ends that do not",
)


class LogProbs(NamedTuple):
    """Log-probs of the given tokens and entropies of their distributions, both differentiable; 0 where masked."""

    logps: torch.Tensor
    entropy: torch.Tensor


class LogProbsAndLse(NamedTuple):
    """`LogProbs`, and the log-sum-exp of the logits, differentiable too; 0 where masked."""

    logps: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor


class GRPOLossOutput(NamedTuple):
    """``loss`` 0-dim (per token with ``reduction="none"``), differentiable; ``metrics`` name -> 0-dim tensor.

    ``logps`` and ``entropy`` are per token and detached: a term made of them trains nothing, unless the call was given
    ``differentiable_logps=True``.
    """

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    metrics: dict[str, torch.Tensor]

    @staticmethod
    def of(loss, logps, entropy, metrics, differentiable_logps):
        return GRPOLossOutput(loss, *(x if differentiable_logps else x.detach() for x in (logps, entropy)), metrics)

    def __repr__(self):
        note = "" if self.logps.requires_grad else "  # logps and entropy are detached; differentiable_logps=True keeps their graph"
        return f"GRPOLossOutput({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())}){note}"


@dataclass(frozen=True)
class TokenArguments:
    """What the public functions take of tokens and head; ``checked`` has them with a head as this rank's tensors, cast once."""

    hidden: torch.Tensor  # or logits, for `grpo_loss_from_logits`: the weight is then None
    weight: torch.Tensor | None
    completion_ids: torch.Tensor
    mask: torch.Tensor | None
    config: GRPOLossConfig = GRPOLossConfig()  # noqa: RUF009 - frozen
    bias: torch.Tensor | None = None
    temperature: torch.Tensor | None = None  # per token
    lora: tuple | None = None
    vocab_parallel_group: Any = None
    sequence_parallel: bool = False
    workspace_bytes: int | None = None
    backend: str = "auto"
    kept_rows: torch.Tensor | None = None
    data_parallel_group: Any = None
    options: dict | None = None  # of a config that is yet to be validated
    return_lse: bool = False

    ids_name = "token_ids"
    entropy_has_gradient = True  # or may have one

    def checked(self):
        if self.options is not None:
            return replace(self, config=GRPOLossConfig(**self.options), options=None).checked()
        hidden, weight, bias, lora = self.hidden, self.weight, self.bias, self.lora
        if weight is not None:
            hidden, weight, bias, lora = check_head(hidden, weight, bias, lora, self.vocab_parallel_group)
        check_options(self.config, self.workspace_bytes, self.backend)
        if not isinstance(self.return_lse, bool):
            raise TypeError(f"return_lse must be True or False, got {kind(self.return_lse)}")
        tokens, device = self.token_shape(hidden), hidden.device
        _tensor(self.ids_name, self.completion_ids, device, (torch.int64,))
        _shape(self.ids_name, self.completion_ids, tokens)
        if self.mask is not None or self.ids_name == "completion_ids":
            _check_mask(self.mask, tokens, device)
        temperature = self.temperature
        if isinstance(temperature, numbers.Real):
            raise TypeError(
                f"temperature must be a tensor {list(tokens)}, got {kind(temperature)}; a number goes into config.temperature"
            )
        if temperature is not None:
            _tensor("temperature", temperature, device, FLOAT_DTYPES)
            _shape("temperature", temperature, tokens, ())
            temperature = temperature.expand(tokens)
        _no_gradient("mask", self.mask)
        mask = torch.ones(tokens, dtype=torch.bool, device=device) if self.mask is None else self.mask
        return replace(self, hidden=hidden, weight=weight, bias=bias, lora=lora, mask=mask, temperature=temperature)

    @property
    def temperature_has_gradient(self):
        return self.temperature is not None and torch.is_grad_enabled() and self.temperature.requires_grad

    def token_shape(self, hidden):
        """The shape of every per-token tensor."""
        return hidden.shape[:-1]

    def given(self, *names):
        """Those of the names that are given."""
        return [name for name in names if getattr(self, name) is not None]

    def facts(self):
        """What must be the same on all ranks of a vocab_parallel_group, beside the head."""
        return {"which tensors are given": self.given("mask", "bias", "temperature"), "return_lse": int(self.return_lse)}


@dataclass(frozen=True)
class LossArguments(TokenArguments):
    """The arguments of `fused_linear_grpo_loss`, `reference.grpo_loss` and `grpo_loss_from_logits`, by their names."""

    advantages: torch.Tensor = None
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    importance_sampling_ratio: torch.Tensor | None = None
    sampling_logps: torch.Tensor | None = None
    num_items: Any = None
    cu_seqlens: torch.Tensor | None = None
    differentiable_logps: bool = False
    reduction: str = "loss_type"

    ids_name = "completion_ids"

    @property
    def entropy_has_gradient(self):
        return self.differentiable_logps or self.config.entropy_coef != 0

    def checked(self):
        args = super().checked()
        tokens, device = args.mask.shape, args.mask.device
        sequences = tokens[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        _tensor("advantages", self.advantages, device, FLOAT_DTYPES)
        _shape("advantages", self.advantages, (sequences,), tokens)
        for name in self.given("old_logps", "ref_logps", "sampling_logps", "importance_sampling_ratio"):
            _tensor(name, getattr(self, name), device, FLOAT_DTYPES)
            per_sequence = [(sequences, 1)] if name == "importance_sampling_ratio" else []
            _shape(name, getattr(self, name), *per_sequence, tokens)
        if self.config.beta != 0 and self.ref_logps is None:
            raise ValueError(f"ref_logps must be given when beta != 0 (beta = {self.config.beta}), got None")
        _check_num_items(self.num_items, self.config)
        self._refuse_lost_gradients()
        if not isinstance(self.differentiable_logps, bool):
            raise TypeError(f"differentiable_logps must be True or False, got {kind(self.differentiable_logps)}")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be {' or '.join(map(repr, get_args(Reduction)))}, got {self.reduction!r}")
        if (rows := self.kept_rows) is not None:
            _tensor("kept_rows", rows, device, (torch.int64,))
            if rows.dim() != 1 or rows.numel() > self.mask.numel():
                raise ValueError(f"kept_rows must be 1-D with at most {self.mask.numel()} indices, got {list(rows.shape)}")
        group = self.data_parallel_group
        check_group("data_parallel_group", group.group if isinstance(group, QuantileOnly) else group)
        return args

    def _refuse_lost_gradients(self):
        """What the loss reads is a constant of it; what it does not read is ignored."""
        unread = {
            "ref_logps": self.config.beta == 0, "sampling_logps": self.config.off_policy_mask_threshold is None,
            "num_items": self.config.aggregation not in _DIVIDED_BY_ITEMS,
        }  # fmt: skip
        for name in ("advantages", "old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps", "num_items"):
            if not unread.get(name):
                _no_gradient(name, getattr(self, name))

    def token_shape(self, hidden):
        """[B, T], or [N] in the packed layout."""
        name, last = ("hidden", "D") if self.weight is not None else ("logits", "V")
        _tensor(name, hidden, None, FLOAT_DTYPES)
        if hidden.shape[-1:] == (0,):
            raise ValueError(f"{name} must have a vocabulary of at least 1, got {list(hidden.shape)}")
        if self.cu_seqlens is None:
            if hidden.dim() != 3:
                raise ValueError(f"{name} must be [B, T, {last}] (or [N, {last}] with cu_seqlens), got {list(hidden.shape)}")
            return hidden.shape[:2]
        _tensor("cu_seqlens", self.cu_seqlens, hidden.device, (torch.int32, torch.int64))
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must be [B + 1], got {list(self.cu_seqlens.shape)}")
        if hidden.dim() != 2:
            raise ValueError(f"{name} must be [N, {last}] with cu_seqlens, got {list(hidden.shape)}")
        return hidden.shape[:1]

    def facts(self):
        return {
            "which tensors are given": self.given("bias", "old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps",
                                                  "num_items", "temperature", "cu_seqlens"),
            "config": repr(self.config), "shape of advantages": list(self.advantages.shape),
            "length of kept_rows": -1 if self.kept_rows is None else self.kept_rows.numel(),
            "sequence_parallel": int(self.sequence_parallel),
            "differentiable_logps and reduction": repr((self.differentiable_logps, self.reduction)),
        }  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A described call: what the engine is handed, and how its answers become [..] tensors."""

    head: Head
    rows: Rows
    work: Work
    mask: torch.Tensor
    correction: torch.Tensor | None  # 0-dim, to add to log-probs: NaN if a value was bad; None where that was raised
    loss: "TokenLoss | None"
    temperature: torch.Tensor | None = None  # like mask, where it wants a gradient

    def per_token(self, logps, entropy, found, lse=None):
        """What `row_logprobs` has found as (logps, entropy, lse) of the shape of mask, differentiable in the temperature too."""
        logps, entropy, lse = (None if x is None else self.scatter(x) for x in (logps, entropy, lse))
        if self.temperature is None:
            return logps, entropy, lse
        variance = self.scatter(found[:, -1]) if self.work.diagnostics[-1] else None
        return with_temperature_gradient(logps, entropy, self.temperature, self.mask, variance, lse)

    @property
    def one_pass(self):
        """Whether the gradients are ready when the forward ends."""
        return self.rows.policy is not None

    def scatter(self, values):
        """[N] -> the shape of mask, 0 elsewhere; differentiable."""
        full = values.new_zeros(self.mask.numel()).index_copy(0, self.rows.index, values).view(self.mask.shape)
        return full if self.correction is None else (full + self.correction).where(self.mask.bool(), 0.0)


def describe(args: TokenArguments, diagnostics=(False,) * 3, sums_hidden=True) -> Call:
    """Checks a call and describes it. Ranks that share a vocabulary or a mean hear of a refusal; a single process never asks."""
    refuse_transforms(args)
    check_group("vocab_parallel_group", args.vocab_parallel_group)
    group = group_of(args.weight, args.vocab_parallel_group)
    wait = args.kept_rows is None and can_sync(args.hidden)
    with validate_across_ranks(group_in_use(args.config, args.data_parallel_group) if wait else None, args.hidden,
                               "data_parallel_group"):  # fmt: skip
        hidden = gathered_sequence(args.hidden, group) if args.sequence_parallel else args.hidden
        with validate_across_ranks(group, hidden) as meeting:
            hidden, weight, bias, lora = of_dtensors(hidden, args.weight, args.bias, args.lora, group)
            args = replace(args, hidden=hidden, weight=weight, bias=bias, lora=lora, vocab_parallel_group=group).checked()
            variance = args.temperature_has_gradient and args.entropy_has_gradient
            head, work = _head_and_work(args, (*map(bool, diagnostics), variance))
            if group is not None and any(diagnostics):
                raise ValueError("diagnostics must be empty with a vocab_parallel_group")
            if group is not None:
                _bring_facts(meeting, args, work)
            loss = TokenLoss(args, wait) if isinstance(args, LossArguments) else None
        if group is not None:
            work = replace(work, shard=VocabShard.of(meeting, sums_hidden and not args.sequence_parallel))
        call = _with_rows(args, head, work, loss, wait)
    if loss is None:
        return call
    loss.weigh()
    two_phases = args.differentiable_logps or args.temperature_has_gradient or args.reduction == "none" or not any(work.needs)
    if two_phases or not depends_on_its_row_alone(args.config, on_policy=args.old_logps is None):
        return call
    policy, linear = loss.coefficients(call.rows.index[: call.rows.live])
    return replace(call, rows=replace(call.rows, policy=policy), work=replace(work, config=args.config, linear=linear))


def refuse_transforms(args):
    if torch.compiler.is_compiling():
        return
    for name, x in vars(args).items():
        if isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise TypeError(
                f"{name} must be a plain tensor, got one inside of a torch.func transform (vmap, grad, jvp): the fused ops have no "
                "rules for these; reference.grpo_loss takes them"
            )


def _head_and_work(args, diagnostics):
    a, b, scale = (None, None, 1.0) if args.lora is None else args.lora
    head, weight = Head(args.weight, args.bias, a, b), args.weight
    grad = torch.is_grad_enabled()
    return head, Work(
        transform=args.config.transform,
        backend=backends.resolve(args.backend, weight.device, weight.dtype, weight.shape[0]),
        budget=default_budget(weight.device.type) if args.workspace_bytes is None else int(args.workspace_bytes),
        needs=tuple(grad and x is not None and x.requires_grad for x in (args.hidden, *head.tensors)),
        lora_scale=float(scale),
        diagnostics=diagnostics,
    )


def _bring_facts(meeting, args, work):
    """To the other ranks: what must be the same on all, and this rank's rows of the vocabulary."""
    if not can_sync(args.weight):
        raise RuntimeError("vocab_parallel_group cannot be used under torch.compile or while a CUDA graph is captured")
    t = work.transform
    meeting.own_rows = args.weight.shape[0]
    meeting.facts = {
        "rows of hidden": args.hidden.shape[:-1].numel(), "depth of hidden": args.hidden.shape[-1],
        "dtype": str(args.weight.dtype), "workspace_bytes": work.budget,
        "which tensors need a gradient": str([*work.needs, args.temperature_has_gradient]),
        "temperature and factors": [work.lora_scale, t.logit_scale, t.softcap or 0.0, t.temperature],
        "rank of the adapter": 0 if args.lora is None else args.lora[0].shape[0], **args.facts(),
    }  # fmt: skip


def _with_rows(args, head, work, loss, wait):
    """Chooses the rows that are computed, those that need a gradient in front, and raises what the checks of values found.

    Nothing synchronises when ``kept_rows`` is given, under torch.compile or while a CUDA graph is captured: then every row is taken
    as live, and bad values become the NaN ``correction``.
    """
    mask, shard = args.mask, work.shard
    vocab = args.weight.shape[0] if shard is None else shard.total
    flags = value_flags(args, vocab, loss)
    trains = any(work.needs)
    correction = None
    if wait:
        kept = mask.reshape(-1).bool()
        all_train = loss is None or args.differentiable_logps
        live = torch.zeros_like(kept) if not trains else kept if all_train else kept & loss.live().reshape(-1)
        n, n_live, *bad = torch.cat([torch.stack([kept.sum(), live.sum()]), flags]).tolist()
        if shard is not None:
            shard.agree(mask.device, kept=n, trained=n_live, wrong=sum(bad))
        raise_bad_values(bad, vocab)
        # a stable sort by (live, scored only, masked) instead of nonzero, which would synchronise again
        index = (2 - kept.to(torch.int8) - live.to(torch.int8)).argsort(stable=True)[:n]
    else:
        index, bad = _given_rows(mask, args.kept_rows, flags)
        n_live = index.shape[0] if trains else 0
        correction = torch.zeros((), device=mask.device).masked_fill(bad, float("nan"))
    hidden = args.hidden
    if args.kept_rows is None and not wait:  # masked rows are computed too: their NaN must go
        hidden = hidden.where(mask.bool().unsqueeze(-1), 0.0)

    target = args.completion_ids.reshape(-1)[index]
    temperature = args.temperature
    if temperature is not None:
        temperature = temperature.detach().reshape(-1)[index].to(accumulation_dtype(hidden.dtype))
    if correction is not None:
        target = target.clamp(0, vocab - 1)
        temperature = None if temperature is None else temperature.where(temperature > 0, 1.0)
    if shard is not None:
        target = target - shard.offset
    rows = Rows(hidden.reshape(-1, hidden.shape[-1]).contiguous(), index, n_live, target, temperature)
    return Call(head, rows, work, mask, correction, loss, args.temperature if args.temperature_has_gradient else None)


def _given_rows(mask, kept_rows, flags):
    """(index, whether any value is bad) of rows that the host does not look at."""
    total = mask.numel()
    if kept_rows is None:
        return torch.arange(total, device=mask.device), flags.sum() > 0
    index, kept = kept_rows.clamp(0, max(total - 1, 0)), mask.reshape(-1).bool()
    given = (index == kept_rows).all() & (index.diff() > 0).all() & kept[index].all() & (kept.sum() == index.shape[0])
    return index, (flags.sum() > 0) | ~given


class TokenLoss:
    """The per-token side of a loss: its inputs as [B, T], weighed once; which tokens may get a gradient; the objective."""

    def __init__(self, args: LossArguments, wait):
        self.config, self.group, self.reduction = args.config, args.data_parallel_group, args.reduction
        self.layout = PackedLayout.of(args.cu_seqlens, args.mask, wait)
        pad, mask = self.layout.pad, self.layout.pad(args.mask)
        tensors = {
            "old": pad(args.old_logps), "ref": pad(args.ref_logps), "sampling": pad(args.sampling_logps),
            "rho": self.layout.pad_ratio(args.importance_sampling_ratio),
        }  # fmt: skip
        self.advantages = self.layout.pad_advantages(args.advantages)
        dtype = accumulation_dtype(args.hidden.dtype)
        self.inputs = prepare(self.config, dtype, self.advantages, mask, tensors, args.num_items)

    def weigh(self):
        """Where means are over the ranks' tokens, asks them: a collective, so only once no rank can refuse its arguments."""
        if self.config.aggregation != "bnpo" and self.config.top_entropy_quantile < 1:
            return  # a bonus divides by the tokens of the quantile
        count = token_count(self.inputs.mask, self.config, self.group)
        if count is not None:
            self.inputs = weighed_over(self.inputs, self.config, count)

    def live(self):
        """Tokens that may get a gradient, in the layout of the caller."""
        return self.layout.unpad((self.inputs.mask > 0) & ~known_zero(self.inputs, self.config))

    def __call__(self, logps, entropy):
        """(loss, metrics) of log-probs and entropies in the layout of the caller."""
        logps, entropy = self.layout.pad(logps), self.layout.pad(entropy)
        top = top_tokens_over_ranks(entropy.detach().where(self.inputs.mask > 0, 0.0), self.inputs.mask, self.config, self.group)
        loss, metrics = evaluate(self.inputs, logps, entropy, self.config, top, self.reduction)
        return (self.layout.unpad(loss) if self.reduction == "none" else loss), metrics

    def coefficients(self, index):
        """(`PolicyRows` of these tokens, whether w_policy is the coefficient itself): what one pass makes coefficients of."""
        t, config = self.inputs, self.config
        found = dict.fromkeys(("w_policy", "advantages", "old", "ref", "w_kl", "w_entropy"))
        linear = linear_coefficients(t, config)
        if linear is not None:
            found["w_policy"] = linear
        else:
            found["w_policy"] = t.weights if t.rho is None or config.loss_type == "vespo" else t.weights * t.rho
            found |= {"advantages": t.advantages.expand_as(t.mask), "old": t.old}
        if t.ref is not None:
            found |= {"ref": t.ref, "w_kl": config.beta * t.weights}
        if config.entropy_coef != 0:
            found["w_entropy"] = -config.entropy_coef * t.mask / t.count
        rows = (None if x is None else self.layout.unpad(x).reshape(-1)[index] for x in found.values())
        return PolicyRows(*rows), linear is not None


def check_head(hidden, weight, bias, lora, vocab_parallel_group):
    """Shapes and dtypes of the head; casts once under autocast."""
    _tensor("hidden", hidden, None, FLOAT_DTYPES)
    device = hidden.device
    _tensor("weight", weight, device, FLOAT_DTYPES)
    if hidden.dim() < 1:
        raise ValueError("hidden must be [..., D], got a 0-dim tensor")
    depth = hidden.shape[-1]
    fewest = 1 if vocab_parallel_group is None else 0  # a rank may hold none of the vocabulary's rows
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] < fewest or depth < 1:
        raise ValueError(f"weight must be [V, D = {depth}] with V, D >= 1, got {list(weight.shape)}")
    vocab = weight.shape[0]
    if bias is not None:
        _tensor("bias", bias, device, FLOAT_DTYPES)
        _shape("bias", bias, (vocab,))
    check_group("vocab_parallel_group", vocab_parallel_group)
    if lora is not None:
        if not isinstance(lora, (tuple, list)) or len(lora) != 3:
            raise TypeError(f"lora must be a tuple (A [r, D], B [V, r], scale), got {kind(lora)}")
        a, b, scale = lora
        _tensor("lora A", a, device, FLOAT_DTYPES)
        _tensor("lora B", b, device, FLOAT_DTYPES)
        if a.dim() != 2 or a.shape[1] != depth:
            raise ValueError(f"lora A must be [r, D = {depth}], got {list(a.shape)}")
        _shape("lora B", b, (vocab, a.shape[0]))
        if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
            raise TypeError(f"lora scale must be a number, got {kind(scale)}")
        if not math.isfinite(scale):
            raise ValueError(f"lora scale must be finite, got {scale}")
        lora = (a, b, float(scale))
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        if torch.float64 not in (hidden.dtype, weight.dtype):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            lora = None if lora is None else (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must be {hidden.dtype} as hidden is, got {weight.dtype}")
    if lora is not None and (lora[0].dtype != hidden.dtype or lora[1].dtype != hidden.dtype):
        raise TypeError(f"lora A and B must be {hidden.dtype} as hidden is, got {lora[0].dtype} and {lora[1].dtype}")
    return hidden, weight, bias, lora


def check_options(config, workspace_bytes, backend):
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig, got {kind(config)}")
    if workspace_bytes is not None:
        if not isinstance(workspace_bytes, numbers.Integral) or isinstance(workspace_bytes, bool):
            raise TypeError(f"workspace_bytes must be an integer number of bytes, got {kind(workspace_bytes)}")
        if not 0 < workspace_bytes < 2**63:
            raise ValueError(f"workspace_bytes must be > 0 and < 2**63, got {workspace_bytes}")
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {kind(backend)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_num_items(num_items, config):
    if num_items is None:
        return
    if isinstance(num_items, torch.Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or a 0-dim tensor, got shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items must be a real number, got {num_items.dtype}")
    elif not isinstance(num_items, numbers.Real) or isinstance(num_items, bool):
        raise TypeError(f"num_items must be a number > 0 or a 0-dim tensor, got {kind(num_items)}")
    elif config.aggregation in _DIVIDED_BY_ITEMS and not 0 < num_items <= sys.float_info.max:
        raise ValueError(f"num_items must be > 0 and finite, got {num_items}")


def check_group(name, group):
    if group is not None and not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"{name} must be a torch.distributed group or None, got {kind(group)}")


def _check_mask(mask, tokens, device):
    if not isinstance(mask, torch.Tensor) or mask.is_complex():
        raise TypeError(f"mask must be a bool or 0/1 tensor, got {kind(mask)}")
    _tensor("mask", mask, device, (mask.dtype,))
    _shape("mask", mask, tokens)


def _tensor(name, value, device, dtypes):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(value)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if device is None and value.device.type == "meta":
        raise ValueError(f"{name} must be on a device that holds data, got a tensor on meta")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} as hidden is, got {value.device}")


def _no_gradient(name, value):
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, there is none for it; pass {name}.detach()")


def _shape(name, value, *allowed):
    if all(tuple(value.shape) != tuple(shape) for shape in allowed):
        wanted = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")


def kind(value):
    """What came, for an error message."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def value_flags(args: TokenArguments, vocab, loss=None) -> torch.Tensor:
    """[5] int64 counts of bad values, in the order of the messages of `raise_bad_values`; no synchronisation."""
    mask, ids, temperature = args.mask, args.completion_ids, args.temperature
    kept = mask.bool()
    none = kept.new_zeros((), dtype=torch.int64)
    bad_mask = none if mask.dtype == torch.bool else ((mask != 0) & (mask != 1)).sum()
    bad_ids = (kept & ((ids < 0) | (ids >= vocab))).sum()
    bad_advantages, bad_temperature, bad_ends = none, none, none
    if loss is not None:
        rows = loss.inputs.mask > 0
        rows = rows if loss.advantages.shape == rows.shape else rows.any(1)
        bad_advantages = (rows & ~loss.advantages.isfinite()).sum()
        bad_ends = none if loss.layout.bad_ends is None else loss.layout.bad_ends
    if temperature is not None:
        bad_temperature = (kept & ~((temperature > 0) & temperature.isfinite())).sum()
    return torch.stack([bad_mask, bad_ids, bad_advantages, bad_temperature, bad_ends])


def raise_bad_values(counts, vocab):
    for count, message in zip(counts, _BAD_VALUES, strict=True):
        if count:
            raise ValueError(message.format(count, vocab=vocab))


class PackedLayout:
    """Moves per-token tensors between the packed layout [N] and [B, T]; the identity for tensors that are padded already.

    The mathematics is written for [B, T] only: a packed batch's per-token vectors are small beside its logits, and padding
    them keeps every sum per sequence in one deterministic form.
    """

    def __init__(self, cu_seqlens=None, tokens=0, wait=True):
        self.position, self.bad_ends = None, None
        if cu_seqlens is None:
            return
        starts = cu_seqlens.long()
        index = torch.arange(tokens, device=cu_seqlens.device)
        sequence = torch.bucketize(index, starts[1:], right=True)
        if wait:
            self.sequences, self.length = self._checked_lengths(cu_seqlens.tolist(), tokens)
            self.position = sequence * self.length + index - starts[sequence]
            return
        # nothing may synchronise: the longest a sequence can be, and wrong ends are only counted
        self.sequences, self.length = cu_seqlens.shape[0] - 1, tokens
        position = sequence * self.length + index - starts[sequence]
        self.position = position.clamp(0, max(self.sequences * self.length - 1, 0))
        self.bad_ends = (starts.diff() < 0).sum() + (starts[0] != 0) + (starts[-1] != tokens)

    @staticmethod
    def _checked_lengths(ends, tokens):
        lengths = [end - start for start, end in pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
            shown = f"{ends[:8]}{'...' * (len(ends) > 8)}"
            raise ValueError(f"cu_seqlens must rise from 0 to N = {tokens} without falling, got {shown}")
        return len(lengths), max(lengths, default=0)

    @staticmethod
    def of(cu_seqlens, mask, wait=True):
        """``wait``: the host may read cu_seqlens back."""
        return PackedLayout(cu_seqlens, mask.shape[0] if cu_seqlens is not None else 0, wait)

    def pad(self, x):
        """[N] -> [B, T], zeros beyond a sequence's end; differentiable."""
        if self.position is None or x is None:
            return x
        out = x.new_zeros(self.sequences * self.length).index_put((self.position,), x)
        return out.view(self.sequences, self.length)

    def pad_advantages(self, x):
        """[B] stays, [N] -> [B, T]."""
        return x if self.position is None or x.shape[0] == self.sequences else self.pad(x)

    def pad_ratio(self, x):
        """[B, 1] stays, [N] -> [B, T]."""
        return x if self.position is None or x is None or x.dim() == 2 else self.pad(x)

    def unpad(self, x):
        """[B, T] -> [N]."""
        return x if self.position is None else x.reshape(-1)[self.position]
