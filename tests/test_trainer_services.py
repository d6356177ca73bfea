"""What a run does around the loss: sampling options, rewards of every kind, a moving reference, samples to read, checkpoints to trust."""

import asyncio
import functools
import json
import math
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.cases import usually
from support.tiny_trainer import DATA, config, digit_sum, next_micro_batches, tiny_model, trainer, weights
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, Trainer

from grpo_kernels.trainer import GRPOTrainer, checkpoints, completion_log, dry_run, models, rewards
from grpo_kernels.trainer import resume as resume_module
from grpo_kernels.trainer.demo import make_tokenizer
from grpo_kernels.trainer.metrics import Recorded
from grpo_kernels.trainer.plot import plot_folder
from grpo_kernels.trainer.rewards import ModelReward, load_reward, score
from grpo_kernels.trainer.rollout import sample, sampling_config

SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- sampling ----


def test_sampling_options_reach_generate(tmp_path):
    t = trainer(tmp_path, min_p=0.3, repetition_penalty=1.5, top_k=7, top_p=0.9, temperature=0.7, generation_kwargs={"bad_words_ids": [[5]]})
    found = sampling_config(t.args, t.model, t.processing_class)
    assert (found.min_p, found.repetition_penalty, found.top_k, found.top_p, found.temperature) == (0.3, 1.5, 7, 0.9, 0.7)
    drawn = t._new_rollout(0)
    T = drawn["mask"].shape[1]
    assert not (drawn["input_ids"][:, -T:][drawn["mask"]] == 5).any()
    greedy = sampling_config(trainer(tmp_path, min_p=1.0).args, t.model, t.processing_class)
    ids = [[2, 3, 4], [5, 6]]
    a, b = (sample(tiny_model(), ids, greedy).input_ids for _ in range(2))
    assert torch.equal(a, b), "only the likeliest token is left"


def test_continuous_batching_draws_from_the_same_model(tmp_path):
    # left to itself the engine takes most of the free memory for its cache
    small = {"num_blocks": 16, "page_size": 32, "max_batch_tokens": 64}
    t = trainer(tmp_path, use_transformers_continuous_batching=True, top_k=1, transformers_continuous_batching_config=small)
    config = sampling_config(t.args, t.model, t.processing_class)
    ids = [[2, 3, 4], [5, 6], [7, 8, 9, 10]]
    before = t.model.config._attn_implementation
    ours, plain = sample(t.model, ids, config, continuous=small), sample(t.model, ids, config)
    T = min(ours.mask.shape[1], plain.mask.shape[1])
    assert torch.equal(ours.mask[:, :T], plain.mask[:, :T]) and not ours.mask[:, T:].any() and not plain.mask[:, T:].any()
    assert torch.equal(ours.input_ids[:, -ours.mask.shape[1] :][ours.mask], plain.input_ids[:, -plain.mask.shape[1] :][plain.mask])
    assert t.model.config._attn_implementation == before
    t.train()
    assert t.state.global_step == 2


