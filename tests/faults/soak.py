"""`python -m tests.faults.soak`: many threads on one engine and one cache, copies and forks.

Every result is compared, bit for bit, with what one thread alone gets.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

os.environ.setdefault("BITSKIP_CHECK", "1")
from bitskip_cpu.aligned import check_canaries
from bitskip_cpu.engine import Engine
from bitskip_cpu.pages import NoRoom, Pool
from bitskip_ref.constants import KV_CACHES
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.exits import ConfidenceExit, FixedExit
from bitskip_ref.model import ReferenceModel
from bitskip_ref.rows import Row
from tests.faults import tested
from tests.helpers import random_tensors, random_tokens, twin

CONFIG = twin("bitskip-v1").replace(max_position_embeddings=48, gates=True)
PREFIX, TEXTS, WORD = 12, 6, 3
PAGES = 9  # of the pool: less than all callers would take at once
PATIENCE = 120  # seconds that a forked child may take
RULES: list[Any] = [FixedExit(None), FixedExit(2), ConfidenceExit(0.02)]
COPIES: list[Callable[[Any], Any]] = [
    lambda cache: cache.fork(), copy.copy, copy.deepcopy,
    lambda cache: pickle.loads(pickle.dumps(cache)),
]  # fmt: skip


def digest(*parts: np.ndarray) -> str:
    """Of the bits."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts)).hexdigest()


@dataclass
class Soak:
    """One engine and two caches that all threads use, with what they must give."""

    threads: int
    kv_cache: str = "float32"
    calls: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tensors = random_tensors(CONFIG)
        self.engine = Engine(CONFIG, tensors, self.threads, self.kv_cache, share_from=0)
        self.texts = [random_tokens(CONFIG, 8, seed) for seed in range(TEXTS)]
        reference = ReferenceModel(CONFIG, tensors, self.kv_cache)
        # A prefix that all branch from, and nobody goes on in itself.
        self.start = start = random_tokens(CONFIG, PREFIX, 99)
        theirs, self.prefix = reference.new_cache(), self.engine.new_cache()
        reference.extend(start, theirs)
        self.engine.extend(start, self.prefix)
        self.expected = {
            (i, k): self._text(reference, theirs.fork(), i, k)
            for i in range(TEXTS) for k in range(len(RULES))
        }  # fmt: skip
        # A cache that all step in at once, with one word only: what a step gives is then a
        # matter of its position alone, whoever came before.
        alone = reference.new_cache()
        self.steps = {
            digest(reference.step(WORD, alone, FixedExit(None))[0])
            for _ in range(CONFIG.max_position_embeddings)
        }
        self.shared = self.engine.new_cache()
        # Pages that texts borrow and leave the prefix in; who opens and closes takes turns.
        page = Pool(self.engine, 1 << 20).page_bytes
        self.pool, self.lending = Pool(self.engine, PAGES * page), threading.Lock()

    @staticmethod
    def _text(engine: Any, cache: Any, text: int, rule: int) -> str:
        parts = Soak._begun(engine, cache, text, rule)
        ids = random_tokens(CONFIG, 8, text)
        parts += [engine.step(i, cache, RULES[rule])[0] for i in ids[3:6]]
        return digest(*parts, *Soak._drafted(engine, cache, text, rule))

    @staticmethod
    def _begun(engine: Any, cache: Any, text: int, rule: int) -> list[np.ndarray]:
        ids = random_tokens(CONFIG, 8, text)[:3]
        return [engine.extend(ids, cache, exit_layer=RULES[rule].deepest(CONFIG))]

    @staticmethod
    def _drafted(engine: Any, cache: Any, text: int, rule: int) -> list[np.ndarray]:
        if rule != 0:
            return []
        last = random_tokens(CONFIG, 8, text)[6]
        return [np.array(engine.speculate(last, cache, 3, Draft(1))[0])]

    # ---- what a thread does ---------------------------------------------------------

    def branch(self, draw: random.Random) -> None:
        """A copy of the prefix goes on in its own way."""
        text, rule = draw.randrange(TEXTS), draw.randrange(len(RULES))
        found = self._text(self.engine, draw.choice(COPIES)(self.prefix), text, rule)
        if found != self.expected[text, rule]:
            self.faults.append(f"wrong bits: text {text}, rule {rule}")

    def many(self, draw: random.Random) -> None:
        """Some copies of the prefix go on in their own ways, a token of each in one call."""
        ways = [(draw.randrange(TEXTS), draw.randrange(len(RULES))) for _ in range(4)]
        caches = [draw.choice(COPIES)(self.prefix) for _ in ways]
        parts = [self._begun(self.engine, c, *w) for c, w in zip(caches, ways, strict=True)]
        for at in range(3, 6):
            rows = [
                Row(random_tokens(CONFIG, 8, text)[at], cache, RULES[rule])
                for cache, (text, rule) in zip(caches, ways, strict=True)
            ]
            for part, (z, _) in zip(parts, self.engine.step_many(rows), strict=True):
                part.append(z)
        for cache, way, part in zip(caches, ways, parts, strict=True):
            if digest(*part, *self._drafted(self.engine, cache, *way)) != self.expected[way]:
                self.faults.append(f"wrong bits: text {way[0]}, rule {way[1]}, among rows of many")

    def lent(self, draw: random.Random) -> None:
        """A text on pages of the pool, which may hold the prefix already."""
        text, rule = draw.randrange(TEXTS), draw.randrange(len(RULES))
        with self.lending:
            try:
                cache = self.pool.open(self.start, CONFIG.num_hidden_layers, 32)
            except NoRoom:
                return
        self.engine.extend(self.start[cache.length :], cache)
        if self._text(self.engine, cache, text, rule) != self.expected[text, rule]:
            self.faults.append(f"wrong bits: text {text}, rule {rule}, on pages of the pool")
        with self.lending:
            self.pool.keep(cache, self.start)
            self.pool.close(cache)

    def step(self, draw: random.Random) -> None:
        """A step in the cache that is everybody's; it may be full, or made shorter meanwhile."""
        try:
            z, _ = self.engine.step(WORD, self.shared, FixedExit(None))
        except ValueError as error:
            # Full, or made longer than it is by two threads that shorten it at once.
            if not any(word in str(error) for word in ("positions", "context", "exit layer 0")):
                self.faults.append(f"refused: {error}")
            self.shared.length = 0
            return
        if digest(z) not in self.steps:
            self.faults.append("wrong bits: a step in the shared cache")

    def shorten(self, draw: random.Random) -> None:
        """Forget positions while others step there."""
        self.shared.length = min(draw.randrange(8), self.shared.length)

    def fork(self, draw: random.Random) -> None:
        """A child made while other threads are in the engine goes on in it."""
        child = os.fork()
        if child == 0:
            before = len(self.faults)
            try:
                for _ in range(2):
                    self.branch(draw)
                self.step(draw)
                check_canaries()
            except BaseException:
                os._exit(2)
            os._exit(1 if self.faults[before:] else 0)
        deadline = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        if ended[1]:
            self.faults.append(f"a forked child ended with {os.waitstatus_to_exitcode(ended[1])}")

    def live(self, draw: random.Random, until: float) -> None:
        """One of these after the other."""
        acts = [self.branch] * 10 + [self.many] * 5 + [self.lent] * 5 + [self.step] * 30
        acts += [self.shorten] * 3
        acts.append(self.fork)
        try:
            while time.monotonic() < until and not self.faults:
                draw.choice(acts)(draw)
                self.calls += 1
        except BaseException as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def run(self, callers: int, seconds: float, seed: int) -> None:
        """So many threads for so long."""
        until = time.monotonic() + seconds
        team = [
            threading.Thread(target=self.live, args=(random.Random(f"{seed} {i}"), until))
            for i in range(callers)
        ]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        check_canaries()


