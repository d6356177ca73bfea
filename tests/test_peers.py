"""The ground that other projects' own tests cover, on our adapters. What test_trl, test_liger, test_verl, test_transformers and
test_vocab_parallel go over already is not repeated:

* TRL's fused head: the architectures of its tests that test_transformers does not build, against TRL's own fused head; two that see.
* liger's grid: every combination of its switches, at a shape of odd lengths (test_liger draws combinations at one shape).
* verl's precision test: its Triton kernel itself, run by Triton's interpreter (test_verl runs verl's torch backend).
* Shards of 127 and 126 rows, of a vocabulary of 507 over 4 ranks: verl's call and an output layer under FSDP2.
"""

import copy
import importlib.util
import itertools
import sys
import types

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from support import liger_calls
from support.liger_calls import PAIRS, Call, Theirs, assert_equal, problem_of
from support.model_losses import batch, compare, gradients, mixed_loss, statistics, temperatures
from support.ranks import join, launch, leave
from support.tiny_trainer import TINY
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch
from transformers import AutoModelForCausalLM

from grpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from grpo_kernels.integrations.transformers import OUTPUTS, fuse_lm_head
from grpo_kernels.integrations.verl import linear_cross_entropy

utils = pytest.importorskip("trl.trainer.utils")
pytestmark = [pytest.mark.exhaustive(reason="make test-peers runs them"), pytest.mark.usefixtures("one_thread")]

# ---- TRL: architectures

LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=2)
EXPERTS = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=0)
ROUTED = dict(output_router_logits=True, router_aux_loss_coef=0.3, num_experts_per_tok=2, num_key_value_heads=2)
ARCHITECTURES = {
    "Bloom": dict(n_layer=1, n_head=2),
    "Cohere": dict(logit_scale=0.3, num_key_value_heads=2),
    "DeepseekV3": LATENT | EXPERTS,
    "Exaone4": dict(num_key_value_heads=2),
    "Falcon": {},
    "FalconMamba": {},
    "Gemma": dict(head_dim=8, num_key_value_heads=2),
    "Glm4Moe": dict(head_dim=8, num_key_value_heads=2) | EXPERTS,
    "GPT2": dict(n_embd=16, n_layer=1, n_head=2),
    "GPTNeoX": {},
    "GptOss": dict(head_dim=8, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}) | ROUTED,
    "GraniteMoe": dict(num_local_experts=4, num_experts_per_tok=2, logits_scaling=3.0, num_key_value_heads=2),
    "HyperCLOVAX": dict(logits_scaling=0.4, num_key_value_heads=2),
    "Lfm2": dict(num_key_value_heads=2),
    "MiniCPM3": dict(dim_model_base=4) | LATENT,
    "Mpt": dict(d_model=16, n_heads=2, n_layers=1),
    "Nemotron": dict(num_key_value_heads=2),
    "Olmo2": dict(num_key_value_heads=2),
    "OPT": dict(ffn_dim=32, word_embed_proj_dim=16),
    "Phi3": dict(num_key_value_heads=2),
    "Qwen2Moe": dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8) | ROUTED,
    "Qwen3_5Text": dict(head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4,
                        num_key_value_heads=2),
    "SmolLM3": dict(num_key_value_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fused_head_is_full_logits_and_trls(name):
    hf.set_seed(0)
    config = getattr(hf, f"{name}Config")(**{**TINY, "initializer_range": 0.3, **ARCHITECTURES[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    theirs = copy.deepcopy(model)
    compare(fuse_lm_head(model, outputs=OUTPUTS), temperature=temperatures(), num_items=5.0)

    known = tuple(name for name in OUTPUTS if name != "score_sq_norm")
    utils.add_fused_lm_head(theirs, temperature=0.7, outputs=known)
    ids, attention, labels = batch()
    call, results = dict(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True), []
    for m in (fuse_lm_head(model, temperature=0.7, outputs=known), theirs):
        out = m(**call)
        outputs = {n: out[n].detach() for n in (*OUTPUTS, "loss", "label_mask", "aux_loss") if out.get(n) is not None}
        results.append(outputs | gradients(m, mixed_loss(out)))
    assert_all_close(*results, 2e-5, floor=2e-6)
    assert ("aux_loss" in results[0]) == ("output_router_logits" in ARCHITECTURES[name])


SEEING = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
READING = {**TINY, "initializer_range": 0.3, "num_key_value_heads": 2}


def vision_model(name, softcap=None):
    hf.set_seed(0)
    if name == "Llava":
        vision, text = hf.CLIPVisionConfig(**SEEING), hf.LlamaConfig(**READING)
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)).eval()
    vision = hf.SiglipVisionConfig(**SEEING)
    text = hf.Gemma3TextConfig(**READING, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=softcap)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=31)
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # starts as zeros
    return model


@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_a_model_that_sees(name):
    """Images go to the base model as they are; full logits are the truth."""
    model, (ids, attention, labels) = fuse_lm_head(vision_model(name), outputs=OUTPUTS), batch()
    ids[:, 1:5], labels[:, 1:5] = 31, -100
    ids[:, 5:].clamp_(max=30)
    labels = labels.where(labels == -100, ids)
    images = torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(4))
    more = dict(token_type_ids=(ids == 31).long()) if name == "Gemma3" else {}
    seen = dict(input_ids=ids, attention_mask=torch.ones_like(attention), pixel_values=images, **more)
    truth = statistics(model(**seen).logits[:, :-1], labels[:, 1:])
    truth["loss"] = -truth["log_probs"].sum() / truth["label_mask"].sum()
    ours = model(**seen, labels=labels, fused_lm_head=True)
    assert_all_close({n: ours[n] for n in truth}, truth, 1e-5)
    assert_all_close(gradients(model, mixed_loss(ours)), gradients(model, mixed_loss(truth)), 1e-5, floor=2e-6)
    other = model(**{**seen, "pixel_values": images.flip(0)}, labels=labels, fused_lm_head=True).log_probs
    assert (other - ours.log_probs).norm() > 1e-3


