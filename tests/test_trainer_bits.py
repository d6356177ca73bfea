"""Before the first update a rollout's old log-probs are those of the training pass, bit by bit: every ratio is 1."""

from unittest import mock

import pytest
import torch
from support.documents import table
from support.tiny_trainer import tiny_model, trainer

from grpo_kernels.backends import native
from grpo_kernels.trainer import trainer as module
from grpo_kernels.trainer.metrics import Recorded

pytestmark = pytest.mark.usefixtures("one_thread")
# torch.mm sums in an order that depends on the number of rows, and rows without an advantage are scored apart from the others
SAME_BITS_WHATEVER_THE_ROWS = native.why_unavailable() is None
STEPS = dict(max_steps=4, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2, max_completion_length=12)
WAYS = {
    "several steps, passes, accumulation": dict(),
    "packed": dict(padding_free=True),
    "packed, autocast": dict(padding_free=True, bf16=True),
    "one step a pass": dict(gradient_accumulation_steps=4, max_steps=2),
    "activation checkpointing": dict(gradient_checkpointing=True),
    "adapters": dict(lora=True),
    "adapters, packed, autocast": dict(lora=True, padding_free=True, bf16=True),
    "supports": dict(top_p=0.8),
    "supports, packed": dict(top_k=4, padding_free=True),
    "estimated KL": dict(beta=0.1),
    "exact KL": dict(beta=0.1, kl_estimator="exact"),
    "exact KL, supports, packed": dict(beta=0.1, kl_estimator="exact", top_k=9, padding_free=True),
    "sequences": dict(importance_sampling_level="sequence", loss_type="grpo"),
    "entropy quantile": dict(top_entropy_quantile=0.5, temperature=0.7),
    "plain PyTorch": dict(backend="torch"),
    "truncated ones train nothing": dict(mask_truncated_completions=True),
}
if SAME_BITS_WHATEVER_THE_ROWS:
    WAYS |= {"nothing skipped": dict(skip_untrained=False), "nothing skipped, packed": dict(skip_untrained=False, padding_free=True)}


def watched(folder, monkeypatch, dtype=torch.float32, lora=False, **options):
    """(old and new log-probs of each micro-batch of a rollout's first step, the trainer) of a run."""
    monkeypatch.delenv("GRPO_KERNELS_BATCH_INVARIANT", raising=False)
    found, loss = [], module.fused_linear_grpo_loss

    def spy(*args, old_logps=None, **keywords):
        assert keywords["batch_invariant"] is (True if SAME_BITS_WHATEVER_THE_ROWS else None)  # of scoring and of training
        output = loss(*args, old_logps=old_logps, **keywords)
        if old_logps is not None and not t.state.global_step % t.args.steps_per_rollout:
            found.append((old_logps, output.logps, keywords["mask"]))
        return output

    monkeypatch.setattr(module, "fused_linear_grpo_loss", spy)
    if lora:
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4).to(dtype)
    t = trainer(folder, model, **STEPS | options)
    t.train()
    return found, t


@pytest.mark.cover("name")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", WAYS)
def test_every_ratio_of_the_first_step_is_one(tmp_path, monkeypatch, name, dtype):
    found, t = watched(tmp_path, monkeypatch, dtype, **WAYS[name])
    assert len(found) == t.args.gradient_accumulation_steps
    for old, new, mask in found:
        assert mask.any() and (new[mask] < 0).any()
        assert torch.equal((new - old).exp(), torch.ones_like(new))
    first, second, *_ = t.state.log_history
    assert first["sampler_mismatch"] == 0.0 and "sampler_mismatch" not in second
    assert {first[name] for name in first if "clip_ratio/" in name} == {0.0}


def test_dropout_shows_in_the_metric(tmp_path, monkeypatch):
    found, t = watched(tmp_path, monkeypatch, lora=False, max_steps=2)
    assert t.state.log_history[0]["sampler_mismatch"] == 0.0
    for module_ in t.model.modules():
        if hasattr(module_, "attention_dropout"):
            module_.attention_dropout = 0.5
    t.train()
    (old, new, _), *_ = found[2:]
    assert t.state.log_history[0]["sampler_mismatch"] >= (new - old).abs().max() > 1e-6


def test_the_metric_is_the_largest_of_all_micro_batches_and_processes():
    recorded = Recorded()
    for value, weight in ((0.25, 4), (3.0, 0), (0.5, 1)):
        recorded.record({"sampler_mismatch": torch.tensor(value)}, weight)
    assert recorded.take(lambda x: torch.cat([x, x / 2])) == {"sampler_mismatch": 0.5}


def test_one_step_a_rollout_has_no_old_log_probs_and_no_mismatch(tmp_path, monkeypatch):
    loss = mock.Mock(wraps=module.fused_linear_grpo_loss)
    monkeypatch.setattr(module, "fused_linear_grpo_loss", loss)
    t = trainer(tmp_path, max_steps=1)
    t.train()
    assert {call.kwargs["batch_invariant"] for call in loss.call_args_list} == {None}
    assert "sampler_mismatch" not in t.state.log_history[0]
    assert "sampler_mismatch" in {row[0] for row in table("metrics.md", "Metrics of the trainer")}
