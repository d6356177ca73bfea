"""docs/metrics.md, training.md, losses.md, sampling-mask.md, bits.md and distillation.md: what their tables and examples say, against what the code does."""

import collections
import dataclasses
import functools
import json
import re

import pytest
import torch
from support.cases import usually
from support.documents import DOCS, runs_as_it_says, section, snippets, table, tables
from support.problems import make_problem, run
from support.recorded_products import recorded
from support.tiny_trainer import DATA, tiny_model, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import (
    GRPOLossConfig,
    fused_linear_distillation_loss,
    fused_linear_grpo_loss,
    linear_divergence,
    objective,
    reference,
)
from grpo_kernels.bench import peers
from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEVICES, Problem, predict
from grpo_kernels.losses.config import LOSS_FIELDS, LOSS_TYPES
from grpo_kernels.losses.terms import TERMS
from grpo_kernels.trainer.arguments import parse
from grpo_kernels.trainer.demo import make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what a loss uses ----

# what is changed, beside which an option that is used shows
BASE = dict(epsilon=0.2, epsilon_high=1.0, delta=2.5, entropy_coef=0.1, top_entropy_quantile=0.6, off_policy_mask_threshold=0.1,
            max_completion_length=9, dro_beta=0.7, clip_cov_ratio=0.3, clip_cov_lb=-1.0, kl_cov_ratio=0.3)  # fmt: skip
# dppo's bounds are of probabilities, which are small here; the off-policy mask would drop the sequences that gspo clips below
OWN = {"dppo_tv": dict(epsilon=0.001, epsilon_high=0.001), "dppo_kl": dict(epsilon=1e-4, epsilon_high=1e-4), "gspo": dict(epsilon=0.9, off_policy_mask_threshold=0.5)}
CHANGED = {
    "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.4, "delta": 2.2, "beta": 0.4, "use_bias_correction_kl": False,
    "temperature": 1.3, "logit_scale": 1.5, "softcap": 2.0, "entropy_coef": 0.5, "top_entropy_quantile": 0.2, "off_policy_mask_threshold": -2.0,
    "max_completion_length": 20, "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0, "kl_estimator": "exact", "dro_beta": 2.0,
    "clip_cov_ratio": 0.8, "clip_cov_lb": 0.1, "clip_cov_ub": 0.2, "kl_cov_ratio": 0.8, "ppo_kl_coef": 2.0,
    "importance_sampling_mode": "token_truncate", "importance_sampling_clip_min": 0.9, "importance_sampling_clip_max": 1.2,
}  # fmt: skip
# options of the correction, which makes the ratio that the others are given
CORRECTION = {"importance_sampling_mode": None, "importance_sampling_clip_min": "token_mask", "importance_sampling_clip_max": "token_mask"}
TENSORS = ("old_logps", "ref_logps", "importance_sampling_ratio", "sampling_logps", "num_items")


def made(loss_type, **changed):
    config = GRPOLossConfig(**{**BASE, **OWN.get(loss_type, {}), "loss_type": loss_type, **changed})
    # drawn by the same config, so that two calls differ by the option alone
    drawn = GRPOLossConfig(**{**BASE, "loss_type": loss_type})
    return dataclasses.replace(make_problem(B=9, config=drawn, confident=False, sampling=True, ratio="token", num_items=11.0), config=config)


@functools.cache
def result(loss_type, beta, name=None, mode=False):
    """Loss and gradients, with one option or tensor changed; ``mode``: of a correction, in place of a ratio."""
    changed = {"beta": beta} if mode is False else {"beta": beta, "importance_sampling_mode": mode}
    problem = made(loss_type, **{**changed, **({name: CHANGED[name]} if name in CHANGED else {})})
    if mode is not False:
        problem = dataclasses.replace(problem, importance_sampling_ratio=None)
    if name in TENSORS:
        value = getattr(problem, name)
        problem = dataclasses.replace(problem, **{name: value + 1.0 if name == "sampling_logps" else value * 2})
    more = {}
    if name == "kl_estimator":
        more = {"ref_hidden": problem.hidden * 0.9, "ref_weight": problem.weight * 1.1}
    found = run(fused_linear_grpo_loss, problem, **more)
    return torch.cat([found.loss.flatten(), *(x.flatten() for x in found.gradients.values())])


