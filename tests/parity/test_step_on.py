"""Tokens chosen within one call of an engine: those of token by token, and nothing else is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitskip_cpu import weights, workspace
from bitskip_cpu.engine import Engine
from bitskip_ref.config import ModelConfig, small_twin
from bitskip_ref.decoding import generate
from bitskip_ref.decoding.choice import MOST, Choice
from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.generate import Choosing, Together, stream
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import FixedExit
from bitskip_ref.model import ReferenceModel
from tests.helpers import random_tensors, random_tokens, twin
from tests.parity.engines import ENGINES, make

CONFIG = small_twin("wt2-bitskip")
TENSORS = random_tensors(CONFIG)
PROMPT = random_tokens(CONFIG, 5)
SAMPLERS = {
    "plain": Sampler(), "penalty": Sampler(repetition_penalty=1.3),
    "reward": Sampler(repetition_penalty=0.7), "bias": Sampler(logit_bias=((3, 2.0),)),
    "drawn": Sampler(0.5, seed=4), "least": Sampler(0.9, min_p=0.05, seed=1 << 63),
    "top": Sampler(0.8, top_k=6, top_p=0.9, repetition_penalty=1.3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens a call as there may be, however slow the machine."""
    monkeypatch.setattr(generate, "CALL_S", 1e9)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return make(request.param, CONFIG, TENSORS)


def bits(cache: Any, blocks: int) -> list[bytes]:
    """All that the first blocks hold."""
    return [part.tobytes() for i in range(blocks) for part in cache.layer(i)]


def one_by_one(
    engine: Any, sampler: Sampler, count: int, depth: int, end: int | None = None
) -> tuple[list[int], Any]:
    """The text and its cache, by `Engine.step` and `Sampler.choose` alone."""
    cache, ids = engine.new_cache(), list[int]()
    z = engine.extend(PROMPT, cache, exit_layer=depth)[-1]
    while (token := sampler.choose(z, {*PROMPT, *ids}, len(ids))) != end:
        ids.append(token)
        if len(ids) == count:
            break
        z, _ = engine.step(token, cache, FixedExit(depth))
    return ids, cache


def streamed(
    engine: Any, sampler: Sampler, count: int, depth: int, end: int | None = None
) -> tuple[list[int], Any]:
    """The same by `stream`."""
    cache = engine.new_cache()
    tokens = list(stream(engine, PROMPT, FixedExit(depth), sampler, count, end, cache=cache))
    assert {t.depth for t in tokens} <= {depth}
    return [t.id for t in tokens], cache


def same(one: tuple[list[int], Any], other: tuple[list[int], Any], depth: int) -> bool:
    """Whether texts and caches are the same to the bit."""
    return one[0] == other[0] and bits(one[1], depth) == bits(other[1], depth)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_text_is_that_of_token_by_token(engine: Any, sampler: Sampler) -> None:
    """In every engine: to its full length, up to an end, and at another exit."""
    whole, cache = one_by_one(engine, sampler, 24, 4)
    assert same((whole, cache), streamed(engine, sampler, 24, 4), 4)
    new = [t for i, t in enumerate(whole) if t not in whole[:i]]
    for end in (whole[0], new[-1]):
        expected = one_by_one(engine, sampler, 24, 4, end)
        assert same(expected, streamed(engine, sampler, 24, 4, end), 4)
    assert same(one_by_one(engine, sampler, 9, 2), streamed(engine, sampler, 9, 2), 2)


