"""The distribution: what it needs to build, what it does without a compiler or its extension, what it reports."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

import grpo_kernels
from grpo_kernels import build_cuda, cli, doctor
from grpo_kernels.backends import native
from grpo_kernels.extras import BRINGS, MissingExtra, needs

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree")


def run(*command, cwd=ROOT, **environment):
    return subprocess.run([sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def setup(*arguments, GRPO_KERNELS_BUILD_CUDA="0", **environment):
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    return run("setup.py", "-q", *arguments, GRPO_KERNELS_BUILD_CUDA=GRPO_KERNELS_BUILD_CUDA, **environment)


def project(name):
    """A section of pyproject.toml as text; tomllib is not in Python 3.10."""
    return (ROOT / "pyproject.toml").read_text().split(f"[{name}]\n", 1)[1].split("\n[", 1)[0]


def requirements(name):
    """A list of pyproject.toml."""
    text = re.search(rf"^{name} = (\[.*?\])\n", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    return ast.literal_eval(text.replace("\n", ""))


def test_build_needs_no_torch():
    requires = re.search(r"^requires = (.*)$", project("build-system"), re.M).group(1)
    assert "torch" not in requires
    for path in (ROOT / "csrc").iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_one_version():
    """pyproject.toml takes that of the package, which setuptools reads without importing it."""
    assert 'dynamic = ["version"]' in project("project") and "version =" not in project("project")
    assert 'version = { attr = "grpo_kernels.__version__" }' in project("tool.setuptools.dynamic")
    assert setup("--version").stdout.split()[-1] == grpo_kernels.__version__
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


def copied_tree(folder):
    """The package, its extension where it is built, and what builds it."""
    for name in ("grpo_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_cuda.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiler_that_fails_leaves_no_extension_of_an_earlier_build(tmp_path, in_place):
    tree, library = copied_tree(tmp_path / "tree"), tmp_path / "library"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for package in (tree / "grpo_kernels", library / "grpo_kernels"):
        package.mkdir(parents=True, exist_ok=True)
        (package / f"_native{suffix}").write_bytes(b"of an earlier build")
    made = setup("build_ext", f"--build-lib={library}", f"--build-temp={tmp_path / 'temp'}", *["--inplace"] * in_place,
                 cwd=tree, CC="no", CXX="no")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert not list(library.rglob("*.so")) and bool(list(tree.rglob("_native*.so"))) != in_place


def test_a_build_removes_old_libraries_and_nothing_else(tmp_path):
    """What lies in the folder that --build-lib names may be the user's."""
    library = tmp_path / "library"
    package = library / "grpo_kernels"
    package.mkdir(parents=True)
    kept, old = [library / "thesis.tex", package / "notes.txt"], [package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", package / "_cuda.so"]
    for path in (*kept, *old):
        path.write_text("of the user, or of an earlier build")
    made = setup("build", f"--build-lib={library}", f"--build-temp={tmp_path / 'temp'}", CC="no", CXX="no", cwd=copied_tree(tmp_path / "tree"))
    assert made.returncode == 0, made.stderr
    assert (package / "loss.py").exists() and all(path.exists() for path in kept) and not any(path.exists() for path in old)


def test_an_extension_of_other_sources_is_refused(tmp_path, monkeypatch):
    if native._native is None:
        pytest.skip("the extension is not built")
    assert not native._of_other_sources(), "the one that the tests run"
    monkeypatch.setattr(build_cuda, "PACKAGE", tmp_path / "grpo_kernels")
    monkeypatch.setattr(native, "_BUILD_INFO", tmp_path / "record.json")
    assert not native._of_other_sources(), "nothing to compare with"
    for sources in ("0123456789abcdef", native._native.sources):  # no csrc/: what the last build wrote down
        (tmp_path / "record.json").write_text(json.dumps({"sources": sources}))
        assert native._of_other_sources() == (sources != native._native.sources)
    for folder in ("csrc", "grpo_kernels/csrc"):  # a checkout's, a wheel's
        shutil.copytree(ROOT / "csrc", tmp_path / folder)
        assert not native._of_other_sources()
        (tmp_path / folder / "vector.h").write_text("// changed")
        assert native._of_other_sources()

    monkeypatch.setattr(native, "_REFUSED", True)
    reason = grpo_kernels.available_backends()["cpu"]
    assert "built from other sources than these" in reason and "reinstall" in reason
    assert f"  {reason}\n" in doctor.report() and "in use" not in doctor.report()
    arguments = torch.ones(1, 2, 4), torch.ones(5, 4), torch.zeros(1, 2, dtype=torch.int64)
    assert grpo_kernels.linear_logprobs(*arguments).logps.isfinite().all(), "without being asked for it is done without"
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used: .* other sources"):
        grpo_kernels.linear_logprobs(*arguments, backend="cpu")


def test_every_source_is_in_the_fingerprint_of_its_library():
    names = {path.name for path in (ROOT / "csrc").iterdir()}
    assert names == {*build_cuda.SOURCES, *build_cuda.CPU_SOURCES}
    for library in (build_cuda.SOURCES, build_cuda.CPU_SOURCES):
        for name in library:
            assert set(re.findall(r'#include "(.*)"', (ROOT / "csrc" / name).read_text())) <= set(library), name


def fake_nvcc(folder, fails=False):
    """A CUDA_HOME whose compiler knows some architectures, keeps its arguments and writes an empty library."""
    tool = folder / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"""#!{sys.executable}
import pathlib, sys
if "--list-gpu-code" in sys.argv:
    print("sm_75 sm_80 sm_86 sm_90 sm_100 sm_110")
    sys.exit()
pathlib.Path({str(folder / "arguments")!r}).write_text(" ".join(sys.argv[1:]))
if {fails}:
    sys.exit("error: no such thing as a kernel")
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
""")
    tool.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


