"""CONTRIBUTING.md, CI and the release, against the tree: every module has its row, and what is named exists."""

import datetime
import fnmatch
import functools
import importlib.util
import re
import subprocess
import tarfile
import zipfile

import pytest
from support.documents import ROOT, section, tables

from grpo_kernels.backends import native

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="runs in a source tree")
ELSEWHERE = ("csrc/", "benchmarks/", "docs/", "examples/", "tests/", ".ci/", ".github/", "README.md", "CONTRIBUTING.md")


def words(text):
    """The code words of each cell of its first table, row after row."""
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in tables(text)[0][1:]]


MODULES = [([name if name.startswith(ELSEWHERE) else f"grpo_kernels/{name}" for name in names], tests)
           for names, tests in words(section("../CONTRIBUTING.md", "Which test guards which module"))]  # fmt: skip


def sources():
    """What somebody may change and a test must guard."""
    folders, kinds = ("grpo_kernels", "csrc", "benchmarks", "docs", "examples", "tests/support"), {".py", ".h", ".cuh", ".cu", ".cpp", ".md", ".ipynb"}
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    found += [*(ROOT / ".ci").iterdir(), *(ROOT / ".github").rglob("*.yml"), *map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "tests/conftest.py"))]
    return sorted(str(path.relative_to(ROOT)) for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts))


def covers(name, path):
    return path.startswith(name) if name.endswith("/") else fnmatch.fnmatch(path, name)


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_every_module_has_a_row():
    names = [name for row, _ in MODULES for name in row]
    missing = [path for path in sources() if not any(covers(name, path) for name in names)]
    assert not missing, f"CONTRIBUTING.md has no row for {', '.join(missing)}"


def test_every_name_of_the_table_is_in_the_tree():
    there = sources()
    gone = [name for row, _ in MODULES for name in row if not any(covers(name, path) for path in there)]
    assert not gone, f"CONTRIBUTING.md names what is not there: {', '.join(gone)}"


def test_every_test_file_guards_something():
    named = {name for _, tests in MODULES for name in tests}
    there = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert named - there == set(), "CONTRIBUTING.md names test files that are not there"
    assert there - named == set(), "these test files are in no row of CONTRIBUTING.md"


FOLDERS = ("grpo_kernels", "csrc", "tests", "benchmarks", "docs", "examples", ".ci", ".github")
# a file by its ending, or whatever is in one of our folders
FILE = re.compile(r"[\w./*-]+\.(?:py|md|json|ya?ml|ipynb|svg|png|css|toml|txt|h|cuh?|cpp)|(?:{})/[\w./*-]*".format("|".join(map(re.escape, FOLDERS))))
NOT_OURS = {
    "run.yaml", "train.py", "my_rewards.py", "my_plugin.py", "here.json",  # the reader's
    "complete.json", "openapi.json", "benchmarks/results/latest.json",  # written by a run, a server, a benchmark
    "utils.py",  # never to be made
}  # fmt: skip


@functools.cache
def tree_names():
    """Names without their folders."""
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {path.name for path in ROOT.iterdir()}


def is_there(name, page):
    """A path from the top, the package, the tests or the page; a name without folder is that of some file."""
    folders = (ROOT, ROOT / "grpo_kernels", ROOT / "tests", page.parent)
    return name in tree_names() or any(next(folder.glob(name), None) if "*" in name else (folder / name).exists() for folder in folders)


