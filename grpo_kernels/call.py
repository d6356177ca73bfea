"""Checks the arguments of a call, the same way for every public function, and makes of them the head, rows and wanted outputs."""

import functools
import numbers
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import torch

from . import backends
from .checks import (
    FLOAT_DTYPES,
    Reduction,
    check_group,
    check_head,
    check_mask,
    check_num_items,
    check_options,
    check_shape,
    check_tensor,
    kind,
    raise_bad_values,
    refuse_transforms,
    value_flags,
)
from .distributed import (
    QuantileOnly,
    VocabShard,
    gathered_sequence,
    group_in_use,
    group_of,
    marked_tokens_over_ranks,
    of_dtensors,
    token_count,
    top_tokens_over_ranks,
    validate_across_ranks,
)
from .engine.fixed_order import batch_invariance, fixed_logits
from .engine.operands import Head, Rows, Teacher, Work, can_sync
from .engine.ops import row_divergences, row_logprobs
from .engine.pairs import PairRows, RangeScores, range_logprobs, teacher_pair_logits, with_pair_logits
from .engine.plan import default_budget
from .engine.products import accumulation_dtype
from .engine.temperature import with_temperature_gradient
from .losses.config import GRPOLossConfig
from .losses.correction import check_correction
from .losses.objective import (
    depends_on_its_row_alone,
    evaluate,
    known_zero,
    linear_coefficients,
    prepare,
    refuse_lost_gradients,
    weighed_over,
)
from .losses.terms import PolicyRows
from .packed import PackedLayout
from .support import Supports, TokenSupport, check_support, wrong_token
from .teacher import TeacherArguments


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
        detached = self.loss.requires_grad and not self.logps.requires_grad
        note = "  # logps and entropy are detached; differentiable_logps=True keeps their graph" if detached else ""
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
    options: tuple | None = None  # (temperature, logit_scale, softcap) of a config that is yet to be validated
    return_lse: bool = False
    support: TokenSupport | None = None
    candidates: torch.Tensor | None = None  # [.., K] in place of completion_ids, which become one of them, a wrong one if there is
    teacher: TeacherArguments | None = None
    batch_invariant: bool | None = None

    ids_name: str = "token_ids"
    entropy_has_gradient = True  # or may have one

    def checked(self):
        if self.options is not None:
            return replace(self, config=_config_of(*self.options), options=None).checked()
        hidden, weight, bias, lora = self.hidden, self.weight, self.bias, self.lora
        if weight is not None:
            hidden, weight, bias, lora = check_head(hidden, weight, bias, lora, self.vocab_parallel_group)
        check_options(self.config, self.workspace_bytes, self.backend)
        if not isinstance(self.batch_invariant, bool | None):
            raise TypeError(f"batch_invariant must be None, True or False, got {kind(self.batch_invariant)}")
        if not isinstance(self.return_lse, bool):
            raise TypeError(f"return_lse must be True or False, got {kind(self.return_lse)}")
        tokens, device = self.token_shape(hidden), hidden.device
        teacher = self.teacher
        if teacher is not None:
            teacher = teacher.checked(tokens, weight.shape[0], device)
            if self.temperature_has_gradient:
                raise ValueError("temperature must not require a gradient, a divergence has none for it; pass temperature.detach()")
        completion_ids = self.completion_ids if self.candidates is None else self._one_of_candidates(tokens, device)
        check_tensor(self.ids_name, completion_ids, device, (torch.int64,))
        shape = completion_ids.shape
        one_apart = len(tokens) == len(shape) > 1 and shape[:-1] == tokens[:-1] and abs(shape[-1] - tokens[-1]) == 1
        shift = "; position t predicts token t: hidden[:, :-1] stands beside ids[:, 1:]" if one_apart else ""
        check_shape(self.ids_name, completion_ids, tokens, hint=shift)
        if self.mask is not None or self.ids_name == "completion_ids":
            check_mask(self.mask, tokens, device)
        temperature = self.temperature
        if isinstance(temperature, numbers.Real):
            raise TypeError(f"temperature must be a tensor, 0-dim or {list(tokens)}, got {kind(temperature)}; a number goes into "
                            "config.temperature, FusedLinearGRPOLoss(temperature=...)")  # fmt: skip
        if temperature is not None:
            check_tensor("temperature", temperature, device, FLOAT_DTYPES)
            check_shape("temperature", temperature, tokens, ())
            # its gradient is a sum over the tokens, in float32 if not float64
            temperature = temperature.to(torch.promote_types(temperature.dtype, torch.float32)).expand(tokens)
        if self.support is not None:
            check_support(self.support, tokens, device)
            if self.return_lse:
                raise ValueError("return_lse must be False with a support, whose lse would be another, got True")
        refuse_lost_gradients(self.config, mask=self.mask)
        mask = torch.ones(tokens, dtype=torch.bool, device=device) if self.mask is None else self.mask
        return replace(self, hidden=hidden, weight=weight, bias=bias, lora=lora, mask=mask, temperature=temperature,
                       completion_ids=completion_ids, teacher=teacher)  # fmt: skip

    def trained(self):
        """Which tokens may get a gradient, like mask; None: all."""

    def _one_of_candidates(self, tokens, device):
        ids = self.candidates
        check_tensor(self.ids_name, ids, device, (torch.int64, torch.int32))
        if ids.dim() < 1 or ids.shape[:-1] != tokens:
            wanted = ", ".join(map(str, (*tokens, "K")))
            raise ValueError(f"{self.ids_name} must be [.., K] = [{wanted}], got {list(ids.shape)}")
        ids = torch.nn.functional.pad(ids.long(), (0, 1), value=-1)
        lowest = ids.amin(-1)
        return torch.where(lowest < -1, lowest, ids.amax(-1).clamp(min=0))

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
        given = self.given("mask", "bias", "temperature", "support")
        candidates = 0 if self.candidates is None else self.candidates.shape[-1]
        return {"which tensors are given": given, "return_lse": int(self.return_lse), "ids of a position": candidates,
                "teacher": self._facts_of_teacher()}  # fmt: skip

    def _facts_of_teacher(self):
        return "" if self.teacher is None else self.teacher.facts()