def cell(loss_type, name):
    mode = CORRECTION.get(name, False)
    uses = [not torch.equal(result(loss_type, beta, None, mode), result(loss_type, beta, name, mode)) for beta in (0.0, 0.3)]
    return "yes" if uses[0] else "KL" if uses[1] else ""


def used(loss_type):
    """{option or tensor: "yes", or "KL" where it counts only with beta} of a loss, by the section's tables."""
    everywhere, *losses = table("metrics.md", "Options of each loss")[1:]
    assert everywhere[0] == "every loss"
    own = next((row for row in losses if loss_type in row[0].split(", ")), None)
    assert own, f'docs/metrics.md, "Options of each loss", has no row for {loss_type}'
    return {name: kind for row in (everywhere, own) for kind, cell in zip(("yes", "KL"), row[1:], strict=True) for name in cell.split(", ") if name}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_uses_the_options_that_the_table_names_and_no_others(loss_type):
    options = {*LOSS_FIELDS, *TENSORS} - {"loss_type"}
    assert used(loss_type) == {name: uses for name in options if (uses := cell(loss_type, name))}


# ---- metrics ----


def there(condition, loss_type, beta):
    return {"every loss_type": True, "beta != 0": beta != 0}.get(condition, loss_type in condition.split(", "))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_returns_the_metrics_of_the_table(loss_type):
    _, *rows = table("metrics.md", "Metrics of the loss")
    for beta in (0.0, 0.3):
        found = run(fused_linear_grpo_loss, made(loss_type, beta=beta)).metrics
        assert set(found) == {row[0] for row in rows if there(row[3], loss_type, beta)}


