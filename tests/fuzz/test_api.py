"""Any calls of the Python API (`calls`), by Hypothesis, and a mistake planted for it to find."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bitskip_cpu.engine import Engine
from bitskip_ref.constants import KV_CACHES
from tests.fuzz.calls import Calls, engines

CHANCE = st.randoms(use_true_random=False)
PLAIN = settings(
    database=None, deadline=None, derandomize=True, max_examples=20,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip
MANY = settings(PLAIN, derandomize=False, max_examples=2000)


def sequence(draw: Random, kv_cache: str, calls: int) -> None:
    """So many calls, on both engines."""
    together = Calls(draw, engines(kv_cache))
    for _ in range(calls):
        together.act()


@PLAIN
@given(CHANCE, st.sampled_from(KV_CACHES))
def test_both_engines_refuse_and_give_the_same(draw: Random, kv_cache: str) -> None:
    sequence(draw, kv_cache, 25)


@pytest.mark.slow
@seed(14)
@MANY
@given(CHANCE, st.sampled_from(KV_CACHES))
def test_both_engines_refuse_and_give_the_same_in_many_calls(draw: Random, kv_cache: str) -> None:
    sequence(draw, kv_cache, 50)


def test_an_engine_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine._one

    def wrong(self: Any, run: Any, n: int, trace: Any) -> Any:
        z = right(self, run, n, trace)
        z[0] = np.nextafter(z[0], np.float32(9))
        return z

    monkeypatch.setattr(Engine, "_one", wrong)
    with pytest.raises(AssertionError):
        for number in range(200):  # some have no step of one token
            sequence(Random(number), "float32", 25)
