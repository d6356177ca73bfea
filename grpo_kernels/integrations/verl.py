"""verl's fused linear cross-entropy, computed by our kernels.

verl (read and run: 0.9.1) reaches its Triton kernel through one name, ``verl.utils.kernel.linear_cross_entropy``: the forwards
that it gives to Hugging Face models import it at each call, its Megatron files once, at their top. `install_verl_backend` puts
our function under that name everywhere in verl, for these settings of a run:

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton
    actor_rollout_ref.model.external_lib=my_plugin

verl's workers are processes of their own, so installing in the driver alone changes nothing. ``external_lib`` (or the
environment variable VERL_USE_EXTERNAL_MODULES) names a module that each of them imports; ``my_plugin.py`` is then

    from grpo_kernels.integrations.verl import install_verl_backend
    install_verl_backend()

verl's optimal token baseline (``algorithm.adv_estimator=optimal_token_baseline``) wants the sum of p^2 beside the log-probs,
``actor_rollout_ref.actor.calculate_sum_pi_squared=True``, and verl's engines refuse that with a fused kernel. With
``install_sum_pi_squared()`` in place of ``install_verl_backend()`` the FSDP engine has both, and each row of logits is still read
once. ``external_lib`` it must be then: while verl is being imported its engine cannot be.
"""

import functools
import inspect
import sys
from types import SimpleNamespace

import torch

from ..checks import kind
from ..logprobs import token_statistics

