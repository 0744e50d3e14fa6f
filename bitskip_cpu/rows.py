"""Rows of several sequences in one pass over the weights (SPEC 12.2).

Up to CHUNK rows go through the blocks together, and leave at their exits: fixed ones where they
end, others where their rule says so at a look. Those that have left write the keys and values of
the blocks that they skip (SPEC 8.6) just before the others run these, which may belong to the same
sequence: so a known text runs under any rule as a prompt does, many of its tokens at a time. Where
all ask their gates alike, one call of the kernels does all of it (`kernels.forward.look`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from bitskip_cpu.kernels.layout import (
    BLOCKS,
    CHUNK,
    DRAFT,
    EMBED,
    EXIT,
    FILL,
    GATE,
    LOOK,
)
from bitskip_cpu.workspace import at_most
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.exits import GateExit
from bitskip_ref.probe import Asked
from bitskip_ref.rows import Planned, PlannedRound

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
    """Up to CHUNK rows on their way; a row is known by its index, int64 arrays hold several."""

    def __init__(self, engine: Any, rows: Sequence[Planned]) -> None:
        self.engine, self.space, self.rows = engine, engine._space, rows
        self.wanted = np.array([row.wanted for row in rows])
        self.deepest = np.array([row.deepest for row in rows])
        self.order = np.lexsort((self.wanted, -self.deepest))
        """Rows as they lie in the workspace: those on their way, then those that have left."""
        self.live = len(rows)  # on their way
        self.depths = np.zeros(len(rows), np.int64)  # of those that have left; else 0
        self.logits: dict[int, np.ndarray] = {}  # f32 [V] of some rows, at the depth reached
        self.gates: dict[int, np.float32] = {}  # of some rows on their way

    @cached_property
    def kinds(self) -> dict[type, np.ndarray]:
        """Kind of rule -> which rows have one, bool [rows]."""
        return {
            kind: np.array([type(row.rule) is kind for row in self.rows])
            for kind in {type(row.rule): None for row in self.rows}
        }

    def looks(self) -> dict[int, np.ndarray]:
        """Which rows are asked after n blocks, bool [rows]."""
        found: dict[int, np.ndarray] = {}
        for looks in {row.looks: None for row in self.rows}:
            mine = np.array([row.looks == looks for row in self.rows])
            for n in looks:
                found[n] = found[n] | mine if n in found else mine
        return found

    def run(self) -> list[Result]:
        """Results in the order of the rows."""
        self.space.set_rows([self.rows[i].run for i in self.order.tolist()])
        if gate := self.one_gate():
            self.look(gate)
        else:
            self.walk()
        self.exits()
        return [
            (self.logits[i] if row.wanted else None, n)
            for i, (row, n) in enumerate(zip(self.rows, self.depths.tolist(), strict=True))
        ]

    def one_gate(self) -> Planned | None:
        """A row, where the gates of all are asked alike; then one call takes them to their ends."""
        first, *others = self.rows
        if type(first.rule) is not GateExit or not self.engine.config.gates:
            return None
        for row in others:
            if row.rule is not first.rule and (
                type(row.rule) is not GateExit or row.rule.threshold != first.rule.threshold
                or (row.looks, row.deepest) != (first.looks, first.deepest)
            ):  # fmt: skip
                return None
        return first

    def look(self, one: Planned) -> None:
        """Run all rows to where their gates stop them; they are asked as `one` is."""
        assert isinstance(one.rule, GateExit)
        self.space.set_looks(one.looks, one.deepest, one.rule.threshold)
        self.call(0, self.live, EMBED | LOOK, 0, one.deepest)
        self.order = self.order[self.space.order[: self.live]]
        self.depths[self.order] = self.space.depths[: self.live]
        self.live = 0

    def walk(self) -> None:
        """Run all rows to their ends, from look to look."""
        actions, done, nobody = EMBED, 0, np.zeros(len(self.rows), bool)
        looking = self.looks()
        for n in sorted({*looking, *self.deepest.tolist()}):
            live = self.order[: self.live]
            asked = live[looking.get(n, nobody)[live]]
            ended = live[self.deepest[live] == n]
            if not (len(asked) or len(ended) or self.live < len(self.rows)):
                continue
            self.fill(done, n)
            alike = len(ended) == len(self.rows)  # then blocks and logits are one call
            if alike and self.wanted.any():
                self.exit(ended[self.wanted[ended]], n, actions | BLOCKS, done)
            elif self.live:
                self.call(0, self.live, actions | BLOCKS, done, n)
            done, actions = n, 0
            self.leave(n, [*self.stopped(asked, n), ended])
            self.logits = {i: z for i, z in self.logits.items() if self.depths[i]}
            self.gates.clear()

    def call(self, at: int, count: int, actions: int, first: int = 0, last: int = 0) -> None:
        """Have the kernels run `count` rows, from place `at` of the order on."""
        self.space.window(at, count)
        self.engine._call(actions, first, last)

    def fill(self, done: int, n: int) -> None:
        """Keys and values of blocks done..n-1 of those that have left (SPEC 8.6).

        Before the others run these blocks, which may attend to them.
        """
        count = int((self.deepest[self.order[self.live :]] >= n).sum())
        if count:
            self.call(self.live, count, FILL, done, n)

    def stopped(self, asked: np.ndarray, n: int) -> list[np.ndarray]:
        """Those rows whose rule stops them here."""
        stopped = []
        # Rules of a kind ask for the same: what one row wants is computed for all of them.
        for kind, mine in self.kinds.items():
            group = asked[mine[asked]]
            if not len(group):
                continue
            if kind is GateExit and self.engine.config.gates:
                stopped.append(group[self.gate(group, n) > self.thresholds[group]])
                continue
            stopped.append(np.array([
                i for i in group.tolist()
                if _AskedTogether(self, group, i, n).whether(self.rows[i].rule)
            ], np.int64))  # fmt: skip
        return stopped

    @cached_property
    def thresholds(self) -> np.ndarray:
        """f32 [rows], as `kernels.forward.leave` compares them; of other rules than gates 0."""
        rules = {id(row.rule): row.rule for row in self.rows}
        least = {key: at_most(r.threshold) for key, r in rules.items() if type(r) is GateExit}
        return np.array([least.get(id(row.rule), 0) for row in self.rows], np.float32)

    def leave(self, n: int, leavers: Sequence[np.ndarray]) -> None:
        """Put those that end after n blocks behind the others: deepest first, as `fill` wants."""
        if not any(map(len, leavers)):
            return
        gone = np.concatenate(leavers)
        self.depths[gone] = n
        stay = self.order[: self.live]
        stay = stay[self.depths[stay] == 0]
        left = np.concatenate((self.order[self.live :], gone))
        left = left[np.argsort(-self.deepest[left], kind="stable")]
        self.arrange(np.concatenate((stay, left)))
        self.live = len(stay)

    def exits(self) -> None:
        """The logits that are missing, once all have left."""
        groups: dict[tuple[int, ...], list[int]] = {}  # of one norm and head
        for i in self.order.tolist():
            if self.wanted[i] and i not in self.logits:
                groups.setdefault(self.space.exit(int(self.depths[i])), []).append(i)
        for group in groups.values():
            self.exit(np.array(group), int(self.depths[group[0]]))

    def exit(self, group: np.ndarray, n: int, before: int = 0, first: int = 0) -> None:
        """Logits of these rows after n blocks; `before`: what all on their way do in that call."""
        at = self.to_the_end(group)
        start = 0 if before else at
        z = np.empty((len(group), self.engine.config.vocab_size), np.float32)
        self.space.set_exit(n, z.ctypes.data, at - start)
        self.call(start, at + len(group) - start, before | EXIT, first, n)
        self.logits.update(zip(group.tolist(), z, strict=True))

    def gate(self, group: np.ndarray, n: int) -> np.ndarray:
        """Gates of these rows on their way, f32."""
        self.space.set_gate(n)
        self.call(self.to_the_end(group), len(group), GATE)
        return self.space.gates[: len(group)]

    def to_the_end(self, group: np.ndarray) -> int:
        """Put rows behind the others on their way (if none is, behind all); the first's place."""
        end = self.live or len(self.rows)
        at = end - len(group)
        if not np.array_equal(self.order[at:end], group):
            stays = np.ones(len(self.rows), bool)
            stays[group] = False
            others = self.order[:end]
            self.arrange(np.concatenate((others[stays[others]], group, self.order[end:])))
        return at

    def arrange(self, order: np.ndarray) -> None:
        """Have the rows in that order."""
        if not np.array_equal(order, self.order):
            slots = np.empty_like(order)
            slots[self.order] = np.arange(len(order))
            self.space.arrange(slots[order])
            self.order = order


class _AskedTogether(Asked):
    """The Probe of one row of a group that is asked together."""

    def __init__(self, walk: _Pass, group: np.ndarray, row: int, n: int) -> None:
        super().__init__(walk.engine, None, n)
        self._walk, self._group, self._row = walk, group, row

    def _gate(self) -> np.float32:
        walk, group = self._walk, self._group
        if self._row not in walk.gates:
            walk.gates.update(zip(group.tolist(), walk.gate(group, self._n).copy(), strict=True))
        return walk.gates[self._row]

    def _exit(self) -> np.ndarray:
        if self._row not in self._walk.logits:
            self._walk.exit(self._group, self._n)
        return self._walk.logits[self._row]
