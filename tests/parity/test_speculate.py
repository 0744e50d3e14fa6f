"""Speculation in the compiled engine and in PyTorch: the reference's tokens, rounds and cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bitskip_cpu.engine import Engine
from bitskip_cpu.workspace import Workspace
from bitskip_ref.compare import difference
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft, GreedyRound
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.exits import FixedExit
from bitskip_ref.model import ReferenceModel
from bitskip_train.loaded import TorchEngine
from tests.helpers import QUANTIZED, chosen_round, random_tensors, random_tokens, twin

# Presets with twins of their own, and heads and exits that no preset has.
NAMES = [*{twin(n): n for n in QUANTIZED}.values(), "per-layer-exits", "bfloat16-head"]
PROMPTS = 200 // len(NAMES) + 1


def layers_of(cache: Any, depth: int = 4) -> Iterator[tuple[np.ndarray, ...]]:
    """What the cache of any engine holds of the first blocks."""
    return (cache.layer(i) for i in range(depth))


def generate(engine: Any, tokens: Callable[[Any, Any], Iterator[Any]]) -> tuple[list[int], Any]:
    """Ids of a stream over an engine and a new cache, and the cache that it leaves behind."""
    cache = engine.new_cache()
    return [token.id for token in tokens(engine, cache)], cache


def same(expected: Any, actual: Any, depth: int = 4) -> None:
    """Two results of `generate`."""
    assert expected[0] == actual[0]
    assert expected[1].length == actual[1].length
    layers = (layers_of(cache, depth) for _, cache in (expected, actual))
    for i, (a, b) in enumerate(zip(*layers, strict=True)):
        for what, (x, y) in enumerate(zip(a, b, strict=True)):
            assert (problem := difference(f"{what} {i}", x, y)) is None, problem


def settings(config: Any, seed: int) -> tuple[Speculation, Sampler]:
    """A depth that verifies, a draft exit, a number of drafts and a sampler, all by the seed."""
    depth = 4 if seed % 3 else 3
    vocab = 20 if seed % 4 == 1 else None
    count = (1, 2, 5, None)[seed % 4]
    speculation = Speculation(config, FixedExit(depth), 1 + seed % 2, count, vocab)
    if seed % 5 < 3:
        return speculation, Sampler(repetition_penalty=1.3 if seed % 5 == 2 else 1.0)
    return speculation, Sampler(1.0, 30, 0.9, 0.01, 1.1 if seed % 5 == 4 else 1.0, seed)


@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [
        *((n, "float32") for n in NAMES),
        ("wt2-bitskip", "float16"),
        ("wt2-bitskip", "int8"),
        ("exit-blocks-int8", "float32"),
    ],
)
def test_200_prompts(name: str, kv_cache: str) -> None:
    config, tensors = twin(name), random_tensors(twin(name))
    reference = ReferenceModel(config, tensors, kv_cache)
    engine = Engine(config, tensors, 1, kv_cache=kv_cache)
    for seed in range(PROMPTS):
        prompt = random_tokens(config, 1 + seed % 7, seed)
        made = []
        for each in (reference, engine):
            speculation, sampler = settings(config, seed)
            made.append((
                generate(
                    each,
                    lambda e, c: speculate(e, prompt, speculation, sampler, 6, cache=c),  # noqa: B023
                ),
                speculation.statistics(),
            ))  # fmt: skip
        depth = speculation.exit_layer
        same(made[0][0], made[1][0], depth)
        assert made[0][1] == made[1][1]
        if sampler.temperature == 0:
            plain = generate(
                engine,
                lambda e, c: stream(e, prompt, FixedExit(depth), sampler, 6, cache=c),  # noqa: B023
            )
            same(plain, made[1][0], depth)


def test_two_threads() -> None:
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    engines = [Engine(config, tensors, n, share_from=0) for n in (1, 2)]
    for sampler in (Sampler(), Sampler(1.0, seed=1)):
        speculations = [Speculation(config, FixedExit(), 2, 3) for _ in engines]
        same(*(
            generate(e, lambda e, c: speculate(e, [5, 7], s, sampler, 60, cache=c))  # noqa: B023
            for e, s in zip(engines, speculations, strict=True)
        ))  # fmt: skip


@pytest.mark.parametrize("name", ["bitskip-v3", "wt2-bitskip", "per-layer-exits", "exit-blocks"])
def test_pytorch(name: str) -> None:
    config, tensors = twin(name), random_tensors(twin(name))
    for seed in range(5):
        made, kind = [], KV_CACHES[seed % 3]
        for engine in (ReferenceModel(config, tensors, kind), TorchEngine(config, tensors, kind)):
            speculation, sampler = settings(config, seed)
            tokens = lambda e, c: speculate(e, [5, 7], speculation, sampler, 8, cache=c)  # noqa: B023, E731
            made.append(generate(engine, tokens))
        same(*made, speculation.exit_layer)


def test_rounds_one_by_one() -> None:
    """Drafts, logits and cache of single rounds, after rounds that were forgotten again."""
    config, tensors = twin("bitskip-v3"), random_tensors(twin("bitskip-v3"))
    engines = ReferenceModel(config, tensors), Engine(config, tensors, 1)
    caches = [e.new_cache() for e in engines]
    for e, cache in zip(engines, caches, strict=True):
        e.extend([3, 1, 4], cache)
    for seed in range(12):
        draft = Draft(1 + seed % 3, (None, 30)[seed % 2], (0.0, 0.3)[seed % 3 == 1])
        made = []
        for e, cache in zip(engines, caches, strict=True):
            arguments = seed, cache, seed % 5, draft
            if seed % 4 == 3:
                made.append(chosen_round(e, *arguments, lambda z: int(z[:7].argmax())))
            else:
                made.append(e.speculate(*arguments))
        drafts, logits = zip(*made, strict=True)
        assert drafts[0] == drafts[1]
        assert difference("logits", *logits) is None
        assert caches[0].length == caches[1].length
        for cache in caches:
            cache.length -= len(drafts[0]) // 2
        for a, b in zip(*map(layers_of, caches), strict=True):
            assert all(difference("cache", x, y) is None for x, y in zip(a, b, strict=True))


def some_rounds(engine: Any, reference: Any, seed: int, calls: int = 3) -> None:
    """Rounds of several sequences in one call, each against the reference's own.

    Between calls some drafts are forgotten, and some sequences take no part.
    """
    draw = random.Random(seed)
    rng = np.random.default_rng(seed)
    drafts = [Draft(e, v, lead) for e in (1, 2) for v in (None, 30) for lead in (0.0, 0.3)]
    depths = [draw.choice((3, 4, None)) for _ in range(draw.choice((1, 4, 9)))]
    pairs = [(engine.new_cache(), reference.new_cache()) for _ in depths]
    for pair, depth in zip(pairs, depths, strict=True):
        ids = random_tokens(engine.config, int(rng.integers(1, 20)), int(rng.integers(99)))
        for e, cache in zip((engine, reference), pair, strict=True):
            e.extend(ids, cache, exit_layer=depth)
    for _ in range(calls):
        few = draw.sample(drafts, 2)
        asked = [
            (draw.randrange(97), i, draw.choice((0, 1, 2, 5)), draw.choice(few), depths[i])
            for i in draw.sample(range(len(pairs)), draw.randint(1, len(pairs)))
        ]
        found = engine.speculate_many([GreedyRound(t, pairs[i][0], *how) for t, i, *how in asked])
        for (token, i, count, draft, depth), (ids, z) in zip(asked, found, strict=True):
            mine, alone = pairs[i]
            expected = reference.speculate(token, alone, count, draft, exit_layer=depth)
            assert ids == expected[0]
            assert difference("logits", expected[1], z) is None
            assert mine.length == alone.length
            for a, b in zip(layers_of(mine, depth or 4), layers_of(alone, depth or 4), strict=True):
                assert all(difference("cache", x, y) is None for x, y in zip(a, b, strict=True))
            mine.length = alone.length = alone.length - len(ids) // 2


@pytest.mark.parametrize("seed", range(6))
def test_rounds_of_many_sequences(seed: int) -> None:
    config, kind = twin("wt2-bitskip" if seed % 2 else "per-layer-exits"), KV_CACHES[seed % 3]
    tensors = random_tensors(config)
    engine = Engine(config, tensors, 1 + seed % 2, kind, share_from=0)
    some_rounds(engine, ReferenceModel(config, tensors, kind), seed)


def test_rounds_of_more_tokens_than_go_together() -> None:
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    engine, reference = Engine(config, tensors, 1), ReferenceModel(config, tensors)
    how = 16, Draft(1)
    found = engine.speculate_many([GreedyRound(i, engine.new_cache(), *how) for i in range(9)])
    for i, (ids, z) in enumerate(found):
        drafts, p = reference.speculate(i, reference.new_cache(), *how)
        assert ids == drafts and len(ids) == 16 and difference("logits", p, z) is None


def test_rounds_of_many_sequences_in_pytorch() -> None:
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    some_rounds(TorchEngine(config, tensors), ReferenceModel(config, tensors), 3)


def test_a_mixed_up_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: drafts stay where they were drafted, not behind their sequence's."""
    monkeypatch.setattr(
        Workspace, "drafts_in_order", lambda self: np.sort(self.draft_of[: self.tokens])
    )
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    engine, reference = Engine(config, tensors, 1), ReferenceModel(config, tensors)
    with pytest.raises(AssertionError):
        for seed in range(6):
            some_rounds(engine, reference, seed)


