"""What may be written to a terminal: harmless text, and colours where they are wanted."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

# All control characters but line break and tab, and those that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters spelled out, as \\x1b: none can steer the terminal."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def open_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) such that lead nowhere.

    Or a file opened later would take their place, and messages meant for people go into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def drop_unwritten() -> None:
    """Drop what standard output cannot take: Python's own end would fail on it (exit code 120)."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def animated(file: IO[str]) -> bool:
    """Whether a line may be overwritten: a terminal that is not a dumb one."""
    return file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def coloured(file: IO[str]) -> bool:
    """Whether to write colours: NO_COLOR says no, FORCE_COLOR yes, else a terminal has them."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or animated(file)


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[..., None]]:
    """A bar on standard error if that is a terminal.

    The function given takes how much was done since, and optionally what is being done now.
    """
    if not animated(sys.stderr):  # importing rich takes as long as starting Python
        yield lambda done, now=None: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: float, now: str | None = None) -> None:
            bar.update(task, advance=done, description=now)

        yield advance
