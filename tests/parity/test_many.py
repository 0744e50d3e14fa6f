"""Many sequences in one call against each of them alone on the reference (SPEC 12.2)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import bitskip_cpu.rows
from bitskip_cpu.engine import Engine
from bitskip_cpu.workspace import Workspace
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rows import Row
from tests.helpers import random_tensors

CONFIG = small_twin("wt2-bitskip").replace(exit_head="per_layer", exit_norm="per_layer")
TENSORS = random_tensors(CONFIG)
RULES = (
    FixedExit(), FixedExit(1), FixedExit(2), FixedExit(3), GateExit(0.5), GateExit(0.5, last=3),
    GateExit(0.45, layers=(2,)), ConfidenceExit(0.0125),
    ConfidenceExit(0.0125, layers=(1, 2), last=3), ConfidenceExit(0.0002, "margin"),
    ConfidenceExit(1.0), GateExit(1.0),
)  # fmt: skip


class Sequence:
    """One text in an engine and, alone, in the reference."""

    def __init__(self, reference: ReferenceModel, engine: Engine, rule: Any) -> None:
        self.reference, self.rule = reference, rule
        self.deepest = FixedExit(rule.deepest(reference.config))
        self.alone, self.mixed = reference.new_cache(), engine.new_cache()

    def rows(self, draw: random.Random) -> tuple[list[Row], list[Any]]:
        """Some of its next tokens as rows, and what the reference says of each."""
        rows, expected = [], []
        prompt = self.alone.length == 0 or draw.random() < 0.3
        room = self.reference.config.max_position_embeddings - self.alone.length
        for _ in range(min(room, draw.choice((1, 2, 5, 17)) if prompt else draw.choice((1, 1, 2)))):
            rule = self.deepest if prompt else self.rule
            row = Row(draw.randrange(97), self.mixed, rule, draw.random() < 0.7)
            z, n = self.reference.step(row.token_id, self.alone, rule)
            rows.append(row)
            expected.append((z if row.wanted else None, n))
        return rows, expected

    def check(self) -> None:
        """Every cached key and value."""
        assert self.alone.length == self.mixed.length
        for i in range(self.deepest.layer or 0):
            for mine, kept in zip(self.mixed.layer(i), self.alone.layer(i), strict=True):
                assert mine.tobytes() == kept.tobytes()


def same(found: Any, expected: Any) -> None:
    assert [n for _, n in found] == [n for _, n in expected]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.tobytes() == b.tobytes())


def schedule(
    seed: int, calls: int = 6, threads: int = 1, config: ModelConfig = CONFIG,
    kind: str = "float32",
) -> set[int]:  # fmt: skip
    """Random calls of rows of up to 12 sequences; returns the depths seen."""
    draw, depths = random.Random(seed), set[int]()
    tensors = TENSORS if config is CONFIG else random_tensors(config)
    reference = ReferenceModel(config, tensors, kind)
    engine = Engine(config, tensors, threads, kind, share_from=0)
    sequences = [
        Sequence(reference, engine, draw.choice(RULES)) for _ in range(draw.choice((1, 3, 12)))
    ]
    for _ in range(calls):
        mixed: list[tuple[Row, Any]] = []
        for sequence in draw.sample(sequences, draw.randint(1, len(sequences))):
            at = 0  # its rows in order, anywhere between the others'
            for pair in zip(*sequence.rows(draw), strict=True):
                at = draw.randint(at, len(mixed))
                mixed.insert(at, pair)
                at += 1
        found = engine.step_many([row for row, _ in mixed])
        same(found, [expected for _, expected in mixed])
        depths.update(n for _, n in found)
    for sequence in sequences:
        sequence.check()
    return depths


@pytest.mark.parametrize("seed", range(8))
def test_random_calls(seed: int) -> None:
    schedule(seed, threads=1 + seed % 2, kind=KV_CACHES[seed // 2 % 3])


def test_rows_leave_at_every_depth() -> None:
    assert schedule(100, 10) | schedule(101, 10) == {1, 2, 3, 4}


@pytest.mark.slow
def test_a_thousand_random_calls() -> None:
    for seed in range(200, 400):
        schedule(seed, threads=1 + seed % 2, kind=KV_CACHES[seed // 2 % 3])


def test_more_rows_than_go_together() -> None:
    """Three calls of the kernels, whose borders cut sequences."""
    config = CONFIG.replace(max_position_embeddings=150)
    reference, engine = ReferenceModel(config, TENSORS), Engine(config, TENSORS, 1)
    caches = [engine.new_cache() for _ in range(2)]
    ids = [i % 97 for i in range(140)]
    rows = [Row(t, cache, FixedExit(), i == 139) for i, t in enumerate(ids) for cache in caches]
    found = engine.step_many(rows)
    expected = reference.logits(ids)
    assert all(z is None for z, _ in found[:-2])
    for z, n in found[-2:]:
        assert n == 4 and z is not None and z.tobytes() == expected[-1].tobytes()


def test_an_error_in_a_rule_leaves_all_sequences() -> None:
    engine = Engine(CONFIG, TENSORS, 1)
    alone = engine.logits([1, 2, 3])

    class Fails(FixedExit):
        def looks(self, config: ModelConfig) -> tuple[int, ...]:
            return (2,)

        def stops(self, probe: Any) -> bool:
            raise ZeroDivisionError

    caches = [engine.new_cache() for _ in range(3)]
    for cache in caches:
        engine.extend([1], cache)
    for wrong in (Row(2, caches[2], Fails()), Row(97, caches[2], FixedExit())):
        with pytest.raises((ZeroDivisionError, ValueError)):
            engine.step_many([Row(5, c, GateExit(0.5)) for c in caches] + [wrong])
        assert [cache.length for cache in caches] == [1, 1, 1]
    for cache in caches:
        assert engine.extend([2, 3], cache).tobytes() == alone[1:].tobytes()


GATES = (GateExit(0.5), GateExit(0.5, last=3), GateExit(0.45, layers=(2,)))


def asked_alike(rule: GateExit, threads: int, kind: str) -> set[int]:
    """Calls in which all rows, of three sequences, have equal gate rules; returns the depths."""
    draw, depths = random.Random(7), set[int]()
    reference = ReferenceModel(CONFIG, TENSORS, kind)
    engine = Engine(CONFIG, TENSORS, threads, kind, share_from=0)
    sequences = [Sequence(reference, engine, rule) for _ in range(3)]
    for count in (1, 9, 2):
        rows, expected = [], []
        for sequence in sequences:
            for _ in range(count):
                row = Row(draw.randrange(97), sequence.mixed, replace(rule), draw.random() < 0.7)
                z, n = reference.step(row.token_id, sequence.alone, rule)
                rows.append(row)
                expected.append((z if row.wanted else None, n))
        found = engine.step_many(rows)
        same(found, expected)
        depths.update(n for _, n in found)
    for sequence in sequences:
        sequence.check()
    return depths


@pytest.mark.parametrize("rule", GATES, ids=str)
def test_gates_asked_alike_are_one_call(rule: GateExit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bitskip_cpu.rows._Pass, "walk")
    for threads, kind in zip((1, 2, 1), KV_CACHES, strict=True):
        assert len(asked_alike(rule, threads, kind)) > 1


def test_a_lost_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    look = bitskip_cpu.rows._Pass.look

    def unmoved(self: Any, one: Any) -> None:
        """Planted: rows are taken to lie where they lay."""
        order = self.order
        look(self, one)
        self.order = order

    monkeypatch.setattr(bitskip_cpu.rows._Pass, "look", unmoved)
    with pytest.raises(AssertionError):
        asked_alike(GATES[0], 1, "float32")


def _keep_order(self: Any, order: list[int]) -> None:
    """Planted: hidden states stay where they were."""
    for array in (self.positions, self.caches):
        array[: len(order)] = array[order]


def _no_fill(self: Any, done: int, n: int) -> None:
    """Planted: keys and values of skipped blocks are not written."""


@pytest.mark.parametrize(
    ("owner", "name", "planted"),
    [(Workspace, "arrange", _keep_order), (bitskip_cpu.rows._Pass, "fill", _no_fill)],
    ids=["a row's state is taken for another's", "skipped blocks are not filled"],
)
def test_mistakes_are_seen(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, planted: Callable[..., Any]
) -> None:
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError):
        for seed in (100, 101):
            schedule(seed, 10)