def installed(tmp_path, setting, **environment):
    made = setup("build_ext", f"--build-lib={tmp_path / 'library'}", f"--build-temp={tmp_path / 'temp'}",
                 GRPO_KERNELS_BUILD_CUDA=setting, CC="no", CXX="no", **environment)  # fmt: skip
    package = tmp_path / "library" / "grpo_kernels"
    record = package / "_build_info.json"
    return made, package, json.loads(record.read_text()) if record.exists() else None


def test_the_cuda_library_is_built_for_every_architecture_the_compiler_knows(tmp_path):
    made, package, info = installed(tmp_path, "1", **fake_nvcc(tmp_path / "cuda"))
    assert made.returncode == 0, made.stderr
    arguments = (tmp_path / "cuda" / "arguments").read_text()
    for wanted in ("code=sm_80", "code=sm_86", "code=sm_90a", "code=sm_100a", "code=compute_110", "code=compute_100", "-cudart=static", "-shared"):
        assert wanted in arguments, arguments
    assert "sm_89" not in arguments and "sm_120a" not in arguments and "torch" not in arguments and "cublas" not in arguments
    assert (package / "_cuda.so").exists() and info["cuda"] and info["cuda_error"] is None
    # what a wheel needs to build them later
    assert {path.name for path in (package / "csrc").iterdir()} == {path.name for path in (ROOT / "csrc").iterdir()}


def test_the_cuda_library_is_built_for_the_gpus_that_are_there(tmp_path):
    cuda = fake_nvcc(tmp_path / "cuda")
    made, *_ = installed(tmp_path / "none", "native", **cuda, PATH="")
    assert made.returncode != 0 and "GRPO_KERNELS_BUILD_CUDA=native: nvidia-smi cannot be run" in made.stderr
    made, package, info = installed(tmp_path / "two", "native", **cuda, PATH=fake_gpus(tmp_path / "smi", "9.0", "8.6", "9.0"))
    assert made.returncode == 0 and info["cuda"] and (package / "_cuda.so").exists(), made.stderr
    built = [word for word in (tmp_path / "cuda" / "arguments").read_text().split() if "gencode" in word]
    assert built == ["-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_90a,code=sm_90a"]


