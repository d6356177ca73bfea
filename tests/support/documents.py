"""Parts of the documents: sections, tables, snippets."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def section(file, heading):
    """Of a file of docs/, ../README.md for one beside it."""
    return (DOCS / file).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def tables(text):
    """Each table with its head, as lists of rows of cells."""
    found, last = [], -2
    for i, line in enumerate(text.splitlines()):
        if line.startswith("|"):
            if i != last + 1:
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s)", line.strip("|"))])
            last = i
    return [rows[:1] + rows[2:] for rows in found]


def table(file, heading):
    """The first table below a heading, without code marks."""
    return [[cell.replace("`", "") for cell in row] for row in tables(section(file, heading))[0]]


def snippets(file):
    """The sources of its Python, {heading and number: source}."""
    found, heading = {}, ""
    for block in re.split(r"(?m)^(?=## |```python\n)", (DOCS / file).read_text()):
        if block.startswith("```python\n"):
            count = sum(name.rpartition(" ")[0] == heading for name in found)
            found[f"{heading} {count + 1}"] = block.removeprefix("```python\n").split("```")[0]
        elif block.startswith("## "):
            heading = block.split("\n")[0][3:]
    return found


def runs_as_it_says(source, space):
    """Runs it in ``space``; every `print(...)  # answer` must print the answer, and nothing else be printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(source, space)
    assert [line for line in out.getvalue().splitlines() if line] == re.findall(r"^print\(.*\)\s+# (.*)$", source, re.M)
    return space
