"""`integrations.liger` against the class it stands in for: loss, metrics and gradients over the grid of liger's options."""

import ast
import dataclasses
import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from support.liger_calls import DRAWS, OPTIONS, PAIRS, B, Call, D, T, Theirs, V, assert_equal, draws, peer, problem_of
from support.problems import make_problem, policy_logps
from support.seeds import each_seed
from support.tolerance import assert_all_close, assert_no_worse_than_torch

import grpo_kernels.integrations
from grpo_kernels import GRPOLossConfig, grpo_loss_from_logits
from grpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss


def tensors_of(results):
    return {name: value for name, value in results.items() if not name.startswith("metric")}


@pytest.mark.parametrize("loss_type, level", [pair for pair in PAIRS if pair[0] != "luspo"])
@each_seed(0, DRAWS, usual=6)
def test_equals_liger(seed, loss_type, level):
    call = Call(seed, loss_type, level)
    ours, theirs = call.run(LigerFusedLinearGRPOLoss), call.run(Theirs)
    exact = call.run_reference()
    slack = 2 * abs(theirs["loss"] - exact["loss"]).item()  # one rounding of a log-prob of -11 moves vespo's by 6e-5
    assert_equal(tensors_of(ours), exact, "exact", slack=slack)
    assert_equal(ours, theirs, "liger", slack=slack)


@pytest.mark.parametrize("loss_type, level", [pair for pair in PAIRS if pair[0] != "luspo"])
def test_the_metrics_show_something(loss_type, level):
    """Of a third of the draws liger's metrics are not 0, so that equal ones mean something."""
    clipped, kl = 0, 0
    for seed in range(DRAWS):
        metrics = [value for name, value in Call(seed, loss_type, level).run(Theirs).items() if name.startswith("metric")]
        clipped, kl = clipped + bool(metrics[-1] > 0), kl + bool(len(metrics) == 2 and metrics[0] != 0)
    assert kl > DRAWS // 3 and (clipped > DRAWS // 3) == (loss_type not in ("sapo", "vespo"))


@pytest.mark.parametrize("level", ["token", "sequence"])
@each_seed(0, DRAWS, usual=8)
def test_luspo_is_that_of_the_specification_and_ligers_only_where_that_is_right(seed, level):
    for full_mask in (False, True):
        call = Call(seed, "luspo", level, full_mask=full_mask)
        ours, theirs = call.run(LigerFusedLinearGRPOLoss), call.run(Theirs)
        assert_equal(tensors_of(ours), call.run_reference(), "exact")
        if call.liger_reduces_luspo_rightly:
            assert_equal(ours, theirs, "liger")
            continue
        assert_equal({n: ours[n] for n in ours if "metric" in n}, {n: theirs[n] for n in theirs if "metric" in n}, "metrics")
        with pytest.raises(AssertionError):  # or liger has been mended
            assert_equal(ours, theirs, "liger", tolerance=2e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_draws_hold_luspo_where_liger_is_right_and_where_it_is_wrong(level):
    calls = [Call(seed, "luspo", level, full_mask=full_mask) for seed in range(DRAWS) for full_mask in (False, True)]
    assert DRAWS // 3 < sum(call.liger_reduces_luspo_rightly for call in calls) < len(calls) - DRAWS // 3


@pytest.mark.parametrize("loss_type, level", [pair for pair in PAIRS if pair[0] != "vespo"])
def test_the_inputs_reach_below_inside_and_above_the_clip_range_for_both_signs(loss_type, level):
    reached, all_masked = set(), False
    for seed in range(DRAWS):
        call = Call(seed, loss_type, level)
        p, kept, o = call.problem, call.problem.mask.bool(), call.options
        all_masked |= bool((~kept).all(1).any())
        if p.old_logps is None:
            continue
        d = (policy_logps(p) - p.old_logps).where(kept, 0.0)
        if level == "sequence":
            d = (d.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)).expand(B, T)
        w, A = d.exp()[kept], p.advantages.unsqueeze(1).expand(B, T)[kept]
        high = 1 + o["epsilon_high"]
        bounds = torch.tensor([1 - o["epsilon_low"], high if loss_type != "cispo" else o["epsilon_high"]])
        assert (w.log().unsqueeze(1) - bounds.log()).abs().min() > 0.01, "rounding must not decide what is clipped"
        where = (w > 1 - o["epsilon_low"]).int() + (w > high).int()
        reached |= {(*pair,) for pair in torch.stack([A.sign().int(), where], 1).tolist()}
    assert all_masked and reached >= {(sign, side) for sign in (-1, 1) for side in (0, 1, 2)}, reached


