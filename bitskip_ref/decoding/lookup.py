"""Drafts looked up in the text so far and verified together (SPEC 11.5): the plain text, sooner."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any

from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.draft import MOST
from bitskip_ref.decoding.generate import Choosing, EndIds, Token, check_max_tokens
from bitskip_ref.decoding.pace import Pace, Tally
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.engine import Engine
from bitskip_ref.rule import ExitRule

LONGEST, SHORTEST = 5, 2  # tokens in a row that are looked for
SMALL = 1 << 25  # weights of linear layers below which a model is taken to lie in the caches


class Lookup(Tally):
    """How drafts of one text are looked up, and how that has gone so far."""

    def __init__(self, config: ModelConfig, rule: ExitRule) -> None:
        """rule: the depth that runs and verifies. Raises ValueError for one that looks."""
        if rule.looks(config):
            raise ValueError(
                "drafts that are looked up are verified at one depth: choose an exit layer by "
                "number, or do not speculate"
            )
        super().__init__()
        self.rule, self.exit_layer = rule, rule.deepest(config)
        cost = 0.5 if config.quantizable_parameters() < SMALL else 0.125
        self._lengths = range(LONGEST, SHORTEST - 1, -1)
        self._paces = {n: Pace(cost) for n in self._lengths}  # by the length of what was found
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # where what follows these tokens stands
        self._found = LONGEST  # length of what the latest drafts followed

    def add(self, ids: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        for token in ids:
            for n in self._lengths:
                if n <= len(self._ids):
                    self._behind[tuple(self._ids[-n:])] = len(self._ids)
            self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Drafts of what follows the text, at most `most`; often none."""
        for n in self._lengths:
            at = self._behind.get(tuple(self._ids[-n:]))
            if at is not None:
                self._found = n
                count, drafts = min(most, self._paces[n].count()), list[int]()
                for i in range(at, at + count):  # what repeats may run into its own drafts
                    ids, i = (self._ids, i) if i < len(self._ids) else (drafts, i - len(self._ids))
                    drafts.append(ids[i])
                return drafts
        return []

    def note(self, drafted: int, accepted: int) -> None:
        """What became of the latest drafts."""
        super().note(drafted, accepted)
        self._paces[self._found].note(drafted, accepted)


def stream(
    engine: Engine,
    prompt: Sequence[int],
    lookup: Lookup,
    sampler: Sampler,
    max_tokens: int,
    eos_token_id: EndIds = None,
    *,
    cache: Any = None,
    seen: Collection[int] = (),
) -> Generator[Token, None, None]:
    """Yield and leave behind what `bitskip_ref.decoding.generate.stream` does, greedy or seeded.

    Raises ValueError as that does.
    """
    lookup.rule.check(engine.config)
    check_max_tokens(max_tokens)
    cache = engine.new_cache() if cache is None else cache
    depth, contenders = lookup.exit_layer, sampler.contenders
    rows = engine.extend(
        prompt, cache, exit_layer=depth, last_only=True, contenders=contenders
    )  # fmt: skip
    start, drafts = cache.length - 1, list[int]()
    room = engine.config.max_position_embeddings - cache.length
    choosing = Choosing(engine, sampler, max_tokens, room, eos_token_id, {*seen, *prompt})
    lookup.add(prompt)
    while True:
        done = 0
        try:
            for row, draft in zip(rows, [*drafts, None], strict=True):
                token = choosing.next(row)
                done += 1
                if token is None:
                    return
                lookup.add([token])
                yield Token(token, depth)
                if choosing.over:
                    return
                if token != draft:
                    break
        finally:  # also where the caller stops within a round
            cache.length = start + done
        if drafts:
            lookup.note(len(drafts), done - 1)
        assert token is not None
        start = cache.length
        drafts = lookup.propose(min(MOST, choosing.left - 1, cache.room - start - 1))
        if drafts:
            rows = engine.extend(
                [token, *drafts], cache, exit_layer=depth, contenders=contenders
            )  # fmt: skip
        else:
            rows = engine.step(token, cache, lookup.rule, contenders=contenders)[0][None]
