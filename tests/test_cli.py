"""The command line: what it accepts, and what it says about what it does not."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from grpo_kernels.cli import main  # noqa: E402
from grpo_kernels.trainer.arguments import parse  # noqa: E402


@pytest.fixture
def files(tmp_path):
    from test_trainer import tiny_model

    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(11, 19)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "my_reward.py").write_text("def score(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    return tmp_path


def test_train_from_flags_yaml_jsonl_and_a_reward(files):
    (files / "run.yaml").write_text(
        "model: model\ndata: data.jsonl\nreward: my_reward:score\noutput_dir: out\nlearning_rate: 1e-3\nmax_steps: 9\n"
        "num_generations: 4\nuse_cpu: true\nreport_to: none\nmax_completion_length: 4\n"
    )
    command = [sys.executable, "-m", "grpo_kernels.cli", "train", "--config", "run.yaml", "--max_steps", "1"]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (files / "out" / "model.safetensors").exists()
    assert done.stdout.strip().splitlines()[-1] == "model: out"


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: 0.5\nlearning_rate: 1e-3\nloss_type: grpo\nuse_cpu: true\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--beta", "0.25", "--model", "m", "--data", "d", "--reward", "a:b"]
    run, args = parse(flags, demo_defaults={"beta": 9.0, "num_iterations": 7})
    assert (args.beta, args.learning_rate, args.loss_type, args.num_iterations) == (0.25, 1e-3, "grpo", 1)
    assert (run.model, run.reward) == ("m", ["a:b"])
    assert parse(["--use_cpu", "true"], demo_defaults={"num_iterations": 7})[1].num_iterations == 7


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "train"),
        (["train", "--lerning_rate", "1"], "learning_rate"),
        (["train", "--model", "m"], "--data"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--config", "bad.yaml"], "epsilon"),
        (["train", "--model", "m", "--data", "bad.jsonl", "--reward", "my_reward:score"], "bad.jsonl, line 2"),
        (["train", "--model", "m", "--data", "none.jsonl", "--reward", "my_reward:score"], "none.jsonl"),
        (["train", "--model", "model", "--data", "data.jsonl", "--reward", "no_such:fn"], "no_such"),
        (["train", "--model", "model", "--data", "data.jsonl", "--reward", "my_reward:absent"], "absent"),
        (["train", "--model", "model", "--data", "data.jsonl", "--reward", "nonsense"], "nonsense"),
        (["train", "--loss_type", "ppo"], "loss_type"),
        (["doctor", "now"], "doctor"),
    ],
)
def test_what_is_wrong_is_said(files, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(files)
    (files / "bad.yaml").write_text("epsilonn: 0.3\n")
    (files / "bad.jsonl").write_text('{"prompt": "1+1="}\nnot json\n')
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_version_and_doctor(capsys):
    assert main(["--version"]) == 0
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "0.1.0" in said and "torch" in said and "backends" in said
