"""The arithmetic of docs/cost_model.py against real calls: products counted, bytes through collectives counted, docs up to date."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from support.operations import operations as counted_operations
from support.problems import make_problem, run
from support.vocab_shards import SHARDS, V, sharded, spawn

from docs.cost_model import (
    KEPT,
    MODELS,
    TRAINED,
    Model,
    Step,
    handed_to_collectives,
    handed_to_data_parallel,
    operations,
    problem,
    sent,
    table,
)
from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss
from grpo_kernels.distributed import counted
from grpo_kernels.engine.plan import peak_bytes, plan, predict, steps

D = 16


def counts(p):
    kept = p.mask.bool()
    return int(kept.sum()), int((kept & (p.advantages != 0).unsqueeze(1)).sum())


@pytest.mark.parametrize("budget", [3000, 2**20])
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_the_products(budget, frozen):
    p = make_problem(B=6, V=V, D=D)
    needs = ("hidden",) if frozen else ("hidden", "weight")
    total = counted_operations(lambda: run(fused_linear_grpo_loss, p, needs=needs, workspace_bytes=budget))
    kept, trained = counts(p)
    assert total == operations(Model("", D, V), Step(kept, trained, trains_head=not frozen))


def test_recomputed_rows_pay_twice():
    p = make_problem(B=6, V=V, D=D, config=GRPOLossConfig(loss_type="vespo"), zero_advantages=False)
    kept, trained = counts(p)
    totals = [counted_operations(lambda b=b: run(fused_linear_grpo_loss, p, workspace_bytes=b)) for b in (1, 2**20)]
    assert totals == [operations(Model("", D, V), Step(kept, trained, recomputed=rows)) for rows in (trained, 0)]


def communicated(rank, world):
    results = []
    for config, two in ((GRPOLossConfig(), False), (GRPOLossConfig(loss_type="vespo"), True)):
        p = make_problem(B=6, V=V, D=D, config=config)
        q, _ = sharded(p, rank, world)
        with counted() as bytes:
            flops = counted_operations(
                lambda q=q: run(fused_linear_grpo_loss, q, vocab_parallel_group=dist.group.WORLD, workspace_bytes=3000)
            )
        results.append((dict(bytes), flops, *counts(p), two))
    across = []
    for options, means, quantile in ((dict(loss_type="bnpo", entropy_coef=0.1), 1, False), (dict(entropy_coef=0.1, top_entropy_quantile=0.5), 1, True)):
        p = make_problem(B=6, V=V, D=D, config=GRPOLossConfig(**options))
        with counted() as bytes:
            run(fused_linear_grpo_loss, p, data_parallel_group=dist.group.WORLD)
        across.append((dict(bytes), handed_to_data_parallel(p.mask.numel(), means, quantile, 8)))
    return results, across


@pytest.mark.exhaustive(reason="ten seconds: two and four processes")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_that_went_through(world, tmp_path):
    for rank, (results, across) in enumerate(spawn(tmp_path, world, communicated)):
        assert all(bytes == expected for bytes, expected in across), across
        for bytes, flops, kept, trained, two in results:
            step = Step(kept, trained, recomputed=trained if two else 0, two_phases=two)
            assert bytes == handed_to_collectives(Model("", D, V), step, 8, 8)
            assert flops == operations(Model("", D, SHARDS[world][rank]), step)


def test_rings():
    """Of P ranks: an all-gather of the statistics, an all-reduce of dH, FSDP's gather and reduce-scatter of its part of the head."""
    out = sent(Model("", 10, 80), Step(6, 4), tensor=4, sharded=2)
    assert out == {"statistics": 16 * 6 * 3, "dH": 2 * 3 / 4 * 4 * 10 * 2, "head gathered": 200.0, "dW reduced": 200.0}
    assert sent(Model("", 10, 80), Step(6, 4), 1, 1) == dict.fromkeys(out, 0)
    assert sent(Model("", 10, 80), Step(6, 0, trains_head=False), 2, 2)["dW reduced"] == 0


def test_heights_bytes_time_and_peak_are_those_of_the_plan():
    model, step = MODELS[0], Step(KEPT, TRAINED)
    for ranks in (1, 8):
        asked = problem(model, step, ranks=ranks)
        found, time = plan(asked), predict(asked)
        moved = sum(x.count * (x.read + x.written) for x in steps(asked, found)) / 2**30
        assert asked.live == found.buffer_rows == TRAINED and asked.dead == KEPT - TRAINED
        assert sum(2 * x.count * x.m * x.n * x.k for x in steps(asked, found)) == operations(model, step, ranks)
        cells = [f"{ranks} x .", f"6144, {found.chunk_rows}", r"[\d.]+", f"{moved:.1f}", f"{time.predicted_ms:.1f}", f"{time.ratio:.2f}"]
        row = re.search(rf"8B[^|]*\| {' . '.join(cells)} .*", table()).group()
        assert f"| {peak_bytes(asked, step.kept) / 2**30:.2f} GiB |" in row


def test_the_table_in_the_docs_is_this():
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    assert table() in text
    assert re.search(r"8B.*8 x 1", text)
