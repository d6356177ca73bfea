"""GRPOTrainer with kl_estimator="exact": its loss against the logits of both models, and what the rollout keeps of the reference."""

import dataclasses
import functools

import pytest
import torch
from support.tiny_trainer import DATA, config, model_inputs, next_micro_batches, tiny_model, trainer, weights
from support.tolerance import assert_no_worse_than_torch
from transformers import Cohere2Config, Cohere2ForCausalLM, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from docs import kl_variance
from grpo_kernels import GRPOLossConfig, objective
from grpo_kernels.integrations.transformers import fuse_lm_head, lm_head
from grpo_kernels.reference import divergence_from_logits, logps_from_logits, restricted
from grpo_kernels.trainer import dry_run, microbatch, models, scoring
from grpo_kernels.trainer.demo import make_tokenizer
from grpo_kernels.trainer.diagnose import NotFinite
from grpo_kernels.trainer.microbatch import joined

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = dict(beta=0.1, kl_estimator="exact")
SGD = dict(optim="sgd", lr_scheduler_type="constant", learning_rate=0.3)
ARCHITECTURES = {
    "llama": dict(),
    "tied": dict(tie_word_embeddings=True),
    "gemma2 softcap": dict(
        config=Gemma2Config, model=Gemma2ForCausalLM, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05
    ),
    "cohere2 logit_scale": dict(config=Cohere2Config, model=Cohere2ForCausalLM, num_key_value_heads=2, logit_scale=0.25),
    "phi bias": dict(config=PhiConfig, model=PhiForCausalLM, num_key_value_heads=2),
}


def moved(model, amount=0.05):
    """The model, a little way from where it was: a policy that its reference is no longer equal to."""
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=dice).to(p))
    return model


def lora(peft, **options):
    return peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **options}
    )


def logits_of(model, batch):
    return model(**model_inputs(batch)).logits[:, -batch["mask"].shape[1] - 1 : -1]


def through_logits(t, model, reference_logits, batch):
    """(loss, metrics) of one micro-batch through the logits of both models, in their dtype, and autograd."""
    # the models' own forwards have scaled and capped these
    plain = dataclasses.replace(t.loss_config, logit_scale=1.0, softcap=None)
    mask, ids = batch["mask"], batch["input_ids"][:, -batch["mask"].shape[1] :]
    z, allowed = logits_of(model, batch), None
    if "support" in batch:
        allowed = batch["support"].to_mask(z.shape[-1]).view_as(z) | ~mask.unsqueeze(-1)
    logps, entropy = logps_from_logits(z, ids, mask, plain, allowed=allowed)
    z, y = (restricted(x / plain.temperature, allowed) for x in (z, reference_logits.to(z.dtype)))
    kl = divergence_from_logits(z, y, "reverse_kl").where(mask, 0.0)
    tensors = {name: batch.get(name) for name in ("old_logps", "num_items")}
    return objective(logps, entropy, batch["advantages"], mask, **tensors, kl=kl, config=t.loss_config)