def test_a_models_own_generation_config_does_not_bend_the_distribution(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for options in ({}, {"peft_config": lora}):
        plain = next_micro_batches(trainer(tmp_path, **options))[0]["input_ids"]
        t = trainer(tmp_path, **options)
        own = t.model.generation_config
        own.suppress_tokens, own.epsilon_cutoff, own.min_new_tokens = list(range(5, 12)), 0.2, 4
        assert torch.equal(next_micro_batches(t)[0]["input_ids"], plain)
        assert t.model.generation_config is own and own.suppress_tokens
        t.args.generation_kwargs = {"suppress_tokens": own.suppress_tokens}
        t._rollout = None
        assert not torch.isin(next_micro_batches(t)[0]["input_ids"][:, -3:], torch.arange(5, 12)).any()


def test_adapted_models_sample_by_the_numerics_of_the_loss(tmp_path):
    peft = pytest.importorskip("peft")
    for lora in (None, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")):
        t = trainer(tmp_path, peft_config=lora, bf16=True, beta=0.1)
        layer, seen = next(m for n, m in t.model.named_modules() if n.endswith("layers.0")), []
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        t.train()
        assert seen and all(seen)


# ---- metrics ----


def test_metrics_are_reduced_by_weight_and_name_and_take_no_room():
    values, weights_ = torch.randn(700, dtype=torch.float64), torch.randint(0, 4, (700,))
    values[5] = math.nan
    recorded = Recorded()
    for value, weight in zip(values, weights_, strict=True):
        recorded.record({"kl": value, "x_min": value, "completions/max_length": value}, weight)
        recorded.record({"never": value}, 0)
    assert max(map(len, recorded._waiting.values())) < 256
    found = recorded.take(lambda x: torch.cat([x, x]))
    counts = (weights_ > 0) & ~values.isnan()
    kept = values[counts]
    mean = (kept * weights_[counts]).sum() / weights_[counts].sum()
    assert found == {"kl": pytest.approx(mean.item(), rel=1e-5), "x_min": pytest.approx(kept.min().item()),
                     "completions/max_length": pytest.approx(kept.max().item())}  # fmt: skip
    assert recorded.take(lambda x: x) == {}


# ---- rewards ----


def test_asynchronous_rewards_wait_together():
    running, most = 0, 0

    async def slow(completions, **_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return [float(len(c)) for c in completions]

    async def other(completions, **_):
        return await slow(completions)

    def plain(completions, **_):
        return [None] * len(completions)

    found = score([slow, plain, other], ["p", "p"], ["a", "abc"], [[1], [2]], {})
    assert found[:, 0].tolist() == found[:, 2].tolist() == [1.0, 3.0] and found[:, 1].isnan().all() and most == 2

    async def inside():  # as in a notebook, whose loop runs already
        return score([slow], ["p"], ["ab"], [[1]], {})

    assert asyncio.run(inside()).tolist() == [[2.0]]


def test_text_is_no_reward():
    with pytest.raises(ValueError, match="list of numbers"):
        score([lambda **_: ["1", "2"]], ["a", "b"], ["c", "d"], [[1], [2]], {})


def test_an_asynchronous_reward_that_raises_is_heard():
    async def broken(**_):
        raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"):
        score([broken], ["p"], ["a"], [[1]], {})


class Stop(Exception):
    pass


def line_of(function, offset=0):
    return f"(test_trainer_services.py, line {function.__code__.co_firstlineno + offset})"


def stops(**_):
    raise Stop


async def stops_later(**_):
    raise Stop("enough")


def reads_json(completions, **_):
    return json.loads("{")


def leaves(**_):
    raise SystemExit(0)


def takes_nothing():
    return []


class Judge:
    def __call__(self, completions):
        return []


@pytest.mark.parametrize(
    "function, kind, said",
    [
        (stops, Stop, "'stops' raised Stop " + line_of(stops, 1)),
        (stops_later, Stop, "'stops_later' raised Stop: enough " + line_of(stops_later, 1)),
        (reads_json, json.JSONDecodeError, line_of(reads_json, 1)),
        (takes_nothing, TypeError, line_of(takes_nothing)),
        (functools.partial(takes_nothing), TypeError, line_of(takes_nothing)),
        (Judge(), TypeError, line_of(Judge.__call__)),
        (len, TypeError, "'len' raised TypeError: len() takes no keyword arguments"),
        (leaves, RuntimeError, "'leaves' raised SystemExit: 0 " + line_of(leaves, 1)),
    ],
)
def test_what_a_reward_raises_keeps_its_type_and_names_the_users_line(tmp_path, function, kind, said):
    with pytest.raises(kind) as raised:
        trainer(tmp_path, rewards=function).train()
    assert raised.type is kind
    notes = " ".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert notes.endswith(said) and " rewards.py" not in notes and "(rewards.py" not in notes, notes


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_reward_model_by_its_path(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1))
    else:
        model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))
    model.save_pretrained(tmp_path / "judge")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "judge")
    prompts, completions = ["1+2=", "45+6="], ["3", "511"]
    t = trainer(tmp_path, rewards=[digit_sum, load_reward(str(tmp_path / "judge"))])
    judge = t.reward_funcs[1]
    assert judge.__name__ == "judge" and not any(p.requires_grad for p in judge.model.parameters())
    alone = [
        model.eval()(torch.tensor([tokenizer(p + c)["input_ids"]])).logits.item() for p, c in zip(prompts, completions, strict=True)
    ]
    assert judge(prompts=prompts, completions=completions) == pytest.approx(alone, abs=1e-5)
    t.train()
    assert "rewards/judge/mean" in t.state.log_history[0]
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="one label"):
        ModelReward(model, tokenizer, "judge")
    tiny_model().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="score"):
        trainer(tmp_path, rewards=str(tmp_path / "policy"))