def test_the_policy_loss_holds_the_kl():
    with_kl, without = (run(fused_linear_grpo_loss, made("bnpo", beta=beta)).metrics for beta in (0.3, 0.0))
    torch.testing.assert_close(with_kl["policy_loss"], without["policy_loss"] + 0.3 * with_kl["kl"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_type", usually(LOSS_TYPES, "dapo", "cispo", "vespo", "dppo_kl", "clip_cov"))
def test_a_run_logs_the_metrics_of_the_tables(tmp_path, loss_type):
    options = dict(beta=0.3, dro_beta=0.5, max_steps=1, eval_dataset=DATA[:2], eval_strategy="steps", eval_steps=1)
    t = trainer(tmp_path, model=tiny_model(), loss_type=loss_type, **options)
    t.train()
    of_loss = {row[0] for row in table("metrics.md", "Metrics of the loss")[1:] if there(row[3], loss_type, 0.3)}
    of_trainer = {row[0].replace("NAME", "digit_sum"): row[3].split(", ") for row in table("metrics.md", "Metrics of the trainer")[1:]}
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


def test_the_configuration_file_and_the_flags_of_the_documentation_are_options(tmp_path, monkeypatch):
    text = (DOCS / "training.md").read_text()
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "run.yaml").write_text(settings)
    (tmp_path / "PATH").mkdir()
    monkeypatch.chdir(tmp_path)
    run, args = parse(["--config", "run.yaml", "--use_cpu"], {})
    assert (run.model, run.reward, args.generation_batch_size, args.steps_per_rollout) == ("PATH", ["my_rewards:score"], 64, 1)
    known = {f"--{f.name}" for f in (*dataclasses.fields(type(run)), *dataclasses.fields(type(args)))} | {"--dry-run", "--help"}
    elsewhere = {"--nproc-per-node", "--logprobs-mode", "--model-path"}  # of torchrun and of the servers
    assert set(re.findall(r"--[a-z][\w-]*", text)) - elsewhere <= known


def test_the_trainer_of_the_documentation_trains(tmp_path, monkeypatch):
    (source,) = (found for found in snippets("training.md").values() if "GRPOTrainer" in found)
    monkeypatch.chdir(tmp_path)
    for part in (tiny_model(max_position_embeddings=128), make_tokenizer()):
        part.save_pretrained("path/to/model")
    space = {}
    assert source.count("max_steps=100") == source.count("Name a colour.") == source.count("Name a fish.") == 1
    source = source.replace("max_steps=100", "max_steps=1, use_cpu=True, disable_tqdm=True")
    exec(source.replace("Name a colour.", "1+1=").replace("Name a fish.", "2+3="), space)  # of the tiny tokenizer's letters
    assert space["trainer"].state.global_step == 1 and (tmp_path / "run" / "model.safetensors").exists()


# ---- the sampling mask ----


def test_the_snippets_of_the_sampling_mask_do_what_they_say():
    train, *sources = snippets("sampling-mask.md").values()
    names = runs_as_it_says(train, {})
    arguments = [names[name] for name in ("hidden", "weight", "ids", "advantages", "mask")]
    exact = reference.grpo_loss(*[x.detach().double() if x.is_floating_point() else x for x in arguments],
                                old_logps=names["old"].double(), support=names["support"])  # fmt: skip
    torch.testing.assert_close(names["out"].loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(names["old"].double(), exact.logps, rtol=1e-5, atol=1e-5)
    assert names["hidden"].grad.abs().sum() > 0 and (names["support"].lengths() == 8).all()
    spaces = [runs_as_it_says(source, {}) for source in sources]
    assert len(spaces) == 3 and spaces[2]["support"].positions == 12
    padded = spaces[1]
    assert torch.equal(padded["same"].to_mask(10), padded["support"].to_mask(10))
    assert padded["first"].ids.tolist() == [7, 3, 9, 5] and padded["first"].positions == 2


def test_the_snippets_of_losses_run():
    correction, own = snippets("losses.md").values()
    space = runs_as_it_says(correction, {})
    assert space["out"].loss.isfinite() and space["config"].importance_sampling_range == (0.5, 5.0)
    try:
        space = runs_as_it_says(own, {})
    finally:
        TERMS.pop("squared", None)
    assert space["out"].loss.isfinite() and space["hidden"].grad.abs().sum() > 0 and space["out"].metrics["kl"] != 0


def options_of_losses():
    """{loss_type: the options that its section of losses.md says it reads}."""
    found = {}
    for part in section("losses.md", "Policy terms").split("\n### ")[1:]:
        head, (words,) = part.splitlines()[0], re.findall(r"^Reads: (.*)$", part, re.M)
        names = re.findall(r"`(\w+)`", head)
        for clause in words.split("; "):  # of all losses of the section, or of one that it begins with
            first, *others = re.findall(r"`(\w+)`", clause) or [None]
            for name in [first] if first in names else names:
                found.setdefault(name, set()).update(others if first in names else filter(None, [first, *others]))
    return found


EQUATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "vanilla", "gspo", "gpg", "dro")  # without words in them


@pytest.mark.parametrize("loss_type", EQUATIONS)
def test_a_losss_equation_and_its_sum_are_the_objectives(loss_type):
    """Of a call whose tokens are all kept: value and gradient."""
    sections = (DOCS / "losses.md").read_text().split("\n### ")[1:]
    (source,) = [re.search(r"```\ns = (.*?)\n```", part)[1] for part in sections if f"`{loss_type}`" in part.splitlines()[0]]
    s = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", source.split("        ")[0].replace("w'", "w_").replace("^", "**"))
    B, T, g = 6, 5, torch.Generator().manual_seed(1)
    old, start = (-3 * torch.rand(B, T, dtype=torch.float64, generator=g) for _ in range(2))
    A, lp = torch.randn(B, 1, dtype=torch.float64, generator=g), start.requires_grad_()
    more = {"cispo": dict(epsilon_high=1.5), "gspo": dict(epsilon=0.05)}.get(loss_type, {})
    config = GRPOLossConfig(loss_type=loss_type, delta=2.5, dro_beta=0.7, max_completion_length=9, sapo_temperature_neg=1.4, **more)
    pick = lambda name, at_zero=False: torch.where((A > 0) | at_zero & (A == 0), *(A.new_tensor(getattr(config, f"{name}_{x}")) for x in ("pos", "neg")))  # noqa: E731

    def phi(v):  # as the text below the equation has it
        return v ** pick("vespo_k", True) * (pick("vespo_lambda", True) * (1 - v)).exp()

    w, (low, high) = (lp - old).exp(), (1 - config.epsilon, 1 + config.upper_epsilon)
    space = dict(
        vars(config), epsilon_high=config.upper_epsilon, A=A, lp=lp, old=old, w=w, v=w.prod(1, keepdim=True), tau=pick("sapo_temperature"), phi=phi,
        w_=(lp - lp.detach()).exp() * (lp - old).mean(1, keepdim=True).exp().detach(), sg=torch.detach, sigmoid=torch.sigmoid, abs=torch.abs,
        clip=lambda x: x.clamp(low, high), min=lambda a, b: torch.minimum(*torch.broadcast_tensors(a, torch.as_tensor(b).to(a))),
    )  # fmt: skip
    _, *sums = table("losses.md", "How tokens are added up")
    (u,) = [row[2] for row in sums if loss_type in row[0].split(", ")] or [sums[-1][2]]
    u = u.split(";")[0].replace(" x ", " * ").replace("kept tokens of its sequence", "T").replace("kept tokens", "B * T").replace("num_items", "11")
    u = re.sub(r"/ ([^(].*)", r"/ (\1)", u)
    exact = (eval(u, dict(space, B=B, T=T)) * eval(s, space)).sum()
    loss, _ = objective(lp, lp.detach(), A[:, 0], torch.ones(B, T), old_logps=old, num_items=11, config=config)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(x, lp)[0] for x in (loss, exact)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_reads_the_options_that_its_section_names(loss_type):
    shared = re.findall(r"`(\w+)`", (DOCS / "losses.md").read_text().split("Every loss reads ")[1].split(".")[0])
    shared += ["importance_sampling_clip_min", "importance_sampling_clip_max"]
    read = {name for name in LOSS_FIELDS if name != "loss_type" and cell(loss_type, name)}
    assert read == {*shared, *options_of_losses()[loss_type]}


def test_what_supports_are_predicted_to_cost_is_what_the_plan_says():
    _, *rows = table("sampling-mask.md", "What it costs")
    for (_, *cells), (gradient, frozen) in zip(rows[:3], ((True, False), (True, True), (False, True)), strict=True):
        found = [predict(Problem(8192 * gradient, 8192 * (not gradient), 151_936, 4096, 2, 4, gradient, not frozen, DEFAULT_GPU_WORKSPACE_BYTES,
                                 device=DEVICES["h200"], pairs=pairs)) for pairs in (0, 8 * 8192)]  # fmt: skip
        times = [f"{found[0].predicted_ms:.1f} ms", f"{found[1].predicted_ms:.2f} ms"]
        assert cells == [*times, *(f"{x.peak_bytes / 2**20:.0f} MiB" for x in found)]


def test_what_supports_were_measured_to_cost_is_what_the_record_says():
    *_, measured = tables(section("sampling-mask.md", "What it costs"))
    record = json.loads((DOCS.parent / "benchmarks/results/cpu-support.json").read_text())
    found = {(row["path"], row["provider"]): row["median"] * 1e3 for row in record if row.get("median") is not None}
    wanted = (("dense", "support"), ("frozen", "support-frozen"), ("logprobs", "support-logprobs"))
    for (_, *cells), (dense, support) in zip(measured[1:], wanted, strict=True):
        names = (dense, "grpo_kernels"), (support, "grpo_kernels"), (support, "full_logits"), (support, "trl")
        for cell, name in zip(cells, names, strict=True):
            shown = float(cell.removesuffix(" ms"))
            assert shown == pytest.approx(found[name], abs=0.5 if shown > 100 else 0.06), name


# ---- bits ----


def test_the_snippet_of_the_bits_does_what_it_says():
    (source,) = snippets("bits.md").values()
    names = runs_as_it_says(source, {})
    assert names["old"].shape == (4, 6) and (names["old"] < 0).all()


def test_what_the_same_bits_were_measured_to_cost_is_what_the_record_says():
    _, *rows = table("bits.md", "What it costs")
    record = json.loads((DOCS.parent / "benchmarks/results/cpu-bits.json").read_text())
    found = {(row["path"], row["provider"]): row["median"] * 1e3 for row in record}
    for (_, *cells), path in zip(rows, ("logprobs", "dense", "frozen", "realistic", "sequence", "entropy"), strict=True):
        assert cells == [f"{found[path, f'grpo_kernels{how}']:.0f}" for how in ("-any-order", "", "-invariant")], path


# ---- precision ----


def test_the_errors_of_log_probs_on_a_cpu_are_those_of_the_records():
    rows = {row[0]: row[1:] for row in table("precision.md", "In short")}
    dense, support = (json.loads((DOCS.parent / f"benchmarks/results/{name}.json").read_text()) for name in ("cpu", "cpu-support"))
    for name, record, path in (("CPU, bfloat16", dense, "logprobs"), ("CPU, bfloat16, [over supports](sampling-mask.md)", support, "support-logprobs")):
        found = {row["provider"]: row["errors"] for row in record if row["path"] == path and row.get("errors")}
        wanted = [found["grpo_kernels"]["logps_mean"], found["grpo_kernels"]["logps_max"]]
        ours, theirs = ([float(x) for x in re.findall(r"\d\.\de-\d", words)] for words in rows[name])
        assert ours == [float(f"{x:.1e}") for x in wanted], name
        assert theirs == [float(f"{found['full_logits']['logps_mean']:.1e}")][: len(theirs)], name
    (trl,) = (row["errors"] for row in dense if (row["path"], row["provider"]) == ("logprobs", "trl"))
    shown = [float(x) for x in re.findall(r"\d\.\de-\d", rows["CPU, bfloat16, TRL 1.16"][0])]
    assert shown == [float(f"{trl[name]:.1e}") for name in ("logps_mean", "logps_max")]


# ---- distillation ----


def test_what_a_divergence_was_measured_to_cost_is_what_the_record_says():
    section = (DOCS / "distillation.md").read_text().split("cpu-divergence.json`):")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[4:8]]
    record = json.loads((DOCS.parent / "benchmarks/results/cpu-divergence.json").read_text())
    found = {row["provider"]: row for row in record}
    ours = found["grpo_kernels"]["median"]
    for (_, *shown), name in zip(rows, ("grpo_kernels", "liger", "full_logits", "trl"), strict=True):
        row = found[name]
        wanted = row["median"] * 1e3, row["ratio"], row["median"] / ours, row["peak_bytes"] / 2**20
        for cell, value, digits in zip(shown, wanted, (0, 2, 2, 0), strict=True):
            assert cell.split()[0] == f"{value:.{digits}f}", (name, cell, value)


