"""Rows of several sequences in one pass over the weights (SPEC 12.2).

Up to CHUNK rows go through the blocks together, and leave at their exits: fixed ones where they
end, others where their rule says so at a look. Rows at hand lie deepest first, so that those which
end are the last of them. Leavers leave the keys and values of skipped blocks (SPEC 8.6) before the
others go on, which may belong to the same sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitskip_cpu.kernels.layout import BLOCKS, CHUNK, DRAFT, EMBED, EXIT, FILL, GATE
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.engine import Planned, PlannedRound
from bitskip_ref.probe import Asked

Result = tuple[np.ndarray | None, int]


def run_rows(engine: Any, rows: Sequence[Planned]) -> list[Result]:
    """(logits f32 [V] if wanted, depth) of each row; those of one sequence follow each other."""
    found: list[Result] = []
    for start in range(0, len(rows), CHUNK):
        found += _Pass(engine, rows[start : start + CHUNK]).run()
    return found


def run_rounds(engine: Any, rounds: Sequence[PlannedRound]) -> list[tuple[list[int], np.ndarray]]:
    """(drafts, logits f32 [k + 1, V]) of each round (SPEC 11.1), of a sequence each.

    Rounds that draft and verify alike are run together, as many as CHUNK tokens allow.
    """
    found: dict[int, tuple[list[int], np.ndarray]] = {}
    alike: dict[tuple[Draft, int], list[int]] = {}
    for i, round_ in enumerate(rounds):
        alike.setdefault((round_.draft, round_.depth), []).append(i)
    for group in alike.values():
        group.sort(key=lambda i: rounds[i].most)
        while group:
            most = 1 + rounds[group[-1]].most  # tokens of the longest
            part, group[-(CHUNK // most) :] = group[-(CHUNK // most) :], []
            found.update(zip(part, _together(engine, [rounds[i] for i in part]), strict=True))
    return [found[i] for i in range(len(rounds))]


def _together(engine: Any, rounds: list[PlannedRound]) -> list[tuple[list[int], np.ndarray]]:
    """Rounds that draft and verify alike, those of fewest drafts first."""
    space, vocab = engine._space, engine.config.vocab_size
    draft, depth = rounds[0].draft, rounds[0].depth
    q = np.empty((len(rounds), draft.vocab or vocab), np.float32)
    space.set_rows([round_.run for round_ in rounds])
    space.set_draft(draft, [round_.most for round_ in rounds], draft.least_lead)
    space.set_exit(draft.exit_layer, q.ctypes.data)
    engine._call(DRAFT, draft.exit_layer)
    of = space.drafts_in_order()
    p = np.empty((len(of), vocab), np.float32)
    space.set_exit(depth, p.ctypes.data)
    engine._call(BLOCKS | EXIT, draft.exit_layer, depth)
    borders = np.searchsorted(of, np.arange(len(rounds) + 1))
    return [
        (space.ids[start + 1 : end].tolist(), p[start:end])
        for start, end in itertools.pairwise(borders.tolist())
    ]


class _Pass:
    """Up to CHUNK rows on their way; a row is known by its index."""

    def __init__(self, engine: Any, rows: Sequence[Planned]) -> None:
        self.engine, self.space, self.rows = engine, engine._space, rows
        self.found: list[Result] = [(None, row.deepest) for row in rows]
        self.live = sorted(range(len(rows)), key=lambda i: (-rows[i].deepest, rows[i].wanted))
        """Rows at hand, in the workspace's order."""
        self.logits: dict[int, np.ndarray] = {}  # at the depth reached, f32 [V] of some rows
        self.gates: dict[int, np.float32] = {}

    def run(self) -> list[Result]:
        rows, live = self.rows, self.live
        self.space.set_rows([rows[i].run for i in live])
        done, actions = 0, EMBED
        for n in sorted({n for row in rows for n in (*row.looks, row.deepest)}):
            asked = [i for i in self.live if n in rows[i].looks]
            ended = [i for i in self.live if rows[i].deepest == n]
            if not asked and not ended:
                continue
            self.logits.clear()
            self.gates.clear()
            wanted = [] if asked else [i for i in ended if rows[i].wanted]
            if wanted:
                self.to_the_end(wanted)
                z = self.prepare(wanted, n)
                self.engine._call(actions | BLOCKS | EXIT, done, n)
                self.logits.update(zip(wanted, z, strict=True))
            else:
                self.engine._call(actions | BLOCKS, done, n)
            done, actions = n, 0
            self.leave(n, [*self.stopped(asked, n), *ended])
        return self.found

    def prepare(self, wanted: list[int], n: int) -> np.ndarray:
        """Have EXIT write the logits of these rows, the last at hand, f32 [t, V]."""
        z = np.empty((len(wanted), self.engine.config.vocab_size), np.float32)
        self.space.set_exit(n, z.ctypes.data, self.space.tokens - len(wanted))
        return z

    def stopped(self, asked: list[int], n: int) -> list[int]:
        """Those rows whose rule stops them here."""
        # Rules of a kind ask for the same: what one row wants is computed for all of them.
        groups: dict[type, list[int]] = {}
        for i in asked:
            groups.setdefault(type(self.rows[i].rule), []).append(i)
        return [
            i for group in groups.values() for i in group
            if _AskedTogether(self, group, i, n).whether(self.rows[i].rule)
        ]  # fmt: skip

    def leave(self, n: int, leavers: list[int]) -> None:
        """Note their results, fill the blocks that they skip, and go on without them."""
        if not leavers:
            return
        self.exit([i for i in leavers if self.rows[i].wanted and i not in self.logits], n)
        for i in leavers:
            self.found[i] = (self.logits.get(i) if self.rows[i].wanted else None), n
        gone = set(leavers)
        stay = [i for i in self.live if i not in gone]
        fill = [i for i in leavers if self.rows[i].deepest > n]
        fill.sort(key=lambda i: -self.rows[i].deepest)
        self.arrange([*stay, *fill])
        while fill:
            last = self.rows[fill[-1]].deepest
            self.space.window(len(stay), len(fill))
            self.engine._call(FILL, n, last)
            n = last
            fill = [i for i in fill if self.rows[i].deepest > last]
        self.live = stay
        self.space.window(0, len(stay))

    def exit(self, wanted: list[int], n: int) -> None:
        """Logits of these rows at hand."""
        if wanted:
            self.to_the_end(wanted)
            z = self.prepare(wanted, n)
            self.engine._call(EXIT)
            self.logits.update(zip(wanted, z, strict=True))

    def gate(self, group: list[int], n: int) -> None:
        """Gates of these rows at hand."""
        self.to_the_end(group)
        self.space.window(len(self.live) - len(group), len(group))
        self.space.set_gate(n)
        self.engine._call(GATE)
        self.gates.update(zip(group, self.space.gates[: len(group)].copy(), strict=True))
        self.space.window(0, len(self.live))

    def to_the_end(self, some: list[int]) -> None:
        """Put these rows behind the others, in their order."""
        if self.live[-len(some) :] != some:
            chosen = set(some)
            self.arrange([*(i for i in self.live if i not in chosen), *some])

    def arrange(self, order: list[int]) -> None:
        """Have these rows at hand, in that order."""
        if order != self.live[: len(order)]:
            at = {i: slot for slot, i in enumerate(self.live)}
            self.space.arrange([at[i] for i in order])
        self.live = order


class _AskedTogether(Asked):
    """The Probe of one row of a group that is asked together."""

    def __init__(self, walk: _Pass, group: list[int], row: int, n: int) -> None:
        super().__init__(walk.engine, None, n)
        self._walk, self._group, self._row = walk, group, row

    def _gate(self) -> np.float32:
        if self._row not in self._walk.gates:
            self._walk.gate(self._group, self._n)
        return self._walk.gates[self._row]

    def _exit(self) -> np.ndarray:
        if self._row not in self._walk.logits:
            self._walk.exit(self._group, self._n)
        return self._walk.logits[self._row]
