"""A fused head inside transformers' models: full logits are the truth, through PEFT, DDP, FSDP2 and ZeRO-3 as well."""

import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from support.model_losses import B, T, V, batch, compare, gradients, mixed_loss, statistics, temperatures, through_logits, truncated
from support.ranks import join, launch, leave
from support.tiny_trainer import tiny_model
from support.tolerance import assert_all_close, assert_close, assert_no_worse_than_torch

from grpo_kernels import GRPOLossConfig, TokenSupport, fused_linear_grpo_loss
from grpo_kernels.integrations.transformers import OUTPUTS, fuse_lm_head, is_fused, lm_head

pytestmark = pytest.mark.usefixtures("one_thread")

GEMMA = dict(head_dim=8, num_key_value_heads=2, query_pre_attn_scalar=8)
MOE = dict(output_router_logits=True, router_aux_loss_coef=0.3, num_key_value_heads=2)
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": dict(num_key_value_heads=2),
    "Qwen3": dict(head_dim=8, num_key_value_heads=2),
    "Gemma2": dict(final_logit_softcapping=1.5, **GEMMA),
    "Gemma3": dict(config="Gemma3TextConfig", final_logit_softcapping=1.5, **GEMMA),
    "Granite": dict(logits_scaling=3.0),
    "Cohere2": dict(logit_scale=0.3),
    "Phi": dict(tied=False),  # a bias, which transformers does not tie
    "Mistral": dict(num_key_value_heads=1),
    "FalconH1": dict(lm_head_multiplier=0.4, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1,
                     num_key_value_heads=2, mamba_chunk_size=4),
    "Mixtral": dict(num_local_experts=4, **MOE),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8, **MOE),
}  # fmt: skip
HEADS = [(name, tied) for name, options in ARCHITECTURES.items() for tied in (False, True) if options.get("tied", tied) == tied]


def build(name="Llama", tied=False, seed=0, **more):
    """Weights large enough that distributions are not flat, a bias that is not zero."""
    options = {k: v for k, v in (ARCHITECTURES[name] | more).items() if k not in ("tied", "config")}
    config = getattr(hf, ARCHITECTURES[name].get("config", f"{name}Config"))
    model = tiny_model(seed, config, getattr(hf, f"{name}ForCausalLM"), tie_word_embeddings=tied, initializer_range=0.3, **options)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model.eval()


def left_tokens(labels, seed=2):
    """[B, T, V] bool, what a sampler could have left: the label itself, alone at some positions; all or nothing at others."""
    kept = torch.rand(*labels.shape, V, generator=torch.Generator().manual_seed(seed)) < 0.2
    kept[:, 3] = False
    kept.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), True)
    kept[0, 2:4], kept[2, 5] = True, False
    return kept


# ---- architectures ----


@pytest.mark.parametrize("name, tied", HEADS)
def test_every_output_and_gradient_equals_full_logits(name, tied):
    model = fuse_lm_head(build(name, tied), outputs=OUTPUTS)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ours, found = compare(model, temperature=temperatures(), num_items=5.0)
    assert set(OUTPUTS) <= ours.keys() and ("aux_loss" in ours) == ("output_router_logits" in ARCHITECTURES[name])
    assert {n for n, g in found.items() if g is None} == set() and len(found) == len(list(model.parameters()))
    scale, softcap = lm_head(model).logit_scale, lm_head(model).softcap
    assert (scale != 1) == (name in ("Granite", "Cohere2", "FalconH1")) and (softcap == 1.5) == name.startswith("Gemma")
    assert (lm_head(model).bias is not None) == (name == "Phi")


def test_the_loss_divides_by_its_labels_unless_told():
    model = fuse_lm_head(build("Mixtral"))
    compare(model)
    compare(model, temperature=0.7)
    compare(model, num_items=torch.tensor(11))


def test_shift_labels_are_not_shifted():
    model, (ids, attention, labels) = fuse_lm_head(build("Granite")), batch()
    target = torch.cat([labels[:, 1:], labels.new_full((B, 1), -100)], 1)
    target[0, -1] = 5
    truth = statistics(model(input_ids=ids, attention_mask=attention).logits, target, temperatures())
    ours = model(input_ids=ids, attention_mask=attention, shift_labels=target, temperature=temperatures(), fused_lm_head=True)
    assert ours.log_probs.shape == ours.entropy.shape == (B, T) and ours.log_probs[0, -1] != 0
    for name in ("log_probs", "entropy", "label_mask"):
        assert_close(name, ours[name], truth[name], 1e-5)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi", "Mixtral"])
