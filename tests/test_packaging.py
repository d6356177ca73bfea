"""The distribution: what it needs to build, what it does without a compiler or its extension, what it reports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels
from grpo_kernels import doctor
from grpo_kernels.backends import native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree")


def run(*command, **environment):
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def setup(*arguments, **environment):
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    return run("setup.py", "-q", *arguments, **environment)


def project(name):
    """A section of pyproject.toml as text; tomllib is not in Python 3.10."""
    return (ROOT / "pyproject.toml").read_text().split(f"[{name}]\n", 1)[1].split("\n[", 1)[0]


def test_build_needs_no_torch():
    requires = re.search(r"^requires = (.*)$", project("build-system"), re.M).group(1)
    assert "torch" not in requires
    for path in (ROOT / "csrc").iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_one_version():
    assert f'version = "{grpo_kernels.__version__}"' in project("project")
    assert (ROOT / "grpo_kernels" / "py.typed").exists()


def test_without_compiler_the_build_succeeds_and_says_why(tmp_path):
    nowhere = str(tmp_path / "no-such-compiler")
    library = tmp_path / "library"
    made = setup(
        "build_ext",
        f"--build-lib={library}",
        f"--build-temp={tmp_path / 'temp'}",
        CC=nowhere,
        CXX=nowhere,
        LDSHARED=nowhere,
    )
    assert made.returncode == 0, made.stderr
    info = json.loads((library / "grpo_kernels" / "_build_info.json").read_text())
    assert "no-such-compiler" in info["error"] and info["isas"] == []
    assert list(library.rglob("*.so")) == []


def test_cuda_extension_is_refused_by_name(tmp_path):
    made = setup("build_ext", f"--build-lib={tmp_path}", GRPO_KERNELS_BUILD_CUDA="1")
    assert made.returncode != 0 and "GRPO_KERNELS_BUILD_CUDA=1" in made.stderr


def test_import_without_the_extension():
    code = """
import sys
sys.modules["grpo_kernels._native"] = None
import grpo_kernels
from grpo_kernels import doctor
reason = grpo_kernels.available_backends()["cpu"]
assert "_native is missing" in reason and "reinstall" in reason, reason
assert reason in doctor.report()
"""
    made = run("-c", code)
    assert made.returncode == 0, made.stderr


def test_source_distribution_holds_the_sources(tmp_path):
    made = setup("egg_info", f"--egg-base={tmp_path}", "sdist", f"--dist-dir={tmp_path}", "--formats=tar")
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar")
    names = subprocess.run(["tar", "tf", archive], capture_output=True, text=True, check=True).stdout.split()
    held = {name.split("/", 1)[1] for name in names if "/" in name}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir()} | {
        "setup.py",
        "LICENSE",
        "grpo_kernels/py.typed",
    }
    assert sources <= held
    assert not [name for name in held if name.endswith(".so") or name.endswith("_build_info.json")]


def test_doctor_names_every_backend_and_how_the_extension_was_built():
    text = doctor.report()
    for name in ("python", "torch", "transformers", "triton", *grpo_kernels.available_backends()):
        assert re.search(rf"^  {name} ", text, re.M), f"{name} is missing in\n{text}"
    if native.why_unavailable() is None:
        assert native.isa() in text
