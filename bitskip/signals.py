"""Being told to end: SIGTERM and SIGHUP end a verb as Ctrl-C does, with its files whole."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
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
    What the process was started to ignore (`nohup`) stays ignored. Finalizers: `_Finalizers`.
    """
    finalizers = _Finalizers()

    def interrupt(number: int, frame: Any) -> None:
        finalizers.told = True
        raise KeyboardInterrupt

    def end(number: int, frame: Any) -> None:
        finalizers.told = True
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    finalizers.handlers = {signal.SIGINT: interrupt}
    before = signal.getsignal(signal.SIGINT)
    hears = before in (interrupted, signal.default_int_handler)
    taken = []
    try:
        if hears:
            signal.signal(signal.SIGINT, interrupt)
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                finalizers.handlers[number] = end
                taken.append(number)
    except ValueError:  # not the main thread
        hears = False
    with finalizers:
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, signal.SIG_DFL)
            if hears:
                signal.signal(signal.SIGINT, before)


class _Finalizers:
    """What finalizers do with the exception of a signal, which may come at any instruction.

    Within one it would be lost, with a traceback: it is told again. An object whose making it cut
    short may fail in its own finalizer: no word of that, then or at the end of the process.
    """

    def __init__(self) -> None:
        self.told = False
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._before = sys.unraisablehook
        sys.unraisablehook = self._lost

    def __exit__(self, *_: object) -> None:
        if not self.told and sys.unraisablehook == self._lost:
            sys.unraisablehook = self._before

    def _lost(self, lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt | Terminated):
            number = exit_code(lost.exc_value) - 128
            if number in self.handlers:
                signal.signal(number, self.handlers[number])
            threading.Thread(target=_tell_again, args=[number], daemon=True).start()
        elif not self.told:
            self._before(lost)


def _tell_again(number: int) -> None:
    """The same signal a little later, when that finalizer is done; wakes the main thread."""
    time.sleep(0.01)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))
