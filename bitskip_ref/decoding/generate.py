"""Token by token generation over any engine (SPEC 8.2, 8.3, 9)."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitskip_ref.checks import is_whole
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.engine import Engine
from bitskip_ref.rule import ExitRule, check_rule


class Token(NamedTuple):
    """A generated token and the number of blocks whose logits chose it (SPEC 8.7)."""

    id: int
    depth: int


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
        self, sampler: Sampler, max_tokens: int, room: int, eos_token_id: EndIds,
        seen: Collection[int],
    ) -> None:  # fmt: skip
        """room: positions free behind the prompt. seen: ids that the penalty counts (SPEC 9.2).

        Raises ValueError for a wrong `max_tokens`.
        """
        check_max_tokens(max_tokens)
        self._sampler, self._ends, self._seen = sampler, end_ids(eos_token_id), set(seen)
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

    def next(self, logits: np.ndarray) -> int | None:
        """The token after logits f32 [V]; None where the text ends (SPEC 9.4, 9.5: ValueError)."""
        if self.over:
            return None
        token = self._sampler.choose(logits, self._seen, self._made)
        if token in self._ends:
            self.end, self._left = token, 0
            return None
        self._seen.add(token)
        self._made, self._left = self._made + 1, self._left - 1
        return token


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
    it holds the prompt and all tokens but the last, from which nothing was predicted. seen: ids
    before the prompt that count for the repetition penalty (SPEC 9.2).
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
    choosing = Choosing(sampler, max_tokens, room, eos_token_id, {*seen, *prompt})
    while (token := choosing.next(z)) is not None:
        yield Token(token, depth)
        if choosing.over:
            return
        z, depth = engine.step(token, cache, rule, contenders=contenders)
