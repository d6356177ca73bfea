"""docs/metrics.md, training.md and sampling-mask.md: what their tables and examples say, against what the code does."""

import contextlib
import dataclasses
import functools
import io
import json
import re
from pathlib import Path

import pytest
import torch
from problems import make_problem, run
from test_trainer import DATA, tiny_model, trainer

from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, reference
from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEVICES, Problem, predict
from grpo_kernels.losses.config import LOSS_FIELDS, LOSS_TYPES
from grpo_kernels.trainer.demo import make_tokenizer

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.usefixtures("one_thread")


def table(file, heading):
    """Rows of the table below a heading, as lists of cells without their code marks."""
    section = (DOCS / file).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


# ---- what a loss ignores ----

# what is changed, beside which an option that is used shows
BASE = dict(epsilon=0.2, epsilon_high=1.0, delta=2.5, entropy_coef=0.1, top_entropy_quantile=0.6, off_policy_mask_threshold=0.1,
            max_completion_length=9)  # fmt: skip
CHANGED = {
    "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.4, "delta": 2.2, "beta": 0.4, "use_bias_correction_kl": False,
    "temperature": 1.3, "logit_scale": 1.5, "softcap": 2.0, "entropy_coef": 0.5, "top_entropy_quantile": 0.2, "off_policy_mask_threshold": -2.0,
    "max_completion_length": 20, "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0, "kl_estimator": "exact",
}  # fmt: skip
TENSORS = ("old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps", "num_items")


def made(loss_type, **changed):
    config = GRPOLossConfig(**{**BASE, "loss_type": loss_type, **changed})
    # drawn by the same config, so that two calls differ by the option alone
    drawn = GRPOLossConfig(**{**BASE, "loss_type": loss_type})
    return dataclasses.replace(make_problem(B=9, config=drawn, confident=False, sampling=True, ratio="token", num_items=11.0), config=config)


@functools.cache
def result(loss_type, beta, name=None):
    """Loss and gradients, with one option or tensor changed."""
    problem = made(loss_type, **{"beta": beta, **({name: CHANGED[name]} if name in CHANGED else {})})
    if name in TENSORS:
        value = getattr(problem, name)
        problem = dataclasses.replace(problem, **{name: value + 1.0 if name == "sampling_logps" else value * 2})
    more = {}
    if name == "kl_estimator":
        more = {"ref_hidden": problem.hidden * 0.9, "ref_weight": problem.weight * 1.1}
    found = run(fused_linear_grpo_loss, problem, **more)
    return torch.cat([found.loss.flatten(), *(x.flatten() for x in found.gradients.values())])


def cell(loss_type, name):
    uses = [not torch.equal(result(loss_type, beta), result(loss_type, beta, name)) for beta in (0.0, 0.3)]
    return "yes" if uses[0] else "KL" if uses[1] else ""


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_a_loss_ignores_is_what_the_table_leaves_empty(loss_type):
    head, *rows = table("metrics.md", "What a loss ignores")
    assert tuple(head[1:]) == LOSS_TYPES
    written = {row[0]: row[head.index(loss_type)] for row in rows}
    assert set(written) == {*LOSS_FIELDS, *TENSORS} - {"loss_type"}
    assert written == {name: cell(loss_type, name) for name in written}


# ---- metrics ----


def there(condition, loss_type, beta):
    return {"every loss_type": True, "beta != 0": beta != 0}.get(condition, loss_type in condition.split(", "))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_returns_the_metrics_of_the_table(loss_type):
    _, *rows = table("metrics.md", "Of the loss")
    for beta in (0.0, 0.3):
        found = run(fused_linear_grpo_loss, made(loss_type, beta=beta)).metrics
        assert set(found) == {row[0] for row in rows if there(row[3], loss_type, beta)}


