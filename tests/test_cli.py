"""The command line: names, precedence, and messages that say what was wrong."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import __version__, cli
from grpo_kernels.trainer.arguments import parse, read_data, read_jsonl
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
    for name in ("reward", "data", "epsilon_high", "vespo_lambda_neg", "num_generations", "max_steps", "resume_from_checkpoint"):
        assert f"--{name}" in text


def test_demo_defaults_yaml_and_flags_in_this_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 7\nlearning_rate: 3e-4\nbeta: 0.5\nscale_rewards: false\n")
    run, args = parse(["--config", str(file), "--seed", "9"], DEFAULTS)
    assert run.is_demo
    assert (args.seed, args.learning_rate, args.beta, args.scale_rewards) == (9, 3e-4, 0.5, "none")
    assert args.num_iterations == DEFAULTS["num_iterations"] != 1
    run, args = parse(["--model", "m", "--data", "d", "--reward", "a:b", "c:d", "--config", str(file)], DEFAULTS)
    assert not run.is_demo and run.reward == ["a:b", "c:d"] and args.num_iterations == 1 and args.seed == 7


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


def test_a_dry_run_checks_everything_and_trains_nothing(folder, capsys):
    options = ("--model", "model", "--data", "data.jsonl", "--output_dir", "out", "--report_to", "none", "--dry-run", *QUICK)
    code, out, err = run(capsys, "train", *options, "--reward", "house_rewards:short")
    assert code == 0, err
    for word in ("LlamaForCausalLM", "vocabulary 32", "4 prompts", "['level']", "short", "2 prompts x 2 completions", "MiB", "FLOP", "2 steps"):
        assert word in out, out
    assert not (folder / "out" / "model.safetensors").exists()
    code, _, err = run(capsys, "train", *options, "--reward", "house_rewards:long")
    assert code == 2 and "'long'" in err
    code, out, _ = run(capsys, "train", "--dry-run", "--model", "model", "--data", "data.jsonl", "--reward", "house_rewards:short", "--use_peft",
                       "--lora_target_modules", "q_proj", "lm_head", *QUICK)  # fmt: skip
    assert code == 0 and "an adapter on it" in out and "frozen" in out
    assert run(capsys, "train", "--dry-run")[0] == 0
    (folder / "wanting.py").write_text("def score(completions, target, level, bonus=1, **_):\n    return [0.0] * len(completions)\n")
    code, _, err = run(capsys, "train", *options, "--reward", "wanting:score")
    assert code == 2 and "'target'" in err and "'level'" in err, err
    code, _, err = run(capsys, "train", *options, "--reward", "house_rewards:short", "--resume_from_checkpoint", "out/nope")
    assert code == 2 and "out/nope" in err, err


def test_help_shows_the_defaults_of_a_run_with_a_model(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 1e-06)" in text.split("--learning_rate", 2)[2][:200], text.split("--learning_rate", 2)[2][:200]


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
    assert run(capsys, "doctor", "--help")[0] == 0
    assert run(capsys, "doctor", "now")[0] == 2
