"""Faults A6 and C2: code is read only from what nobody else can write; no place to keep it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bitskip_cpu import compiling, trusted
from bitskip_cpu.compiling import Kernels, cache_directory
from tests.kernels.test_compiling import code, made  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of that kind")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    assert trusted.writable_folder(folder)
    (folder / "run").write_bytes(b"code")
    return folder / "run"


def test_a6_a_folder_is_made_for_its_owner_alone(file: Path) -> None:
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert trusted.read_file(file) == b"code"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a6_a_folder_that_others_can_write_is_not_used(file: Path, mode: int) -> None:
    file.parent.chmod(mode)
    assert trusted.read_file(file) is None
    assert not trusted.writable_folder(file.parent)


def test_a6_a_file_that_others_can_write_is_not_read(file: Path) -> None:
    file.chmod(0o666)
    assert trusted.read_file(file) is None


def test_a6_another_users_file_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if file.stat().st_uid:
        monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    else:
        os.chown(file, 12345, -1)
    assert trusted.read_file(file) is None


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "nothing"])
def test_a6_only_regular_files_are_read_and_nothing_hangs(file: Path, kind: str) -> None:
    other = file.with_name(kind)
    if kind == "pipe":
        os.mkfifo(other, 0o600)
    elif kind == "link":
        other.symlink_to(file)
    elif kind == "folder":
        other.mkdir(0o700)
    assert trusted.read_file(other) is None


def test_a6_a_linked_folder_is_not_used(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file.parent)
    assert trusted.read_file(link / "run") is None
    assert not trusted.writable_folder(link)


def test_a6_foreign_code_is_compiled_anew(made: list[str]) -> None:  # noqa: F811
    kernels = Kernels()
    kernels.function("run")
    assert kernels.directory
    (kernels.directory / "run").chmod(0o666)
    Kernels().function("run")
    assert made == ["run", "run"]


def test_c2_a_full_disk_costs_one_run_its_cache(
    made: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(compiling, "replace_file", full)
    kernels = Kernels()
    assert kernels.function("run") == code("run")
    assert kernels.directory is None
    assert kernels.function("repack") == b"code of repack"


@pytest.mark.parametrize("error", [RuntimeError, KeyError, OSError, None])
def test_c2_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception] | None
) -> None:
    """No HOME and no entry among the users: as in containers with --user."""
    import platformdirs

    def none(name: str) -> str:
        if error:
            raise error("no home")
        return "~/.cache/bitskip"

    monkeypatch.delenv("BITSKIP_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", none)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_directory()
    assert folder and folder.parent.parent == tmp_path


def test_c2_a_user_without_a_home_gets_help(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only the superuser can become nobody")
    code = """
import os, platformdirs.unix
from bitskip import places
os.setuid(54321)
assert places.user_cache().is_absolute()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "BITSKIP_CACHE_DIR")}
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr


def test_a6_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that nothing is kept, but why, and what to do."""
    folder = tmp_path / "kernels"
    assert trusted.refusal(folder) is None
    folder.chmod(0o777)
    reason = "can be written by other users (mode 777): chmod go-w would mend it"
    assert trusted.refusal(folder) == reason
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        if folder.stat().st_uid:
            assert "belongs to another user" in str(trusted.refusal(folder))
    (tmp_path / "file").touch()
    assert "cannot be written (" in str(trusted.refusal(tmp_path / "file" / "kernels"))
    monkeypatch.setattr(compiling, "cache_folder", lambda: folder)
    folder.chmod(0o722)
    assert compiling.cache_refusal().startswith(f"{folder} can be written by other users")