def test_the_policy_loss_holds_the_kl():
    with_kl, without = (run(fused_linear_grpo_loss, made("bnpo", beta=beta)).metrics for beta in (0.3, 0.0))
    torch.testing.assert_close(with_kl["policy_loss"], without["policy_loss"] + 0.3 * with_kl["kl"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_run_logs_the_metrics_of_the_tables(tmp_path, loss_type):
    t = trainer(tmp_path, model=tiny_model(), loss_type=loss_type, beta=0.3, max_steps=1, eval_dataset=DATA[:2], eval_strategy="steps", eval_steps=1)
    t.train()
    of_loss = {row[0] for row in table("metrics.md", "Of the loss")[1:] if there(row[3], loss_type, 0.3)}
    of_trainer = {row[0].replace("NAME", "digit_sum"): row[3].split(", ") for row in table("metrics.md", "Of the trainer")[1:]}
    for log, mode, prefix in zip(t.state.log_history, ("train", "eval"), ("", "eval_"), strict=False):
        wanted = of_loss | {name for names, modes in of_trainer.items() if mode in modes for name in names.split(", ")}
        assert set(log) - {"step", "epoch"} == {prefix + name for name in wanted} - {"epoch"}, mode


# ---- rewards ----


def test_the_reward_function_of_the_documentation_scores_text_and_messages(tmp_path):
    (source,) = re.findall(r"```python\n(def score.*?)```", (DOCS / "training.md").read_text(), re.S)
    space, seen = {}, []
    exec(source, space)

    def spy(**given):
        seen.append(given)
        return space["score"](**given)

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for kind, prompts in {"text": ["1+1="], "messages": [[{"role": "user", "content": "1+1="}]]}.items():
        t = trainer(tmp_path / kind, rewards=spy, data=[{"prompt": p, "answer": "2"} for p in prompts], max_steps=1)
        t.processing_class.chat_template = template
        t.train()
        given = seen[-1]
        assert set(given) == {"prompts", "completions", "completion_ids", "answer"} and given["answer"] == ["2"] * 8
        assert given["prompts"] == prompts * 8
        texts = [make_tokenizer().decode(ids, skip_special_tokens=True) for ids in given["completion_ids"]]
        assert given["completions"] == (texts if kind == "text" else [[{"role": "assistant", "content": text}] for text in texts])
        assert space["score"](**{**given, "completions": ["2", "3"] if kind == "text" else [[{"role": "assistant", "content": c}] for c in "23"],
                                 "answer": ["2", "2"]}) == [1.0, 0.0]  # fmt: skip


# ---- the sampling mask ----


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def printed_as_it_says(source, space):
    """Runs it; every `print(...)  # answer` must print the answer."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(source, space)
    answers = re.findall(r"^print\(.*\)\s+# (.*)$", source, re.M)
    assert out.getvalue().splitlines() == answers
    return space


def test_the_snippets_of_the_sampling_mask_do_what_they_say():
    train, *sources = snippets((DOCS / "sampling-mask.md").read_text())
    names = printed_as_it_says(train, {})
    arguments = [names[name] for name in ("hidden", "weight", "ids", "advantages", "mask")]
    exact = reference.grpo_loss(*[x.detach().double() if x.is_floating_point() else x for x in arguments],
                                old_logps=names["old"].double(), support=names["support"])  # fmt: skip
    torch.testing.assert_close(names["out"].loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(names["old"].double(), exact.logps, rtol=1e-5, atol=1e-5)
    assert names["hidden"].grad.abs().sum() > 0 and (names["support"].lengths() == 8).all()
    spaces = [printed_as_it_says(source, {}) for source in sources]
    assert len(spaces) == 3 and spaces[2]["support"].positions == 12
    padded = spaces[1]
    assert torch.equal(padded["same"].to_mask(10), padded["support"].to_mask(10))
    assert padded["first"].ids.tolist() == [7, 3, 9, 5] and padded["first"].positions == 2


def behind_the_readmes_first_snippet(word):
    """The names after the README's first snippet and the one with this word."""
    first, *others = snippets((DOCS.parent / "README.md").read_text())
    (chosen,) = (source for source in others if word in source)
    space = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(first, space)
        exec(chosen, space)
    return space


def test_the_readmes_supports_run():
    space = behind_the_readmes_first_snippet("TokenSupport")
    kept = space["mask"]
    assert "support" in space and space["out"].loss.isfinite()
    assert (space["out"].logps[kept] > -10).all(), "of some five tokens, not of a thousand"


def test_the_readmes_tokens_of_a_position_are_those_of_full_logits():
    space = behind_the_readmes_first_snippet("linear_logprobs_at")
    log_p = torch.log_softmax(space["hidden"] @ space["head"].weight.T, -1).gather(-1, space["teacher"].indices)
    torch.testing.assert_close(space["student"].logps[space["mask"]], log_p[space["mask"]])


def test_what_supports_are_predicted_to_cost_is_what_the_plan_says():
    _, *rows = table("sampling-mask.md", "What it costs")
    for (_, *cells), (gradient, frozen) in zip(rows[:3], ((True, False), (True, True), (False, True)), strict=True):
        found = [predict(Problem(8192 * gradient, 8192 * (not gradient), 151_936, 4096, 2, 4, gradient, not frozen, DEFAULT_GPU_WORKSPACE_BYTES,
                                 device=DEVICES["h200"], pairs=pairs)) for pairs in (0, 8 * 8192)]  # fmt: skip
        times = [f"{found[0].predicted_ms:.1f} ms", f"{found[1].predicted_ms:.2f} ms"]
        assert cells == [*times, *(f"{x.peak_bytes / 2**20:.0f} MiB" for x in found)]


def test_what_supports_were_measured_to_cost_is_what_the_record_says():
    _, *rows = table("sampling-mask.md", "What it costs")
    record = json.loads((DOCS.parent / "benchmarks/results/cpu-support.json").read_text())
    found = {(row["path"], row["provider"]): row["median"] * 1e3 for row in record if row.get("median") is not None}
    wanted = (("dense", "support"), ("frozen", "support-frozen"), ("logprobs", "support-logprobs"))
    for (_, *cells), (dense, support) in zip(rows[-3:], wanted, strict=True):
        names = (dense, "grpo_kernels"), (support, "grpo_kernels"), (support, "full_logits"), (support, "trl")
        for cell, name in zip(cells, names, strict=True):
            shown = float(cell.removesuffix(" ms"))
            assert shown == pytest.approx(found[name], abs=0.5 if shown > 100 else 0.06), name
