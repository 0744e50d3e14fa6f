"""Windows of a text side by side, each on an engine and a thread of its own (`Engine.beside`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

from bitskip_ref.engine import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Engine, Any, Item], Result]
"""What is done with an item: it gets an engine, and an empty cache of that engine's."""


def one_by_one(engine: Engine, work: Work[Item, Result], items: Iterable[Item]) -> Iterator[Result]:
    """Work on each item, in order, on this engine."""
    cache = engine.new_cache()  # for all of them: to take its memory anew costs a twentieth
    for item in items:
        cache.length = 0
        yield work(engine, cache, item)


def side_by_side(
    engine: Engine, work: Work[Item, Result], items: Iterable[Item]
) -> Iterator[Result]:
    """As `one_by_one`, on all of the engines beside this one; the first error ends it."""
    engines = engine.beside()
    if len(engines) == 1:
        yield from one_by_one(engines[0], work, items)
        return
    free: SimpleQueue[tuple[Engine, Any]] = SimpleQueue()
    for one in engines:
        free.put((one, one.new_cache()))

    def run(item: Item) -> Result:
        mine, cache = free.get()
        cache.length = 0
        try:
            return work(mine, cache, item)
        finally:
            free.put((mine, cache))

    with ThreadPoolExecutor(len(engines)) as pool:
        yield from pool.map(run, items)  # which cancels what waits when it is left
