"""One room for the insides of Numba, and a way on when they are not as it knows them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitskip_cpu import isa

ROOT = Path(__file__).parent.parent.parent
ROOM = ROOT / "bitskip_cpu/kernels/numba_inside"
FILES = [
    p for package in ("bitskip_cpu", "bitskip_train", "export", "bitskip_experiments", "benchmarks")
    for p in (ROOT / package).rglob("*.py") if ROOM not in p.parents
]  # fmt: skip
PUBLIC = {"numba", "numba.extending", "numba.types"}
INSIDES = [
    ("numba.core.codegen", "JITCodeLibrary"),
    ("numba.core.compiler", "Compiler"),
    ("numba.core.compiler_machinery", "PassManager"),
    ("numba.core.untyped_passes", "ReconstructSSA"),
    ("numba.core.typed_passes", "NativeLowering"),
    ("numba.core.registry", "cpu_target"),
    ("numba.core.event", "Listener"),
    ("numba.core.event", "register"),
    ("numba.np.arrayobj", "populate_array"),
]


def trespasses(text: str) -> list[str]:
    """Numba's modules that are not public, and names beginning with _ of others than self.

    The latter in files that import Numba.
    """
    tree = ast.parse(text)
    modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    of_numba = [m for m in modules if m.split(".")[0] == "numba"]
    wrong = [m for m in of_numba if m not in PUBLIC]
    for node in ast.walk(tree) if of_numba else ():
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            # os._exit is documented
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            if not own and not node.attr.startswith("__"):
                wrong.append(node.attr)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_room_touches_the_insides(path: Path) -> None:
    assert trespasses(path.read_text("utf-8")) == []


def test_a_planted_trespass_is_seen() -> None:
    assert trespasses("from numba.core import cgutils")
    assert trespasses("def f():\n    import numba.np.arrayobj")
    assert trespasses("import numba\nnumba.njit(f)._compiler")
    assert trespasses((ROOM / "compile.py").read_text("utf-8"))


BROKEN = """
import sys, importlib, numba
module, name = sys.argv[1:3]
delattr(importlib.import_module(module), name)
from bitskip_cpu.compiling import _insides_changed
try:
    from bitskip_cpu.kernels.object_code import machine_code
    machine_code("repack", 7, print)
except Exception as error:
    print("changed" if _insides_changed(error) else repr(error))
"""


def run(code: str, *words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BITSKIP_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1200, cwd=ROOT, env=environment
    )


@pytest.mark.skipif(isa.INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize(("module", "name"), INSIDES)
def test_a_name_that_is_gone_is_noticed(module: str, name: str, tmp_path: Path) -> None:
    done = run(BROKEN, module, name, cache=tmp_path)
    assert done.stdout.split() == ["changed"], done.stdout + done.stderr


WITHOUT = """
import sys
import numba, numba.core.codegen
del numba.core.codegen.JITCodeLibrary
from bitskip_cpu.engine import load
from bitskip_ref.model import load as reference
folder = sys.argv[1]
expected = reference(folder).logits([1, 2, 3, 4, 5])
for threads in (1, 2):
    assert load(folder, threads).logits([1, 2, 3, 4, 5]).tobytes() == expected.tobytes()
from bitskip_cpu.kernels import numba_inside
print(numba_inside.plain)
"""


@pytest.mark.slow
@pytest.mark.skipif(isa.INTERPRETED, reason="nothing is compiled")
def test_the_same_bits_by_plain_njit(tmp_path: Path) -> None:
    from tests.helpers import random_folder, twin

    folder = random_folder(tmp_path / "model", twin("bitskip-v1"))
    done = run(WITHOUT, str(folder), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]
    assert len(done.stderr.splitlines()) == 1 and "plain njit" in done.stderr
