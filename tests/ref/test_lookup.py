"""Drafts looked up in the text (SPEC 11.5): what is drafted, and that no text changes."""

from __future__ import annotations

from typing import Any

import pytest

from bitskip_cpu.engine import Engine
from bitskip_ref.decoding.generate import stream as plain
from bitskip_ref.decoding.lookup import Lookup, stream
from bitskip_ref.decoding.pace import RETRY
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.model import ReferenceModel
from tests.helpers import random_tensors, random_tokens, twin

CONFIG = twin("bitskip-v1")


def test_what_followed_last_time() -> None:
    lookup = Lookup(CONFIG, FixedExit())
    assert lookup.propose(4) == []
    lookup.add([1, 2, 9, 1, 2, 7, 5, 1, 2])
    assert lookup.propose(1) == [7]  # behind the later of two places
    lookup.add([7, 5])
    for _ in range(20):  # places where so many tokens were found have been right
        assert lookup.propose(1) == [1]
        lookup.note(4, 4)
    assert lookup.propose(7) == [1, 2, 7, 5, 1, 2, 7]  # the fourth draft repeats the first
    lookup.add([3])
    assert lookup.propose(4) == []


def test_drafts_that_are_wrong_become_few() -> None:
    lookup = Lookup(CONFIG, FixedExit())
    lookup.add([4, 6, 8, 4, 6])
    proposed = []
    for _ in range(64):
        proposed.append(len(lookup.propose(16)))
        if proposed[-1]:
            lookup.note(proposed[-1], 0)
    assert sum(proposed[-2 * RETRY :]) == 2
    assert lookup.statistics()["acceptance"] == 0


@pytest.mark.parametrize("engine_type", [ReferenceModel, Engine])
@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
def test_the_plain_text(engine_type: Any, kv_cache: str) -> None:
    tensors = random_tensors(CONFIG)
    engine = engine_type(CONFIG, tensors, kv_cache=kv_cache)
    accepted = drafted = 0
    for seed in range(12 if engine_type is Engine else 5):
        prompt = [*random_tokens(CONFIG, 1 + seed, seed), 5, 6, 7, 8, 5, 6, 7]
        rule = FixedExit(1 + seed % 4)
        sampler = (
            Sampler(), Sampler(0.3, top_k=3, seed=seed), Sampler(repetition_penalty=1.2),
            Sampler(0.2, top_p=0.9, seed=seed), Sampler(0.2, min_p=0.3),
        )[seed % 5]  # fmt: skip
        lookup, ends = Lookup(CONFIG, rule), 11 if seed % 3 else None
        caches = engine.new_cache(), engine.new_cache()
        expected = list(plain(engine, prompt, rule, sampler, 60, ends, cache=caches[0]))
        assert list(stream(engine, prompt, lookup, sampler, 60, ends, cache=caches[1])) == expected
        assert caches[0].length == caches[1].length
        accepted, drafted = accepted + lookup.accepted, drafted + lookup.drafted
        broken_off = engine.new_cache()
        tokens = stream(engine, prompt, Lookup(CONFIG, rule), sampler, 60, ends, cache=broken_off)
        for _ in zip(range(7), tokens, strict=False):
            pass
        tokens.close()
        assert broken_off.length == len(prompt) + min(7, len(expected)) - 1 + (
            len(expected) < 7 and ends is not None
        )
    assert 0 < accepted < drafted


def test_a_full_context() -> None:
    engine = Engine(CONFIG, random_tensors(CONFIG), 1)
    prompt = [1, 2, 3] * (CONFIG.max_position_embeddings // 3 - 2)
    expected = list(plain(engine, prompt, FixedExit(), Sampler(), 999))
    lookup = Lookup(CONFIG, FixedExit())
    assert list(stream(engine, prompt, lookup, Sampler(), 999)) == expected
    assert lookup.drafted


def test_a_rule_that_looks_is_refused() -> None:
    with pytest.raises(ValueError, match="exit layer by number"):
        Lookup(CONFIG, ConfidenceExit())