def test_a_reward_model_sees_conversations_through_its_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}={% endif %}{% endfor %}"
    judge = ModelReward(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1)), tokenizer, "judge")
    chat = judge(prompts=[[{"role": "user", "content": "1+2"}]], completions=[[{"role": "assistant", "content": "3"}]])
    assert chat == pytest.approx(judge(prompts=["1+2="], completions=["3"]), abs=1e-6)


# ---- the reference ----


def test_a_reference_that_follows_the_policy(tmp_path):
    options = dict(beta=0.1, max_steps=4, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, learning_rate=0.1)
    t = trainer(tmp_path / "a", save_strategy="steps", save_steps=3, **options)
    seen = []
    t.callback_handler.callbacks[-1].on_step_end = follow(t, seen, t.callback_handler.callbacks[-1].on_step_end)
    t.train()
    expected = weights(tiny_model())
    for step, policy, reference in seen:
        if step % 2 == 0:
            expected = 0.25 * policy + 0.75 * expected
        torch.testing.assert_close(reference, expected, atol=1e-6, rtol=1e-6)
    resumed = trainer(tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(weights(resumed.ref_model), weights(t.ref_model)) and torch.equal(weights(resumed.model), weights(t.model))
    still = trainer(tmp_path / "b", beta=0.1, save_strategy="steps", save_steps=1)
    still.train()
    with pytest.raises(FileNotFoundError, match="reference"):
        trainer(tmp_path / "b", **options).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="sync_ref_model"):
        trainer(tmp_path, peft_config=peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), **options)


def follow(t, seen, original):
    def on_step_end(args, state, control, **kwargs):
        original(args, state, control, **kwargs)
        seen.append((state.global_step, weights(t.model).clone(), weights(t.ref_model).clone()))

    return on_step_end


# ---- watching ----


def test_completions_are_printed_and_kept(tmp_path, capsys):
    pq = pytest.importorskip("pyarrow.parquet")
    t = trainer(tmp_path, log_completions=True, num_completions_to_print=2, num_iterations=2, max_steps=4, rewards=[digit_sum, none_reward])
    t.train()
    out = capsys.readouterr().out
    assert out.count("prompt ") == 2 and "digit_sum" in out and "advantage" in out
    files = sorted((tmp_path / completion_log.FOLDER).iterdir())
    assert [f.name for f in files] == ["completions_000000.parquet", "completions_000002.parquet"]
    rows = pq.read_table(files[1]).to_pylist()
    assert len(rows) == 8 and all(r["step"] == 2 and r["none_reward"] is None for r in rows)
    assert [r["advantage"] for r in rows] == pytest.approx(t._rollout["advantages"].tolist(), abs=1e-6)
    assert [r["digit_sum"] for r in rows] == pytest.approx(digit_sum([r["completion"] for r in rows]), abs=1e-6)


def none_reward(completions, **_):
    return [None] * len(completions)


