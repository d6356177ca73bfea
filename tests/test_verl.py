"""verl's fused kernel, ours: its mathematics without verl, its installation on a stand-in, and verl's own patched forwards."""

import contextlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support.problems import DEVICE
from support.tolerance import assert_close, assert_no_worse_than_torch

from grpo_kernels import logprobs, topk_divergence
from grpo_kernels.integrations.verl import (
    install_sum_pi_squared,
    install_verl_backend,
    linear_cross_entropy,
    uninstall_verl_backend,
)

V, D = 37, 16
# hidden and labels as verl's callers shape them: the FSDP engine's, flat, Megatron's (sequence first), one row
SHAPES = [((2, 5, D), (2, 5)), ((7, D), (7,)), ((7, 1, D), (1, 7)), ((1, D), (1, 1)), ((D,), ())]


def problem(hidden_shape=(2, 5, D), labels_shape=(2, 5), dtype=torch.float64, spread=2.0):
    """(hidden, weight, labels) leaves in ``dtype``; the last row is confident, its label the arg max."""
    g = torch.Generator().manual_seed(len(hidden_shape) + hidden_shape[0])
    hidden = torch.randn(hidden_shape, generator=g, dtype=torch.float64) * spread / D**0.5
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, labels_shape, generator=g)
    if labels.numel() > 1:
        token = int(weight.norm(dim=1).argmax())
        hidden.view(-1, D)[-1] = 2.0 * weight[token]
        labels.view(-1)[-1] = token
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight)), labels.to(DEVICE)


def full_logits(hidden, weight, labels, temperature=1.0, reduction="none"):
    z = hidden.reshape(-1, D) @ weight.T / temperature
    every = z.log_softmax(-1)
    logprobs = every.gather(-1, labels.reshape(-1, 1).long()).squeeze(-1)
    logprobs = {"none": logprobs, "sum": logprobs.sum(), "mean": logprobs.mean()}[reduction]
    return logprobs, -(every.exp() * every).sum(-1)


def weigh(outputs, which="both"):
    """A scalar with another factor for each log-prob and each entropy."""
    g = torch.Generator().manual_seed(7)
    factors = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device, x.dtype) for x in outputs]
    parts = [(x * f).sum() for x, f in zip(outputs, factors, strict=True)]
    return {"logprobs": parts[0], "entropy": parts[1], "both": parts[0] + parts[1]}[which]


