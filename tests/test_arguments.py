"""Bad input: an error that names the argument, what was wanted and what came; the same at every public function."""

import dataclasses
import inspect
import math
import re
import typing
import warnings

import numpy as np
import pytest
import torch
from support.problems import make_problem, packed, run

import grpo_kernels
from grpo_kernels import GRPOLossConfig, reference
from grpo_kernels.checks import BACKENDS, Backend
from grpo_kernels.logprobs import LogProbsOptions
from grpo_kernels.losses.config import (
    IMPORTANCE_SAMPLING_LEVELS,
    LOSS_FIELDS,
    LOSS_TYPES,
    TRL_LOSS_TYPES,
    LossOptions,
    LossType,
    _warn_of_low_cap,
)

B, T, D, V = 3, 4, 8, 11
LONG_IDS = torch.zeros(B, T, dtype=torch.long)

LOSSES = {"reference": reference.grpo_loss}
if hasattr(grpo_kernels, "fused_linear_grpo_loss"):
    LOSSES["fused"] = grpo_kernels.fused_linear_grpo_loss

    def module(*positional, config=None, **keywords):
        config = config or GRPOLossConfig()
        return grpo_kernels.FusedLinearGRPOLoss(**vars(config))(*positional, **keywords)

    LOSSES["module"] = module


def call(loss, problem=None, **wrong):
    """A good call with some arguments replaced; ``hidden`` and the like by name too."""
    p = problem or make_problem(B=B, T=T, D=D, V=V, dtype=torch.float32, bias=True, lora=True, ratio="token", sampling=True)
    positional, keywords, _ = p.arguments()
    named = dict(zip(("hidden", "weight", "completion_ids", "advantages", "mask"), positional, strict=True), **keywords)
    named.update(wrong)
    order = [named.pop(n) for n in ("hidden", "weight", "completion_ids", "advantages", "mask")]
    return loss(*order, **named)


def f32(*shape):
    return torch.zeros(*shape)


