"""The examples run as a newcomer would run them, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command, **environment):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.exhaustive(reason="seven seconds: trains in a process of its own")
def test_the_custom_loop_learns_in_under_a_hundred_lines():
    assert len((EXAMPLES / "custom_loop.py").read_text().splitlines()) < 100
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", run(EXAMPLES / "custom_loop.py", "--steps", 25))]
    assert rewards[0] < 0.6 and rewards[-1] > 0.8


def distilled(*options):
    """(reverse KLs, accuracies before and after and of the teacher) of a run; its matrices are too small for two threads."""
    out = run(EXAMPLES / "distill.py", *options, OMP_NUM_THREADS="1")
    return ([float(x) for x in re.findall(pattern, out)] for pattern in (r"reverse KL ([\d.]+)", r"(?:accuracy|->|is) ([\d.]+)"))


@pytest.mark.exhaustive(reason="a minute: trains a teacher and a student")
def test_a_student_learns_from_its_teacher_in_under_a_hundred_lines():
    assert len((EXAMPLES / "distill.py").read_text().splitlines()) < 100
    kl, (before, after, teacher) = distilled()
    assert kl[0] > 3 and kl[-1] < 0.2 * kl[0] and min(kl) >= 0
    assert before < 0.1 and 0.4 < after <= teacher + 0.1 and teacher > 0.9


@pytest.mark.exhaustive(reason="ten seconds: a run of the example in a process of its own")
def test_the_distillation_example_takes_models_from_folders(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from grpo_kernels.trainer.demo import make_tokenizer

    tokenizer = make_tokenizer()
    for name, width in (("student", 16), ("teacher", 32)):
        config = LlamaConfig(vocab_size=14, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "student")
    kl, accuracies = distilled("--student", tmp_path / "student", "--teacher", tmp_path / "teacher", "--steps", 41, "--length", 4)
    assert kl[-1] < 0.5 * kl[0] and len(list(accuracies)) == 3


@pytest.mark.exhaustive(reason="two minutes: trains twice")
def test_trl_learns_the_same_stock_and_fused():
    pytest.importorskip("trl")
    lines = [run(EXAMPLES / "trl_grpo.py", "--trainer", name).splitlines()[-1] for name in ("fused", "stock")]
    assert len({line.split(":")[1] for line in lines}) == 1, lines
    first, last = map(float, re.findall(r"[\d.]+", lines[0]))
    assert last > first + 0.05
