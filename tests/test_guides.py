"""docs/usage.md, integrations.md and api.md: snippets run and print what they say, errors and names are those of the code."""

import ast
import contextlib
import io
import re

import pytest
import torch
from support.documents import DOCS, ROOT, runs_as_it_says, section, snippets, table, tables

import grpo_kernels
from grpo_kernels import GRPOLossConfig, fused_linear_grpo_loss, linear_logprobs
from grpo_kernels.backends import native
from grpo_kernels.losses import terms

PACKAGE = ROOT / "grpo_kernels"
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- usage


@pytest.fixture
def prepared():
    """The names of the page's first snippet; a loss that a snippet registers is gone behind the test."""
    space, before = {}, dict(terms.TERMS)
    exec(next(iter(snippets("usage.md").values())), space)
    yield space
    terms.TERMS.clear()
    terms.TERMS.update(before)


@pytest.mark.parametrize("name", list(snippets("usage.md"))[1:])
def test_the_snippets_of_usage_run(name, prepared):
    if "Same bits" in name and native.why_unavailable() is not None:
        pytest.skip("needs the compiled CPU kernels")
    source = snippets("usage.md")[name]
    space = runs_as_it_says(source, prepared)
    if "out" in space and ".backward()" in source and "torch.randn(V, D)" not in source:
        grad = space["body"].weight.grad
        assert grad is not None and grad.isfinite().all() and grad.norm() > 0
    if "out = " in source:
        assert space["out"].loss.isfinite().all()


def test_the_snippets_of_usage_compute_what_they_say(prepared):
    """Log-probs over supports, at several tokens, and a divergence, against full logits."""
    by_name, kept = snippets("usage.md"), prepared["mask"]
    exec(by_name["Truncated sampling 1"], prepared)
    prepared["hidden"] = prepared["hidden"].detach()
    logits = prepared["hidden"] @ prepared["head"].weight.T
    over = logits.masked_fill(~prepared["left"], -float("inf")).log_softmax(-1).gather(-1, prepared["tokens"][..., None]).squeeze(-1)
    torch.testing.assert_close(prepared["out"].logps[kept], over[kept])
    exec(by_name["Several tokens a position 1"], prepared)
    torch.testing.assert_close(prepared["at"].logps[kept], logits.log_softmax(-1).gather(-1, prepared["several"])[kept])
    exec(by_name["Distillation 1"].replace("out.loss.backward()", ""), prepared)
    p, q = logits.log_softmax(-1), (prepared["teacher_hidden"] @ prepared["teacher_weight"].T).log_softmax(-1)
    torch.testing.assert_close(prepared["out"].divergence, (p.exp() * (p - q)).sum(-1).where(kept, 0.0), rtol=1e-4, atol=1e-5)


def test_the_errors_of_usage_are_those_of_the_code(prepared):
    hidden, head, tokens, ids, advantages, mask = (prepared[name] for name in ("hidden", "head", "tokens", "ids", "advantages", "mask"))
    weight = head.weight

    def loss(tokens=tokens, weight=weight, advantages=advantages, **more):
        return lambda: fused_linear_grpo_loss(hidden, weight, tokens, advantages, mask, **more)

    calls = [
        loss(tokens=ids), loss(tokens=tokens.where(mask, -100) - 1000), loss(advantages=advantages * torch.nan),
        loss(old_logps=linear_logprobs(hidden, weight, tokens).logps), loss(config=GRPOLossConfig(beta=0.04)), loss(weight=weight.bfloat16()),
        loss(temperature=0.9), loss(backend="cuda"),
    ]  # fmt: skip
    written = [cells[0] for cells in table("usage.md", "Errors")[1:]]
    assert len(written) == len(calls) + 1  # the last one is no message
    for message, call in zip(written, calls, strict=False):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            call()
        own = message.replace("'triton'", "'cuda'")  # of the two the one that no test machine has
        assert str(caught.value).startswith(own.removesuffix("..")), caught.value
    assert loss(tokens=tokens - 1000, kept_rows=mask.flatten().nonzero().squeeze(1))().loss.isnan()


def test_the_environment_variables_of_usage_are_those_that_are_read():
    text = "".join(path.read_text() for path in [*PACKAGE.rglob("*.py"), ROOT / "setup.py"])
    read = set(re.findall(r"environ(?:\.get\(|\[|\.setdefault\()\s*\"(GRPO_KERNELS_\w+)", text))
    written = re.findall(r"^\| `(GRPO_KERNELS_\w+)` \|", (DOCS / "usage.md").read_text(), re.M)
    assert set(written) == read and len(written) == len(read)


def test_the_losses_of_usage_are_all_of_them():
    named = section("usage.md", "Which loss").split("[Losses]")[0]
    assert set(re.findall(r"`(\w+)`", named)) - {"loss_type"} == set(terms.BUILT_IN)