def _config_of(temperature, logit_scale, softcap):
    plain = all(x is None or isinstance(x, (int, float)) for x in (temperature, logit_scale, softcap))
    return (_known_config if plain else _new_config)(temperature, logit_scale, softcap)


def _new_config(temperature, logit_scale, softcap):
    return GRPOLossConfig(temperature=temperature, logit_scale=logit_scale, softcap=softcap)


# to validate one takes a twentieth of a short call
_known_config = functools.lru_cache(64, typed=True)(_new_config)


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

    ids_name: str = "completion_ids"

    @property
    def entropy_has_gradient(self):
        return self.differentiable_logps or self.config.entropy_coef != 0

    def checked(self):
        args = super().checked()
        tokens, device = args.mask.shape, args.mask.device
        sequences = tokens[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1
        check_tensor("advantages", self.advantages, device, FLOAT_DTYPES)
        check_shape("advantages", self.advantages, (sequences,), tokens)
        for name in self.given("old_logps", "ref_logps", "sampling_logps", "importance_sampling_ratio"):
            check_tensor(name, getattr(self, name), device, FLOAT_DTYPES)
            per_sequence = [(sequences, 1)] if name == "importance_sampling_ratio" else []
            check_shape(name, getattr(self, name), *per_sequence, tokens)
        if self.config.exact_kl and self.teacher is None:
            raise ValueError("kl_estimator must be 'k3' for a loss from logits, got 'exact': see fused_linear_grpo_loss")
        if self.config.beta != 0 and not self.config.exact_kl and self.ref_logps is None:
            raise ValueError(f"ref_logps must be given when beta != 0 (beta = {self.config.beta}), got None")
        check_correction(self.config, self.importance_sampling_ratio, self.sampling_logps)
        check_num_items(self.num_items, self.config)
        constants = "advantages", "old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps", "num_items"
        refuse_lost_gradients(self.config, **{name: getattr(self, name) for name in constants})
        if not isinstance(self.differentiable_logps, bool):
            raise TypeError(f"differentiable_logps must be True or False, got {kind(self.differentiable_logps)}")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be {' or '.join(map(repr, get_args(Reduction)))}, got {self.reduction!r}")
        if (rows := self.kept_rows) is not None:
            check_tensor("kept_rows", rows, device, (torch.int64,))
            if rows.dim() != 1 or rows.numel() > self.mask.numel():
                raise ValueError(f"kept_rows must be 1-D with at most {self.mask.numel()} indices, got {list(rows.shape)}")
        group = self.data_parallel_group
        check_group("data_parallel_group", group.group if isinstance(group, QuantileOnly) else group)
        return args

    def token_shape(self, hidden):
        """[B, T], or [N] in the packed layout."""
        name, last = ("hidden", "D") if self.weight is not None else ("logits", "V")
        check_tensor(name, hidden, None, FLOAT_DTYPES)
        if hidden.shape[-1:] == (0,):
            raise ValueError(f"{name} must have a vocabulary of at least 1, got {list(hidden.shape)}")
        if self.cu_seqlens is None:
            if hidden.dim() != 3:
                raise ValueError(f"{name} must be [B, T, {last}] (or [N, {last}] with cu_seqlens), got {list(hidden.shape)}")
            return hidden.shape[:2]
        check_tensor("cu_seqlens", self.cu_seqlens, hidden.device, (torch.int32, torch.int64))
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must be [B + 1], got {list(self.cu_seqlens.shape)}")
        if hidden.dim() != 2:
            raise ValueError(f"{name} must be [N, {last}] with cu_seqlens, got {list(hidden.shape)}")
        return hidden.shape[:1]

    def facts(self):
        return {
            "which tensors are given": self.given("bias", "old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps",
                                                  "num_items", "temperature", "cu_seqlens", "support"),
            "config and reference": repr(self.config) + self._facts_of_teacher(),
            "shape of advantages": list(self.advantages.shape),
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
    pairs: PairRows | None = None  # the rows that have a support of two tokens and more
    teacher: Teacher | None = None

    def scores(self, entropy_gradient=False, return_lse=False):
        """(logps, entropy, lse or None) in two phases, of the shape of mask, all differentiable; diagnostics [N, 5] or [0, 5]."""
        over, call = self.over_supports()
        if self.only_pairs:
            nothing = over.logps.new_empty(0)
            logps, entropy, found, lse = nothing, nothing, nothing.view(0, 1), None
        else:
            logps, entropy, found, lse = row_logprobs(call.head, call.rows, call.work, entropy_gradient, return_lse)
        logps, entropy = self.scatter(logps, over.logps), self.scatter(entropy, over.entropy)
        lse = None if lse is None else self.scatter(lse)
        if self.temperature is not None:
            variance = self.scatter(found[:, -1], over.variance) if self.work.diagnostics[-1] else None
            logps, entropy, lse = with_temperature_gradient(logps, entropy, self.temperature, self.mask, variance, lse)
        return logps, entropy, lse, found

    def compared(self, alone=False):
        """(logps, entropy, divergence) in two phases, of the shape of mask; ``alone``: only the last is differentiable."""
        over, call = self.over_supports()
        if self.only_pairs:
            logps = entropy = divergence = over.logps.new_empty(0)
        else:
            logps, entropy, divergence = row_divergences(call.head, call.teacher, call.rows, call.work, alone)
        beside = over.logps, over.entropy, over.divergence
        return tuple(map(self.scatter, (logps, entropy, divergence), beside))

    def over_supports(self):
        """(`RangeScores` of the rows that have a support, the call of the others).

        What the others send back to hidden and head passes through the pairs, which add theirs to it.
        """
        if self.pairs is None:
            return RangeScores(), self
        z, hidden, head = with_pair_logits(self.head, self.rows.hidden, self.pairs, self.work)
        y = None if self.teacher is None else teacher_pair_logits(self.teacher, self.pairs, self.work).to(z.dtype)
        found = range_logprobs(z, self.pairs, self.work, y)
        return found, self if self.only_pairs else replace(self, head=head, rows=replace(self.rows, hidden=hidden))

    @property
    def only_pairs(self):
        """Whether no row is computed over the whole vocabulary, and some may be over a support."""
        return self.pairs is not None and not len(self.rows.index)

    @property
    def one_pass(self):
        """Whether the gradients are ready when the forward ends."""
        return self.rows.policy is not None

    def scatter(self, values, over_supports=None):
        """[N] of the rows, and [R] of those with a support -> the shape of mask, 0 elsewhere; differentiable."""
        full = values.new_zeros(self.mask.numel())
        full = full if self.only_pairs else full.index_copy(0, self.rows.index, values)
        if over_supports is not None:
            full = full.index_copy(0, self.pairs.index, over_supports)
        full = full.view(self.mask.shape)
        return full if self.correction is None else (full + self.correction).where(self.mask.bool(), 0.0)


def describe(args: TokenArguments, diagnostics=(False,) * 4, sums_hidden=True) -> Call:
    """Checks a call and describes it. Ranks that share a vocabulary or a mean hear of a refusal; a single process never asks."""
    refuse_transforms(vars(args))
    if args.teacher is not None:
        refuse_transforms({f"{args.teacher.name}_{name}": x for name, x in vars(args.teacher).items()})
        args = replace(args, teacher=args.teacher.constants())
    check_group("vocab_parallel_group", args.vocab_parallel_group)
    group = group_of(args.weight, args.vocab_parallel_group)
    wait = args.kept_rows is None and can_sync(args.hidden)
    with validate_across_ranks(group_in_use(args.config, args.data_parallel_group) if wait else None, args.hidden,
                               "data_parallel_group"):  # fmt: skip
        hidden, teacher = args.hidden, args.teacher
        if args.sequence_parallel:
            hidden = gathered_sequence(hidden, group)
            teacher = teacher and replace(teacher, hidden=gathered_sequence(teacher.hidden, group, f"{teacher.name}_hidden"))
        with validate_across_ranks(group, hidden) as meeting:
            hidden, weight, bias, lora = of_dtensors(hidden, args.weight, args.bias, args.lora, group)
            args = replace(args, hidden=hidden, weight=weight, bias=bias, lora=lora, vocab_parallel_group=group,
                           teacher=teacher and teacher.of_rank(group)).checked()  # fmt: skip
            variance = args.temperature_has_gradient and args.entropy_has_gradient
            head, work = _head_and_work(args, (*map(bool, diagnostics), variance))
            if any(diagnostics) and args.support is not None:
                raise ValueError("diagnostics must be empty with a support")
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
    if two_phases or call.only_pairs or not depends_on_its_row_alone(args.config, on_policy=args.old_logps is None):
        return call
    policy, linear = loss.coefficients(call.rows.index[: call.rows.live])
    return replace(call, rows=replace(call.rows, policy=policy), work=replace(work, config=args.config, linear=linear))


def _head_and_work(args, diagnostics):
    a, b, scale = (None, None, 1.0) if args.lora is None else args.lora
    head, weight = Head(args.weight, args.bias, a, b), args.weight
    grad, invariant = torch.is_grad_enabled(), batch_invariance(args.batch_invariant, weight)
    return head, Work(
        transform=args.config.transform,
        backend=backends.resolve(args.backend, weight.device, weight.dtype, weight.shape[0]),
        budget=default_budget(weight.device.type) if args.workspace_bytes is None else int(args.workspace_bytes),
        needs=tuple(grad and x is not None and x.requires_grad for x in (args.hidden, *head.tensors)),
        lora_scale=float(scale),
        diagnostics=diagnostics,
        divergence=args.teacher and args.teacher.divergence,
        teacher_transform=args.teacher and args.teacher.transform,
        batch_invariant=invariant,
        own_statistics=isinstance(args, LossArguments) and args.teacher is not None and fixed_logits(invariant, weight),
    )


def _bring_facts(meeting, args, work):
    """To the other ranks: what must be the same on all, and this rank's rows of the vocabulary."""
    if not can_sync(args.weight):
        raise RuntimeError("vocab_parallel_group cannot be used under torch.compile or while a CUDA graph is captured")
    t = work.transform
    meeting.own_rows = args.weight.shape[0]
    meeting.facts = {
        "rows of hidden": args.hidden.shape[:-1].numel(), "depth of hidden": args.hidden.shape[-1],
        "dtype and batch_invariant": repr((args.weight.dtype, work.batch_invariant)), "workspace_bytes": work.budget,
        "which tensors need a gradient": str([*work.needs, args.temperature_has_gradient]),
        "diagnostics": str(work.diagnostics[:-1]),
        "temperature and factors": [work.lora_scale, t.logit_scale, t.softcap or 0.0, t.temperature],
        "rank of the adapter": 0 if args.lora is None else args.lora[0].shape[0], **args.facts(),
    }  # fmt: skip


def _with_rows(args, head, work, loss, wait):
    """Chooses the rows that are computed, those that need a gradient in front, and raises what the checks of values found.

    Nothing synchronises when ``kept_rows`` is given (but for a support with an empty range), under torch.compile or while a CUDA
    graph is captured: then every row is taken as live, and bad values become the NaN ``correction``.
    """
    mask, shard = args.mask, work.shard
    vocab = args.weight.shape[0] if shard is None else shard.total
    trains = any(work.needs)
    kept, correction = mask.reshape(-1).bool(), None
    flags = value_flags(args, vocab, loss)
    if wait:
        all_train = loss is None or args.differentiable_logps  # a term of the caller's may train what the loss leaves alone
        chosen = args.trained() if all_train else loss.live()
        live = torch.zeros_like(kept) if not trains else kept if chosen is None else kept & chosen.reshape(-1)
        over = None if args.support is None else Supports.checked(args, kept, vocab, shard)
        kinds = (2 - kept.to(torch.int8) - live.to(torch.int8)) if over is None else over.kinds(kept, live)
        known = torch.arange(2 if over is None else 6, device=kinds.device).unsqueeze(1)
        found = [(kinds == known).sum(1), flags] + ([] if over is None else [over.missing(kept).unsqueeze(0)])
        found = torch.cat(found).tolist()
        counts, bad = found[: len(known)], found[len(known) :]
        if shard is not None:
            shard.agree(mask.device, kept=sum(counts), trained=sum(counts[::2]), wrong=sum(bad))
        raise_bad_values(bad[: len(flags)], vocab, args.ids_name)
        if over is not None and bad[-1]:
            raise ValueError(wrong_token(args.support, kept, args.completion_ids.reshape(-1), mask.shape, args.ids_name))
        # a stable sort by kind (live, scored only, over supports likewise, others): nonzero would synchronise again
        order = kinds.argsort(stable=True)
        n, n_live = counts[0] + counts[1], counts[0]
        index = order[:n]
        pairs = None if over is None else over.rows(order[n : n + sum(counts[2:4])], counts[2])
    else:
        index, bad = _given_rows(mask, args.kept_rows, flags)
        pairs = None
        if args.support is not None:
            index, pairs, wrong = Supports.given(args, index, kept, vocab, trains)
            bad = bad | wrong
        n_live = index.shape[0] if trains else 0
        correction = torch.zeros((), device=mask.device).masked_fill(bad, float("nan"))
    hidden = args.hidden
    every_row = args.kept_rows is None and not wait  # masked rows are computed too: their NaN must go
    if every_row:
        hidden = hidden.where(mask.bool().unsqueeze(-1), 0.0)
    teacher = args.teacher and args.teacher.rows(mask if every_row else None)

    target = args.completion_ids.reshape(-1)[index]
    temperature = _row_temperature(args, index, correction)
    if correction is not None:
        target = target.clamp(0, vocab - 1)
    if shard is not None:
        target = target - shard.offset
    if pairs is not None:
        pairs = replace(pairs, temperature=_row_temperature(args, pairs.index, correction))
        pairs = pairs if shard is None else replace(pairs, ids=pairs.ids - shard.offset).of_shard(args.weight.shape[0])
    rows = Rows(hidden.reshape(-1, hidden.shape[-1]).contiguous(), index, n_live, target, temperature)
    differentiable = args.temperature if args.temperature_has_gradient else None
    return Call(head, rows, work, mask, correction, loss, differentiable, pairs, teacher)


def _row_temperature(args, index, correction):
    """Of some rows [N] acc; None where all have the same."""
    if args.temperature is None:
        return None
    temperature = args.temperature.detach().reshape(-1)[index].to(accumulation_dtype(args.hidden.dtype))
    if correction is None:
        return temperature
    kept = args.mask.reshape(-1)[index].bool()  # of a masked row it may be anything
    return temperature.where(kept & (temperature > 0), 1.0)


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
        t = replace(self.inputs, weights=self.inputs.mask) if self.reduction == "none" else self.inputs
        return self.layout.unpad((t.mask > 0) & ~known_zero(t, self.config))

    def __call__(self, logps, entropy, kl=None):
        """(loss, metrics) of log-probs and entropies, and where it is exact the KL, in the layout of the caller."""
        logps, entropy, kl = map(self.layout.pad, (logps, entropy, kl))
        top = top_tokens_over_ranks(entropy.detach().where(self.inputs.mask > 0, 0.0), self.inputs.mask, self.config, self.group)
        marked = marked_tokens_over_ranks(logps.detach(), self.inputs, self.config, self.group)
        loss, metrics = evaluate(self.inputs, logps, entropy, self.config, top, self.reduction, kl, marked)
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
            found["ref"] = t.ref
        if config.beta != 0:
            found["w_kl"] = config.beta * t.weights
        if config.entropy_coef != 0:
            found["w_entropy"] = -config.entropy_coef * t.mask / t.count
        rows = (None if x is None else self.layout.unpad(x).reshape(-1)[index] for x in found.values())
        return PolicyRows(*rows), linear is not None