def everything(function, hidden, weight, labels, *rest, which="both"):
    """Log-probs, entropy and the gradients of hidden and weight, by name."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    outputs = function(hidden, weight, labels, *rest)
    weigh(outputs, which).backward()
    named = dict(zip(("logprobs", "entropy"), outputs, strict=True))
    return {**{n: x.detach() for n, x in named.items()}, "dhidden": hidden.grad, "dweight": weight.grad}


@pytest.mark.cover("shapes")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_equals_full_logits(shapes, temperature):
    case = problem(*shapes)
    ours, truth = everything(linear_cross_entropy, *case, temperature), everything(full_logits, *case, temperature)
    for name in truth:
        assert ours[name].dtype == torch.float64
        assert_close(name, ours[name], truth[name], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_worse_than_torch(dtype):
    case = problem(dtype=dtype)
    ours, theirs = (everything(f, *case, 0.7) for f in (linear_cross_entropy, full_logits))
    exact = everything(full_logits, case[0].double(), case[1].double(), case[2], 0.7)
    assert ours["logprobs"].dtype == ours["entropy"].dtype == torch.float32
    assert ours["dhidden"].dtype == ours["dweight"].dtype == dtype
    for name in exact:
        assert_no_worse_than_torch(name, ours[name], theirs[name], exact[name])


@pytest.mark.parametrize("which", ["logprobs", "entropy"])
def test_each_output_is_differentiable_alone(which):
    case = problem()
    ours, truth = (everything(f, *case, 1.3, which=which) for f in (linear_cross_entropy, full_logits))
    for name in truth:
        assert_close(name, ours[name], truth[name], 1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_only_the_log_probs_are_reduced(reduction):
    case = problem()
    ours, truth = (everything(f, *case, 0.7, r) for f, r in ((linear_cross_entropy, reduction.title()), (full_logits, reduction)))
    assert ours["logprobs"].shape == ((10,) if reduction == "none" else ()) and ours["entropy"].shape == (10,)
    for name in truth:
        assert_close(name, ours[name], truth[name], 1e-12)


def test_strided_inputs_and_int32_labels():
    hidden, weight, labels = problem()
    strided = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    ours = everything(linear_cross_entropy, strided, weight, labels.T.contiguous().T.int())
    truth = everything(full_logits, hidden, weight, labels)
    for name in truth:
        assert_close(name, ours[name], truth[name], 1e-12)


def test_a_frozen_head_and_no_grad():
    hidden, weight, labels = problem()
    truth = everything(full_logits, hidden, weight, labels)
    weigh(linear_cross_entropy(hidden, weight.detach(), labels)).backward()
    assert_close("dhidden", hidden.grad, truth["dhidden"], 1e-12)
    with torch.no_grad():
        assert not any(x.requires_grad for x in linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows(reduction):
    hidden, weight = torch.zeros(1, 0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    labels = torch.zeros(1, 0, dtype=torch.int64)
    logprobs, entropy = linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
    assert logprobs.shape == ((0,) if reduction == "none" else ()) and entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.sum() == 0 and weight.grad.abs().max() == 0 and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(reduction="max"), ValueError, "reduction must be none, sum or mean, got 'max'"),
        (dict(reduction=None), TypeError, "reduction must be a string, got NoneType"),
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(temperature="hot"), ValueError, "temperature must be a finite number > 0, got 'hot'"),
        (dict(labels=torch.zeros(2, 4).long()), ValueError, r"labels must hold one value for each of hidden's 10 rows, got \[2, 4\]"),
        (dict(labels=torch.zeros(2, 5)), TypeError, "labels must be int64 or int32, got torch.float32"),
        (dict(labels=[1]), TypeError, "labels must be a tensor, got list"),
        (dict(labels=torch.full((2, 5), V)), ValueError, r"\[0, V = 37\)"),
        (dict(labels=torch.full((2, 5), -100)), ValueError, r"\[0, V = 37\)"),
        (dict(hidden=None), TypeError, "hidden must be a tensor, got NoneType"),
        (dict(hidden=torch.zeros(())), ValueError, "hidden must be .*0-dim"),
        (dict(dist_process_group=object()), (TypeError, ValueError), "vocab_parallel_group"),
        (dict(weight=torch.zeros(V, D + 1)), ValueError, "weight must be"),
        (dict(weight=torch.zeros(V, D).half()), TypeError, "weight must be torch.float32"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, words):
    hidden, weight, labels = (x.detach().cpu() for x in problem(dtype=torch.float32))
    with pytest.raises(error, match=words):
        linear_cross_entropy(**{**dict(hidden=hidden, weight=weight, labels=labels), **changes})


def test_a_process_group_reaches_the_kernel(monkeypatch):
    """What it does there is tested on two ranks, in test_vocab_parallel.py."""
    asked, group = {}, object()

    def spy(*arguments, **options):
        asked.update(options)
        return logprobs.token_statistics(*arguments, **{**options, "vocab_parallel_group": None})

    monkeypatch.setattr("grpo_kernels.integrations.verl.token_statistics", spy)
    linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long), 1.0, "none", group)
    assert asked["vocab_parallel_group"] is group and asked["sums_hidden"] is False


class TheirFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        return "theirs"


class TheirOtherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, reduction="none", temperature=1.0, dist_process_group=None):
        return "another"


def forward_with_triton_backend(hidden, weight, labels):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


@pytest.fixture
def stand_in(monkeypatch):
    """A verl of four modules: the kernel's, the forward that imports it when called, one that has imported it, an empty place."""
    theirs = TheirFunction.apply
    contents = {
        "verl": dict(__version__="0.9.1"),
        "verl.utils": {},
        "verl.utils.kernel": {},
        "verl.utils.kernel.linear_cross_entropy": dict(linear_cross_entropy=theirs, LinearCrossEntropy=TheirFunction),
        "verl.models": {},
        "verl.models.transformers": {},
        "verl.models.transformers.dense_common": dict(forward_with_triton_backend=forward_with_triton_backend),
        "verl.models.mcore": dict(linear_cross_entropy=theirs, another_name=theirs, other=TheirOtherFunction.apply),
        "verlike": dict(linear_cross_entropy=theirs),
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, values in contents.items():
        vars(modules[name]).update(values, __path__=[])
        monkeypatch.setitem(sys.modules, name, modules[name])
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, modules[name])
    monkeypatch.setitem(sys.modules, "verl.not_there", None)
    yield types.SimpleNamespace(theirs=theirs, modules=modules, kernel=modules["verl.utils.kernel.linear_cross_entropy"])
    uninstall_verl_backend()