def test_vespo_reads_no_ratio_at_masked_positions():
    call = Call(0, "vespo", "token", ratio="[B, T]")
    clean, theirs_clean = call.run(LigerFusedLinearGRPOLoss), call.run(Theirs)
    kept = call.problem.mask.bool()
    ratio = call.tensors["vllm_is_ratio"].where(kept, 0.7)
    ours, theirs = call.run(LigerFusedLinearGRPOLoss, vllm_is_ratio=ratio), call.run(Theirs, vllm_is_ratio=ratio)
    assert_equal(ours, clean, "", 0.0)
    assert abs(theirs["loss"] - theirs_clean["loss"]) > 1e-3 * abs(theirs_clean["loss"]), "liger has been mended"


@pytest.mark.parametrize("loss_type, level", PAIRS)
def test_what_stands_at_masked_positions_does_not_matter(loss_type, level):
    call = Call(1, loss_type, level, ratio="[B, T]", reference="input", on_policy=False)
    kept, nan = call.problem.mask.bool(), math.nan
    assert not kept.all()
    garbage = {n: call.tensors[n].where(kept, nan) for n in ("old_per_token_logps", "vllm_is_ratio")}
    garbage |= {n: call.tensors[n].where(kept.unsqueeze(-1), nan) for n in ("_input", "ref_input")}
    garbage["selected_token_ids"] = call.tensors["selected_token_ids"].where(kept, -100)
    assert_equal(call.run(LigerFusedLinearGRPOLoss, **garbage), call.run(LigerFusedLinearGRPOLoss), "", 0.0)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo"])
@pytest.mark.parametrize("num_items", [None, 53, 0.6, torch.tensor(53)])
def test_ranks_divide_by_the_mean_of_their_tokens(loss_type, num_items, monkeypatch):
    """Three ranks of which this one is emulated: liger sees the same torch.distributed as we do."""
    call = Call(2, loss_type, "token", num_items=num_items)
    alone, calls = call.run(LigerFusedLinearGRPOLoss), []

    def all_reduce(count, **_):
        calls.append(count.item())
        count += 19

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    ours = call.run(LigerFusedLinearGRPOLoss)
    assert calls == ([call.problem.kept] if num_items is None and loss_type != "grpo" else [])
    assert_equal(ours, call.run(Theirs), loss_type)
    assert (abs(ours["loss"] - alone["loss"]) > 1e-3 * abs(alone["loss"])) == (loss_type != "grpo" and num_items != 0.6)


