"""A folder for code that will be run: nobody else may have written what is read from it.

Trusted is what the user of this process or the superuser owns and no one else may write. Links,
pipes and devices are not files here; opening one does not wait. Where the system has no owners of
that kind (Windows), its own rules for the user's folder have to do.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


def writable_folder(folder: Path) -> bool:
    """Whether new files can be kept there; makes the folder, for its owner alone, if need be."""
    return refusal(folder) is None


def refusal(folder: Path) -> str | None:
    """Why new files cannot be kept there, to be put behind the folder's name; None if they can."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return "is no folder"
        if not _ours(found, stat.S_ISDIR):
            if found.st_uid not in (0, os.geteuid()):
                return f"belongs to another user ({found.st_uid}), whose code would be run"
            mode = stat.S_IMODE(found.st_mode)
            return f"can be written by other users (mode {mode:o}): chmod go-w would mend it"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def read_file(path: Path) -> bytes | None:
    """What is in a trusted regular file of a trusted folder; None for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        if not _ours(path.parent.lstat(), stat.S_ISDIR):
            return None
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        if not _ours(os.fstat(handle), stat.S_ISREG):
            return None
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read()
    except OSError:
        return None
    finally:
        os.close(handle)


def _ours(found: os.stat_result, kind: Callable[[int], bool]) -> bool:
    if not kind(found.st_mode):
        return False
    if not hasattr(os, "geteuid"):
        return True
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
