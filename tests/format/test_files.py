"""Files and folders that are whole or absent (bitskip_ref.files)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitskip_ref import files
from bitskip_ref.files import lock, remove_leftovers, replace_file, replace_folder

PARTS = ("a", "b*", "c")


def write(path: Path, **content: str) -> None:
    with replace_folder(path, PARTS) as made:
        for name, text in content.items():
            (made / name).write_text(text)


def content(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(params=["exchanged", "renamed", "moved"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder takes another's place: at once, or its files one after the other."""
    if request.param == "renamed":
        monkeypatch.setattr(files, "_exchanged", lambda made, path: False)
    if request.param == "moved":
        monkeypatch.setattr(files, "_can_change_places", lambda path: False)
    return str(request.param)


def test_a_folder_takes_the_place_of_another(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    write(out, a="1", b1="2", b2="3", c="4")
    assert content(out) == {"a": "1", "b1": "2", "b2": "3", "c": "4"}
    (out / "mine").mkdir()
    (out / "mine" / "notes").write_text("kept")
    (out / "README.md").write_text("kept")
    out.chmod(0o750)
    write(out, a="5", b3="6")
    assert content(out) == {"a": "5", "b3": "6", "mine/notes": "kept", "README.md": "kept"}
    assert out.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_after_an_error_all_is_as_it_was(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match="full"), replace_folder(out, PARTS) as made:
        (made / "a").write_text("half")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
    write(out, a="1")
    with pytest.raises(OSError, match="full"), replace_folder(out, PARTS) as made:
        (made / "a").write_text("half")
        raise OSError("full")
    assert content(out) == {"a": "1"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_where_one_stands_stays_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", a="1")
    monkeypatch.chdir(tmp_path / "out")
    write(Path("."), a="2")
    assert Path("a").read_text() == "2" and os.path.samefile(".", tmp_path / "out")


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far")
    write(tmp_path / "out", a="1")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "far" / "a").read_text() == "1"


def test_leftovers_go_and_what_is_being_written_stays(tmp_path: Path) -> None:
    (tmp_path / ".x.pt.01234567.tmp").write_text("of a killed process")
    (tmp_path / ".x.pt.89abcdef.tmp").mkdir()
    (tmp_path / ".x.pt.89abcdef.tmp" / "a").write_text("of a killed process")
    others = [".y.pt.01234567.tmp", ".x.pt.0123456.tmp", ".x.pt.swp", "x.pt.01234567.tmp"]
    for name in others:
        (tmp_path / name).write_text("somebody else's")
    with replace_file(tmp_path / "x.pt") as file:
        remove_leftovers(tmp_path / "x.pt")
        file.write(b"whole")
    assert (tmp_path / "x.pt").read_bytes() == b"whole"
    assert {p.name for p in tmp_path.iterdir()} == {"x.pt", *others}


def test_a_file_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed between making and locking: writing goes on in one that is there."""
    tried: list[int] = []

    def slow(handle: int) -> bool | None:
        if not tried:
            for path in tmp_path.iterdir():
                path.unlink()
        tried.append(handle)
        return lock(handle)

    monkeypatch.setattr(files, "lock", slow)
    with replace_file(tmp_path / "x") as file:
        file.write(b"whole")
    assert len(tried) == 2 and (tmp_path / "x").read_bytes() == b"whole"


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "lock", lambda handle: None)
    (tmp_path / ".x.01234567.tmp").touch()
    with replace_file(tmp_path / "x") as file:
        file.write(b"whole")
    assert {p.name for p in tmp_path.iterdir()} == {"x", ".x.01234567.tmp"}


def test_two_that_make_one_folder_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replace_folder(out, PARTS) as slower:
        (slower / "a").write_text("slower")
        write(out, a="faster", b1="2")
        (out / "mine").write_text("kept")
    assert content(out) == {"a": "slower", "mine": "kept"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "file"
    with pytest.raises(OSError), replace_folder(other, PARTS) as made:
        (made / "a").write_text("1")
        other.write_text("no folder")
    assert other.read_text() == "no folder" and len(list(tmp_path.iterdir())) == 2


def test_what_is_mounted_within_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, a="1")
    (out / "volume").mkdir()
    (out / "volume" / "data").write_text("kept")
    before = (out / "volume").stat().st_ino
    monkeypatch.setattr(files, "_device", lambda path: int(path.name == "volume"))
    write(out, a="2")
    assert content(out) == {"a": "2", "volume/data": "kept"}
    assert (out / "volume").stat().st_ino == before