def gradient(loss, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@torch.no_grad()
def reference_logits(reference, batch):
    return logits_of(reference.eval(), batch)


def same_step(ours, exact, loss, truth):
    torch.testing.assert_close(loss.double(), truth.double(), rtol=1e-10, atol=1e-12)
    assert (ours - exact).norm() <= 1e-10 * exact.norm() and exact.norm() > 1e-5


# ---- the loss and its gradient ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_both_models_logits(tmp_path, name):
    build = functools.partial(tiny_model, **ARCHITECTURES[name])
    # Gemma's own attention is NaN beside padding in float64: these prompts are of one length
    t = trainer(tmp_path, build().double(), data=DATA[3:6] if "gemma" in name else DATA, temperature=0.8, **EXACT)
    moved(t.model)
    (batch,) = next_micro_batches(t)
    assert "ref_logps" not in batch and not batch["mask"].all()
    loss, output = t.compute_loss(t.model, batch, return_outputs=True)
    policy = moved(build().double())
    truth, metrics = through_logits(t, policy, reference_logits(build().double(), batch), batch)
    same_step(gradient(loss, t.model), gradient(truth, policy), loss, truth)
    assert output.metrics["kl"].item() == pytest.approx(metrics["kl"].item(), rel=1e-10) and metrics["kl"] > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lower_precision_loses_no_more_than_through_logits(tmp_path, dtype):
    t = trainer(tmp_path, tiny_model().to(dtype), **EXACT)
    moved(t.model)
    (batch,) = next_micro_batches(t)
    ours = gradient(t.compute_loss(t.model, batch), t.model)
    found = []
    for kind in (dtype, torch.float64):  # the same numbers in both: the model's as they were rounded
        policy, reference = moved(tiny_model().to(dtype)).to(kind), tiny_model().to(dtype).to(kind)
        found.append(gradient(through_logits(t, policy, reference_logits(reference, batch), batch)[0], policy))
    assert_no_worse_than_torch("gradient", ours, *found)


@pytest.mark.parametrize("adapted", [["v_proj"], ["v_proj", "lm_head"]])
def test_an_adapter_shares_the_head_with_its_reference(tmp_path, adapted):
    peft = pytest.importorskip("peft")
    t = trainer(tmp_path, tiny_model().double(), peft_config=lora(peft, target_modules=adapted), **EXACT)
    moved(t.model, 0.5)
    (batch,) = next_micro_batches(t)
    loss = t.compute_loss(t.model, batch)
    policy = peft.get_peft_model(tiny_model().double(), lora(peft, target_modules=adapted))
    policy.load_state_dict(t.model.state_dict())
    truth, metrics = through_logits(t, policy, reference_logits(tiny_model().double(), batch), batch)
    same_step(gradient(loss, t.model), gradient(truth, policy), loss, truth)
    assert metrics["kl"] > 1e-5
    head, own = t._reference_head(torch.float64), t.model.get_base_model().lm_head
    assert head.weight.data_ptr() == own.weight.data_ptr() and head.lora is None


def test_a_trained_copy_of_the_head_is_not_the_references(tmp_path):
    peft = pytest.importorskip("peft")
    t = trainer(tmp_path, peft_config=lora(peft, target_modules=["q_proj"], modules_to_save=["lm_head"]), **EXACT)
    moved(t.model)
    layer = t.model.get_base_model().lm_head
    head = lm_head(t.model.get_base_model(), adapters=False)
    assert head.weight is layer.original_module.weight and not torch.equal(head.weight, layer.modules_to_save["default"].weight)
    (batch,) = next_micro_batches(t)
    _, output = t.compute_loss(t.model, batch, return_outputs=True)
    truth, metrics = through_logits(t, t.model, reference_logits(tiny_model(), batch), batch)
    assert output.loss.item() == pytest.approx(truth.item(), abs=1e-6)
    assert output.metrics["kl"].item() == pytest.approx(metrics["kl"].item(), rel=1e-4)


def test_a_policy_that_is_its_reference_has_no_kl_and_no_gradient_of_it(tmp_path):
    t = trainer(tmp_path, beta=1.0, kl_estimator="exact")
    (batch,) = next_micro_batches(t)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    loss, output = t.compute_loss(t.model, batch, return_outputs=True)
    assert output.metrics["kl"] == 0 and loss == 0
    assert not gradient(loss, t.model).any()
    estimated = trainer(tmp_path, beta=1.0)
    (batch,) = next_micro_batches(estimated)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    assert gradient(estimated.compute_loss(estimated.model, batch), estimated.model).norm() < 1e-6


def test_over_the_tokens_that_the_sampler_left(tmp_path):
    t = trainer(tmp_path, tiny_model().double(), top_k=5, **EXACT)
    moved(t.model)
    (batch,) = next_micro_batches(t)
    assert batch["support"].lengths()[batch["mask"].flatten()].max() == 5
    loss, output = t.compute_loss(t.model, batch, return_outputs=True)
    policy = moved(tiny_model().double())
    truth, metrics = through_logits(t, policy, reference_logits(tiny_model().double(), batch), batch)
    same_step(gradient(loss, t.model), gradient(truth, policy), loss, truth)
    assert output.metrics["kl"].item() == pytest.approx(metrics["kl"].item(), rel=1e-10)


# ---- micro-batches ----


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_accumulation_and_packing_change_nothing(tmp_path, loss_type):
    ends = []
    for size, accumulation, packed in ((8, 1, False), (2, 4, False), (8, 1, True), (4, 2, True)):
        t = trainer(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, padding_free=packed,
                    loss_type=loss_type, num_iterations=2, max_steps=3, **EXACT, **SGD)  # fmt: skip
        t.train()
        ends.append((weights(t.model), [log["kl"] for log in t.state.log_history if "kl" in log]))
    whole, kl = ends[0]
    assert kl[0] < 1e-7 and kl[1] > 1e-5
    for found, of_it in ends[1:]:
        assert (found - whole).norm() <= 1e-5 * (whole - weights(tiny_model())).norm()
        assert of_it == pytest.approx(kl, rel=1e-4, abs=1e-7)


def test_the_rollout_keeps_the_states_that_predict_its_tokens(tmp_path):
    t = trainer(tmp_path, steps_per_generation=2, per_device_train_batch_size=4, **EXACT)
    (batch,) = next_micro_batches(t)
    rollout, T = t._rollout, t._rollout["mask"].shape[1]
    with torch.no_grad():
        whole = tiny_model().model(**model_inputs(rollout)).last_hidden_state[:, -T - 1 : -1]
    kept = rollout["mask"]
    assert rollout["ref_hidden"].shape == (8, T, 16) and (rollout["input_ids"][:, 0] == 0).any()
    torch.testing.assert_close(rollout["ref_hidden"][kept], whole[kept], atol=1e-6, rtol=1e-5)
    assert torch.equal(batch["ref_hidden"], rollout["ref_hidden"][:4])
    for packed in (False, True):
        micro = microbatch.make(batch, t.loss_config, packed=packed)
        again = micro.spread(micro.loss_inputs["ref_hidden"])
        assert torch.equal(again[batch["mask"]], batch["ref_hidden"][batch["mask"]])


def test_under_autocast_the_states_take_half_of_the_room(tmp_path):
    t = trainer(tmp_path, bf16=True, num_iterations=2, **EXACT)
    t.train()
    assert t._rollout["ref_hidden"].dtype == torch.bfloat16
    # the reference's states are rounded as the policy's own are, so that it is exactly 0 at first
    assert [log["kl"] > 0 for log in t.state.log_history if "kl" in log] == [False, True]


def test_rollouts_of_several_processes_are_joined():
    def batch(B, P, T):
        return {"input_ids": torch.ones(B, P + T), "mask": torch.ones(B, T, dtype=torch.bool), "ref_hidden": torch.randn(B, T, 3)}

    parts = [batch(2, 3, 4), batch(1, 2, 6)]
    states = joined(parts, 0)["ref_hidden"]
    assert states.shape == (3, 6, 3)
    assert torch.equal(states[:2, :4], parts[0]["ref_hidden"]) and torch.equal(states[2:], parts[1]["ref_hidden"])
    assert not states[:2, 4:].any()


# ---- runs ----


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_resumed_amid_a_rollout_ends_in_the_same_bits(tmp_path, adapted):
    options = dict(num_iterations=3, max_steps=5, save_strategy="steps", save_steps=2, **EXACT)
    if adapted:
        options["peft_config"] = lora(pytest.importorskip("peft"))

    def build(folder, **more):
        torch.manual_seed(0)  # of the adapters
        return trainer(tmp_path / folder, tiny_model(attention_dropout=0.1), **{**options, **more})

    whole, resumed = build("whole"), build("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(weights(whole.model), weights(resumed.model)) and resumed._rollout_index == 1
    with pytest.raises(ValueError, match="kl_estimator and beta must be those of the checkpoint.* no ref_logps .*'k3'"):
        build("other", kl_estimator="k3").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_a_reference_that_moves_amid_a_rollout_is_asked_again(tmp_path):
    options = dict(num_iterations=4, max_steps=4, sync_ref_model=True, ref_model_sync_steps=2, learning_rate=0.1, **EXACT)
    t = trainer(tmp_path, save_strategy="steps", save_steps=3, **options)
    t.train()
    assert not torch.equal(weights(t.ref_model), weights(tiny_model()))
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(t.model))
    # the same weights in both: with the states of the old reference under the new head it would not be 0
    options |= dict(ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, num_iterations=3, max_steps=3)
    t = trainer(tmp_path, **options)
    t.train()
    assert [log["kl"] for log in t.state.log_history if "kl" in log] == pytest.approx([0, 0, 0], abs=1e-9)
    assert not torch.equal(weights(t.model), weights(tiny_model()))


def test_an_evaluation_reports_it(tmp_path):
    t = trainer(tmp_path, eval_dataset=DATA[:3], num_generations_eval=2, **EXACT)
    moved(t.model)
    found = t.evaluate()
    assert found["eval_kl"] > 1e-5 and found["eval_loss"] == pytest.approx(found["eval_policy_loss"], abs=1e-6)


def test_no_reference_logits_are_made_while_a_rollout_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "linear_logprobs", None)  # a call would be a TypeError
    t = trainer(tmp_path, max_steps=1, **EXACT)
    t.ref_model.lm_head.register_forward_hook(lambda layer, args, out: seen.append(out.shape[-1]))
    seen = []
    t.train()
    assert seen == [16]  # hidden size, and not the vocabulary's 32


