"""Imports point one way: a part imports from the layers below its own, and from nowhere else; a test file from no other one."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels

ROOT = Path(grpo_kernels.__file__).parent
# from the top layer down; a module that is not listed fails
LAYERS = (
    ("__main__",),
    ("cli",),
    ("doctor", "bench"),
    ("trainer",),
    ("integrations",),
    ("topk",),
    ("loss", "logprobs", "divergence", "from_logits", "reference"),
    ("call",),
    ("support", "teacher"),
    ("engine", "checks", "packed"),
    ("backends", "distributed"),
    ("losses", "build_cuda", "devices", "extras", "tracing"),
)
HEIGHT = {part: len(LAYERS) - layer for layer, parts in enumerate(LAYERS) for part in parts}
OPTIONAL = {"peft", "trl", "liger_kernel", "verl", "datasets", "triton", "yaml", "matplotlib", "tqdm", "cut_cross_entropy", "pyarrow", "quack"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree, package):
    """(node, dotted name) of each import; relative ones as names inside the package, like ``backends.native``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            elif base == "grpo_kernels" or base.startswith("grpo_kernels."):
                base = base.removeprefix("grpo_kernels").lstrip(".")
            else:
                yield node, base
                continue
            names = [base] if base else [alias.name for alias in node.names]
            for name in names:
                yield node, f"grpo_kernels:{name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_part_imports_only_from_layers_below(path):
    part = part_of(path)
    assert part in HEIGHT, f"{part} is on no layer"
    package = list(path.relative_to(ROOT).parent.parts)
    for node, name in imports(ast.parse(path.read_text()), package):
        if not name.startswith("grpo_kernels:"):
            continue
        target = name.removeprefix("grpo_kernels:").split(".")[0]
        if target not in HEIGHT:  # a name of the package's own __init__, or the compiled extension
            assert target.startswith("_") or HEIGHT[part] == len(LAYERS), f"line {node.lineno}: {name}"
        elif target != part:
            assert HEIGHT[target] < HEIGHT[part], f"{path.name}, line {node.lineno}: {part} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_optional_dependencies_are_imported_inside_functions(path):
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parent.parts)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    for function in functions:
        for node, name in imports(function, package):
            # the command line imports a command's parts when it is called, so that --version answers without transformers
            own = path.name == "cli.py" and name.startswith("grpo_kernels:")
            assert own or name.split(".")[0] in OPTIONAL, f"line {node.lineno}: {name}"


def test_modules_inside_a_room_form_no_circle():
    for part in ("bench", "trainer", "integrations", "engine", "backends", "losses"):
        graph = {}
        for path in FILES:
            if part_of(path) == part:
                package = list(path.relative_to(ROOT).parent.parts)
                names = [n for _, n in imports(ast.parse(path.read_text()), package)]
                inside = {n.split(".")[1] for n in names if n.startswith(f"grpo_kernels:{part}.")}
                graph[path.stem] = inside & {p.stem for p in (ROOT / part).glob("*.py")}
        while graph:
            leaves = [name for name, below in graph.items() if not below & graph.keys()]
            assert leaves, f"a circle in {part}: {graph}"
            for name in leaves:
                del graph[name]


def test_no_drawer_for_everything():
    assert not [p for p in ROOT.rglob("*.py") if p.stem in ("utils", "util", "helpers", "common", "misc")]


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(Path(__file__).parent)))
def test_a_test_file_imports_from_no_other(path):
    """What two of them need is in tests/support. Code for other processes counts too, where a file may import from itself."""
    tree = ast.parse(path.read_text())
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [name.split(".")[0] for _, name in imports(tree, ())]
    found += [name for text in strings for name in re.findall(r"^\s*(?:from|import)\s+(\w+)", text, re.MULTILINE) if name != path.stem]
    assert not [name for name in found if name == "conftest" or name.startswith("test_")]


