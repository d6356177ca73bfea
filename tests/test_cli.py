"""The command line: names, precedence, and messages that say what was wrong."""

import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from grpo_kernels import __version__, backends, cli
from grpo_kernels.losses.config import LOSS_FIELDS
from grpo_kernels.trainer import GRPOConfig, dry_run, models
from grpo_kernels.trainer.arguments import RunArguments, _Parser, parse, read_data, read_jsonl
from grpo_kernels.trainer.demo import DEFAULTS, make_tokenizer

REWARDS = """
def short(completions, level, **columns):
    return [-float(len(c)) if l == "easy" else None for c, l in zip(completions, level)]
constant = 3
"""
QUICK = ("--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "4", "--num_generations", "2", "--max_completion_length", "3")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model, data and a reward module."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i}+1=", "level": "easy"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "house_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("house_rewards", None)
    return tmp_path


def run(capsys, *argv):
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_version_help_and_unknown_commands(capsys):
    assert run(capsys, "--version") == (0, f"grpo-kernels {__version__}\n", "")
    assert "train" in run(capsys)[1] and "doctor" in run(capsys, "--help")[1]
    code, _, err = run(capsys, "trian")
    assert code == 2 and "'trian'" in err and "did you mean train?" in err


def test_as_a_module_without_importing_transformers():
    code = "import sys, grpo_kernels.cli as c; c.main(['--version']); print('transformers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split("\n")[:2] == [f"grpo-kernels {__version__}", "False"]
    answer = subprocess.run([sys.executable, "-m", "grpo_kernels.cli", "nonsense"], capture_output=True, text=True)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr


def test_train_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(text.partition("options:")[0].splitlines()) < 10, "150 options are no usage"
    for name in ("reward", "data", "epsilon_high", "vespo_lambda_neg", "num_generations", "max_steps", "resume_from_checkpoint"):
        assert f"--{name}" in text


def test_demo_defaults_yaml_and_flags_in_this_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 7\nlearning_rate: 3e-4\nbeta: 0.5\nscale_rewards: false\n")
    run, args = parse(["--config", str(file), "--seed", "9"], DEFAULTS)
    assert run.is_demo
    assert (args.seed, args.learning_rate, args.beta, args.scale_rewards) == (9, 3e-4, 0.5, "none")
    assert args.num_iterations == DEFAULTS["num_iterations"] != 1
    run, args = parse(["--model", "o/m", "--data", "d", "--reward", "a:b", "c:d", "--config", str(file)], DEFAULTS)
    assert not run.is_demo and run.reward == ["a:b", "c:d"] and args.num_iterations == 1 and args.seed == 7


def test_a_reward_whose_module_registers_the_loss_needs_a_model_and_data():
    with pytest.raises(ValueError, match="--reward, --eval_data and --use_peft need --model and --data"):
        parse(["--reward", "my_rewards:score", "--loss_type", "mine"], DEFAULTS)


