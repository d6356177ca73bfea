"""GRPOTrainer on two ranks: under DDP and FSDP2 a run is that of one process with the whole batch, checkpoints change between
them, and a rank that raises ends the run on both.

The dice are each process's own, so completions are given here, by rollout and row; everything after them is the trainer's.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import state
from accelerate.commands.config.config_args import load_config_from_file
from support.cases import usually, values_that_run
from support.ranks import join, launch, leave
from support.rehearsed_trainer import LENGTH, Rehearsed, letters, use_fsdp
from support.tiny_trainer import DATA, config, tiny_model, weights
from support.tiny_trainer import trainer as plain_trainer
from torch.distributed.tensor import DTensor

from grpo_kernels.trainer import checkpoints, dry_run
from grpo_kernels.trainer import trainer as module
from grpo_kernels.trainer.demo import make_tokenizer

RANKS = 2
SECONDS = 120  # a rank that waits for another one's collective is killed then

SGD = dict(optim="sgd", lr_scheduler_type="constant", learning_rate=0.3)
ADAM = dict(optim="adamw_torch", learning_rate=1e-2, adam_epsilon=1e-3)  # a gradient of 0 but for rounding is no step
# per_device_train_batch_size is that of one process; two have half of it each
RUNS = {
    "off-policy with KL": dict(beta=0.1, num_iterations=2, max_steps=4, max_grad_norm=0.5, per_device_train_batch_size=8, **SGD),
    "off-policy with exact KL": dict(beta=0.1, kl_estimator="exact", num_iterations=2, max_steps=4, per_device_train_batch_size=8, **SGD),
    "groups that straddle ranks": dict(per_device_train_batch_size=4, steps_per_generation=3, max_steps=6, num_generations=3, **SGD),
    "accumulation": dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, logging_steps=2, max_steps=4, **SGD),
    "accumulation, sequences": dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, steps_per_generation=4, loss_type="grpo",
                                    importance_sampling_level="sequence", epsilon=1e-3, **SGD),
    "vespo": dict(loss_type="vespo", per_device_train_batch_size=8, num_iterations=2, **SGD),
    "entropy quantile": dict(top_entropy_quantile=0.4, per_device_train_batch_size=16, max_steps=3, scale_rewards="batch", **SGD),
    "nothing kept on rank 1": dict(masked=(4, 5, 6, 7), num_generations=8, beta=0.1, num_iterations=2, per_device_train_batch_size=8, max_steps=4,
                                   top_entropy_quantile=0.5, **SGD),
    "bnpo": dict(loss_type="bnpo", per_device_train_batch_size=8, num_iterations=2, max_steps=3, **SGD),
    "entropy bonus": dict(entropy_coef=0.5, loss_type="grpo", per_device_train_batch_size=8, max_steps=2, **SGD),
    "skipping on rank 1": dict(masked=(4, 5, 6, 7), num_generations=8, num_iterations=2, per_device_train_batch_size=8, max_steps=3,
                               padding_free=True, **SGD),
    "skipping on rank 1, bnpo": dict(masked=(4, 5, 6, 7), num_generations=8, loss_type="bnpo", per_device_train_batch_size=8, max_steps=2, **SGD),
    "one kept token": dict(masked=(1, 2, 3, 4, 5, 6, 7), num_generations=8, longest=1, per_device_train_batch_size=8, max_steps=2, **SGD),
    "adaptive entropy": dict(use_adaptive_entropy=True, entropy_coef=0.2, entropy_coef_delta=0.1, entropy_target=3.0, masked=(2, 3, 6, 7), num_generations=8,
                             gradient_accumulation_steps=2, top_entropy_quantile=0.5, per_device_train_batch_size=4, max_steps=4, logging_steps=1, **SGD),
    "evaluation, bnpo": dict(loss_type="bnpo", entropy_coef=0.3, per_device_train_batch_size=8, eval_dataset=DATA[:5], eval_strategy="steps",
                             eval_steps=1, num_generations_eval=2, per_device_eval_batch_size=8, max_steps=1, **SGD),
    "evaluation": dict(per_device_train_batch_size=8, eval_dataset=DATA[:5], eval_strategy="steps", eval_steps=1, num_generations_eval=2,
                       per_device_eval_batch_size=8, beta=0.1, **SGD),
    "evaluation, sequences": dict(per_device_train_batch_size=8, eval_dataset=DATA[:1], eval_strategy="steps", eval_steps=1, beta=0.1,
                                  loss_type="grpo", importance_sampling_level="sequence", top_entropy_quantile=0.5, **SGD),
}  # fmt: skip
SHARDED = {
    "sharded, twenty steps": dict(per_device_train_batch_size=8, num_iterations=2, beta=0.1, max_steps=20, **ADAM),
    "sharded, exact KL": dict(per_device_train_batch_size=4, num_iterations=2, gradient_accumulation_steps=2, beta=0.1, kl_estimator="exact",
                              max_steps=6, **ADAM),
    "sharded, checkpointing": dict(per_device_train_batch_size=4, gradient_checkpointing=True, gradient_accumulation_steps=2,
                                   max_grad_norm=0.5, **SGD),
    "sharded, nothing kept on rank 1": dict(masked=(4, 5, 6, 7), num_generations=8, per_device_train_batch_size=8, top_entropy_quantile=0.5, **SGD),
}  # fmt: skip
SAVED = dict(per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, beta=0.1, max_steps=8, save_strategy="steps", save_steps=6,
             **ADAM)  # fmt: skip


def rehearsal(folder, masked=(), longest=None, rewards=letters, **options):
    options = {"max_completion_length": LENGTH, **options}
    options["per_device_train_batch_size"] //= int(os.environ.get("WORLD_SIZE", 1))
    options["per_device_eval_batch_size"] = options.get("per_device_eval_batch_size", 8) // int(os.environ.get("WORLD_SIZE", 1))
    evaluation = options.pop("eval_dataset", None)
    t = Rehearsed(tiny_model(), rewards, config(folder, **options), DATA, eval_dataset=evaluation, processing_class=make_tokenizer())
    t.masked, t.longest = masked, longest
    return t


def outcome(folder, resume=None, **options):
    """(logs, weights, advantages of the last rollout by row, how many parameters are sharded) of a run."""
    t = rehearsal(folder, **options)
    t.train(resume_from_checkpoint=resume)
    advantages = t.accelerator.gather(t._rollout["advantages"])
    advantages = torch.empty_like(advantages).index_copy(0, t._layout().flatten(), advantages)
    return t.state.log_history, weights(t.model), advantages, sum(isinstance(p, DTensor) for p in t.model.parameters())


def assert_same(ours, theirs, tolerance):
    not_of_the_steps = ("runtime", "per_second", "total_flos", "train_loss")  # the last is a mean since the process began
    for log, other in zip(ours[0], theirs[0], strict=True):
        assert log.keys() == other.keys()
        for name in log:
            if not name.endswith(not_of_the_steps):
                assert log[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (log["step"], name)
    torch.testing.assert_close(ours[2], theirs[2], atol=tolerance, rtol=tolerance)
    start = weights(tiny_model())
    assert (theirs[1] - start).norm() > 1e-2
    assert (ours[1] - theirs[1]).norm() <= tolerance * (theirs[1] - start).norm()


def fails_on_rank_one(completions, **_):
    if dist.get_rank() == 1:
        raise KeyError("the answers are not here")
    return [0.0] * len(completions)


def work(names, rank, folder, port):
    join(rank, port, RANKS, SECONDS)

    def keep(name, result):
        torch.save(result, folder / f"{name}-{rank}")

    for name in filter(names.__contains__, RUNS):
        keep(name, outcome(folder / "out", **RUNS[name]))
    keep("saved by two", outcome(folder / "two", **SAVED))
    keep("resumed by two", outcome(folder / "more", resume=str(folder / "one" / "checkpoint-6"), **SAVED))
    with pytest.raises(RuntimeError) as raised:
        outcome(folder / "out", rewards=fails_on_rank_one, **RUNS["accumulation"])
    keep("raised", (str(raised.value), repr(raised.value.__cause__)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as raised:
        patch.setattr(module, "tokenize", module.tokenize if rank == 0 else lambda *_: {}["template"])
        outcome(folder / "out", **RUNS["accumulation"])
    keep("tokenising", str(raised.value))
    if rank == 1:
        rollout = folder / "two" / "checkpoint-6" / "rollout_1.pt"
        shutil.copytree(folder / "two" / "checkpoint-6", folder / "broken" / "checkpoint-6")
        (folder / "broken" / "checkpoint-6" / rollout.name).unlink()
        checkpoints.seal(folder / "broken" / "checkpoint-6")
    dist.barrier()
    with pytest.raises(RuntimeError) as raised:
        outcome(folder / "out", resume=str(folder / "broken" / "checkpoint-6"), **SAVED)
    keep("loading", str(raised.value))
    module.sample = SAMPLE
    plan = list(dry_run.describe(plain_trainer(folder / "out", rewards=letters, eval_dataset=DATA[:3], per_device_train_batch_size=4)))
    assert plan[-1].startswith("rehearsed  a rollout") and plan[-1].endswith("evaluation")
    with pytest.raises(RuntimeError, match="rank 1: reward 'fails_on_rank_one' raised KeyError"):
        list(dry_run.describe(plain_trainer(folder / "out", rewards=fails_on_rank_one, per_device_train_batch_size=4)))

    use_fsdp()
    for name in filter(names.__contains__, SHARDED):
        keep(name, outcome(folder / "out", **SHARDED[name]))
    keep("sharded, saved", outcome(folder / "sharded", **SAVED))
    assert state.AcceleratorState().distributed_type == state.DistributedType.FSDP
    keep("sharded, resumed", outcome(folder / "again", resume=str(folder / "sharded" / "checkpoint-6"), **SAVED))
    with pytest.raises(RuntimeError) as raised:
        outcome(folder / "out", resume=str(folder / "one" / "checkpoint-6"), **SAVED)
    keep("sharded, refused", str(raised.value))
    module.sample = SAMPLE  # each rank stops when it likes
    options = dict(per_device_train_batch_size=4, num_iterations=2, epsilon=1e-4, max_steps=2, bf16=True, beta=0.1, max_completion_length=20)
    # in the evaluation rank 1 has half as many prompts as rank 0, and as many forwards
    t = plain_trainer(folder / "out", rewards=letters, eval_dataset=DATA[:3], **options)
    with pytest.raises(ValueError, match="after or amid train"):
        t.evaluate()
    assert list(dry_run.describe(t))[-1].startswith("rehearsed  nothing: a sharded model")
    t.train()
    keep("sharded, sampling", (t.state.log_history, t.evaluate(), t._rollout["mask"].shape[1]))
    leave()


SAMPLE = module.sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Where both ranks left their results."""
    path = tmp_path_factory.mktemp("ranks")
    torch.save(outcome(path / "one", **SAVED), path / "saved by one")
    names = values_that_run(request, "test_two_ranks_are_one_process", "name")
    launch(functools.partial(work, names), path, RANKS, SECONDS)
    return path