def test_a_softcap_that_the_model_does_not_apply_is_no_softcap():
    """transformers' Gemma3 with images leaves its text configuration's softcap out."""
    with pytest.raises(NotImplementedError, match="Gemma3ForConditionalGeneration does not make its logits"):
        fuse_lm_head(vision_model("Gemma3", softcap=1.5))


# ---- liger: every combination


@pytest.fixture
def odd_shape(monkeypatch):
    for name, length in dict(B=3, T=47, D=31, V=123).items():
        monkeypatch.setattr(liger_calls, name, length)
    problem_of.cache_clear()
    yield
    problem_of.cache_clear()


PLAIN = dict(use_bias_correction_kl=False, epsilon_low=0.2, epsilon_high=0.2, chunk_size=2, temperature=0.9, sapo_temperature_pos=1.0,
             sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items=None,
             mask=torch.int64, max_completion_length=47, frozen=(), scale=1.0)  # fmt: skip
SWITCHES = dict(beta=[0.0, 0.1], delta=[None, 1.5], bias=[False, True], on_policy=[False, True],
                reference=["logps", "input", "input and bias", "own"], ratio=[None, "[B, T]"])  # fmt: skip


@pytest.mark.parametrize("loss_type, level", [pair for pair in PAIRS if pair[0] != "luspo"])
def test_every_combination_of_ligers_switches(loss_type, level, odd_shape):
    """luspo's mean is right in liger where nothing is masked alone: test_liger."""
    for values in itertools.product(*SWITCHES.values()):
        setting = dict(zip(SWITCHES, values, strict=True))
        if setting["delta"] is not None and loss_type in ("cispo", "sapo", "vespo"):
            continue
        call = Call(1, loss_type, level, **PLAIN, **setting)
        assert tuple(call.tensors["_input"].shape) == (3, 47, 31)
        ours, theirs, exact = call.run(LigerFusedLinearGRPOLoss), call.run(Theirs), call.run_reference()
        for name, truth in exact.items():
            # a loss near 0 is a mean of terms of size 1
            floor = 5e-6 if name != "loss" else 2e-6 / truth.abs().clamp(min=1e-30).item()
            assert_no_worse_than_torch(f"{setting} {name}", ours[name], theirs[name], truth, floor=floor)
        metrics = [{n: x for n, x in found.items() if n.startswith("metric")} for found in (ours, theirs)]
        assert_equal(*metrics, f"{setting}", tolerance=1e-4)


# ---- verl: its kernel in Triton's interpreter


