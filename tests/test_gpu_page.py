"""docs/gpu.md: predicted times against the planner, stages against the harness, counts against the judges of compiled code."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from support.documents import ROOT, section, tables

from benchmarks import occupancy
from benchmarks.gpu import __main__ as harness
from grpo_kernels import backends, build_cuda, cli
from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEVICES, Problem, predict

TEXT = (ROOT / "docs" / "gpu.md").read_text()
WORDS = " ".join(TEXT.split())  # whatever the lines are broken at
(JUDGE,) = (path for path in (ROOT / "benchmarks").glob("compiled*.py") if "\nCASES = " in path.read_text())


def below(heading):
    """Each table below a heading: {first cell: other cells}."""
    return [{row[0]: row[1:] for row in rows[1:]} for rows in tables(section("gpu.md", heading))]


def asked(device="h200", depth=4096, **more):
    options = dict(live=8192, dead=0, vocab=151_936, depth=depth, element_size=2, tile_size=4, needs_hidden=True, needs_weight=True,
                   budget=DEFAULT_GPU_WORKSPACE_BYTES, device=DEVICES[device])  # fmt: skip
    return Problem(**(options | more))


def test_what_has_run_is_what_the_tests_are():
    assert TEXT.index("No GPU has run this version") < 100
    files = re.findall(r"`(?:tests/)?(test_\w+\.py)`", section("gpu.md", "What has run where"))
    assert len(files) >= 10 and all((ROOT / "tests" / name).exists() for name in files)
    assert 'skipif(not torch.cuda.is_available(), reason="needs a GPU")' in (ROOT / "tests/test_gpu.py").read_text()


def test_no_record_is_of_a_gpu():
    """Of those that are committed: once there is one, the page must say so."""
    done = subprocess.run(["git", "ls-files", "benchmarks/results/*.json"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("no checkout")
    assert {row["device"] for file in done.stdout.split() for row in json.loads((ROOT / file).read_text())} == {"cpu"}


@pytest.mark.parametrize("call, problem", [
    ("one pass", asked()), ("one pass, frozen head (`--frozen`)", asked(needs_weight=False)),
    ("log-probs only (`--logprobs`)", asked(live=0, dead=8192, needs_hidden=False, needs_weight=False)),
    ("two phases (`--two-phase`)", asked(two_phases=True)),
    ("beside a teacher of depth 8192 (`--teacher-depth 8192`)", asked(teacher_depth=8192, teacher_size=2)),
    ("over supports of 8 tokens (`--support 8`)", asked(pairs=8 * 8192)),
    ("A100", asked("a100")), ("H100", asked("h100")), ("B200", asked("b200")), ("H200, D 2048", asked(depth=2048)), ("H200, D 896", asked(depth=896)),
])  # fmt: skip
def test_the_predicted_times_are_the_planners(call, problem):
    (cells,) = (table[call] for table in below("Predicted times") if call in table)
    found = predict(problem)
    wanted = [found.floor_ms, found.predicted_ms, found.ratio, found.peak_bytes / 2**30]
    for cell, value, unit in zip(cells, wanted, (" ms", " ms", "", " GiB"), strict=True):
        digits = len(cell.removesuffix(unit).partition(".")[2])
        assert cell == "-" if cell == "-" else cell == f"{value:.{digits}f}{unit}", (cell, value)
    assert ("-" in cells) == bool(problem.pairs), "a support leaves no product to compare with"


def test_the_command_predicts_the_same(capsys, monkeypatch):
    """With the flags in a row's first cell."""
    monkeypatch.delenv("GRPO_KERNELS_WORKSPACE_MB", raising=False)
    first, second = below("Predicted times")
    assert len(first) == 6 and len(second) == 5
    (command,) = re.findall(r"^grpo-kernels (plan .*)$", TEXT, re.M)
    for call, cells in first.items():
        flags = re.search(r"`(--.*)`", call)
        argv = shlex.split(command) + (shlex.split(flags[1]) if flags else []) + ["--json"]
        assert cli.main(argv) == 0
        predicted, digits = json.loads(capsys.readouterr().out)["predicted_ms"], len(cells[1].removesuffix(" ms").partition(".")[2])
        assert cells[1] == f"{predicted:.{digits}f} ms", call


