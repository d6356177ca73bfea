"""Plain PyTorch and the other libraries, each called as its own users call it, under our objective where it has none.

A library is imported from its installed package when it is first asked for, and is absent, with the reason, where that fails or
where it has no such path.

Over supports full logits are masked with -inf. The mask is made before the call: neither its time nor its memory is counted.
"""

import functools
import importlib

import torch

from ..extras import import_peft
from ..losses.objective import objective
from .problem import Result


class Absent(Exception):
    """A provider cannot do this here; the message says why."""


TRL_COLUMNS = 32768  # TRL 1.16's trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
LIGER_ROWS = {"cuda": 1024, "cpu": "all"}  # of a chunk: as many as make it fastest


def full_logits(p, compiled=False):
    """The head's product in the inputs' dtype, of kept rows; log-probs in float32; the entropy only where it is asked for."""
    if p.heads == 2:
        return _with_mean(p, _compiled(_reverse_kl) if compiled else _reverse_kl)
    if p.support is not None:
        function = _scores_over_supports if not p.workload.gradients else _log_probs_over_supports
    else:
        function = _scores if not p.workload.gradients or _needs_entropy(p) else _log_probs
    return _with_objective(p, _compiled(function) if compiled else function)


@functools.cache
def _compiled(function):
    graph = torch.compile(function)

    def scores(hidden, weight, *of_rows):  # one graph for every number of rows, as a trainer needs
        for x in (hidden, *of_rows):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return graph(hidden, weight, *of_rows)

    return scores


def _log_probs(hidden, weight, ids):
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), None


def _scores(hidden, weight, ids):
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def _reverse_kl(hidden, weight, teacher_hidden, teacher_weight):
    log_q = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _masked(hidden, weight, outside):
    return (hidden @ weight.T).float().masked_fill(outside, -float("inf"))


def _log_probs_over_supports(hidden, weight, ids, outside):
    return _masked(hidden, weight, outside).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), None