def soak(seconds: float, seed: int, part: float = 15.0) -> tuple[int, list[str]]:
    """Parts of some seconds, each on a new engine, with 2 to 16 callers: (calls, faults)."""
    draw, calls = random.Random(seed), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        part_of = Soak(draw.choice([1, 2, 3, 4]), draw.choice(KV_CACHES))
        left = min(part, until - time.monotonic())
        part_of.run(draw.randrange(2, 17), max(left, 0.5), draw.randrange(1 << 30))
        calls += part_of.calls
        if part_of.faults:
            return calls, part_of.faults
    return calls, []


@click.command()
@click.option("--minutes", type=float, default=0.05, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--record", type=click.Path(path_type=Path), help="Add what was run to this file.")
def main(minutes: float, seed: int, record: Path | None) -> None:
    """Exit code 1 if a bit differed, a canary died, a child hung, or anything else went wrong."""
    calls, faults = soak(60 * minutes, seed)
    for fault in faults:
        click.echo(fault)
    click.echo(f"seed {seed}: {calls} calls in {minutes:g} minutes, {len(faults)} faults")
    if record is not None:
        tested.record(record, {
            "what": "calls of 2 to 16 threads on one engine and cache",
            "command": f"tests.faults.soak --minutes {minutes:g}", "seed": seed,
            "commit": tested.commit(), "cases": calls, "seconds": round(60 * minutes),
            "faults": len(faults),
        })  # fmt: skip
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