def test_the_constants_are_shares_of_data_sheets():
    """H200: 989 TFLOP/s of bf16 and 4.8 TB/s."""
    assert DEVICES["h200"].tflops / 989 == pytest.approx(0.8, abs=0.005) and DEVICES["h200"].bandwidth / 4.8e12 == pytest.approx(0.9, abs=0.005)
    assert "80 % of a data sheet's products and 90 % of its memory" in WORDS
    assert f"workspace is {DEFAULT_GPU_WORKSPACE_BYTES >> 20} MiB" in WORDS
    listed = re.search(r"`--device` is (.*?);", WORDS)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(DEVICES)


def test_the_stages_are_those_of_the_harness():
    (table,) = (found for found in below("`make gpu`") if "`decide`" in found)
    limits = {name.split(":")[0]: seconds for name, (seconds, _) in harness.STAGES.items() if name != "peers:full_logits-compiled"}
    assert [name.strip("`") for name in table] == list(limits)
    for name, seconds in limits.items():
        cell = table[f"`{name}`"][0]
        assert cell == "what is left" if name == "sanitize" else re.match(r"(\d+) s", cell)[1] == str(seconds)
    assert f"{harness.STAGES['peers:full_logits-compiled'][0]} s where it compiles" in table["`peers`"][1]
    assert f"{harness.parser().get_default('minutes')} minutes at most" in WORDS
    commands = [shlex.split(text) for text in re.findall(r"GPU_ARGS=\"(.*?)\"", TEXT)]
    assert len(commands) == 4
    for arguments in commands:
        harness.parser().parse_args(arguments)


def test_the_variants_are_counted():
    values = {node.targets[0].id: node.value for node in ast.parse(JUDGE.read_text()).body
              if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    cases, products, architectures = (ast.literal_eval(values[name]) for name in ("CASES", "PRODUCTS", "ARCHITECTURES"))
    count = sum(map(len, cases.values())) + len(products)
    assert f"It compiles {count} Triton variants for sm_{architectures[0]}, sm_{architectures[1]} and sm_{architectures[2]}" in WORDS
    assert f"OTHER_TRITON ?= {re.search(r'with the installed Triton and with (.*?),', ' '.join(TEXT.split()))[1]}" in (ROOT / "Makefile").read_text()
    assert len(build_cuda.ARCHITECTURES) == 6 and "for six architectures" in WORDS
    listed = re.search(r"compute capability (.*?);", WORDS)[1].replace(" and ", ", ").split(", ")
    assert listed == [f"{int(name.rstrip('a')) / 10:.1f}" for name in build_cuda.ARCHITECTURES]


def test_the_bytes_under_way_are_littles_law():
    h200 = occupancy.GPUS["90"]
    assert f"an H200 needs {h200.bandwidth * occupancy.LATENCY / h200.multiprocessors / 1e3:.0f} KB" in WORDS


CHECK = f"""
from benchmarks import {JUDGE.stem} as judge
print(*(found["issue"] / found["memory"] for found in (judge.row("jensen_shannon", of) for of in (80, 90))))
"""


def test_the_kernel_that_computes_longer_than_it_reads():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # whose functions cannot be compiled
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=ROOT, env=environment)
    a100, h200 = map(float, done.stdout.split())
    assert f"{a100:.1f} times on an A100 and {h200:.1f} times on an H200" in WORDS, done.stderr


def test_the_backends_are_those_of_the_package():
    (table,) = below("Backends")
    assert {name.strip("`") for name in table} == {*backends.available_backends(), "auto"} - {"cpu"}
    assert "GRPO_KERNELS_BACKEND" in WORDS and "--build-cuda" in cli.USAGE
