"""docs/benchmarks.md: its tables against the records, its prose free of figures, its links and commands against what is there."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from grpo_kernels.bench import command, plot, scaling
from grpo_kernels.bench.providers import PROVIDERS
from grpo_kernels.bench.shapes import MODELS
from grpo_kernels.bench.workloads import WORKLOADS
from grpo_kernels.engine.plan import DEFAULT_WORKSPACE_BYTES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "docs" / "benchmark_tables.py")
spec.loader.exec_module(tables := importlib.util.module_from_spec(spec))


def prose():
    """The page without its generated blocks."""
    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", PAGE.read_text(), flags=re.S)


def test_the_tables_are_those_of_the_records():
    assert PAGE.read_text() == tables.written(PAGE.read_text()), "run python docs/benchmark_tables.py"


def test_a_figure_that_differs_is_found():
    text = PAGE.read_text()
    figure = re.search(r"<!-- time -->.*?(\d\.\d\d) s", text, re.S)
    spoilt = text[: figure.start(1)] + "0.01" + text[figure.end(1) :]
    assert spoilt != text == tables.written(spoilt)


def test_the_first_table_against_the_record_by_hand():
    """Not through the functions of the script."""
    rows = {(r["path"], r["provider"]): r for r in json.loads((ROOT / "benchmarks/results/cpu.json").read_text())}
    text = PAGE.read_text()
    block = re.search(r"<!-- time -->(.*?)<!-- /time -->", text, re.S)[1]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")]
    columns = {"full logits": "full_logits", "full logits, `torch.compile`": "full_logits-compiled", "TRL": "trl", "Liger": "liger"}
    paths = {"dense": "dense", "frozen head": "frozen", "log-probs only": "logprobs"}
    found = {line[0]: line for line in lines}
    for title, path in paths.items():
        ours = rows[path, "grpo_kernels"]
        assert found[title][1] == f"{ours['median']:.2f} s"
        assert found[title][2].startswith(f"{ours['ratio']:.2f} [{ours['ratio_range'][0]:.2f}")
        for called, provider in columns.items():
            (at,) = (i for i, name in enumerate(head) if re.fullmatch(rf"{re.escape(called)}( [\d.]+)?", name))
            other, cell = rows[path, provider]["median"], found[title][at].strip("*")
            assert cell == "-" if other is None else float(cell.removesuffix(" x")) == pytest.approx(other / ours["median"], abs=0.051)


@pytest.mark.parametrize("name, picture", [("cpu", "time"), ("cpu-scaling", "memory")])
def test_the_pictures_are_those_of_the_records(name, picture, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    results = ROOT / "benchmarks" / "results"
    drawn, (made,) = (results / name / f"{picture}.svg").read_text(), plot.plot(json.loads((results / f"{name}.json").read_text()), tmp_path)
    assert f"(../benchmarks/results/{name}/{picture}.svg)" in PAGE.read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in drawn:
        pytest.skip("drawn by another version of matplotlib")
    assert made.read_text() == drawn, f"run grpo-kernels bench --from benchmarks/results/{name}.json --plot benchmarks/results/{name}"


def test_what_is_faster_or_smaller_than_ours_is_bold():
    ours = {"median": 2.0, "peak_bytes": 100 * 2**20}
    faster, slower = ({"median": m, "peak_bytes": b * 2**20} for m, b in ((1.0, 50), (3.0, 200)))
    assert tables.times_ours(faster, ours) == "**0.5 x**" and tables.times_ours(slower, ours) == "1.5 x"
    assert tables.beside(faster, ours) == "**50**" and tables.beside(slower, ours) == "200"
    assert tables.times_ours(None, ours) == tables.beside({"peak_bytes": None}, ours) == "-"


def test_a_share_of_the_head_within_the_noise_is_no_result():
    assert tables.head_share([8.0, 10.0], [4.0, 6.0]) == "25% to 60%"
    assert tables.head_share([5.0, 10.0], [4.0, 6.0]) == "up to 60%" and tables.head_share([3.0], [4.0]) == "up to 0%"


def test_the_prose_has_no_figure_but_those_of_the_code():
    known = {f"{DEFAULT_WORKSPACE_BYTES >> 20} MiB", f"{scaling._LONGEST:.0f} s", "5 x"}  # the last explains a column
    assert set(re.findall(r"\b\d[\d.,]* ?(?:s|ms|x|%|[KMG]iB)(?!\w)", prose())) == known


def test_the_prose_agrees_with_the_code():
    text = " ".join(prose().split())
    assert f"{command.CPU_TOKENS} tokens, D {MODELS['qwen2.5-0.5b'][0]}, V {MODELS['qwen2.5-0.5b'][1]:,}" in text
    assert f"at {command.QUICK_TOKENS} tokens" in text
    assert (command.QUICK_SECONDS_PEERS // 60, command.QUICK_SECONDS // 60) == (5, 2), "minutes of --quick"
    assert len(command.QUICK_WORKLOADS) == 4


def test_the_commands_are_understood():
    commands = re.findall(r"grpo-kernels (bench(?: [^`\n]*)?)", PAGE.read_text().replace("\\\n", " "))
    assert len(commands) >= 8
    for text in commands:
        options = command.parser().parse_args(shlex.split(text)[1:])
        assert set((options.workloads or "dense").split(",")) <= WORKLOADS.keys()
        assert set((options.providers or "trl").split(",")) <= set(PROVIDERS)
