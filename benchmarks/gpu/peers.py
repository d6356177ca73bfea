"""The others: plain PyTorch, and each other library as it is called by its own users, under our objective where it has none.

A library is imported from its installed package when it is first asked for, and is absent, with the reason, where that fails or
where it has no such path.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types

import torch

import grpo_kernels

from .context import Absent
from .inputs import Scored

_TRL_COLUMNS = 32768  # TRL 1.16's trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
TRL_SETTINGS = {"rows": "kept only", "columns": _TRL_COLUMNS}
LIGER_ROWS = 1024  # of a chunk; a sequence each by default, which would be more and smaller products


def full_logits(p, compiled=False):
    """The head's product in the inputs' dtype, log-probs in float32; the entropy only where it is asked for."""
    function = _scores if not p.workload.gradients else _log_probs
    if compiled:
        function = _compiled(function)

    def scores(hidden, weight, ids):
        if compiled:  # one graph for every number of rows, as a trainer needs
            torch._dynamo.maybe_mark_dynamic(hidden, 0)
            torch._dynamo.maybe_mark_dynamic(ids, 0)
        return function(hidden, weight, ids)

    return _with_objective(p, scores)


def _log_probs(hidden, weight, ids):
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), None


def _scores(hidden, weight, ids):
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@functools.cache
def _compiled(function):
    return torch.compile(function)


def trl(p):
    with _absent_unless_imported():
        from trl.kernels import ChunkedLogProbFunction
    try:
        importlib.import_module("trl.trainer.utils")
    except Exception as error:
        # the backward wants one function of it, which does nothing without DeepSpeed; the module wants `datasets` and more
        TRL_SETTINGS["trainer_utils"] = f"replaced, since it cannot be imported: {error}"
        stub = types.ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *a: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = stub

    def scores(hidden, weight, ids):
        # as TRL's trainer calls it: kept rows only, entropy beside the log-probs
        kept = p.mask.flatten()
        out = ChunkedLogProbFunction.apply(hidden[kept], weight, None, ids[kept], 1.0, _TRL_COLUMNS, None, 1.0, ("entropy",))
        return tuple(x.new_zeros(kept.shape).masked_scatter(kept, x) for x in out[:2])

    return _with_objective(p, scores)


def liger(p):
    with _absent_unless_imported():
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    if not p.workload.gradients:
        raise Absent("it has no log-probs of its own")
    c = p.config
    # compiled=True hands torch.compile a new function in every call
    fused = LigerFusedLinearGRPOLoss(
        beta=c.beta, compiled=False, use_ref_model=c.beta != 0, chunk_size=max(1, LIGER_ROWS // p.shape.length),
        epsilon_low=c.epsilon, epsilon_high=c.upper_epsilon, loss_type=c.loss_type,
        importance_sampling_level=c.importance_sampling_level, use_bias_correction_kl=c.use_bias_correction_kl,
    )  # fmt: skip

    def run():
        hidden, weight = p.leaves()
        loss, _ = fused(
            hidden, weight, p.ids, p.mask, p.advantages, ref_per_token_logps=p.ref_logps, old_per_token_logps=p.old_logps
        )
        loss.backward()
        return Scored(loss.detach(), None, hidden.grad, weight.grad)

    return run


def liger_scaled_cross_entropy(p):
    with _absent_unless_imported():
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Function
    if p.hidden.is_cuda:
        if torch.cuda.get_device_capability() != (9, 0):
            raise Absent("its kernel is Hopper's; elsewhere it is a chunked loop in PyTorch")
        with _absent_unless_imported():
            importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")

    def scores(hidden, weight, ids):
        nll, entropy = Function.apply(hidden, weight, ids, 1.0, -100, 1, True)
        return -nll, entropy.float()

    return _with_objective(p, scores)


def verl(p):
    linear_cross_entropy = _verl_function()
    if not p.hidden.is_cuda:
        raise Absent("its kernels need a GPU")
    return _with_objective(p, lambda hidden, weight, ids: linear_cross_entropy(hidden, weight, ids, 1.0, "none"))


@functools.cache
def _verl_function():
    name = "verl.utils.kernel.linear_cross_entropy"
    with _absent_unless_imported():
        try:
            return importlib.import_module(name).linear_cross_entropy
        except ImportError:
            # verl's own __init__ wants ray, tensordict and more, none of which the kernels use: bare packages in their place
            found = importlib.util.find_spec("verl")
            if found is None:
                raise
            for module in [m for m in sys.modules if m == "verl" or m.startswith("verl.")]:
                del sys.modules[module]
            folder = found.submodule_search_locations[0]
            for package, path in (("verl", ""), ("verl.utils", "/utils"), ("verl.plugin", "/plugin")):
                bare = types.ModuleType(package)
                bare.__path__ = [folder + path]
                sys.modules[package] = bare
            return importlib.import_module(name).linear_cross_entropy


def cut_cross_entropy(p):
    with _absent_unless_imported():
        from cut_cross_entropy import linear_cross_entropy
    if not p.hidden.is_cuda:
        raise Absent("its kernels need a GPU")

    def scores(hidden, weight, ids):
        return -linear_cross_entropy(hidden, weight, ids, reduction="none").float(), None

    return _with_objective(p, scores)


@contextlib.contextmanager
def _absent_unless_imported():
    try:
        yield
    except Exception as error:
        raise Absent(f"cannot be imported: {type(error).__name__}: {error}") from error


def _with_objective(p, scores):
    """Log-probs of another library under our objective; ``scores`` takes [N, D], [V, D] and [N]."""
    ids, shape = p.ids.flatten(), p.mask.shape

    def run():
        hidden, weight = p.leaves()
        with torch.set_grad_enabled(p.workload.gradients):
            logps, entropy = scores(hidden.flatten(0, 1), weight, ids)
            logps = logps.view(shape)
            entropy = None if entropy is None else entropy.view(shape)
        if not p.workload.gradients:
            return Scored(logps=logps, entropy=entropy)
        loss, _ = grpo_kernels.objective(
            logps, torch.zeros_like(logps) if entropy is None else entropy, p.advantages, p.mask, old_logps=p.old_logps,
            ref_logps=p.ref_logps, config=p.config,
        )  # fmt: skip
        loss.backward()
        return Scored(
            loss.detach(), logps.detach(), hidden.grad, weight.grad, None if entropy is None else entropy.detach()
        )

    return run
