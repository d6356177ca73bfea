"""What of a micro-batch reaches model and loss: fewer completions, no padding, and still the same gradients."""

import pytest
import torch
from support.micro_batches import batch
from support.tiny_trainer import digit_sum, next_micro_batches, tiny_model, trainer, weights
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from grpo_kernels import GRPOLossConfig
from grpo_kernels.integrations.transformers import fuse_lm_head
from grpo_kernels.trainer import microbatch
from grpo_kernels.trainer.models import runs_packed

LOSSES = ["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "sapo", "cispo", "vespo"]


pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(t, given, micro_of):
    """(loss, gradients, logps) of one micro-batch through the trainer's own compute_loss."""
    t._micro_batch = lambda inputs, skip: micro_of(inputs)
    t.model.zero_grad()
    loss, output = t.compute_loss(t.model, given, return_outputs=True)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in t.model.parameters()]), output.logps


@pytest.mark.cover("loss_type")
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_skipping_trimming_and_packing_keep_the_gradients(tmp_path, loss_type, packed, level):
    if level == "sequence" and loss_type in ("cispo", "vespo", "sapo"):
        pytest.skip("not a combination")
    t = trainer(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    t.model.train()
    for given in (batch(num_items=torch.tensor(9.0)), batch(), batch(empty=(2,)), batch(zero=(), empty=(0, 5), P=1)):
        plain = gradients(t, given, lambda x: microbatch.make(x, t.loss_config))
        ours = gradients(t, given, lambda x: microbatch.make(x, t.loss_config, packed=packed, skip=True))
        assert ours[0] == pytest.approx(plain[0], abs=1e-6)
        assert (ours[1] - plain[1]).norm() <= 2e-5 * plain[1].norm() and plain[1].norm() > 1e-3
        seen = given["mask"] & (given["advantages"] != 0).unsqueeze(1)
        torch.testing.assert_close(ours[2][seen], plain[2][seen], atol=1e-5, rtol=1e-5)


def test_less_reaches_the_model():
    given, config = batch(zero=(1, 4), empty=(0,)), GRPOLossConfig()
    whole, packed = (microbatch.make(given, config, packed=p, skip=True) for p in (False, True))
    rows = [2, 3, 5]
    assert whole.rows.tolist() == rows and whole.model_inputs["input_ids"].shape[0] == 3
    assert packed.model_inputs["input_ids"].shape == (1, int(given["attention_mask"][rows].sum()))
    narrow = {k: v[2:3] if v.dim() else v for k, v in batch().items()}
    assert microbatch.make(narrow, config).model_inputs["input_ids"].numel() == narrow["attention_mask"].sum()


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_without_any_gradient_still_runs_and_has_one_of_zero(tmp_path, packed):
    t = trainer(tmp_path)
    t.model.train()
    for given in (batch(zero=range(6)), batch(empty=range(6))):
        loss, found, _ = gradients(t, given, lambda x: microbatch.make(x, t.loss_config, packed=packed, skip=True))
        assert loss == 0 and found.abs().max() == 0
        micro = microbatch.make(given, t.loss_config, packed=packed, skip=True)
        assert micro.idle and len(micro.rows) == 1 and t._weight("entropy", given, micro) == 0


@pytest.mark.parametrize("options", [dict(beta=0.1), dict(entropy_coef=0.1), dict(top_entropy_quantile=0.5)])
def test_nothing_is_skipped_where_everything_has_a_gradient_or_is_ranked(options):
    assert not microbatch.can_skip(GRPOLossConfig(**options)) and microbatch.can_skip(GRPOLossConfig())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_ends_in_the_same_weights(tmp_path, packed, accumulation):
    """Half of the groups get one reward for all: their completions are left out, in every step of several on a rollout."""

    def half(prompts, completions, **_):
        return [0.0 if p.startswith("1") else r for p, r in zip(prompts, digit_sum(completions), strict=True)]

    ends = []
    for options in (dict(skip_untrained=False, padding_free=False), dict(padding_free=packed)):
        t = trainer(
            tmp_path, rewards=half, max_steps=4, num_iterations=2, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant",
            per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, **options,
        )  # fmt: skip
        t.train()
        ends.append((weights(t.model), [log for log in t.state.log_history if "loss" in log]))
    (plain, plain_logs), (ours, logs) = ends
    assert (ours - plain).norm() <= 1e-4 * (plain - weights(tiny_model())).norm()
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in plain_logs], abs=1e-5)
    shares = [log["trained_token_share"] for log in logs]
    assert min(shares) < 1 and all(log["trained_token_share"] == 1 for log in plain_logs), shares
    assert all(log["tokens_per_second"] > 0 for log in logs)


