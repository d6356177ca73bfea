"""The demo in small: its parts, and that rewards alone raise the accuracy; the whole one is `make demo`."""

import functools
import os

import pytest
import torch

from grpo_kernels.trainer import GRPOConfig, demo, measure
from grpo_kernels.trainer.plot import plot_run
from grpo_kernels.trainer.rollout import tokenize


def test_tokenizer_round_trip_and_problems():
    tokenizer = demo.make_tokenizer()
    (ids,) = tokenize(tokenizer, ["17+5="])
    assert len(ids) == 5 and tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "17+5="
    train, held_out = demo.make_problems(3)
    prompts = [row["prompt"] for row in train], [row["prompt"] for row in held_out]
    assert not set(prompts[0]) & set(prompts[1]) and len(set(prompts[0])) == len(train) == 600 and len(held_out) == 120
    for row in train + held_out:  # the ones digit comes first
        assert eval(row["prompt"][:-1]) == int(row["answer"][::-1]) == int(row["miscount"][::-1]) + 1
    assert demo.make_problems(3) == (train, held_out) != demo.make_problems(4)


def test_share_counts_answers():
    rows = [{"answer": "4", "miscount": "3"}, {"answer": "5", "miscount": "4"}, {"answer": "6", "miscount": "5"}]
    assert demo.share(["4", "4", "9"], rows, "answer") == pytest.approx(1 / 3)
    assert demo.share(["4", "4", "9"], rows, "answer", "miscount") == pytest.approx(2 / 3)


def test_a_short_demo_tells_its_story_and_repeats_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "PADDED_VOCABULARY", 64)
    real = demo.warm_up
    monkeypatch.setattr(demo, "warm_up", lambda *args: real(*args, most_steps=30, cooling=10))
    monkeypatch.setattr(demo, "compare", functools.cache(functools.partial(measure.compare, rounds=1)))
    stories, threads = [], torch.get_num_threads()
    for name in "ab":
        changed = dict(output_dir=str(tmp_path / name), max_steps=4, save_steps=4, per_device_train_batch_size=32, seed=5)
        before, after = demo.run(GRPOConfig(**{**demo.DEFAULTS, **changed}))
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == f"accuracy {before:.2f} -> {after:.2f}"
        assert "saved: time x" in out and os.path.isfile(tmp_path / name / "training.png")
        assert f"checkpoint: {tmp_path / name / 'checkpoint-4'}" in out and (tmp_path / name / "checkpoint-4").is_dir()
        stories.append((before, after, (tmp_path / name / "checkpoint-4" / "model.safetensors").read_bytes()))
    assert stories[0] == stories[1]
    assert torch.get_num_threads() == threads


def test_measured_costs_are_real():
    shape = measure.Shape(B=32, T=4, V=8192, D=32)
    costs = measure.compare(shape, rounds=1)
    logits = 32 * 4 * 8192 * 4
    assert costs["full"].extra_bytes > 2 * logits  # logits and log-probs at least
    assert 0 < costs["fused"].extra_bytes < costs["full"].extra_bytes
    assert all(cost.seconds > 0 for cost in costs.values())


def test_picture_of_a_run_with_gaps(tmp_path):
    log = [{"step": i, "reward": i / 9, "entropy": 1 - i / 9, "clip_ratio/region_mean": 0.1} for i in range(9)]
    plot_run([*log, {"step": 9, "train_loss": 0.0}], tmp_path / "run.png", "title", [(0, 0.1), (8, 0.9)])
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