def python(code, *arguments):
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": "/usr/bin:/bin"}
    made = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_importing_the_package_imports_nothing_and_its_names_little_more_than_torch():
    """Half a second on top of PyTorch is what sympy, the compiler or Triton would take; none may be missing for the import, either."""
    code = """
import json, sys, grpo_kernels
before = set(sys.modules)
import torch
torchs = set(sys.modules)
from grpo_kernels import *
print(json.dumps([sorted(before), sorted(sys.modules.keys() - torchs)]))
"""
    before, new = json.loads(python(code))
    assert not {"torch", "numpy"} & set(before)
    assert not {name.split(".")[0] for name in new} - {*sys.stdlib_module_names, "torch", "grpo_kernels"}, new
    assert not {"torch._dynamo", "torch._inductor", "torch.distributed.tensor"} & set(new) and len(new) < 60, new


def test_the_command_line_answers_without_torch():
    for question in (["--help"], ["--version"], ["nothing-of-the-kind"], ["doctor", "--help"], ["plot", "--help"]):
        out = python(f"import sys; from grpo_kernels.cli import main; main({question}); print('torch' in sys.modules)")
        assert out.endswith("False\n"), question


def test_doctor_imports_torch_and_nothing_that_is_only_asked_for_its_version():
    """Where Triton has no GPU, its reason is known without half a second of importing it; where it is asked for, it is imported."""
    code = """
import os, sys
from grpo_kernels.cli import main
assert main(["doctor"]) == 0
asked = {"triton", "transformers", "accelerate", "trl", "liger_kernel", "peft", "datasets", "matplotlib", "sympy", "torch._dynamo"}
print("imported:", sorted(asked & sys.modules.keys()))
import torch
print("GPU:", torch.cuda.is_available())
os.environ["TRITON_INTERPRET"] = "1"
import grpo_kernels
print("interpreted:", grpo_kernels.available_backends()["triton"])
"""
    report, _, found = python(code).partition("imported: ")
    if "GPU: False" in found:
        assert found == "[]\nGPU: False\ninterpreted: None\n" and "there is no GPU" in report
    else:
        assert found.startswith("['triton']")


def test_the_public_names_are_those_that_type_checkers_read():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    read = {(node.module or alias.name, alias.name) for node in block.body for alias in node.names}
    assert sorted(name for _, name in read) == grpo_kernels.__all__
    for module, name in read:
        value = getattr(grpo_kernels, name)
        assert value is getattr(sys.modules[f"grpo_kernels.{module}"], name, value) and name in dir(grpo_kernels)
    assert sys.modules["grpo_kernels.reference"] is grpo_kernels.reference
    results = {"DistillationOutput", "Divergence", "GRPOLossOutput", "LogProbs", "LogProbsAndLse"}
    told = {name for name in grpo_kernels.__all__ if re.search(rf"\b{name}\b", grpo_kernels.__doc__)}
    assert told == set(grpo_kernels.__all__) - results, "help(grpo_kernels) begins with a line for each function"
    with pytest.raises(AttributeError, match="'grpo_kernels' has no attribute 'grpo_los'"):
        grpo_kernels.grpo_los  # noqa: B018


@pytest.mark.exhaustive(reason="seven seconds: imports the trainer in a process of its own")
def test_bitsandbytes_is_loaded_where_it_is_used():
    """peft imports it otherwise, whoever imports transformers' Trainer: a second, and a warning about 4-bit kernels on a CPU."""
    for name in ("peft", "transformers", "bitsandbytes"):
        pytest.importorskip(name)
    code = """
import sys, grpo_kernels.trainer.demo
from grpo_kernels.bench import peers
assert "peft" in sys.modules and "bitsandbytes" not in sys.modules
import peft
assert peft.import_utils.is_bnb_available() and callable(peft.helpers.bnb.functional.dequantize_4bit)
print("bitsandbytes" in sys.modules)
"""
    assert python(code).endswith("True\n")


def test_a_broken_triton_is_a_reason_and_not_an_error():
    out = python("import sys; sys.modules['triton'] = None; import grpo_kernels; print(grpo_kernels.available_backends()['triton'])")
    assert "triton cannot be imported (ModuleNotFoundError" in out and "pip install triton" in out


def test_the_kernels_include_no_framework():
    sources = list((ROOT.parent / "csrc").glob("*"))
    if not sources:
        pytest.skip("not a source checkout")
    for path in sources:
        included = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not [line for line in included if "torch" in line or "ATen" in line or "c10" in line], path.name
