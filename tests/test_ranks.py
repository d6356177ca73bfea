"""Several ranks: the entropy quantile is taken over all of them, however many tokens each one keeps."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import make_problem, run
from tolerance import assert_close

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, reference

RANKS, PER_RANK = 2, 3
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


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS,
                            timeout=datetime.timedelta(seconds=120))  # fmt: skip
    group = dist.group.WORLD
    for shared in (True, False):
        q = part_of(whole_batch(shared), rank).with_config(entropy_coef=0.0)
        for name, function in (("fused", fused_linear_grpo_loss), ("reference", reference.grpo_loss)):
            out = run(function, q, data_parallel_group=group)
            torch.save((out.loss, out.gradients["weight"]), f"{folder}/{name}-{shared}-{rank}")
    dist.barrier()  # gloo aborts the process if the other side is gone before its threads are
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_the_entropy_quantile_is_that_of_all_ranks(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    for shared in (True, False):
        p = whole_batch(shared).with_config(entropy_coef=0.0)
        truth = run(reference.grpo_loss, p)
        alone = sum(run(reference.grpo_loss, part_of(p, r).with_config(entropy_coef=0.0)).loss for r in range(RANKS))
        assert shared == (abs(alone - truth.loss) > 1e-3), "quantiles per rank must not give the same"
        for name in ("fused", "reference"):
            parts = [torch.load(tmp_path / f"{name}-{shared}-{rank}") for rank in range(RANKS)]
            assert_close(f"{name} loss", sum(loss for loss, _ in parts), truth.loss, 1e-10)
            assert_close(f"{name} weight", sum(grad for _, grad in parts), truth.gradients["weight"], 1e-10)
