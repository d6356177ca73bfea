"""torch.compile without graph breaks equals eager, and the registered ops keep the promises that torch.library asks for."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from support.cases import usually
from support.problems import make_problem
from support.tolerance import assert_all_close

from grpo_kernels import (
    GRPOLossConfig,
    fused_linear_distillation_loss,
    fused_linear_grpo_loss,
    grpo_loss_from_logits,
    linear_divergence,
    linear_logprobs,
)
from grpo_kernels.backends.comparison import DivergenceKind
from grpo_kernels.backends.statistics import finalize
from grpo_kernels.engine import ops
from grpo_kernels.engine.operands import Work, encoded
from grpo_kernels.losses.config import LogitTransform

HEAD = ("hidden", "weight", "bias")
CONFIGS = {
    "one pass": GRPOLossConfig(beta=0.05, delta=2.2),
    "on-policy sequence": GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence"),
    "sequence": GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence", beta=0.05, entropy_coef=0.1),
    "quantile": GRPOLossConfig(top_entropy_quantile=0.57),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(function, p, needs=HEAD, **more):
    positional, keywords, leaves = p.arguments(needs=needs)
    out = function(*positional, **{k: v for k, v in {**keywords, **more}.items() if v is not None})
    (out.loss * 0.5).backward()
    gradients = {n: leaves[n].grad for n in needs}
    return {"loss": out.loss, "logps": out.logps, "entropy": out.entropy, **out.metrics, **gradients}


def problem(config, **more):
    return make_problem(B=3, T=5, D=8, V=33, dtype=torch.float64, config=config, bias=True, sampling=True,
                        **{"on_policy": False, **more})  # fmt: skip


@pytest.mark.cover("name")
@pytest.mark.parametrize(
    "name, rows_given, needs",
    [("one pass", True, HEAD), ("one pass", False, HEAD), ("on-policy sequence", True, ("hidden",)), ("sequence", True, HEAD),
     ("sequence", False, ("hidden",)), ("quantile", False, HEAD)],
)  # fmt: skip
def test_the_loss_compiles_without_a_graph_break(name, rows_given, needs):
    p = problem(CONFIGS[name], on_policy=name.startswith("on-policy"), garbage=True)
    more = dict(kept_rows=p.kept_rows()) if rows_given else {}
    compiled = torch.compile(fused_linear_grpo_loss, fullgraph=True, backend="aot_eager")
    assert_all_close(call(compiled, p, needs, **more), call(fused_linear_grpo_loss, p, needs, **more), 1e-10)


@pytest.mark.exhaustive(reason="five seconds")
def test_the_loss_compiles_with_the_default_backend_inside_a_step(monkeypatch):
    """A model around it: hidden states from a layer, the loss mixed with another term, parameters' gradients. dW is scaled in the
    memory that the forward wrote: a second one would undo what the fusion saves."""
    written, one_pass = [], ops.one_pass

    def recorded(run):
        gradients = one_pass(run)
        written.append(gradients[1].data_ptr())
        return gradients

    monkeypatch.setattr(ops, "one_pass", recorded)
    p = problem(CONFIGS["one pass"], garbage=False)
    layer = torch.nn.Linear(8, 8, dtype=torch.float64)

    def step(x, weight, ids, advantages, mask, old, ref, config):
        h = torch.tanh(layer(x))
        out = fused_linear_grpo_loss(h, weight, ids, advantages, mask, old_logps=old, ref_logps=ref, config=config)
        return out.loss + 0.1 * h.square().mean(), out.metrics["kl"]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        layer.zero_grad()
        weight = p.weight.clone().requires_grad_()
        loss, kl = function(p.hidden, weight, p.completion_ids, p.advantages, p.mask, p.old_logps, p.ref_logps, p.config)
        loss.backward()
        results.append({"loss": loss, "kl": kl, "layer": layer.weight.grad.clone(), "head": weight.grad})
        assert weight.grad.data_ptr() == written[-1]
    assert_all_close(*results, 1e-10)


def test_bad_ids_are_a_nan_loss_under_compile():
    p = problem(CONFIGS["one pass"])
    p.completion_ids[0, int(p.mask[0].int().argmax())] = 10**9
    compiled = torch.compile(fused_linear_grpo_loss, fullgraph=True, backend="aot_eager")
    assert call(compiled, p)["loss"].isnan()


@pytest.mark.exhaustive(reason="eight seconds")
@pytest.mark.parametrize("name", ["one pass", "sequence"])
def test_lengths_do_not_recompile(name):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_linear_grpo_loss, fullgraph=True, backend=counter, dynamic=True)
    for T in (5, 7, 9, 12):
        p = make_problem(B=3, T=T, D=8, V=33, config=CONFIGS[name], bias=True)
        more = dict(kept_rows=p.kept_rows())
        assert_all_close(call(compiled, p, **more), call(fused_linear_grpo_loss, p, **more), 1e-10)
    assert counter.frame_count <= 2


@pytest.mark.exhaustive(reason="five seconds: a process of its own")
def test_the_backend_is_known_before_a_gpu_is_traced():
    """Which backends are usable is asked of the file system and the driver; a traced function may do neither. In a process of its
    own, which is told of a GPU that is not there."""
    code = (
        "import types, torch\n"
        "from grpo_kernels import backends\n"
        "device, x = types.SimpleNamespace(type='cuda'), torch.ones(3)  # the compiler would look for a real one\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_rng_state = torch.cuda.set_rng_state = lambda *args: torch.zeros(1)  # the compiler's own questions\n"
        "torch.cuda.device_count, torch.cuda.current_device = lambda: 1, lambda: 0\n"
        "torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(major=9, minor=0)\n"
        "function = lambda x: x * len(backends.resolve('auto', device, torch.bfloat16, x.shape[0]))\n"
        "for dynamic in (False, True):\n"
        "    compiled = torch.compile(function, fullgraph=True, backend='eager', dynamic=dynamic)\n"
        "    assert torch.equal(compiled(x), function(x)) and torch.equal(function(x), x * len('triton'))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logprobs_compiles_without_a_graph_break(frozen):
    p = problem(CONFIGS["one pass"])

    def function(hidden, weight, ids, mask):
        out = linear_logprobs(hidden, weight, ids, mask=mask, softcap=5.0)
        return out.logps, out.entropy

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_(not frozen)
        logps, entropy = f(hidden, weight, p.completion_ids, p.mask)
        (logps.square().sum() if frozen else (logps.square() + entropy).sum()).backward()
        results.append({"logps": logps, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad})
    assert_all_close(*results, 1e-10)


@pytest.mark.parametrize("shape", usually(["per token", "0-dim"], "per token"))
def test_a_temperatures_gradient_compiles_without_a_graph_break(shape):
    p = problem(CONFIGS["sequence"], temperature=True)

    def function(hidden, weight, ids, advantages, mask, bias, temperature):
        out = fused_linear_grpo_loss(hidden, weight, ids, advantages, mask, bias=bias, config=p.config, ref_logps=p.ref_logps,
                                     temperature=temperature, differentiable_logps=True)  # fmt: skip
        return out.loss + out.logps.square().sum() + linear_logprobs(hidden, weight, ids, temperature=temperature).entropy.sum()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        positional, keywords, leaves = p.arguments()
        temperature = (p.temperature if shape == "per token" else torch.tensor(0.8, dtype=torch.float64)).clone().requires_grad_()
        loss = f(*positional, keywords["bias"], temperature)
        loss.backward()
        results.append({"loss": loss, "temperature": temperature.grad, **{n: x.grad for n, x in leaves.items()}})
    assert_all_close(*results, 1e-10)


def test_loss_from_logits_compiles_without_a_graph_break():
    p = problem(CONFIGS["sequence"])
    logits = p.hidden @ p.weight.T

    def function(logits):
        return grpo_loss_from_logits(logits, p.completion_ids, p.advantages, p.mask, old_logps=p.old_logps,
                                     ref_logps=p.ref_logps, config=p.config).loss  # fmt: skip

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss = f(leaf)
        loss.backward()
        results.append({"loss": loss, "dlogits": leaf.grad})
    assert_all_close(*results, 1e-10)


# The ops themselves


def op_inputs(adapter):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(9, 4), normal(21, 4), normal(21)
    lora = (normal(2, 4), normal(21, 2)) if adapter else (None, None)
    rows = torch.tensor([0, 2, 3, 7, 8])
    return (hidden, weight, bias, *lora), rows, torch.randint(0, 21, (5,), generator=g), normal


@pytest.mark.parametrize("adapter", [False, True])
def test_opcheck(adapter):
    """Schemas, fake tensors with shapes and dtypes of the real ones, nothing mutated or aliased that is not declared."""
    registered, checks = torch.ops.grpo_kernels, ("test_schema", "test_faketensor")
    (hidden, *head), rows, target, normal = op_inputs(adapter)
    w, advantages, old, ref = torch.rand(5, dtype=torch.float64), normal(5), -normal(5).abs(), -normal(5).abs()
    for budget in (1, 10**6):
        work = Work(LogitTransform(1.0, 3.0, 0.8), "torch", budget, (True, True, True, adapter, adapter), lora_scale=0.5)
        loss = encoded(replace(work, config=GRPOLossConfig(beta=0.1)))
        vectors = [x[:3] for x in (w, advantages, old, ref, w)]
        call = (hidden, head, [], [rows, target, None, *vectors, None], 3, *loss)
        torch.library.opcheck(registered.one_pass.default, call, test_utils=checks)
        for stash_rows, wanted in ((0, (False,) * 5), (3, (False,) * 5), (3, (True, False, True, True, True))):
            two_phases = encoded(replace(work, diagnostics=wanted))
            score = (hidden, head, [], [rows, target, w + 0.5], 4, stash_rows, *two_phases)
            torch.library.opcheck(registered.score.default, score, test_utils=checks)
            *scored, stash, _ = registered.score(*score)
            incoming = [normal(5), normal(5), normal(5), None]
            back = (hidden, head, [], [rows, target, w + 0.5], scored, stash, incoming, *two_phases)
            torch.library.opcheck(registered.score_backward.default, back, test_utils=checks)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_opcheck_beside_a_teacher(kind):
    registered, checks = torch.ops.grpo_kernels, ("test_schema", "test_faketensor")
    (hidden, *head), rows, target, normal = op_inputs(True)
    teacher, temperature = [normal(9, 3), normal(21, 3), normal(21)], torch.rand(5, dtype=torch.float64) + 0.5
    work = Work(LogitTransform(), "torch", 10**6, (True,) * 5, divergence=DivergenceKind(kind), teacher_transform=LogitTransform(0.7))
    call = (hidden, head, teacher, [rows, target, temperature, None, None, None, None, normal(3), None], 3, *encoded(work))
    torch.library.opcheck(registered.one_pass.default, call, test_utils=checks)
    for stash_rows in (0, 3):
        score = (hidden, head, teacher, [rows, target, temperature], 4, stash_rows, *encoded(work))
        torch.library.opcheck(registered.score.default, score, test_utils=checks)
        *scored, stash, _ = registered.score(*score)
        beside = [None, None] if stash_rows else [normal(5), normal(5)]
        back = (hidden, head, teacher, [rows, target, temperature], scored, stash, [*beside, None, normal(5)], *encoded(work))
        torch.library.opcheck(registered.score_backward.default, back, test_utils=checks)


def test_opcheck_of_the_logits_ops():
    registered, checks = torch.ops.grpo_kernels, ("test_schema", "test_faketensor")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=g)
    target, kept = torch.randint(0, 7, (2, 3), generator=g), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    work = encoded(Work(LogitTransform(), "torch", 0, (True, *(False,) * 4)))
    score = (logits, target, kept, None, *work)
    torch.library.opcheck(registered.score_logits.default, score, test_utils=checks)
    back = (logits.clone(), target, None, registered.score_logits(*score)[:3], [kept.float(), None], *work)
    torch.library.opcheck(registered.logits_to_gradient.default, back, test_utils=checks)


def test_statistics_become_log_probs():
    """`finalize` on hand-made rows: a plain one, a certain one, one whose others are all -inf."""
    z = torch.tensor([[0.0, 1.0, 2.0], [40.0, 0.0, 0.0], [3.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    target, rows = torch.tensor([2, 0, 0]), torch.arange(3)
    peak = z.amax(1)
    e = (z - peak[:, None]).exp()
    others = e.clone()
    others[rows, target] = 0
    weighted = torch.where(e > 0, (z - peak[:, None]) * e, 0.0).sum(1)
    logps, lse, entropy = finalize(torch.stack([peak, others.sum(1), weighted, z[rows, target]], 1))
    log_p = z.log_softmax(-1)
    plain = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    assert_all_close({"lse": lse, "entropy": entropy}, {"lse": z.logsumexp(-1), "entropy": plain}, 1e-12)
    assert torch.allclose(logps, log_p[rows, target], atol=1e-15) and logps[2] == 0
    assert abs(logps[1].item() + 2 * torch.exp(torch.tensor(-40.0, dtype=torch.float64)).item()) < 1e-30


def test_a_config_made_inside_of_a_compiled_function():
    """cispo's, whose low cap is warned of where nothing is traced."""
    p = make_problem(B=3, T=4, D=8, V=21)
    positional, keywords, _ = p.arguments()
    keywords.pop("config")

    def loss():
        return fused_linear_grpo_loss(*positional, **keywords, config=GRPOLossConfig(loss_type="cispo")).loss

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(), loss())


