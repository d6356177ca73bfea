"""Imports point one way: a room imports from the floors below its own, and from nowhere else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_kernels

ROOT = Path(grpo_kernels.__file__).parent
# from the top floor down; a module that is not listed has no place in the house yet
FLOORS = (
    ("__main__",),
    ("cli",),
    ("doctor", "bench"),
    ("trainer",),
    ("integrations",),
    ("loss", "logprobs", "from_logits", "reference"),
    ("call",),
    ("engine",),
    ("backends", "distributed"),
    ("losses", "build_cuda", "devices"),
)
HEIGHT = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPTIONAL = {"peft", "trl", "liger_kernel", "verl", "datasets", "triton", "yaml", "matplotlib", "tqdm", "cut_cross_entropy", "pyarrow", "quack"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path):
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
def test_a_room_imports_only_from_floors_below(path):
    room = room_of(path)
    assert room in HEIGHT, f"{room} is on no floor"
    package = list(path.relative_to(ROOT).parent.parts)
    for node, name in imports(ast.parse(path.read_text()), package):
        if not name.startswith("grpo_kernels:"):
            continue
        target = name.removeprefix("grpo_kernels:").split(".")[0]
        if target not in HEIGHT:  # a name of the package's own __init__, or the compiled extension
            assert target.startswith("_") or HEIGHT[room] == len(FLOORS), f"line {node.lineno}: {name}"
        elif target != room:
            assert HEIGHT[target] < HEIGHT[room], f"{path.name}, line {node.lineno}: {room} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_optional_dependencies_are_imported_inside_functions(path):
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parent.parts)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    for function in functions:
        for node, name in imports(function, package):
            # the command line imports a command's rooms when it is called, so that --version answers without transformers
            own = path.name == "cli.py" and name.startswith("grpo_kernels:")
            assert own or name.split(".")[0] in OPTIONAL, f"line {node.lineno}: {name}"


def test_modules_inside_a_room_form_no_circle():
    for room in ("bench", "trainer", "integrations", "engine", "backends", "losses"):
        graph = {}
        for path in FILES:
            if room_of(path) == room:
                package = list(path.relative_to(ROOT).parent.parts)
                names = [n for _, n in imports(ast.parse(path.read_text()), package)]
                inside = {n.split(".")[1] for n in names if n.startswith(f"grpo_kernels:{room}.")}
                graph[path.stem] = inside & {p.stem for p in (ROOT / room).glob("*.py")}
        while graph:
            leaves = [name for name, below in graph.items() if not below & graph.keys()]
            assert leaves, f"a circle in {room}: {graph}"
            for name in leaves:
                del graph[name]


def test_no_drawer_for_everything():
    assert not [p for p in ROOT.rglob("*.py") if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_importing_the_package_imports_no_trainer_and_no_peer():
    """`import grpo_kernels` must stay light and must not fail for want of something optional."""
    code = (
        "import sys, grpo_kernels; "
        "bad = {'transformers', 'trl', 'liger_kernel', 'peft', 'datasets', 'matplotlib', 'triton'} & sys.modules.keys(); "
        "print(sorted(bad))"
    )
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": "/usr/bin:/bin"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    loaded = set(ast.literal_eval(out.stdout.strip().splitlines()[-1]))
    assert not loaded - {"triton"}, loaded  # torch itself imports triton where it is installed


def test_the_kernels_include_no_framework():
    sources = list((ROOT.parent / "csrc").glob("*"))
    if not sources:
        pytest.skip("not a source checkout")
    for path in sources:
        included = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not [line for line in included if "torch" in line or "ATen" in line or "c10" in line], path.name
