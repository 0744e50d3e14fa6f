"""How likely a model finds given continuations of given contexts, many in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bitskip_cpu.heldout.scoring import Advance
from bitskip_cpu.many.scheduler import MEMORY, ROWS
from bitskip_cpu.pages import LentCache, NoRoom, Pool
from bitskip_ref.engine import Engine
from bitskip_ref.exits.fixed import FixedExit
from bitskip_ref.heldout import token_losses
from bitskip_ref.rows import Row
from bitskip_ref.rule import ExitRule

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of what follows it, each at least one."""


def log_likelihoods(
    engine: Engine,
    pairs: Sequence[Pair],
    rule: ExitRule,
    *,
    memory: int = MEMORY,
    advance: Advance = lambda _: None,
) -> list[tuple[float, bool]]:
    """(log probability of the continuation, whether greedy decoding says it) of each pair.

    Under `rule` as in generation: the context runs to the rule's last block, the continuation's
    tokens follow, whatever is predicted (SPEC 8.3). Contexts that begin alike are run once, and
    continuations side by side; the figures are those of each pair alone, to the bit (SPEC 12.2).
    memory: bytes of keys and values. Raises ValueError for a pair that does not fit the context.
    """
    work = _Work(engine, pairs, rule, memory, advance)
    for i in sorted(range(len(pairs)), key=lambda i: (*pairs[i][0], -1, *pairs[i][1])):
        work.add(i)
    work.run()
    return work.found


class _Work:
    """Pairs whose contexts were run, and whose continuations wait to be."""

    def __init__(
        self, engine: Engine, pairs: Sequence[Pair], rule: ExitRule, memory: int, advance: Advance
    ) -> None:
        self.engine, self.pairs, self.rule, self.advance = engine, pairs, rule, advance
        self.pool, self.depth = Pool(engine, memory), rule.deepest(engine.config)
        self.waiting: list[tuple[int, LentCache]] = []
        self.rows: list[Row] = []
        self.found: list[tuple[float, bool]] = [(math.nan, False)] * len(pairs)
        rule.check(engine.config)

    def add(self, i: int) -> None:
        """Run a pair's context; once there are enough rows, all continuations that wait."""
        context, said = self.pairs[i]
        if not context or not said:
            raise ValueError("a context and its continuation have at least one token each")
        most = len(context) + len(said) - 1  # nothing is predicted from the last token
        try:
            cache = self.pool.open(context, self.depth, most)
        except NoRoom:
            self.run()  # after which all pages are free, or kept
            cache = self.pool.open(context, self.depth, most)
        behind = context[cache.length : -1]
        if behind:
            self.engine.extend(behind, cache, exit_layer=self.depth, last_only=True)
            self.pool.keep(cache, context[:-1])
        self.waiting.append((i, cache))
        self.rows.append(Row(context[-1], cache, FixedExit(self.depth)))
        self.rows += [Row(token, cache, self.rule) for token in said[:-1]]
        if len(self.rows) >= ROWS:
            self.run()

    def run(self) -> None:
        """Run the continuations that wait."""
        targets = [token for i, _ in self.waiting for token in self.pairs[i][1]]
        losses, greedy = list[float](), list[bool]()
        for at in range(0, len(targets), ROWS):
            wanted = np.array(targets[at : at + ROWS])
            ran = self.engine.step_many(self.rows[at : at + ROWS])
            z = np.stack([logits for logits, _ in ran if logits is not None])
            losses += token_losses(z, wanted).tolist()
            greedy += (z.argmax(1) == wanted).tolist()  # the lowest id among equals (SPEC 9.1)
            self.advance(len(wanted))
        first = 0
        for i, cache in self.waiting:
            part = slice(first, first + len(self.pairs[i][1]))
            self.found[i] = -math.fsum(losses[part]), all(greedy[part])
            self.pool.close(cache)
            first = part.stop
        self.waiting, self.rows = [], []
