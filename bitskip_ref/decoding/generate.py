"""Token by token generation over any engine (SPEC 8.2, 8.3, 9)."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitskip_ref.checks import is_whole
from bitskip_ref.decoding.choice import MOST, Choice
from bitskip_ref.decoding.contenders import Contenders
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.engine import Engine
from bitskip_ref.rule import ExitRule, check_rule

CALL_S = 0.05  # of a call for several tokens
LEAST_S = 1e-6  # of a token: clocks may stand still


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token and the number of blocks whose logits chose it (SPEC 8.7)."""

    id: int
    depth: int
    together: int = field(default=1, compare=False)
    """How many tokens came with it at once, itself among them."""


def check_max_tokens(max_tokens: int) -> None:
    """Raise ValueError for what is no integer from 0 up."""
    if not is_whole(max_tokens) or max_tokens < 0:
        raise ValueError(f"max tokens {max_tokens!r}: must be a whole number, 0 or more")


EndIds = int | Collection[int] | None
"""The id that ends a text, or several; None: nothing but its length does (SPEC 9.4)."""


def end_ids(eos_token_id: EndIds) -> frozenset[int]:
    """All ids that end a text."""
    if eos_token_id is None:
        return frozenset()
    return frozenset((eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id)


class Choosing:
    """Which tokens follow a prompt, one after the other, whoever runs them (SPEC 9).

    `next` takes the logits after the prompt, then those after each token that it gave.
    """

    def __init__(
        self, engine: Engine, sampler: Sampler, max_tokens: int, room: int, eos_token_id: EndIds,
        seen: Collection[int],
    ) -> None:  # fmt: skip
        """room: positions free behind the prompt. seen: ids that the penalty counts (SPEC 9.2).

        Raises ValueError for a wrong `max_tokens`.
        """
        check_max_tokens(max_tokens)
        self._engine, self._sampler = engine, sampler
        self._ends, self._seen = end_ids(eos_token_id), set(seen)
        self._left = min(max_tokens, room + 1)  # nothing is predicted from the last: no position
        self._made = 0
        self.end: int | None = None
        """The token by which the text ended, once it has ended by one."""

    @property
    def over(self) -> bool:
        """Whether no token can follow any more."""
        return self._left == 0

    @property
    def left(self) -> int:
        """How many tokens may follow."""
        return self._left

    @property
    def choice(self) -> Choice | None:
        """How an engine may go on after a token by itself; None: `next` has to choose each."""
        if self._sampler.logit_bias:
            return None
        return Choice(self._sampler, self._ends, self._seen, self._made)

    def took(self, token: int) -> None:
        """The text goes on with a token that an engine chose as `choice` says."""
        self._seen.add(token)
        self._made, self._left = self._made + 1, self._left - 1

    def next(self, logits: np.ndarray) -> int | None:
        """The token after logits f32 [V]; None where the text ends (SPEC 9.4, 9.5: ValueError)."""
        if self.over:
            return None
        token = self._engine.choose(logits, self._sampler, self._seen, self._made)
        if token in self._ends:
            self.end, self._left = token, 0
            return None
        self.took(token)
        return token


class Together:
    """A text's tokens under a fixed exit, several in one call of the engine.

    Those of a call come at once: so many that it lasts CALL_S, about, and nobody who reads along or
    breaks off waits longer.
    """

    def __init__(
        self, engine: Engine, cache: Any, exit_layer: int, contenders: Contenders | None,
        choosing: Choosing,
    ) -> None:  # fmt: skip
        self._engine, self._cache, self._choosing = engine, cache, choosing
        self._exit_layer, self._contenders = exit_layer, contenders
        self._count = 0  # nothing is known of its speed, and a second token is soon there
        self._first = 0

    def run(self, token_id: int) -> tuple[list[int], np.ndarray]:
        """Run the token that `choosing` gave last: those that follow, and the logits after them.

        `keep` says how many of them the text has taken.
        """
        choice, cache = self._choosing.choice, self._cache
        assert choice is not None
        self._first = cache.length
        count = min(self._count, self._choosing.left, cache.room - cache.length) - 1
        start = time.perf_counter()
        ids, z = self._engine.step_on(
            token_id, cache, max(0, count), choice, exit_layer=self._exit_layer,
            contenders=self._contenders,
        )  # fmt: skip
        each = (time.perf_counter() - start) / (1 + len(ids))
        self._count = int(min(1 + MOST, CALL_S / max(each, LEAST_S)))
        return ids, z

    def keep(self, count: int) -> None:
        """The token and `count` of those that follow were run; the cache forgets the others."""
        if self._first + 1 + count < self._cache.length:
            self._cache.length = self._first + 1 + count


def stream(
    engine: Engine,
    prompt: Sequence[int],
    rule: ExitRule,
    sampler: Sampler,
    max_tokens: int,
    eos_token_id: EndIds = None,
    *,
    cache: Any = None,
    seen: Collection[int] = (),
) -> Generator[Token, None, None]:
    """Yield tokens until end-of-text (not yielded), `max_tokens`, or a full context.

    cache: goes on after what it holds, which `prompt` does not repeat (None: a new one). In the end
    it holds the prompt and all tokens but the last, from which nothing was predicted; before that,
    perhaps tokens that are yet to be yielded. seen: ids before the prompt that count for the
    repetition penalty (SPEC 9.2).
    Raises ValueError, before any work, for an empty prompt, one longer than the context, or a rule
    that means nothing for the model.
    """
    check_rule(rule)
    rule.check(engine.config)
    check_max_tokens(max_tokens)
    cache = engine.new_cache() if cache is None else cache
    depth = rule.deepest(engine.config)
    contenders = sampler.contenders
    z = engine.extend(prompt, cache, exit_layer=depth, last_only=True, contenders=contenders)[0]
    room = engine.config.max_position_embeddings - cache.length
    choosing = Choosing(engine, sampler, max_tokens, room, eos_token_id, {*seen, *prompt})
    together = None
    if choosing.choice is not None and not rule.looks(engine.config):
        together = Together(engine, cache, depth, contenders, choosing)
    came = 1
    while (token := choosing.next(z)) is not None:
        yield Token(token, depth, came)
        if choosing.over:
            return
        if together is None:
            z, depth = engine.step(token, cache, rule, contenders=contenders)
            continue
        ids, z = together.run(token)
        done, came = 0, len(ids) + 1
        try:
            for token in ids:
                choosing.took(token)
                yield Token(token, depth, came)
                done += 1
        finally:  # also where the caller stops within a call
            together.keep(done)
