"""Writing files and folders so that they are whole or absent, however the process ends."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux's renameat2


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an exception.

    It is written under a temporary name in the same folder (made if missing), flushed to the disk,
    then renamed; after an exception, or a crash, `path` is what it was. A file that is there keeps
    its mode, a new one has what the umask leaves of 0666; a symbolic link stays, its target is
    replaced. What is no regular file (a device, a pipe) is written to as it is. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as file:  # a folder is refused here
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    name, handle = _new_file(path)
    try:
        with os.fdopen(handle, "wb") as file:
            if mode is not None:
                os.fchmod(handle, stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


@contextmanager
def replace_folder(path: Path, parts: Sequence[str]) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends without an exception.

    parts: names (or patterns, as of fnmatch) of what the folder is made of; what else `path` holds
    stays. It is filled under a temporary name beside `path`, then the two change places at once
    where the system can do that (Linux). Elsewhere, and where `path` is a mount point or the
    current folder, its files are renamed one after the other in the order of `parts`. Until then,
    after an exception or a crash, `path` is what it was. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    beside = not existed or _can_change_places(path)
    remove_leftovers(path)
    if existed:
        _remove_unfinished(path, None)
    made, handle = _new_folder(path if beside else path / path.name)
    try:
        if existed:
            made.chmod(stat.S_IMODE(path.stat().st_mode))
        yield made
        if not existed:
            try:
                made.rename(path)
            except OSError:
                if not path.is_dir():  # else another process made it meanwhile
                    raise
            else:
                return
        if beside:
            for entry in path.iterdir():
                if not any(fnmatch(entry.name, part) for part in parts):
                    _same(entry, made / entry.name)
            beside = _exchanged(made, path)  # then `made` is what was there
        if not beside:
            _move_files(made, path, parts)
        shutil.rmtree(made, ignore_errors=True)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Delete what the above had written for `path` when its process was killed.

    What another process is still writing is locked, and left alone.
    """
    _remove_unfinished(path.parent, path.name)


def unfinished(name: str) -> bool:
    """Whether that is a name under which the above write."""
    return _UNFINISHED.fullmatch(name) is not None


def lock(handle: int) -> bool | None:
    """Lock an open file or folder without waiting, until it is closed.

    False if another process has it; None where the system or the file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _new_file(path: Path) -> tuple[Path, int]:
    """A new file with a temporary name for `path`, open and locked."""
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        handle = os.open(name, flags, 0o666)
        if _claimed(name, handle):
            return name, handle


def _new_folder(path: Path) -> tuple[Path, int | None]:
    """The same for a folder; None where a folder cannot be opened."""
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        name.mkdir()
        try:
            handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return name, None
        if _claimed(name, handle):
            return name, handle


def _claimed(name: Path, handle: int) -> bool:
    """Lock what was made, unless somebody took it for a leftover between making and locking."""
    with suppress(FileNotFoundError):
        if lock(handle) is not False and os.path.samestat(os.fstat(handle), name.stat()):
            return True
    os.close(handle)
    return False


def _remove_unfinished(folder: Path, of: str | None) -> None:
    """Delete unfinished files and folders that nobody has locked; of: for that name, None: all."""
    try:
        names = [n for n in os.listdir(folder) if unfinished(n)]
    except OSError:
        return
    for name in names:
        found = _UNFINISHED.fullmatch(name)
        if found is None or of not in (None, found[1]):
            continue
        with suppress(OSError):
            handle = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if lock(handle):
                    if stat.S_ISDIR(os.fstat(handle).st_mode):
                        shutil.rmtree(folder / name, ignore_errors=True)
                    else:
                        os.unlink(folder / name)
            finally:
                os.close(handle)


def _device(path: Path) -> int:
    return os.stat(path).st_dev


def _can_change_places(path: Path) -> bool:
    """Whether the folder can be renamed: no mount point, nor one within, which would be emptied
    with the old folder; not where somebody works from here."""
    above = path.parent
    return (
        os.access(above, os.W_OK)
        and {_device(path / folder) for folder, _, _ in os.walk(path)} == {_device(above)}
        and not os.path.samefile(path, os.curdir)
    )


def _same(entry: Path, to: Path) -> None:
    """The same file, folder or link under one more name; a copy where there are no hard links."""
    if entry.is_dir() and not entry.is_symlink():
        to.mkdir()
        shutil.copystat(entry, to)
        for inner in entry.iterdir():
            _same(inner, to / inner.name)
        return
    try:
        os.link(entry, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(entry, to, follow_symlinks=False)


def _exchanged(made: Path, path: Path) -> bool:
    """Let two folders change places in one step. False, and nothing done, where that is unknown."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(made), os.fsencode(path)
    return rename is not None and rename(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0


def _move_files(made: Path, path: Path, parts: Sequence[str]) -> None:
    """Rename a folder's files into another, in the order of `parts`; drop its other parts."""
    for part in parts:
        for old in path.iterdir():
            if fnmatch(old.name, part) and not (made / old.name).exists() and not old.is_dir():
                old.unlink()
        for new in sorted(made.iterdir()):
            if fnmatch(new.name, part):
                os.replace(new, path / new.name)
