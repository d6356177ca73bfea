"""How far rounding alone may move a result: bounds measured on the numbers of each call.

The computation runs a few times over. Each time every result that the dtype rounds is moved by half a unit of its last place, up
or down by a coin. Products and softmax run in float64 beneath that, the loss of the log-probs in the dtype of its accumulation,
as PyTorch computes it. The largest error of these runs is what rounding costs here.
"""

import math
from dataclasses import dataclass

import torch

from grpo_kernels import objective, reference

RUNS = 8
SLACK = 2.0


def half_unit(dtype):
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Coins:
    """Moves numbers by half a unit of their last place."""

    dtype: torch.dtype  # of products: logits, their gradient, the gradients of hidden and weight
    generator: torch.Generator
    alike: bool  # one coin for all of dimension 0: equal sequences round alike

    @property
    def narrow(self):
        """The dtype of sums, log-probs and per-token tensors."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def error(self, size, dtype):
        """An error of half a unit of each element of ``size``."""
        shape = (1, *size.shape[1:]) if self.alike and size.dim() > 1 else size.shape
        return (torch.randint(0, 2, shape, generator=self.generator).double() * 2 - 1) * half_unit(dtype) * size

    def stored(self, x, dtype=None):
        return None if x is None else x + self.error(x.abs(), dtype or self.dtype)

    def product(self, a, b):
        """a @ b, summed in the narrow dtype and stored in the products' own."""
        return self.stored(a @ b) + self.error(a.abs() @ b.abs(), self.narrow)


def loss_terms(ids, advantages, mask, config, old_logps, ref_logps, num_items):
    """What `rounded` calls with log-probs and entropies: the loss and its metrics, of per-token tensors that are moved too."""

    def terms(logps, entropy, coins):
        old, ref, moved, logps, entropy = (
            None if x is None else coins.stored(x, coins.narrow).to(coins.narrow) for x in (old_logps, ref_logps, advantages, logps, entropy)
        )
        return objective(logps, entropy, moved, mask, old_logps=old, ref_logps=ref, num_items=num_items, config=config)

    return terms


def sizes_of_kl(mask, config, num_items):
    """name -> what it is when each token's KL is 1: exp(d) - 1 - d is off by a unit of 1 however small it is itself."""
    if config.beta == 0:
        return {}
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    loss, _ = objective(zeros, zeros, zeros, mask, ref_logps=zeros + 1, num_items=num_items, config=config)
    loss = loss.abs().item() / (math.e - 2)
    return {"loss": loss, "metric policy_loss": loss, "metric kl": 1.0}


def rounded(coins, hidden, weight, ids, mask, config, terms):
    """name -> result of one run. ``hidden`` are the logits where ``weight`` is None."""
    z = hidden.clone() if weight is None else coins.product(hidden, weight.T)
    # what is exponentiated is a difference of two float32 numbers as large as the row's largest logit or the log of its width
    size = z.abs().amax(-1, keepdim=True) + torch.tensor(float(z.shape[-1])).log() if z.numel() else z
    z = (z + coins.error(size.expand_as(z), coins.narrow)).requires_grad_()
    logps, entropy = reference.logps_from_logits(z, ids, mask, config)
    # a sum of probabilities is off by half a unit of 1, and with it the log-probs that the entropy averages
    entropy = entropy + coins.error((entropy > 0).double(), coins.narrow)
    loss, metrics = terms(logps, entropy, coins)
    out = {"loss": loss, "logps": logps, "entropy": entropy, **{f"metric {k}": v for k, v in metrics.items()}}
    out = {k: coins.stored(v.detach().double(), coins.narrow) for k, v in out.items()}
    if not loss.requires_grad:
        return out
    (dz,) = torch.autograd.grad(loss, z)
    dz = coins.stored(dz)
    if weight is None:
        return {**out, "gradient of hidden": dz}
    rows, flat = dz.reshape(-1, dz.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    return {**out, "gradient of hidden": coins.product(dz, weight), "gradient of weight": coins.product(rows.T, flat)}


def runs(dtype, *call):
    generator = torch.Generator().manual_seed(0)
    return [rounded(Coins(dtype, generator, alike=i % 2 == 0), *call) for i in range(RUNS)]


def assert_within_rounding(ours, exact, rounded_runs, narrow, sizes=None):
    """Each of ``ours`` is as near to ``exact`` as rounding allows; 0 where that is 0. ``sizes``: of what cancelled in a result."""
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        x, truth = ours[name].detach().double(), truth.detach().double()
        assert x.shape == truth.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        assert not x[truth == 0].any(), f"{name} is {x[truth == 0].abs().max():.2e} where the truth is 0"
        error, size = (x - truth).norm().item(), truth.norm().item() + (sizes or {}).get(name, 0.0)
        # beside the runs: four units of the narrow dtype, for exp, log and the sums behind them
        bound = SLACK * max((run[name] - truth).norm().item() for run in rounded_runs) + 8 * half_unit(narrow) * size
        assert error <= bound, f"{name}: off by {error:.2e} of {truth.norm():.2e}, rounding allows {bound:.2e}"