@pytest.mark.parametrize("name", ["bitskip-v1", "per-layer-exits", "int8", "exit-blocks"])
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_kinds_of_models_and_caches(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """On two threads, with heads read whole and in two parts, against the reference."""
    monkeypatch.setattr(weights, "LEAST_UPPER", 0)
    monkeypatch.setattr(workspace, "REREAD", 0)
    config, tensors = twin(name), random_tensors(twin(name))
    reference = ReferenceModel(config, tensors, kind)
    for threads, depth in itertools.product((1, 2), (1, config.num_hidden_layers)):
        engine = Engine(config, tensors, threads, kind, share_from=0)
        for sampler in map(SAMPLERS.get, ("plain", "penalty", "top", "least")):
            expected = one_by_one(reference, sampler, 12, depth)
            assert same(expected, streamed(engine, sampler, 12, depth), depth)


def test_each_call_gives_what_it_says(engine: Any) -> None:
    """Ids, the logits after the last, and the cache, for every count; the set given stays as is."""
    seen = set(PROMPT)
    for r, count in itertools.product((1.0, 1.3), (0, 1, 7)):
        cache, expected = engine.new_cache(), engine.new_cache()
        engine.extend(PROMPT[:-1], cache)
        engine.extend(PROMPT[:-1], expected)
        sampler, text = Sampler(repetition_penalty=r), [PROMPT[-1]]
        how = Choice(sampler, (), seen)
        ids, z = engine.step_on(PROMPT[-1], cache, count, how, contenders=sampler.contenders)
        assert len(ids) == count and seen == set(PROMPT)
        for token in (*ids, None):
            wanted, _ = engine.step(text[-1], expected, FixedExit())
            if token is not None:
                assert token == sampler.choose(wanted, {*PROMPT, *text}, 0)
                text.append(token)
        assert z.tobytes() == wanted.tobytes()
        assert bits(cache, 4) == bits(expected, 4)


def test_who_breaks_off_leaves_no_token_behind(engine: Any) -> None:
    """After each token of a call: what was still to be yielded is forgotten, and not seen later."""
    sampler = SAMPLERS["penalty"]
    for count in (1, 2, 3, 6):
        cache = engine.new_cache()
        tokens = stream(engine, PROMPT, FixedExit(), sampler, 20, cache=cache)
        ids = [next(tokens).id for _ in range(count)]
        tokens.close()
        assert same(one_by_one(engine, sampler, count, 4), (ids, cache), 4)
        z, _ = engine.step(1, cache, FixedExit())
        assert z.tobytes() == engine.logits([*PROMPT, *ids[:-1], 1])[-1].tobytes()


def test_the_context_is_filled_and_no_more(engine: Any) -> None:
    most = CONFIG.max_position_embeddings
    cache = engine.new_cache()
    engine.extend(random_tokens(CONFIG, most - 5), cache)
    ids = [t.id for t in stream(engine, [3], FixedExit(), Sampler(), 100, cache=cache)]
    assert len(ids) == 5 and cache.length == most
    cache.length = most - 3
    with pytest.raises(ValueError, match="positions exceed the context"):
        engine.step_on(1, cache, 3, Choice())
    ids, _ = engine.step_on(1, cache, 2, Choice())
    assert len(ids) == 2 and cache.length == most


def test_equal_logits_go_to_the_lowest_id() -> None:
    tensors = random_tensors(CONFIG)
    for name in ("lm_head.weight", "lm_head.scale"):
        if name in tensors:
            tensors[name][:] = tensors[name][0]
    for engine in (ReferenceModel(CONFIG, tensors), Engine(CONFIG, tensors, 1)):
        ids, _ = engine.step_on(9, engine.new_cache(), 3, Choice())
        assert ids == [0, 0, 0]
        ids, _ = engine.step_on(9, engine.new_cache(), 3, Choice(ends={0}))
        assert ids == []


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_choose_nothing_end_a_call() -> None:
    """The caller sees them, and says which token it was."""
    for value in (np.nan, np.inf, -np.inf, np.float32("-nan")):
        z = np.zeros(CONFIG.vocab_size, np.float32)
        z[7] = value
        engine = Engine(CONFIG, TENSORS, 1)
        expected = 0 if value == -np.inf else None
        assert found(engine, z) == expected
    z = np.full(CONFIG.vocab_size, -np.inf, np.float32)
    assert found(engine, z) is None
    z[[5, 8]] = -0.0, 0.0
    assert found(engine, z) == int(np.argmax(z)) == 5


def found(engine: Engine, z: np.ndarray) -> int | None:
    """What a kernel takes for the greedy token after logits."""
    from bitskip_cpu.kernels.layout import STEPS
    from bitskip_ref.decoding.choice import check_choice

    space, chosen = engine._space, check_choice(Choice(), 1, CONFIG)
    space.set_tokens([1], engine.new_cache(), 0)
    space.choices.set(1, chosen, len(z))
    space.logits[0] = z
    space.set_logits(space.logits_at)
    engine._call(STEPS)
    ids = space.choices.followed
    assert (ids[0] if ids else None) == chosen.next(z, [])
    return ids[0] if ids else None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e, c: e.step_on(1, c, MOST + 1, Choice()), "0..32"),
        (lambda e, c: e.step_on(1, c, -1, Choice()), "0..32"),
        (lambda e, c: e.step_on(1, c, 2.0, Choice()), "0..32"),
        (lambda e, c: e.step_on(1, c, 1, Sampler()), "give a Choice"),
        (lambda e, c: e.step_on(1, c, 1, Choice(None)), "give a Sampler"),
        (lambda e, c: e.step_on(1, c, 1, Choice(made=-1)), "0 or more"),
        (lambda e, c: e.step_on(1, c, 1, Choice(SAMPLERS["bias"])), "a logit bias"),
        (lambda e, c: e.step_on(CONFIG.vocab_size, c, 1, Choice()), "token ids"),
        (lambda e, c: e.step_on(1, c, 1, Choice(), exit_layer=5), "choose 1..4"),
        (lambda e, c: e.step_on(1, c, 1, Choice(), contenders=3), "give Contenders"),
        (
            lambda e, c: e.step_on(1, c, 1, Choice(Sampler(1.0)), contenders=Contenders()),
            "not the sampler's",
        ),
        (lambda e, c: e.step_on(1, c, 1, Choice(ends=[1.5])), "whole numbers"),
        (lambda e, c: e.step_on(1, c, 1, Choice(ends="12")), "whole numbers"),
        (lambda e, c: e.step_on(1, c, 1, Choice(ends=[[1]])), "whole numbers"),
    ],
)
def test_refused(engine: Any, call: Callable[[Any, Any], Any], says: str) -> None:
    cache = engine.new_cache()
    with pytest.raises(ValueError, match=says):
        call(engine, cache)
    assert cache.length == 0


