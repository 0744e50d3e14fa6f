"""Continuous batching: one step after the other, each with a row of every running text.

Whoever calls `step` owns the engine: a thread of its own (`run`), or a caller without a server.
What a text says depends on its own request alone (SPEC 12.2); the scheduler decides only when.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from bitskip_cpu.many.sequence import Loaded, Sequence
from bitskip_cpu.pages import NoRoom, Pool
from bitskip_ref.decoding.generate import Token
from bitskip_ref.rows import Row
from bitskip_ref.turn import MOST_SEQUENCES

MEMORY = 2 << 30  # bytes of keys and values
ROWS = 64  # of a step: running texts wait for that many at most


Asked = TypeVar("Asked")
Found = TypeVar("Found")


class Full(Exception):
    """The queue is full: try again later."""


@dataclass
class Figures:
    """What has been done so far. Read by other threads: each number alone is right."""

    steps: int = 0
    busy_s: float = 0.0
    prompt_tokens: int = 0  # that were run
    reused_tokens: int = 0  # of prompts, that were held already
    generated_tokens: int = 0
    refused: int = 0  # for a full queue
    exit_layers: Counter[int] = field(default_factory=Counter)  # of generated tokens
    batches: Counter[int] = field(default_factory=Counter)  # texts in a step
    ended: Counter[str] = field(default_factory=Counter)  # texts, by why they ended


class Scheduler:
    """Runs texts side by side on a model's engine."""

    def __init__(
        self, model: Loaded, *, parallel: int = 8, rows: int = ROWS, queue: int | None = None,
        memory: int = MEMORY,
    ) -> None:  # fmt: skip
        """parallel: texts that run at once. rows: of a step, at most; a text's next token comes
        before prompts' tokens. queue: texts that may wait (None: any number). memory: bytes of keys
        and values. Raises ValueError.
        """
        for name, value in (("parallel", parallel), ("rows", rows), ("memory", memory)):
            if value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if parallel > MOST_SEQUENCES:
            raise ValueError(f"parallel {parallel}: at most {MOST_SEQUENCES} texts run at once")
        self.model, self.parallel, self._rows, self._most = model, parallel, rows, queue
        self.pool = Pool(model.engine, memory)
        self.figures = Figures()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.failed = False
        """Whether `run` has ended by an error: no text is taken any more."""
        self._turn = 0  # whose prompt comes first

    # ---- called by anybody -----------------------------------------------------------

    def submit(self, texts: Iterable[Sequence]) -> None:
        """Take texts, all or none. Raises Full."""
        texts = list(texts)
        with self._changed:
            if self._stopping:
                raise Full("the server has failed" if self.failed else "the server is stopping")
            if self._most is not None and len(self._waiting) + len(texts) > self._most + max(
                0, self.parallel - len(self._running)
            ):
                self.figures.refused += len(texts)
                raise Full(f"{len(self._waiting)} texts are waiting: try again later")
            self._waiting.extend(texts)
            self._changed.notify()

    def cancel(self, texts: Iterable[Sequence]) -> None:
        """They run no further step."""
        for text in texts:
            text.cancelled = True
        with self._changed:
            self._changed.notify()

    @property
    def running(self) -> int:
        """Texts that run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return len(self._waiting)

    def run(self) -> None:
        """Step until `stop`, waiting while there is nothing to do.

        What ends a step by a mistake of ours ends all texts, and no more are taken; it is raised.
        """
        try:
            self._run_steps()
        except BaseException as error:
            with self._changed:
                self.failed = self._stopping = True
            for text in [*self._running, *self._waiting]:
                text.end(ended=False, error=f"a mistake of the server: {type(error).__name__}")
            raise

    def _run_steps(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._waiting or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._running or self._waiting):
                    return
            if not self.step():
                with self._changed:
                    self._changed.wait(0.01)

    def stop(self) -> None:
        """Take no more texts; `run` ends when those it has are done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    # ---- one step ---------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step. False if there was nothing to run."""
        self._drop()
        self._admit()
        running = self._running
        if not running:
            return False
        start = time.perf_counter()
        if len(running) == 1 and running[0].runs_on:
            batch = self._alone(running[0])
        else:
            batch = self._side_by_side(running)
        self._drop()
        self.figures.steps += 1
        self.figures.batches[batch] += 1
        self.figures.busy_s += time.perf_counter() - start
        return True

    def _alone(self, text: Sequence) -> int:
        """Several tokens of the only text, in one call of the engine; texts in it."""
        for ids, z in self._together(lambda _: [text.run_on()], [text], [text]) or []:
            self._note(text, lambda ids=ids, z=z: text.take_on(ids, z))  # type: ignore[misc]
        return 1

    def _side_by_side(self, running: list[Sequence]) -> int:
        """A row or a round of each text, and parts of prompts; texts in it."""
        plan, rows = list[tuple[Sequence, int, bool]](), list[Row]()
        for text in running:
            row = text.next_row()
            if row is not None:
                plan.append((text, 1, False))
                rows.append(row)
        for text, count in self._shares(max(1, self._rows - len(rows))):
            plan.append((text, count, True))
            rows += text.prompt_rows(count)
        rounds = [t for t in running if t.speculation is not None and not t.unread]
        batch = len(plan) + len(rounds)
        found = self._together(self._run, rows, [text for text, _, _ in plan])
        if found is None:
            found, plan = [], []
        at = 0
        for text, count, prompt in plan:
            part = found[at : at + count]
            at += count
            if prompt:
                self.figures.prompt_tokens += count
            self._give(text, part, prompt, batch)
        self._speculate(rounds, batch)
        return batch

    def _run(self, rows: list[Row]) -> list[tuple[np.ndarray | None, int]]:
        """What the engine finds. Of a text alone it is asked for what may be chosen (SPEC 9.6):
        for several a head in two parts takes as many multiply-adds as a whole one, and more."""
        engine, (first, *others) = self.model.engine, rows
        if others or not first.wanted:
            return engine.step_many(rows)
        (contenders,) = (t.contenders for t in self._running if t.cache is first.cache)
        return [engine.step(first.token_id, first.cache, first.rule, contenders=contenders)]

    def _together(
        self, run: Callable[[list[Asked]], list[Found]], asked: list[Asked], texts: list[Sequence]
    ) -> list[Found] | None:
        """What a call of the engine finds for some texts; None: it failed, and they have ended."""
        try:
            return run(asked) if asked else []
        except Exception as error:  # nobody's text can go on, and none of the next is concerned
            for text in texts:
                text.end(ended=False, error=f"{type(error).__name__}: {error}")
            return None

    def _speculate(self, texts: list[Sequence], batch: int) -> None:
        """A round of each: greedy ones together, the others one by one."""
        asked = {id(t): (t, round_) for t in texts if (round_ := t.next_round()) is not None}
        together = [text for text, _ in asked.values()]
        found = self._together(
            self.model.engine.speculate_many, [round_ for _, round_ in asked.values()], together
        )
        given = dict(zip(asked, found or [], strict=False))
        for text in texts:
            if not text.over:
                self._note(text, lambda text=text: text.round(given.get(id(text)), batch))  # type: ignore[misc]

    def _give(
        self, text: Sequence, found: list[tuple[np.ndarray | None, int]], prompt: bool, batch: int
    ) -> None:
        """A text's part of a step."""
        logits = [z for z, _ in found]
        if prompt:
            first = text.cache.length - len(found)
            self._note(text, lambda: _one(text.read(first, logits, batch)))
            return
        z, depth = found[0]
        assert z is not None
        self._note(text, lambda: _one(text.take(z, depth, batch)))

    def _note(self, text: Sequence, take: Callable[[], list[Token]]) -> None:
        """Let a text take what is its own; what goes wrong there ends that text alone."""
        try:
            tokens = take()
        except Exception as error:
            text.end(ended=False, error=str(error) or type(error).__name__)
            return
        for token in tokens:
            self.figures.generated_tokens += 1
            self.figures.exit_layers[token.depth] += 1

    def _drop(self) -> None:
        """Let go of texts that are over, that nobody waits for any more, or whose time is up."""
        with self._changed:
            gone = [t for t in self._waiting if t.cancelled or t.late]
            for text in gone:
                self._waiting.remove(text)
        for text in [*gone, *(t for t in self._running if t.cancelled or t.late)]:
            text.end(ended=False)
        left = []
        for text in gone:
            self.figures.ended[text.reason] += 1
        for text in self._running:
            if not text.over:
                left.append(text)
                continue
            self.figures.ended[text.reason] += 1
            self.pool.keep(text.cache, text.kept_ids)
            self.pool.close(text.cache)
        self._running = left

    def _admit(self) -> None:
        """Let waiting texts begin, in their order, while there is place for them."""
        while self._waiting and len(self._running) < self.parallel:
            text = self._waiting[0]
            try:
                ids = text.ids[:1] if text.echo else text.ids  # all of an echoed prompt is run
                cache = self.pool.open(ids, text.depth, text.most)
            except NoRoom:
                return
            except (ValueError, MemoryError) as error:
                text.end(ended=False, error=str(error) or "not enough memory")
                self.figures.ended[text.reason] += 1
                self._waiting.popleft()
                continue
            text.start(cache)
            self.figures.reused_tokens += text.reused
            with self._changed:
                self._waiting.popleft()
            self._running.append(text)

    def _shares(self, rows: int) -> Iterator[tuple[Sequence, int]]:
        """How many of their prompts' tokens the texts run that have any left: equal parts.

        What one does not need the others get; whose turn it is gets the odd row.
        """
        texts = [t for t in self._running if t.unread]
        if not texts:
            return
        self._turn += 1
        turn = self._turn % len(texts)
        texts = sorted(texts[turn:] + texts[:turn], key=lambda t: t.unread)
        for i, text in enumerate(texts):
            count = min(text.unread, -(-rows // (len(texts) - i)))
            rows -= count
            if count:
                yield text, count


def _one(token: Token | None) -> list[Token]:
    return [] if token is None else [token]
