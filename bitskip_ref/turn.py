"""A lock that never waits for its own thread, nor for one that a fork has left behind."""

from __future__ import annotations

import os
import threading
import weakref


class Turn:
    """Whose turn it is with an engine or a cache; a context manager.

    Python's own locks stop for ever where a thread waits for itself, as a callback would that calls
    the engine which called it. This one raises RuntimeError. In a forked child, turns of threads
    that did not come along are over.
    """

    __slots__ = ("__weakref__", "_lock", "_refusal", "_wait", "cut_off", "owner", "taken")

    def __init__(self, refusal: str, wait: bool) -> None:
        """refusal: what to say to a thread that has the turn already, and to others unless `wait`.

        wait: whether others wait for their turn.
        """
        self._refusal, self._wait = refusal, wait
        self._lock = threading.Lock()
        self.owner: int | None = None
        """The thread (`threading.get_ident`) whose turn it is; None: nobody's."""
        self.taken = 0
        """How often there was a turn."""
        self.cut_off = False
        """Whether the last fork, seen from the child, ended somebody's turn in the middle."""
        _TURNS.add(self)

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self.owner == me or not self._lock.acquire(self._wait):
            raise RuntimeError(self._refusal)
        self.owner = me
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.owner = None
        self._lock.release()

    def forked(self) -> None:
        """In a child, by its only thread: end the turn of any other."""
        self.cut_off = self.owner != threading.get_ident() and self._lock.locked()
        if self.cut_off:
            self._lock, self.owner = threading.Lock(), None


_TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()


def _forked() -> None:
    for turn in list(_TURNS):
        turn.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
