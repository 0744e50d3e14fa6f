"""The cache folder's name hashes every source that shapes the code, and nothing else of ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitskip_cpu import compiling, isa, sources

ROOT = Path(__file__).parent.parent.parent
LOADED = """
import sys
from bitskip_cpu.kernels import object_code
import bitskip_cpu.kernels.numba_inside.compile
print(*(m.__file__ for n, m in sys.modules.items() if n.startswith("bitskip_") and m.__file__))
"""


def test_the_sources_are_what_compiling_imports() -> None:
    """All that Python loads, but packages' `__init__`, which kernels take nothing from."""
    if isa.INTERPRETED:
        pytest.skip("nothing is compiled")
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {Path(name).resolve() for name in done.stdout.split()}
    found = {path.resolve() for path in sources.sources()}
    assert {p for p in loaded - found if p.name != "__init__.py"} == set()
    assert found <= loaded


def test_each_source_changes_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("bitskip_cpu", "bitskip_ref"):
        for path in (ROOT / package).rglob("*.py"):
            to = tmp_path / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    seen = {compiling._fingerprint()}
    files = sources.sources()
    assert {p.name for p in files} > {"isa.py", "native.py", "constants.py", "layout.py"}
    for path in files:
        with path.open("a") as file:
            file.write("# changed\n")
        seen.add(compiling._fingerprint())
    assert len(seen) == len(files) + 1
    (tmp_path / "bitskip_cpu/engine.py").write_text("")  # shapes no code
    assert compiling._fingerprint() in seen