@pytest.mark.parametrize("loss_type, level", PAIRS)
def test_one_loss_a_token_is_that_of_ligers_kernel_over_logits(loss_type, level):
    """``triton_grpo_loss(reduce=False)``: the same [B, T] before any normaliser, and the same gradient by weights of one's own."""
    triton_grpo_loss = pytest.importorskip("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    p = problem_of(5, loss_type, level)
    (hidden, weight, ids, advantages, mask), keywords, _ = p.arguments(needs=())
    old, ref = keywords["old_logps"], keywords["ref_logps"]
    g = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    ours = (hidden @ weight.T).requires_grad_()
    theirs = torch.cat([ours, ours[:, -1:]], 1).detach().requires_grad_()  # liger drops the last position itself
    config = dataclasses.replace(p.config, beta=0.1, epsilon_high=0.28, use_bias_correction_kl=False)
    loss = grpo_loss_from_logits(ours, ids, advantages, mask, old_logps=old, ref_logps=ref, config=config, reduction="none").loss
    their_loss, *_ = triton_grpo_loss(
        theirs, old, ref, ids, advantages, completion_mask=mask.int(), temperature=1.0, beta=0.1, eps_low=0.2, eps_high=0.28,
        inplace=False, loss_type=loss_type, max_completion_length=T, importance_sampling_level=level, reduce=False,
    )  # fmt: skip
    for x in (loss, their_loss):
        (x * g).sum().backward()
    results = [{"per token": x.detach(), "gradient": z.grad[:, :T]} for x, z in ((loss, ours), (their_loss, theirs))]
    assert_equal(*[{**x, "loss": x["per token"].sum()} for x in results], f"{loss_type} {level}")


def test_gradients_of_constants_are_lost_as_in_liger():
    """grpo_kernels' own functions refuse them."""
    call = Call(0, "dapo", "token", reference="logps", ratio="[B, T]", on_policy=False, beta=0.3)
    constants = ("advantages", "old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio")
    leaves = {n: call.tensors[n].float().requires_grad_() for n in constants}
    assert_equal(call.run(LigerFusedLinearGRPOLoss, **leaves), call.run(Theirs, **leaves), "constants")
    assert all(x.grad is None for x in leaves.values())


@pytest.mark.parametrize("hidden, weight", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                            (torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_mixed_dtypes(hidden, weight):
    """Whatever liger takes: a head of another dtype, int32 ids, old log-probs in bfloat16, advantages in float64."""
    for loss_type in ("dapo", "cispo"):
        call = Call(3, loss_type, "token", bias=True, reference="input", temperature=1.0, frozen=(), on_policy=False)
        t = call.tensors
        stored = {"_input": t["_input"].to(hidden), "ref_input": t["ref_input"].to(weight), "bias": t["bias"].to(weight),
                  "lin_weight": t["lin_weight"].to(weight), "ref_weight": t["ref_weight"].to(hidden),
                  "old_per_token_logps": t["old_per_token_logps"].bfloat16()}  # fmt: skip
        for name, value in stored.items():
            t[name] = value.float()
        exact = call.run_reference()
        more = dict(selected_token_ids=t["selected_token_ids"].int(), advantages=t["advantages"].double())
        ours = call.run(LigerFusedLinearGRPOLoss, torch.float64, **stored, **more)
        theirs = call.run(Theirs, torch.float64, **stored, **more)
        for name, truth in exact.items():
            assert ours[name].dtype == theirs[name].dtype, name
            assert_no_worse_than_torch(f"{loss_type} {name}", ours[name], theirs[name], truth, floor=4e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_float64_and_advantages_per_token_against_the_reference(level):
    p = make_problem(
        B=B, T=T, D=D, V=V, per_token_advantages=True, bias=True, config=GRPOLossConfig(importance_sampling_level=level)
    )
    call = Call(4, "dapo", level, temperature=1.0, on_policy=False, reference="logps", frozen=())
    call.tensors = dict(
        _input=p.hidden, lin_weight=p.weight, selected_token_ids=p.completion_ids, attention_mask=p.mask, bias=p.bias,
        advantages=p.advantages, old_per_token_logps=p.old_logps, ref_per_token_logps=p.ref_logps, num_items_in_batch=None,
    )  # fmt: skip
    ours = call.run(LigerFusedLinearGRPOLoss, torch.float64)
    assert_all_close(tensors_of(ours), call.run_reference(), 1e-10)
    kept, o = p.mask.bool(), call.options
    d = (policy_logps(p) - p.old_logps).where(kept, 0.0)
    if level == "sequence":
        d = d.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    w, A = d.exp().expand(B, T), p.advantages
    clipped = ((w < 1 - o["epsilon_low"]) & (A < 0)) | ((w > 1 + o["epsilon_high"]) & (A > 0))
    last = max(name for name in ours if name.startswith("metric"))
    assert 0 < ours[last] < 1 and ours[last] == clipped[kept].double().mean()


def test_the_interface_is_ligers():
    def shape(function):
        return [(q.name, q.kind, q.default) for q in inspect.signature(function).parameters.values()]

    assert shape(LigerFusedLinearGRPOLoss.__init__) == shape(peer.LigerFusedLinearGRPOLoss.__init__)
    assert shape(LigerFusedLinearGRPOLoss.forward) == shape(peer.LigerFusedLinearGRPOLoss.forward)
    given = {name: value for name, value in draws("dapo", "token")[0].items() if name in OPTIONS}
    for options in ({}, given, dict(compiled=False, chunk_size=8, use_ref_model=False)):
        ours, theirs = LigerFusedLinearGRPOLoss(**options), peer.LigerFusedLinearGRPOLoss(**options)
        assert {n: getattr(ours, n) for n in OPTIONS} == {n: getattr(theirs, n) for n in OPTIONS}
        assert not list(ours.parameters()) and not ours.state_dict()


def test_positional_arguments_and_attributes_assigned_between_calls():
    call = Call(5, "dapo", "token", reference="input and bias", ratio="[B, 1]")
    order = inspect.signature(LigerFusedLinearGRPOLoss).parameters, inspect.signature(LigerFusedLinearGRPOLoss.forward).parameters
    modules = [C(**{**call.options, "temperature": 1.9, "beta": 0.0}) for C in (LigerFusedLinearGRPOLoss, Theirs)]
    results = []
    for module in modules:
        module.temperature, module.beta = 0.8, 0.2
        loss, metrics = module(*(call.tensors.get(name) for name in list(order[1])[1:]))
        results.append({"loss": loss, **{f"metric {i}": x for i, x in enumerate(metrics)}})
    assert_equal(*results, "")


def test_no_graph_without_a_gradient_to_take():
    call = Call(6, "dapo", "token", reference="logps")
    module = LigerFusedLinearGRPOLoss(**call.options)
    assert not module(**call.tensors)[0].requires_grad
    call.tensors["_input"] = call.tensors["_input"].clone().requires_grad_()
    assert module(**call.tensors)[0].requires_grad
    with torch.no_grad():
        assert not module(**call.tensors)[0].requires_grad


@pytest.mark.parametrize(
    "options, wrong, said",
    [
        (dict(sapo_temperature_pos=0.0), {}, "sapo_temperature_pos.*0.0"),
        (dict(sapo_temperature_neg=-1.0), {}, "sapo_temperature_neg.*-1.0"),
        (dict(delta=0.0), {}, "delta.*0.0"),
        (dict(loss_type="ppo"), {}, "loss_type.*'ppo'"),
        (dict(importance_sampling_level="word"), {}, "importance_sampling_level.*'word'"),
        *(
            (dict(importance_sampling_level="sequence", loss_type=t), {}, f"importance_sampling_level.*{t}")
            for t in ("cispo", "sapo", "vespo")
        ),
        (dict(loss_type="dr_grpo"), {}, "max_completion_length.*None"),
        ({}, dict(ref_per_token_logps=None), "ref_per_token_logps or ref_input must be given"),
        (dict(beta=0.0), dict(ref_per_token_logps=None), "ref_per_token_logps or ref_input must be given"),
        ({}, dict(vllm_is_ratio=torch.zeros(1, T)), r"vllm_is_ratio.*\[4, 12\] or \[4, 1\] or \[4\].*\[1, 12\]"),
        ({}, dict(vllm_is_ratio=torch.zeros(B, 2)), r"vllm_is_ratio.*\[4, 2\]"),
        ({}, dict(vllm_is_ratio=torch.zeros(B + 1)), r"vllm_is_ratio.*\[5\]"),
        ({}, dict(vllm_is_ratio=torch.zeros(())), r"vllm_is_ratio.*\[\]"),
    ],
)  # fmt: skip
def test_what_liger_refuses_is_refused_where_and_as_liger_does(options, wrong, said):
    def refused(C):
        """(what was under way, type of the error, its words)"""
        place = "constructor"
        try:
            module, place = C(**options), "call"
            module(**{**Call(7, "dapo", "token", reference="logps", on_policy=False).tensors, **wrong})
        except Exception as error:
            return place, type(error), str(error)

    (*theirs, _), (*ours, words) = refused(Theirs), refused(LigerFusedLinearGRPOLoss)
    assert ours == theirs and re.search(said, words)


@pytest.mark.parametrize(
    "options, said",
    [(dict(temperature=0.0), "temperature.*0.0"), (dict(epsilon_low=-0.1), "epsilon.*-0.1"), (dict(beta=torch.ones(())), "beta.*tensor"),
     (dict(delta=0.0), "delta.*0.0")],
)  # fmt: skip
def test_wrong_options_are_refused_by_the_call(options, said):
    """Those that liger computes with as well, and those assigned after construction."""
    module = LigerFusedLinearGRPOLoss()
    for name, value in options.items():
        setattr(module, name, value)
    with pytest.raises(ValueError, match=said):
        module(**Call(7, "dapo", "token", reference="logps").tensors)


@pytest.mark.parametrize(
    "wrong, error, said",
    [
        (dict(_input=torch.zeros(B * T, D)), ValueError, r"_input must be \[B, T, D\], got \[48, 16\]"),
        (dict(_input=torch.zeros(B, T, D, dtype=torch.long)), TypeError, "_input.*int64"),
        (dict(lin_weight=torch.zeros(D, V)), ValueError, r"lin_weight must be \[V, 16\], got \[16, 307\]"),
        (dict(lin_weight=None), TypeError, "lin_weight.*NoneType"),
        (dict(selected_token_ids=torch.zeros(B * T, dtype=torch.long)), ValueError, r"selected_token_ids.*\[4, 12\].*\[48\]"),
        (dict(selected_token_ids=torch.zeros(B, T)), TypeError, "selected_token_ids.*int64.*float32"),
        (dict(selected_token_ids=torch.full((B, T), V)), ValueError, "token ids.*V = 307"),
        (dict(attention_mask=torch.ones(B, T + 1)), ValueError, r"attention_mask.*\[4, 12\].*\[4, 13\]"),
        (dict(attention_mask=torch.full((B, T), 0.5)), ValueError, "mask.*0 and 1"),
        (dict(attention_mask=None), TypeError, "attention_mask.*NoneType"),
        (dict(advantages=torch.zeros(B, 1)), ValueError, r"advantages.*\[4\] or \[4, 12\].*\[4, 1\]"),
        (dict(advantages=torch.full((B,), math.inf)), ValueError, "advantages must be finite"),
        (dict(bias=torch.zeros(D)), ValueError, r"bias.*\[307\].*\[16\]"),
        (dict(old_per_token_logps=torch.zeros(B)), ValueError, r"old_per_token_logps.*\[4, 12\].*\[4\]"),
        (dict(ref_per_token_logps=torch.zeros(B, 1)), ValueError, r"ref_per_token_logps.*\[4, 12\].*\[4, 1\]"),
        (dict(ref_per_token_logps=None, ref_input=torch.zeros(B, T, 8)), TypeError, "ref_weight.*NoneType"),
        (dict(ref_per_token_logps=None, ref_input=torch.zeros(B, T, 8), ref_weight=torch.zeros(V, 9)), ValueError, r"ref_weight must be \[V, 8\]"),
        (dict(ref_per_token_logps=None, ref_input=torch.zeros(T, 8)), ValueError, r"ref_input must be \[4, 12, D\]"),
        (dict(vllm_is_ratio=1.0), TypeError, "vllm_is_ratio.*float"),
        (dict(num_items_in_batch=torch.ones(1)), ValueError, r"num_items_in_batch.*0-dim.*\[1\]"),
        (dict(num_items_in_batch="7"), TypeError, "num_items_in_batch.*str"),
    ],
)  # fmt: skip
def test_wrong_tensors(wrong, error, said):
    call = Call(8, "dapo", "token", reference="logps", on_policy=False, bias=True)
    with pytest.raises(error, match=said):
        LigerFusedLinearGRPOLoss()(**{**call.tensors, **wrong})


def test_a_reference_that_is_not_read_is_said_aloud():
    def call(seed, reference, **options):
        both = Call(seed, "dapo", "token", reference=reference, ratio=None)
        if options.pop("twice", False):
            both.tensors["ref_per_token_logps"] = both.problem.ref_logps
        both.options.update(options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = both.run(LigerFusedLinearGRPOLoss)
        assert_equal(ours, both.run(Theirs), reference)
        return [str(w.message) for w in caught]

    assert not call(0, "logps", beta=0.1) and not call(0, "own", beta=0.1) and not call(0, "logps", beta=0.0, use_ref_model=False)
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):  # liger's own
        assert "ref_input" in call(0, "input", beta=0.1, twice=True)[0]
    for reference_kind in ("logps", "input"):
        assert "use_ref_model is False" in call(0, reference_kind, beta=0.1, use_ref_model=False)[0]


def test_neither_the_module_nor_its_package_imports_liger():
    package = Path(grpo_kernels.integrations.__file__)
    assert not [n for n in ast.walk(ast.parse(package.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    tree = ast.parse(package.with_name("liger.py").read_text())
    names = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(tree)
             if isinstance(n, (ast.Import, ast.ImportFrom))]  # fmt: skip
    assert names and not [name for name in names if "liger" in name]