def test_a_support_equals_full_logits_without_the_rest(name):
    """Every output and gradient; of labels the first column goes, with its tokens; a copy takes supports, too."""
    model, labels = fuse_lm_head(build(name)), batch()[2]
    left = left_tokens(labels)
    alone = (left.sum(-1) == 1)[:, 1:] & (labels[:, 1:] != -100)
    for temperature in (0.7, temperatures()):
        ours, _ = compare(copy.deepcopy(model), left=left, temperature=temperature)
        assert alone.any() and not ours["log_probs"][alone].any() and not ours["entropy"][alone].any()
        assert (ours["log_probs"] - compare(model, temperature=temperature)[0]["log_probs"]).norm() > 0.1


def test_a_support_of_shift_labels_is_not_shifted():
    model, (ids, attention, labels) = fuse_lm_head(build()), batch()
    target = torch.cat([labels[:, 1:], labels.new_full((B, 1), 5)], 1)
    left = left_tokens(target)
    truth = statistics(truncated(model(input_ids=ids, attention_mask=attention).logits, left), target)
    ours = model(input_ids=ids, attention_mask=attention, shift_labels=target, support=TokenSupport.from_mask(left), fused_lm_head=True)
    for name in ("log_probs", "entropy"):
        assert_close(name, ours[name], truth[name], 1e-5)


@pytest.mark.parametrize("kind", ["head", "both", "saved"])
def test_a_support_under_peft(kind):
    compare(adapted(kind), left=left_tokens(batch()[2]))


def changed(support, position, last):
    """With another last id of that position; None repeats the one before it."""
    ids, end = support.ids.clone(), int(support.offsets[position + 1])
    assert end - support.offsets[position] > 1
    ids[end - 1] = ids[end - 2] if last is None else last
    return TokenSupport(ids, support.offsets)


def test_wrong_supports_are_named():
    model, (ids, _, labels) = fuse_lm_head(build()), batch()
    left = left_tokens(labels)
    support = TokenSupport.from_mask(left)
    left[0, 5, labels[0, 5]] = False
    for given, error, words in (
        (dict(support=left), TypeError, "support must be a TokenSupport or None, got Tensor"),
        (dict(support=support.take(torch.arange(5))), ValueError, r"support.offsets must have 22 entries.*\[3, 7\], got 6"),
        (dict(support=TokenSupport(support.ids, support.offsets + 1)), ValueError, "support.offsets must rise from 0"),
        (dict(support=TokenSupport.from_mask(left)), ValueError, r"^labels must be among support.ids.* at position \[0, 5\].*hidden\[t - 1\]"),
        (dict(support=TokenSupport.from_mask(left), labels=None, shift_labels=labels), ValueError, r"^shift_labels must .*\[0, 5\].*hidden\[t\]"),
        (dict(support=changed(support, 5, 99)), ValueError, r"support.ids must be in \[0, V = 32\).*got 99 at position \[0, 5\]"),
        (dict(support=changed(support, 5, None)), ValueError, r"support.ids must name a token once.* at position \[0, 5\]"),
        (dict(support=support, fused_lm_head=None), ValueError, "support must come with fused_lm_head=True, got it with fused_lm_head=None"),
        (dict(support=support, fused_lm_head=lambda hidden, head: hidden), ValueError, "support must come with fused_lm_head=True"),
    ):
        with pytest.raises(error, match=words):
            model(input_ids=ids, **{"labels": labels, "fused_lm_head": True, **given})
    first = labels.clone()
    first[:, 0] = 3
    left = left_tokens(first)
    left[:, 0], left[:, 0, 4] = False, True  # nothing predicts the first column, whose tokens may be any
    model(input_ids=ids, labels=first, support=TokenSupport.from_mask(left), fused_lm_head=True)
    left[0, 5, first[0, 5]] = False
    with pytest.raises(ValueError, match=r"^labels must be among support.ids.* at position \[0, 5\]"):
        model(input_ids=ids, labels=first, support=TokenSupport.from_mask(left), fused_lm_head=True)
    with pytest.raises(ValueError, match=r"outputs of fuse_lm_head must be log_probs and entropy alone with a support, got \('is_top1',\)"):
        fuse_lm_head(model, outputs=("is_top1",))(input_ids=ids, labels=labels, support=support, fused_lm_head=True)


def test_only_what_is_asked_for_comes():
    model, (ids, _, labels) = fuse_lm_head(build(), outputs=("is_top1",)), batch()
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert out.keys() == {"loss", "log_probs", "is_top1", "label_mask"}
    with pytest.raises(ValueError, match="perplexity"):
        fuse_lm_head(model, outputs=("log_probs", "perplexity"))
    with pytest.raises(ValueError, match="shift_labels"):
        model(input_ids=ids, fused_lm_head=True)