# ---- what is refused ----


def test_wrong_values_are_named(tmp_path, monkeypatch):
    for wrong in ("k1", None, True):
        with pytest.raises(ValueError, match="kl_estimator must be one of k3, exact"):
            config(tmp_path, beta=0.1, kl_estimator=wrong)
    assert config(tmp_path, **EXACT).loss_config() == GRPOLossConfig(max_completion_length=5, **EXACT)
    t = trainer(tmp_path, **EXACT)
    t.ref_model.config.logit_scale = 0.5
    (batch,) = next_micro_batches(t)
    with pytest.raises(ValueError, match="logit_scale 1.0 and softcap None, got 0.5 and None"):
        t.compute_loss(t.model, batch)
    monkeypatch.setattr(models, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="kl_estimator must be 'k3' under ZeRO-3, unless an adapter is trained"):
        trainer(tmp_path, **EXACT)


def test_without_a_kl_it_changes_nothing(tmp_path):
    ends = []
    for estimator in ("k3", "exact"):
        t = trainer(tmp_path, max_steps=1, kl_estimator=estimator)
        t.train()
        assert t.ref_model is None and "ref_hidden" not in t._rollout
        ends.append(weights(t.model))
    assert torch.equal(*ends)


def test_what_is_not_finite_of_the_reference_is_named(tmp_path):
    t = trainer(tmp_path, **EXACT)
    with torch.no_grad():
        t.ref_model.lm_head.weight[7, 3] = float("nan")
    with pytest.raises(NotFinite, match="the reference's head's weight in the row of token 7"):
        t.train()
    t = trainer(tmp_path, **EXACT)
    (batch,) = next_micro_batches(t)
    batch["ref_hidden"][2, 0, 5] = float("inf")
    with pytest.raises(NotFinite, match="ref_hidden at completion 2 of the micro-batch, position 0"):
        t.compute_loss(t.model, batch)