@pytest.fixture(autouse=True)
def real_sampling_afterwards():
    yield
    module.sample = SAMPLE


@pytest.mark.parametrize("name", usually([*RUNS, *SHARDED], "off-policy with KL", "accumulation, sequences", "nothing kept on rank 1", "evaluation",
                                         "sharded, exact KL"))  # fmt: skip
def test_two_ranks_are_one_process(name, folder, tmp_path):
    one = outcome(tmp_path, **{**RUNS, **SHARDED}[name])
    ranks = [torch.load(folder / f"{name}-{rank}", weights_only=False) for rank in range(RANKS)]
    assert torch.equal(ranks[0][1], ranks[1][1]), "the ranks drift apart"
    assert (ranks[0][3] > 0) == (name in SHARDED)
    for ours in ranks:
        assert not any(log.get("sampler_mismatch") for log in ours[0])
        assert_same(ours, one, 2e-5)


@pytest.mark.parametrize("saved, resumed", [("two", "one"), ("one", "two"), ("sharded", "sharded")])
def test_a_checkpoint_amid_a_rollout_goes_on_with_another_number_of_ranks(saved, resumed, folder, tmp_path):
    whole = torch.load(folder / "saved by one", weights_only=False)
    if resumed == "one":
        results = [outcome(tmp_path, resume=str(folder / saved / "checkpoint-6"), **SAVED)]
    else:
        kind = {"two": "resumed by two", "sharded": "sharded, resumed"}[resumed]
        results = [torch.load(folder / f"{kind}-{rank}", weights_only=False) for rank in range(RANKS)]
    for result in results:
        assert_same(result, whole, 2e-5)


