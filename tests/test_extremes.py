"""Logits of 1e4, columns of -inf, log-probs of -1000, and values that are not finite: the reference's answer, a NaN loss, or an error."""

import math

import pytest
import torch
from support.micro_batches import batch
from support.tiny_trainer import trainer

from grpo_kernels import GRPOLossConfig, available_backends, fused_linear_grpo_loss, linear_logprobs, reference
from grpo_kernels.trainer import microbatch
from grpo_kernels.trainer.not_finite import NotFinite

BACKENDS = [name for name, why in available_backends().items() if why is None and name != "triton"]
INF, NAN = math.inf, math.nan
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_level = pytest.mark.parametrize("level", ["token", "sequence"])


def problem(V=6000, D=8, B=2, T=5, scale=1.0, dtype=torch.float32):
    hidden, weight = scale * torch.randn(B, T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3:] = False
    return dict(hidden=hidden, weight=weight, completion_ids=torch.randint(0, V, (B, T)), advantages=torch.tensor([1.0, -0.5]), mask=mask)


def both(p, backend, config, rel=1e-4, **more):
    """(loss, gradients) of ours and of the reference in float64."""
    found = []
    for function, cast, own in ((fused_linear_grpo_loss, lambda x: x, dict(backend=backend, workspace_bytes=60_000)),
                                (reference.grpo_loss, torch.Tensor.double, {})):  # fmt: skip
        given = {k: cast(v) if v.is_floating_point() else v for k, v in {**p, **more}.items()}
        leaves = [given[k].detach().clone().requires_grad_() for k in ("hidden", "weight")]
        out = function(*leaves, given.pop("completion_ids"), given.pop("advantages"), given.pop("mask"), config=config, **own,
                       **{k: v for k, v in given.items() if k not in ("hidden", "weight")})  # fmt: skip
        out.loss.backward()
        found.append((out.loss.detach(), *(x.grad for x in leaves)))
    for ours, exact, name in zip(*found, ("loss", "hidden", "weight"), strict=True):
        assert ours.isfinite().all() and exact.isfinite().all(), name
        assert (ours - exact).norm() <= rel * exact.norm() + 1e-12, name
    return found[0]


@each_backend
@each_level
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits(backend, level, size):
    p = problem(scale=size / 3)
    p["completion_ids"][0] = (p["hidden"][0] @ p["weight"].T).argmax(-1)  # else every probability is 0 and so is every gradient
    lp = reference.grpo_loss(p["hidden"].double(), p["weight"].double(), *(p[k] for k in ("completion_ids", "advantages", "mask"))).logps
    assert lp.min() < -size
    # a logit of 1e4 in float32 is known to 1e-3: ratios to as much
    both(p, backend, GRPOLossConfig(importance_sampling_level=level, loss_type="grpo"), rel=5e-3, old_logps=lp.float())


@each_backend
@each_level
def test_columns_and_whole_chunks_of_minus_infinity(backend, level):
    p = problem()
    bias = torch.zeros(6000)
    bias[100:5000] = -INF  # more than any block of columns at this workspace
    p["completion_ids"] = p["completion_ids"] % 100
    loss, _, d_weight = both(p, backend, GRPOLossConfig(importance_sampling_level=level), bias=bias, old_logps=torch.full((2, 5), -7.0))
    assert d_weight[100:5000].abs().max() == 0 and d_weight[:100].abs().max() > 0


@pytest.mark.cover("backend", "loss_type")
@each_backend
@each_level
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo", "grpo"])
def test_ratios_that_overflow_and_log_probs_of_minus_a_thousand(backend, level, loss_type):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        pytest.skip("not a combination")
    p, config = problem(), GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.01)
    for old, ref in ((-1e3, -5.0), (-1e30, -5.0), (-1e-3, -1e3), (-5.0, -5.0), (0.0, -1e30)):
        given = dict(p, old_logps=torch.full((2, 5), old), ref_logps=torch.full((2, 5), ref))
        leaves = [given.pop(k).requires_grad_() for k in ("hidden", "weight")]
        out = fused_linear_grpo_loss(*leaves, **given, config=config, backend=backend)
        gradients = torch.autograd.grad(out.loss, leaves)
        assert out.loss.isfinite() and all(g.isfinite().all() for g in gradients), (old, ref)


