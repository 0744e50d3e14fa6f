"""Caches of many sequences within a bound of memory; what two share at their start is run once.

A position's keys and values follow from the ids up to it and the depth that ran them (SPEC 12.2).
So a sequence may begin with positions of another whose ids begin alike, and nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_ref.engine import Engine


class NoRoom(Exception):
    """The memory is taken: wait for a sequence to end."""


class Pool:
    """Lends caches of an engine. Not for several threads."""

    def __init__(self, engine: Engine, memory_bytes: int) -> None:
        """memory_bytes: of all keys and values together, of what is kept for later too."""
        self._engine, self._memory = engine, memory_bytes
        config = engine.config
        size = np.dtype(engine.kv_cache).itemsize  # an int8 cache's scales are small beside it
        heads = config.num_key_value_heads * config.head_dim
        self._position = 2 * size * heads * config.num_hidden_layers  # bytes
        self._lent: dict[int, int] = {}  # id of a cache -> bytes promised to it
        self._kept: list[tuple[tuple[int, ...], int, Any]] = []  # ids, depth, cache; oldest first
        self.hits = self.asked = 0
        """Positions of prompts that were held already, and of all prompts."""

    @property
    def used_bytes(self) -> int:
        """Promised to sequences, and kept for later."""
        kept = sum(len(ids) for ids, _, _ in self._kept) * self._position
        return sum(self._lent.values()) + kept

    def open(self, ids: Sequence[int], depth: int, most: int) -> Any:
        """A cache that holds the first positions of `ids` already: its `length` says how many.

        depth: blocks that run the prompt. most: positions that it may come to. All but the last
        id may be held. Raises NoRoom, and ValueError for what never fits.
        """
        need = most * self._position
        if need > self._memory:
            raise ValueError(
                f"{most} positions take {need} bytes of keys and values, all that there are for is "
                f"{self._memory}: ask for fewer tokens, or raise the memory for keys and values"
            )
        if sum(self._lent.values()) + need > self._memory:
            raise NoRoom
        best, same = -1, 0
        for i, (held, deep, _) in enumerate(self._kept):
            common = _common(held, ids[:-1]) if deep >= depth else 0
            if common > same:
                best, same = i, common
        if best >= 0:
            cache = self._kept[best][2].fork()
            self._kept.append(self._kept.pop(best))
            cache.length = same
        else:
            cache = self._engine.new_cache()
        self._lent[id(cache)] = need
        self.hits += same
        self.asked += len(ids)
        while self._kept and self.used_bytes > self._memory:
            self._kept.pop(0)
        return cache

    def keep(self, cache: Any, ids: Sequence[int]) -> None:
        """These ids' positions, the cache's first, all run at its depth, may serve others."""
        ids = tuple(ids[: cache.length])
        depth = _depth(cache, len(ids))
        if not ids or any(
            deep >= depth and held[: len(ids)] == ids for held, deep, _ in self._kept
        ):
            return
        copy = cache.fork()
        copy.length = len(ids)
        self._kept = [k for k in self._kept if not (k[1] <= depth and ids[: len(k[0])] == k[0])]
        self._kept.append((ids, depth, copy))

    def close(self, cache: Any) -> None:
        """The sequence has ended."""
        del self._lent[id(cache)]
        while self._kept and self.used_bytes > self._memory:
            self._kept.pop(0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids are the same from the start."""
    least = min(len(a), len(b))
    if a[:least] == tuple(b[:least]):
        return least
    return next(i for i in range(least) if a[i] != b[i])


def _depth(cache: Any, length: int) -> int:
    """Blocks that hold so many positions."""
    return sum(n >= length for n in cache._filled)
