"""What `make docs` does beside mkdocs: README.md is the first page, links out of docs/ work, docstrings become tables.

mkdocs loads this file twice, for the functions `on_...` of its events and for the griffe extension `Docstrings`. grpo_kernels is
never imported: its sources are read.
"""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# shown as pages; other files are copied as they are
SHOWN = {".py": "python", ".yaml": "yaml", ".cu": "cuda", ".cpp": "cpp", ".h": "cpp", "": "text"}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]*)(#[^)\s]*)?(?=\))")  # target and anchor of a Markdown link


def on_files(files, config):
    """Adds README.md as index.md, and what the pages link to outside of docs/."""
    wanted, seen = {"README.md"}, set()
    for file in files.documentation_pages():
        wanted |= _outside((ROOT / "docs" / file.src_uri).read_text(), "docs")
    while wanted:
        name = wanted.pop()
        path = ROOT / name
        if name in seen or not path.exists():  # an absent one is a broken link, which --strict names
            continue
        seen.add(name)
        text = _text(path, name)
        if text is None:
            files.append(File.generated(config, _uri(name), abs_src_path=str(path)))
            continue
        folder = name if path.is_dir() else str(Path(name).parent)
        if path.suffix not in SHOWN or path.is_dir():
            wanted |= _outside(text, folder)
            text = _rewritten(text, folder, "../" * _uri(name).count("/"))
        files.append(File.generated(config, _uri(name), content=text))
    return files


def _text(path, name):
    """Markdown of a page that shows it; None for a file that is copied."""
    if path.is_dir():
        inside = sorted(x.name for x in path.iterdir() if x.is_file() and x.suffix in (*SHOWN, ".md"))
        return f"# {name}\n\n" + "".join(f"* [{x}]({x})\n" for x in inside)
    if path.suffix == ".md":
        return path.read_text()
    return f"# {name}\n\n````{SHOWN[path.suffix]}\n{path.read_text()}\n````\n" if path.suffix in SHOWN else None


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ go to the copies that `on_files` has made."""
    return _rewritten(markdown, "docs") if page.file.generated_by is None else markdown


def _resolved(target, folder):
    """Path from the top of the repository, of a link in a file of this folder."""
    parts = []
    for part in [*Path(folder).parts, *Path(target).parts]:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def _outside(text, folder):
    names = {_resolved(m[1], folder) for m in _LINK.finditer(text) if m[1]}
    return {name for name in names if not name.startswith("docs/")}


def _uri(name):
    """Where the site has a file of the repository, from its top."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name == "README.md":
        return "index.md"
    path = ROOT / name
    if path.suffix == ".md" and path.parent == ROOT:
        return name
    return f"source/{name}/index.md" if path.is_dir() else f"source/{name}" + (".md" if path.suffix in SHOWN else "")


def _rewritten(text, folder, up=""):
    return _LINK.sub(lambda m: (up + _uri(_resolved(m[1], folder)) if m[1] else "") + (m[2] or ""), text)


class Docstrings(griffe.Extension):
    """Docstrings as this project writes them, for griffe's reader of Google's style.

    Several names of one entry become as many entries. Returns is text: its first words are no type. A name of the reference in
    backticks becomes a link. A dataclass field that is an `option(default, text)` has the text as its docstring.
    """

    def __init__(self):
        super().__init__()
        listed = re.findall(r"^::: (grpo_kernels\S*)", (ROOT / "docs" / "api.md").read_text(), re.M)
        self._links = {path.rpartition(".")[2]: path for path in listed}
        self._links["reference.grpo_loss"] = "grpo_kernels.reference.grpo_loss"

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = self._mended(obj.docstring.value, obj.name)

    def on_attribute_instance(self, *, node, attr, **_):
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) == "option":
            default, text = value.args
            attr.value, attr.docstring = ast.unparse(default), griffe.Docstring(text.value, parent=attr)

    def _mended(self, text, own):
        text = re.sub(r"(?m)^(Args|Attributes):\n((?: {4}.*\n?)+)", lambda m: f"{m[1]}:\n{_entries(m[2])}", text)
        text = re.sub(r"^Returns:\n((?: {4}.*\n?|\n)+)", lambda m: f"**Returns**\n\n{_dedented(m[1])}\n\n", text, flags=re.M)

        def linked(match):
            path = self._links.get(match[1])
            return match[0] if path is None or match[1] == own else f"[`{match[1]}`][{path}]"

        text = re.sub(r"(?<![`\w])`([\w.]+)`(?!`)", linked, text)
        return re.sub(r"\bdocs/([\w-]+)\.md\b", r"[\1](\1.md)", text)


def _entries(text):
    """Of a section Args: one entry a name."""
    found = []
    for entry in re.split(r"\n(?= {4}\S)", text):
        names, colon, rest = entry.partition(": ")
        names = re.split(r",\s+", names.strip())
        single = not colon or not all(re.fullmatch(r"\*{0,2}\w+", name) for name in names)
        found += [entry] if single else [f"    {name}: {rest}" for name in names]
    return "\n".join(found)


def _dedented(text):
    return "\n".join(line.removeprefix("    ") for line in text.splitlines()).strip()
