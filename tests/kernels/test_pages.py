"""The pool of pages: what caches share is what each would have computed alone (SPEC 12.4)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_cpu.pages import NoRoom, Pool
from bitskip_ref.config import small_twin
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.exits import FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rows import Row
from tests.helpers import random_tensors

CONFIG = small_twin("wt2-bitskip").replace(max_position_embeddings=100)
TENSORS = random_tensors(CONFIG)
IDS = [(7 * i * i + i) % 97 for i in range(100)]


def pool_of(pages: int, kind: str = "float32") -> Pool:
    engine = Engine(CONFIG, TENSORS, 1, kind)
    return Pool(engine, pages * Pool(engine, 1 << 20).page_bytes)


def run(pool: Pool, cache: Any, ids: list[int], depth: int = 4) -> np.ndarray:
    """Logits of the last, the others run, too."""
    return pool.engine.extend(ids[cache.length :], cache, exit_layer=depth, last_only=True)


def check(cache: Any, alone: Any, depth: int) -> None:
    """Every cached key and value against the reference's."""
    assert cache.length == alone.length
    for i in range(depth):
        for mine, kept in zip(cache.layer(i), alone.layer(i), strict=True):
            assert mine.tobytes() == kept.tobytes()


def test_a_prefix_is_run_once() -> None:
    pool, alone = pool_of(20), pool_of(1).engine
    first = pool.open(IDS[:40], 4, 60)
    assert first.length == 0 and first.room == 60
    run(pool, first, IDS[:40])
    pool.keep(first, IDS[:40])
    for ids, hit in (
        (IDS[:40], 39), (IDS[:50], 40), (IDS[:33], 32), (IDS[:32], 31), (IDS[:5], 4),
        (IDS[:20] + [96] * 20, 20), ([96, *IDS[:40]], 0), (IDS[:1], 0),
    ):  # fmt: skip
        cache = pool.open(ids, 4, 60)
        assert cache.length == hit, ids
        assert run(pool, cache, ids).tobytes() == alone.logits(ids)[-1:].tobytes()
        pool.close(cache)
    assert run(pool, first, IDS[:60]).tobytes() == alone.logits(IDS[:60])[-1:].tobytes()
    assert pool.hits == 39 + 40 + 32 + 31 + 4 + 20
    pool.close(first)
    assert pool.used == 0 and pool.kept == 3


def test_a_chat_runs_its_new_tokens_alone() -> None:
    pool, ids = pool_of(8), IDS[:3]
    for turn in range(1, 12):
        cache = pool.open(ids, 4, 100)
        assert cache.length == (0 if turn == 1 else len(ids) - 5)
        run(pool, cache, ids)
        pool.keep(cache, ids)
        pool.close(cache)
        ids = IDS[: len(ids) + 5]


def test_depth_decides() -> None:
    pool = pool_of(20)
    shallow = pool.open(IDS[:33], 2, 33)
    run(pool, shallow, IDS[:33], 2)
    pool.keep(shallow, IDS[:33])
    assert pool.open(IDS[:33], 3, 33).length == 0
    deeper = pool.open(IDS[:33], 1, 33)
    assert deeper.length == 32
    with pytest.raises(ValueError, match="filled at exit layer 1"):
        pool.engine.extend([1], deeper)
    deep = pool.open(IDS[:33], 4, 33)
    run(pool, deep, IDS[:33])
    pool.keep(deep, IDS[:33])  # takes the place of what serves less
    assert pool.open(IDS[:33], 4, 33).length == 32


def test_memory_is_bounded() -> None:
    pool = pool_of(4)
    first = pool.open(IDS[:40], 4, 48)
    with pytest.raises(NoRoom):
        pool.open(IDS[:3], 4, 17)
    second = pool.open(IDS[:3], 4, 16)
    with pytest.raises(ValueError, match="exceed the context of 16"):
        run(pool, second, IDS[:17])
    for most in (65, 101, 2):
        with pytest.raises(ValueError, match="positions: a sequence takes at least its 3 ids"):
            pool.open(IDS[:3], 4, most)
    run(pool, first, IDS[:40])
    pool.keep(first, IDS[:40])
    pool.close(first)
    with pytest.raises(ValueError, match="exceed the context of 0"):
        pool.engine.extend([1], first)
    pool.close(second)
    assert (pool.used, pool.kept, pool.used_bytes) == (0, 3, 3 * pool.page_bytes)
    third = pool.open([96] * 3, 4, 40)  # takes the free one and the last two of what is kept
    assert pool.evictions == 2 and pool.used == 3
    pool.close(third)
    assert pool.open(IDS[:20], 4, 20).length == 16
    with pytest.raises(ValueError, match="give at least as many"):
        Pool(pool.engine, pool.page_bytes - 1)
    for size in (1 << 62, 10**30):
        with pytest.raises(ValueError, match="more than this machine gives"):
            Pool(pool.engine, size)