@pytest.fixture
def verl_kernels(monkeypatch):
    """verl's file of kernels without its asserts, most of which ask for CUDA tensors."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if importlib.util.find_spec("verl") is None:
        pytest.skip("needs verl")
    path = importlib.util.find_spec("verl.utils.kernel.kernels").origin

    def with_bool_mask(name, position):
        original = getattr(interpreter.InterpreterBuilder, name)

        def call(self, *arguments):
            arguments = list(arguments)
            mask = arguments[position]
            arguments[position] = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
            return original(self, *arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, call)

    with_bool_mask("create_masked_store", 2)  # verl's `&` of a vector and a scalar is an integer there
    with_bool_mask("create_masked_load", 1)
    module = types.ModuleType("verl_kernels_without_asserts")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with open(path) as file:
        exec(compile(file.read(), path, "exec", optimize=1), vars(module))
    return module


@pytest.mark.parametrize("N, D, V", [(77, 128, 1300), (130, 256, 131)])
def test_no_less_precise_than_verls_kernel(verl_kernels, monkeypatch, N, D, V):
    """Inputs as in verl's test: uniform, temperature 1.5; float32, since the interpreter's products of bfloat16 are wrong."""
    hidden, weight, labels = torch.rand(N, D) - 0.5, torch.rand(V, D) - 0.5, torch.randint(0, V, (N,))
    g_logps, g_entropy = 2 * torch.rand(N) - 1, torch.rand(N) - 0.5
    none = verl_kernels.get_entropy_reduction_enum_number("none")
    logps, entropy, *kept = verl_kernels.efficient_entropy_forward(hidden, weight, labels, none, 1.5)
    gradient = verl_kernels.efficient_entropy_backward(g_logps, g_entropy, hidden, weight, labels, *kept, none, temperature=1.5)
    theirs = dict(zip(("log_probs", "entropy", "dhidden", "dweight"), (logps, entropy, *gradient), strict=True))

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        found = function(*leaves, labels, 1.5)
        grads = torch.autograd.grad(found, leaves, [x.to(dtype) for x in (g_logps, g_entropy)])
        return dict(zip(theirs, (*found, *grads), strict=True))

    exact = run(full_logits, torch.float64)
    for backend in ("torch", "cpu", "triton"):
        monkeypatch.setenv("GRPO_KERNELS_BACKEND", backend)
        ours = run(linear_cross_entropy, torch.float32)
        for name, truth in exact.items():
            assert_no_worse_than_torch(f"{backend} {name}", ours[name], theirs[name], truth)


def full_logits(hidden, weight, labels, temperature=1.0):
    every = (hidden @ weight.T / temperature).log_softmax(-1)
    return every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(every.exp() * every).sum(-1)


# ---- 507 rows over 4 ranks

RANKS, ROWS = 4, 507


def sharded_call():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (19, ROWS))
    return hidden / 5, weight, torch.randint(0, ROWS, (19,), generator=generator)


def sharded_model():
    hf.set_seed(0)
    return fuse_lm_head(hf.LlamaForCausalLM(hf.LlamaConfig(**{**TINY, "vocab_size": ROWS, "initializer_range": 0.3})))


def sharded_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ROWS, (RANKS, 9), generator=generator)
    return ids, torch.cat([torch.full((RANKS, 2), -100), ids[:, 2:]], 1)


def scalar(out):
    """Of which the mean over ranks is that over all rows."""
    return (torch.linspace(-1, 1, 8) * out["log_probs"] + 0.1 * out["entropy"]).sum(1).mean()


def work(rank, folder, port):
    from torch.distributed.fsdp import fully_shard

    join(rank, port, RANKS, 100)
    hidden, weight, labels = sharded_call()
    own = slice(rank * 127, min((rank + 1) * 127, ROWS))
    hidden, shard = hidden.requires_grad_(), weight[own].clone().requires_grad_()
    logps, entropy = linear_cross_entropy(hidden, shard, labels, 0.7, "none", dist.group.WORLD)
    (logps.sum() + entropy.square().sum()).backward()
    dist.all_reduce(hidden.grad)  # as Megatron's gathering of hidden does
    call = [logps.detach(), entropy.detach(), hidden.grad, shard.grad]

    model = sharded_model()
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = model.lm_head.weight.to_local().shape[0]
    ids, labels = (x[rank : rank + 1] for x in sharded_batch())
    loss = scalar(model(input_ids=ids, labels=labels, fused_lm_head=True))
    loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.save((call, rows, loss.detach(), found), f"{folder}/{rank}")
    leave()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_507_rows_over_four_ranks(tmp_path):
    """verl's call with its group, and an output layer sharded by FSDP2."""
    launch(work, tmp_path, RANKS, 100)
    calls, rows, losses, gradients_of_ranks = zip(*(torch.load(tmp_path / str(rank)) for rank in range(RANKS)), strict=True)
    hidden, weight, labels = (x.requires_grad_() if x.is_floating_point() else x for x in sharded_call())
    logps, entropy = full_logits(hidden, weight, labels, 0.7)
    (logps.sum() + entropy.square().sum()).backward()
    for call in calls:
        for name, found, truth in zip(("log_probs", "entropy", "dhidden"), call, (logps, entropy, hidden.grad), strict=False):
            assert_close(name, found, truth, 1e-12)
    assert rows == tuple(len(call[3]) for call in calls) == (127, 127, 127, 126)
    assert_close("dweight", torch.cat([call[3] for call in calls]), weight.grad, 1e-12)

    model, (ids, labels) = sharded_model(), sharded_batch()
    truth = statistics(model(input_ids=ids).logits[:, :-1], labels[:, 1:])
    value = scalar(truth)
    assert_close("loss", sum(losses) / RANKS, value, 1e-5)
    exact = gradients(model, value)
    for found in gradients_of_ranks:
        assert_all_close(found, exact, 2e-5, floor=1e-6)