def titles(page):
    """The anchors of a page's headings."""
    return {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", page.read_text(), re.M)}


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page):
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    words = [word.strip("\"',()") for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split()]
    files = {name for name, _, _ in (word.partition("::") for word in words) if FILE.fullmatch(name) and "NAME" not in name} - NOT_OURS
    gone = [name for name in sorted(files) if not is_there(name, page)]
    modules = set(re.findall(r"`python -m ((?:grpo_kernels|benchmarks)[\w.]*)", prose))
    gone += [name for name in sorted(modules) if not any((ROOT / (name.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py"))]
    targets = set(re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", prose))
    gone += [name for name in sorted(targets) if not (page.parent / name).exists()]
    anchors = {link for link in re.findall(r"\]\((?![a-z]+:)([^)\s]*#[^)\s]+)", prose)}
    gone += [link for link in sorted(anchors) if link.partition("#")[2] not in titles(page.parent / (link.partition("#")[0] or page.name))]
    tests = [(ROOT / file, test) for file, colons, test in (word.partition("::") for word in words) if colons and FILE.fullmatch(file)]
    gone += [f"{file.name}::{test}" for file, test in tests if not file.exists() or f"def {test}(" not in file.read_text()]
    assert not gone, f"{page.name} names what is not in the tree: {', '.join(gone)}"


def makefile():
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def workflow():
    return (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_every_target_exists():
    ci = set(re.findall(r"run: make ([a-z-]+)$", workflow(), re.M))
    ci |= set(re.search(r"target: \[(.*)\]", workflow())[1].split(", "))
    run = set(re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), re.M))
    shown = {name.removeprefix("make ") for (name,), *_ in words(TEXT.split("\n## ")[0])}
    said = set(re.findall(r"`make ([a-z-]+)`", TEXT)) | shown
    for where, names in (("ci.yml", ci), (".ci/run", run), ("CONTRIBUTING.md", said)):
        assert len(names) > 3 and names - makefile() == set(), f"{where} names targets that the Makefile does not have"
    assert makefile() - {"clean"} == shown, "the table of CONTRIBUTING.md is that of the Makefile"
    phony = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    assert phony == makefile()


# ---- make release


def released(name="release"):
    """A script of `make release` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture
def tree(tmp_path):
    """A repository of what the checks of a release read."""
    def write(version="1.2.3", entry="1.2.3 (2026-01-02)"):
        (tmp_path / "grpo_kernels").mkdir(exist_ok=True)
        (tmp_path / "grpo_kernels" / "__init__.py").write_text(f'"""A package."""\n__version__ = "{version}"\n')
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {entry}\n\n- a change\n\n## 1.2.2 (2025-12-31)\n")
        git("add", "-A")
        git("commit", "-qm", "a commit", "--allow-empty")
        return tmp_path

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    write.git = git
    return write


TODAY = datetime.date(2026, 2, 1)


def test_a_tree_whose_version_changelog_and_commits_agree_may_be_released(tree):
    release = released()
    assert release.checked(tree(), TODAY) == ("1.2.3", "2026-01-02")
    assert release.checked(tree(entry="1.2.3 (unreleased)"), TODAY) == ("1.2.3", "unreleased")
    tree.git("tag", "v1.2.3")
    assert release.checked(tree("1.2.4", "1.2.4 (2026-02-01)"), TODAY) == ("1.2.4", "2026-02-01")


@pytest.mark.parametrize("written, said", [
    ({"version": "1.2.4"}, "__version__ is 1.2.4, the first entry of CHANGELOG.md is of 1.2.3"),
    ({"entry": "1.2.3"}, r"must read '## version \(date\)', got '## 1.2.3'"),
    ({"entry": "1.2.3 (soon)"}, "must read"),
    ({"entry": "1.2.3 (2026-02-31)"}, "2026-02-31 is no date"),
    ({"entry": "1.2.3 (2026-02-02)"}, "2026-02-02 is in the future"),
])  # fmt: skip
def test_what_keeps_a_tree_from_being_released(tree, written, said):
    release = released()
    with pytest.raises(release.ReleaseError, match=said):
        release.checked(tree(**written), TODAY)


def test_neither_a_changed_tree_nor_a_tagged_version_is_released(tree):
    release, root = released(), tree()
    (root / "new.py").write_text("")
    with pytest.raises(release.ReleaseError, match=r"not clean(.|\n)*new.py"):
        release.checked(root, TODAY)
    (root / "new.py").unlink()
    tree.git("tag", "v1.2.3")
    assert release.checked(root, TODAY), "the tag of this commit"
    with pytest.raises(release.ReleaseError, match="v1.2.3 is another commit: raise __version__"):
        release.checked(tree(), TODAY)


def test_only_a_checkout_is_released(tree):
    release, root = released(), tree()
    (root / ".git").rename(root / "not-git")
    with pytest.raises(release.ReleaseError, match="is no git checkout"):
        release.checked(root, TODAY)


def test_an_environment_in_the_tree_does_not_change_it(tree):
    """`make release VENV=env`: what .gitignore does not know."""
    release, root = released(), tree()
    done = subprocess.run(["make", "-f", ROOT / "Makefile", "VENV=env", "env/.gitignore"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (root / "env" / "pyvenv.cfg").write_text("")
    assert release.checked(root, TODAY)
    for target in ("release", r"\$\(STAMP\)", r"\$\(VENV\)/docs/\.installed"):
        assert re.search(rf"^{target}:[^|\n]*\| \$\(VENV\)/\.gitignore$", (ROOT / "Makefile").read_text(), re.M), target


def archives(folder, sdist, wheel):
    """An sdist and a wheel of files of these names."""
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        for name in sdist:
            archive.addfile(tarfile.TarInfo(f"a-1/{name}"))
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for name in wheel:
            archive.writestr(name, "")
    return folder / "a.tar.gz", folder / "a.whl"


def test_what_the_artefacts_must_hold(tree, tmp_path):
    release, root = released(), tree()
    (root / "csrc").mkdir()
    (root / "csrc" / "a.h").write_text("")
    tree.git("add", "csrc")
    sources = {"CHANGELOG.md", "grpo_kernels/__init__.py", "csrc/a.h", "PKG-INFO", "setup.cfg", "a.egg-info/SOURCES.txt"}
    whole = {"grpo_kernels/__init__.py", "grpo_kernels/csrc/a.h", "grpo_kernels/_native.cpython-311-x86_64-linux-gnu.so", "a.dist-info/RECORD"}
    release.check_contents(*archives(tmp_path, sources, whole), root)
    for sdist, wheel, said in (
        (sources - {"csrc/a.h"}, whole, "the sdist lacks csrc/a.h"),
        (sources - {"CHANGELOG.md"}, whole, "the sdist lacks CHANGELOG.md"),
        (sources | {"notes.txt"}, whole, "the sdist has notes.txt"),
        (sources | {"grpo_kernels/_native.so"}, whole, "the sdist has grpo_kernels/_native.so"),
        (sources, whole - {"grpo_kernels/csrc/a.h"}, "the wheel lacks grpo_kernels/csrc/a.h"),
        (sources, {name for name in whole if "_native" not in name}, "the wheel lacks the compiled extension"),
        (sources, whole | {"tests/test_a.py"}, "the wheel has tests/test_a.py"),
        (sources, whole | {"grpo_kernels/_cuda.so"}, "the wheel has grpo_kernels/_cuda.so"),
        (sources, whole | {"grpo_kernels.libs/libgomp-1.so.1"}, "the wheel has grpo_kernels.libs/libgomp"),
    ):
        with pytest.raises(release.ReleaseError, match=re.escape(said)):
            release.check_contents(*archives(tmp_path, sdist, wheel), root)


@pytest.mark.skipif(native.why_unavailable() is not None, reason="the extension is not built")
def test_what_a_release_asks_of_an_installation_holds_of_this_tree(monkeypatch):
    installed = released("installed")
    installed.check_extension()
    installed.check_loss()
    ours = installed.fused_linear_grpo_loss
    monkeypatch.setattr(installed, "fused_linear_grpo_loss", lambda *args, **more: ours(*args[:3], args[3] * (1 + 1e-4), *args[4:], **more))
    with pytest.raises(AssertionError, match="grpo torch.float64 loss: error"):
        installed.check_loss()


def test_this_trees_version_is_that_of_the_changelog():
    release = released()
    assert release.entry()[0] == release.version()