def test_a_run_from_one_yaml_file(folder, capsys):
    (folder / "run.yaml").write_text(
        "model: model\ndata: data.jsonl\neval_data: data.jsonl\nreward: house_rewards:short\noutput_dir: out\nreport_to: none\n"
        "loss_type: grpo\nepsilon_high: 0.28\n"
    )
    code, out, err = run(capsys, "train", "--config", "run.yaml", *QUICK)
    assert code == 0, err
    assert "eval_rewards/short/mean" in out and out.strip().endswith("model: out")
    assert (folder / "out" / "model.safetensors").exists() and (folder / "out" / "checkpoint-2").exists()
    code, out, _ = run(capsys, "train", "--config", "run.yaml", *QUICK, "--resume_from_checkpoint", "out/checkpoint-2")
    assert code == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epsilonhigh", "0.3"], ["--epsilonhigh", "--epsilon_high"]),
        (["--config", "bad.yaml"], ["bad.yaml", "'epsilonn'", "epsilon"]),
        (["--config", "list.yaml"], ["list.yaml", "mapping"]),
        (["--config", "broken.yaml"], ["broken.yaml", "not YAML"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--max_steps", "many"], ["max_steps", "many"]),
        (["--config", "typed.yaml"], ["max_steps", "many"]),
        (["--epsilon", "-1"], ["epsilon", "-1"]),
        (["--model", "model", "--reward", "house_rewards:short"], ["--data"]),
        (["--data", "data.jsonl", "--reward", "house_rewards:short"], ["--model"]),
        (["--model", "model", "--data", "data.jsonl"], ["--reward"]),
        (["--reward", "house_rewards:short"], ["--reward", "demo"]),
        (["--model", "model", "--data", "data.jsonl", "--reward", "house_rewards"], ["house_rewards", "module:function"]),
        (["--model", "model", "--data", "data.jsonl", "--reward", "house_rewards:long"], ["house_rewards", "'long'"]),
        (["--model", "model", "--data", "data.jsonl", "--reward", "house_rewards:constant"], ["'constant'", "called"]),
        (["--model", "model", "--data", "nowhere.jsonl", "--reward", "house_rewards:short"], ["nowhere.jsonl"]),
        (["--model", "model", "--data", "cut.jsonl", "--reward", "house_rewards:short"], ["cut.jsonl, line 3", "not JSON"]),
    ],
)
def test_what_is_wrong_is_named(folder, capsys, argv, words):
    (folder / "bad.yaml").write_text("epsilonn: 0.2\n")
    (folder / "list.yaml").write_text("- epsilon\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "typed.yaml").write_text("max_steps: many\n")
    (folder / "cut.jsonl").write_text('{"prompt": "1+1="}\n\n{"prompt": "2+\n')
    code, out, err = run(capsys, "train", *argv)
    assert code == 2 and not out and len(err) < 500
    for word in words:
        assert word in err


def test_data_from_parquet_and_from_disk(folder, capsys):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"{i}+1=", "level": "easy"} for i in range(4)])
    rows.to_parquet(folder / "data.parquet")
    rows.save_to_disk(folder / "disk")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "splits")
    datasets.DatasetDict({"test": rows}).save_to_disk(folder / "unnamed")
    assert [len(read_data(str(folder / name))) for name in ("data.parquet", "disk", "splits", "data.jsonl")] == [4, 4, 4, 4]
    assert read_data(str(folder / "data.parquet"))[3]["prompt"] == "3+1="
    rows.rename_column("prompt", "question").to_parquet(folder / "bad.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 nonsense")
    for name, word in (("bad.parquet", "prompt"), ("broken.parquet", "broken.parquet"), ("unnamed", "train"), ("model", "model")):
        capsys.readouterr()
        code, _, err = run(capsys, "train", "--model", "model", "--data", name, "--reward", "house_rewards:short", *QUICK)
        assert code == 2 and word in err.splitlines()[-1] and len(err.splitlines()[-1]) < 500, err
    code, _, err = run(capsys, "train", "--model", "model", "--data", "data.parquet", "--reward", "house_rewards:short", "--output_dir", "out",
                       "--report_to", "none", "--logging_steps", "1", *QUICK)  # fmt: skip
    assert code == 0, err
    assert json.loads((folder / "out" / "trainer_state.json").read_text())["global_step"] == 2
    code, out, _ = run(capsys, "plot", "out")
    assert code == 0 and out.strip() == "out/training.png" and (folder / "out" / "training.png").exists()
    assert run(capsys, "plot")[0] == run(capsys, "plot", "nowhere")[0] == 2 and run(capsys, "plot", "--help")[0] == 0


