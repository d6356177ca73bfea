"""GRPOTrainer: its loss against full logits, its bookkeeping, and that a killed run goes on as if it had not been."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support.cases import usually
from support.tiny_trainer import DATA, config, digit_sum, model_inputs, next_micro_batches, tiny_model, trainer, weights
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)  # fmt: skip

from grpo_kernels import GRPOLossConfig, objective
from grpo_kernels.integrations.transformers import fuse_lm_head
from grpo_kernels.trainer import GRPOConfig, GRPOTrainer
from grpo_kernels.trainer.checkpoints import SEAL
from grpo_kernels.trainer.demo import make_tokenizer
from grpo_kernels.trainer.rewards import exact_match, load_reward, reward_metrics, score
from grpo_kernels.trainer.rollout import completion_mask, eos_token_ids, sample, sampling_config, seeded, tokenize

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- options ----


def test_config_holds_every_loss_option_once_by_name_and_default():
    loss = {f.name: f.default for f in dataclasses.fields(GRPOLossConfig)}
    ours = [f.name for f in dataclasses.fields(GRPOConfig)]
    assert len(ours) == len(set(ours))
    assert not set(loss) & {f.name for f in dataclasses.fields(TrainingArguments)}, "a name means two things"
    differing = {n for n, default in loss.items() if {f.name: f.default for f in dataclasses.fields(GRPOConfig)}[n] != default}
    assert differing == {"max_completion_length"}  # sampling needs a number where the loss alone does not
    changed = config("x", beta=0.5, epsilon_high=0.3, temperature=0.7, loss_type="sapo").loss_config()
    assert (changed.beta, changed.epsilon_high, changed.temperature, changed.loss_type) == (0.5, 0.3, 0.7, "sapo")


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(num_generations=3), "num_generations"),
        (dict(num_generations=1), "num_generations"),
        (dict(generation_batch_size=12), "generation_batch_size"),
        (dict(generation_batch_size=16, steps_per_generation=2), "exclude"),
        (dict(gradient_accumulation_steps=2, steps_per_generation=3), "steps_per_generation"),
        (dict(epsilon=-1.0), "epsilon"),
        (dict(loss_type="ppo"), "loss_type"),
        (dict(top_p=0.0), "top_p"),
        (dict(num_iterations=0), "num_iterations"),
        (dict(num_iterations=True), "num_iterations must be an integer >= 1, got True"),
        (dict(per_device_train_batch_size=8.0), "per_device_train_batch_size must be an integer"),
        (dict(min_p=1.5), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(generation_kwargs={"num_beams": 4}), "num_beams"),
        (dict(sync_ref_model=True), "sync_ref_model"),
        (dict(ref_model_mixup_alpha=2.0), "ref_model_mixup_alpha"),
        (dict(scale_rewards="groups"), "scale_rewards"),
        (dict(multi_objective_aggregation="mean"), "multi_objective_aggregation"),
        (dict(num_generations_eval=0), "num_generations_eval"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size"),
        (dict(fp16=True), "fp16 must be False"),
        (dict(use_liger_kernel=True), "use_liger_kernel"),
        (dict(use_transformers_continuous_batching=True, generation_kwargs={"bad_words_ids": [[3]]}), "generation_kwargs"),
    ],
)
def test_bad_options_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        config(tmp_path, **options)


def test_numpys_integers_are_integers(tmp_path):
    args = config(tmp_path, num_generations=np.int64(4), per_device_train_batch_size=np.int32(8))
    assert json.loads(args.to_json_string())["num_generations"] == 4 and args.generation_batch_size == 8


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="args"):
        GRPOTrainer(tiny_model(), digit_sum, TrainingArguments(output_dir=str(tmp_path)), DATA)
    for wrong, error, named in (
        (dict(rewards=[]), TypeError, "reward_funcs"),
        (dict(rewards=3), TypeError, "reward_funcs"),
        (dict(reward_weights=[1.0, 2.0]), ValueError, "reward_weights"),
        (dict(data=[]), ValueError, "train_dataset"),
        (dict(data=[{"question": "1+1="}]), ValueError, "prompt"),
        (dict(data=None), TypeError, "train_dataset"),
        (dict(softcap=30.0), ValueError, "softcap"),
    ):
        with pytest.raises(error, match=named):
            trainer(tmp_path, **wrong)


# ---- the head inside the model ----

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma2 softcap": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "final_logit_softcapping": 0.05}),
    "granite logits_scaling": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
    "cohere2 logit_scale": (Cohere2Config, Cohere2ForCausalLM, {"logit_scale": 0.25}),
    "phi bias": (PhiConfig, PhiForCausalLM, {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_logps_are_those_of_the_models_own_logits(tmp_path, name):
    cls, model_cls, options = ARCHITECTURES[name]
    model = tiny_model(config=cls, model=model_cls, num_key_value_heads=2, **options)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    t = trainer(tmp_path, model, temperature=0.8)
    (batch,) = next_micro_batches(t)
    ours = t._logps(t.model, t._rollout)
    T = batch["mask"].shape[1]
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits[:, -T - 1 : -1].double() / 0.8
    theirs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, -T:, None]).squeeze(-1) * batch["mask"]
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-5)
    assert theirs.abs().max() > 1


def test_an_unknown_treatment_of_logits_is_refused():
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    with pytest.raises(NotImplementedError, match="Odd"):
        fuse_lm_head(tiny_model(model=Odd))


def test_ordinary_calls_and_generate_are_unchanged():
    model, plain = tiny_model(), tiny_model()
    fuse_lm_head(model)
    ids = torch.randint(2, 32, (3, 6))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain.generate(ids, max_new_tokens=4, do_sample=False))
    assert fuse_lm_head(model) is model and torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


# ---- rollouts ----


def test_mask_ends_with_the_first_of_all_eos_ids():
    ids = torch.tensor([[5, 1, 1, 4], [5, 6, 9, 1], [5, 6, 7, 8], [1, 5, 9, 9]])
    mask, terminated = completion_mask(ids, [1, 9])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert terminated.tolist() == [True, True, False, True]
    model, tokenizer = tiny_model(), make_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    assert eos_token_ids(model, tokenizer) == [1, 7, 9]


def test_prompts_are_padded_on_the_left_and_padding_changes_nothing(tmp_path):
    model, tokenizer = tiny_model(), make_tokenizer()
    ids = tokenize(tokenizer, ["1+1=", "123+45="])
    sampling = sampling_config(config(tmp_path, top_k=1), model, tokenizer)
    both = sample(model, ids, sampling)
    assert both.attention_mask[0, :3].tolist() == [0, 0, 0] and both.attention_mask[1, :7].all()
    alone = sample(model, ids[:1], sampling)
    T = min(both.mask.shape[1], alone.mask.shape[1])
    kept = both.mask[0, :T]
    assert torch.equal(both.input_ids[0, 7 : 7 + T][kept], alone.input_ids[0, 4 : 4 + T][kept])


def test_seeded_blocks_depend_on_their_key_alone():
    def draw(*key):
        with seeded(*key):
            return torch.rand(3)

    torch.manual_seed(1)
    first, after = draw(0, "rollout", 1), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(draw(0, "rollout", 1), first) and not torch.equal(draw(0, "rollout", 2), first)


def test_every_epoch_takes_every_prompt_once_in_another_order(tmp_path):
    t = trainer(tmp_path)
    n = len(DATA)
    epochs = [[t._nth_row(e * n + i)["prompt"] for i in range(n)] for e in range(2)]
    assert all(sorted(e) == sorted(row["prompt"] for row in DATA) for e in epochs)
    assert epochs[0] != epochs[1]
    assert t._nth_row(3)["prompt"] == epochs[0][3]  # also after another epoch was asked for


def test_columns_reach_the_reward_functions_and_chat_prompts_go_through_the_template(tmp_path):
    seen = {}

    def spy(prompts, completions, completion_ids, answer, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, rest=columns)
        return [0.0] * len(prompts)

    data = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": i, "level": "easy"} for i in range(4)]
    t = trainer(tmp_path, rewards=spy, data=data)
    t.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}+"
    (batch,) = next_micro_batches(t)
    assert seen["answer"] == [int(p[0]["content"][0]) for p in seen["prompts"]]
    assert seen["rest"] == {"level": ["easy"] * 8}
    assert len(set(map(str, seen["prompts"][:4]))) == 1 and seen["prompts"][3] != seen["prompts"][4]  # groups of four
    assert all(c[0]["role"] == "assistant" for c in seen["completions"])
    assert [len(ids) for ids in seen["ids"]] == batch["mask"].sum(1).tolist()
    text = t.processing_class.decode(batch["input_ids"][0, : -batch["mask"].shape[1]])
    assert text == seen["prompts"][0][0]["content"] + "+"


# ---- rewards ----


def test_none_rewards_are_ignored_and_never_become_nan(tmp_path):
    def sometimes(completions, **_):
        return [None if i % 3 == 0 else float(i) for i in range(len(completions))]

    def never(completions, **_):
        return [None] * len(completions)

    t = trainer(tmp_path, rewards=[sometimes, never], reward_weights=[2.0, 1.0])
    t.train()
    assert torch.isfinite(weights(t.model)).all()
    log = t.state.log_history[0]
    scorable = [i for i in range(8) if i % 3]
    assert log["rewards/sometimes/mean"] == pytest.approx(sum(scorable) / len(scorable))
    assert log["reward"] == pytest.approx(2 * sum(scorable) / len(scorable))
    assert "rewards/never/mean" not in log
    assert all(math.isfinite(v) for v in log.values() if isinstance(v, float))


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("inf"), 0.0], [1.0, float("nan"), 0.0], None, 3.0, ["a", "b", "c"]])
def test_bad_rewards_are_named(answer):
    def wrong(**_):
        return answer

    with pytest.raises(ValueError, match="wrong"):
        score([wrong], ["p"] * 3, ["c"] * 3, [[1]] * 3, {})


def test_a_column_must_not_shadow_an_argument():
    with pytest.raises(ValueError, match="completions"):
        score([digit_sum], ["p"], ["c"], [[1]], {"completions": ["x"]})


def test_reward_metrics():
    rewards = torch.tensor([[1.0], [0.0], [1.0], [1.0], [math.nan], [math.nan]])
    metrics = reward_metrics(rewards, torch.tensor([0, 0, 1, 1, 2, 2]), None, ["r"])
    assert metrics["reward"].item() == 0.75 and metrics["frac_reward_zero_std"].item() == pytest.approx(2 / 3)
    assert metrics["rewards/r/std"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("spec", ["math", "nowhere_at_all:f", "math:nothing", "math:pi", ":f"])
def test_bad_reward_specs_are_named(spec):
    with pytest.raises(ValueError, match=spec.replace(".", r"\.")):
        load_reward(spec)
    assert load_reward("grpo_kernels.trainer.rewards:exact_match") is exact_match


# ---- the loss ----


def full_logits_loss(t, model, batch, **overrides):
    """One micro-batch's loss as the trainer must see it, through the model's own logits and autograd."""
    T = batch["mask"].shape[1]
    logits = model(**model_inputs(batch)).logits[:, -T - 1 : -1].float() / t.loss_config.temperature
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, batch["input_ids"][:, -T:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    tensors = {k: batch.get(k) for k in ("old_logps", "ref_logps", "num_items")}
    return objective(logps, entropy, batch["advantages"], batch["mask"], **{**tensors, **overrides}, config=t.loss_config)[0]


@pytest.mark.parametrize("options", [dict(), dict(loss_type="grpo", beta=0.1, num_iterations=2), dict(entropy_coef=0.1, temperature=0.7)])
def test_a_step_equals_one_through_full_logits(tmp_path, options):
    t = trainer(tmp_path, max_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0, **options)
    (batch,) = next_micro_batches(t)
    assert batch["advantages"].abs().max() > 0.5 and not batch["mask"].all()
    exact = tiny_model()
    assert torch.equal(weights(exact), weights(t.model))
    full_logits_loss(t, exact, batch).backward()
    with torch.no_grad():
        for p in exact.parameters():
            p -= p.grad
    t.train()
    moved = weights(exact) - weights(tiny_model())
    assert (weights(t.model) - weights(exact)).norm() <= 1e-5 * moved.norm() and moved.norm() > 1e-3


@pytest.mark.parametrize("loss_type", usually(["dapo", "grpo", "dr_grpo", "luspo"], "dapo", "luspo"))
def test_gradient_accumulation_changes_nothing(tmp_path, loss_type):
    ends = []
    for size, accumulation in ((8, 1), (2, 4)):
        t = trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, loss_type=loss_type, beta=0.05,
            optim="sgd", lr_scheduler_type="constant", learning_rate=0.3,
        )  # fmt: skip
        t.train()
        ends.append((weights(t.model), [log["loss"] for log in t.state.log_history if "loss" in log]))
    (whole, whole_losses), (parts, part_losses) = ends
    assert (whole - parts).norm() <= 1e-5 * (whole - weights(tiny_model())).norm()
    assert part_losses == pytest.approx(whole_losses, abs=1e-5)


def test_old_logps_at_the_first_iteration_equal_on_policy(tmp_path):
    t = trainer(tmp_path, num_iterations=2)
    (batch,) = next_micro_batches(t)
    t.model.train()
    loss, output = t.compute_loss(t.model, batch, return_outputs=True)
    on_policy = t.compute_loss(t.model, {k: v for k, v in batch.items() if k != "old_logps"})
    torch.testing.assert_close(batch["old_logps"], output.logps, atol=1e-6, rtol=0)
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(x, list(t.model.parameters()))]) for x in (loss, on_policy)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm() and gradients[1].norm() > 1e-2
    assert loss.item() == pytest.approx(on_policy.item(), abs=1e-6) and batch["old_logps"].abs().max() > 1
    again = next_micro_batches(t)
    assert torch.equal(again[0]["input_ids"], batch["input_ids"])  # the same rollout as long as the step is the same
    t.state.global_step = 1
    assert torch.equal(next_micro_batches(t)[0]["input_ids"], batch["input_ids"])
    t.state.global_step = 2
    assert next_micro_batches(t)[0]["input_ids"].shape != batch["input_ids"].shape or not torch.equal(
        next_micro_batches(t)[0]["input_ids"], batch["input_ids"]
    )


def test_a_rollout_can_serve_several_steps(tmp_path):
    t = trainer(tmp_path, per_device_train_batch_size=4, steps_per_generation=2, max_steps=4)
    first = next_micro_batches(t)[0]
    t.state.global_step = 1
    second = next_micro_batches(t)[0]
    assert t._rollout["input_ids"].shape[0] == 8
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]), t._rollout["input_ids"])
    t.state.global_step = 0
    t.train()
    assert t.state.global_step == 4 and t._rollout_index == 1


def test_kl_to_the_reference_starts_at_zero_and_grows(tmp_path):
    t = trainer(tmp_path, beta=0.1, max_steps=3, num_iterations=3)
    t.train()
    kl = [log["kl"] for log in t.state.log_history if "kl" in log]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-5
    assert torch.equal(weights(t.ref_model), weights(tiny_model())) and not any(p.requires_grad for p in t.ref_model.parameters())


def test_peft_adapters_train_and_switched_off_they_are_the_reference(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.0, task_type="CAUSAL_LM")
    t = trainer(tmp_path, peft_config=lora, beta=0.1, max_steps=3, learning_rate=0.1)
    t.train()
    assert t.ref_model is None
    base = {k: v for k, v in t.model.get_base_model().state_dict().items() if "lora" not in k}
    before = tiny_model().state_dict()
    assert all(torch.equal(v, before[k.replace("base_layer.", "")]) for k, v in base.items())
    assert t.model.get_base_model().lm_head.lora_B["default"].weight.abs().max() > 0
    (batch,) = next_micro_batches(t)
    reference = tiny_model()
    with torch.no_grad():
        T = batch["mask"].shape[1]
        log_p = reference(**model_inputs(batch)).logits[:, -T - 1 : -1].log_softmax(-1)
        expected = log_p.gather(-1, batch["input_ids"][:, -T:, None]).squeeze(-1) * batch["mask"]
        log_p = t.model(**model_inputs(batch)).logits[:, -T - 1 : -1].log_softmax(-1)
        adapted = log_p.gather(-1, batch["input_ids"][:, -T:, None]).squeeze(-1) * batch["mask"]
    torch.testing.assert_close(batch["ref_logps"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(t._logps(t.model, t._rollout), adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - expected).abs().max() > 1e-3


# ---- Trainer's own services ----


def test_logs_hold_trls_names(tmp_path):
    t = trainer(tmp_path, beta=0.1)
    t.train()
    wanted = {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "rewards/digit_sum/mean",
        "rewards/digit_sum/std", "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "num_tokens",
    }  # fmt: skip
    assert wanted <= set(t.state.log_history[0])


def test_evaluation_reports_rewards_and_leaves_training_as_it_was(tmp_path):
    runs = []
    for options in (dict(), dict(eval_dataset=DATA[:3], eval_strategy="steps", eval_steps=1, num_generations_eval=2)):
        t = trainer(tmp_path, **options)
        t.train()
        runs.append(t)
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    logs = [log for log in runs[1].state.log_history if "eval_reward" in log]
    assert len(logs) == 2 and {"eval_loss", "eval_entropy", "eval_completions/mean_length"} <= set(logs[0])
    assert runs[1].evaluate(metric_key_prefix="test")["test_reward"] == logs[1]["eval_reward"]
    with pytest.raises(TypeError, match="eval_dataset"):
        runs[0].evaluate()


def test_datasets_and_paths_are_accepted(tmp_path):
    datasets = pytest.importorskip("datasets")
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    from_path = GRPOTrainer(str(tmp_path / "model"), digit_sum, config(tmp_path), datasets.Dataset.from_list(DATA))
    from_path.train()
    reference = trainer(tmp_path)
    reference.train()
    assert torch.equal(weights(from_path.model), weights(reference.model))


RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from transformers import TrainerCallback
from support.tiny_trainer import *
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        time.sleep({pause})
t = trainer({folder!r}, max_steps=9, save_strategy="steps", save_steps=2, num_iterations=3, beta=0.1, callbacks=[Slow()],
            model=tiny_model(attention_dropout=0.1), lr_scheduler_type="linear", optim="adamw_torch")
t.train(resume_from_checkpoint={resume!r})
t.save_model({folder!r})
"""


