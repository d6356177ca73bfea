"""Who computes the loss. A provider is a function: problem -> a call without arguments that returns a `Result`.

What is made in the function (preallocated outputs, flattened views) is not timed; everything the call does is. A provider that
cannot run says why in `missing`; one that cannot do a workload returns None.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

import grpo_kernels

from .problem import Problem, Result

PRODUCT_ROWS = 512


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Problem], Callable[[], Result] | None]
    package: str = "torch"  # whose version a row records
    wanted: str | None = None  # the version its figures are known for
    rounds: int | None = None  # None: all of them; slow peers take fewer
    settings: dict = field(default_factory=dict)

    def missing(self) -> str | None:
        try:
            found = version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        if self.wanted is not None and found != self.wanted:
            return f"{self.package} {self.wanted} is wanted, {found} is installed"
        return None


def _ours(p: Problem):
    def logprobs():
        with torch.no_grad():
            return Result(logps=grpo_kernels.linear_logprobs(p.hidden, p.weight, p.ids, mask=p.mask).logps)

    def loss():
        hidden, weight = p.leaves()
        out = grpo_kernels.fused_linear_grpo_loss(
            hidden, weight, p.ids, p.advantages, p.mask, old_logps=p.old_logps, config=p.config
        )
        out.loss.backward()
        return Result(out.loss.detach(), out.logps, hidden.grad, weight.grad)

    return loss if p.workload.gradients else logprobs


def _products(p: Problem):
    """The floor: nothing but the products that are needed, on outputs that exist already, dW overwritten per chunk.

    Rows that need no gradient are only multiplied by the head, masked ones not at all. A fused call can be below it: oneDNN
    is faster on 1024 rows than on twice 512, and dz^T h faster from a transposed copy than from a transposed view.
    """
    kept = p.mask.flatten().nonzero().squeeze(1)
    trained = (p.advantages != 0).unsqueeze(1).expand_as(p.mask).flatten()[kept]
    rows = p.hidden.flatten(0, 1)[torch.cat([kept[trained], kept[~trained]])]
    live = int(trained.sum()) if p.workload.gradients else 0
    z = rows.new_empty(min(PRODUCT_ROWS, rows.shape[0]), p.shape.vocab)
    dh, dw = torch.empty_like(rows), torch.empty_like(p.weight)

    def run():
        for start in range(0, rows.shape[0], PRODUCT_ROWS):
            h = rows[start : start + PRODUCT_ROWS]
            tile = torch.mm(h, p.weight.T, out=z[: h.shape[0]])
            n = min(max(live - start, 0), h.shape[0])
            if n:
                torch.mm(tile[:n], p.weight, out=dh[start : start + n])
                if p.workload.trains_head:
                    torch.mm(tile[:n].T, h[:n], out=dw)
        return Result()

    return run


def _objective(p: Problem, logps, entropy=None):
    """The loss on [B, T] log-probs; without an entropy, only its metric is lost."""
    entropy = torch.zeros_like(logps) if entropy is None else entropy
    return grpo_kernels.objective(logps, entropy, p.advantages, p.mask, old_logps=p.old_logps, config=p.config)[0]


def _full_logits(p: Problem):
    """The head's product in the inputs' dtype, log-probs in float32, no entropy: the least that plain PyTorch can do."""

    def logprobs(hidden, weight):
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, p.ids.unsqueeze(-1)).squeeze(-1)

    return _with_autograd(p, logprobs)


def _trl(p: Problem):
    """As TRL's trainer calls it on a GPU: kept rows only, entropy beside the log-probs."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def logprobs(hidden, weight):
        out = ChunkedLogProbFunction.apply(hidden[p.mask], weight, None, p.ids[p.mask], 1.0, CHUNK, None, 1.0, ("entropy",))
        return tuple(x.new_zeros(p.mask.shape).masked_scatter(p.mask, x) for x in out[:2])

    return _with_autograd(p, logprobs)


def _with_autograd(p: Problem, logprobs):
    def run():
        hidden, weight = p.leaves()
        if not p.workload.gradients:
            with torch.no_grad():
                out = logprobs(hidden, weight)
            return Result(logps=out[0] if isinstance(out, tuple) else out)
        out = logprobs(hidden, weight)
        logps, entropy = out if isinstance(out, tuple) else (out, None)
        loss = _objective(p, logps, entropy)
        loss.backward()
        return Result(loss.detach(), logps.detach(), hidden.grad, weight.grad)

    return run


def _liger(p: Problem):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if not p.workload.gradients:
        return None  # it has no log-probs of its own
    # torch.compile would be handed a new closure by every call, and compile it each time
    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=p.config.epsilon, epsilon_high=p.config.upper_epsilon,
        loss_type=p.config.loss_type, importance_sampling_level=p.config.importance_sampling_level,
    )  # fmt: skip

    def run():
        hidden, weight = p.leaves()
        loss, _ = fused(hidden, weight, p.ids, p.mask, p.advantages, old_per_token_logps=p.old_logps)
        loss.backward()
        return Result(loss.detach(), None, hidden.grad, weight.grad)

    return run


OURS, PRODUCTS, FULL, TRL, LIGER = "grpo_kernels", "products", "full_logits", "trl", "liger"
PROVIDERS = {
    p.name: p
    for p in (
        Provider(PRODUCTS, _products, settings={"rows": PRODUCT_ROWS}),
        Provider(OURS, _ours),
        Provider(FULL, _full_logits),
        Provider(TRL, _trl, "trl", "1.16.0", rounds=3, settings={"rows": "kept only"}),
        Provider(LIGER, _liger, "liger-kernel", "0.8.5", rounds=3, settings={"compiled": False}),
    )
}