HOSTILE = """
import functools
def no_arguments(): return []
def no_columns(prompts, completions, completion_ids): return [0.0] * len(completions)
def by_position(completions, /, **_): return [0.0] * len(completions)
def wants(completions, target, level, bonus=1, **_): return [0.0] * len(completions)
def raises_on_one(completions, **_): return [{}[c] if i == 1 else 0.0 for i, c in enumerate(completions)]
async def raises_later(completions, **_): raise OSError("no connection")
def leaves(completions, **_): raise SystemExit(0)
def too_short(completions, **_): return [0.0]
def text(completions, **_): return "good"
def nan(completions, **_): return [float("nan")] * len(completions)
class Unmade: pass
def supplying(function):
    @functools.wraps(function)
    def wrapper(**given):
        return function(target=given["level"], **given)
    return wrapper
supplied = supplying(wants)
"""
BROKEN = """
from grpo_kernels import register_policy_term
register_policy_term("a_sum", lambda logps, old_logps, advantages, config: (logps * advantages).sum(), overwrite=True)
def longest(completions, **_): return [float(len(c) + i) for i, c in enumerate(completions)]
"""
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)),
    "gpt": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=6, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1)),
    "narrow": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)),
}  # fmt: skip
# what a run refuses before its first step: flags, words of the message
AT_ONCE = {
    "batch of 0": ("--per_device_train_batch_size 0", "per_device_train_batch_size >= 1 0"),
    "batch below 0": ("--per_device_train_batch_size -4", "per_device_train_batch_size >= 1 -4"),
    "evaluation batch of 0": ("--per_device_eval_batch_size 0", "per_device_eval_batch_size >= 1 0"),
    "accumulation of 0": ("--gradient_accumulation_steps 0", "gradient_accumulation_steps >= 1 0"),
    "a group that does not divide": ("--num_generations 3", "num_generations divide 3"),
    "fp16": ("--fp16", "fp16 bf16"),
    "no deepspeed": ("--deepspeed zero.json", "deepspeed install 'zero.json'"),
    "no wandb": ("--report_to wandb", "wandb install"),
    "unknown logger": ("--report_to wandbb", "report_to wandbb tensorboard"),
    "hub without a token": ("--push_to_hub --dry-run", "push_to_hub token"),
    "output is a file": ("--output_dir data.jsonl", "output_dir 'data.jsonl' exists"),
    "output below a file": ("--output_dir data.jsonl/x", "output_dir 'data.jsonl/x' folder"),
    "output where nothing can be written": ("--output_dir /proc", "output_dir '/proc' written"),
    "no output": ("--output_dir=", "output_dir ''"),
    "no such folder": ("--model ./nope", "model './nope' no such folder"),
    "no such name": ("--model nope", "model 'nope' no such folder"),
    "no such place": ("--model model/no/pe", "model 'model/no/pe' no such folder"),
    "a model that is a file": ("--model data.jsonl", "model 'data.jsonl' no such folder"),
    "a folder without a model": ("--model empty", "empty config.json"),
    "a model without a tokenizer": ("--model bare", "'bare' tokenizer"),
    "encoder-decoder": ("--model t5", "decoder encoder-decoder (t5)"),
    "encoder": ("--model bert", "Bert logits"),
    "a model option": ("--model_init_kwargs {\"nope\":1}", "nope"),
    "a dtype that is none": ("--model_init_kwargs {\"dtype\":\"float8\"}", "float8"),
    "attention that is not installed": ("--model_init_kwargs {\"attn_implementation\":\"flash_attention_2\"}", "FlashAttention2 installed"),
    "a choice far from all": ("--optim nope", "--optim 'nope' train --help lists"),
    "a choice near to one": ("--optim adamw_torch_fuse", "--optim 'adamw_torch_fuse' did you mean adamw_torch_fused"),
    "a choice of few": ("--save_strategy nope", "--save_strategy 'nope' wanted no, steps, epoch, best"),
    "a part of a name": ("--batch_size 4", "'--batch_size' did you mean generation_batch_size or --per_device_train_batch_size"),
    "a file for a module": ("--reward ./house_rewards.py:short", "write house_rewards:short, without .py"),
    "a module that is not there": ("--reward nowhere:short", "No module named 'nowhere', looked for from the working directory"),
    "a module that lacks another": ("--reward needy:f", "cannot import 'needy' No module named 'absent_package')"),
    "no data": ("--data nowhere.jsonl", "nowhere.jsonl: No such file or directory"),
    "no JSON": ("--generation_kwargs {nope", "generation_kwargs JSON {nope"),
    "JSON of no object": ("--chat_template_kwargs [1]", "chat_template_kwargs JSON object [1]"),
    "no such adapter": ("--use_peft --lora_target_modules nope", "nope not found"),
    "rank 0": ("--use_peft --lora_r 0", "positive 0"),
    "backend": ("--backend nope", "backend auto, torch, cpu, triton, cuda 'nope'"),
    "backend without a device": ("--backend cuda", "backend 'cuda' cannot be used"),
    "a data column": ("--data question.jsonl", "question.jsonl, line 1 'prompt'"),
    "evaluation without data": ("--eval_strategy steps --eval_steps 1", "eval_strategy eval_dataset"),
    "a reward that cannot be parsed": ("--reward unparsed:f", "unparsed:f SyntaxError"),
    "a reward that raises": ("--reward raising:f", "raising:f ZeroDivisionError (raising.py, line 2)"),
    "a reward that leaves": ("--reward leaving:f", "leaving:f SystemExit"),
    "a reward model that is none": ("--reward model", "'model' score"),
    "weights of other rewards": ("--reward_weights 1 2", "reward_weights 1 [1.0, 2.0]"),
    "no checkpoint": ("--resume_from_checkpoint True", "resume_from_checkpoint no checkpoint"),
    "no such checkpoint": ("--resume_from_checkpoint out/nope", "out/nope no such folder"),
    "no arguments": ("--reward hostile:no_arguments", "'no_arguments' prompts, completions, completion_ids ['level']"),
    "no columns": ("--reward hostile:no_columns", "'no_columns' ['level'] 'level'"),
    "by position": ("--reward hostile:by_position", "'by_position' by name positional"),
    "a class": ("--reward hostile:Unmade", "'Unmade' by name"),
    "missing columns": ("--reward hostile:wants", "'wants' ['target'] ['level']"),
    "missing columns of the evaluation": ("--reward house_rewards:short --eval_data plain.jsonl", "'short' ['level'] []"),
    "no chat template": ("--data chat.jsonl", "prompts messages 'model' no chat template"),
    "no chat template for the evaluation": ("--eval_data chat.jsonl", "prompts messages 'model' no chat template"),
    "an optimiser that is not installed": ("--optim galore_adamw", "galore_torch"),
    "a learning rate": ("--learning_rate -1", "learning rate: -1"),
    "a schedule that lacks its option": ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
    "an optimiser of another package": ("--optim lomo", "lomo"),
    "an option of the optimiser": ("--adam_beta1 2", "beta 2.0"),
    "an option of the schedule": ("--lr_scheduler_kwargs {\"nope\":1}", "nope"),
    "columns that are not passed": ("--remove_unused_columns True", "'short' ['level'] []"),
    "a first evaluation without data": ("--eval_on_start True", "eval_on_start --eval_data"),
}  # fmt: skip
# what a run would end with in its first minute
REHEARSED = {
    "raises on one": ("--reward hostile:raises_on_one", "'raises_on_one' KeyError (hostile.py, line 7)"),
    "raises later": ("--reward hostile:raises_later", "'raises_later' OSError: no connection"),
    "leaves": ("--reward hostile:leaves", "'leaves' SystemExit"),
    "too short": ("--reward hostile:too_short", "'too_short' each of 4 completions 1: [0.0]"),
    "text": ("--reward hostile:text", "'text' list of numbers 'good'"),
    "nan": ("--reward hostile:nan", "'nan' finite"),
    "a loss that is no loss per token": ("--reward broken:longest --loss_type a_sum", "'a_sum' one loss a token []"),
    "a column by the name of an argument": ("--data reserved.jsonl", "'completions' collides"),
    "another model's tokenizer": ("--model narrow", "tokenizer vocabulary of 8"),
    "a prompt of too many tokens": ("--model gpt --data long.jsonl", "IndexError"),
    "an option of generate": ("--generation_kwargs {\"bad_words_ids\":3}", "bad_words_ids 3"),
    "an option of continuous batching": (
        "--use_transformers_continuous_batching --transformers_continuous_batching_config {\"nope\":1}", "nope"),
    "a metric that is none": (
        "--eval_data data.jsonl --eval_strategy steps --eval_steps 1 --metric_for_best_model nope", "metric_for_best_model eval_entropy 'nope'"),
    "a metric without a value": (
        "--eval_data data.jsonl --eval_strategy steps --eval_steps 1 --num_generations_eval 1 --per_device_eval_batch_size 1 "
        "--metric_for_best_model reward_std", "metric_for_best_model 'reward_std'"),
}  # fmt: skip


