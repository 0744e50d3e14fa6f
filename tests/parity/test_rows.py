"""What an engine is asked, and by whom: rows and threads, the same in every engine."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bitskip_ref.config import small_twin
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rows import Row
from tests.helpers import random_tensors, random_tokens
from tests.parity.engines import ENGINES, make
from tests.tables import TableEngine

CONFIG = small_twin("wt2-bitskip")  # with gates
TENSORS = random_tensors(CONFIG)
IDS = random_tokens(CONFIG, 40)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return make(request.param, CONFIG, TENSORS)


def rules(engine: Any) -> list[Any]:
    fixed = [FixedExit(), FixedExit(2)]
    if "Onnx" in type(engine).__name__:
        return fixed
    return [*fixed, ConfidenceExit(0.02), GateExit(0.5), ConfidenceExit(0.02, layers=(2,), last=3)]


# ---- rows of many sequences (SPEC 12.2) -------------------------------------------------


def test_rows_of_many_sequences_have_the_bits_of_each_alone(engine: Any) -> None:
    """Sequences of all lengths and rules, also two rows of one, in turns over several calls."""
    choices = rules(engine)
    sequences = []
    for i in range(7):
        rule, alone, mixed = choices[i % len(choices)], engine.new_cache(), engine.new_cache()
        for cache in (alone, mixed):
            engine.extend(IDS[: 1 + 2 * i], cache, exit_layer=rule.deepest(CONFIG))
        sequences.append((rule, alone, mixed))
    for turn in range(4):
        rows = [
            Row((5 * turn + i) % 97, mixed, rule) for i, (rule, _, mixed) in enumerate(sequences)
        ]
        rows += rows[:2]
        expected = [engine.step(row.token_id, sequences[i % 7][1], row.rule)
                    for i, row in enumerate(rows)]  # fmt: skip
        found = engine.step_many(rows)
        assert [n for _, n in found] == [n for _, n in expected]
        for (a, _), (b, _) in zip(expected, found, strict=True):
            assert a.tobytes() == b.tobytes() and a.shape == b.shape == (CONFIG.vocab_size,)
    assert engine.step_many([Row(1, sequences[0][2], FixedExit(), wanted=False)]) == [(None, 4)]
    engine.step(1, sequences[0][1], FixedExit())
    for _, alone, mixed in sequences:
        assert alone.length == mixed.length
        assert (
            engine.extend([1], alone, exit_layer=2).tobytes()
            == engine.extend([1], mixed, exit_layer=2).tobytes()
        )
    assert engine.step_many([]) == []


def test_a_wrong_row_is_refused(engine: Any) -> None:
    full, cache = engine.new_cache(), engine.new_cache()
    engine.extend([1] * CONFIG.max_position_embeddings, full)
    for row, words in (
        (Row(97, cache, FixedExit()), "0..96"),
        (Row(1, full, FixedExit()), "exceed the context"),
        (Row(1, cache, FixedExit(5)), "choose 1..4"),
        (Row(1, None, FixedExit()), "not this engine's"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.step_many([Row(1, cache, FixedExit()), row])  # none of them has then run
        assert cache.length == 0 and full.length == CONFIG.max_position_embeddings


# ---- what is asked (faults A2, B7) ----------------------------------------------------


class Odd:
    """A rule that says what it was told."""

    def __init__(self, deepest: Any = 4, looks: Any = (), stops: Any = lambda probe: False) -> None:
        self._deepest, self._looks, self.stops = deepest, looks, stops

    def __repr__(self) -> str:  # the name of a test: the same in every process
        return f"Odd({self._deepest}, {self._looks})"

    def deepest(self, config: Any) -> Any:
        return self._deepest

    def looks(self, config: Any) -> Any:
        return self._looks

    def check(self, config: Any) -> None: ...


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (ConfidenceExit(1.0, layers=(1000,)), "exit looks"),
        (ConfidenceExit(1.0, layers=(5,)), "stay below 4"),
        (ConfidenceExit(1.0, layers=(4,)), "stay below 4"),
        (ConfidenceExit(1.0, layers=(-1,)), "exit looks"),
        (ConfidenceExit(1.0, layers=(0, 1)), "exit looks"),
        (ConfidenceExit(1.0, layers=(1.0,)), "whole numbers"),
        (ConfidenceExit(1.0, layers=("1",)), "whole numbers"),
        (ConfidenceExit(1.0, layers=(True,)), "whole numbers"),
        (Odd(4, (2, 1)), "rise"),
        (Odd(4, (2, 2)), "rise"),
        (Odd(4, (1 << 40,)), "exit looks"),
        (Odd(4, (None,)), "whole numbers"),
        (Odd(0), "choose 1..4"),
        (Odd(5), "choose 1..4"),
        (Odd(2.0), "whole number"),
        (Odd(float("nan")), "whole number"),
        (18, "no exit rule"),
        (None, "no exit rule"),
    ],
    ids=repr,
)
def test_a_rule_is_checked_in_step(engine: Any, rule: Any, words: str) -> None:
    cache = engine.new_cache()
    engine.extend(IDS[:3], cache)
    with pytest.raises(ValueError, match=words):
        engine.step(1, cache, rule)
    assert cache.length == 3
    if not hasattr(rule, "looks"):
        with pytest.raises(ValueError, match=words):
            next(stream(engine, IDS[:2], rule, Sampler(), 3))
    assert engine.extend([1], cache).tobytes() == engine.logits([*IDS[:3], 1])[3:].tobytes()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e, c: e.extend([1], c, exit_layer=1.5), "whole number"),
        (lambda e, c: e.extend([1], c, exit_layer=True), "whole number"),
        (lambda e, c: e.extend([1], c, exit_layer="2"), "whole number"),
        (lambda e, c: e.extend([1.0], c), "integers"),
        (lambda e, c: e.extend([True], c), "integers"),
        (lambda e, c: e.extend([1 << 70], c), "integers"),
        (lambda e, c: e.extend(["1"], c), "integers"),
        (lambda e, c: e.extend([[1]], c), "no tokens"),
        (lambda e, c: e.extend(1, c), "no tokens"),
        (lambda e, c: e.step(1.5, c, FixedExit()), "integers"),
        (lambda e, c: e.step(-1, c, FixedExit()), "integers"),
        (lambda e, c: e.extend_exits([1], c, [], lambda *_: None), "no exit layers"),
        (lambda e, c: e.extend_exits([1], c, [1, 2.5], lambda *_: None), "whole number"),
        (lambda e, c: e.extend([1], None), "not this engine's"),
        (lambda e, c: e.speculate(1, c, 2.0, Draft(1)), "0..16"),
        (lambda e, c: e.speculate(1, c, 2, Draft(1.5)), "draft exit"),
        (lambda e, c: e.speculate(1, c, 2, Draft(1, vocab=2.5)), "draft vocabulary"),
        (lambda e, c: e.round(c, Draft(4)), "choose 1..3"),
        (lambda e, c: e.round(c, Draft(1)).verify(), "nothing to verify"),
    ],
)
def test_odd_arguments(engine: Any, call: Callable[[Any, Any], Any], words: str) -> None:
    cache = engine.new_cache()
    with pytest.raises(ValueError, match=words):
        call(engine, cache)
    assert cache.length == 0


@pytest.mark.parametrize("length", [-1, 1.5, "3", None, 4, 1 << 70, float("nan")])
def test_a_length_that_cannot_be(engine: Any, length: Any) -> None:
    cache = engine.new_cache()
    engine.extend(IDS[:3], cache)
    cache.length = length
    with pytest.raises(ValueError, match="cache"):
        engine.extend([1], cache)


def test_numpy_integers_are_integers(engine: Any) -> None:
    cache = engine.new_cache()
    engine.extend(np.array(IDS[:4], np.int32), cache, exit_layer=np.int64(4))
    cache.length = np.int64(3)
    z, n = engine.step(np.int64(IDS[3]), cache, FixedExit(np.int32(4)))
    assert n == 4 and z.tobytes() == engine.logits(IDS[:4])[3].tobytes()


# ---- who asks: threads (faults A1) ------------------------------------------------------


def test_two_threads_step_one_cache_to_its_end(engine: Any) -> None:
    """As many steps as fit are run, all others refused, whoever asks; nothing is overwritten."""
    for start in (40, 60):
        for rule in rules(engine)[:3]:
            cache, outcomes = engine.new_cache(), []
            engine.extend([3] * start, cache)

            def steps(cache: Any = cache, rule: Any = rule, found: list[str] = outcomes) -> None:
                for _ in range(30):
                    try:
                        engine.step(5, cache, rule)
                        found.append("run")
                    except ValueError as error:
                        assert "exceed the context" in str(error)
                        found.append("refused")

            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(steps) for _ in range(4)]:
                    done.result()
            assert outcomes.count("run") == CONFIG.max_position_embeddings - start
            assert cache.length == CONFIG.max_position_embeddings
            cache.length = start
            expected = engine.logits([3] * start + [9])[-1:]
            assert engine.extend([9], cache).tobytes() == expected.tobytes()


def test_what_is_asked_is_checked_in_its_turn(engine: Any) -> None:
    """Asked for the last position amid a call that takes it: refused, when that has ended."""
    cache, said = engine.new_cache(), []
    engine.extend([3] * (CONFIG.max_position_embeddings - 1), cache)

    def second() -> None:
        try:
            engine.step(5, cache, FixedExit())
        except ValueError as error:
            said.append(str(error))

    other = threading.Thread(target=second)

    def meanwhile(stage: str, _: np.ndarray) -> None:
        if stage == "embed":
            other.start()
            other.join(0.2)

    z = engine.extend([9], cache, trace=meanwhile)
    other.join()
    assert len(said) == 1 and "exceed the context" in said[0]
    assert cache.length == CONFIG.max_position_embeddings
    expected = engine.logits([3] * (CONFIG.max_position_embeddings - 1) + [9])[-1:]
    assert z.tobytes() == expected.tobytes()


def test_a_check_before_the_turn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that was: nobody waits. (In the reference, where it overwrites nothing.)"""
    for verb in ("extend", "step"):
        monkeypatch.setattr(ReferenceModel, verb, getattr(ReferenceModel, verb).__wrapped__)
    with pytest.raises((AssertionError, ValueError)):
        test_what_is_asked_is_checked_in_its_turn(make("reference", CONFIG, TENSORS))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_ctrl_c_at_any_time_ends_the_turn() -> None:
    """Wherever it strikes, the engine and the cache are free for others afterwards."""
    engine = TableEngine(np.eye(4), np.eye(4))
    cache = engine.new_cache()
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as other:
            for i in range(300):
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + i % 50))
                    while True:
                        cache.length = 0
                        engine.step(1, cache, FixedExit())
                for turn in (engine._turn, cache.turn):
                    assert turn.owner is None
                    assert other.submit(turn.lock.acquire, False).result()
                    other.submit(turn.lock.release).result()
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_two_engines_do_not_share_a_cache_at_once() -> None:
    """Only one of them can run on it; the other says so."""
    one, two = (make("reference", CONFIG, TENSORS) for _ in range(2))
    cache = one.new_cache()
    with pytest.raises(RuntimeError, match="in the middle of a call"):
        one.extend([1], cache, trace=lambda *_: two.extend([1], cache))
    assert cache.length == 0
    one.extend([1], cache)
    assert two.extend([2], cache).tobytes() == one.logits([1, 2])[1:].tobytes()


def test_a_length_set_by_another_thread(engine: Any) -> None:
    """Whatever is set at whatever time: a call ends, or is refused, and touches only its own."""
    cache, stop = engine.new_cache(), threading.Event()

    def meddle() -> None:
        while not stop.is_set():
            for n in (0, 3, 1 << 40, -5, 63):
                cache.length = n

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(200):
            try:
                engine.extend(IDS[:2], cache)
            except ValueError as error:
                assert "cache" in str(error) or "exceed" in str(error)
    finally:
        stop.set()
        thread.join()
    cache.length = 0
    assert engine.extend(IDS, cache).tobytes() == engine.logits(IDS).tobytes()
