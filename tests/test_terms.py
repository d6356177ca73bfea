"""Registered policy terms: the built-in losses written by a user equal the built-in ones, at the same number of products."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.operations import operations
from support.problems import make_problem, run
from support.tolerance import assert_all_close, assert_no_worse_than_torch

from grpo_kernels import (
    FusedLinearGRPOLoss,
    GRPOLossConfig,
    available_backends,
    fused_linear_grpo_loss,
    grpo_loss_from_logits,
    objective,
    reference,
    register_policy_term,
)
from grpo_kernels.losses import terms

BACKENDS = [name for name in ("torch", "cpu", "triton") if available_backends()[name] is None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def registry():
    before = dict(terms.TERMS)
    yield
    terms.TERMS.clear()
    terms.TERMS.update(before)


def my_dapo(logps, old_logps, advantages, config):
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.upper_epsilon)
    return -torch.min(ratio * advantages, clipped * advantages)


def my_cispo(logps, old_logps, advantages, config):
    return -(logps - old_logps).exp().clamp(max=config.upper_epsilon).detach() * advantages * logps


def my_sapo(logps, old_logps, advantages, config):
    tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg).to(logps.dtype)
    return -4 / tau * torch.sigmoid(tau * ((logps - old_logps).exp() - 1)) * advantages


PAIRS = {
    "dapo": (my_dapo, "dapo", {}),
    "grpo": (my_dapo, "grpo", {"epsilon_high": 0.4}),
    "cispo": (my_cispo, "cispo", {"epsilon_high": 1.3}),
    "sapo": (my_sapo, "sapo", {"sapo_temperature_pos": 1.5, "sapo_temperature_neg": 0.75}),
}
SHARED = ("loss", "logps", "entropy", "policy_loss", "kl")


def both(built_in, dtype=torch.float64, on_policy=False, **options):
    """(problem of the built-in loss, that of its registered copy)."""
    term, aggregation, own = PAIRS[built_in]
    register_policy_term("mine", term, aggregation=aggregation)
    config = GRPOLossConfig(loss_type=built_in, **{**own, **options})
    p = make_problem(B=5, T=7, D=11, V=101, dtype=dtype, config=config, bias=True, lora=True, sampling=True, ratio="token",
                     on_policy=on_policy)  # fmt: skip
    return p, dataclasses.replace(p, config=dataclasses.replace(config, loss_type="mine"))


def compared(out):
    return {name: x for name, x in out.flat().items() if name in SHARED or name.startswith("gradient")}


@pytest.mark.cover("built_in")
@each_backend
@pytest.mark.parametrize("built_in", PAIRS)
@pytest.mark.parametrize("workspace", [1, 20_000, None])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.1}, {"entropy_coef": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False, "softcap": 5.0}], ids=str
)
def test_a_registered_copy_equals_the_built_in_loss(built_in, workspace, options, backend):
    p, mine = both(built_in, **options)
    for function in (fused_linear_grpo_loss, reference.grpo_loss):
        more = dict(backend=backend, workspace_bytes=workspace)
        assert_all_close(compared(run(function, mine, **more)), compared(run(fused_linear_grpo_loss, p, **more)), 1e-10)


@pytest.mark.cover("options", "level")
@pytest.mark.parametrize("built_in", ["dapo", "grpo", "sapo"])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"top_entropy_quantile": 0.6}, {"off_policy_mask_threshold": 0.2}], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_at_both_levels_and_where_two_phases_are_needed(built_in, on_policy, options, level):
    p, mine = both(built_in, on_policy=on_policy, importance_sampling_level=level, **options)
    ours, truth = run(fused_linear_grpo_loss, mine), run(reference.grpo_loss, p)
    assert_all_close(compared(ours), compared(truth), 1e-10)


@each_backend
def test_bfloat16_is_no_worse_than_pytorch(backend):
    p, mine = both("dapo", dtype=torch.bfloat16)
    exact, plain = run(reference.grpo_loss, p, dtype=torch.float64).flat(), run(reference.grpo_loss, p).flat()
    for name, value in compared(run(fused_linear_grpo_loss, mine, backend=backend)).items():
        if name.startswith("gradient"):
            assert_no_worse_than_torch(name, value, plain[name], exact[name], floor=2e-3)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("workspace", [1, None])
def test_it_costs_6_products_of_the_rows_that_train(workspace, backend):
    """A row whose advantage is 0 may train under a term that is not known: it costs as much as the others."""
    register_policy_term("mine", my_dapo)
    p = make_problem(B=4, T=5, D=13, V=211, config=GRPOLossConfig(loss_type="mine"), sampling=True, zero_advantages=True)
    for needs, expected in ((("hidden", "weight"), 6), (("hidden",), 4), ((), 2)):
        positional, keywords, _ = p.arguments(needs=needs)

        def call(positional=positional, keywords=keywords, needs=needs):
            loss = fused_linear_grpo_loss(*positional, **keywords, backend=backend, workspace_bytes=workspace).loss
            if needs:
                loss.backward()

        assert operations(call) == expected * p.kept * 211 * 13


def test_a_term_may_train_where_the_advantage_is_zero():
    register_policy_term("likelihood", lambda logps, old_logps, advantages, config: -logps)
    p = make_problem(B=3, T=4, D=8, V=33, dtype=torch.float64, config=GRPOLossConfig(loss_type="likelihood"))
    p.advantages = torch.zeros_like(p.advantages)
    ours, truth = run(fused_linear_grpo_loss, p), run(reference.grpo_loss, p)
    assert ours.gradients["weight"].abs().max() > 0
    assert_all_close(ours.flat(), truth.flat(), 1e-10)
    assert p.config.trains_without_advantage and not GRPOLossConfig().trains_without_advantage


def test_it_works_in_the_module_from_logits_and_under_the_objective():
    p, mine = both("dapo")
    positional, keywords, _ = mine.arguments()
    keywords.pop("config")
    module = FusedLinearGRPOLoss(loss_type="mine")
    built_in = run(fused_linear_grpo_loss, p)
    assert_all_close({"loss": module(*positional, **keywords).loss}, {"loss": built_in.loss}, 1e-12)
    plain = make_problem(B=4, T=5, D=8, V=33, dtype=torch.float64, config=mine.config)
    logits = plain.hidden @ plain.weight.T
    tensors = dict(old_logps=plain.old_logps, ref_logps=plain.ref_logps)
    losses = [
        grpo_loss_from_logits(logits, plain.completion_ids, plain.advantages, plain.mask, config=config, **tensors).loss
        for config in (plain.config, dataclasses.replace(plain.config, loss_type="dapo"))
    ]
    assert_all_close({"loss": losses[0]}, {"loss": losses[1]}, 1e-12)
    logps, entropy = torch.randn(2, 3).double(), torch.ones(2, 3).double()
    values = [objective(logps, entropy, torch.tensor([1.0, -1.0]), torch.ones(2, 3), old_logps=logps + 0.3,
                        config=GRPOLossConfig(loss_type=name))[0] for name in ("mine", "dapo")]  # fmt: skip
    assert torch.equal(*values)


def test_it_compiles_without_a_graph_break():
    p, mine = both("dapo")
    results = []
    for function in (fused_linear_grpo_loss, torch.compile(fused_linear_grpo_loss, fullgraph=True, backend="aot_eager")):
        positional, keywords, leaves = mine.arguments()
        loss = function(*positional, **{k: v for k, v in keywords.items() if v is not None}).loss
        loss.backward()
        results.append({"loss": loss, "weight": leaves["weight"].grad})
    assert_all_close(*results, 1e-10)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, my_dapo), TypeError, "name must be a string, got 3"),
        (("mine", "dapo"), TypeError, "term must be a function, got 'dapo'"),
        (("mine", lambda logps, advantages: logps), TypeError, r"term must take \(logps, old_logps, advantages, config\), got <function"),
        (("dapo", my_dapo), ValueError, "none of the built-in losses .*, got 'dapo'"),
        (("", my_dapo), ValueError, "got ''"),
        (("#int", my_dapo), ValueError, "name must be an identifier"),
        (("twice", my_dapo), ValueError, "'twice' is registered already; overwrite=True"),
    ],
)
def test_a_wrong_registration_is_an_error(arguments, error, message):
    register_policy_term("twice", my_dapo)
    with pytest.raises(error, match=message):
        register_policy_term(*arguments)
    register_policy_term("twice", my_cispo, overwrite=True)
    with pytest.raises(ValueError, match="aggregation must be one of grpo, .*, got 'twice'"):
        register_policy_term("mine", my_dapo, aggregation="twice")
    with pytest.raises(ValueError, match="aggregation of 'twice' must stay 'dapo', got 'grpo'"):
        register_policy_term("twice", my_dapo, aggregation="grpo", overwrite=True)


def test_a_constant_term_and_one_that_writes_its_inputs():
    """Neither reaches the log-probs that the gradient is made of."""
    def writes(logps, old_logps, advantages, config):
        loss = my_dapo(logps, old_logps.clone(), advantages, config)
        old_logps.add_(1.0)
        return loss

    register_policy_term("constant", lambda logps, old_logps, advantages, config: advantages * 2)
    register_policy_term("writes", writes)
    for name in ("constant", "writes"):
        p = make_problem(B=3, T=4, D=8, V=33, dtype=torch.float64, config=GRPOLossConfig(loss_type=name), on_policy=True)
        loss = GRPOLossConfig(loss_type="dapo") if name == "writes" else p.config
        ours = run(fused_linear_grpo_loss, p).gradients
        truth = run(reference.grpo_loss, dataclasses.replace(p, config=loss)).gradients
        for leaf, gradient in ours.items():  # autograd makes none of a constant
            exact = torch.zeros_like(gradient) if truth[leaf] is None else truth[leaf]
            assert_all_close({leaf: gradient}, {leaf: exact}, 1e-10)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["logps", "old_logps"])
def test_a_log_prob_that_is_not_finite_is_a_nan_loss_under_a_term_that_clamps_it(name, value):
    register_policy_term("bounded", lambda logps, old_logps, A, config: -A * (logps - old_logps).nan_to_num().clamp(-1, 1))
    given = {"logps": -torch.rand(2, 3), "old_logps": -torch.rand(2, 3)}
    mask, advantages, config = torch.ones(2, 3), torch.tensor([1.0, -1.0]), GRPOLossConfig(loss_type="bounded")
    finite, _ = objective(given["logps"], torch.ones(2, 3), advantages, mask, old_logps=given["old_logps"], config=config)
    given[name][1, 1] = value
    loss, _ = objective(given["logps"], torch.ones(2, 3), advantages, mask, old_logps=given["old_logps"], config=config)
    assert finite.isfinite() and loss.isnan()


def test_a_term_of_another_shape_and_an_unknown_loss_are_errors():
    with pytest.raises(ValueError, match="loss_type must be one of grpo.*got 'mine'"):
        GRPOLossConfig(loss_type="mine")
    register_policy_term("mine", lambda logps, old_logps, advantages, config: (logps * advantages).sum())
    p = make_problem(B=3, T=4, D=8, V=33, config=GRPOLossConfig(loss_type="mine"), sampling=True)
    with pytest.raises(ValueError, match="the term of loss_type='mine' must return one loss a token"):
        run(fused_linear_grpo_loss, p)
    register_policy_term("constant_divisor", my_dapo, aggregation="dr_grpo")
    with pytest.raises(ValueError, match="max_completion_length must be an integer > 0 for loss_type='constant_divisor'"):
        GRPOLossConfig(loss_type="constant_divisor")


@pytest.mark.exhaustive(reason="seven seconds: imports the trainer in a process of its own")
def test_the_command_line_knows_the_terms_of_a_reward_module(tmp_path):
    """A module named by --reward is imported before the options are read."""
    Path(tmp_path, "my_reward.py").write_text(
        "import grpo_kernels\n"
        "grpo_kernels.register_policy_term('mine', lambda logps, old, A, config: -(logps - old).exp() * A)\n"
        "def reward(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    code = (
        "from grpo_kernels.trainer.arguments import parse\n"
        "run, args = parse(['--model', 'owner/m', '--data', 'd', '--reward', 'my_reward:reward', '--loss_type', 'mine', '--use_cpu',\n"
        "                   '--output_dir', 'out'], {})\n"
        "print(args.loss_type)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split()[-1:] == ["mine"], out.stderr[-2000:]