def test_what_a_model_writes_cannot_move_the_cursor():
    row = {"step": 3, "prompt": "a\x1b[2Jb", "completion": "x\r\n" + "y" * 500, "r": None, "advantage": 0.5}
    lines = list(completion_log.table([row], ["r"]))
    assert all(line.isprintable() for line in lines) and "\\u001b" in lines[-1] and "..." in lines[-1]
    assert list(completion_log.table([], ["r"])) == []


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = trainer(tmp_path, report_to="tensorboard")
    t.train()
    (event,) = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(event)).Reload().Tags()["scalars"]
    assert {"train/reward", "train/entropy", "train/tokens_per_second", "train/trained_token_share"} <= set(found)


def test_a_run_is_drawn_from_its_state(tmp_path):
    with pytest.raises(ValueError, match="trainer_state"):
        plot_folder(tmp_path)
    t = trainer(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=2, beta=0.1)
    t.train()
    picture = plot_folder(tmp_path / "run")
    assert picture == str(tmp_path / "run" / "training.png") and (tmp_path / "run" / "training.png").stat().st_size > 10_000
    t.save_state()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2, 3]
    assert plot_folder(tmp_path / "run", tmp_path / "other.png") == str(tmp_path / "other.png")
    (tmp_path / "run" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        plot_folder(tmp_path / "run")


def test_evaluation_sets_by_name(tmp_path):
    t = trainer(tmp_path, eval_dataset={"easy": DATA[:2], "hard": DATA[2:3]}, eval_strategy="steps", eval_steps=2)
    t.train()
    found = t.evaluate()
    assert {"eval_easy_reward", "eval_hard_reward", "eval_easy_loss"} <= set(found)
    with pytest.raises(ValueError, match="eval_dataset hard"):
        trainer(tmp_path, eval_dataset={"easy": DATA[:2], "hard": []})


def test_an_evaluation_that_fails_leaves_training_as_it_was(tmp_path):
    asked = []

    def fails_later(completions, **_):
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("the judge is out")
        return digit_sum(completions)

    t = trainer(tmp_path, rewards=fails_later, eval_dataset=DATA[:4], per_device_eval_batch_size=4)
    t.model.train()
    with pytest.raises(RuntimeError, match="the judge is out"):
        t.evaluate()
    assert t.model.training
    found = trainer(tmp_path, eval_dataset=DATA[:4], per_device_eval_batch_size=4).evaluate()
    again = t.evaluate()
    assert again["eval_reward"] == found["eval_reward"], "rounds of the evaluation that failed must not count"


def test_dropout_reaches_neither_the_reference_nor_who_asked_for_none(tmp_path):
    peft = pytest.importorskip("peft")
    lora = lambda p: peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=p, task_type="CAUSAL_LM")  # noqa: E731
    model = tiny_model(attention_dropout=0.5)
    t = trainer(tmp_path, model=model, peft_config=lora(0.0), beta=0.1)
    (batch,) = next_micro_batches(t)
    assert t.model.training
    again = t._of_reference(t._rollout)["ref_logps"]
    assert torch.equal(batch["ref_logps"], again), "dice in the reference"
    t = trainer(tmp_path, peft_config=lora(0.5), disable_dropout=True)
    assert not any(m.p for m in t.model.modules() if isinstance(m, torch.nn.Dropout))


