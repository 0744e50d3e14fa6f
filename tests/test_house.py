"""House rules that a machine can hold: directions of imports, docstrings, length of files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "bitskip", "bitskip_ref", "bitskip_text", "bitskip_cpu", "bitskip_serve", "bitskip_eval",
    "bitskip_train", "export", "bitskip_experiments",
)  # fmt: skip
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
LONGEST = 450

# What a package may not import, anywhere (`lazy`: inside functions it may).
FORBIDDEN = {
    "bitskip_cpu": {
        "bitskip_serve", "bitskip_eval", "bitskip_train", "bitskip_export", "bitskip_experiments",
        "torch", "onnx", "onnxruntime", "onnx_ir",
    },
    "bitskip_serve": {
        "bitskip_train", "bitskip_export", "bitskip_experiments", "torch", "onnx", "numba",
    },
    "bitskip_eval": {
        "bitskip_serve", "bitskip_train", "bitskip_export", "bitskip_experiments", "torch", "numba",
    },
    "bitskip_text": {
        "bitskip_cpu", "bitskip_train", "bitskip_export", "bitskip_experiments", "torch", "numba",
    },
    "bitskip_train": {"bitskip_cpu", "bitskip_export", "bitskip_experiments"},
    "export": {"bitskip_experiments"},
}  # fmt: skip
LAZY = {
    "bitskip": {
        "bitskip_cpu",
        "bitskip_train",
        "bitskip_export",
        "bitskip_experiments",
        "bitskip_serve",
        "bitskip_eval",
        "lm_eval",
        "numpy",
        "numba",
        "torch",
        "onnx",
        "rich",
    },
    "export": {"bitskip_train", "bitskip_cpu", "torch"},
    "bitskip_experiments": {"bitskip_cpu", "bitskip_export", "optuna", "matplotlib"},
}
# The reference's arithmetic: whoever used it would be compared with itself.
ARITHMETIC = {
    "bitskip_ref.arithmetic", "bitskip_ref.load", "bitskip_ref.ReferenceModel",
    "bitskip_ref.model.load", "bitskip_ref.model.ReferenceModel",
}  # fmt: skip
COMPARE = {ROOT / "bitskip_cpu/selftest.py"}  # runs the reference beside the engine


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a tree imports; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction: write the full name"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """What importing a module imports: not what functions or type checkers do."""
    for node in tree.body:
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from imports(node)


def problems(path: Path, text: str) -> list[str]:
    """Imports of a package's file that go the wrong way."""
    package = path.relative_to(ROOT).parts[0]
    tree = ast.parse(text)
    names = set(imports(tree))
    tops = {name.split(".")[0] for name in names}
    wrong = tops & (FORBIDDEN.get(package, set()) | {"tests"})
    if package == "bitskip_ref":
        wrong |= tops - set(sys.stdlib_module_names) - {"bitskip_ref", "numpy"}
    if package in ("bitskip_cpu", "bitskip_text") and path not in COMPARE:
        wrong |= {n for n in names if any(f"{n}.".startswith(f"{a}.") for a in ARITHMETIC)}
    wrong |= {name.split(".")[0] for name in at_import(tree)} & LAZY.get(package, set())
    return sorted(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert problems(path, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("bitskip_ref/x.py", "import numba"),
        ("bitskip_ref/x.py", "def f():\n    from bitskip_cpu import load"),
        ("bitskip_cpu/x.py", "import torch.nn"),
        ("bitskip_cpu/x.py", "from bitskip_ref.arithmetic.quant import ternary_linear"),
        ("bitskip_cpu/x.py", "from bitskip_ref.arithmetic import sums"),
        ("bitskip_text/x.py", "import bitskip_train.data"),
        ("bitskip_train/x.py", "from tests.helpers import twin"),
        ("export/x.py", "import torch"),
        ("bitskip/x.py", "from bitskip_cpu.engine import load"),
        ("export/x.py", "import bitskip_experiments.runs"),
        ("bitskip_experiments/x.py", "import optuna"),
    ],
)
def test_a_planted_import_is_seen(path: str, text: str) -> None:
    assert problems(ROOT / path, text)


def module(path: Path) -> str:
    """The name that a package's file is imported under."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    parts[0] = "bitskip_export" if parts[0] == "export" else parts[0]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(texts: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, in functions and for type checkers too.

    `from package import name` imports the module that `name` is, else the package.
    """
    edges: dict[str, set[str]] = {}
    for module, text in texts.items():
        found = set[str]()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found.update(name if name in texts else str(node.module) for name in names)
        edges[module] = found & texts.keys()
    return edges


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Modules of which each imports one that imports it, however far around; None: there is none.

    Exactly then the graph has a strongly connected component of more than one module.
    """
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_imports_go_in_a_circle() -> None:
    assert circle(graph({module(p): p.read_text("utf-8") for p in FILES})) is None


def test_a_planted_circle_is_seen() -> None:
    """By a function's import, and by one for type checkers alone, over three modules."""
    texts = {
        "bitskip_ref.a": "from bitskip_ref import b",
        "bitskip_ref.b": "if TYPE_CHECKING:\n    from bitskip_ref.c import C",
        "bitskip_ref.c": "def f():\n    import bitskip_ref.a",
        "bitskip_ref.d": "import numpy\nfrom bitskip_ref.a import x",
    }
    found = circle(graph(texts))
    assert found and set(found) == {"bitskip_ref.a", "bitskip_ref.b", "bitskip_ref.c"}
    assert circle(graph(texts | {"bitskip_ref.c": ""})) is None


def by_name(text: str) -> list[int]:
    """Lines that tell instruction sets apart by comparing or looking up PATH or its name."""

    def names_path(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr in ("name", "PATH"):
            return node.attr == "PATH" or names_path(node.value)
        return isinstance(node, ast.Name) and node.id == "PATH"

    found = []
    for node in ast.walk(ast.parse(text)):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = node.args if node.func.attr == "get" else []
        elif isinstance(node, ast.Match):
            parts = [node.subject]
        if any(map(names_path, parts)):
            found.append(node.lineno)
    return found


def test_paths_are_asked_not_named() -> None:
    """Kernels ask `PATH.width`: a path is a record in isa.py and nothing else."""
    files = [p for p in FILES if p.is_relative_to(ROOT / "bitskip_cpu") and p.name != "isa.py"]
    assert {p: lines for p in files if (lines := by_name(p.read_text("utf-8")))} == {}
    for planted in (
        'if PATH.name == "avx2": pass', 'x = isa.PATH in ("avx2",)', 'if PATH == other: pass',
        'W = {"avx2": 32}[PATH.name]', 'W = {"avx2": 32}.get(isa.PATH.name, 64)',
    ):  # fmt: skip
        assert by_name(planted), planted
    assert not by_name("if PATH.width == 16 and not isa.PATH.dense: pass")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_no_file_is_long() -> None:
    folders = (*PACKAGES, "tests", "benchmarks")
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines())
        for folder in folders
        for p in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}