@pytest.fixture
def hostile(folder):
    """Beside a good run's files everything that AT_ONCE and REHEARSED name."""
    (folder / "hostile.py").write_text(HOSTILE)
    (folder / "broken.py").write_text(BROKEN)
    (folder / "needy.py").write_text("import absent_package\n")
    (folder / "unparsed.py").write_text("def f(:\n")
    (folder / "raising.py").write_text("\n1 / 0\n")
    (folder / "leaving.py").write_text("raise SystemExit(0)\n")
    for name in ("hostile", "broken", "unparsed", "raising", "leaving", "needy"):
        sys.modules.pop(name, None)
    chat = [{"role": "user", "content": "1+1="}]
    rows = {"question": {"question": "1+1="}, "plain": {"prompt": "1+1="}, "chat": {"prompt": chat, "level": "easy"},
            "reserved": {"prompt": "1+1=", "level": "easy", "completions": "2"}, "long": {"prompt": "1" * 9, "level": "easy"}}  # fmt: skip
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (folder / "later.jsonl").write_text('{"prompt": "1+1="}\n' * 2 + '{"prompt": "2+1=", "level": "easy"}\n')
    (folder / "empty").mkdir()
    shutil.copytree(folder / "model", folder / "bare")
    for file in (folder / "bare").glob("token*"):
        file.unlink()
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def files(folder):
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", connect)