def test_a_checkpoint_amid_a_rollout_of_another_size_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"generation_batch_size .* 8 completions, got 16"):
        outcome(tmp_path, resume=str(folder / "two" / "checkpoint-6"), **{**SAVED, "per_device_train_batch_size": 8})


def test_a_checkpoint_of_fsdp_is_resumed_under_fsdp_only(folder, tmp_path):
    with pytest.raises(ValueError, match="must be resumed under FSDP, as it was written, got a run without FSDP"):
        outcome(tmp_path, resume=str(folder / "sharded" / "checkpoint-6"), **SAVED)
    for rank in range(RANKS):
        said = torch.load(folder / f"sharded, refused-{rank}", weights_only=False)
        assert "must be resumed without FSDP, as it was written, got a run under FSDP" in said


def test_a_rank_that_cannot_tokenise_or_load_ends_the_run_on_both(folder):
    for rank in range(RANKS):
        assert torch.load(folder / f"tokenising-{rank}", weights_only=False) == "rank 1 raised KeyError: 'template'"
        assert torch.load(folder / f"loading-{rank}", weights_only=False).startswith("rank 1 raised FileNotFoundError")


def test_a_rank_whose_reward_raises_ends_the_run_on_both(folder):
    said = [torch.load(folder / f"raised-{rank}", weights_only=False) for rank in range(RANKS)]
    for message, _ in said:
        told = r"rank 1: reward 'fails_on_rank_one' raised KeyError: 'the answers are not here' \(test_trainer_ranks.py, line \d+\)"
        assert re.fullmatch(told, message)
    assert [cause for _, cause in said] == ["None", "KeyError('the answers are not here')"]


