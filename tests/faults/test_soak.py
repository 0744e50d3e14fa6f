"""Three seconds of the soak, and a mistake for it to find."""

from __future__ import annotations

import os
import random

import pytest

from tests.faults import soak

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def test_threads_copies_and_forks() -> None:
    calls, faults = soak.soak(3, seed=0, part=1.5)
    assert faults == [] and calls


@pytest.mark.slow
def test_threads_copies_and_forks_for_a_minute() -> None:
    assert soak.soak(60, seed=1)[1] == []


def test_caches_that_are_no_copies_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "COPIES", [lambda cache: cache])
    monkeypatch.setattr(soak, "RULES", soak.RULES[:1])
    planted, draw = soak.Soak(1), random.Random(0)
    for _ in range(2):
        planted.branch(draw)
    assert planted.faults[0].startswith("wrong bits: text")
    planted.steps = set()
    planted.step(draw)
    assert planted.faults[-1] == "wrong bits: a step in the shared cache"
