"""Helper threads of an engine."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

from bitskip_cpu.kernels.layout import HELP, SYNC_STOP
from bitskip_cpu.workspace import Workspace


class Team:
    """Threads that take parts of the leader's stages (kernels.share).

    They wait in compiled code for some 30 ms after the last stage, without the interpreter's lock,
    and then sleep here until `wake`. They hold the workspace, not the engine.
    """

    def __init__(self, run: Callable[..., None], space: Workspace, helpers: int) -> None:
        self._run, self._space, self._helpers = run, space, helpers
        self._process = -1
        self._begin()

    def _begin(self) -> None:
        self._condition = threading.Condition()
        self._parked = self._calls = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def wake(self) -> None:
        """See that the helpers are there, before a call. After a fork they are made anew."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._begin()
            self._space.sync[:] = 0
            for i in range(1, self._helpers + 1):
                thread = threading.Thread(target=self._live, args=(i,), daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # parts of those that are missing go to the others
                    warnings.warn(
                        f"the engine computes with {i} instead of {self._helpers + 1} threads: "
                        f"{error}; raise the limit of processes (ulimit -u), or ask for fewer",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    break
                self._threads.append(thread)
        elif self._parked:
            with self._condition:
                self._calls += 1
                self._condition.notify_all()

    def _live(self, thread: int) -> None:
        while True:
            self._run(*self._space.structs, HELP, thread, 0)
            with self._condition:
                calls = self._calls
                self._parked += 1
                while not self._closed and self._calls == calls:
                    self._condition.wait()
                self._parked -= 1
                if self._closed:
                    return

    def close(self) -> None:
        """End the threads; part of the engine's end and of the interpreter's."""
        if self._process != os.getpid():
            return
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._space.sync[SYNC_STOP // 8] = 1
        for thread in self._threads:
            thread.join()
        self._process = -1