@pytest.mark.parametrize("kind", [Engine, ReferenceModel])
def test_rounds_are_refused_together(kind: Any) -> None:
    """None of the sequences has then advanced."""
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    engine = kind(config, tensors)
    caches = [engine.new_cache() for _ in range(3)]
    right = [GreedyRound(5, cache, 2, Draft(1)) for cache in caches]
    for wrong, words in (
        (GreedyRound(5, caches[0], 1, Draft(1)), "4 rounds of 3 sequences"),
        (GreedyRound(97, engine.new_cache(), 1, Draft(1)), "0..96"),
        (GreedyRound(5, engine.new_cache(), 17, Draft(1)), "0..16"),
        (GreedyRound(5, engine.new_cache(), 1, Draft(4)), "choose 1..3"),
        (GreedyRound(5, None, 1, Draft(1)), "not this engine's"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.speculate_many([*right, wrong])
        assert [cache.length for cache in caches] == [0, 0, 0]
    assert engine.speculate_many([]) == []


def test_a_tie_goes_to_the_lowest_id() -> None:
    config, tensors = twin("float32-head"), random_tensors(twin("float32-head"))
    tensors["lm_head.weight"][:] = tensors["lm_head.weight"][0]
    for engine in (ReferenceModel(config, tensors), Engine(config, tensors, 1)):
        drafts, _ = engine.speculate(5, engine.new_cache(), 2, Draft(1))
        assert drafts == [0, 0]
        assert engine.speculate(5, engine.new_cache(), 2, Draft(1, least_lead=1e-9))[0] == []
        for lead in (1e99, 10**400):  # more than any float32
            assert engine.speculate(5, engine.new_cache(), 2, Draft(1, least_lead=lead))[0] == []


@pytest.mark.parametrize("choose", [None, lambda z: int(z.argmax())])
def test_a_draft_vocabulary_of_one(choose: Any) -> None:
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    rounds = []
    for engine in (ReferenceModel(config, tensors), Engine(config, tensors, 1)):
        draft = Draft(2, vocab=1, least_lead=0.7)
        arguments = 96, engine.new_cache(), 2, draft
        made = chosen_round(engine, *arguments, choose) if choose else engine.speculate(*arguments)
        rounds.append(made)
    assert rounds[0][0] == rounds[1][0] == [0, 0]
    assert difference("logits", rounds[0][1], rounds[1][1]) is None


def test_the_compiled_engine_refuses_what_the_reference_refuses() -> None:
    config, tensors = twin("bitskip-v1"), random_tensors(twin("bitskip-v1"))
    engine = Engine(config, tensors, 1)
    cache = engine.new_cache()
    engine.extend([1] * 62, cache, exit_layer=3)
    other = Engine(twin("wt2-ee"), random_tensors(twin("wt2-ee")), 1).new_cache()
    for arguments, options, words in (
        ((1, cache, 17, Draft(1)), {"exit_layer": 3}, "0..16"),
        ((1, cache, 2, Draft(1)), {"exit_layer": 3}, "exceed the context"),
        ((1, cache, 1, Draft(1)), {}, "filled at exit layer 3"),
        ((97, cache, 1, Draft(1)), {"exit_layer": 3}, "0..96"),
        ((1, cache, 1, Draft(3)), {"exit_layer": 3}, "choose 1..2"),
        ((1, other, 1, Draft(1)), {}, "another model"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.speculate(*arguments, **options)
        assert cache.length == 62
    drafts, _ = engine.speculate(1, cache, 1, Draft(1), exit_layer=3)
    assert len(drafts) == 1 and cache.length == 64
