"""Any calls of the Python API, on the compiled engine and the reference side by side.

Both refuse the same calls, with a ValueError, and give the same bits for all others, whatever came
before: wrong ids, rules that lie, drafts, lengths set, copies, pickles.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from bitskip_cpu.compiling import warmup
from bitskip_cpu.engine import Engine
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft, GreedyRound
from bitskip_ref.engine import Row
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from tests.helpers import random_tensors, twin

CONFIG = twin("bitskip-v1").replace(gates=True, max_position_embeddings=24, vocab_size=40)
V, L = CONFIG.vocab_size, CONFIG.num_hidden_layers

odd = st.sampled_from(
    [-1, V, V + 1, 1 << 31, -(1 << 63), 1 << 64, 1.0, 1.5, float("nan"), None, True, "a", "", [],
     [1], {}, b"1", (), object, np.float32(1), np.array([1, 2]), np.int64(3), np.uint8(3)]
)  # fmt: skip
a_token = st.integers(0, V - 1)
any_token = st.one_of(*[a_token] * 9, odd)
any_tokens = st.one_of(
    *[st.lists(a_token, min_size=1, max_size=9)] * 6, st.lists(any_token, max_size=4),
    st.lists(a_token, min_size=20, max_size=30), odd,
)  # fmt: skip
a_depth = st.one_of(st.none(), st.integers(1, L))
any_depth = st.one_of(*[a_depth] * 9, st.integers(-2, L + 2), odd)
a_threshold = st.one_of(st.floats(0, 1), st.just(0.0), st.just(1.0))
any_threshold = st.one_of(*[a_threshold] * 9, st.floats(), odd)
some_looks = st.one_of(
    st.none(), st.lists(st.integers(1, L - 1), max_size=3).map(tuple),
    st.lists(st.integers(-1, L + 1), max_size=3).map(tuple),
)  # fmt: skip
any_looks = st.one_of(*[some_looks] * 9, odd)
measures = st.sampled_from(["max", "margin", "entropy", "max", "margin", "entropy", "least", None])


@dataclass(frozen=True)
class LyingRule:
    """A rule that says anything."""

    last: Any
    places: Any
    answer: Any

    def deepest(self, config: Any) -> Any:
        """Any value."""
        return self.last

    def looks(self, config: Any) -> Any:
        """Any value."""
        return self.places

    def check(self, config: Any) -> None:
        """Nothing is wrong with it, it says."""

    def stops(self, probe: Any) -> Any:
        """The answer, after asking for what there is."""
        probe.confidence("margin")
        return self.answer


lies = st.builds(
    LyingRule, any_depth,
    st.one_of(
        st.lists(st.integers(-2, L + 2), max_size=4).map(tuple), odd,
        st.sampled_from([(1000,), (-1,), (1.0,), (2, 1), (1, 1), (None,), (1 << 40,)]),
    ),
    st.sampled_from([True, False, 0, 1, None, np.bool_(True), "yes", []]),
)  # fmt: skip
rules = st.one_of(
    st.builds(FixedExit, any_depth),
    st.builds(
        lambda t, m, looks, last: ConfidenceExit(t, m, layers=looks, last=last),
        any_threshold, measures, any_looks, any_depth,
    ),
    st.builds(
        lambda t, looks, last: GateExit(t, layers=looks, last=last),
        any_threshold, any_looks, any_depth,
    ),
    lies,
    st.sampled_from([18, None, "max", FixedExit]),
)  # fmt: skip
drafts = st.builds(
    Draft, st.one_of(*[st.integers(1, L - 1)] * 6, any_depth),
    st.one_of(st.none(), st.integers(1, V), st.integers(-1, V + 1), odd),
    st.one_of(st.just(0.0), st.floats(0, 3), st.floats()),
)  # fmt: skip
counts = st.one_of(*[st.integers(0, 16)] * 9, st.integers(-2, 20), odd)
lengths = st.one_of(*[st.integers(0, 24)] * 9, st.integers(-3, 99), odd)

COPIES: dict[str, Callable[[Any], Any]] = {
    "fork": lambda cache: cache.fork(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@functools.cache
def engines(kv_cache: str) -> tuple[Any, Any]:
    """The compiled engine and the reference, on the same weights."""
    warmup()
    tensors = random_tensors(CONFIG)
    return Engine(CONFIG, tensors, 1, kv_cache), ReferenceModel(CONFIG, tensors, kv_cache)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gave, bit for bit, or that it was refused."""
    try:
        return _bits(call())
    except ValueError as error:
        assert "\n" not in str(error) or len(str(error)) < 2000
        return "refused"


def _bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, tuple | list):
        return [_bits(part) for part in value]
    return int(value) if isinstance(value, np.integer) else value


def exits_of(engine: Any, ids: Any, cache: Any, exits: Any) -> Any:
    """All that `extend_exits` shows, in one piece for each exit."""
    shown: dict[int, list[np.ndarray]] = {}
    engine.extend_exits(ids, cache, exits, lambda n, _, z: shown.setdefault(n, []).append(z.copy()))
    return [(n, np.concatenate(parts)) for n, parts in sorted(shown.items())]


