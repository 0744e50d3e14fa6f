"""Self-speculative decoding: the full model's text, whatever the drafts are (SPEC 11)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitskip_ref.decoding.speculate
from bitskip_ref.compare import difference
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.decoding.generate import stream
from bitskip_ref.decoding.sampling import Sampler, pick, uniform
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as speculate
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from tests.helpers import chosen_round, random_tensors, random_tokens, twin
from tests.tables import TableEngine

NEXT = np.roll(np.eye(8), 1, axis=1) * 5  # after id i comes i + 1, by a lead of 5
OTHER = np.roll(np.eye(8), 2, axis=1) * 5
SOMETIMES = np.where(np.arange(8)[:, None] % 3 == 0, OTHER, NEXT)  # wrong after 0, 3 and 6
KS = (1, 2, 5, 16, None)


def text(engine: Any, prompt: list[int], count: int | None, **options: Any) -> list[int]:
    """Ids that speculation from exit 2 adds to a prompt."""
    return run(engine, prompt, count, **options)[0]


def run(
    engine: Any, prompt: list[int], count: int | None, *, sampler: Sampler = Sampler(),  # noqa: B008
    tokens: int = 20, eos: int | None = None, vocab: int | None = None,
) -> tuple[list[int], Speculation]:  # fmt: skip
    speculation = Speculation(engine.config, FixedExit(), 2, count, vocab)
    found = list(speculate(engine, prompt, speculation, sampler, tokens, eos))
    assert {token.depth for token in found} <= {4}
    return [token.id for token in found], speculation


def plain(engine: Any, prompt: list[int], tokens: int = 20, **options: Any) -> list[int]:
    sampler = Sampler(**options)
    return [t.id for t in stream(engine, prompt, FixedExit(), sampler, tokens)]


# ---- greedy -------------------------------------------------------------------------


@pytest.mark.parametrize("early", [NEXT, OTHER, SOMETIMES], ids=["always", "never", "sometimes"])
@pytest.mark.parametrize("count", KS)
def test_any_drafts_give_the_full_text(early: np.ndarray, count: int | None) -> None:
    engine = TableEngine(NEXT, early)
    found, speculation = run(engine, [3], count)
    assert found == plain(engine, [3]) == [(4 + i) % 8 for i in range(20)]
    assert engine.cache.ids[: engine.cache.length] == [3, *found[:-1]]
    assert speculation.accepted + speculation.rounds == 20  # each round adds one that is no draft
    if early is NEXT:
        assert speculation.accepted == speculation.drafted
    if early is OTHER:
        assert speculation.accepted == 0 and (speculation.drafted > 0)


def test_statistics() -> None:
    _, speculation = run(TableEngine(NEXT, SOMETIMES), [0], 2, tokens=9)
    # From 0: draft 2 is wrong (1). From 1: 2, 3 are right, and 4. From 4: 5, 6 and 7. From 7: 0
    # is right, the draft after it wrong (1).
    assert speculation.statistics() == {
        "draft_exit": 2, "rounds": 4, "drafted": 7, "accepted": 5, "acceptance": 5 / 7,
        "accepted_per_round": 5 / 4,
    }  # fmt: skip
    nothing = Speculation(speculation_config(), FixedExit(), 1).statistics()
    assert nothing["acceptance"] is None and nothing["accepted_per_round"] is None


def speculation_config() -> Any:
    return TableEngine(NEXT, NEXT).config


@pytest.mark.parametrize("name", ["bitskip-v1", "bitskip-v2", "wt2-bitskip", "per-layer-exits"])
def test_text_and_cache_are_those_of_plain_decoding(name: str) -> None:
    config = twin(name)
    model = ReferenceModel(config, random_tensors(config))
    for seed, count in enumerate((1, 3, None)):
        prompt = random_tokens(config, 1 + 4 * seed, seed)
        caches = []
        for expected in (None, [t.id for t in stream(model, prompt, FixedExit(), Sampler(), 12)]):
            cache = model.new_cache()
            caches.append(cache)
            model.new_cache = lambda cache=cache: cache  # type: ignore[method-assign]
            if expected is None:
                found = text(model, prompt, count, tokens=12)
            else:
                assert found == expected
                model.extend([*prompt, *expected[:-1]], cache)
            del model.new_cache
        assert caches[0].length == caches[1].length
        for i in range(config.num_hidden_layers):
            for name in ("keys", "values"):
                a, b = (getattr(c, name)[i][: c.length] for c in caches)
                assert difference(f"{name} {i}", b, a) is None


def test_a_draft_vocabulary_only_costs_drafts() -> None:
    config = twin("bitskip-v1")
    model, prompt = ReferenceModel(config, random_tensors(config)), [5, 6]
    whole, all_ids = run(model, prompt, 3)
    few, first_ids = run(model, prompt, 3, vocab=10)
    assert whole == few
    assert first_ids.accepted < all_ids.accepted
    seen = []
    draft = Draft(2, vocab=10)
    chosen_round(model, 5, model.new_cache(), 3, draft, lambda z: seen.append(len(z)) or 9)
    assert seen == [10] * 3


@pytest.mark.parametrize("count", KS)
def test_repetition_penalty(count: int | None) -> None:
    engine = TableEngine(NEXT + SOMETIMES * 0.9, SOMETIMES)
    sampler = Sampler(repetition_penalty=1.5)
    assert text(engine, [3], count, sampler=sampler) == plain(engine, [3], repetition_penalty=1.5)


# ---- ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", KS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_no_more_tokens_than_asked_for(count: int | None, tokens: int) -> None:
    engine = TableEngine(NEXT, NEXT)
    assert text(engine, [3], count, tokens=tokens) == plain(engine, [3], tokens)
    assert all(n < tokens for n in engine.counts)


@pytest.mark.parametrize("count", KS)
@pytest.mark.parametrize("prompt", [1, 9, 10])
def test_a_full_context(count: int | None, prompt: int) -> None:
    engine = TableEngine(NEXT, NEXT, context=10)
    found = text(engine, [3] * prompt, count)
    assert found == plain(engine, [3] * prompt) and len(found) == 11 - prompt


@pytest.mark.parametrize("count", KS)
@pytest.mark.parametrize("eos", range(8))
def test_end_of_text_within_a_run(count: int | None, eos: int) -> None:
    engine = TableEngine(NEXT, NEXT)
    found = text(engine, [3], count, eos=eos)
    assert found == [(4 + i) % 8 for i in range((eos - 4) % 8)]
    assert engine.cache.ids[: engine.cache.length] == [3, *found]


# ---- seeded -------------------------------------------------------------------------

RNG = np.random.default_rng(11)
FULL, EARLY = RNG.normal(0, 1.2, (2, 4, 4))
EARLY = FULL * 0.5 + EARLY * 0.5  # much alike, as exits are
SEEDED = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "cut": {"temperature": 1.3, "top_k": 3, "top_p": 0.9},
    "least": {"temperature": 1.0, "min_p": 0.3, "repetition_penalty": 1.4},
}


def distribution(sampler: Sampler, prompt: int, length: int) -> np.ndarray:
    """Exact probabilities [4] * length of texts after a prompt, by SPEC 9.2 on the full table."""

    def follow(last: int, seen: frozenset[int], left: int) -> np.ndarray:
        ids, weights = sampler.candidates(sampler.tempered(FULL[last].astype(np.float32), seen, 0))
        p = np.zeros(4)
        p[ids] = weights / weights.sum()
        if left == 1:
            return p
        return np.stack([p[i] * follow(i, seen | {i}, left - 1) for i in range(4)])

    return follow(prompt, frozenset({prompt}), length)


def too_far(options: dict[str, float], count: int | None, seeds: int = 1500) -> bool:
    """Whether texts of three tokens are not distributed as the full model's (chi-square)."""
    engine = TableEngine(FULL, EARLY)
    expected = distribution(Sampler(**options), 1, 3) * seeds
    found = np.zeros_like(expected)
    for seed in range(seeds):
        found[tuple(text(engine, [1], count, sampler=Sampler(**options, seed=seed), tokens=3))] += 1
    possible = expected > 0
    assert not found[~possible].any()
    rare = possible & (expected < 5)  # cells too small for the statistic are taken as one
    cells = [(found[c], expected[c]) for c in zip(*np.nonzero(possible & ~rare), strict=True)]
    cells += [(found[rare].sum(), expected[rare].sum())] if rare.any() else []
    statistic = sum((f - e) ** 2 / e for f, e in cells)
    free = len(cells) - 1
    return bool(statistic > free + 4 * np.sqrt(2 * free))


