"""Tables of the documents."""

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def table(file, heading):
    """Rows of the table below a heading, as lists of cells without their code marks."""
    section = (DOCS / file).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
