"""Self-speculative generation over any engine: an early exit drafts for the last one (SPEC 11)."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any

import numpy as np

from bitskip_ref.checks import check_input, check_logits, is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.draft import MOST, Draft, GreedyRound
from bitskip_ref.decoding.generate import EndIds, Token, check_max_tokens, end_ids
from bitskip_ref.decoding.pace import Pace, Tally
from bitskip_ref.decoding.sampling import Sampler, pick, splitmix64, uniform
from bitskip_ref.engine import Engine
from bitskip_ref.rule import ExitRule

LEAD = 0.9  # SPEC 11.4
ACCEPT, RESIDUAL = 0xA0761D6478BD642F, 0xE7037ED1A0B428DB  # SPEC 11.3


class Speculation(Tally):
    """How one text is drafted and verified, and how that has gone so far."""

    def __init__(
        self,
        config: ModelConfig,
        rule: ExitRule,
        draft_exit: int | None = None,
        count: int | None = None,
        draft_vocab: int | None = None,
    ) -> None:
        """rule: the depth N that verifies. draft_exit: 1..N - 1; None: a quarter of N.

        count: drafts of a round, 1..16; None adapts it. draft_vocab: draft among that many first
        ids; None: all. Raises ValueError.
        """
        depth = rule.deepest(config)
        if rule.looks(config):
            raise ValueError(
                "speculation verifies every token at one depth and leaves nothing to an exit that "
                "decides token by token: choose an exit layer by number, or do not speculate"
            )
        if count is not None and not (is_whole(count) and 1 <= count <= MOST):
            raise ValueError(f"speculate {count}: must be 1..{MOST} drafts a round, or auto")
        draft_exit = max(1, depth // 4) if draft_exit is None else draft_exit
        super().__init__()
        self.exit_layer = depth
        self.draft = Draft(draft_exit, draft_vocab, LEAD if count is None else 0.0)
        self.draft.check(depth, config)
        self.draft_exit = draft_exit
        self._fixed, self._pace = count, Pace(draft_exit / depth + 0.125)

    def count(self) -> int:
        """Drafts of the next round (SPEC 11.4)."""
        return self._pace.count() if self._fixed is None else self._fixed

    def note(self, drafted: int, accepted: int) -> None:
        """A round is over."""
        super().note(drafted, accepted)
        self._pace.note(drafted, accepted)


def stream(
    engine: Engine,
    prompt: Sequence[int],
    speculation: Speculation,
    sampler: Sampler,
    max_tokens: int,
    eos_token_id: EndIds = None,
    *,
    cache: Any = None,
    seen: Collection[int] = (),
) -> Generator[Token, None, None]:
    """Yield tokens as `bitskip_ref.decoding.generate.stream` does; greedy, the very same ones.

    Raises ValueError, before any work, for an empty prompt or one longer than the context.
    """
    config, depth = engine.config, speculation.exit_layer
    check_max_tokens(max_tokens)
    cache, ends = engine.new_cache() if cache is None else cache, end_ids(eos_token_id)
    check_input(prompt, cache.require(depth), config, cache.room)
    if len(prompt) > 1:
        engine.extend(prompt[:-1], cache, exit_layer=depth, last_only=True)
    rounds = Rounds(engine, prompt[-1], cache, speculation, sampler, max_tokens, {*seen, *prompt})
    while tokens := rounds.run():
        done = 0
        try:
            for token in tokens:
                done += 1
                if token in ends:
                    return
                yield Token(token, depth, len(tokens))
        finally:  # also where the caller stops within a round
            rounds.keep(done)


class Rounds:
    """The rounds of one text, one after the other: `run`, then `keep` what is used of it.

    Before `run`, `next_greedy` may be asked for a round that `Engine.speculate_many` runs, together
    with other texts'; its answer is then given to `run`.
    """

    def __init__(
        self, engine: Engine, token_id: int, cache: Any, speculation: Speculation,
        sampler: Sampler, max_tokens: int, seen: Collection[int],
    ) -> None:  # fmt: skip
        """token_id: to be run first, after what the cache holds. seen: ids up to it."""
        self._verify = Verifier(engine, speculation, sampler, seen)
        self._speculation, self._cache = speculation, cache
        self._token, self._left = token_id, max_tokens
        self._count: int | None = None  # drafts of the next round, once it is known
        self._tokens: list[int] = []  # of the round that was run
        self._first = cache.length

    def next_greedy(self) -> GreedyRound | None:
        """The next round; None where there is none, or its drafts are not plainly the likeliest."""
        count = self._next_count()
        if count is None or not self._verify.plain:
            return None
        how = self._speculation
        return GreedyRound(self._token, self._cache, count, how.draft, how.exit_layer)

    def run(self, found: tuple[list[int], np.ndarray] | None = None) -> list[int]:
        """The tokens that the next round adds; none: the text or the context is full.

        found: what the engine gave for `next_greedy`.
        """
        count = self._next_count()
        self._tokens = []
        if count is not None:
            self._first = self._cache.length - (0 if found is None else len(found[1]))
            self._count = None
            try:
                self._tokens = self._verify.round(self._token, self._cache, count, found)
            except BaseException:  # Ctrl-C, too: none of the drafts is text
                self._cache.length = min(self._cache.length, self._first + 1)
                raise
        return self._tokens

    def keep(self, count: int) -> None:
        """Go on after the first `count` of the tokens, at least one; forget the others."""
        self._cache.length = self._first + count
        self._left -= count
        self._token = self._tokens[count - 1]

    def _next_count(self) -> int | None:
        """Drafts of the next round, as long as there is one to be run (SPEC 11.1)."""
        if self._count is None:
            room = self._cache.room - self._cache.length
            if self._left and room:
                self._count = min(self._speculation.count(), self._left - 1, room - 1)
        return self._count


class Verifier:
    """Runs rounds of one text and says what they add to it (SPEC 11.2, 11.3)."""

    def __init__(
        self, engine: Engine, speculation: Speculation, sampler: Sampler, seen: Collection[int]
    ) -> None:
        """seen: ids of the prompt, and before it."""
        self._engine, self._speculation, self._sampler = engine, speculation, sampler
        self._seen = set(seen)
        self._made = 0  # tokens of the text
        changed = sampler.repetition_penalty != 1 or bool(sampler.logit_bias)
        self.plain = sampler.temperature == 0 and not changed
        """Whether drafts and tokens are the largest logits as they are."""

    def round(
        self, token_id: int, cache: Any, count: int,
        found: tuple[list[int], np.ndarray] | None = None,
    ) -> list[int]:  # fmt: skip
        """Draft at most `count` tokens after `token_id`; the tokens that follow it, 1..count + 1.

        The cache then holds every drafted position, right or wrong. found: what the engine gave for
        this round, if it was run already.
        """
        if self.plain:
            drafted, tokens = self._greedy(token_id, cache, count, found)
        else:
            drafted, tokens = self._chosen(token_id, cache, count)
        self._speculation.note(drafted, len(tokens) - 1)
        return tokens

    def _greedy(
        self, token_id: int, cache: Any, count: int, found: tuple[list[int], np.ndarray] | None
    ) -> tuple[int, list[int]]:
        """SPEC 11.2 without a penalty, one call of the engine: (drafts that were run, tokens)."""
        how = self._speculation
        drafts, p = found or self._engine.speculate(
            token_id, cache, count, how.draft, exit_layer=how.exit_layer,
            contenders=self._sampler.contenders,
        )  # fmt: skip
        tokens = p.argmax(axis=1).tolist()
        right = 0
        while right < len(drafts) and drafts[right] == tokens[right]:
            right += 1
        del tokens[right + 1 :]
        check_logits(p[range(right + 1), tokens], self._made)
        self._made += right + 1
        return len(drafts), tokens

    def _chosen(self, token_id: int, cache: Any, count: int) -> tuple[int, list[int]]:
        """SPEC 11.3, or 11.2 with a penalty: draft, verify, settle."""
        how, sampler, seen = self._speculation, self._sampler, set(self._seen)
        round_ = self._engine.round(cache, how.draft, how.exit_layer)
        proposed: list[tuple[int, np.ndarray]] = []  # draft, the logits it was drawn from
        token, go_on = token_id, True
        while go_on:
            q = round_.draft(token)
            token = self._engine.choose(q, sampler, seen, self._made + len(proposed))
            go_on = len(proposed) < count and how.draft.sure(q)
            seen.add(token)
            proposed.append((token, q))
        tokens: list[int] = []
        for (draft, q), p in zip(proposed, round_.verify(), strict=True):
            tokens.append(settle(sampler, p, q, draft, self._seen, self._made))
            self._seen.add(tokens[-1])
            self._made += 1
            if tokens[-1] != draft:
                break
        return len(proposed) - 1, tokens


def settle(
    sampler: Sampler, p: np.ndarray, q: np.ndarray, draft: int, seen: Collection[int], index: int
) -> int:
    """The token of a position: its draft, or another.

    p f32 [V] and q f32 [V']: logits of verification and draft; `seen` and `index` as in
    `Sampler.choose`. Over the draws its distribution is that of `choose` on p.
    """
    if sampler.temperature == 0:
        return sampler.choose(p, seen, index)
    ids, weights = sampler.candidates(sampler.tempered(p, seen, index))
    wanted = weights / weights.sum()
    q_ids, q_weights = sampler.candidates(sampler.tempered(q, seen, index))
    drafted = np.zeros(len(p))
    drafted[q_ids] = q_weights / q_weights.sum()
    u = uniform(splitmix64(sampler.seed ^ ACCEPT), index)
    if u * drafted[draft] < wanted[ids == draft].sum():  # of one value, or none
        return draft
    short = wanted - drafted[ids]
    lacking = short > 0
    if not lacking.any():
        return int(ids[0])
    return pick(ids[lacking], short[lacking], uniform(splitmix64(sampler.seed ^ RESIDUAL), index))
