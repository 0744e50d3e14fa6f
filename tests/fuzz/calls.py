"""Any calls of the Python API, on the compiled engine and the reference side by side.

Both refuse the same calls, with a ValueError, and give the same bits for all others, whatever came
before: wrong ids, rules that lie, drafts, lengths set, copies, pickles.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitskip_cpu.compiling import warmup
from bitskip_cpu.engine import Engine
from bitskip_ref.decoding.choice import Choice
from bitskip_ref.decoding.draft import Draft, GreedyRound
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.exits import ConfidenceExit, FixedExit, GateExit
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rows import Row
from tests.helpers import random_tensors, twin

CONFIG = twin("bitskip-v1").replace(gates=True, max_position_embeddings=24, vocab_size=40)
V, L = CONFIG.vocab_size, CONFIG.num_hidden_layers

Drawn = Callable[[random.Random], Any]
"""A value from chance."""


def of(*values: Any) -> Drawn:
    """One of the values."""
    return lambda draw: draw.choice(values)


def either(*kinds: Drawn) -> Drawn:
    """A value of one of the kinds."""
    return lambda draw: draw.choice(kinds)(draw)


def mostly(usual: Drawn, *others: Drawn) -> Drawn:
    """Nine times of ten the usual kind."""
    return lambda draw: (draw.choice(others) if draw.random() < 0.1 else usual)(draw)


def whole(least: int, most: int) -> Drawn:
    """A whole number."""
    return lambda draw: draw.randint(least, most)


def listed(kind: Drawn, least: int, most: int) -> Drawn:
    """So many values in a list."""
    return lambda draw: [kind(draw) for _ in range(draw.randint(least, most))]


def made(kind: Callable[..., Any], *parts: Drawn) -> Drawn:
    """What a function makes of such values."""
    return lambda draw: kind(*(part(draw) for part in parts))


def any_float(draw: random.Random) -> float:
    """Any bits."""
    value: float = struct.unpack("<d", draw.getrandbits(64).to_bytes(8, "little"))[0]
    return value


odd = of(
    -1, V, V + 1, 1 << 31, -(1 << 63), 1 << 64, 1.0, 1.5, math.nan, math.inf, None, True, "a", "",
    [], [1], {}, b"1", (), object, np.float32(1), np.array([1, 2]), np.int64(3), np.uint8(3),
    10**400,
)  # fmt: skip
a_token = whole(0, V - 1)
any_token = mostly(a_token, odd)
any_tokens = mostly(
    listed(a_token, 1, 9), listed(any_token, 0, 4), listed(a_token, 20, 30), odd
)  # fmt: skip
a_depth = either(of(None), whole(1, L))
any_depth = mostly(a_depth, whole(-2, L + 2), odd)
any_threshold = mostly(either(random.Random.random, of(0.0, 1.0)), any_float, odd)
any_looks = mostly(
    either(
        of(None), made(tuple, listed(whole(1, L - 1), 0, 3)),
        made(tuple, listed(whole(-1, L + 1), 0, 3)),
    ),
    odd,
)  # fmt: skip
any_measure = of("max", "margin", "entropy", "max", "margin", "entropy", "least", None)


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


any_rule = either(
    made(FixedExit, any_depth),
    made(
        lambda t, m, looks, last: ConfidenceExit(t, m, layers=looks, last=last),
        any_threshold, any_measure, any_looks, any_depth,
    ),
    made(
        lambda t, looks, last: GateExit(t, layers=looks, last=last),
        any_threshold, any_looks, any_depth,
    ),
    made(
        LyingRule, any_depth,
        either(
            made(tuple, listed(whole(-2, L + 2), 0, 4)), odd,
            of((1000,), (-1,), (1.0,), (2, 1), (1, 1), (None,), (1 << 40,)),
        ),
        of(True, False, 0, 1, None, np.bool_(True), "yes", []),
    ),
    of(18, None, "max", FixedExit),
)  # fmt: skip
any_draft = mostly(
    made(
        Draft, mostly(whole(1, L - 1), any_depth),
        mostly(either(of(None), whole(1, V)), whole(-1, V + 1), odd),
        mostly(either(of(0.0), lambda draw: draw.uniform(0, 3)), any_float, odd),
    ),
    made(Draft, whole(1, L - 1)), odd,
)  # fmt: skip
any_count = mostly(whole(0, 16), whole(-2, 20), odd)
any_more = mostly(whole(0, 8), whole(-2, 40), odd)
any_sampler = mostly(
    made(
        Sampler, of(0.0, 0.0, 0.8, 1.0, 9.0), of(0, 5, V - 1, V, 10**30), of(1.0, 0.8, 0.3),
        of(0.0, 0.02, 0.2), of(1.0, 1.1, 0.7), whole(0, 9),
    ),
    of(Sampler(logit_bias=((1, 9.0),))), odd,
)  # fmt: skip
any_seen = mostly(listed(a_token, 0, 9), any_tokens)
any_choice = mostly(
    made(
        Choice, any_sampler, mostly(listed(a_token, 0, 3), any_tokens), any_seen,
        mostly(whole(0, 9), odd),
    ),
    odd,
)  # fmt: skip


def any_logits(draw: random.Random) -> np.ndarray:
    """Mostly float32, and as many as there are ids."""
    z = np.array([draw.gauss(0, 3) for _ in range(mostly(of(V, 7), of(0, V + 1))(draw))])
    if draw.random() < 0.1:
        z[: draw.randrange(V)] = any_float(draw)
    with np.errstate(over="ignore", invalid="ignore"):
        return z.astype(mostly(of(np.float32), of(np.float64, np.int32))(draw))


any_length = mostly(whole(0, 24), whole(-3, 99), odd)
any_bool = of(False, True)

COPIES: list[Callable[[Any], Any]] = [
    lambda cache: cache.fork(), copy.copy, copy.deepcopy,
    lambda cache: pickle.loads(pickle.dumps(cache)),
]  # fmt: skip
MOST_PAIRS = 6


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


class Calls:
    """Groups of caches, one for each of the engines, to which the same is done.

    Each of ACTS is a call, whose arguments are drawn.
    """

    def __init__(self, draw: random.Random, engines: tuple[Any, ...]) -> None:
        """draw: all comes from it. engines: the last is the judge, if there are two."""
        self.draw, self.engines = draw, engines
        self.groups = [self._new()]

    def _new(self) -> tuple[Any, ...]:
        return tuple(engine.new_cache() for engine in self.engines)

    def _put(self, group: tuple[Any, ...]) -> None:
        """Add a group; of many, in another's place."""
        if len(self.groups) == MOST_PAIRS:
            self.groups[self._which()] = group
        else:
            self.groups.append(group)

    def _which(self) -> int:
        return self.draw.randrange(len(self.groups))

    def _group(self) -> tuple[Any, ...]:
        return self.groups[self._which()]

    def act(self) -> None:
        """Any call."""
        self.draw.choice(ACTS)(self)

    def _same(self, call: Callable[..., Any], *groups: tuple[Any, ...]) -> None:
        """Do it on all engines: the same outcome, and caches that are as long, the right length
        if it was refused, and that go on."""
        before = [outcome(lambda g=group: g[0].length) for group in groups]
        found = [
            outcome(lambda e=engine, i=i: call(e, *(group[i] for group in groups)))
            for i, engine in enumerate(self.engines)
        ]
        assert all(other == found[0] for other in found[1:])
        for group, length in zip(groups, before, strict=True):
            after = [outcome(lambda c=cache: c.length) for cache in group]
            assert all(other == after[0] for other in after[1:])
            assert found[0] != "refused" or after[0] == length

    # ---- the calls --------------------------------------------------------------------

    def new_cache(self) -> None:
        """An empty group."""
        self._put(self._new())

    def copied(self) -> None:
        """A group that goes its own way from here."""
        group, how = self._group(), self.draw.choice(COPIES)
        copies = [outcome(lambda c=cache: [how(c)]) for cache in group]
        assert all((c == "refused") == (copies[0] == "refused") for c in copies)
        if copies[0] != "refused":
            self._put(tuple(made for (made,) in copies))

    def set_length(self) -> None:
        """Forget positions, or claim some."""
        group, length = self._group(), any_length(self.draw)
        for cache in group:
            cache.length = length
        noted = [outcome(lambda c=cache: c.require(0)) for cache in group]
        assert all(other == noted[0] for other in noted[1:])
        if noted[0] == "refused":
            for cache in group:
                cache.length = 0

    def extend(self) -> None:
        """A prompt, or its continuation."""
        ids, depth, last = (kind(self.draw) for kind in (any_tokens, any_depth, any_bool))
        self._same(lambda e, c: e.extend(ids, c, exit_layer=depth, last_only=last), self._group())

    def extend_exits(self) -> None:
        """All exits from one pass."""
        ids, exits = any_tokens(self.draw), mostly(listed(any_depth, 0, 3), odd)(self.draw)
        self._same(lambda e, c: exits_of(e, ids, c, exits), self._group())

    def step(self) -> None:
        """A token under a rule."""
        token, how = any_token(self.draw), any_rule(self.draw)
        self._same(lambda e, c: e.step(token, c, how), self._group())

    def choose(self) -> None:
        """A token from logits."""
        z, how, seen, made = (
            kind(self.draw) for kind in (mostly(any_logits, odd), any_sampler, any_seen, any_more)
        )
        self._same(lambda e, c: e.choose(z, how, seen, made), self._group())

    def step_on(self) -> None:
        """Several tokens in a call."""
        token, count, depth = (kind(self.draw) for kind in (any_token, any_more, any_depth))
        how = any_choice(self.draw)
        self._same(lambda e, c: e.step_on(token, c, count, how, exit_layer=depth), self._group())

    def step_many(self) -> None:
        """Tokens of two sequences, or of one."""
        one, two = any_token(self.draw), any_token(self.draw)
        first, second = any_rule(self.draw), any_rule(self.draw)
        self._same(
            lambda e, a, b: e.step_many([Row(one, a, first), Row(two, b, second)]),
            self._group(), self._group(),
        )  # fmt: skip

    def speculate(self) -> None:
        """A round of greedy drafts."""
        token, count = any_token(self.draw), any_count(self.draw)
        draft, depth = any_draft(self.draw), any_depth(self.draw)
        self._same(
            lambda e, c: e.speculate(token, c, count, draft, exit_layer=depth), self._group()
        )

    def speculate_many(self) -> None:
        """Rounds of two sequences, or of one."""
        token, draft = any_token(self.draw), any_draft(self.draw)
        counts = any_count(self.draw), any_count(self.draw)
        self._same(
            lambda e, *two: e.speculate_many(
                [GreedyRound(token, c, n, draft) for c, n in zip(two, counts, strict=True)]
            ),
            self._group(), self._group(),
        )  # fmt: skip

    def round(self) -> None:
        """A round of the caller's drafts."""
        draft, depth = any_draft(self.draw), any_depth(self.draw)
        ids = listed(any_token, 0, 5)(self.draw)
        self._same(lambda e, c: round_of(e, c, draft, depth, ids), self._group())


ACTS: list[Callable[[Calls], None]] = [
    Calls.new_cache, Calls.copied, Calls.set_length, Calls.extend, Calls.extend_exits, Calls.step,
    Calls.step_on, Calls.choose, Calls.step_many, Calls.speculate, Calls.speculate_many,
    Calls.round,
]  # fmt: skip