@pytest.mark.parametrize("name", SEEDED)
def test_the_distribution_is_the_full_model_s(name: str) -> None:
    assert not too_far(SEEDED[name], 2)


def test_planted_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitskip_ref.decoding.speculate.settle

    def wrong(sampler: Any, p: Any, q: Any, draft: int, seen: Any, index: int) -> int:
        token = right(sampler, p, q, draft, seen, index)
        if token == draft:
            return token
        ids, weights = sampler.candidates(p)  # p itself, not max(p - q, 0)
        return pick(ids, weights, uniform(~sampler.seed, index))

    monkeypatch.setattr(bitskip_ref.decoding.speculate, "settle", wrong)
    assert too_far(SEEDED["plain"], 2)
    monkeypatch.setattr(bitskip_ref.decoding.speculate, "settle", lambda s, p, q, draft, *_: draft)
    assert too_far(SEEDED["plain"], 2)


@pytest.mark.parametrize("name", SEEDED)
def test_the_text_does_not_depend_on_rounds(name: str) -> None:
    engine, sampler = TableEngine(FULL, EARLY), Sampler(**SEEDED[name], seed=4)
    texts = [text(engine, [1], count, sampler=sampler) for count in KS]
    assert len({*map(tuple, texts)}) == 1
    short = text(engine, [1], 3, sampler=sampler, tokens=7)
    assert short == texts[0][:7]
    other = text(engine, [1], 3, sampler=Sampler(**SEEDED[name], seed=5))
    assert other != texts[0]


