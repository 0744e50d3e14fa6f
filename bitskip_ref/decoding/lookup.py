"""Drafts looked up in the text so far and verified together (SPEC 11.5): the plain text, sooner."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any

from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.draft import MOST
from bitskip_ref.decoding.generate import Choosing, EndIds, Token, check_max_tokens
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.engine import Engine
from bitskip_ref.rule import ExitRule

LONGEST, SHORTEST = 5, 2  # tokens in a row that are looked for
SMALL = 1 << 25  # weights of linear layers below which a model is taken to lie in the caches
RETRY = 8


class Lookup:
    """How drafts of one text are looked up, and how that has gone so far.

    It offers `statistics` as `bitskip_ref.decoding.speculate.Speculation` does.
    """

    def __init__(self, config: ModelConfig, rule: ExitRule) -> None:
        """rule: the depth that runs and verifies. Raises ValueError for one that looks."""
        if rule.looks(config):
            raise ValueError(
                "drafts that are looked up are verified at one depth: choose an exit layer by "
                "number, or do not speculate"
            )
        self.rule, self.exit_layer = rule, rule.deepest(config)
        self.rounds = 0  # passes that verified drafts
        self.drafted = 0
        self.accepted = 0
        self._cost = 0.5 if config.quantizable_parameters() < SMALL else 0.125
        self._lengths = range(LONGEST, SHORTEST - 1, -1)
        # For each length of what was found: drafts judged, those right, rounds without a draft.
        self._judged = {n: [4.0, 3.0] for n in self._lengths}
        self._idle = dict.fromkeys(self._lengths, 0)
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # where what follows these tokens stands
        self._found = LONGEST  # length of what the latest drafts followed

    def statistics(self) -> dict[str, int | float | None]:
        """What became of the drafts; `acceptance` is None without any, as without a round."""
        return {
            "draft_exit": None,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "accepted_per_round": self.accepted / self.rounds if self.rounds else None,
        }

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
                count, drafts = min(most, self._count(n)), list[int]()
                for i in range(at, at + count):  # what repeats may run into its own drafts
                    ids, i = (self._ids, i) if i < len(self._ids) else (drafts, i - len(self._ids))
                    drafts.append(ids[i])
                return drafts
        return []

    def note(self, drafted: int, accepted: int) -> None:
        """What became of the latest drafts."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        seen = self._judged[self._found]
        seen[0] += min(accepted + 1, drafted)
        seen[1] += accepted
        if seen[0] >= 64:
            seen[:] = seen[0] / 2, seen[1] / 2

    def _count(self, n: int) -> int:
        """Drafts behind n tokens that were found: 11.4's K for how they have gone."""
        judged, right = self._judged[n]
        rate, cost = right / judged, self._cost
        total, power, count = 1.0, rate, 0
        while count < MOST and (total + power) * (1 + cost * count) > total * (
            1 + cost * (count + 1)
        ):
            total, power, count = total + power, power * rate, count + 1
        if count == 0:
            self._idle[n] = (self._idle[n] + 1) % RETRY
            return int(self._idle[n] == 0)
        return count


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
    choosing = Choosing(sampler, max_tokens, room, eos_token_id, {*seen, *prompt})
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