def _scores_over_supports(hidden, weight, ids, outside):
    log_p = _masked(hidden, weight, outside).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(outside, 0.0)).sum(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy


def trl(p):
    """Its chunked function knows no sampling mask: over supports its users have full logits, masked, and its log-softmax.

    Beside a teacher what its DistillationTrainer calls; beta = 1 is the reverse KL.
    """
    if p.heads == 2:
        divergence = _imported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
        _imported("trl.trainer.utils", "maybe_gather_lm_head_ctx")
        options = (None, 1.0, 1.0, 1.0, None, 1.0, None)  # the teacher's bias, beta, temperature, scale and softcap of each
        return _with_mean(p, lambda hidden, weight, *teacher: divergence.apply(hidden, weight, None, *teacher, *options)[0])
    if p.support is not None:
        select = _imported("trl.trainer.utils", "selective_log_softmax")
        return _with_objective(p, lambda hidden, weight, ids, outside: (
            select(_masked(hidden, weight, outside).unsqueeze(0), ids.unsqueeze(0)).squeeze(0), None))  # fmt: skip
    function = _imported("trl.kernels", "ChunkedLogProbFunction")
    _imported("trl.trainer.utils", "maybe_gather_lm_head_ctx")  # which the backward imports

    def scores(hidden, weight, ids):  # entropy beside the log-probs, as its trainer wants it
        return function.apply(hidden, weight, None, ids, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",))[:2]

    return _with_objective(p, scores)


def liger(p):
    """Positions that are masked in every sequence are cut off: it has no other way to leave them out."""
    if p.heads == 2:
        return _liger_beside_a_teacher(p)
    LigerFusedLinearGRPOLoss = _imported("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    _lacks(p, "supports", "log-probs", "entropy")
    c, rows = p.config, LIGER_ROWS["cuda"] if p.hidden.is_cuda else p.shape.tokens
    needed = p.mask.any(0).nonzero()
    columns = slice(int(needed.min()), int(needed.max()) + 1)
    cut = lambda x: None if x is None else x[:, columns]  # noqa: E731
    chunk = max(1, rows // (columns.stop - columns.start))  # sequences
    # compiled=True, its default, takes as long in a call, and tens of seconds in the first
    fused = LigerFusedLinearGRPOLoss(
        beta=c.beta, compiled=False, use_ref_model=c.beta != 0, chunk_size=chunk,
        epsilon_low=c.epsilon, epsilon_high=c.upper_epsilon, loss_type=c.loss_type,
        importance_sampling_level=c.importance_sampling_level, use_bias_correction_kl=c.use_bias_correction_kl,
    )  # fmt: skip

    given = {"ref_per_token_logps": cut(p.ref_logps), "old_per_token_logps": cut(p.old_logps)}
    return _with_own_loss(p, lambda hidden, weight: fused(cut(hidden), weight, cut(p.ids), cut(p.mask), p.advantages, **given))


def _liger_beside_a_teacher(p):
    """Its labels are for the term that is left out, and say which tokens count. beta = 1 is the reverse KL."""
    LigerFusedLinearJSDLoss = _imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    rows = LIGER_ROWS["cuda"] if p.hidden.is_cuda else p.shape.tokens
    # compiled, its default: a quarter less time here, unlike in its GRPO loss
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=True, chunk_size=rows)
    labels = p.ids.masked_fill(~p.mask, -100).flatten()

    def loss(hidden, weight):
        return fused(hidden.flatten(0, 1), weight, p.teacher_hidden.flatten(0, 1), p.teacher_weight, labels), None

    call = _with_own_loss(p, loss)
    call.settings = {"compiled": True, "chunk_rows": rows}
    return call


def liger_from_logits(p):
    """Its Triton kernel on logits that plain PyTorch has made."""
    triton_grpo_loss = _imported("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    _lacks(p, "cpu", "teacher", "supports", "log-probs", "entropy")
    c = p.config

    def loss(hidden, weight):
        # it drops the last position of every sequence, as the logits of a whole model have one too many
        logits = torch.nn.functional.pad(hidden, (0, 0, 0, 1)) @ weight.T
        return triton_grpo_loss(
            logits, p.old_logps, p.ref_logps, p.ids, p.advantages, p.mask, temperature=1.0, beta=c.beta, eps_low=c.epsilon,
            eps_high=c.upper_epsilon, loss_type=c.loss_type, importance_sampling_level=c.importance_sampling_level, reduce=True,
            use_bias_correction_kl=c.use_bias_correction_kl,
        )  # fmt: skip

    return _with_own_loss(p, loss)


def verl(p):
    function = _imported("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    _lacks(p, "cpu", "teacher", "supports")
    return _with_objective(p, lambda hidden, weight, ids: function(hidden, weight, ids, 1.0, "none"))


def cross_entropy(p, module, *lacks):
    """A module's linear_cross_entropy, per token."""
    function = _imported(module, "linear_cross_entropy")
    _lacks(p, "teacher", "supports", "entropy", *lacks)
    return _with_objective(p, lambda hidden, weight, ids: (-function(hidden, weight, ids, reduction="none").float(), None))


def _needs_entropy(p):
    return p.config.top_entropy_quantile < 1


_LACKS = {
    "teacher": (lambda p: p.heads == 2, "it compares no two heads"),
    "supports": (lambda p: p.support is not None, "it has no sampling mask"),
    "log-probs": (lambda p: not p.workload.gradients, "it has no log-probs of its own"),
    "entropy": (_needs_entropy, "it has no entropy to choose tokens by"),
    "cpu": (lambda p: not p.hidden.is_cuda, "its kernels need a GPU"),
}


def _lacks(p, *names):
    """Raises `Absent` where the problem needs something of `_LACKS` that the library does not have."""
    for needed, reason in map(_LACKS.get, names):
        if needed(p):
            raise Absent(reason)


def _imported(module, name):
    try:
        import_peft()
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise Absent(f"cannot be imported: {type(error).__name__}: {error}") from error


def _with_own_loss(p, loss_of):
    def run():
        hidden, weight = p.leaves()
        loss, _ = loss_of(hidden, weight)
        loss.backward()
        return Result(loss.detach(), None, hidden.grad, weight.grad)

    return run


def _with_mean(p, divergence):
    """The mean over the kept tokens of what a library finds for each, from [N, D], [V, D] and the teacher's."""
    select = _kept(p)
    teacher = select(p.teacher_hidden.flatten(0, 1)), p.teacher_weight
    return _with_own_loss(p, lambda hidden, weight: (divergence(select(hidden.flatten(0, 1)), weight, *teacher).mean(), None))


def _kept(p):
    """x [N, ..] -> its kept rows."""
    kept = None if p.mask.all() else p.mask.flatten()
    return lambda x: x if kept is None else x[kept]


def _with_objective(p, scores):
    """Log-probs of another library under our objective; ``scores`` takes [N, D], [V, D] and [N] of the tokens that are kept.

    Over supports it also takes [N, V] bool, True where a token was not left.
    """
    kept, select = None if p.mask.all() else p.mask.flatten(), _kept(p)
    spread = lambda x: x if kept is None else x.new_zeros(kept.shape).masked_scatter(kept, x)  # noqa: E731
    of_rows = [select(p.ids.flatten())]
    if p.support is not None:
        of_rows.append(select(~p.support.to_mask(p.shape.vocab)))

    def run():
        hidden, weight = p.leaves()
        with torch.set_grad_enabled(p.workload.gradients):
            found = scores(select(hidden.flatten(0, 1)), weight, *of_rows)
            logps, entropy = (None if x is None else spread(x).view(p.mask.shape) for x in found)
        if not p.workload.gradients:
            return Result(logps=logps, entropy=entropy)
        loss, _ = objective(
            logps, torch.zeros_like(logps) if entropy is None else entropy, p.advantages, p.mask, old_logps=p.old_logps,
            ref_logps=p.ref_logps, config=p.config,
        )  # fmt: skip
        loss.backward()
        return Result(loss.detach(), logps.detach(), hidden.grad, weight.grad)

    return run
