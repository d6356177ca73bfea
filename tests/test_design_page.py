"""docs/design.md: its pictures against the script, its counts against the planner, its modules against the package."""

import ast
import inspect
import re

import pytest
from support.documents import ROOT, section, tables

from docs import design_pictures as drawing
from grpo_kernels import backends
from grpo_kernels.backends import pytorch
from grpo_kernels.engine.plan import DEFAULT_GPU_WORKSPACE_BYTES, DEFAULT_WORKSPACE_BYTES, peak_bytes, plan

TEXT = (ROOT / "docs" / "design.md").read_text()


def rows(heading):
    """Of the table below a heading."""
    return tables(section("design.md", heading))[0][1:]


def test_the_pictures_are_drawn_by_the_script_as_it_is():
    drawn = drawing.pictures()
    assert {path.stem for path in drawing.FOLDER.iterdir()} == set(drawn)
    for name, picture in drawn.items():
        assert (drawing.FOLDER / f"{name}.svg").read_text() == picture, f"{name}: run python -m docs.design_pictures"
        assert f"](design/{name}.svg)" in TEXT


def test_the_picture_of_the_passes_has_the_steps_of_the_plan():
    found = {(call.name, call.about): (*drawing.order(call), drawing.work(call.problem)) for call in drawing.CALLS}
    assert found["one pass", "each row by itself"] == (["logits", "policy", "dH", "dW"], [], "6NVD")
    assert found["two phases", "all rows stashed"] == (["logits", "statistics", "stash"], ["dH", "dW"], "6NVD")
    assert found["two phases", "nothing stashed"] == (["logits", "statistics"], ["logits", "gradient", "dH", "dW"], "8NVD")
    assert found["log-probs", "no gradient"] == (["logits", "statistics"], [], "2NVD")


def test_the_terms_of_the_peak_are_its_formula():
    for tokens in (128, 5000, 200_000):
        for trained in (True, False):
            asked = drawing.problem(tokens, needs_weight=trained)
            sizes = drawing.terms(asked)
            assert sum(sizes.values()) == peak_bytes(asked, tokens)
            bound = sizes["dH"] + DEFAULT_GPU_WORKSPACE_BYTES + 4 * asked.vocab * asked.depth * trained
            assert sum(sizes.values()) <= bound
            inside = sum(sizes.values()) - sizes["dH"] - sizes["dW"]
            spare = 2 * asked.vocab * asked.depth * (trained and plan(asked).direct)
            assert inside <= DEFAULT_GPU_WORKSPACE_BYTES + spare
    assert f"{DEFAULT_GPU_WORKSPACE_BYTES >> 20} MiB on a GPU and {DEFAULT_WORKSPACE_BYTES >> 20} MiB on a CPU" in " ".join(TEXT.split())


KINDS = {
    "scored only": dict(live=0, dead=drawing.N, needs_hidden=False), "one pass": {}, "two phases, stashed": dict(two_phases=True),
    "two phases, recomputed": dict(two_phases=True, budget=2**20), "two heads": dict(teacher_depth=2048, teacher_size=2),
    "over supports": dict(pairs=8 * drawing.N),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_counts_of_the_table_are_those_of_the_plan(kind):
    (cells,) = (row for row in rows("What is counted as work") if row[0].startswith(kind))
    assert len(rows("What is counted as work")) == len(KINDS)
    for cell, trained in zip(cells[1:], (True, False), strict=True):
        asked = drawing.problem(drawing.N, **{"needs_weight": trained and kind != "scored only", **KINDS[kind]})
        operations = {"NVD": 0, "NVD'": 0}
        for step in drawing.steps(asked, plan(asked)):
            teacher = step.what == "teacher logits"
            unit = drawing.N * asked.vocab * (asked.teacher_depth if teacher else asked.depth)
            operations["NVD'" if teacher else "NVD"] += 2 * step.count * step.m * step.n * step.k / unit
        written = dict.fromkeys(operations, 0) | {unit: int(n) for n, unit in re.findall(r"(\d+)(NVD'?)", cell)}
        assert operations == pytest.approx(written), cell


def test_the_modules_are_there():
    package = ROOT / "grpo_kernels"
    for name in re.findall(r"`([\w*/]+\.(?:py|cu))`", TEXT):
        where = [ROOT, package, *(package / room for room in ("trainer", "integrations", "engine", "backends", "losses"))]
        assert any(list(folder.glob(name)) for folder in where), name
    written = " ".join(cell for row in rows("Where things are") for cell in row)
    for room in ("backends", "losses", "integrations"):
        missing = {path.name for path in (package / room).glob("*.py")} - set(re.findall(r"\w+\.py", written)) - {"__init__.py"}
        assert not missing, f"{room}: {missing}"


def test_the_contract_names_the_functions_of_the_backends():
    named = {name: cell for cell, _ in rows("What a backend is") for name in re.findall(r"(\w+)(?=\(|`)", cell)}
    for name, cell in named.items():
        function = getattr(pytorch, name, None)
        if name in ("policy", "divergence"):
            assert function is None and hasattr(backends.kernels("triton"), "policy"), "optional: the readable backend has it not"
            continue
        if given := re.search(rf"{name}\((.+)\)", cell):
            assert given[1].split(", ") == list(inspect.signature(function).parameters), name
    in_docstring = set(re.findall(r"^    (\w+)\(", ast.get_docstring(ast.parse(inspect.getsource(pytorch)), clean=False), re.M))
    assert in_docstring <= set(named) and "why_unavailable" in named
