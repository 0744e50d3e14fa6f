"""Ctrl-C before a verb runs, and after: one line, and the end."""

from __future__ import annotations

import _signal as signal  # builtin: what the module `signal` imports takes tens of milliseconds
import os

TYPE_CHECKING = False  # nor `typing`
if TYPE_CHECKING:
    from typing import Any


def interrupted(number: int, frame: Any) -> None:
    """End at once: an exception would be a traceback through modules that are half imported."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


def listen() -> None:
    """Hear Ctrl-C, unless nobody does: a process that was started in the background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, interrupted)  # till `signals.ends_on_signals`
        except ValueError:  # not the main thread
            return