def test_truncated_completions_train_nothing(tmp_path):
    t = trainer(tmp_path, mask_truncated_completions=True, generation_kwargs={"suppress_tokens": [1, 3, 4, 5, 6]})
    t.train()
    assert torch.equal(weights(t.model), weights(tiny_model())) and t.state.log_history[0]["completions/clipped_ratio"] == 1
    t = trainer(tmp_path, mask_truncated_completions=True)
    rollout = t._new_rollout(0)
    ended = torch.isin(rollout["input_ids"][:, -rollout["mask"].shape[1] :], torch.tensor([1, 3, 4, 5, 6])).any(1)
    assert torch.equal(rollout["mask"].any(1), ended) and ended.any() and not ended.all()


def test_who_cannot_be_packed_is_refused(tmp_path):
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32)
    linear = Qwen3NextForCausalLM(Qwen3NextConfig(
        **small, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2, linear_num_key_heads=1,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0, decoder_sparse_step=1, mlp_only_layers=[0, 1],
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="padding_free"):
        trainer(tmp_path, model=linear, padding_free=True)
    full = Qwen3ForCausalLM(Qwen3Config(**small, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    t = trainer(tmp_path, model=full)
    assert not t._packed, "sdpa makes a mask of tokens x tokens"
    text = full.config.get_text_config()
    text.layer_types = ["full_attention", "conv"]
    assert not runs_packed(None, full, True)
    text.layer_types = ["full_attention", "sliding_attention"]
    full.config._attn_implementation_internal = "flash_attention_2"
    assert microbatch.flash(full) and runs_packed(None, full, True) and not runs_packed(False, full, True)


def test_a_mixture_of_experts_is_balanced(tmp_path):
    def moe(**options):
        torch.manual_seed(0)
        small = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        return MixtralForCausalLM(MixtralConfig(**small, num_local_experts=4, num_experts_per_tok=2, bos_token_id=None, eos_token_id=1,
                                                pad_token_id=0, **options))  # fmt: skip

    given = batch(zero=())
    routers = []
    for coefficient in (0.0, 0.5):
        t = trainer(tmp_path, model=moe(output_router_logits=True, router_aux_loss_coef=coefficient))
        assert not t._skips
        t.model.train()
        loss = t.compute_loss(t.model, given)
        loss.backward()
        routers.append((loss.item(), next(p.grad for n, p in t.model.named_parameters() if "gate" in n and "experts" not in n)))
        assert "aux_loss" in t._metrics["train"].take(lambda x: x)
    # several micro-batches: the mean of their losses and of their balances
    parts = trainer(
        tmp_path, model=moe(output_router_logits=True, router_aux_loss_coef=0.5), per_device_train_batch_size=4, max_steps=1,
        gradient_accumulation_steps=2, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    by_hand = moe(output_router_logits=True, router_aux_loss_coef=0.5)
    before, own = weights(by_hand), parts.model
    fuse_lm_head(by_hand).train()
    for part in next_micro_batches(parts):
        (parts.compute_loss(by_hand, part) / 2).backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= p.grad
    parts.train()
    assert (weights(own) - weights(by_hand)).norm() <= 1e-5 * (weights(by_hand) - before).norm()
    assert routers[1][0] > routers[0][0] + 0.1 and (routers[1][1] - routers[0][1]).abs().max() > 1e-4
    assert trainer(tmp_path, model=moe())._router_coef is None