def test_what_a_masked_position_has_as_temperature_reaches_no_gradient():
    """Compiled without kept_rows its row is computed: inf there, beside a bias of -inf, must not make NaN of dW."""
    p = make_problem(B=3, T=4, D=8, V=33, temperature=True, bias=True, banned=3)
    p.temperature[~p.mask] = float("inf")
    compiled = torch.compile(fused_linear_grpo_loss, fullgraph=True, backend="aot_eager")
    assert_all_close(call(compiled, p), call(fused_linear_grpo_loss, p), 1e-10)


@pytest.mark.cover
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("function", [linear_divergence, fused_linear_distillation_loss])
def test_a_divergence_compiles_without_a_graph_break(function, kind):
    p = problem(CONFIGS["one pass"])
    (hidden, weight, *_), *_ = p.arguments(needs=("hidden", "weight"))
    g = torch.Generator().manual_seed(1)
    teacher = torch.randn(3, 5, 4, generator=g, dtype=torch.float64), torch.randn(33, 4, generator=g, dtype=torch.float64)

    def called(function):
        out = function(hidden, weight, *teacher, kind=kind, mask=p.mask)
        d_hidden, d_weight = torch.autograd.grad(out[0].square().sum(), (hidden, weight))
        return {"value": out[0], "entropy": out.entropy, "hidden": d_hidden, "weight": d_weight}

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_all_close(called(compiled), called(function), 1e-10)
