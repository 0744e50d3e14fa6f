"""A lock that never waits for its own thread."""

from __future__ import annotations

import threading


class Turn:
    """Whose turn it is with an engine or a cache; a context manager.

    Python's own locks stop for ever where a thread waits for itself, as a callback would that calls
    the engine which called it. This one raises RuntimeError.
    """

    __slots__ = ("_lock", "_refusal", "_wait", "owner", "taken")

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

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self.owner == me or not self._lock.acquire(self._wait):
            raise RuntimeError(self._refusal)
        self.owner = me
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.owner = None
        self._lock.release()