def test_every_reference_inside_verl_is_replaced_and_restored(stand_in):
    before = {name: dict(vars(module)) for name, module in stand_in.modules.items()}
    install_verl_backend()
    install_verl_backend()
    mcore, kernel = stand_in.modules["verl.models.mcore"], stand_in.kernel
    assert kernel.linear_cross_entropy is mcore.linear_cross_entropy is mcore.another_name is linear_cross_entropy
    assert mcore.other is before["verl.models.mcore"]["other"] and kernel.LinearCrossEntropy is TheirFunction
    assert stand_in.modules["verlike"].linear_cross_entropy is stand_in.theirs
    case = problem()
    assert_close("logprobs", forward_with_triton_backend(*case)[0], full_logits(*case)[0], 1e-12)

    later = types.ModuleType("verl.models.later")
    later.linear_cross_entropy = kernel.linear_cross_entropy
    sys.modules["verl.models.later"] = later
    try:
        uninstall_verl_backend()
    finally:
        del sys.modules["verl.models.later"]
    assert later.linear_cross_entropy is stand_in.theirs
    assert {name: dict(vars(module)) for name, module in stand_in.modules.items()} == before
    assert forward_with_triton_backend(torch.ones(1), None, None) == "theirs"

    uninstall_verl_backend()
    assert {name: dict(vars(module)) for name, module in stand_in.modules.items()} == before
    install_verl_backend()
    assert kernel.linear_cross_entropy is linear_cross_entropy


def test_a_reloaded_kernel_is_installed_anew(stand_in):
    install_verl_backend()
    fresh = stand_in.kernel.linear_cross_entropy = TheirFunction.apply
    install_verl_backend()
    assert stand_in.kernel.linear_cross_entropy is linear_cross_entropy
    uninstall_verl_backend()
    assert stand_in.kernel.linear_cross_entropy is fresh


def test_a_plain_function_of_the_same_parameters_is_known(stand_in):
    def plain(hidden, weight, labels, temperature, reduction, dist_process_group):
        return None

    stand_in.kernel.linear_cross_entropy = plain
    install_verl_backend()
    assert stand_in.kernel.linear_cross_entropy is linear_cross_entropy


@pytest.mark.parametrize(
    ("place", "name", "value", "words"),
    [
        ("kernel", "linear_cross_entropy", TheirOtherFunction.apply, "takes .*'labels', 'reduction'.*wanted.*pip install"),
        ("kernel", "linear_cross_entropy", lambda hidden, weight, labels: None, "takes .*wanted.*pip install verl=="),
        ("kernel", "linear_cross_entropy", None, "takes None, wanted.*pip install"),
        ("dense", "forward_with_triton_backend", lambda hidden: hidden, "does not call linear_cross_entropy.*pip install"),
        ("dense", "forward_with_triton_backend", None, "does not call linear_cross_entropy.*pip install"),
    ],
)
def test_an_unknown_verl_is_refused_and_left_alone(stand_in, monkeypatch, place, name, value, words):
    module = stand_in.kernel if place == "kernel" else stand_in.modules["verl.models.transformers.dense_common"]
    monkeypatch.setattr(module, name, value)
    stand_in.modules["verl"].__version__ = "9.9"
    with pytest.raises(RuntimeError, match=f"verl 9.9 is not known here: .*{words}"):
        install_verl_backend()
    assert stand_in.modules["verl.models.mcore"].linear_cross_entropy is stand_in.theirs
    assert getattr(module, name) is value


def test_an_absent_verl_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(RuntimeError, match="cannot be imported.*pip install verl"):
        install_verl_backend()
    uninstall_verl_backend()


@pytest.fixture
def verl_kernel():
    """The module of the installed verl that holds its function; uninstalled afterwards."""
    pytest.importorskip("verl")
    kernel = pytest.importorskip("verl.utils.kernel.linear_cross_entropy")
    yield kernel
    uninstall_verl_backend()


def tiny_model(architecture, dtype, tied):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=16, initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(3)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).to(DEVICE, dtype)


@contextlib.contextmanager
def patched(model, backend):
    """``model`` with the forward that verl gives its whole class, which gets its own back afterwards."""
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    cls, original = type(model), type(model).forward
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    try:
        assert cls.forward is not original
        yield model
    finally:
        cls.forward = original


