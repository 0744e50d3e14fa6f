"""Object code of the package: used if it is whole, of these sources, for this CPU; else not."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitskip_cpu import isa, shipped, sources
from bitskip_cpu.compiling import ARGUMENTS, CALLED, Kernels
from bitskip_cpu.shipped import make
from tests.kernels.test_compiling import made

__all__ = ["made"]  # a fixture: kernels are not really compiled

NAME = shipped.set_name(platform.machine(), isa.PATH)
CODE = b"a shipped kernel"
Facts = dict[str, Any]


@pytest.fixture
def manifest(made: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set for this process, as `make` leaves it."""
    monkeypatch.setattr(shipped.sys, "platform", "linux")
    shipped.FOLDER.mkdir()
    for name in ARGUMENTS:
        (shipped.FOLDER / f"{NAME}-{name}.o").write_bytes(CODE)
    entry = {
        "features": sorted(isa.cpu_features()), "sources": sources.digest(), "made_by": "a test",
        "files": dict.fromkeys(ARGUMENTS, hashlib.sha256(CODE).hexdigest()),
    }  # fmt: skip
    path = shipped.FOLDER / shipped.MANIFEST
    path.write_text(json.dumps({NAME: entry}))
    return path


def test_nothing_is_compiled(manifest: Path, made: list[str]) -> None:
    kernels = Kernels()
    assert kernels.lacking() == []
    pieces = [kernels.piece(name) for name in ARGUMENTS if name not in CALLED]
    assert [kernels.run, kernels.repack, *pieces] == [CODE] * len(ARGUMENTS)
    assert made == []
    assert not list(manifest.parent.parent.glob("kernels-*"))


def _changed(manifest: Path, change: Callable[[Facts], object]) -> None:
    facts = json.loads(manifest.read_text())
    change(facts[NAME])
    manifest.write_text(json.dumps(facts))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda m: (m.parent / f"{NAME}-run.o").write_bytes(CODE[:-1] + b"L"),
    "cut short": lambda m: (m.parent / f"{NAME}-run.o").write_bytes(CODE[:-1]),
    "gone": lambda m: (m.parent / f"{NAME}-run.o").unlink(),
    "a folder": lambda m: ((m.parent / f"{NAME}-run.o").unlink(),
                           (m.parent / f"{NAME}-run.o").mkdir()),
    "other sources": lambda m: _changed(m, lambda f: f.update(sources="0" * 64)),
    "another CPU": lambda m: _changed(m, lambda f: f["features"].append("sse9")),
    "no hash": lambda m: _changed(m, lambda f: f.pop("files")),
    "hash of another type": lambda m: _changed(m, lambda f: f.update(files=[1])),
    "features of another type": lambda m: _changed(m, lambda f: f.update(features=7)),
    "no JSON": lambda m: m.write_bytes(b"\xff{"),
    "JSON of another type": lambda m: m.write_text("[1]"),
    "no manifest": lambda m: m.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_for_here_is_not_used(manifest: Path, made: list[str], damage: str) -> None:
    assert shipped.code("run") == CODE
    DAMAGES[damage](manifest)
    assert shipped.code("run") is None
    kernels = Kernels()
    kernels.prepare(ARGUMENTS)
    assert kernels.run == b"code of run"
    of_one_file = damage in ("a byte", "cut short", "gone", "a folder")
    assert made == (["run"] if of_one_file else list(ARGUMENTS))


def test_a_path_without_a_set_for_this_kind_of_cpu_takes_its_own(
    manifest: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(isa.PATH, fetch=replace(isa.PATH.fetch, name="another"))
    monkeypatch.setattr(isa, "PATH", other)
    untuned = isa.tuned(other, "")
    own = shipped.set_name(platform.machine(), untuned)
    facts = json.loads(manifest.read_text())[NAME]
    manifest.write_text(json.dumps({own: facts | {"sources": sources.digest(untuned)}}))
    for file in manifest.parent.glob("*.o"):
        file.rename(file.with_name(file.name.replace(NAME, own)))
    assert shipped.code("run") == CODE
    (manifest.parent / f"{own}-run.o").write_bytes(b"another")
    assert shipped.code("run") is None


def test_only_linux_has_any(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped.sys, "platform", "darwin")
    assert shipped.code("run") is None


V3 = ("avx2", "f16c")
VBMI = (*V3, "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi")


USUAL = {
    "haswell": V3, "alderlake": (*V3, "avxvnni"), "cascadelake": VBMI[:-1],
    "icelake-server": VBMI, "sapphirerapids": (*VBMI, "amx-tile", "amx-int8"),
    "znver1": V3, "znver3": V3, "znver4": VBMI, "znver5": (*VBMI, "avxvnni"),
    "neoverse-n1": ("dotprod",),
}  # fmt: skip


def test_every_usual_cpu_has_a_set() -> None:
    """The best path that it has, asked for weights as it wants; and no set is for no CPU."""
    assert set(make.SETS.values()) == {
        isa.tuned(next(path for path in isa.PATHS if set(features).issuperset(path.needs)), cpu)
        for cpu, features in USUAL.items()
    }


def test_a_set_may_use_what_its_path_needs() -> None:
    assert {path.name for path in make.SETS.values()} == {p.name for p in isa.PATHS if p.compiled}
    for path in make.SETS.values():
        assert set(make.features(path)) >= set(path.needs)
