"""Kept rows: padded, packed and given rows are one loss; with rows given nothing is read back, so bad values make a NaN loss."""

import dataclasses
import math

import pytest
import torch
from support.loss_calls import assert_kept_rows_and_layouts_agree, every_backend, every_path, on_the_cpu
from support.problems import DEVICE, make_problem, run

from grpo_kernels import fused_linear_grpo_loss


@every_backend
@every_path
def test_kept_rows_and_layouts_agree(config, backend):
    assert_kept_rows_and_layouts_agree(config, backend)


@every_backend
@every_path
def test_bad_values_with_kept_rows_are_a_nan_loss(config, backend):
    """kept_rows promises no synchronisation: nothing can be raised, and nothing wild be read."""
    good = make_problem(B=4, T=5, V=33, config=config, sampling=True)
    rows = good.kept_rows()
    for name, value in (("completion_ids", 33), ("completion_ids", -1), ("completion_ids", 2**60), ("advantages", math.nan)):
        bad = dataclasses.replace(good, **{name: getattr(good, name).clone()})
        getattr(bad, name)[(1,) if name == "advantages" else (1, int(good.mask[1].int().argmax()))] = value
        assert run(fused_linear_grpo_loss, bad, backend=backend, kept_rows=rows).loss.isnan(), (name, value)
    bad = dataclasses.replace(good, mask=good.mask.double() * 2)
    assert run(fused_linear_grpo_loss, bad, backend=backend, kept_rows=rows).loss.isnan()


@every_backend
@pytest.mark.parametrize("rows", [[0, 10**6], [-1, 2], [0, 20], [2**62]])
def test_kept_rows_out_of_range_never_read_wild(rows, backend):
    p = make_problem(B=4, T=5, V=33)
    try:
        out = run(fused_linear_grpo_loss, p, backend=backend, kept_rows=torch.tensor(rows, device=DEVICE))
    except (ValueError, IndexError, RuntimeError):
        return
    assert out.loss.isnan()


@on_the_cpu
@every_path
@pytest.mark.parametrize("ends", [(0, 4, 3), (1, 2, 3), (0, 2, 2), (0, 9, 3)])
def test_wrong_ends_of_sequences_with_kept_rows_are_a_nan_loss(config, ends):
    """Without them an exception; with them nothing is read back, and nothing is read or written out of place."""
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(0, 11, (3,), generator=g), torch.ones(3, dtype=torch.bool)
    lp = -torch.rand(3, generator=g)
    arguments = [torch.randn(3, 4, generator=g), torch.randn(11, 4, generator=g), ids, torch.ones(2), mask]
    more = dict(config=config, old_logps=lp, ref_logps=lp, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 3"):
        fused_linear_grpo_loss(*arguments, **more)
    assert fused_linear_grpo_loss(*arguments, **more, kept_rows=torch.arange(3)).loss.isnan()
    more["cu_seqlens"] = torch.tensor((0, 2, 3), dtype=torch.int32)
    assert fused_linear_grpo_loss(*arguments, **more, kept_rows=torch.arange(3)).loss.isfinite()