def test_ids_that_no_token_has_change_nothing(engine: Any) -> None:
    ids, z = engine.step_on(2, engine.new_cache(), 4, Choice(SAMPLERS["penalty"], (), {2}))
    odd = Choice(SAMPLERS["penalty"], (-1, 1 << 40), [2, 2, -7, CONFIG.vocab_size, 1 << 40])
    again, same_z = engine.step_on(2, engine.new_cache(), 4, odd)
    assert again == ids and z.tobytes() == same_z.tobytes()


def test_calls_are_as_long_as_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of one token; then as many as fit CALL_S at the speed of the last, up to MOST."""
    clock = iter(np.cumsum([0, 1.0] * 50).tolist())
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    engine = ReferenceModel(CONFIG, TENSORS)
    counts: list[int] = []
    run = engine.step_on

    def noted(token: int, cache: Any, count: int, *a: Any, **k: Any) -> Any:
        counts.append(count)
        return run(token, cache, count, *a, **k)

    monkeypatch.setattr(engine, "step_on", noted)
    for call_s, expected in ((4.5, [0, 3, 17, MOST]), (0.5, [0, 0, 0])):
        monkeypatch.setattr(generate, "CALL_S", call_s)
        counts.clear()
        list(stream(engine, PROMPT, FixedExit(1), Sampler(), 2 + sum(expected) + len(expected)))
        assert counts[: len(expected)] == expected


# ---- planted mistakes: each makes the comparison red -------------------------------------


def changed(config: ModelConfig, plant: Callable[[Engine, pytest.MonkeyPatch], None]) -> bool:
    """Whether the comparison sees what is planted in an engine."""
    tensors = random_tensors(config)
    engine, depth = Engine(config, tensors, 1), config.num_hidden_layers
    sampler = SAMPLERS["top"]
    expected = one_by_one(Engine(config, tensors, 1), sampler, 30, depth)
    with pytest.MonkeyPatch.context() as patch:
        plant(engine, patch)
        return not same(expected, streamed(engine, sampler, 30, depth), depth)


def no_mistake(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Nothing."""


def unseen(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """The prompt is not counted by the penalty."""
    replaced(engine, patch, lambda c: c._replace(seen=c.seen[:0]))


def no_penalty(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    replaced(engine, patch, lambda c: c._replace(sampler=replace(c.sampler, repetition_penalty=1)))


def no_top_p(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    replaced(engine, patch, lambda c: c._replace(sampler=replace(c.sampler, top_p=1)))


def same_draw(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """A call begins with the first draw again."""
    replaced(engine, patch, lambda c: c._replace(made=0))


def replaced(engine: Engine, patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """What the workspace is told to choose by, changed."""
    put = engine._space.choices.set
    patch.setattr(engine._space.choices, "set", lambda n, c, v: put(n, change(c), v))


def kept_too_long(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """What was not yielded stays in the cache."""
    patch.setattr(Together, "keep", lambda self, count: None)


def not_taken(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    """Tokens of a call are not counted for the next."""
    patch.setattr(Choosing, "took", lambda self, token: setattr(self, "_left", self._left - 1))


@pytest.mark.parametrize("plant", [unseen, no_penalty, not_taken, no_top_p, same_draw])
def test_planted(plant: Callable[[Engine, pytest.MonkeyPatch], None]) -> None:
    assert not changed(CONFIG, no_mistake)
    assert changed(CONFIG, plant)


def test_planted_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_too_long(Engine(CONFIG, TENSORS, 1), monkeypatch)
    with pytest.raises(AssertionError):
        test_who_breaks_off_leaves_no_token_behind(Engine(CONFIG, TENSORS, 1))
