"""Being told to end: SIGTERM and SIGHUP end a verb as Ctrl-C does, with its files whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bitskip.early import interrupted

_NAMES = ("SIGTERM", "SIGHUP")


class Terminated(BaseException):
    """A signal other than Ctrl-C's told the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(error: BaseException) -> int:
    """What a shell calls the end of a process by that signal: 130 for Ctrl-C."""
    return 128 + getattr(error, "number", int(signal.SIGINT))


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """Raise Terminated in the block when such a signal comes; a second one ends the process.

    Ctrl-C, which before and after ends the program at once (`early`), is a KeyboardInterrupt there.
    What the process was started to ignore (`nohup`) stays ignored.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    early = signal.getsignal(signal.SIGINT) is interrupted
    if early:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    taken = []
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            try:
                signal.signal(number, end)
            except ValueError:  # not the main thread
                break
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        if early:
            signal.signal(signal.SIGINT, interrupted)