WRONG_TYPES = [
    (dict(hidden=[[1.0]]), "hidden.*tensor.*list"),
    (dict(hidden=None), "hidden.*tensor.*NoneType"),
    (dict(hidden=torch.zeros(B, T, D, dtype=torch.int64)), "hidden.*float.*int64"),
    (dict(hidden=torch.zeros(B, T, D, dtype=torch.complex64)), "hidden.*float.*complex"),
    (dict(weight="w"), "weight.*tensor.*str"),
    (dict(weight=torch.zeros(V, D, dtype=torch.float64)), "weight.*float32.*hidden.*float64"),
    (dict(weight=torch.zeros(V, D, dtype=torch.int8)), "weight.*float.*int8"),
    (dict(completion_ids=LONG_IDS.int()), "completion_ids.*int64.*int32"),
    (dict(completion_ids=LONG_IDS.float()), "completion_ids.*int64.*float32"),
    (dict(completion_ids=[[0]]), "completion_ids.*tensor.*list"),
    (dict(advantages=torch.ones(B, dtype=torch.int64)), "advantages.*float.*int64"),
    (dict(advantages=1.0), "advantages.*tensor.*float"),
    (dict(mask=None), "mask.*tensor.*NoneType"),
    (dict(mask=torch.zeros(B, T, dtype=torch.complex64)), "mask.*complex"),
    (dict(bias=torch.zeros(V, dtype=torch.int64)), "bias.*float.*int64"),
    (dict(bias=0.5), "bias.*tensor.*float"),
    (dict(old_logps=LONG_IDS), "old_logps.*float.*int64"),
    (dict(old_logps=0.0), "old_logps.*tensor.*float"),
    (dict(ref_logps=LONG_IDS), "ref_logps.*float.*int64"),
    (dict(sampling_logps=LONG_IDS), "sampling_logps.*float.*int64"),
    (dict(importance_sampling_ratio=1.0), "importance_sampling_ratio.*tensor.*float"),
    (dict(importance_sampling_ratio=LONG_IDS), "importance_sampling_ratio.*float.*int64"),
    (dict(temperature=0.7), r"temperature must be a tensor, 0-dim or \[3, 4\], got float; a number goes into config\.temperature"),
    (dict(num_items="many"), "num_items.*number.*str"),
    (dict(num_items=True), "num_items.*number.*bool"),
    (dict(num_items=torch.tensor(True)), "num_items.*number.*bool"),
    (dict(config={"loss_type": "dapo"}), "config.*GRPOLossConfig.*dict"),
    (dict(lora=(f32(3, D), f32(V, 3))), "lora.*A.*B.*scale"),
    (dict(lora=f32(3, D)), "lora.*A.*B.*scale"),
    (dict(lora=(f32(3, D), None, 1.0)), "lora B.*tensor.*NoneType"),
    (dict(lora=(f32(3, D), f32(V, 3), "1")), "lora scale.*number.*str"),
    (dict(lora=(f32(3, D).double(), f32(V, 3), 1.0)), "lora A.*float32.*float64"),
    (dict(workspace_bytes=1e6), "workspace_bytes.*integer.*float"),
    (dict(workspace_bytes="1G"), "workspace_bytes.*integer.*str"),
    (dict(backend=3), "backend.*string.*int"),
    (dict(kept_rows=[0]), "kept_rows.*tensor.*list"),
    (dict(kept_rows=torch.tensor([0], dtype=torch.int32)), "kept_rows.*int64.*int32"),
    (dict(cu_seqlens=[0, 3]), "cu_seqlens.*tensor.*list"),
    (dict(cu_seqlens=torch.tensor([0.0, 3.0])), "cu_seqlens.*int32.*float32"),
    (dict(hidden=torch.zeros(B, T, D).to_sparse()), "hidden.*dense.*sparse"),
    (dict(weight=torch.zeros(V, D).to_sparse()), "weight.*dense.*sparse"),
    (dict(data_parallel_group="everyone"), "data_parallel_group.*group or None.*str"),
]
WRONG_VALUES = [
    (dict(hidden=f32(T, D)), r"hidden.*\[B, T, D\].*\[4, 8\]"),
    (dict(hidden=f32(B, T, D + 1)), r"weight.*\[V, D = 9\].*\[11, 8\]"),
    (dict(hidden=f32(B, T, D, 1)), r"hidden|weight"),
    (dict(weight=f32(V)), r"weight.*\[V, D = 8\].*\[11\]"),
    (dict(weight=f32(0, D)), r"weight.*V.*\[0, 8\]"),
    (dict(completion_ids=LONG_IDS[:, :2]), r"completion_ids.*\[3, 4\].*\[3, 2\]"),
    (dict(advantages=f32(B + 1)), r"advantages.*\[3\].*\[3, 4\].*\[4\]"),
    (dict(advantages=f32(T)), r"advantages.*\[3\].*\[4\]"),
    (dict(advantages=f32(B, 1)), r"advantages.*\[3\].*\[3, 1\]"),
    (dict(mask=f32(B, T + 1)), r"mask.*\[3, 4\].*\[3, 5\]"),
    (dict(mask=f32(B)), r"mask.*\[3, 4\].*\[3\]"),
    (dict(bias=f32(V + 1)), r"bias.*\[11\].*\[12\]"),
    (dict(old_logps=f32(B)), r"old_logps.*\[3, 4\].*\[3\]"),
    (dict(ref_logps=f32(B, T - 1)), r"ref_logps.*\[3, 4\].*\[3, 3\]"),
    (dict(sampling_logps=f32(B, 1)), r"sampling_logps.*\[3, 4\].*\[3, 1\]"),
    (dict(importance_sampling_ratio=f32(B)), r"importance_sampling_ratio.*\[3, 1\].*\[3\]"),
    (dict(temperature=f32(B, T + 2)), r"temperature.*\[3, 4\].*\[3, 6\]"),
    (dict(temperature=f32(B, T)), "temperature.*> 0"),
    (dict(temperature=f32(B, T) + math.nan), "temperature.*> 0"),
    (dict(temperature=f32(B, T) - 1), "temperature.*> 0"),
    (dict(num_items=0), "num_items.*> 0.*0"),
    (dict(num_items=-2.5), "num_items.*> 0.*-2.5"),
    (dict(num_items=math.nan), "num_items.*> 0.*nan"),
    (dict(num_items=torch.tensor([3])), r"num_items.*0-dim.*\[1\]"),
    (dict(lora=(f32(3, D + 1), f32(V, 3), 1.0)), r"lora A.*D = 8.*\[3, 9\]"),
    (dict(lora=(f32(3, D), f32(V, 4), 1.0)), r"lora B.*\[11, 3\].*\[11, 4\]"),
    (dict(ref_logps=None, config=GRPOLossConfig(beta=0.1)), "ref_logps.*beta.*0.1.*None"),
    (dict(workspace_bytes=0), "workspace_bytes.*> 0.*0"),
    (dict(workspace_bytes=-5), "workspace_bytes.*> 0.*-5"),
    (dict(workspace_bytes=2**63), "workspace_bytes.*2\\*\\*63"),
    (dict(lora=(f32(3, D), f32(V, 3), math.inf)), "lora scale.*finite.*inf"),
    (dict(num_items=10**400), "num_items.*finite"),
    (dict(backend="cuda9"), "backend.*auto, torch, cpu.*'cuda9'"),
    (dict(kept_rows=torch.zeros(B * T + 1, dtype=torch.long)), r"kept_rows.*12.*\[13\]"),
    (dict(kept_rows=torch.zeros(2, 2, dtype=torch.long)), r"kept_rows.*\[2, 2\]"),
    (dict(cu_seqlens=torch.tensor([0, 12])), r"hidden.*\[N, D\].*\[3, 4, 8\]"),
    (dict(cu_seqlens=torch.tensor(0)), r"cu_seqlens.*\[B \+ 1\].*\[\]"),
    (dict(mask=f32(B, T) + 0.5), "mask.*0 and 1.*12"),
    (dict(mask=torch.full((B, T), 2)), "mask.*0 and 1.*12"),
    (dict(mask=torch.full((B, T), -1)), "mask.*0 and 1.*12"),
    (dict(mask=torch.full((B, T), math.nan)), "mask.*0 and 1.*12"),
    (dict(completion_ids=LONG_IDS + V), "token ids.*V = 11.*completion_ids"),
    (dict(completion_ids=LONG_IDS - 1), "token ids.*V = 11.*completion_ids"),
    (dict(completion_ids=LONG_IDS - 100), r"token ids.*V = 11.*-100.*mask=\(ids != -100\)"),
    (dict(completion_ids=LONG_IDS + 2**62), "token ids.*V = 11.*completion_ids"),
    (dict(advantages=torch.tensor([1.0, math.nan, 1.0])), "advantages.*finite"),
    (dict(advantages=torch.tensor([1.0, -math.inf, 1.0])), "advantages.*finite"),
    (dict(advantages=f32(B, T) + math.inf), "advantages.*finite"),
]
DEVICES = ["hidden", "weight", "completion_ids", "advantages", "mask", "bias", "old_logps", "ref_logps", "sampling_logps",
           "importance_sampling_ratio"]  # fmt: skip