def test_the_snippets_of_distillation_do_what_they_say():
    own, top, exact = snippets("distillation.md").values()
    names = runs_as_it_says(own, {})
    mask, double = names["mask"], lambda x: x.detach().double()
    hidden, weight = (double(names[name]).requires_grad_() for name in ("hidden", "weight"))
    logits = hidden @ weight.T, double(names["teacher"][0]) @ double(names["teacher"][1]).T
    reverse, jsd = (reference.divergence_from_logits(*logits, kind, 0.1).where(mask, 0.0) for kind in ("reverse_kl", "jsd"))
    torch.testing.assert_close(names["out"].divergence.double(), reverse.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(names["per_token"].divergence.double(), jsd.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(names["out"].loss.double(), reverse.sum() / mask.sum(), rtol=1e-4, atol=1e-6)
    ((reverse + jsd).sum() / mask.sum()).backward()
    torch.testing.assert_close(names["hidden"].grad.double(), hidden.grad, rtol=1e-3, atol=1e-4)
    names = runs_as_it_says(exact, {})
    policy, ref = (double(names[f"{of}hidden"]) @ double(names[f"{of}weight"]).T for of in ("", "ref_"))
    kl = reference.divergence_from_logits(policy, ref, "reverse_kl").mean()
    torch.testing.assert_close(names["out"].metrics["kl"].double(), kl, rtol=1e-4, atol=1e-6)
    pytest.importorskip("grpo_kernels.topk")
    names = runs_as_it_says(top, {})
    assert names["divergence"].shape == (4, 6) and (names["divergence"] >= 0).all() and names["hidden"].grad.isfinite().all()


def in_python(words):
    """A formula of the documentation."""
    words = re.sub(r"log ([pqm])", r"\1.log()", words)
    words, summed = words.removeprefix("sum "), words.startswith("sum ")
    words = re.sub(r"(?<=[\w)]) (?=\(|p|q|KL)", " * ", re.sub(r"KL(?!\()", "KL(p, q)", words))
    return f"({words}).sum(-1, keepdim=True)" if summed else words


def test_the_formulas_of_the_divergences_are_their_values_and_gradients():
    g = torch.Generator().manual_seed(0)
    z, y = (torch.randn(5, 40, dtype=torch.float64, generator=g) for _ in range(2))
    z.requires_grad_()
    p, q = (x.detach().softmax(-1) for x in (z, y))
    space = {"p": p, "q": q, "beta": 0.3, "KL": lambda a, b: (a * (a / b).log()).sum(-1, keepdim=True)}
    _, *rows = table("distillation.md", "What is computed")
    for kind, value, gradient in rows:
        value, _, mixture = value.partition(", m = ")
        value = value.split(" = ")[-1]
        if mixture:
            space["m"] = eval(in_python(mixture), space)
        exact = reference.divergence_from_logits(z, y, kind.split()[0], 0.3)
        torch.testing.assert_close(eval(in_python(value), space).squeeze(-1), exact.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(eval(in_python(gradient), space), torch.autograd.grad(exact.sum(), z)[0], rtol=1e-8, atol=1e-14)
    assert len(rows) == 3 and "m" in space


def operations(cell):
    """(multiples of NVD, of NVD') of a cell."""
    return tuple(int(re.search(rf"(\d+){unit}", cell)[1]) for unit in (r"NVD(?!')", "NVD'"))


class Products(TorchDispatchMode):
    """{(m, n, k): count} of the products of another library: torch.func shows one to the profiler several times."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.found[a.shape[0], b.shape[1], a.shape[1]] += 1
        return function(*args, **(kwargs or {}))


def products(function, ours):
    if ours:  # inside of an operator no dispatch is seen
        return recorded(function)
    with Products() as mode:
        function()
    return mode.found


def counted(call, ours, frozen, N=13, V=101, D=23, teacher_depth=29):
    g = torch.Generator().manual_seed(0)
    hidden, weight, *teacher = (torch.randn(rows, depth, generator=g) for depth in (D, teacher_depth) for rows in (N, V))
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    found = products(lambda: call(hidden, weight, *teacher).sum().backward(), ours)
    sums = {depth: sum(2 * count * m * n * k for (m, n, k), count in found.items() if depth in (m, n, k)) for depth in (D, teacher_depth)}
    return tuple(total / (N * V * depth) for depth, total in sums.items())


def test_the_operations_of_a_divergence_are_those_of_the_table():
    divergence = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    jsd = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False)
    ids = torch.zeros(13, dtype=torch.int64)
    trl = lambda beta: lambda h, w, *teacher: divergence(h, w, None, *teacher, None, beta)[0]  # noqa: E731
    calls = [
        lambda *both: fused_linear_distillation_loss(*both).loss, lambda *both: linear_divergence(*both).divergence,
        lambda *both: linear_divergence(*both, workspace_bytes=1).divergence, peers._reverse_kl, trl(1.0), trl(0.5), lambda *both: jsd(*both, ids),
    ]  # fmt: skip
    _, *rows = table("distillation.md", "What it costs")
    for (name, trained, frozen, _), call in zip(rows, calls, strict=False):
        for cell, is_frozen in ((trained, False), (frozen, True)):
            assert counted(call, name.startswith(("fused_linear", "linear")), is_frozen) == operations(cell), (name, cell)


def test_what_a_divergence_is_predicted_to_cost_is_what_the_plan_says():
    (predicted,) = (rows for rows in tables(section("distillation.md", "What it costs")) if rows[0] == ["", "bare products", "predicted", "peak"])
    wanted = ((True, True, False), (True, False, False), (True, True, True), (False, False, False))
    for (_, *cells), (gradient, trained, two_phases) in zip(predicted[1:], wanted, strict=True):
        found = predict(Problem(8192 * gradient, 8192 * (not gradient), 151_936, 4096, 2, 4, gradient, trained, DEFAULT_GPU_WORKSPACE_BYTES, two_phases,
                                device=DEVICES["h200"], teacher_depth=8192, teacher_size=2))  # fmt: skip
        assert cells == [f"{found.floor_ms:.1f} ms", f"{found.predicted_ms:.1f} ms", f"{found.peak_bytes / 2**20:.0f} MiB"]