def fake_gpus(folder, *capabilities):
    """A PATH on which nvidia-smi names these."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo {each}\n" for each in capabilities))
    (folder / "nvidia-smi").chmod(0o755)
    return str(folder)


def test_a_cuda_compiler_that_fails_or_is_not_wanted(tmp_path):
    cuda = fake_nvcc(tmp_path / "cuda", fails=True)
    made, *_ = installed(tmp_path / "one", "1", **cuda)
    assert made.returncode != 0 and "GRPO_KERNELS_BUILD_CUDA=1: " in made.stderr and "nvcc failed" in made.stderr
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\necho no driver >&2\nexit 1\n")
    made, *_ = installed(tmp_path / "broken", "1", **cuda)
    assert made.returncode != 0 and "no driver" in made.stderr, "it cannot even name its architectures"
    for unasked in ("auto", "0"):
        old = tmp_path / unasked / "library" / "grpo_kernels" / "_cuda.so"
        old.parent.mkdir(parents=True)
        old.write_bytes(b"of an earlier build")
        made, package, info = installed(tmp_path / unasked, unasked, **cuda)
        assert made.returncode == 0 and info["cuda_error"] == f"not asked for at install, GRPO_KERNELS_BUILD_CUDA={unasked}"
        assert info["cuda"] is None and not old.exists()
    made, *_ = installed(tmp_path / "typo", "yes")
    assert made.returncode != 0 and "must be auto, 0, 1 or native, got 'yes'" in made.stderr


def test_doctor_builds_the_cuda_library_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_cuda, "nvcc", lambda: None)
    assert doctor.main(["--build-cuda"]) == 1
    assert "nvcc was not found; install the CUDA toolkit" in capsys.readouterr().err
    for name, value in fake_nvcc(tmp_path / "cuda").items():
        monkeypatch.setenv(name, value)
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build_cuda.nvcc() == str(tmp_path / "cuda" / "bin" / "nvcc")
    target = tmp_path / "made.so"
    assert str(build_cuda.nvcc()) in build_cuda.build(target) and target.exists()
    assert (build_cuda.sources() / "row_kernels_cuda.cu").exists()

    monkeypatch.setattr(build_cuda, "build", lambda only: f"built for {only}")
    for path, said in ((fake_gpus(tmp_path / "smi", "9.0"), ("compute capability 9.0", "built for (90,)")),
                       (str(tmp_path), ("for every architecture", "built for ()"))):  # fmt: skip
        monkeypatch.setenv("PATH", path)
        assert doctor.main(["--build-cuda"]) == 0
        out = capsys.readouterr().out
        assert all(words in out for words in said), out


def test_import_without_the_extension():
    code = """
import sys
sys.modules["grpo_kernels._native"] = None
import grpo_kernels
from grpo_kernels import build_cuda, doctor
reason = grpo_kernels.available_backends()["cpu"]
assert "_native is missing" in reason and "reinstall" in reason, reason
assert reason in doctor.report()
"""
    made = run("-c", code)
    assert made.returncode == 0, made.stderr


def test_what_is_missing_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch, capsys):
    code = """
import sys
sys.modules["transformers"] = sys.modules["matplotlib"] = None
import importlib
from grpo_kernels import cli
for module in ("trainer", "integrations.transformers", "trainer.plot"):
    try:
        importlib.import_module(f"grpo_kernels.{module}")
    except ModuleNotFoundError as error:
        print(error)