@pytest.mark.exhaustive(reason="twenty seconds: trains in three processes")
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    def start(folder, pause=0.0, resume=False):
        code = RUN.format(tests=os.path.dirname(__file__), folder=str(tmp_path / folder), pause=pause, resume=resume)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    whole = start("whole")
    killed = start("killed", pause=0.5)
    # step 4 is the second of three on its rollout; the seal is what is written last into a checkpoint
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "checkpoint-4" / SEAL).exists():
        assert time.time() < deadline and killed.poll() is None, killed.stderr.read().decode()
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert (tmp_path / "killed" / "checkpoint-4" / "rollout_0.pt").exists()
    resumed = start("killed", resume=str(tmp_path / "killed" / "checkpoint-4"))
    for process in (whole, resumed):
        assert process.wait() == 0, process.stderr.read().decode()
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert files[0] == files[1]


def test_a_checkpoint_without_its_rollout_is_refused(tmp_path):
    t = trainer(tmp_path, max_steps=1, num_iterations=2, save_strategy="steps", save_steps=1)
    t.train()
    (tmp_path / "checkpoint-1" / "rollout_0.pt").unlink()
    with pytest.raises(ValueError, match="rollout_0.pt. is missing"):
        trainer(tmp_path, num_iterations=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


DDP = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny_trainer import *
import torch.distributed as dist
t = trainer({folder!r}, per_device_train_batch_size=4, optim="sgd", lr_scheduler_type="constant", learning_rate=0.3, loss_type={loss!r},
            model=tiny_model(tie_word_embeddings=False))
batches = next_micro_batches(t)
t._rollout = None
t.train()
model = t.accelerator.unwrap_model(t.model)
torch.save({{"weights": weights(model), "batch": batches[0], "log": t.state.log_history[0],
            "wrapped": type(t.model_wrapped).__name__}}, {folder!r} + f"/rank{{dist.get_rank()}}.pt")
"""


@pytest.mark.exhaustive(reason="ten seconds: test_trainer_ranks has two processes, too")
def test_two_processes_train_as_one(tmp_path):
    code = DDP.format(tests=os.path.dirname(__file__), folder=str(tmp_path), loss="dapo")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 2000), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors.decode()
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2)]
    assert ranks[0]["wrapped"] == "DistributedDataParallel"
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    for name in ("reward", "entropy", "completions/mean_length"):
        assert ranks[0]["log"][name] == ranks[1]["log"][name]
    # one process that trains on both shares of the first rollout takes the same first step
    one = trainer(tmp_path, model=tiny_model(tie_word_embeddings=False))
    exact, items = tiny_model(tie_word_embeddings=False), sum(r["batch"]["mask"].sum() for r in ranks)
    sum(full_logits_loss(one, exact, r["batch"], num_items=items) for r in ranks).backward()
    assert exact.lm_head.weight.grad.norm() > 1e-3
    assert ranks[0]["log"]["grad_norm"] == pytest.approx(torch.cat([p.grad.flatten() for p in exact.parameters()]).norm().item(), rel=1e-4)