_theirs = None  # verl's own function while ours stands in its place
_engine = None  # verl's FSDP engine and its own two methods while ours stand in their place
_sums = None  # where `linear_cross_entropy` leaves the sums of p^2 while an engine's step wants them


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the labels and entropies of their distributions, called and answered as verl's function of that name.

    Equals ``z = hidden.reshape(-1, D) @ weight.T / temperature``, then
    ``z.log_softmax(-1).gather(-1, labels.reshape(-1, 1)).squeeze(-1)``, reduced, and the entropy of ``z.softmax(-1)``.

    Args:
        hidden: [B, T, D], [N, D] or [.., D], float32, float64, bfloat16 or float16; differentiable.
        weight: [V, D] of the same dtype; differentiable. With a group: this rank's rows of the vocabulary.
        labels: int64 or int32 in [0, V), any shape with one value per row of hidden: both are flattened, each on its own, so
            Megatron's hidden [T, 1, D] goes with labels [1, T].
        temperature: a number > 0.
        reduction: ``none``, ``sum`` or ``mean``, of the log-probs alone: verl never reduces the entropy.
        dist_process_group: the group over which the vocabulary is sharded: labels are global, hidden is the same on every rank,
            and its gradient stays this rank's part of the sum, as verl's does: Megatron's gathering of hidden adds them up.

    Returns:
        (log-probs, entropy): [N] each, the log-probs 0-dim if reduced (a mean over no rows is 0). float32, or float64 for
        float64. Both are differentiable once, in hidden and weight; the gradients have their dtypes.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: verl 0.9.1, ``verl/utils/kernel/linear_cross_entropy.py`` and ``kernels.py``.
    """
    reduction = _checked_reduction(reduction)
    hidden, labels = _rows(hidden, labels)
    logps, entropy, log_sum_sq_probs, *_ = token_statistics(
        hidden, weight, labels, temperature=temperature, vocab_parallel_group=dist_process_group, sums_hidden=False,
        diagnostics=() if _sums is None else ("log_sum_sq_probs",),
    )  # fmt: skip
    if _sums is not None:
        _sums.append(log_sum_sq_probs.exp())
    if reduction == "none":
        return logps, entropy
    total = logps.sum()
    return (total if reduction == "sum" else total / max(labels.numel(), 1)), entropy


def install_verl_backend() -> None:
    """Make `linear_cross_entropy` verl's fused kernel in this process: in modules already imported and in those to come.

    Equals ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy = linear_cross_entropy`` and the same in every verl
    module that has imported verl's function. A second call changes nothing.

    Raises:
        RuntimeError: verl cannot be imported, or this version's function or forward is not the one known here.
    """
    global _theirs
    kernel = _known_verl()
    if kernel.linear_cross_entropy is not linear_cross_entropy:
        _theirs = kernel.linear_cross_entropy
        _replace(_theirs, linear_cross_entropy)


def install_sum_pi_squared() -> None:
    """`install_verl_backend`, and ``calculate_sum_pi_squared`` beside ``use_fused_kernels`` in verl's FSDP engine.

    Its ``sum_pi_squared`` equals ``z.softmax(-1).square().sum(-1)``, without the logits, and verl packs, gathers and nests it as it
    does log-probs. A second call changes nothing; `uninstall_verl_backend` takes all of it back.

    Raises:
        RuntimeError: as `install_verl_backend`; the engine is not the one known here; or, in a step, the fused kernel that ran was
            not this one.

    Source: verl 0.9.1, ``verl/workers/engine/fsdp/transformer_impl.py``; ``verl/trainer/ppo/core_algos.py``,
    ``compute_optimal_token_baseline_advantage``.
    """
    global _engine
    install_verl_backend()
    if _engine is not None:
        return
    engine, tensordicts = _known_engine()
    inputs, outputs = engine.prepare_model_inputs, engine.prepare_model_outputs

    def wants_sums(micro_batch):
        names = ("calculate_sum_pi_squared", "use_fused_kernels")
        return all(tensordicts.get_non_tensor_data(data=micro_batch, key=name, default=False) for name in names)

    def without(micro_batch, *names):
        copy = micro_batch.copy()
        tensordicts.assign_non_tensor(copy, **dict.fromkeys(names, False))
        return copy

    @functools.wraps(inputs)
    def prepare_model_inputs(self, micro_batch):
        global _sums
        _sums = [] if wants_sums(micro_batch) else None
        return inputs(self, micro_batch)

    @functools.wraps(outputs)
    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        global _sums
        if not wants_sums(micro_batch):
            return outputs(self, output, output_args, micro_batch, logits_processor_func)
        found, _sums = _sums or (), None
        if len(found) != 1 or found[0].numel() != output.log_probs.numel():
            raise RuntimeError("calculate_sum_pi_squared wants one call of grpo_kernels' linear_cross_entropy in each forward, got "
                               f"{len(found)}: set fused_kernel_options.impl_backend=triton")  # fmt: skip
        refused = "calculate_sum_pi_squared"
        done = outputs(self, output, output_args, without(micro_batch, refused), logits_processor_func)
        # on their way they are what verl takes for log-probs
        alone = without(micro_batch, refused, "calculate_entropy", "distillation_use_topk", "distillation_only")
        sums = SimpleNamespace(log_probs=found[0].view_as(output.log_probs))
        done["sum_pi_squared"] = outputs(self, sums, output_args, alone, None)["log_probs"]
        return done

    engine.prepare_model_inputs, engine.prepare_model_outputs = prepare_model_inputs, prepare_model_outputs
    _engine = engine, inputs, outputs


def uninstall_verl_backend() -> None:
    """Give verl its own functions back, in every module of verl that holds ours; nothing if none was installed."""
    global _theirs, _engine, _sums
    if _theirs is not None:
        _replace(linear_cross_entropy, _theirs)
        _theirs = None
    if _engine is not None:
        engine, *methods = _engine
        engine.prepare_model_inputs, engine.prepare_model_outputs = methods
        _engine = _sums = None


def _checked_reduction(reduction):
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, got {kind(reduction)}")
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")
    return reduction.lower()


def _rows(hidden, labels):
    """(hidden [N, D], labels [N] int64)."""
    for name, value in (("hidden", hidden), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {kind(value)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if hidden.dim() < 1:
        raise ValueError("hidden must be [.., D], got a 0-dim tensor")
    rows = hidden.shape[:-1].numel()
    if labels.numel() != rows:
        raise ValueError(f"labels must hold one value for each of hidden's {rows} rows, got {list(labels.shape)}")
    return hidden.reshape(rows, hidden.shape[-1]), labels.reshape(rows).long()


def _known_verl():
    """The module that holds verl's function, once its parameters and the way verl's forward finds it have been looked at."""
    try:
        import verl
        from verl.models.transformers import dense_common
        from verl.utils.kernel import linear_cross_entropy as kernel
    except ImportError as error:
        raise RuntimeError(f"verl's fused kernel cannot be imported ({error}); pip install verl==0.9.1") from error
    wanted = list(inspect.signature(linear_cross_entropy).parameters)
    found = _parameters(getattr(kernel, "linear_cross_entropy", None))
    if found != wanted:
        raise _unknown(verl, f"linear_cross_entropy takes {found}, wanted {wanted}")
    forward = inspect.unwrap(getattr(dense_common, "forward_with_triton_backend", None))
    if "linear_cross_entropy" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        raise _unknown(verl, "dense_common.forward_with_triton_backend does not call linear_cross_entropy")
    return kernel


def _known_engine():
    """(verl's FSDP engine, its module of functions on tensordicts), once its two methods have been looked at."""
    try:
        import verl
        from verl.utils import tensordict_utils
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as engine
    except ImportError as error:
        raise RuntimeError(f"verl's FSDP engine cannot be imported ({error}); pip install verl==0.9.1") from error
    wanted = {"prepare_model_inputs": ["self", "micro_batch"],
              "prepare_model_outputs": ["self", "output", "output_args", "micro_batch", "logits_processor_func"]}  # fmt: skip
    for name, parameters in wanted.items():
        found = _parameters(getattr(engine, name, None))
        if found != parameters:
            raise _unknown(verl, f"FSDPEngineWithLMHead.{name} takes {found}, wanted {parameters}")
    return engine, tensordict_utils


def _parameters(function):
    """Names of a function's parameters; those of forward, less ctx, for the apply of an autograd function."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return list(inspect.signature(owner.forward).parameters)[1:]
    return list(inspect.signature(function).parameters) if callable(function) else None


def _unknown(verl, what):
    version = getattr(verl, "__version__", "of unknown version")
    return RuntimeError(f"verl {version} is not known here: {what}; pip install verl==0.9.1, or call linear_cross_entropy yourself")


def _replace(old, new):
    for name, module in list(sys.modules.items()):
        if name == "verl" or name.startswith("verl."):
            # vars, since hasattr would run the lazy imports of a module's __getattr__
            for attribute, value in list(vars(module).items() if module is not None else ()):
                if value is old:
                    setattr(module, attribute, new)