def round_of(engine: Any, cache: Any, draft: Any, depth: Any, ids: Any) -> Any:
    """Drafts of the caller's own choice, verified."""
    under_way = engine.round(cache, draft, depth)
    drafted = [under_way.draft(i) for i in ids]
    return drafted, under_way.verify()


class Calls(RuleBasedStateMachine):
    """Pairs of caches, of the two engines, to which the same is done."""

    pairs = Bundle("pairs")

    @initialize(kv_cache=st.sampled_from(KV_CACHES))
    def start(self, kv_cache: str) -> None:
        """Choose what caches hold."""
        self.engines = engines(kv_cache)

    def same(self, call: Callable[[Any, Any], Any], *pairs: Any) -> None:
        """Do it on both engines: the same outcome, and caches that are as long."""
        found = [
            outcome(lambda e=engine, i=i: call(e, *(pair[i] for pair in pairs)))
            for i, engine in enumerate(self.engines)
        ]
        assert found[0] == found[1]
        for pair in pairs:
            assert outcome(lambda p=pair: p[0].require(0)) == outcome(
                lambda p=pair: p[1].require(0)
            )

    @rule(target=pairs)
    def new_cache(self) -> Any:
        """An empty pair."""
        return tuple(engine.new_cache() for engine in self.engines)

    @rule(target=pairs, pair=pairs, how=st.sampled_from(sorted(COPIES)))
    def copied(self, pair: Any, how: str) -> Any:
        """A pair that goes its own way from here."""
        copies = [outcome(lambda c=cache: [COPIES[how](c)]) for cache in pair]
        assert (copies[0] == "refused") == (copies[1] == "refused")
        if copies[0] == "refused":
            return tuple(engine.new_cache() for engine in self.engines)
        return copies[0][0], copies[1][0]

    @rule(pair=pairs, length=lengths)
    def set_length(self, pair: Any, length: Any) -> None:
        """Forget positions, or claim some."""
        for cache in pair:
            cache.length = length
        if outcome(lambda: pair[0].require(0)) == "refused":
            for cache in pair:
                cache.length = 0

    @rule(pair=pairs, ids=any_tokens, depth=any_depth, last=st.booleans())
    def extend(self, pair: Any, ids: Any, depth: Any, last: bool) -> None:
        """A prompt, or its continuation."""
        self.same(lambda e, c: e.extend(ids, c, exit_layer=depth, last_only=last), pair)

    @rule(pair=pairs, ids=any_tokens, exits=st.lists(any_depth, max_size=3))
    def extend_exits(self, pair: Any, ids: Any, exits: Any) -> None:
        """All exits from one pass."""
        self.same(lambda e, c: exits_of(e, ids, c, exits), pair)

    @rule(pair=pairs, token=any_token, how=rules)
    def step(self, pair: Any, token: Any, how: Any) -> None:
        """A token under a rule."""
        self.same(lambda e, c: e.step(token, c, how), pair)

    @rule(
        one=pairs, two=pairs, tokens=st.tuples(any_token, any_token), hows=st.tuples(rules, rules)
    )
    def step_many(self, one: Any, two: Any, tokens: Any, hows: Any) -> None:
        """Tokens of two sequences, or of one."""

        def call(engine: Any, first: Any, second: Any) -> Any:
            rows = [Row(tokens[0], first, hows[0]), Row(tokens[1], second, hows[1])]
            return engine.step_many(rows)

        self.same(call, one, two)

    @rule(pair=pairs, token=any_token, count=counts, draft=drafts, depth=any_depth)
    def speculate(self, pair: Any, token: Any, count: Any, draft: Any, depth: Any) -> None:
        """A round of greedy drafts."""
        self.same(lambda e, c: e.speculate(token, c, count, draft, exit_layer=depth), pair)

    @rule(one=pairs, two=pairs, token=any_token, some=st.tuples(counts, counts), draft=drafts)
    def speculate_many(self, one: Any, two: Any, token: Any, some: Any, draft: Any) -> None:
        """Rounds of two sequences, or of one."""

        def call(engine: Any, first: Any, second: Any) -> Any:
            asked = (first, some[0]), (second, some[1])
            return engine.speculate_many([GreedyRound(token, c, n, draft) for c, n in asked])

        self.same(call, one, two)

    @rule(pair=pairs, draft=drafts, depth=any_depth, ids=st.lists(any_token, max_size=5))
    def round(self, pair: Any, draft: Any, depth: Any, ids: Any) -> None:
        """A round of the caller's drafts."""
        self.same(lambda e, c: round_of(e, c, draft, depth, ids), pair)


PLAIN = settings(
    database=None, deadline=None, derandomize=True, max_examples=20, stateful_step_count=25,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip


class TestCalls(Calls.TestCase):  # type: ignore[misc, valid-type, name-defined]
    """The default run."""

    settings = PLAIN


@pytest.mark.slow
@seed(14)
class TestManyCalls(Calls.TestCase):  # type: ignore[misc, valid-type, name-defined]
    """Many calls."""

    settings = settings(PLAIN, derandomize=False, max_examples=2000, stateful_step_count=50)
