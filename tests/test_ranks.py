"""Several ranks: the entropy quantile is taken over all of them, however many tokens each one keeps."""

import torch
import torch.distributed as dist
from support.problems import make_problem, run
from support.ranks import join, launch, leave
from support.tolerance import assert_close

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, reference

RANKS, PER_RANK, SECONDS = 2, 3, 120
CONFIG = GRPOLossConfig(top_entropy_quantile=0.4, entropy_coef=0.1, loss_type="dapo")


def whole_batch(shared):
    """Both ranks' sequences as one batch; ``shared`` says whether rank 1 keeps any token."""
    p = make_problem(B=RANKS * PER_RANK, T=5, V=41, config=CONFIG, sampling=True, all_masked_sequence=False)
    if not shared:
        p.mask[PER_RANK:] = False
    return p


def part_of(p, rank):
    q = make_problem(B=1, config=CONFIG)
    own = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    for name in ("hidden", "completion_ids", "advantages", "mask", "old_logps", "ref_logps", "sampling_logps"):
        setattr(q, name, getattr(p, name)[own])
    q.weight, q.num_items = p.weight, p.kept  # the global count: losses and gradients of the ranks then add up
    return q


def work(rank, folder, port):
    join(rank, port, RANKS, SECONDS)
    group = dist.group.WORLD
    for shared in (True, False):
        q = part_of(whole_batch(shared), rank).with_config(entropy_coef=0.0)
        for name, function in (("fused", fused_linear_grpo_loss), ("reference", reference.grpo_loss)):
            out = run(function, q, data_parallel_group=group)
            torch.save((out.loss, out.gradients["weight"]), f"{folder}/{name}-{shared}-{rank}")
    leave()


def test_the_entropy_quantile_is_that_of_all_ranks(tmp_path):
    launch(work, tmp_path, RANKS, SECONDS)
    for shared in (True, False):
        p = whole_batch(shared).with_config(entropy_coef=0.0)
        truth = run(reference.grpo_loss, p)
        alone = sum(run(reference.grpo_loss, part_of(p, r).with_config(entropy_coef=0.0)).loss for r in range(RANKS))
        assert shared == (abs(alone - truth.loss) > 1e-3), "quantiles per rank must not give the same"
        for name in ("fused", "reference"):
            parts = [torch.load(tmp_path / f"{name}-{shared}-{rank}") for rank in range(RANKS)]
            assert_close(f"{name} loss", sum(loss for loss, _ in parts), truth.loss, 1e-10)
            assert_close(f"{name} weight", sum(grad for _, grad in parts), truth.gradients["weight"], 1e-10)
