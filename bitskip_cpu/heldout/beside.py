"""Windows of a text side by side, each on an engine and a thread of its own (`Engine.beside`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

from bitskip_cpu import engine as numba_engine
from bitskip_ref.engine import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    engine: Engine, work: Callable[[Engine, Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """work(an engine, item) of each item, in order; the first error ends it."""
    engines: Sequence[Engine] = [engine]
    if isinstance(engine, numba_engine.Engine):
        engines = engine.beside()
    if len(engines) == 1:
        yield from (work(engines[0], item) for item in items)
        return
    free: SimpleQueue[Engine] = SimpleQueue()
    for one in engines:
        free.put(one)

    def run(item: Item) -> Result:
        mine = free.get()
        try:
            return work(mine, item)
        finally:
            free.put(mine)

    with ThreadPoolExecutor(len(engines)) as pool:
        yield from pool.map(run, items)  # which cancels what waits when it is left