def test_the_dry_run_counts_what_is_kept(tmp_path):
    plans = [
        {line[:11].strip(): line[11:] for line in dry_run.describe(trainer(tmp_path, beta=0.1, kl_estimator=which, **options))}
        for which, options in (("k3", {}), ("exact", {}), ("exact", {"max_completion_length": 2**15, "bf16": True}))
    ]
    assert "reference" not in plans[0]
    assert plans[1]["reference"].startswith("its last hidden states of 40 tokens are kept")
    assert plans[2]["reference"].endswith("8 MiB at full length")  # 8 x 2^15 x 16 x 2 bytes


# ---- what it is for ----


def test_its_gradient_has_the_variance_of_prompts_and_prefixes_alone(capsys):
    """Of one prompt and completions of one token there is neither; k3 has that of the token."""
    t = kl_variance.trained_away(tiny_model(), make_tokenizer(), 1, per_device_train_batch_size=8)
    moved(t.model)
    t.train_dataset, t.args.max_completion_length = DATA[:1], 1
    found = kl_variance.measure(t, fuse_lm_head(tiny_model()).eval(), batches=24, completions=64)
    kl_variance.show(1, found)
    assert len(capsys.readouterr().out.splitlines()) == 3
    k3, uncorrected, exact = found.values()
    size = exact.mean.norm() ** 2
    assert size > 1e-6 and exact.variance < 1e-9 * size and min(k3.variance, uncorrected.variance) > 1e-2 * size
    # their mean is the exact gradient, up to what 24 batches leave of their variance
    assert (k3.mean - exact.mean).norm() ** 2 < 4 * k3.variance / 24