# ---- integrations


def tiny(folder):
    """A model and tokenizer that TRL loads by path."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from grpo_kernels.trainer.demo import make_tokenizer

    tokenizer = make_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)


def with_model(source, folder):
    tiny(folder / "model")
    (line,) = re.findall(r"^MODEL = .*$", source, re.M)
    return source.replace(line, f"MODEL = {str(folder / 'model')!r}")


def sees_the_loss(script, hook, trl, folder, monkeypatch):
    """The hook prints what it says under the fused trainer, and a shape of sampling under TRL's."""
    from grpo_kernels.integrations.transformers import is_fused

    monkeypatch.chdir(folder)
    script = with_model(script, folder).replace("trainer.train()\n", "")
    (answer,) = re.findall(r"^print\(.*\)\s+# (.*)$", hook, re.M)
    for trainer, wanted in (("FusedGRPOTrainer", answer), ("GRPOTrainer", r"(8, 1, V)")):
        space, out = {"GRPOTrainer": trl.GRPOTrainer}, io.StringIO()
        exec(script.replace("trainer = FusedGRPOTrainer", f"trainer = {trainer}"), space)
        with contextlib.redirect_stdout(out):
            exec(hook, space)
        wanted = wanted.replace("V", str(space["trainer"].model.config.vocab_size))
        assert wanted in out.getvalue().splitlines(), out.getvalue()
        assert is_fused(space["trainer"].model) == (trainer == "FusedGRPOTrainer")


@pytest.mark.parametrize("name", list(snippets("integrations.md")))
def test_the_snippets_of_integrations_run(name, tmp_path, monkeypatch):
    by_name = snippets("integrations.md")
    source = by_name[name]
    if not name.startswith("TRL"):
        runs_as_it_says(source, {})
        return
    trl = pytest.importorskip("trl")
    if name == "TRL: GRPO 2":
        sees_the_loss(by_name["TRL: GRPO 1"], source, trl, tmp_path, monkeypatch)
        return
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(with_model(source, tmp_path), space)
    trainer = space["trainer"]
    assert isinstance(trainer, trl.GRPOTrainer) and trainer.state.global_step == 2
    names = section("integrations.md", "TRL: GRPO").split("The log has TRL's names. ")[1].split("and the rewards")[0]
    for pattern in set(re.findall(r"`([\w/*]+)`", names)) - {"kl"}:  # beta is 0
        assert any(re.fullmatch(pattern.replace("*", ".*"), key) for key in trainer.state.log_history[0]), pattern


def test_the_diffs_of_integrations_name_what_there_is():
    text = (DOCS / "integrations.md").read_text()
    lines = [line[1:] for block in re.findall(r"```diff\n(.*?)```", text, re.S) for line in block.splitlines() if line.startswith("+from ")]
    assert len(lines) >= 6
    for line in lines:
        (statement,) = ast.parse(line).body
        path = ROOT / (statement.module.replace(".", "/") + ".py")
        assert {alias.name for alias in statement.names} <= set(public_names(path)), line


def said(folder):
    """Every string of these sources, `..` where a value stands."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else ".." for part in node.values))
    return "\n".join(found)


def test_the_refusals_of_integrations_are_those_of_the_code():
    messages, checked = said(PACKAGE), 0
    for cells in [row for table in tables((DOCS / "integrations.md").read_text()) for row in table[1:]]:
        error = cells[1] if cells[0] in ("construction", "training") else cells[0]
        if len(cells) < 2 or "`" not in error or error.startswith(("`None", "`False", "`True")) or len(cells) > 3:
            continue
        for part in re.findall(r"`(.+?)`", error)[0].split(".."):
            assert part.strip(" ()") in messages, part
        checked += 1
    assert checked >= 18


# ---- the reference


def public_names(path):
    """Functions and classes that a module defines."""
    found = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in found if not name.startswith("_")]


def test_the_reference_has_every_public_name_once():
    listed = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    wanted = {f"grpo_kernels.{name}" for name in grpo_kernels.__all__} - {"grpo_kernels.reference"}
    wanted |= {"grpo_kernels.reference.grpo_loss", "grpo_kernels.trainer.GRPOConfig", "grpo_kernels.trainer.GRPOTrainer"}
    for path in (PACKAGE / "integrations").glob("*.py"):
        wanted |= {f"grpo_kernels.integrations.{path.stem}.{name}" for name in public_names(path)}
    assert set(listed) == wanted and len(listed) == len(wanted)


def test_every_document_is_in_the_navigation():
    listed = re.findall(r"(?m)^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    assert {path.name for path in DOCS.glob("*.md")} <= set(listed) and len(listed) == len(set(listed))
