"""The demo in small: its parts, and that rewards alone raise the accuracy; the whole one is `make demo`."""

import functools
import math
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
import torch

from grpo_kernels.trainer import GRPOConfig, demo, loss_cost, report
from grpo_kernels.trainer.plot import plot_run
from grpo_kernels.trainer.rollout import tokenize

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


@pytest.mark.exhaustive(reason="a quarter of a minute: trains twice")
def test_a_short_demo_tells_its_story_and_repeats_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "PADDED_VOCABULARY", 64)
    real = demo.warm_up
    monkeypatch.setattr(demo, "warm_up", lambda *args: real(*args, most_steps=30, cooling=10))
    monkeypatch.setattr(demo, "compare", functools.cache(functools.partial(loss_cost.compare, rounds=1)))
    stories, threads = [], torch.get_num_threads()
    for name in "ab":
        changed = dict(output_dir=str(tmp_path / name), max_steps=4, save_steps=4, per_device_train_batch_size=32, seed=5)
        before, after = demo.run(GRPOConfig(**{**demo.DEFAULTS, **changed}))
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == f"accuracy {before:.2f} -> {after:.2f}"
        page = (tmp_path / name / "report.html").read_text()
        assert re.search(r"saved +x \d", out) and f'id="accuracy">{before:.2f} → {after:.2f}</p>' in page
        assert f"report: {tmp_path / name / 'report.html'}" in out
        assert len(re.findall(r"(?m)^ {6}4 +\d\.\d\d +\d\.\d{3}", out)) == 1  # the last step
        assert f"checkpoint: {tmp_path / name / 'checkpoint-4'}" in out and (tmp_path / name / "checkpoint-4").is_dir()
        stories.append((before, after, (tmp_path / name / "checkpoint-4" / "model.safetensors").read_bytes()))
    assert stories[0] == stories[1]
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_a_browser_shows_the_report(tmp_path):
    """It is read from the document that the browser made of the page, without a network."""
    log = [{"step": 2 * i, "reward": i / 20, "entropy": 1.0 - i / 30, "kl": 1e-3 * i} for i in range(1, 20)]
    answers = [report.Answer("1<2&", "<b>", "3", "3"), report.Answer("2+2=", "4", "5", "4")]
    report.write(tmp_path / "report.html", "Sums & <others>", log, [(0, 0.27), (38, 0.914)], answers,
                 [("", "time"), ("fused", "1 ms")], [("seed", 0), ("name", "<x>")])  # fmt: skip
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
               (tmp_path / "report.html").as_uri()]  # fmt: skip
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    page = ElementTree.fromstring(re.search(r"<body>.*</body>", shown, re.DOTALL)[0])
    text = lambda node: "".join(node.itertext())  # noqa: E731
    assert text(page.find(".//*[@id='accuracy']")) == "0.27 → 0.91" and text(page.find("h1")) == "Sums & <others>"
    assert len(page.findall(".//polyline")) == 6 and len(page.findall(".//circle")) == 2 and "was not logged" in text(page)
    (one, two), right = [[text(cell) for cell in row] for row in page.findall(".//table")[0].findall(".//tr")[1:]], page.findall(".//*[@class='right']")
    assert one == ["1<2&", "<b> ✗", "3 ✓"] and two == ["2+2=", "4 ✓", "5 ✗"] and len(right) == 2
    assert not re.search(r"https?:|<script|src=|href=", shown), "the page loads something"


def test_a_figure_leaves_out_what_is_no_number(tmp_path):
    log = [{"step": i, "reward": value, "entropy": math.nan} for i, value in enumerate([math.nan, 0.5, math.inf], 1)]
    report.write(tmp_path / "report.html", "", log, [(0, 0.1), (3, 0.2)], [], [("",)], [])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<polyline") == 2 and page.count("was not logged") == 3 and not re.search(r'points="[^"]*(nan|inf)', page)


@pytest.mark.exhaustive(reason="ten seconds: measures in two processes of its own")
def test_measured_costs_are_real():
    shape = loss_cost.Shape(B=32, T=4, V=8192, D=32)
    costs = loss_cost.compare(shape, rounds=1)
    logits = 32 * 4 * 8192 * 4
    assert costs["full"].extra_bytes > 2 * logits  # logits and log-probs at least
    assert 0 < costs["fused"].extra_bytes < costs["full"].extra_bytes
    assert all(cost.seconds > 0 for cost in costs.values())


def test_picture_of_a_run_with_gaps(tmp_path):
    log = [{"step": i, "reward": i / 9, "entropy": 1 - i / 9, "clip_ratio/region_mean": 0.1} for i in range(9)]
    plot_run([*log, {"step": 9, "train_loss": 0.0}], tmp_path / "run.png", "title", [(0, 0.1), (8, 0.9)])
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