def test_fusing_again_uses_the_newer_options():
    model, (ids, _, labels) = fuse_lm_head(build(), temperature=0.5, outputs=OUTPUTS), batch()
    assert fuse_lm_head(model, temperature=1.3, outputs=("log_probs",)) is model
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert_close("log_probs", out.log_probs, statistics(model(input_ids=ids).logits[:, :-1], labels[:, 1:], 1.3)["log_probs"], 1e-5)
    assert out.entropy is None and out.is_top1 is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ordinary_calls_and_generate_are_unchanged_bitwise(name):
    plain, (ids, attention, labels) = build(name), batch()
    model = fuse_lm_head(copy.deepcopy(plain))
    for inputs in ({}, {"labels": labels}, {"labels": labels, "num_items_in_batch": 5}, {"logits_to_keep": 2}):
        a, b = (m(input_ids=ids, attention_mask=attention, **inputs) for m in (model, plain))
        assert type(a) is type(b) and a.keys() == b.keys()
        assert torch.equal(a.logits, b.logits) and ("labels" not in inputs or torch.equal(a.loss, b.loss))
    for m in (model, plain):
        m.config.output_router_logits = False  # transformers cannot generate with it
    a, b = (m.generate(ids, attention_mask=attention, max_new_tokens=4, do_sample=False) for m in (model, plain))
    assert torch.equal(a, b) and a.shape[1] > T


def test_a_deep_copy_runs_itself():
    model, (ids, _, _) = fuse_lm_head(build()), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.2)
    before = model(input_ids=ids).logits
    assert (twin(input_ids=ids).logits - before).norm() > 0.1 * before.norm()
    compare(twin)
    compare(fuse_lm_head(twin))


@pytest.mark.parametrize("kind", ["plain", "peft", "forward of its own"])
def test_a_saved_model_comes_back_fused(kind, tmp_path):
    """By torch.save and by pickle, with its options, and it runs itself: not the model that it was saved from."""
    model = adapted("both") if kind == "peft" else build()
    if kind == "forward of its own":
        model.forward = functools.partial(type(model).forward, model)  # as accelerate's hooks put one
    fuse_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    torch.save(model, tmp_path / "model")
    loaded = torch.load(tmp_path / "model", weights_only=False), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for twin in loaded:
        assert is_fused(twin) and set(OUTPUTS) <= compare(twin, temperature=1.3)[0].keys()
        ids, _, labels = batch()
        truth = through_logits(twin, ids, None, labels, 0.7)["log_probs"]
        assert_close("log_probs", twin(input_ids=ids, labels=labels, fused_lm_head=True).log_probs, truth, 1e-5)
        compare(fuse_lm_head(pickle.loads(pickle.dumps(twin)), temperature=1.0))