def model_results(model, logprobs, entropy):
    model.zero_grad()
    weigh((logprobs.reshape(-1), entropy.reshape(-1))).backward()
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
    return {"log_probs": logprobs.detach().reshape(-1), "entropy": entropy.detach().reshape(-1), **gradients}


@pytest.mark.parametrize(
    ("architecture", "tied", "batch", "shift"),
    [("Llama", False, 1, False), ("Llama", False, 3, True), ("Qwen2", True, 1, False), ("Qwen2", False, 3, False)],
)
def test_verls_triton_forward_with_ours(verl_kernel, architecture, tied, batch, shift):
    """Against verl's torch backend in float32 and full logits in float64: log-probs, entropy and every parameter's gradient."""
    tokens, temperature = 6, 0.7
    ids = torch.randint(0, V, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shifted = ids.flip(-1) if shift else ids.roll(-1, -1)
    extra = dict(shift_labels=shifted) if shift else {}
    call = dict(input_ids=ids, return_dict=True, use_cache=False)
    model = tiny_model(architecture, torch.float32, tied)
    with patched(model, "torch"):
        out = model(**call, temperature=temperature, **extra)
        theirs = model_results(model, out.log_probs, out.entropy)
    install_verl_backend()
    with patched(model, "triton"):
        out = model(**call, temperature=temperature, **extra)
        assert out.log_probs.shape == out.entropy.shape == (batch * tokens,)
        ours = model_results(model, out.log_probs, out.entropy)
    uninstall_verl_backend()

    model = model.double()
    every = (model(**call).logits / temperature).log_softmax(-1)
    exact = model_results(model, every.gather(-1, shifted.unsqueeze(-1)), -(every.exp() * every).sum(-1))
    assert ours.keys() == theirs.keys() == exact.keys() and len(exact) > 10
    for name in exact:
        assert_close(name, ours[name], theirs[name], 2e-5)
        assert_no_worse_than_torch(name, ours[name], theirs[name], exact[name])


@pytest.mark.parametrize("clamp", [None, -10.0])
@pytest.mark.parametrize("chunked", [False, True])
def test_verls_forward_kl_topk_is_ours_without_a_tail(clamp, chunked):
    """verl leaves the other tokens out too; its clamp of log-probs is to touch none here. It sums in float32."""
    losses = pytest.importorskip("verl.trainer.distillation.fsdp.losses", reason="needs verl 0.9.1, see VERL in the Makefile")
    from verl.workers.config import DistillationLossConfig

    settings = DistillationLossConfig(loss_mode="forward_kl_topk", use_policy_gradient=False, log_prob_min_clamp=clamp,
                                      use_chunked_topk=chunked, chunked_topk_chunk_size=4)  # fmt: skip
    config = types.SimpleNamespace(distillation_loss=settings)
    hidden, weight, _ = problem((9, D), (9,), spread=1.0, dtype=torch.float32)
    hidden.data[-1] = 0.0  # a confident row's other tokens are below the clamp
    noise = torch.randn(9, V, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    logps, ids = (hidden.detach() @ weight.detach().T + noise).log_softmax(-1).topk(6, -1)
    assert (hidden @ weight.T).log_softmax(-1).gather(-1, ids).min() > -10 and logps.min() > -10
    found = []
    for theirs in (True, False):
        if theirs:
            nested = [torch.nested.nested_tensor([x], layout=torch.jagged) for x in (logps, ids)]
            divergence = losses.compute_forward_kl_topk((hidden @ weight.T).unsqueeze(0), *nested, config, "thd")["distillation_losses"][0]
        else:
            divergence = topk_divergence(hidden, weight, ids, logps, tail=False)
        weighed = (divergence * torch.linspace(-1, 2, 9, device=DEVICE)).sum()
        found.append([divergence, *torch.autograd.grad(weighed, (hidden, weight))])
    for name, ours, theirs in zip(("divergence", "hidden", "weight"), found[1], found[0], strict=True):
        assert_close(name, ours, theirs, 2e-6)


def test_the_installed_verl_is_known_and_restored(verl_kernel):
    original = verl_kernel.linear_cross_entropy
    assert list(inspect.signature(verl_kernel.LinearCrossEntropy.forward).parameters)[1:] == list(
        inspect.signature(linear_cross_entropy).parameters
    )
    install_verl_backend()
    install_verl_backend()
    assert verl_kernel.linear_cross_entropy is linear_cross_entropy
    uninstall_verl_backend()
    assert verl_kernel.linear_cross_entropy is original


def test_a_worker_installs_it_while_it_imports_verl(verl_kernel, tmp_path):
    """VERL_USE_EXTERNAL_MODULES: the plugin runs while verl's own import is still under way."""
    plugin = "from grpo_kernels.integrations.verl import install_verl_backend\ninstall_verl_backend()\n"
    (tmp_path / "my_plugin.py").write_text(plugin)
    code = (
        "import verl, verl.utils.kernel.linear_cross_entropy as k, grpo_kernels.integrations.verl as ours; "
        "print(k.linear_cross_entropy is ours.linear_cross_entropy)"
    )
    folders = (tmp_path, Path(logprobs.__file__).parents[1], Path(verl_kernel.__file__).parents[3])
    environment = {"PYTHONPATH": ":".join(map(str, folders)), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment["VERL_USE_EXTERNAL_MODULES"] = "my_plugin"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.strip().splitlines()[-1] == "True"


@pytest.fixture
def fsdp_engine(verl_kernel):
    """verl's FSDP engine without its process groups and its GPU: the two methods around a forward need its model alone."""
    module = pytest.importorskip("verl.workers.engine.fsdp.transformer_impl")
    engine = object.__new__(module.FSDPEngineWithLMHead)
    engine.pad_to_length, engine.use_ulysses_sp = False, False
    engine.engine_config = types.SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = module.verl_F.entropy_from_logits
    engine._get_packed_pad_size = lambda length: 3
    return engine


def micro_batch(fused):
    """Two sequences of 5 and 4 tokens, packed; the static pad adds 3."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    g = torch.Generator().manual_seed(5)
    ids = torch.nested.nested_tensor_from_jagged(torch.randint(0, V, (9,), generator=g), torch.tensor([0, 5, 9]))
    positions = torch.nested.nested_tensor_from_jagged(torch.tensor([*range(5), *range(4)]), torch.tensor([0, 5, 9]))
    batch = TensorDict({"input_ids": ids, "position_ids": positions}, batch_size=[2])
    tensordict_utils.assign_non_tensor(batch, temperature=0.7, use_fused_kernels=fused, calculate_entropy=True,
                                       calculate_sum_pi_squared=True)  # fmt: skip
    return batch


def step(engine, model, fused):
    """As the engine's `forward_step` goes, without its autocast."""
    batch = micro_batch(fused)
    inputs, beside = engine.prepare_model_inputs(batch)
    with torch.no_grad():
        return engine.prepare_model_outputs(model(**inputs, use_cache=False), beside, batch, None)


def test_verls_fsdp_engine_gets_the_sum_of_squares_beside_a_fused_kernel(fsdp_engine):
    """Against the same engine on full logits; verl alone refuses it."""
    model = tiny_model("Llama", torch.float32, False).eval()
    methods = type(fsdp_engine).prepare_model_inputs, type(fsdp_engine).prepare_model_outputs
    wanted = step(fsdp_engine, model, fused=False)
    install_verl_backend()
    with patched(model, "triton"):
        with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
            step(fsdp_engine, model, fused=True)
        install_sum_pi_squared()
        install_sum_pi_squared()
        found = step(fsdp_engine, model, fused=True)
    for name in ("log_probs", "entropy", "sum_pi_squared"):
        assert torch.equal(found[name].offsets(), wanted[name].offsets())
        torch.testing.assert_close(found[name].values(), wanted[name].values(), rtol=2e-5, atol=2e-6)
    with patched(model, "torch"), pytest.raises(RuntimeError, match="impl_backend=triton"):
        step(fsdp_engine, model, fused=True)
    plain = step(fsdp_engine, model, fused=False)
    assert torch.equal(plain["sum_pi_squared"].values(), wanted["sum_pi_squared"].values())
    uninstall_verl_backend()
    assert (type(fsdp_engine).prepare_model_inputs, type(fsdp_engine).prepare_model_outputs) == methods


def test_an_unknown_engine_is_refused(fsdp_engine, monkeypatch):
    monkeypatch.setattr(type(fsdp_engine), "prepare_model_outputs", lambda self, output: None)
    with pytest.raises(RuntimeError, match=r"prepare_model_outputs takes \['self', 'output'\]"):
        install_sum_pi_squared()