GOOD = ("train", "--model", "model", "--data", "data.jsonl", "--reward", "house_rewards:short", "--output_dir", "out/run", "--report_to", "none", *QUICK)


def refused(capsys, words, *argv):
    """Exit code 2, one line on stderr, nothing on stdout."""
    capsys.readouterr()
    code, out, err = run(capsys, *argv)
    told = err.splitlines()[-1]
    assert code == 2 and not out and "Traceback" not in err and len(told) < 600, (code, out, err)
    assert all(word in told for word in words.split()), told


@pytest.mark.usefixtures("no_network", "one_thread")
@pytest.mark.parametrize("name", AT_ONCE)
def test_what_keeps_a_run_from_its_first_step_is_one_line_and_leaves_nothing(hostile, capsys, name):
    flags, words = AT_ONCE[name]
    before = files(hostile)
    for mode in ((), ("--dry-run",)):
        refused(capsys, words, *GOOD, *flags.split(), *mode)
        assert files(hostile) == before


def test_a_name_of_the_hub_beside_a_folder_of_its_owners_name_is_asked_for(folder, capsys, monkeypatch):
    (folder / "Qwen").mkdir()
    asked = []

    def unreachable(path, **_):
        asked.append(path)
        raise OSError("we could not connect")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", unreachable)
    refused(capsys, "model 'Qwen/Qwen2.5-0.5B' folder 'Qwen' has no 'Qwen2.5-0.5B' could not connect", *GOOD, "--model", "Qwen/Qwen2.5-0.5B")
    assert asked == ["Qwen/Qwen2.5-0.5B"]


@pytest.mark.usefixtures("no_network", "one_thread")
@pytest.mark.parametrize("name", REHEARSED)
def test_a_dry_run_finds_what_would_end_the_run_in_its_first_minute(hostile, capsys, name):
    flags, words = REHEARSED[name]
    before = files(hostile)
    refused(capsys, words, *GOOD, *flags.split(), "--dry-run")
    assert files(hostile) == before
    with pytest.raises((Exception, SystemExit)):  # whatever it is: the dry run was right
        cli.main([*GOOD, *flags.split()])


def test_what_is_wrong_is_said_once_and_nothing_unlike_it_is_suggested(hostile, capsys):
    batch = [f"--{name}_batch_size" for name in ("per_device_train", "per_device_eval", "generation")]
    for flags, said in {
        "--clip_eps 0.1": "unknown option '--clip_eps'",
        "--batch_size 4": f"unknown option '--batch_size'; did you mean {' or '.join(batch)}?",
        "--data nowhere.jsonl": "nowhere.jsonl: No such file or directory",
        "--reward needy:f": "reward 'needy:f': cannot import 'needy' (ModuleNotFoundError: No module named 'absent_package')",
    }.items():
        assert run(capsys, *GOOD, *flags.split())[2] == f"grpo-kernels: {said}\n"