@pytest.fixture
def bf16():
    """An accelerator whose autocast wraps the forward of what it prepares; the one state of the process is another test's again."""
    accelerate = pytest.importorskip("accelerate")
    states = [kind._shared_state for kind in (accelerate.state.AcceleratorState, accelerate.state.PartialState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    for state, old in zip(states, before, strict=True):
        state.clear()
        state.update(old)


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_that_accelerate_unwraps_is_fused(keep, bf16):
    """It peels its autocast off the forward and makes a method of what is left."""
    model, (ids, _, labels) = fuse_lm_head(build()), batch()
    exact = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    prepared = bf16.prepare_model(model)
    rounded = prepared(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
    model = bf16.unwrap_model(prepared, keep_fp32_wrapper=keep)
    ours = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert torch.equal(ours, rounded if keep else exact) and is_fused(model)


@pytest.mark.cover("stage")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("stage", ["fused", "prepared", "unwrapped", "fused again"])
def test_a_copy_runs_its_own_weights_and_keeps_the_signature(stage, own, bf16):
    """Whatever accelerate has wrapped around the forward, and whatever forward there was before the fused one."""
    plain, (ids, _, labels) = build(), batch()
    signature = inspect.signature(plain.forward)
    if own:
        plain.forward = functools.partial(type(plain).forward, plain)
    model = fuse_lm_head(plain)
    if stage != "fused":
        model = bf16.prepare_model(model)
    if stage in ("unwrapped", "fused again"):
        model = bf16.unwrap_model(model, keep_fp32_wrapper=False)
    if stage == "fused again":
        fuse_lm_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert is_fused(twin) and inspect.signature(twin.forward) == signature
    logits, tolerance = build()(ids).logits, 0.05 if stage == "prepared" else 1e-5
    truth = statistics(logits[:, :-1], labels[:, 1:])["log_probs"]
    assert_close("log_probs", twin(input_ids=ids, labels=labels, fused_lm_head=True).log_probs, truth, tolerance)
    assert_close("logits", twin(ids).logits, logits, tolerance)
    assert not model(ids).logits.any(), "nor does the original run the copy"


def test_trls_forward_over_ours_gives_way_and_any_other_is_refused():
    """Fused, then stock TRL, then fused again on one model: each forward would call the other for ever."""
    utils = pytest.importorskip("trl.trainer.utils")
    model = fuse_lm_head(build())
    ids = torch.randint(model.config.vocab_size, (2, 6))
    logits = model(input_ids=ids).logits
    utils.add_fused_lm_head(model)
    assert not is_fused(model)
    fuse_lm_head(model)
    assert is_fused(model) and torch.equal(model(input_ids=ids).logits, logits)
    assert model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.shape == (2, 5)
    ours = model.forward
    model.forward = lambda *args, **more: ours(*args, **more)
    with pytest.raises(ValueError, match="model.forward was replaced after fuse_lm_head, in .*test_transformers"):
        fuse_lm_head(model)


def test_a_hook_around_a_fused_forward_stays():
    """accelerate's hooks copy the attributes of the forward that they wrap onto their own."""
    hooks, calls = pytest.importorskip("accelerate.hooks"), []

    class Counts(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model, (ids, _, labels) = fuse_lm_head(build()), batch()
    hooks.add_hook_to_module(model, Counts())
    assert is_fused(model) and fuse_lm_head(model, verify=False, outputs=("log_probs",)) is model
    assert model(input_ids=ids, labels=labels, fused_lm_head=True).entropy is None and calls == [model]


def test_a_model_without_its_fused_forward_is_as_it_was_before():
    model = fuse_lm_head(build())
    del model.forward
    assert not is_fused(model) and not is_fused(pickle.loads(pickle.dumps(model)))


def test_what_accelerate_has_wrapped_is_fused_again_not_twice(bf16):
    """New options inside of its autocast. Neither what it prepared nor what it unwrapped is pickled, which would lose the forward."""
    (ids, _, labels), model = batch(), fuse_lm_head(build(), outputs=("log_probs",))
    forward = model.forward
    prepared = bf16.prepare_model(model)
    rounded, wrapped = prepared(input_ids=ids, labels=labels, fused_lm_head=True).log_probs, prepared.forward
    again = fuse_lm_head(prepared)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert torch.equal(again.log_probs, rounded) and again.entropy is not None and prepared.forward == wrapped
    with pytest.raises(pickle.PicklingError, match="unwrap_model.model, keep_fp32_wrapper=False., then fuse_lm_head again"):
        torch.save(prepared, io.BytesIO())
    model = bf16.unwrap_model(prepared, keep_fp32_wrapper=False)
    with pytest.raises(pickle.PicklingError, match="then fuse_lm_head again"):
        pickle.dumps(model)
    assert fuse_lm_head(model, temperature=0.7) is model and type(model.forward) is type(forward)
    loaded = pickle.loads(pickle.dumps(model))
    assert is_fused(loaded)
    truth = statistics(build()(input_ids=ids).logits[:, :-1], labels[:, 1:], 0.7)["log_probs"]
    assert_close("log_probs", loaded(input_ids=ids, labels=labels, fused_lm_head=True).log_probs, truth, 1e-5)
    compare(loaded, temperature=1.0)


class Odd(hf.LlamaForCausalLM):
    """An architecture that treats its logits by a factor of its configuration unknown here."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.odd_factor
        return output


@pytest.mark.parametrize("factor, refused", [(1.05, True), (0.9, True), (1.0, False)])
def test_an_unknown_treatment_of_logits_is_refused(factor, refused):
    model = tiny_model(model=Odd, odd_factor=factor)
    before = set(vars(model))
    with pytest.raises(NotImplementedError, match="Odd") if refused else contextlib.nullcontext():
        fuse_lm_head(model)
    assert is_fused(model) != refused and (set(vars(model)) == before) == refused


def test_verifying_leaves_modes_and_memory_alone():
    model = build().train()
    model.lm_head.eval()
    fuse_lm_head(model)
    assert model.training and not model.lm_head.training and all(p.grad is None for p in model.parameters())


# ---- the mixture of experts ----


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_the_router_loss_is_asked_for_by_configuration_or_call(name):
    model, (ids, attention, labels) = fuse_lm_head(build(name, output_router_logits=False)), batch()
    call = dict(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    without = model(**call)
    truth = model(input_ids=ids, attention_mask=attention, output_router_logits=True).aux_loss
    asked = model(**call, output_router_logits=True)
    assert "aux_loss" not in without and torch.equal(asked.aux_loss, truth)
    assert_close("loss", asked.loss, without.loss + 0.3 * truth, 1e-6)
    positional = model(ids, attention, labels=labels, fused_lm_head=True, output_router_logits=True)
    assert torch.equal(positional.aux_loss, truth) and (truth - model(ids, output_router_logits=True).aux_loss).abs() > 1e-5
    result, aux_loss = model(input_ids=ids, attention_mask=attention, output_router_logits=True, fused_lm_head=lambda h, head: h)
    assert torch.equal(aux_loss, truth) and result.shape == (B, T, 16)
    model.config.output_router_logits = True
    assert torch.equal(model(**call).loss, asked.loss)
    assert "aux_loss" not in model(**call, output_router_logits=False)


# ---- precision ----


def error_to_float32(model, call):
    """(gradient of every parameter as one vector, log_probs) of a call."""
    out = call(model)
    found = gradients(model, mixed_loss(out))
    return torch.cat([g.flatten().float() for g in found.values()]), out["log_probs"].detach()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_no_worse_than_full_logits(name, autocast):
    ids, attention, labels = batch()
    model = fuse_lm_head(build(name))

    def full(m):
        return through_logits(m, ids, attention, labels, 0.8)

    def fused(m):
        return m(input_ids=ids, attention_mask=attention, labels=labels, temperature=0.8, fused_lm_head=True)

    exact = error_to_float32(model, full)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, ours = error_to_float32(model, full), error_to_float32(model, fused)
    for what, a, b, c in zip(("gradient", "log_probs"), ours, theirs, exact, strict=True):
        assert_no_worse_than_torch(f"{name} {what}", a, b, c, slack=1.5)
    assert ours[1].dtype == torch.float32


@pytest.mark.parametrize("name", ["Llama", "Phi"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_head_in_float32(name, autocast):
    ids, _, labels = batch()
    model = fuse_lm_head(build(name), head_in_float32=True)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.base_model(ids).last_hidden_state
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        dtypes = model(input_ids=ids, fused_lm_head=lambda h, head: [x.dtype for x in (h, *head[:2]) if x is not None])
    weight, bias = model.lm_head.weight.float(), 0 if model.lm_head.bias is None else model.lm_head.bias.float()
    truth = statistics(hidden.float()[:, :-1] @ weight.T + bias, labels[:, 1:])
    assert set(dtypes) == {torch.float32}
    assert_close("log_probs", out.log_probs, truth["log_probs"], 1e-5)
    out.log_probs.sum().backward()
    ours = model.lm_head.weight.grad
    assert ours.dtype == model.lm_head.weight.dtype
    (exact,) = torch.autograd.grad(truth["log_probs"].sum(), weight)
    assert_close("weight", ours, exact, 1e-5 if autocast else 5e-3)


# ---- nothing to learn from ----


@pytest.mark.parametrize("name", ["Llama", "Phi", "Qwen3Moe"])
def test_no_labels_at_all_give_a_differentiable_zero(name):
    model, (ids, attention, labels) = fuse_lm_head(build(name)), batch()
    touched = []
    for target in (labels, torch.full_like(labels, -100)):
        out = model(input_ids=ids, attention_mask=attention, labels=target, fused_lm_head=True)
        touched.append(gradients(model, out.loss - (0 if out.aux_loss is None else 0.3 * out.aux_loss)))
    assert out.loss.requires_grad and not out.label_mask.any() and not out.log_probs.any() and not out.entropy.any()
    assert out.loss == (0 if out.aux_loss is None else 0.3 * out.aux_loss)
    assert all((a is None) == (b is None) for a, b in zip(*(g.values() for g in touched), strict=True))
    assert all(g is None or g.abs().max() < 1e-7 for g in touched[1].values()) and touched[1]["lm_head.weight"] is not None


# ---- the output layer's own call ----


def test_hooks_of_the_output_layer_fire_and_its_forward_comes_back():
    model, (ids, _, labels) = fuse_lm_head(build()), batch()
    layer, seen = model.lm_head, []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert model(input_ids=ids, fused_lm_head=lambda h, head: seen.append("inside")) is None
    assert seen == ["before", "after", "before", "inside", "after"] and "forward" not in vars(layer)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids, fused_lm_head=lambda h, head: 1 / 0)
    assert "forward" not in vars(layer)
    layer.forward = own = layer.forward  # as accelerate's hooks put one
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert vars(layer)["forward"] is own


# ---- PEFT ----

PEFT = {
    "body": dict(target_modules=["q_proj", "down_proj"]),
    "head": dict(target_modules=["lm_head"], use_rslora=True),
    "both": dict(target_modules=["q_proj", "lm_head"], lora_alpha=3),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=list(range(2, 14))),
}


def adapted(kind="both", fuse="before", name="Llama", tied=False, model=None, **more):
    """A PEFT model whose adapters are not at their start, so that none is a zero that could be forgotten."""
    peft = pytest.importorskip("peft")
    model = build(name, tied) if model is None else model
    if fuse == "before":
        fuse_lm_head(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, **{**PEFT[kind], **more}))
    randomize(model)
    if fuse == "after":
        fuse_lm_head(model.get_base_model())
    return model.eval()


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
            p.data += 0.3 * torch.randn(p.shape, generator=generator)


@pytest.mark.cover("kind", "tied")
@pytest.mark.parametrize("fuse", ["before", "after"])
@pytest.mark.parametrize("kind, tied", [(kind, tied) for kind in PEFT for tied in (False, True) if kind != "saved" or not tied])
def test_adapters(kind, tied, fuse):
    model = adapted(kind, fuse, tied=tied)
    _, found = compare(model)
    assert found and all(g is not None and g.abs().max() > 0 for g in found.values())
    with model.disable_adapter():
        disabled, base = (
            m(input_ids=batch()[0], labels=batch()[2], fused_lm_head=True) for m in (model, fuse_lm_head(build(tied=tied)))
        )
        assert_close("disabled", disabled.log_probs, base.log_probs, 1e-6)
    assert (model(input_ids=batch()[0], labels=batch()[2], fused_lm_head=True).log_probs - base.log_probs).norm() > 0.1


@pytest.mark.parametrize("second", [["lm_head"], ["q_proj"]])
def test_two_active_adapters(second):
    import peft

    model = adapted("both", "before")
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=second))
    randomize(model)
    one = model(input_ids=batch()[0], labels=batch()[2], fused_lm_head=True).log_probs
    model.base_model.set_adapter(["default", "second"])
    ours, found = compare(model)
    assert (ours["log_probs"] - one).norm() > 0.1 and sum("second" in name for name in found) == 2
    model.set_adapter("second")
    compare(model)


def test_merged_adapters():
    model = adapted("both")
    model.merge_adapter()
    ids, _, labels = batch()
    truth = statistics(model(input_ids=ids).logits[:, :-1], labels[:, 1:])["log_probs"]
    assert_close("merged", model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs, truth, 1e-5)
    with model.disable_adapter():  # PEFT takes the adapter out of the weight then
        ours = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        truth = statistics(build()(input_ids=ids).logits[:, :-1], labels[:, 1:])["log_probs"]
    assert_close("merged and disabled", ours, truth, 1e-5)


def test_an_adapter_that_saves_no_head_uses_the_original():
    import peft

    model = adapted("saved")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    compare(model)
    model.set_adapter("other")
    compare(model)


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("kind", ["head", "both"])
def test_float32_adapters_over_a_bfloat16_base(kind, in_float32):
    exact_model = adapted(kind)
    model = adapted(kind, model=build().bfloat16())
    fuse_lm_head(model.get_base_model(), verify=False, head_in_float32=in_float32)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    results = []
    for m, fused in ((model, True), (model, False), (exact_model, False)):
        ids, attention, labels = batch()
        if fused:
            out = m(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        else:
            out = through_logits(m, ids, attention, labels)
        found = gradients(m, mixed_loss(out))
        results.append((out["log_probs"].detach(), torch.cat([g.flatten() for g in found.values()])))
    for what, ours, theirs, exact in zip(("log_probs", "gradient"), *results, strict=True):
        assert ours.dtype == torch.float32
        assert_no_worse_than_torch(what, ours, theirs, exact, slack=1.5)
    if in_float32:  # the adapter was not rounded on its way
        _, a, b = (x for x in lm_head(model.get_base_model(), torch.float32).lora[::-1])
        layer = model.get_base_model().lm_head
        assert torch.equal(a, layer.lora_B["default"].weight) and torch.equal(b, layer.lora_A["default"].weight)


def test_dropout_on_the_head_is_refused_in_training_alone():
    ids, _, labels = batch()
    model = adapted("both", lora_dropout=0.1)
    compare(model)
    model.train()
    with pytest.raises(NotImplementedError, match="lora_dropout"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    adapted("body", lora_dropout=0.1).train()(input_ids=ids, labels=labels, fused_lm_head=True)


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias", "IA3", "LoHa", "Vera", "OFT"])
def test_other_adapters_on_the_head_are_refused(kind):
    peft = pytest.importorskip("peft")
    options = {
        "IA3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["lm_head"]),
        "Vera": lambda: peft.VeraConfig(r=2, target_modules=["lm_head"]),
        "OFT": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["lm_head"]),
    }
    config = options[kind]() if kind in options else peft.LoraConfig(r=2, target_modules=["lm_head"], **{kind: True})
    model = peft.get_peft_model(fuse_lm_head(build()), config).eval()
    ids, _, labels = batch()
    with pytest.raises(NotImplementedError, match="plain LoRA"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    with model.disable_adapter():
        model(input_ids=ids, labels=labels, fused_lm_head=True)


# ---- two processes ----

RANKS, PER_RANK = 2, 2
WRAPPERS = ["ddp", "ddp unused", "ddp tied", "fsdp", "fsdp tied", "fsdp head", "fsdp bf16", "fsdp head bf16", "fsdp phi", "fsdp moe",
            "fsdp head lora", "ddp lora"]  # fmt: skip
ZERO3 = ["zero", "zero tied", "zero phi", "zero lora", "zero saved"]
LOSSES = ["sum", "one pass", "two phases"]
KEPT = ["ragged", "none on one"]
CASES = [(wrapper, loss, kept) for wrapper in WRAPPERS for loss in LOSSES for kept in KEPT]
CASES += [(wrapper, "over supports", kept) for wrapper in ("ddp", "fsdp head", "ddp lora") for kept in KEPT]
ZERO3_CASES = [(wrapper, loss, kept) for wrapper in ZERO3 for loss in LOSSES for kept in KEPT] + [("zero", "over supports", "ragged")]


def parallel_model(wrapper):
    name = "Phi" if "phi" in wrapper else "Mixtral" if "moe" in wrapper else "Llama"
    model = build(name, "tied" in wrapper)
    if "lora" in wrapper or "saved" in wrapper:
        return adapted("saved" if "saved" in wrapper else "both", model=model)
    return fuse_lm_head(model)


@functools.cache
def old_log_probs(wrapper):
    """Near those of the model, so that some ratios are clipped and most are not."""
    ids, _, labels = batch(RANKS * PER_RANK)
    with torch.no_grad():
        found = statistics(parallel_model(wrapper)(input_ids=ids).logits[:, :-1], labels[:, 1:])["log_probs"]
    return found + 0.15 * torch.randn(found.shape, generator=torch.Generator().manual_seed(5))


def parallel_loss(wrapper, model, loss, kept, rank=None, share=1):
    """The loss of one rank's rows (None: of all), times ``share`` where the gradients' mean is taken over ranks."""
    ids, _, labels = batch(RANKS * PER_RANK)
    if kept == "none on one":
        labels[PER_RANK:] = -100
    count = (labels[:, 1:] != -100).sum().item()
    advantages, old_logps = torch.tensor([1.0, -0.7, -1.2, 0.6]), old_log_probs(wrapper)
    own = slice(None) if rank is None else slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    if loss in ("sum", "over supports"):
        support = TokenSupport.from_mask(left_tokens(labels)[own]) if loss == "over supports" else None
        out = model(input_ids=ids[own], labels=labels[own], num_items_in_batch=count / share, support=support, fused_lm_head=True)
        return out.loss + 0.1 * share * out.entropy.sum() / count
    config = GRPOLossConfig(importance_sampling_level="sequence" if loss == "two phases" else "token")

    def fn(hidden, head):
        target = labels[own, 1:]
        return fused_linear_grpo_loss(
            hidden[:, :-1], head.weight, target, advantages[own], target != -100, bias=head.bias, lora=head.lora,
            old_logps=old_logps[own], num_items=count / share, config=config,
        )  # fmt: skip

    return model(input_ids=ids[own], fused_lm_head=fn).loss


def wrapped(wrapper, model):
    if "ddp" in wrapper:
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters="unused" in wrapper)
    if "zero" in wrapper:
        import deepspeed

        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"train_micro_batch_size_per_gpu": PER_RANK, "zero_allow_untested_optimizer": True,
                   "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # fmt: skip
        return deepspeed.initialize(
            model=model, model_parameters=trained, config=options, optimizer=torch.optim.SGD(trained, lr=0.0)
        )[0]
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if "bf16" in wrapper else {}
    options = {"mesh": dist.init_device_mesh("cpu", (RANKS,)), "mp_policy": MixedPrecisionPolicy(**dtypes)}
    for module in model.modules():
        if isinstance(module, hf.modeling_layers.GradientCheckpointingLayer):
            fully_shard(module, **options)
    if "head" in wrapper:
        fully_shard(getattr(model, "get_base_model", lambda: model)().get_output_embeddings(), **options)
    return fully_shard(model, **options | {"mp_policy": MixedPrecisionPolicy(**dtypes, output_dtype=torch.float32)})


def backward(wrapper, model, loss):
    """{parameter: its whole gradient} after a backward through the wrapper."""
    if "zero" not in wrapper:
        loss.backward()
        parts = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in parts.items()}
    from deepspeed.utils import safe_get_full_grad

    model.backward(loss)
    found = {n: safe_get_full_grad(p) for n, p in model.module.named_parameters() if p.requires_grad}
    model.step()  # a step of nothing, after which the gradients are gone
    return found


def work(cases, seconds, rank, folder, port):
    os.environ["DS_ACCELERATOR"] = "cpu"
    join(rank, port, RANKS, seconds)
    models = {}
    for case in cases:
        wrapper, loss, kept = case
        if wrapper not in models:  # the second loss comes when every lazy start and trace is over
            models[wrapper] = wrapped(wrapper, parallel_model(wrapper))
        model = models[wrapper]
        value = parallel_loss(wrapper, model, loss, kept, rank, share=RANKS)
        found = backward(wrapper, model, value)
        torch.save((value.detach(), found), f"{folder}/{'-'.join(case)}-{rank}")
        model.zero_grad()
    leave()


def run_ranks(folder, cases, seconds):
    """Both ranks' results as files."""
    launch(functools.partial(work, cases, seconds), folder, RANKS, seconds)
    return folder


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), CASES, seconds=100)


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("zero"), ZERO3_CASES, seconds=300)  # it compiles an extension of its own first


def joined(wrapper, loss, kept):
    """(loss, gradients) of one process with the joined batch."""
    model = parallel_model(wrapper)
    if "bf16" not in wrapper:
        value = parallel_loss(wrapper, model, loss, kept)
        if "moe" in wrapper and loss == "sum":  # a product of two means: the mean over ranks is another than the joined batch's
            value = sum(parallel_loss(wrapper, model, loss, kept, rank, share=RANKS) for rank in range(RANKS)) / RANKS
        return value, gradients(model, value)
    for p in model.parameters():  # buffers stay as they are
        p.data = p.data.bfloat16()
    parts = [parallel_loss(wrapper, model, loss, kept, rank, share=RANKS) for rank in range(RANKS)]
    found = [{n: g.float() for n, g in gradients(model, part).items()} for part in parts]
    return sum(parts) / RANKS, {n: sum(f[n] for f in found) / RANKS for n in found[0]}


def check_ranks(folder, wrapper, loss, kept):
    value, truth = joined(wrapper, loss, kept)
    ranks = [torch.load(folder / f"{wrapper}-{loss}-{kept}-{rank}") for rank in range(RANKS)]
    assert_close("loss", sum(v for v, _ in ranks) / RANKS, value, 1e-5)
    for _, found in ranks:
        assert_all_close(found, truth, 2e-5, floor=1e-6)
    assert max(g.norm() for g in truth.values()) > 1e-2 and (kept == "ragged" or ranks[0][0].abs() > 1e-3)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("wrapper, loss, kept", CASES)
def test_two_processes_have_the_gradients_of_one(parallel, wrapper, loss, kept):
    check_ranks(parallel, wrapper, loss, kept)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("wrapper, loss, kept", ZERO3_CASES)
def test_zero3_has_the_gradients_of_one_process(zero3, wrapper, loss, kept):
    check_ranks(zero3, wrapper, loss, kept)


# ---- what a user gets wrong ----


def test_mistakes_are_named():
    model, (ids, _, labels) = build(), batch()
    for options, error, words in (
        (dict(outputs="entropy"), ValueError, "outputs must be a tuple.*'entropy'"),
        (dict(outputs=("logits",)), ValueError, "outputs.*logits"),
        (dict(backend="trition"), ValueError, "backend.*trition"),
        (dict(temperature=0.0), ValueError, "temperature"),
    ):
        with pytest.raises(error, match=words):
            fuse_lm_head(model, **options)
    for other in (torch.nn.Linear(2, 3), model.base_model, "a/path"):
        with pytest.raises(TypeError, match="model must be a transformers causal LM"):
            fuse_lm_head(other)
    sizes = dict(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="got T5ForConditionalGeneration, an encoder-decoder model; .*linear_logprobs"):
        fuse_lm_head(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)))
    assert not is_fused(model) and is_fused(fuse_lm_head(model))
    for given, error, words in (
        (dict(), ValueError, "labels or shift_labels.*neither"),
        (dict(labels=labels, shift_labels=labels), ValueError, "labels or shift_labels.*both"),
        (dict(labels=labels[:, 1:]), ValueError, r"labels must be \[B, T\]"),
        (dict(labels=labels[0]), ValueError, r"labels must be \[B, T\]"),
        (dict(labels=labels.float()), TypeError, "labels must be int64"),
    ):
        with pytest.raises(error, match=words):
            model(input_ids=ids, fused_lm_head=True, **given)
    narrow = model(input_ids=ids, labels=labels.int(), fused_lm_head=True).log_probs
    assert torch.equal(narrow, model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs)


def test_a_refused_model_is_left_as_it_was():
    class Odd(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model = Odd(build().config)
    with pytest.raises(NotImplementedError):
        fuse_lm_head(model)
    assert not is_fused(model) and "forward" not in vars(model)


def test_a_peft_model_is_fused_inside():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["lm_head"]))
    assert fuse_lm_head(model) is model and is_fused(model) and is_fused(model.get_base_model())
    ids, _, labels = batch()
    assert model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.shape == (ids.shape[0], ids.shape[1] - 1)
