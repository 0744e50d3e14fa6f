"""Compiled kernels on disk: what is kept, what is not trusted, what they may refer to."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitskip_cpu import beside, compiling, isa, native, shipped
from bitskip_cpu.compiling import ARGUMENTS, KERNELS, Kernels, cache_directory, needed
from tests.helpers import random_folder, twin


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path / "new"))
    first = cache_directory()
    assert first is not None and first.is_dir() and first.parent == tmp_path / "new"
    monkeypatch.setattr(isa, "PATH", dataclasses.replace(isa.PATH, unpack_above=5))
    assert cache_directory() not in (first, None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path / "file"))
    assert cache_directory() is None


def test_kernels_count_as_compiled_once_used() -> None:
    compiling.warmup()
    assert not KERNELS.lacking()


def code(name: str) -> bytes:
    return b"code of " + name.encode()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the kernels compiled, into an empty folder; nothing is really made or loaded."""
    from bitskip_cpu.kernels import object_code

    names: list[str] = []

    def machine_code(name: str, arguments: int, progress: compiling.Progress) -> bytes:
        names.append(name)
        progress(1.0)
        return code(name)

    monkeypatch.setenv("BITSKIP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(isa, "INTERPRETED", False)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")  # whatever the clone holds
    monkeypatch.setattr(object_code, "machine_code", machine_code)
    monkeypatch.setattr(object_code, "work", lambda name: 1)
    monkeypatch.setattr(beside, "possible", lambda: False)
    for name in ("load", "address"):
        monkeypatch.setattr(native, name, lambda code, *_: code)
    return names


def test_a_kernel_is_compiled_once(made: list[str]) -> None:
    assert Kernels().lacking() == list(ARGUMENTS)
    for _ in range(2):
        kernels = Kernels()
        kernels.prepare(ARGUMENTS)
        assert (kernels.run, kernels.repack) == (code("run"), code("repack"))
        assert kernels.piece("contend") == code("contend")
        assert kernels.lacking() == []
    assert made == list(ARGUMENTS)
    assert Kernels().lacking() == []


def test_only_what_is_needed_is_compiled(made: list[str]) -> None:
    """What a model takes at once and together, and what a text may ask for when it does."""
    Kernels().prepare(needed(twin("bitskip-v1"), "int8"))
    assert made == ["run", "repack", "attend_int8", "code_rows", "packed_rows"]
    plain = needed(twin("llama3"), "float16")
    assert plain == ["run", "repack", "float_rows", "float_rows", "attend_float16"]
    kernels = Kernels()
    assert kernels.piece("measure") == kernels.piece("measure") == code("measure")
    assert made[5:] == ["measure"]


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 32, None])
def test_a_damaged_file_is_made_anew(made: list[str], damage: bytes | None) -> None:
    """LLVM would end the process."""
    kernels = Kernels()
    kernels.function("run")
    assert kernels.directory is not None
    file = kernels.directory / "run"
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    assert Kernels().function("run") == code("run")
    assert made == ["run", "run"]
    Kernels().function("run")
    assert made == ["run", "run"]


class Stub:
    """A second process that brings what it is said to."""

    def __init__(self, codes: dict[str, bytes]) -> None:
        self.codes, self.asked = codes, list[str]()

    def __call__(self, names: list[str], cache: str, progress: Callable[..., None]) -> Stub:
        self.asked = list(names)
        progress(names[0], 1.0)
        return self

    def mine(self, name: str) -> bool:
        return name not in ("code_rows", "packed_rows")

    def code(self, name: str) -> bytes | None:
        return self.codes.get(name)

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *error: object) -> None: ...


def test_what_a_second_process_cannot_make_is_made_here(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the second process has begun, it brings one piece. Progress ends at 1."""
    stub, shares = Stub({"packed_rows": code("packed_rows")}), list[float]()
    monkeypatch.setattr(beside, "Beside", stub)
    kernels = Kernels()
    kernels.prepare(["run", "packed_rows", "repack", "code_rows"], shares.append)
    assert stub.asked == ["run", "repack", "code_rows", "packed_rows"]
    assert made == ["run", "repack", "code_rows"]
    assert shares == sorted(shares) and shares[-1] == 1
    assert kernels.run == code("run") and kernels.piece("packed_rows") == code("packed_rows")
    assert Kernels().function("repack") == code("repack") and len(made) == 3


@pytest.mark.skipif(isa.INTERPRETED, reason="nothing is compiled")
def test_a_second_process() -> None:
    """It makes what this one leaves to it; told of another cache folder, nothing."""
    pieces, shares = ["run", "repack"], list[float]()
    with beside.Beside(pieces, "kernels-of-others", print) as second:
        assert second.code("repack") is None
    cache = compiling.cache_folder().name
    with beside.Beside(pieces, cache, lambda _, share: shares.append(share)) as second:
        assert second.mine("run")
        made = second.code("repack")
        assert not second.mine("repack") and second.code("run") is None
    assert made and native.load(made, "repack", ARGUMENTS["repack"])
    assert shares == sorted(shares) and shares[-1] == 1
    with beside.Beside(pieces, cache, print) as second:
        pass
    assert second._process and second._process.returncode  # ended with the statement
    with beside.Beside(["run"], cache, print) as second:
        assert second.mine("run") and second._process is None  # one piece is made here


@pytest.mark.skipif(isa.INTERPRETED, reason="nothing is compiled")
def test_a_kernel_may_not_need_python(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitskip_cpu.kernels import object_code

    monkeypatch.setitem(object_code.FUNCTIONS, "run", lambda value: print(value))
    with pytest.raises(RuntimeError, match=r"the kernel run refers to .*Py"):
        object_code.module("run", 1)


def test_a_path_not_for_the_target_is_refused() -> None:
    if not isa.PATH.needs:
        pytest.skip("plain runs everywhere")
    with pytest.raises(isa.IsaError, match="BITSKIP_ISA=plain"):
        isa.check("x86-64", "")


@pytest.mark.skipif(isa.INTERPRETED, reason="Numba's loader runs the kernels then")
def test_compiled_kernels_run_without_numba(tmp_path: Path) -> None:
    compiling.warmup()
    if KERNELS.directory is None:
        pytest.skip("the cache folder cannot be written")
    folder = random_folder(tmp_path / "model", twin("bitskip-v1"))
    code = f"""
import sys
from bitskip_cpu.engine import load
load({str(folder)!r}, 2).logits([1, 2, 3])
assert "numba" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