def test_an_error_without_a_message_is_told_by_its_type(folder, capsys, monkeypatch):
    def broken(*_):
        raise ValueError

    monkeypatch.setattr(dry_run, "check", broken)
    code, _, err = run(capsys, *GOOD)
    assert code == 2 and re.fullmatch(r"grpo-kernels: ValueError \(test_cli.py, line \d+\)\n", err), err


def test_help_says_what_the_options_of_the_loss_and_the_numbers_of_a_plan_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("upper clip range, 1 + epsilon_high; None means epsilon. For cispo it is the cap itself", "gate temperatures of sapo. > 0. (default: 1.05)"):
        assert said in text
    parser = _Parser((RunArguments, GRPOConfig), prog="train")
    assert all(action.help for action in parser._actions if action.dest in LOSS_FIELDS)
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("hidden size", "product [m, k] x [k, n]", "`count` times"):
        assert said in text


# what is odd and runs: flags
ALLOWED = {
    "a wrapper that supplies an argument": "--reward hostile:supplied",
    "a column that the first row of the evaluation lacks": "--eval_data later.jsonl --per_device_eval_batch_size 2",
    "a metric of completions that ended": "--eval_data data.jsonl --eval_strategy steps --eval_steps 1 --save_steps 1 --max_completion_length 20 "
                                          "--metric_for_best_model completions/mean_terminated_length",
    "an output folder by a detour": "--output_dir new1/../new2",
}  # fmt: skip


@pytest.mark.usefixtures("no_network", "one_thread")
@pytest.mark.parametrize("name", ALLOWED)
def test_a_dry_run_lets_through_what_runs_and_leaves_nothing(hostile, capsys, name):
    before = files(hostile)
    code, out, err = run(capsys, *GOOD, *ALLOWED[name].split(), "--dry-run")
    assert code == 0 and "rehearsed" in out and files(hostile) == before, err
    assert run(capsys, *GOOD, *ALLOWED[name].split())[0] == 0
    assert not (hostile / "new1").exists()


def test_an_error_of_the_dry_run_is_all_that_is_printed(hostile, capsys):
    capsys.readouterr()
    found = run(capsys, *GOOD, "--reward", "hostile:raises_on_one", "--dry-run")
    told = found[2].split("KeyError: ")[1]
    assert found == (2, "", f"grpo-kernels: reward 'raises_on_one' raised KeyError: {told}") and told.count("\n") == 1


def test_a_dry_run_prints_the_plan_and_trains_nothing(folder, capsys):
    before = files(folder)
    code, out, err = run(capsys, *GOOD, "--dry-run", "--eval_data", "data.jsonl")
    assert code == 0, err
    for word in ("LlamaForCausalLM", "vocabulary 32", "4 prompts", "['level']", "short", "2 prompts x 2 completions", "MiB", "FLOP", "2 steps",
                 "rehearsed", "evaluation"):  # fmt: skip
        assert word in out, out
    assert files(folder) == before and "note" not in out
    code, out, _ = run(capsys, *GOOD, "--dry-run", "--max_completion_length", "4000")
    assert code == 0 and "up to 4004 tokens" in out and "2048 positions" in out, out
    (folder / "out" / "run").mkdir(parents=True)
    code, out, _ = run(capsys, *GOOD, "--dry-run", "--use_peft", "--lora_target_modules", "q_proj", "lm_head")
    assert code == 0 and "an adapter on it" in out and "frozen" in out and (folder / "out" / "run").is_dir()


@pytest.mark.usefixtures("one_thread")
def test_a_dry_run_of_the_demo_is_of_its_own_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "train", "--dry-run")
    assert code == 0 and "vocabulary 4096" in out and "240 steps" in out and not files(tmp_path), err
    code, _, err = run(capsys, "train", "--dry-run", "--optim", "lomo")
    assert code == 2 and "lomo" in err and not files(tmp_path)


def test_a_dry_run_does_not_ask_the_hub(folder, capsys, monkeypatch):
    monkeypatch.setattr(dry_run.huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: pytest.fail("made a repository"))
    assert run(capsys, *GOOD, "--dry-run", "--push_to_hub")[0] == 0