def case_name(case):
    wrong, said = case
    return f"{next(iter(wrong))}-{said}"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("case", WRONG_TYPES, ids=case_name)
def test_wrong_types(loss, case):
    wrong, said = case
    if loss is LOSSES.get("module") and "config" in wrong:
        pytest.skip("the module makes its own")
    with pytest.raises(TypeError, match=re.compile(said, re.DOTALL)):
        call(loss, **wrong)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("case", WRONG_VALUES, ids=case_name)
def test_wrong_shapes_values_and_combinations(loss, case):
    wrong, said = case
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        call(loss, **wrong)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", DEVICES)
def test_wrong_devices(loss, name):
    p = make_problem(B=B, T=T, D=D, V=V, dtype=torch.float32, bias=True, ratio="token", sampling=True)
    positional, keywords, _ = p.arguments()
    named = dict(zip(DEVICES, positional, strict=False), **keywords)
    with pytest.raises(ValueError, match=r"(?s)must be on .*meta"):
        call(loss, **{name: named[name].detach().to("meta")})


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("cu_seqlens", [[0, 5], [1, 12], [0, 7, 5, 12], [0, 13], [0, -1, 12], [12]])
def test_cu_seqlens_must_rise_from_zero_to_the_number_of_tokens(loss, cu_seqlens):
    sequences, tokens = len(cu_seqlens) - 1, 12
    with pytest.raises(ValueError, match=r"cu_seqlens.*0 to N = 12"):
        loss(f32(tokens, D), f32(V, D), torch.zeros(tokens, dtype=torch.long), f32(sequences), torch.ones(tokens),
             cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_packed_shapes(loss):
    p = packed(make_problem(B=B, T=T, D=D, V=V, dtype=torch.float32, ratio="sequence"))
    n = p.mask.shape[0]
    assert call(loss, p).logps.shape == (n,)
    for wrong, said in (
        (dict(advantages=f32(n + 1)), "advantages"), (dict(mask=f32(B, T)), "mask"), (dict(old_logps=f32(1, n)), "old_logps"),
        (dict(importance_sampling_ratio=f32(n, 1)), "importance_sampling_ratio"),
        (dict(hidden=f32(1, n, D)), "hidden"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call(loss, p, **wrong)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_is_bad_under_the_mask_only_is_no_error(loss):
    p = make_problem(B=B, T=T, D=D, V=V, dtype=torch.float32, per_token_advantages=True, temperature=True, garbage=True)
    assert call(loss, p).loss.isfinite()
    p.advantages = torch.tensor([1.0, -1.0, math.nan], dtype=torch.float64)  # the last sequence has no kept token
    assert call(loss, p).loss.isfinite()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_unused_options_and_tensors_are_ignored_never_refused(loss, loss_type):
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=9, delta=1e-3, epsilon_high=7.0, epsilon=3.0,
                            vespo_lambda_neg=-3.0, sapo_temperature_neg=0.01)  # fmt: skip
    unused = loss_type not in ("dapo", "cispo", "vespo")
    out = call(loss, config=config, num_items=-1 if unused else 4)
    assert out.loss.isfinite()
    plain = call(loss, config=config, num_items=4).loss
    for name in ("sampling_logps", "ref_logps"):  # there is no off-policy threshold, and beta is 0
        assert torch.equal(call(loss, config=config, num_items=4, **{name: torch.full((B, T), math.nan)}).loss, plain)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("poisoned", ["hidden", "weight", "bias", "old_logps", "ref_logps"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_poison_at_kept_positions_is_a_nan_loss(loss, poisoned, poison, loss_type):
    """In a sequence that trains and in one whose advantage is 0."""
    p = make_problem(B=B, T=T, D=D, V=V, dtype=torch.float32, bias=True, all_masked_sequence=False)
    for sequence in (0, 1):
        dirty = dataclasses.replace(p, **{poisoned: getattr(p, poisoned).clone()})
        t = int(p.mask[sequence].int().argmax())
        where = {"hidden": (sequence, t, 3), "weight": (2, 3), "bias": (2,)}.get(poisoned, (sequence, t))
        getattr(dirty, poisoned)[where] = poison
        config = GRPOLossConfig(loss_type=loss_type, beta=0.1 if poisoned == "ref_logps" else 0.0, max_completion_length=4)
        dirty = dataclasses.replace(dirty, config=config)
        assert p.advantages[0] == 0 and p.mask[sequence].any()
        out = call(loss, dirty)
        assert out.loss.isnan(), f"sequence {sequence}"


# Options


@pytest.mark.parametrize(
    "field, value",
    [("loss_type", "ppo"), ("loss_type", None), ("loss_type", 3), ("importance_sampling_level", "word"),
     ("epsilon", -0.1), ("epsilon", math.nan), ("epsilon", "0.2"), ("epsilon", None), ("epsilon", True), ("epsilon_high", -1),
     ("epsilon_high", math.inf), ("delta", 0), ("delta", -2.0), ("beta", math.nan), ("beta", None), ("beta", "0"),
     ("use_bias_correction_kl", 1), ("use_bias_correction_kl", None), ("temperature", 0), ("temperature", -1.0),
     ("temperature", math.inf), ("logit_scale", 0), ("logit_scale", math.nan), ("softcap", 0), ("softcap", -30.0),
     ("entropy_coef", math.inf), ("top_entropy_quantile", -0.01), ("top_entropy_quantile", 1.01),
     ("off_policy_mask_threshold", math.nan), ("max_completion_length", 0), ("max_completion_length", 2.5),
     ("sapo_temperature_pos", 0), ("sapo_temperature_neg", -1), ("vespo_k_pos", math.nan), ("vespo_lambda_pos", None),
     ("vespo_k_neg", [1]), ("vespo_lambda_neg", math.inf), ("dro_beta", 0), ("dro_beta", "1"), ("clip_cov_ratio", 0), ("kl_cov_ratio", 1.5),
     ("clip_cov_lb", None), ("clip_cov_ub", math.nan), ("ppo_kl_coef", None), ("importance_sampling_mode", "token"),
     ("importance_sampling_mode", 1), ("importance_sampling_clip_min", -0.5), ("importance_sampling_clip_max", math.nan)],
)  # fmt: skip
def test_wrong_options(field, value):
    with pytest.raises(ValueError) as caught:
        GRPOLossConfig(**{field: value})
    message = str(caught.value)
    assert field in message and repr(value) in message and "must be" in message


@pytest.mark.parametrize(
    "options, told",
    [(dict(loss_type="gmpo"), "got 'gmpo'; did you mean 'geo_mean'?"), (dict(loss_type="clipcov"), "got 'clipcov'; did you mean 'clip_cov'?"),
     (dict(loss_type="xyz"), "got 'xyz'"), (dict(epsilon="0.2"), "epsilon must be a finite number >= 0, got '0.2'"),
     (dict(max_completion_length="9"), "max_completion_length must be an integer > 0 or None, got '9'"),
     (dict(loss_type="clip_cov", clip_cov_lb=6.0), "clip_cov_lb must be below clip_cov_ub, 5.0, got 6.0")],
)  # fmt: skip
def test_a_refused_option_says_what_was_meant(options, told):
    with pytest.raises(ValueError) as caught:
        GRPOLossConfig(**options)
    assert str(caught.value).endswith(told)


def test_dr_grpo_needs_its_divisor():
    with pytest.raises(ValueError, match=r"max_completion_length.*dr_grpo.*None"):
        GRPOLossConfig(loss_type="dr_grpo")


def test_options_are_frozen_complete_and_named_as_documented():
    config = GRPOLossConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0
    documented = dict(
        loss_type="dapo", importance_sampling_level="token", epsilon=0.2, epsilon_high=None, delta=None, beta=0.0,
        use_bias_correction_kl=True, temperature=1.0, logit_scale=1.0, softcap=None, entropy_coef=0.0,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, max_completion_length=None, sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        kl_estimator="k3", dro_beta=None, clip_cov_ratio=0.0002, clip_cov_lb=1.0, clip_cov_ub=5.0, kl_cov_ratio=0.0002, ppo_kl_coef=0.1,
        importance_sampling_mode=None, importance_sampling_clip_min=None, importance_sampling_clip_max=3.0,
    )  # fmt: skip
    assert dataclasses.asdict(config) == documented and tuple(documented) == LOSS_FIELDS
    assert set(IMPORTANCE_SAMPLING_LEVELS) == {"token", "sequence"}
    with pytest.raises(TypeError, match="colour"):
        GRPOLossConfig(colour="red")


def test_every_legal_boundary_is_accepted():
    GRPOLossConfig(epsilon=0, epsilon_high=0, delta=1e-9, top_entropy_quantile=0, logit_scale=-2, beta=-1, entropy_coef=-1,
                   off_policy_mask_threshold=-3.0, max_completion_length=1, vespo_lambda_pos=-1)  # fmt: skip
    GRPOLossConfig(epsilon=5, top_entropy_quantile=1, max_completion_length=8.0)


def test_what_belongs_to_the_call_is_not_an_option_of_the_module():
    with pytest.raises(TypeError, match="backend, workspace_bytes must be given to the call"):
        grpo_kernels.FusedLinearGRPOLoss(loss_type="grpo", backend="torch", workspace_bytes=1)
    with pytest.raises(TypeError, match="config must not be given to the call"):
        grpo_kernels.FusedLinearGRPOLoss()(*make_problem(B=2, T=3, V=9).arguments()[0], config=GRPOLossConfig())


def test_half_of_a_shift_is_named():
    for hidden, ids in ((slice(None), slice(1, None)), (slice(1, None), slice(None))):
        (h, weight, tokens, advantages, mask), *_ = make_problem(B=2, T=4, V=9).arguments()
        with pytest.raises(ValueError, match=r"completion_ids must have shape.*; position t predicts token t: hidden\[:, :-1\] stands beside"):
            grpo_kernels.fused_linear_grpo_loss(h[:, hidden], weight, tokens[:, ids], advantages, mask)


def test_numbers_of_numpy_are_numbers():
    p = make_problem(B=2, T=3, D=4, V=9, config=GRPOLossConfig(epsilon=np.float32(0.25), delta=np.int64(2), temperature=np.float64(0.5)))
    plain = p.with_config(epsilon=0.25, delta=2, temperature=0.5)
    assert type(p.config.epsilon) is float and type(p.config.delta) is int and p.config == plain.config
    assert run(grpo_kernels.fused_linear_grpo_loss, p).loss == run(grpo_kernels.fused_linear_grpo_loss, plain).loss


@pytest.mark.parametrize("make", [GRPOLossConfig, grpo_kernels.FusedLinearGRPOLoss])
@pytest.mark.parametrize("low", [{}, {"epsilon_high": 0.28}], ids=str)
def test_a_cap_of_cispo_below_the_on_policy_ratio_is_warned_of_once(make, low):
    """At the caller's line: the default, 0.2, and what is meant for another loss."""
    _warn_of_low_cap.cache_clear()
    for silent in (dict(epsilon_high=5.0), dict(epsilon=5.0), dict(loss_type="dapo")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(**{"loss_type": "cispo", **silent})
    with pytest.warns(UserWarning, match=r"cispo caps the importance ratio at epsilon_high itself.*epsilon_high=5\.0") as seen:
        make(loss_type="cispo", **low)
        make(loss_type="cispo", epsilon=0.3)
    assert len(seen) == 1 and seen[0].filename == __file__


# What completion and type checkers see


def test_the_typed_options_are_those_of_the_config():
    """One list of options: the TypedDict that checkers read and the signature that notebooks complete are GRPOLossConfig's."""
    assert typing.get_type_hints(LossOptions) == typing.get_type_hints(GRPOLossConfig)
    assert set(typing.get_args(LossType)) == set(LOSS_TYPES) and typing.get_args(Backend) == BACKENDS
    made = inspect.signature(grpo_kernels.FusedLinearGRPOLoss).parameters
    assert {n: p.default for n, p in made.items()} == {f.name: f.default for f in dataclasses.fields(GRPOLossConfig)}
    hints = typing.get_type_hints(grpo_kernels.FusedLinearGRPOLoss.__init__)
    assert hints["options"].__args__ == (LossOptions,)


def test_the_typed_keywords_of_linear_logprobs_are_its_own():
    hints = typing.get_type_hints(grpo_kernels.linear_logprobs)
    for name in ("hidden", "weight", "token_ids", "return_lse", "return"):
        hints.pop(name)
    assert typing.get_type_hints(LogProbsOptions) == hints


def test_every_public_function_says_which_token_a_position_predicts():
    """In the first line of its help; logits are asked for by the token that they predict."""
    for function in (grpo_kernels.fused_linear_grpo_loss, grpo_kernels.linear_logprobs, reference.grpo_loss, grpo_kernels.grpo_loss_from_logits):
        first, rest = function.__doc__.split("\n", 1)
        assert re.search(r"Position t of (hidden|logits) predicts token t\.", first), function
        assert "[:, :-1]" in rest and "[:, 1:]" in rest, function


@pytest.mark.parametrize("name", ["weights", "num_items"])
def test_constants_of_a_distillation_loss_must_not_require_a_gradient(name):
    shape = (B, T) if name == "weights" else ()
    tensors = torch.ones(B, T, D), torch.ones(V, D), torch.ones(B, T, 2), torch.ones(V, 2)
    with pytest.raises(ValueError, match=f"{name} must not require a gradient.*{name}.detach"):
        grpo_kernels.fused_linear_distillation_loss(*tensors, **{name: torch.ones(shape, requires_grad=True)})