def test_a_dtype_by_its_older_name(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("dtype", "torch_dtype"):
        args = config(tmp_path / "run", model_init_kwargs={name: "bfloat16"})
        assert GRPOTrainer(str(tmp_path / "model"), digit_sum, args, DATA).model.dtype == torch.bfloat16


def test_what_says_where_a_model_is_reaches_config_tokenizer_and_weights(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model" / "part")
    make_tokenizer().save_pretrained(tmp_path / "model" / "part")
    where = {"trust_remote_code": True, "subfolder": "part", "revision": "main", "local_files_only": True, "code_revision": "v1", "token": "t"}
    asked = {}
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        real = getattr(models, name).from_pretrained

        def spy(path, name=name, real=real, **options):
            asked.setdefault(name, options)  # transformers asks for the configuration again
            return real(path, **options)

        monkeypatch.setattr(getattr(models, name), "from_pretrained", spy)
    model = str(tmp_path / "model")
    GRPOTrainer(model, digit_sum, config(tmp_path / "run", model_init_kwargs=where), DATA)
    assert asked.pop("AutoModelForCausalLM") == {"dtype": "float32", **where}
    assert asked == {"AutoConfig": where, "AutoTokenizer": where}
    given = models.AutoConfig.from_pretrained(f"{model}/part", attention_dropout=0.25)
    args = config(tmp_path / "run", model_init_kwargs={"subfolder": "part", "config": given}, trust_remote_code=True)
    asked.clear()
    assert GRPOTrainer(model, digit_sum, args, DATA).model.config.attention_dropout == 0.25
    assert asked["AutoTokenizer"]["trust_remote_code"] is True


def test_a_name_without_an_owner_is_for_the_hub_to_know(tmp_path, monkeypatch):
    def unknown(path, **_):
        raise OSError(f"{path} is not on the hub")

    for name in ("AutoConfig", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(models if name == "AutoConfig" else rewards, name), "from_pretrained", unknown)
    for model, judge in (("gpt2", digit_sum), (tiny_model(), "gpt2")):
        with pytest.raises(OSError, match="gpt2 is not on the hub"):
            GRPOTrainer(model, judge, config(tmp_path), DATA, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="reward model './gpt2': no such folder"):
        GRPOTrainer(tiny_model(), "./gpt2", config(tmp_path), DATA, processing_class=make_tokenizer())


def test_dropout_on_the_heads_adapter_is_refused_before_training(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.1, task_type="CAUSAL_LM")
    with pytest.raises(NotImplementedError, match="lora_dropout"):
        trainer(tmp_path, model=tiny_model().eval(), peft_config=lora)


def test_a_dry_run_counts_as_the_run_will(tmp_path):
    options = dict(max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2, warmup_steps=2)
    for tied in (False, True):
        t = trainer(tmp_path, model=tiny_model(tie_word_embeddings=tied), **options)
        plan = dict(line.split(maxsplit=1) for line in dry_run.describe(t) if not line.startswith("the loss"))
        layers = sum(p.numel() for n, p in t.model.named_parameters() if "embed" not in n and "lm_head" not in n)
        tokens = 2 * 8 * (len("456+1=") + 5)
        assert f"{6 * layers * tokens / 1e12:.3g} TFLOP in the body" in plan["operations"], plan
        plain = trainer(tmp_path, model=tiny_model(tie_word_embeddings=tied), **options)
        assert torch.equal(weights(t.model), weights(plain.model)) and all(p.grad is None for p in t.model.parameters()) and t.model.training
        dry_run.check(t)
        t.train()
        plain.train()
        assert plan["step"].endswith(f"; {t.state.global_step} steps")
        assert torch.equal(weights(t.model), weights(plain.model)), "the rehearsal left a trace in the run"


# ---- checkpoints ----


@pytest.fixture
def saved(tmp_path):
    """A run's folder with checkpoints of steps 1 to 3, the first amid a rollout."""
    trainer(tmp_path, max_steps=3, num_iterations=2, save_strategy="steps", save_steps=1).train()
    return tmp_path


def resume(folder, which):
    t = trainer(folder, max_steps=4, num_iterations=2)
    t.train(resume_from_checkpoint=which)
    return t


SPOILT = {  # how, and what the refusal says of it
    "no seal": (lambda folder: (folder / checkpoints.SEAL).unlink(), "has no complete.json"),
    "cut": (lambda folder: cut(folder / "model.safetensors"), r"'model.safetensors' has \d+ bytes of \d+"),
    "changed": (lambda folder: flip(folder / "optimizer.pt"), "'optimizer.pt' is not what was written"),
    "missing": (lambda folder: (folder / "rng_state.pth").unlink(), "'rng_state.pth' is missing"),
    "seal cut": (lambda folder: cut(folder / checkpoints.SEAL), "complete.json cannot be read"),
    "seal elsewhere": (lambda folder: (folder / checkpoints.SEAL).write_text('{"../../etc/passwd": [1, 2]}'), "names '../../etc/passwd', outside of it"),
    "seal at the root": (lambda folder: (folder / checkpoints.SEAL).write_text('{"/etc/passwd": [1, 2]}'), "names '/etc/passwd', outside of it"),
    "seal nonsense": (lambda folder: (folder / checkpoints.SEAL).write_text("[1]"), "complete.json cannot be read"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", usually(SPOILT, "cut", "changed", "seal elsewhere"))
def test_a_checkpoint_that_is_not_whole_is_refused_and_the_one_before_it_offered(saved, how, capsys):
    spoil, says = SPOILT[how]
    spoil(saved / "checkpoint-3")
    with pytest.raises(checkpoints.Unusable, match=f"checkpoint-3: .*{says}.*; resume from .*checkpoint-2"):
        resume(saved, str(saved / "checkpoint-3"))
    t = resume(saved, "last")
    assert t.state.global_step == 4 and "checkpoint-3" in capsys.readouterr().out
    shutil.rmtree(saved / "checkpoint-3")
    whole = resume(saved, True)
    assert torch.equal(weights(t.model), weights(whole.model))


def test_the_newest_checkpoint_is_one_that_every_node_has(saved, monkeypatch):
    t = trainer(saved, max_steps=4, num_iterations=2)
    other = str(saved / "checkpoint-2")  # what the main process of another node found
    monkeypatch.setattr(resume_module, "gather_object", lambda own: own if own == [None] else [*own, other])
    assert t._newest_checkpoint(needed=True) == other
    (saved / "checkpoint-2" / checkpoints.SEAL).unlink()
    with pytest.raises(checkpoints.Unusable, match="checkpoint-2"):
        t._newest_checkpoint(needed=True)


def test_a_finished_run_is_not_trained_on(saved, capsys):
    before = sorted(p.name for p in saved.iterdir())
    for steps in (dict(max_steps=3), dict(max_steps=-1, num_train_epochs=0.3)):
        t = trainer(saved, model=tiny_model(seed=7), num_iterations=2, **steps)
        assert t.train(resume_from_checkpoint="last").global_step == t.state.global_step == 3
        assert "nothing is left to train" in capsys.readouterr().out
        whole = load_file(saved / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(value, whole[name]) for name, value in t.model.state_dict().items() if name in whole)
    assert sorted(p.name for p in saved.iterdir()) == before


def test_one_process_of_several_is_told_so(tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of 2 processes"):
        GRPOTrainer(tiny_model(), digit_sum, args, DATA, processing_class=make_tokenizer())


def test_last_of_nothing_is_a_new_run_and_of_ruins_an_error(tmp_path, saved):
    assert checkpoints.newest(tmp_path / "nowhere") is None
    assert checkpoints.newest(saved) == str(saved / "checkpoint-3")
    for step in (1, 2, 3):
        (saved / f"checkpoint-{step}" / checkpoints.SEAL).unlink()
    with pytest.raises(checkpoints.Unusable, match="no checkpoint"):
        checkpoints.newest(saved)
    with pytest.raises(checkpoints.Unusable, match="no other"):
        checkpoints.check(saved / "checkpoint-2")
    with pytest.raises(checkpoints.Unusable, match="no such folder"):
        checkpoints.check(saved / "checkpoint-9")


def test_a_rollout_of_other_sizes_is_refused(saved):
    with pytest.raises(ValueError, match="generation_batch_size"):
        trainer(saved, max_steps=4, num_iterations=2, per_device_train_batch_size=4).train(resume_from_checkpoint=str(saved / "checkpoint-1"))
    with pytest.raises(ValueError, match="num_iterations"):
        trainer(saved, max_steps=9, num_iterations=4).train(resume_from_checkpoint=str(saved / "checkpoint-3"))
    with pytest.raises(checkpoints.Unusable, match="no checkpoint"):
        trainer(saved / "elsewhere").train(resume_from_checkpoint=True)


def test_older_checkpoints_go_when_the_new_one_is_sealed(tmp_path, monkeypatch):
    there = []
    seal = checkpoints.seal
    monkeypatch.setattr(checkpoints, "seal", lambda folder: (there.append(sorted(p.name for p in tmp_path.glob("checkpoint-*"))), seal(folder)))
    t = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    t.train()
    assert there == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"] and t.args.save_total_limit == 1


def test_the_best_checkpoint_outlives_later_ones_and_is_what_comes_back(tmp_path):
    best = []

    def worse_and_worse(completions, **_):
        best.append(1)
        return [i % 2 - float(len(best)) for i in range(len(completions))]

    t = trainer(
        tmp_path, rewards=worse_and_worse, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="reward", greater_is_better=True, eval_dataset=DATA[:2],
    )  # fmt: skip
    t.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    for folder in tmp_path.glob("checkpoint-*"):
        checkpoints.check(folder)
    first = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(value, first[name]) for name, value in t.model.state_dict().items() if name in first)


def test_what_is_pushed_to_the_hub_is_sealed(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(checkpoints.what_is_wrong(folder)))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self, **_: None)
    trainer(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=1).train()
    assert pushed == [None, None]


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a checkpoint ran code')",)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rollout_0.pt", "training_args.bin"])
def test_loading_a_checkpoint_executes_nothing(saved, file):
    folder = saved / "checkpoint-1"
    assert (folder / file).is_file()
    (folder / file).write_bytes(pickle.dumps(Bomb()))
    checkpoints.seal(folder)  # even one that says of itself that it is whole
    if file == "training_args.bin":  # which is never read
        assert resume(saved, str(folder)).state.global_step == 4
    else:
        with pytest.raises(Exception, match="[Ww]eights|pickle|magic|Unsupported"):
            resume(saved, str(folder))


def test_seeded_rollouts_do_not_depend_on_the_extras(tmp_path):
    plain = next_micro_batches(trainer(tmp_path))[0]["input_ids"]
    assert torch.equal(plain, next_micro_batches(trainer(tmp_path, log_completions=True))[0]["input_ids"])


# ---- real architectures, as a user saves and loads them ----

SMALL_GROUPED = dict(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, bos_token_id=None,
    eos_token_id=1, pad_token_id=0, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("kind", usually(["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3", "Mistral"], "Qwen3", "Gemma2"))
def test_a_model_from_a_path_trains_and_comes_back(tmp_path, kind):
    import transformers

    torch.manual_seed(0)
    options = {"head_dim": 8} if kind in ("Qwen3", "Gemma2", "Gemma3Text") else {}
    name = "Gemma3" if kind == "Gemma3Text" else kind
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SMALL_GROUPED, **options))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    args = config(tmp_path / "run", per_device_train_batch_size=8)
    t = GRPOTrainer(str(tmp_path / "model"), digit_sum, args, DATA)
    t.train()
    assert all(log["grad_norm"] > 0 for log in t.state.log_history if "grad_norm" in log)
    t.save_model(str(tmp_path / "trained"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(again).__name__ == type(model).__name__ and torch.equal(weights(again), weights(t.model)) and not torch.equal(weights(again), weights(model))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
    file.write_text(json.dumps(settings))
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('a model ran code')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        GRPOTrainer(str(tmp_path / "model"), digit_sum, config(tmp_path / "run"), DATA)


def test_rounded_weights_under_adapters(tmp_path):
    """QLoRA: bitsandbytes' 4 bits on the CPU, an adapter on the head too."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import BitsAndBytesConfig

    model = tiny_model(hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    args = config(tmp_path / "run", model_init_kwargs={"quantization_config": quantized}, beta=0.05)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.0, task_type="CAUSAL_LM")
    t = GRPOTrainer(str(tmp_path / "model"), digit_sum, args, DATA, peft_config=lora)
    assert any("4bit" in type(m).__name__ for m in t.model.modules())
    t.train()
    adapters = [p for n, p in t.model.named_parameters() if "lora_B" in n]
    assert adapters and all(p.abs().max() > 0 for p in adapters)