@pytest.mark.usefixtures("one_thread")
def test_a_dry_run_tries_the_checkpoint(folder, capsys):
    two = [*GOOD, "--num_iterations", "2"]
    assert run(capsys, *two, "--save_steps", "1", "--max_steps", "3")[0] == 0
    more = [*two, "--max_steps", "6", "--dry-run", "--resume_from_checkpoint"]
    before = files(folder)
    code, out, err = run(capsys, *more, "out/run/checkpoint-1")
    assert code == 0 and "resumes    from out/run/checkpoint-1" in out and "rehearsed  a rollout" in out, err
    for name, flags, words in (
        ("the folder of a run", ["out/run"], ["out/run: it is the folder of a run", "newest", "out/run/checkpoint-3"]),
        ("another rollout", ["out/run/checkpoint-1", "--per_device_train_batch_size", "8"], ["generation_batch_size", "got 8"]),
        ("no reference", ["out/run/checkpoint-2", "--beta", "0.1", "--sync_ref_model"], ["reference"]),
        ("another model", ["out/run/checkpoint-2", "--use_peft"], ["parameter"]),
    ):
        code, out, err = run(capsys, *more, *flags)
        told = err.splitlines()[-1]
        assert code == 2 and not out and all(word in told for word in words), (name, err)
    (folder / "out" / "run" / "checkpoint-3" / "complete.json").unlink()
    code, _, err = run(capsys, *more, "out/run")
    assert code == 2 and err.strip().endswith("out/run/checkpoint-2"), err
    code, out, _ = run(capsys, *two, "--dry-run", "--max_steps", "2", "--resume_from_checkpoint", "out/run/checkpoint-2")
    assert code == 0 and "has taken all 2 steps" in out
    assert set(before) - set(files(folder)) == {str(folder / "out" / "run" / "checkpoint-3" / "complete.json")}


@pytest.mark.usefixtures("one_thread")
def test_the_backend_is_that_of_the_flag(folder, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "resolve", lambda name, *_, real=backends.resolve: asked.append(name) or real(name, *_))
    assert run(capsys, *GOOD, "--num_iterations", "2", "--beta", "0.1", "--backend", "torch")[0] == 0
    assert "torch" in asked and "auto" not in asked, asked
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "nope")
    code, _, err = run(capsys, *GOOD)
    assert code == 2 and "GRPO_KERNELS_BACKEND must be one of" in err


def test_help_shows_the_defaults_of_a_run_with_a_model(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    about = text.split("--learning_rate", 1)[1][:200]
    assert "(default: 1e-06)" in about, about


def test_adapters_and_rounded_weights_by_flag(folder, capsys):
    pytest.importorskip("peft")
    options = ("train", "--model", "model", "--data", "data.jsonl", "--reward", "house_rewards:short", "--output_dir", "out", "--report_to", "none")
    code, _, err = run(capsys, *options, "--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear", *QUICK)
    assert code == 0, err
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["r"] == 2 and not (folder / "out" / "model.safetensors").exists()
    code, _, err = run(capsys, *options, "--load_in_4bit", *QUICK)
    assert code == 2 and "--use_peft" in err


def test_a_ruined_checkpoint_is_a_message(folder, capsys):
    options = ("train", "--model", "model", "--data", "data.jsonl", "--reward", "house_rewards:short", "--output_dir", "out", "--report_to", "none",
               "--save_steps", "1", *QUICK)  # fmt: skip
    assert run(capsys, *options)[0] == 0
    (folder / "out" / "checkpoint-2" / "complete.json").unlink()
    code, _, err = run(capsys, *options, "--resume_from_checkpoint", "out/checkpoint-2")
    assert code == 2 and "out/checkpoint-1" in err
    code, out, err = run(capsys, *options, "--resume_from_checkpoint", "last")
    assert code == 0 and "passed over" in out, err


@pytest.mark.parametrize("line", ["[1]", '{"question": "x"}', '{"prompt": ""}', '{"prompt": 3}', "{}"])
def test_bad_rows_are_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1="}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2.*prompt"):
        read_jsonl(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one row"):
        read_jsonl(path)


def test_doctor_runs(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "torch" in out
    for command in ("doctor", "plot"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and out.startswith(f"usage: grpo-kernels {command} ") and f"\n{command} " in out and "train" not in out
    assert run(capsys, "doctor", "now")[0] == 2