print([cli.main(argv) for argv in (["train"], ["plot", "run"], ["bench", "--plot", "here"])])
"""
    made = run("-c", code)
    assert made.returncode == 0, made.stderr
    wanted = "grpo_kernels.{} needs transformers, which is not installed: pip install 'grpo-kernels[train]'"
    modules = ("trainer", "integrations.transformers", "trainer")
    assert made.stdout.splitlines() == [*map(wanted.format, modules), "[2, 2, 2]"]
    bench = "grpo-kernels: bench --plot needs matplotlib, which is not installed: pip install 'grpo-kernels[bench]'"
    assert made.stderr.splitlines() == [*[f"grpo-kernels: {wanted.format('trainer')}"] * 2, bench]

    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "reward": 0.5}]}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "needs matplotlib, which is not installed: pip install 'grpo-kernels[bench]'" in capsys.readouterr().err


def test_the_loss_brings_neither_trainer_nor_plots():
    assert [re.match(r"[\w-]+", text).group() for text in requirements("dependencies")] == ["torch", "numpy", "triton"]
    assert "grpo-kernels[train,bench]" in requirements("test"), "which `make demo` and the tests install"


@pytest.mark.parametrize("missing", [
    ModuleNotFoundError("No module named 'grpo_kernels.nothing'", name="grpo_kernels.nothing"),
    ModuleNotFoundError("No module named 'regex'", name="regex"),  # of transformers itself: a broken installation
    ModuleNotFoundError("vllm must be installed"),  # raised by hand, without a name
    ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"),  # another extra's
])  # fmt: skip
def test_a_missing_module_that_the_extra_does_not_bring_stays_what_it_is(missing):
    with pytest.raises(ModuleNotFoundError) as error, needs("train", "this"):
        raise missing
    assert error.value is missing


def test_what_an_extra_brings_is_what_it_requires():
    for extra in ("train", "bench"):
        assert {re.match(r"[\w-]+", text).group().replace("pyyaml", "yaml") for text in requirements(extra)} <= set(BRINGS[extra])
    with pytest.raises(MissingExtra, match=r"this needs transformers.nothing, which is not installed: pip install 'grpo-kernels\[train\]'"), needs("train", "this"):
        raise ModuleNotFoundError(name="transformers.nothing")


def test_the_modules_of_the_package_are_there_at_once():
    code = """
import sys, grpo_kernels
assert "torch" not in sys.modules
names = "backends call distributed engine from_logits logprobs loss losses reference".split()
assert set(names) <= set(dir(grpo_kernels)) and not hasattr(grpo_kernels, "nothing"), dir(grpo_kernels)
print(all(getattr(grpo_kernels, name) is sys.modules["grpo_kernels." + name] for name in names), grpo_kernels.losses.config.__name__)
"""
    for name in ("losses", "engine"):  # whichever comes first
        made = run("-c", f"import grpo_kernels; print(grpo_kernels.{name}.__name__)")
        assert made.stdout == f"grpo_kernels.{name}\n", made.stderr
    assert run("-c", code).stdout == "True grpo_kernels.losses.config\n"


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """Its files."""
    folder = tmp_path_factory.mktemp("sdist")
    made = setup("egg_info", f"--egg-base={folder}", "sdist", f"--dist-dir={folder}", "--formats=tar")
    assert made.returncode == 0, made.stderr
    (archive,) = folder.glob("*.tar")
    with tarfile.open(archive) as opened:
        return {member.name.split("/", 1)[1] for member in opened if member.isfile()}


def test_source_distribution_holds_the_sources(source_distribution):
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir()}
    assert sources | {"setup.py", "LICENSE", "grpo_kernels/py.typed", "examples/tour.ipynb"} <= source_distribution
    assert not [name for name in source_distribution if name.endswith((".so", ".pyc", "_build_info.json"))]


def test_source_distribution_is_what_git_tracks(source_distribution):
    """Tests, documents and targets then work in it as they do in a checkout."""
    tracked = in_git("--cached")
    if not tracked:
        pytest.skip("not a git checkout")
    there = {name for name in tracked if (ROOT / name).exists()}
    assert there <= source_distribution, f"MANIFEST.in leaves out {sorted(there - source_distribution)}"
    more = source_distribution - tracked - in_git("--others", "--exclude-standard")
    assert {name for name in more if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}, "MANIFEST.in takes what git ignores"


def in_git(*which):
    """Files of the repository whose top is this tree; none where git or the repository is missing."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return set()
    return set(subprocess.run(["git", "ls-files", "-z", *which], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")) - {""}


def test_doctor_names_every_backend_and_how_the_extension_was_built():
    text = doctor.report()
    for name in ("python", "torch", "transformers", "triton", *grpo_kernels.available_backends()):
        assert re.search(rf"^  {name} ", text, re.M), f"{name} is missing in\n{text}"
    if native.why_unavailable() is None:
        assert native.isa() in text
