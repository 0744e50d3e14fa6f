"""Caches of many sequences within a bound of memory; what they share at their start is run once.

The keys and values of a position follow from the ids up to it and from the depth to which they were
run (SPEC 12.4). So a page that one sequence filled serves every other whose ids begin alike. Pages
are known by a chain of hashes, in the manner of vLLM's blocks: a page's ids behind its forerunners'
hash. They are never written to while another may read them: a sequence that goes on within such a
page goes on in a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from bitskip_cpu.cache import KVCache, Pages
from bitskip_cpu.kernels.layout import LANES
from bitskip_ref.engine import Engine


class NoRoom(Exception):
    """All pages are in use: wait until a sequence has ended."""


class Kept(NamedTuple):
    """A page that sequences may begin with."""

    parent: bytes  # hash of all ids before it
    ids: tuple[int, ...]  # of its positions; the last page of a sequence may have less than LANES
    depth: int  # blocks that ran them


class LentCache(KVCache):
    """A cache on pages of a pool. Copies of it are ordinary caches."""

    numbers: list[int]

    def __init__(self, pool: Pool, numbers: list[int], most: int) -> None:
        super().__init__(pool.engine.config, pool.engine.kv_cache, pool.pages, numbers)
        self._pool = pool
        self.room = most
        self.shared = 0
        """Pages, from the first on, that others may read."""

    def require(self, blocks: int) -> int:
        length = super().require(blocks)
        if length < self.shared * LANES:
            self._pool.part_from(self, length // LANES)
        return length

    def _copy_type(self) -> type[KVCache]:
        return KVCache


class Pool:
    """Lends caches of one engine on pages that are taken once. Not for several threads."""

    def __init__(self, engine: Engine, memory_bytes: int) -> None:
        """memory_bytes: of all pages together; taken from the system as they are first used.

        Raises ValueError if there is not a page in it, and for more than the machine gives.
        """
        self.engine = engine
        self.page_bytes = Pages(engine.config, engine.kv_cache, 0).memory.shape[1]
        self.total = memory_bytes // self.page_bytes
        if self.total < 1:
            raise ValueError(
                f"{memory_bytes} bytes for keys and values: {LANES} positions of this model take "
                f"{self.page_bytes}, give at least as many"
            )
        try:
            self.pages = Pages(engine.config, engine.kv_cache, self.total)
        except (MemoryError, ValueError) as error:  # NumPy's, for more than there are addresses
            raise ValueError(
                f"{memory_bytes} bytes for keys and values are more than this machine gives "
                f"({error}): take less"
            ) from None
        self._free = list(range(self.total - 1, -1, -1))
        self._users = [0] * self.total
        self._kept: dict[int, Kept] = {}  # by page; the longest unused first
        self._next: dict[bytes, list[int]] = {}  # kept pages behind each hash
        self._lent: dict[int, LentCache] = {}
        self.hits = self.asked = self.evictions = 0
        """Positions that were there already, and of all prompts; kept pages that were given up."""

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return sum(users > 0 for users in self._users)

    @property
    def kept(self) -> int:
        """Pages that are held for later sequences, in use or not."""
        return len(self._kept)

    @property
    def used_bytes(self) -> int:
        """Of pages that sequences hold, or that are kept."""
        return (self.total - len(self._free)) * self.page_bytes

    def open(self, ids: Sequence[int], depth: int, most: int) -> LentCache:
        """A cache for up to `most` positions, which holds the first of `ids` already.

        Its `length` says how many: at most all but the last, whose logits are to be computed.
        depth: blocks 1..depth are wanted of them. Raises NoRoom while pages lack, ValueError for
        what never fits.
        """
        count, longest = -(-most // LANES), self.engine.config.max_position_embeddings
        if not len(ids) <= most or count > self.total or most > longest:
            raise ValueError(
                f"{most} positions: a sequence takes at least its {len(ids)} ids and at most "
                f"{min(self.total * LANES, longest)}, what the "
                "model and the memory for keys and values allow"
            )
        whole, partly, common = self._find(tuple(ids[:-1]), depth)
        held = [*whole, partly] if common else whole
        if count - len(whole) > len(self._free) + self._evictable(held):
            raise NoRoom
        for page in held:
            self._users[page] += 1
        numbers = whole + [self._take() for _ in range(count - len(whole))]
        if common:  # the last, partial page is another's: go on in a copy
            self.pages.memory[numbers[len(whole)]] = self.pages.memory[partly]
            self._users[partly] -= 1
        self._touch(held)
        cache = LentCache(self, numbers, most)
        cache.shared = len(whole)
        cache.length = len(whole) * LANES + common
        cache._filled[:depth] = [cache.length] * depth
        cache._note(cache.length)
        self._lent[id(cache)] = cache
        self.hits += cache.length
        self.asked += len(ids)
        return cache

    def keep(self, cache: LentCache, ids: Sequence[int]) -> None:
        """Let later sequences begin with these ids, the cache's first.

        All must have been run to one depth, under fixed exits: what other rules leave in a cache
        (SPEC 8.6) follows from more than ids.
        """
        ids = tuple(ids[: cache.length])
        depth = sum(filled >= len(ids) for filled in cache._filled)
        if not ids or not depth:
            return
        parent, held = b"", list[int]()
        for page, part in zip(cache.numbers, _parts(ids), strict=False):
            held.append(self._keep(page, Kept(parent, part, depth)))
            parent = _hash(parent, part)
        self._touch(held)
        cache.shared = max(cache.shared, -(-len(ids) // LANES))

    def close(self, cache: LentCache) -> None:
        """The sequence has ended: its pages are free, or kept; the cache takes nothing more."""
        del self._lent[id(cache)]
        cache.room = cache.shared = 0
        for page in cache.numbers:
            self._users[page] -= 1
            if not self._users[page] and page not in self._kept:
                self._free.append(page)

    # ---- pages ------------------------------------------------------------------------

    def part_from(self, cache: LentCache, first: int) -> None:
        """Give the cache pages of its own from number `first` on; in its turn, before it writes."""
        for i in range(first, cache.shared):
            page = cache.numbers[i]
            if self._users[page] == 1 and page in self._kept and not self._spare():
                self._forget(page)  # no room for two
            elif self._users[page] > 1 or page in self._kept:
                if not self._spare():
                    raise NoRoom
                own = self._take()
                self.pages.memory[own] = self.pages.memory[page]
                self._users[page] -= 1
                cache.numbers[i], cache.table[i] = own, self.pages.addresses()[own]
        cache.shared = first

    def _spare(self) -> int:
        return len(self._free) + self._evictable(())

    def _evictable(self, held: Sequence[int]) -> int:
        """Kept pages that nobody uses, but for those."""
        return sum(not self._users[page] and page not in held for page in self._kept)

    def _take(self) -> int:
        """A page for one user."""
        if not self._free:
            page = next(page for page in self._kept if not self._users[page])
            self._forget(page)
            self._free.append(page)
            self.evictions += 1
        page = self._free.pop()
        self._users[page] = 1
        return page

    # ---- what is kept -----------------------------------------------------------------

    def _find(self, ids: tuple[int, ...], depth: int) -> tuple[list[int], int, int]:
        """Whole pages that hold the first ids; the next one's page, and how many of its ids."""
        whole, parent = list[int](), b""
        for part in _parts(ids):
            best, most = -1, 0
            for page in self._next.get(parent, ()):
                kept = self._kept[page]
                common = _common(kept.ids, part) if kept.depth >= depth else 0
                if common > most:
                    best, most = page, common
            if most < LANES:
                return whole, best, most
            whole.append(best)
            parent = _hash(parent, part)
        return whole, -1, 0

    def _touch(self, pages: list[int]) -> None:
        """Note that a sequence used these: the last of them are given up first."""
        for page in reversed(pages):
            self._kept[page] = self._kept.pop(page)

    def _keep(self, page: int, new: Kept) -> int:
        """Keep a page, or another that serves as well; which one."""
        for other in list(self._next.get(new.parent, ())):
            old = self._kept[other]
            if old.depth >= new.depth and old.ids[: len(new.ids)] == new.ids:
                return other
            if old.depth <= new.depth and new.ids[: len(old.ids)] == old.ids:
                self._forget(other)
                if not self._users[other]:
                    self._free.append(other)
        if page in self._kept:
            self._forget(page)
        self._kept[page] = new
        self._next.setdefault(new.parent, []).append(page)
        return page

    def _forget(self, page: int) -> None:
        parent = self._kept.pop(page).parent
        self._next[parent].remove(page)
        if not self._next[parent]:
            del self._next[parent]


def _parts(ids: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Ids page by page."""
    return (ids[start : start + LANES] for start in range(0, len(ids), LANES))


def _hash(parent: bytes, ids: tuple[int, ...]) -> bytes:
    return sha256(parent + np.array(ids, np.int64).tobytes()).digest()


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many ids are the same from the start."""
    least = min(len(a), len(b))
    return next((i for i in range(least) if a[i] != b[i]), least)