@pytest.mark.cover("backend", "where")
@each_backend
@each_level
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["hidden", "weight", "old_logps", "ref_logps"])
def test_what_is_not_finite_is_a_nan_loss_where_it_is_kept_and_nothing_where_it_is_not(backend, level, value, where):
    p = dict(problem(V=300), old_logps=torch.full((2, 5), -5.0), ref_logps=torch.full((2, 5), -5.0))
    config = GRPOLossConfig(importance_sampling_level=level, beta=0.1)
    clean = fused_linear_grpo_loss(**p, config=config, backend=backend).loss
    if where != "weight":
        beside = {**p, where: p[where].clone()}
        beside[where][1, 4] = value
        assert torch.equal(fused_linear_grpo_loss(**beside, config=config, backend=backend).loss, clean)
    p[where] = p[where].clone()
    p[where][(17 if where == "weight" else 0), ...] = value
    leaves = [p.pop(k).requires_grad_() for k in ("hidden", "weight")]
    loss = fused_linear_grpo_loss(*leaves, **p, config=config, backend=backend).loss
    assert loss.isnan()
    loss.backward()
    assert any(not x.grad.isfinite().all() for x in leaves)


@each_backend
def test_log_probs_of_what_is_not_finite_are_nan_in_their_rows_alone(backend):
    p = problem(V=300)
    hidden = p["hidden"].clone()
    hidden[0, 2, 1] = NAN
    found = linear_logprobs(hidden, p["weight"], p["completion_ids"], backend=backend)
    clean = linear_logprobs(p["hidden"], p["weight"], p["completion_ids"], backend=backend)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[0, 2] = True
    assert found.logps[bad].isnan().all() and found.entropy[bad].isnan().all()
    assert torch.equal(found.logps[~bad], clean.logps[~bad]) and torch.equal(found.entropy[~bad], clean.entropy[~bad])


# ---- what the trainer says of it ----


def said(t, given):
    t.model.train()
    with pytest.raises(NotFinite) as caught:
        t.compute_loss(t.model, given)
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_the_trainer_names_tensor_sequence_and_token(tmp_path, packed):
    t = trainer(tmp_path, padding_free=packed, beta=0.1)
    given = batch(ref_logps=torch.full((6, 5), -2.5), num_items=torch.tensor(9.0))
    t.compute_loss(t.model, given)
    row, position = given["mask"].nonzero()[-1].tolist()
    token = int(given["input_ids"][row, 4 + position])
    for name in ("old_logps", "ref_logps"):
        spoilt = {**given, name: given[name].clone()}
        spoilt[name][row, position] = NAN
        text = said(t, spoilt)
        assert f"{name} at completion {row} of the micro-batch, position {position}, token {token} (" in text, text
    spoilt = {**given, "ref_logps": torch.full((6, 5), NAN)}
    assert f", and {int(given['mask'].sum()) - 1} more" in said(t, spoilt)


def test_the_trainer_names_the_row_that_was_skipped_around(tmp_path):
    t = trainer(tmp_path)
    given = batch(zero=(0, 1, 2))
    given["old_logps"][4, 0] = INF
    assert microbatch.make(given, t.loss_config, skip=True).rows.tolist() == [3, 4, 5]
    assert "completion 4 of" in said(t, given)


def test_the_trainer_names_what_broke_in_the_model(tmp_path):
    t = trainer(tmp_path)
    with torch.no_grad():
        t.model.lm_head.weight[7, 3] = NAN
    text = said(t, batch())
    assert "the head's weight in the row of token 7" in text and "lm_head.weight: an earlier step broke it" in text
    t = trainer(tmp_path)
    with torch.no_grad():
        t.model.model.norm.weight[0] = INF
    text = said(t, batch())
    assert "the hidden states at completion" in text and "model.norm.weight" in text
