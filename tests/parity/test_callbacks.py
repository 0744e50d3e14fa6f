"""Whom an engine calls: traces, visits, rules and their probes, and rounds run step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitskip_ref.config import small_twin
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.rows import Row
from tests.helpers import random_tensors
from tests.parity.engines import ENGINES, make
from tests.parity.test_rows import CONFIG, IDS, TENSORS, Odd

WHOLE = ("reference", "numba", "torch")  # engines that can stop on the way


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return make(request.param, CONFIG, TENSORS)


@pytest.fixture(scope="module", params=WHOLE)
def deciding(request: pytest.FixtureRequest) -> Any:
    return make(request.param, CONFIG, TENSORS)


def callbacks(engine: Any, act: Callable[[Any], None]) -> list[Callable[[Any], Any]]:
    """Calls on a cache with a callback that does `act` on it."""

    def stops(cache: Any) -> Callable[[Any], bool]:
        return lambda probe: bool(act(cache))

    calls = [
        lambda c: engine.extend([1, 2], c, trace=lambda *_: act(c)),
        lambda c: engine.extend_exits([1, 2], c, [2, 4], lambda *_: act(c)),
        lambda c: engine.step(1, c, FixedExit(), lambda *_: act(c)),
    ]
    if "Onnx" not in type(engine).__name__:
        calls += [
            lambda c: engine.step(1, c, ConfidenceExit(1.0), lambda *_: act(c)),
            lambda c: engine.step(1, c, Odd(4, (1, 2), stops(c))),
        ]
    return calls


def test_a_callback_that_calls_the_engine_is_refused(engine: Any) -> None:
    """It would wait for itself for ever."""
    for use in (
        lambda c: engine.extend([1], c), lambda c: engine.logits([1]),
        lambda c: engine.step(1, engine.new_cache(), FixedExit()),
        lambda c: engine.step_many([Row(1, engine.new_cache(), FixedExit())]),
    ):  # fmt: skip
        for call in callbacks(engine, use):
            cache = engine.new_cache()
            with pytest.raises(RuntimeError, match="called by its own trace, visit or exit rule"):
                call(cache)
            assert cache.length == 0
    assert engine.logits([1]).shape == (1, CONFIG.vocab_size)  # and it works on


def test_a_callback_that_sets_the_length_is_seen(engine: Any) -> None:
    for length in (0, 2, 4, 63, 1 << 40, -1):
        for call in callbacks(engine, lambda c, n=length: setattr(c, "length", n)):
            cache = engine.new_cache()
            engine.extend(IDS[:3], cache)
            with pytest.raises(ValueError, match="length was set to"):
                call(cache)
            cache.length = 2
            assert engine.extend([1], cache).tobytes() == engine.logits([*IDS[:2], 1])[2:].tobytes()


def test_an_error_in_a_callback_leaves_the_cache(engine: Any) -> None:
    def fail(cache: Any) -> None:
        raise ZeroDivisionError

    for call in callbacks(engine, fail):
        cache = engine.new_cache()
        engine.extend(IDS[:3], cache)
        with pytest.raises(ZeroDivisionError):
            call(cache)
        assert cache.length == 3
        assert engine.extend([1], cache).tobytes() == engine.logits([*IDS[:3], 1])[3:].tobytes()


def test_a_probe_answers_only_while_it_is_asked(deciding: Any) -> None:
    probes: list[Any] = []

    def keep(probe: Any) -> bool:
        probes.append(probe)
        for measure in ("max", "margin", "entropy"):
            assert isinstance(probe.confidence(measure), np.float32)
        with pytest.raises(ValueError, match="confidence measure 'sum'"):
            probe.confidence("sum")
        errors: list[BaseException] = []

        def elsewhere() -> None:
            try:
                probe.gate()
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return not errors

    z, n = deciding.step(1, deciding.new_cache(), Odd(4, (1, 3), keep))
    assert n == 4 and len(probes) == 2
    assert z.tobytes() == deciding.logits([1])[0].tobytes()
    for probe in probes:
        for ask in (probe.gate, lambda p=probe: p.confidence("max")):
            with pytest.raises(RuntimeError, match="a probe answers within"):
                ask()


def test_a_gate_that_is_not_there() -> None:
    config = small_twin("bitskip-v1")
    for name in WHOLE:
        engine = make(name, config, random_tensors(config))
        with pytest.raises(ValueError, match="no routing gates"):
            engine.step(1, engine.new_cache(), GateExit())


# ---- rounds of speculation ----------------------------------------------------------------


def test_other_sequences_between_the_drafts_of_a_round(deciding: Any) -> None:
    cache, other = deciding.new_cache(), deciding.new_cache()
    for c in (cache, other):
        deciding.extend(IDS[:9], c)
    expected = deciding.logits([*IDS[:9], 4, 8, 15, 16])[9:]
    round_ = deciding.round(cache, Draft(2))
    for token in (4, 8, 15, 16):
        round_.draft(token)
        deciding.step(3, other, ConfidenceExit(0.02))
    assert round_.verify().tobytes() == expected.tobytes() and cache.length == 13


def test_a_round_notices_another_use_of_its_cache(deciding: Any) -> None:
    cache = deciding.new_cache()
    deciding.extend(IDS[:9], cache)

    def used() -> None:
        deciding.step(1, cache, FixedExit())
        cache.length = 9

    for meddle in (used, lambda: setattr(cache, "length", 3)):
        cache.length = 9
        round_ = deciding.round(cache, Draft(2))
        round_.draft(4)
        meddle()
        for go_on in (lambda r=round_: r.draft(5), lambda r=round_: r.verify()):
            with pytest.raises(ValueError, match="used by another call during a round"):
                go_on()


def test_a_round_is_no_longer_than_it_may_be(deciding: Any) -> None:
    cache = deciding.new_cache()
    round_ = deciding.round(cache, Draft(2))
    for _ in range(17):
        round_.draft(4)
    with pytest.raises(ValueError, match="verify it"):
        round_.draft(4)
    with pytest.raises(ValueError, match="integers"):
        round_.draft(97)
    assert round_.verify().shape == (17, 97)
    deciding.extend([1] * (62 - cache.length), cache)
    round_ = deciding.round(cache, Draft(2))
    round_.draft(4)
    round_.draft(4)
    with pytest.raises(ValueError, match="exceed the context"):
        round_.draft(4)
    assert len(round_.verify()) == 2 and cache.length == 64
