"""README.md: short, its code runs as it stands, every figure is that of a record, every link leads somewhere."""

import json
import os
import re
import subprocess
import sys
from inspect import signature

import pytest
from support.documents import ROOT, section

import grpo_kernels
from grpo_kernels.losses.config import LOSS_TYPES, TRL_LOSS_TYPES

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"


def test_the_readme_is_one_that_is_read():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1100


def test_the_first_code_gives_the_same_loss_twice(tmp_path):
    """As it stands, in a process of its own: what is replaced and what replaces it print one number."""
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert "[:, :-1]" in snippet and "tokens[:, 1:]" in snippet and ".backward()" in snippet
    path = tmp_path / "snippet.py"
    path.write_text("import torch\ntorch.manual_seed(0)\n" + snippet + "\nassert hidden.grad.norm() > 0 and weight.grad.norm() > 0")
    found = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    ours, naive = map(float, found.stdout.split())
    assert ours == pytest.approx(naive, rel=1e-5) and abs(ours) > 1e-3


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# ---- figures ----


def records(name):
    return json.loads((RESULTS / name).read_text())


def table():
    """The lines of README's table, made of the records."""
    found = {(row["path"], row["provider"]): row for row in records("cpu.json")}
    head = "| | seconds: ours | x products | full logits | TRL 1.16 | Liger 0.8.5 | peak MiB: ours | full logits | TRL | Liger |"
    lines = [head, "|---" * 10 + "|"]
    names = {"dense": "loss and gradients", "frozen": "frozen head (LoRA)", "logprobs": "log-probs only",
             "realistic": "{kept} tokens kept, {live} with an advantage"}  # fmt: skip
    for path, name in names.items():
        rows = [found[path, provider] for provider in ("grpo_kernels", "full_logits", "trl", "liger")]
        seconds = [f"{row['median']:.2f}" if row["median"] is not None else "" for row in rows]
        peaks = [f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] is not None else "" for row in rows]
        cells = [name.format(**rows[0]), seconds[0], f"{rows[0]['ratio']:.2f}", *seconds[1:], *peaks]
        lines.append(("| " + " | ".join(cells) + " |").replace("  ", " "))
    step = {row["provider"]: row for row in records("cpu-step.json") if row["shape"]["tokens"] == 1187}
    ours, stock = step["trl fused"], step["trl stock"]
    peaks = [f"{row['peak_bytes'] / 2**20:,.0f}" for row in (ours, stock)]
    lines.append(f"| TRL's optimiser step | {ours['median']:.1f} | | | {stock['median']:.1f} | | {peaks[0]} | | {peaks[1]} | |")
    return lines


def test_the_table_is_that_of_the_records():
    shown = [line for line in README.splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(shown) if "x products" in line)
    wanted = table()
    assert shown[start : start + 6] == [wanted[0], *wanted[2:]], "README's table should be\n" + "\n".join(wanted)


def test_the_figures_of_the_text_are_those_of_the_records():
    rows = {(row["path"], row["provider"]): row for row in records("cpu.json")}
    first = rows["dense", "grpo_kernels"]
    versions = first["versions"]
    assert versions["trl"].startswith("1.16.") and versions["liger-kernel"] == "0.8.5"
    assert (first["cores"], first["isa"], first["rounds"]) == (2, "AVX512", 5)
    shape = first["shape"]
    names = [[cell.strip() for cell in line.split("|")[2:5]] for line in (ROOT / "docs/losses.md").read_text().splitlines() if line.startswith("|")]
    of_verl = {name.strip("`") for name, _, verl in filter(lambda cells: len(cells) == 3, names) if name == verl and name.strip("`") in LOSS_TYPES}
    of_verl -= set(TRL_LOSS_TYPES)
    said = {
        f"D {shape['depth']}, V {shape['vocab']:,}",
        f"{shape['tokens']:,} tokens, medians of five rounds",
        f"frozen head: {rows['frozen', 'liger']['peak_bytes'] / 2**20:.0f} MiB",
        f"the logits alone are {8192 * shape['vocab'] * 2 / 2**30:.1f} GiB in bf16",
        "1,187 trained tokens",
        f"TRL's {['eight', 'nine'][len(TRL_LOSS_TYPES) - 8]}",
        f"verl's {['nine', 'ten', 'eleven', 'twelve'][len(of_verl) - 9]}",
        f'`loss_type="dapo"` and {len(LOSS_TYPES) - 1} more',
    }
    one_line = " ".join(README.split())
    assert not {text for text in said if text not in one_line}
    # nothing else in the text may pass for a measurement
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    assert set(re.findall(r"\d[\d,.]* (?:s|ms|MiB|GiB|x|times|%)\b", prose)) == {
        f"{rows['frozen', 'liger']['peak_bytes'] / 2**20:.0f} MiB", "2.3 GiB"}  # fmt: skip


# ---- what it names ----


def test_it_leads_to_every_page():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in README, f"README does not lead to {page.name}"


def test_every_name_of_the_options_exists():
    options = section("../README.md", "Options")
    names = set(re.findall(r"`([a-z_]+)", options, re.I)) - {"dapo"}
    fields = {*grpo_kernels.GRPOLossConfig.__dataclass_fields__, *grpo_kernels.__all__}
    arguments = {*signature(grpo_kernels.fused_linear_grpo_loss).parameters, *signature(grpo_kernels.linear_logprobs).parameters}
    assert not names - fields - arguments - set(grpo_kernels.available_backends())
    assert set(re.findall(r"`(torch|cpu|triton|cuda)`", options)) == set(grpo_kernels.available_backends())
