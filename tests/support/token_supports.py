"""Supports of every kind over a problem's positions."""

import dataclasses
import functools

import torch

from grpo_kernels import TokenSupport, reference
from support.problems import DEVICE, run


def draw_support(p, seed, empty=0.15, single=0.35):
    """Ranges of every kind over a problem's positions: empty, of one token, of several, of nearly all; garbage where masked."""
    g = torch.Generator().manual_seed(seed)
    vocab, ids = p.weight.shape[0], p.completion_ids.reshape(-1)
    kept, N = p.mask.bool().reshape(-1), p.mask.numel()
    share = torch.tensor([0.05, 0.3, 0.95])[torch.randint(0, 3, (N, 1), generator=g)]
    allowed = torch.rand(N, vocab, generator=g) < share
    kind = torch.rand(N, generator=g)
    allowed[(kind >= empty) & (kind < empty + single)] = False
    allowed[torch.arange(N), ids.where(kept, 0)] = True
    allowed[kind < empty] = False
    support = TokenSupport.from_mask(allowed)
    # in any order, and ids that are nobody's where nothing is kept
    order = torch.rand(len(support.ids), generator=g)
    order = torch.stack([support.facts().row_of, order.argsort().argsort()]).double()
    ids = support.ids[(order[0] * len(support.ids) + order[1]).argsort()]
    return TokenSupport(ids.where(kept[support.facts().row_of], vocab + 7).to(DEVICE), support.offsets.to(DEVICE))


def over_support(p, seed, **kinds):
    """(the problem with old, reference and sampler's log-probs as far from the policy's over the support as they were; the support)."""
    support = draw_support(p, seed, **kinds)
    config = dataclasses.replace(p.config, beta=0.0, off_policy_mask_threshold=None, top_entropy_quantile=1.0)
    call = functools.partial(run, reference.grpo_loss, dataclasses.replace(p, config=config), dtype=torch.float64, needs=())
    with torch.no_grad():
        shift = (call(support=support).logps - call().logps).cpu()
    moved = {name: getattr(p, name) + shift for name in ("old_logps", "ref_logps", "sampling_logps") if getattr(p, name) is not None}
    return dataclasses.replace(p, **moved), support