def test_what_is_kept_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first owner goes back and takes another way; so do those who share it."""

    def all_ways() -> None:
        pool, alone = pool_of(12), pool_of(1).engine
        first = pool.open(IDS[:40], 4, 64)
        run(pool, first, IDS[:40])
        pool.keep(first, IDS[:40])
        second = pool.open(IDS[:45], 4, 64)
        for cache, start in ((first, 40), (second, 40), (first, 20), (second, 3), (first, 0)):
            cache.length = start
            other = IDS[:start] + [90] * 5
            assert run(pool, cache, other).tobytes() == alone.logits(other)[-1:].tobytes()
            third = pool.open(IDS[:45], 4, 45)
            assert third.length == 40
            assert run(pool, third, IDS[:45]).tobytes() == alone.logits(IDS[:45])[-1:].tobytes()
            pool.close(third)

    all_ways()
    monkeypatch.setattr(Pool, "part_from", lambda *_: None)  # planted: a shared page is written
    with pytest.raises(AssertionError):
        all_ways()


def test_a_copy_is_an_ordinary_cache() -> None:
    pool = pool_of(6)
    cache = pool.open(IDS[:20], 4, 20)
    run(pool, cache, IDS[:20])
    copy = cache.fork()
    pool.close(cache)
    assert run(pool, copy, IDS[:60]).tobytes() == pool.engine.logits(IDS[:60])[-1:].tobytes()


def test_what_is_not_finite_reaches_nobody_else() -> None:
    pool = pool_of(2)
    cache = pool.open(IDS[:20], 4, 32)
    run(pool, cache, IDS[:20])
    for page in cache.numbers:
        pool.pages.parts(page, 4)[..., pool.pages.values :].view(np.float32)[:] = np.nan
    pool.close(cache)
    cache = pool.open(IDS[:20], 4, 32)
    assert run(pool, cache, IDS[:20]).tobytes() == pool.engine.logits(IDS[:20])[-1:].tobytes()


def schedule(seed: int, steps: int = 40, kind: str = "float32") -> Pool:
    """Random arrivals, chunks, exits, speculation, forks and cancellations in few pages."""
    draw = random.Random(seed)
    pool, reference = pool_of(draw.choice((6, 10)), kind), ReferenceModel(CONFIG, TENSORS, kind)
    families = [IDS, IDS[:20] + IDS[40:], [5, *IDS]]
    running: list[dict[str, Any]] = []
    for _ in range(steps):
        if draw.random() < 0.4 and len(running) < 4:
            ids = draw.choice(families)[: draw.choice((3, 16, 17, 32, 40))]
            depth = draw.choice((2, 3, 4, 4))
            try:
                cache = pool.open(ids, depth, len(ids) + 12)
            except NoRoom:
                continue
            alone = reference.new_cache()
            if cache.length:
                reference.extend(ids[: cache.length], alone, exit_layer=depth)
                check(cache, alone, depth)
            running.append(
                {"ids": list(ids), "cache": cache, "alone": alone, "depth": depth, "plain": True}
            )
        rows, whose = list[Row](), list[dict[str, Any]]()
        for text in running:
            cache, ids, depth = text["cache"], text["ids"], text["depth"]
            for token in ids[cache.length :][: draw.choice((1, 5, 16))]:
                rows.append(Row(token, cache, FixedExit(depth), draw.random() < 0.5))
                whose.append(text)
        expected = [
            reference.step(row.token_id, text["alone"], row.rule)[0].tobytes()
            for row, text in zip(rows, whose, strict=True)
        ]
        for (z, _), row, wanted in zip(pool.engine.step_many(rows), rows, expected, strict=True):
            assert (z is not None) == row.wanted and (z is None or z.tobytes() == wanted)
        for text in list(running):
            cache, ids, depth = text["cache"], text["ids"], text["depth"]
            if cache.length < len(ids):
                continue
            whole = text["plain"]
            if draw.random() < 0.3 and depth == 4 and cache.length + 4 <= cache.room:
                drafts, z = pool.engine.speculate(9, cache, 3, Draft(1))
                if whole:
                    found = reference.logits([*ids, 9, *drafts])[len(ids) :]
                    assert z.tobytes() == found.tobytes()
                cache.length = len(ids)
            if draw.random() < 0.3 and cache.length < cache.room:
                copy = cache.fork()
                rule = GateExit(0.5, last=depth)
                one, two = pool.engine.step(3, copy, rule), pool.engine.step(3, cache, rule)
                alone = reference.step(3, text["alone"], rule)
                assert one[0].tobytes() == two[0].tobytes() == alone[0].tobytes()
                assert one[1] == two[1] == alone[1]
                ids.append(3)
                text["plain"] = False
            check(cache, text["alone"], depth)
            if draw.random() < 0.5 and text["plain"]:
                pool.keep(cache, ids)
            if draw.random() < 0.6:
                pool.close(cache)
                running.remove(text)
    held = sum(len(set(text["cache"].numbers)) for text in running)
    assert pool.used <= held and all(users >= 0 for users in pool._users)
    for text in running:
        pool.close(text["cache"])
    assert pool.used == 0 and len(pool._free) + pool.kept == pool.total
    assert sorted([*pool._free, *pool._kept]) == list(range(pool.total))
    return pool


def test_random_schedules() -> None:
    pools = [schedule(seed, kind=kind) for seed, kind in enumerate(KV_CACHES)]
    assert sum(pool.hits for pool in pools) > 99 and sum(pool.evictions for pool in pools)


@pytest.mark.slow
def test_many_random_schedules() -> None:
    for seed in range(100, 200):
        schedule(seed, 60, KV_CACHES[seed % 3])


def test_a_wrong_page_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what is found belongs to other ids."""
    find = Pool._find

    def wrong(self: Pool, ids: tuple[int, ...], depth: int) -> Any:
        whole, partly, common = find(self, ids, depth)
        return whole[:1] * len(whole), partly, common

    monkeypatch.setattr(Pool, "_find", wrong)
    with pytest.raises(AssertionError):
        test_a_prefix_is_run_once()