def test_equal_exits_accept_every_draft() -> None:
    _, speculation = run(TableEngine(FULL, FULL), [1], 4, sampler=Sampler(1.0, seed=2), tokens=60)
    assert speculation.accepted == speculation.drafted > 0
    drawn = plain(TableEngine(FULL, FULL), [1], temperature=1.0, seed=2)
    assert drawn == text(TableEngine(FULL, FULL), [1], 4, sampler=Sampler(1.0, seed=2))


# ---- how many -----------------------------------------------------------------------


def counts(early: np.ndarray) -> list[int]:
    """Drafts allowed in each round but the last, with a draft exit at a quarter."""
    engine = TableEngine(NEXT, early, context=1000)
    speculation = Speculation(engine.config, FixedExit(), 1)
    list(speculate(engine, [3], speculation, Sampler(), 300))
    return engine.counts[:-1]


def test_auto_drafts_more_where_drafts_are_right_and_hardly_where_not() -> None:
    right, wrong = counts(NEXT), counts(OTHER)
    assert right == sorted(right) and (right[0], right[-1]) == (2, 16)
    assert wrong[0] == 2 and wrong[-40:].count(1) == 5 and set(wrong[-40:]) == {0, 1}


def test_auto_does_not_run_unsure_drafts() -> None:
    unsure = NEXT / 5 * 0.6
    engine = TableEngine(NEXT, unsure)
    found, speculation = run(engine, [3], None)
    assert speculation.drafted == 0 and found == plain(engine, [3])
    assert run(engine, [3], 2)[1].drafted > 0  # a number is taken at its word


# ---- refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": GateExit()}, "leaves nothing to an exit"),
        ({"rule": ConfidenceExit(0.9)}, "choose an exit layer by number"),
        ({"draft_exit": 4}, "choose 1..3"),
        ({"draft_exit": 0}, "choose 1..3"),
        ({"rule": FixedExit(2), "draft_exit": 3}, "choose 1..1"),
        ({"rule": FixedExit(1)}, "nothing lies below 1"),
        ({"count": 0}, "1..16 drafts"),
        ({"count": 17}, "1..16 drafts"),
        ({"draft_vocab": 0}, "1..8, the first ids"),
        ({"draft_vocab": 9}, "1..8, the first ids"),
    ],
)
def test_meaningless_combinations_are_refused(options: dict[str, Any], words: str) -> None:
    arguments = {"rule": FixedExit(), "draft_exit": None, "count": 2, **options}
    with pytest.raises(ValueError, match=words):
        Speculation(speculation_config(), **arguments)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "no tokens"), ([1] * 65, "exceed the context"), ([8], "0..7"), ([1.5], "integers")],
)
def test_a_wrong_prompt_is_refused(prompt: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text(TableEngine(NEXT, NEXT), prompt, 2)
    with pytest.raises(ValueError, match="max tokens"):
        text(TableEngine(NEXT, NEXT), [1], 2, tokens=-1)


def test_an_engine_refuses_rounds_that_do_not_fit() -> None:
    config = twin("bitskip-v1")
    model = ReferenceModel(config, random_tensors(config))
    cache = model.new_cache()
    model.extend([1] * 62, cache, exit_layer=3)
    for arguments, options, words in (
        ((1, cache, 17, Draft(1)), {"exit_layer": 3}, "0..16"),
        ((1, cache, 2, Draft(1)), {"exit_layer": 3}, "exceed the context"),
        ((1, cache, 1, Draft(1)), {}, "filled at exit layer 3"),
        ((97, cache, 1, Draft(1)), {"exit_layer": 3}, "0..96"),
        ((1, cache, 1, Draft(1, least_lead=-1.0)), {"exit_layer": 3}, "0 or more"),
        ((1, cache, 1, Draft(1, least_lead="1")), {"exit_layer": 3}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            model.speculate(*arguments, **options)
        assert cache.length == 62
