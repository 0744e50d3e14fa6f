"""Turns with an engine or a cache, which neither a callback nor a fork can spoil."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

REENTRY = (
    "the engine was called by its own trace, visit or exit rule, in the middle of a call: note "
    "there what is needed, and call it when that has returned"
)
IN_USE = (
    "the cache is in the middle of a call: let that end first, or give each text a cache of its "
    "own (cache.fork())"
)


class Turn:
    """Whose turn it is with an engine or a cache.

    A call takes the lock, then looks at `owner`, which only a call further up in its own thread can
    have set: a callback's, and waiting for that would be for ever. (Python leaves its own locks
    right where Ctrl-C comes between; it would not leave a context manager written here.)
    In a forked child, turns of threads that did not come along are over.
    """

    __slots__ = ("__weakref__", "cut_off", "lock", "owner", "taken")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: int | None = None
        """The thread (`threading.get_ident`) that is in a call; None: none."""
        self.taken = 0
        """How many calls there were."""
        self.cut_off = False
        """Whether the last fork, seen from the child, ended a call in the middle."""
        _TURNS.add(self)

    def forked(self) -> None:
        """In a child, by its only thread: end the turn of any other."""
        self.cut_off = not self.lock.acquire(blocking=False)
        if self.cut_off:
            self.lock, self.owner = threading.RLock(), None
        else:
            self.lock.release()


_TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()


def _forked() -> None:
    for turn in list(_TURNS):
        turn.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

Verb = TypeVar("Verb", bound=Callable[..., Any])
Result = TypeVar("Result")
MOST_SEQUENCES = 256  # of one call


def in_turns(engine: Any, caches: Iterable[Any], run: Callable[[], Result]) -> Result:
    """`run()` in the turn of the engine and of all caches.

    They are taken in one order by everybody, so that no two calls wait for each other. Raises
    ValueError for more than MOST_SEQUENCES, RuntimeError in a callback of any.
    """
    turns = [engine._turn, *sorted((cache.turn for cache in caches), key=id)]
    if len(turns) > MOST_SEQUENCES + 1:
        raise ValueError(
            f"{len(turns) - 1} sequences: a call takes at most {MOST_SEQUENCES}, make several"
        )

    def take(i: int) -> Result:  # one level for each: see Turn
        if i == len(turns):
            return run()
        turn = turns[i]
        with turn.lock:
            if turn.owner is not None:
                raise RuntimeError(IN_USE if i else REENTRY)
            turn.taken += 1
            turn.owner = threading.get_ident()
            try:
                return take(i + 1)
            finally:
                turn.owner = None

    return take(0)


def in_turn(verb: Verb) -> Verb:
    """A method `verb(engine, tokens, cache, ...)` that waits for its turn with both.

    Raises ValueError for what is no cache of the engine's, RuntimeError in a callback of either.
    """

    @wraps(verb)
    def call(engine: Any, *arguments: Any, **options: Any) -> Any:
        cache: Any = arguments[1] if len(arguments) > 1 else options.get("cache")
        engine._own(cache)
        mine, its = engine._turn, cache.turn
        with mine.lock, its.lock:
            if mine.owner is not None:
                raise RuntimeError(REENTRY)
            if its.owner is not None:
                raise RuntimeError(IN_USE)
            its.taken += 1
            me = threading.get_ident()
            mine.owner = its.owner = me
            try:
                return verb(engine, *arguments, **options)
            finally:
                mine.owner = its.owner = None

    return cast(Verb, call)
