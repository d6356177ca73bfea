"""examples/tour.ipynb: a notebook of format 4.5 without outputs, whose cells run in order and prove what their text says."""

import ast
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"
RUN = """
import ast, json, sys
scope = {"__name__": "__main__"}
for name, source in json.load(sys.stdin):
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, name, "exec"), scope)
        shown = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), scope)
    except Exception as error:
        raise SystemExit(f"cell {name}: {type(error).__name__}: {error}")
    print(name, repr(shown).replace("\\n", " "))
"""
notebook = json.loads(TOUR.read_text())


def code():
    return [[cell["id"], "".join(cell["source"])] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(cells):
    """(what each cell shows, what stopped them): one process, as a notebook's kernel is."""
    done = subprocess.run([sys.executable, "-c", RUN], input=json.dumps(cells), capture_output=True, text=True, timeout=300,
                          cwd=TOUR.parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), done.stderr.strip() if done.returncode else ""


def test_it_is_a_notebook_of_format_4_5_without_outputs():
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
        assert cell.keys() == wanted and cell["cell_type"] in ("code", "markdown"), cell["id"]
        assert cell["source"] and all(line.endswith("\n") for line in cell["source"][:-1]), cell["id"]


def test_a_text_stands_before_each_cell_of_code_and_the_cell_shows_a_value():
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == kinds[-1] == "markdown" and ("code", "code") not in pairwise(kinds)
    for name, source in code():
        assert isinstance(ast.parse(source).body[-1], ast.Expr), name
        assert "assert" in source or name in ("problem", "naive"), name


def test_its_cells_run():
    shown, stopped = run(code())
    assert not stopped and list(shown) == [name for name, _ in code()]
    assert all(value != "None" for value in shown.values()), shown


@pytest.mark.parametrize("old, new, cell", [("1 + epsilon", "1 + 2 * epsilon", "fused"), ("(log_p - log_q)", "log_p", "kl"),
                                            ("~left", "left", "support")])  # fmt: skip
def test_its_assertions_see_a_wrong_formula(old, new, cell):
    """Of the cells before the one that compares, only those run that it needs."""
    needed = {"fused": ("problem", "advantages", "naive"), "kl": ("problem", "advantages", "fused", "logprobs"), "support": ("problem", "logprobs")}
    source = dict(code())
    cells = [[name, source[name]] for name in (*needed[cell], cell)]
    if cell == "kl":
        cells[2][1] = "from grpo_kernels import fused_linear_grpo_loss"
    assert any(old in text for _, text in cells)
    scope = {}
    with pytest.raises(AssertionError):
        for name, text in cells:
            reached = name
            exec(compile(text.replace(old, new), name, "exec"), scope)
    assert reached == cell
