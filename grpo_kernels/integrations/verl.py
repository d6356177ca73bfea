"""verl's fused kernel, on ours.

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
"""

import inspect
import sys

import torch

from ..checks import kind
from ..logprobs import token_statistics

_theirs = None  # verl's own function while ours stands in its place


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
    logps, entropy, *_ = token_statistics(
        hidden, weight, labels, temperature=temperature, vocab_parallel_group=dist_process_group, sums_hidden=False
    )
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


def uninstall_verl_backend() -> None:
    """Give verl its own function back, in every module of verl that holds ours; nothing if none was installed."""
    global _theirs
    if _theirs is not None:
        _replace(linear_cross_entropy, _theirs)
        _theirs = None


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