def test_sharded_ranks_sample_different_lengths_and_their_log_probs_are_not_rounded(folder):
    logs = [torch.load(folder / f"sharded, sampling-{rank}", weights_only=False) for rank in range(RANKS)]
    assert logs[0][0][0]["clip_ratio/region_mean"] == logs[0][0][0]["kl"] == 0.0  # bfloat16 log-probs would leave a range of 1e-4
    assert logs[0][0][1]["clip_ratio/region_mean"] > 0.5
    assert logs[0][2] != logs[1][2]
    assert logs[0][1]["eval_reward"] == logs[1][1]["eval_reward"]


# ---- the command line under torchrun ----

EXAMPLES = Path(__file__).parent.parent / "examples" / "accelerate"


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_accelerate_reads_the_examples(name, kind):
    read = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))  # refuses keys it does not know
    assert read.distributed_type == kind
    assert kind != "FSDP" or read.fsdp_config["fsdp_version"] == 2

REWARD = """
def digits(completions, **_):
    return [sum(ord(c) for c in text) % 7 / 7 for text in completions]
"""
SHORT_DEMO = """
import sys
from grpo_kernels import cli
from grpo_kernels.trainer import demo
long = demo.warm_up
demo.warm_up = lambda *args: long(*args, most_steps=10, cooling=5)
demo.PADDED_VOCABULARY = 64
sys.exit(cli.main(sys.argv[1:]))
"""


def torchrun(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.exhaustive(reason="a quarter of a minute")
def test_the_command_line_under_torchrun(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+13="}\n{"prompt": "5+1="}\n')
    (tmp_path / "house.py").write_text(REWARD)
    done = torchrun(
        tmp_path, "-m", "grpo_kernels.cli", "train", "--model", "model", "--data", "data.jsonl", "--eval_data", "data.jsonl",
        "--reward", "house:digits", "--output_dir", "out", "--max_steps", "2", "--per_device_train_batch_size", "3",
        "--num_generations", "2", "--max_completion_length", "4", "--report_to", "none", "--disable_tqdm", "true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model: out") == 1
    assert done.stdout.count("eval_rewards/digits/mean") == 2  # transformers' log, and ours
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.exhaustive(reason="a quarter of a minute")
def test_the_demo_under_torchrun_speaks_once(tmp_path):
    (tmp_path / "short.py").write_text(SHORT_DEMO)
    done = torchrun(tmp_path, "short.py", "train", "--max_steps", "2", "--per_device_train_batch_size", "16", "--output_dir", "out")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("accuracy ") and lines[0].startswith("A Llama of")
    assert [sum(line.startswith(word) for line in lines) for word in ("1. ", "2. ", "3. ", "4. ", "time: ")] == [1] * 5
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "checkpoint-2").is_dir()
