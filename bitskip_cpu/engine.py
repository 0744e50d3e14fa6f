"""The engine on compiled kernels.

Order and names are those of `bitskip_ref.model`; the arithmetic is in `kernels`, bit for bit the
same. This file only says what is to be run on which memory; everything is checked before, by the
verbs of `bitskip_ref.engine.Engine`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from bitskip_cpu.aligned import CHECK, check_canaries
from bitskip_cpu.cache import KVCache
from bitskip_cpu.compiling import ATTEND, KERNELS, needed
from bitskip_cpu.cores import default_threads
from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels.layout import (
    BLOCKS,
    CHOOSE,
    CHUNK,
    DRAFT,
    EMBED,
    EXIT,
    FILL,
    GATE,
    LOOK,
    MEASURE,
    STEPS,
)
from bitskip_cpu.rows import run_rounds, run_rows
from bitskip_cpu.threads import Team
from bitskip_cpu.weights import Tensors, Weights, random_tensors
from bitskip_cpu.workspace import LOOKED_UP, SHARE_FROM, Workspace
from bitskip_ref import engine as contract
from bitskip_ref.checks import is_whole
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.choice import Chosen
from bitskip_ref.decoding.draft import Draft
from bitskip_ref.engine import Trace, Visit
from bitskip_ref.exits import GateExit
from bitskip_ref.folder import read_folder
from bitskip_ref.rows import Planned, PlannedRound, Run
from bitskip_ref.rule import ExitRule

f32 = np.float32

MEASURING = DRAFT | MEASURE | GATE | LOOK  # what asks the piece `measure`
SMALL = 4 << 20  # bytes of linear weights; stories-24 (2.4 MB) decodes faster with one thread


class Engine(contract.Engine):
    """A model ready to run on this CPU.

    `weights` may be shared with other engines, of other numbers of threads.
    """

    cache_type = KVCache

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors | Weights,
        threads: int | None = None,
        kv_cache: str = "float32",
        share_from: int = SHARE_FROM,
    ) -> None:
        """`tensors` as in a model folder, already checked, or another engine's `weights`.

        Tensors must not change afterwards.

        `threads`: None for every physical core, or one where the weights are so few that waking a
        helper costs more than it saves. Interpreted kernels run on one thread. `kv_cache`: what new
        caches hold, of KV_CACHES (SPEC 6.5, 6.8). `share_from`: bytes of weights from which
        threads share a stage; 0: always (for tests). Raises ValueError for less than one thread
        or another word.
        """
        super().__init__(config, kv_cache)
        if threads is not None and (not is_whole(threads) or threads < 1):
            raise ValueError(f"threads {threads}: must be a whole number, at least 1")
        KERNELS.prepare(needed(config, kv_cache))
        KERNELS.piece(ATTEND[kv_cache])  # loaded now, not while a first token is waited for
        self.weights = tensors if isinstance(tensors, Weights) else Weights(config, tensors)
        if self.weights.config != config:
            raise ValueError("the weights are another model's: take its config, too")
        usual = 1 if self.weights.linear.nbytes < SMALL else default_threads()
        self.threads = 1 if INTERPRETED else threads or usual
        self._run = KERNELS.run
        self._share_from = share_from
        self._begin()
        _ENGINES.add(self)

    def _begin(self) -> None:
        """Memory to work in, and helpers."""
        self._space = Workspace(self.weights, self.threads, self._share_from)
        self._measures = False  # whether the piece for that is there
        self._team: Team | None = None
        if self.threads > 1:
            self._team = Team(self._run, self._space, self.threads - 1)
            weakref.finalize(self, self._team.close)

    def beside(self) -> Sequence[Engine]:
        """Engines that share its threads, for several texts at once; this one where it has one.

        One per thread where weights are few, as threads gain little within one stage there.
        """
        if self.threads == 1 or self.weights.linear.nbytes >= SMALL:
            return [self]
        return [Engine(self.config, self.weights, 1, self.kv_cache) for _ in range(self.threads)]

    # ---- what takes one call of the kernels -------------------------------------------

    def _extend(self, run: Run, n: int, first: int, trace: Trace | None) -> np.ndarray:
        z = np.empty((len(run.ids) - first, self.config.vocab_size), f32)
        contenders = run.contenders if trace is None else None
        record, space = _Record(trace), self._space
        for start in range(0, len(run.ids), CHUNK):
            part = run.ids[start : start + CHUNK]
            space.set_tokens(part, run.cache, run.first + start)
            skipped = max(0, first - start)
            wanted = z[start + skipped - first :] if skipped < len(part) else None
            exit_ = 0
            if wanted is not None:
                exit_ = space.set_contenders(n, wanted.ctypes.data, skipped, contenders)
            if trace is None:
                self._call(EMBED | BLOCKS | exit_, 0, n)
                continue
            self._call(EMBED)
            record.add(space.embedded())
            for i in range(n):
                self._call(BLOCKS, i, i + 1)
                record.add(space.block_stages(i))
            if wanted is not None:
                self._call(EXIT)
                record.add(space.exit_stages(n, wanted[: len(part) - skipped]))
        record.replay()
        return z

    def _extend_exits(self, run: Run, exits: Sequence[int], visit: Visit) -> None:
        z = np.empty((min(len(run.ids), CHUNK), self.config.vocab_size), f32)
        for start in range(0, len(run.ids), CHUNK):
            part = run.ids[start : start + CHUNK]
            self._space.set_tokens(part, run.cache, run.first + start)
            done, actions = 0, EMBED
            for n in exits:
                self._space.set_exit(n, z.ctypes.data)
                self._call(actions | BLOCKS | EXIT, done, n)
                visit(n, start, z[: len(part)])
                done, actions = n, 0

    def _one(self, run: Run, n: int, trace: Trace | None) -> np.ndarray:
        if trace is not None:
            return super()._one(run, n, trace)
        space = self._space
        space.set_tokens(run.ids, run.cache, run.first)
        exit_ = space.set_contenders(n, space.logits_at, 0, run.contenders)
        self._call(EMBED | BLOCKS | exit_, 0, n)
        return space.logits[0].copy()  # cheaper than asking a new array for its address

    def _on(self, run: Run, n: int, count: int, chosen: Chosen) -> tuple[list[int], np.ndarray]:
        space = self._space
        if space.sparse is not None:  # what is looked up is given back between calls
            count = min(count, LOOKED_UP - 1)
        space.set_tokens(run.ids, run.cache, run.first)
        space.choices.set(count, chosen, self.config.vocab_size)
        exit_ = space.set_contenders(n, space.logits_at, 0, run.contenders)
        self._call(EMBED | BLOCKS | exit_ | STEPS, 0, n)
        ids = space.choices.followed
        space.looked_up(len(ids))
        return ids, space.logits[0].copy()

    def _choose(self, logits: np.ndarray, chosen: Chosen) -> int:
        how = chosen.sampler
        if how.logit_bias or (how.temperature == 0 and not len(chosen.seen)):
            return super()._choose(logits, chosen)
        # A penalty is written there, for a while.
        z = logits if logits.flags.carray else np.array(logits, order="C")
        self._space.choices.set(0, chosen, len(z))
        self._space.set_logits(z.ctypes.data)
        self._call(CHOOSE)
        token = self._space.choices.drawn
        return super()._choose(logits, chosen) if token < 0 else token  # it says why there is none

    def _look(
        self, run: Run, rule: ExitRule, looks: tuple[int, ...], deepest: int, trace: Trace | None
    ) -> tuple[np.ndarray, int]:
        if type(rule) is not GateExit or trace is not None or not self.config.gates:
            return super()._look(run, rule, looks, deepest, trace)
        space, actions = self._space, EMBED | LOOK
        space.set_tokens(run.ids, run.cache, run.first)
        if space.set_looks(looks, deepest, rule.threshold):
            exit_ = space.set_contenders(deepest, space.logits_at, 0, run.contenders)
            self._call(actions | exit_, 0, deepest)
        else:
            self._call(actions, 0, deepest)
            self._call(space.set_contenders(space.stopped, space.logits_at, 0, run.contenders))
        return space.logits[0].copy(), space.stopped

    def _many(self, rows: Sequence[Planned]) -> list[tuple[np.ndarray | None, int]]:
        return run_rows(self, rows)

    def _speculate(self, planned: PlannedRound) -> tuple[list[int], np.ndarray]:
        run, count, draft, n = planned
        space, depth = self._space, draft.exit_layer
        space.set_tokens(run.ids, run.cache, run.first)
        space.set_draft(draft, (count,), draft.least_lead)
        drafts = DRAFT
        space.set_exit(depth, space.logits_at)
        if space.exit(depth) != space.exit(n):  # else one call drafts and verifies
            self._call(DRAFT, depth)
            drafts = 0
        exit_ = space.set_contenders(n, space.logits_at, 0, run.contenders)
        self._call(drafts | BLOCKS | exit_, depth, n)
        return space.ids[1 : space.tokens].tolist(), space.logits[: space.tokens].copy()

    def _speculate_many(
        self, planned: Sequence[PlannedRound]
    ) -> list[tuple[list[int], np.ndarray]]:
        return run_rounds(self, planned)

    def _drafted(self, run: Run, draft: Draft) -> tuple[np.ndarray, np.ndarray]:
        space = self._space
        space.set_tokens(run.ids, run.cache, run.first)
        space.set_exit(draft.exit_layer, space.logits_at)
        space.set_draft(draft, (1,), np.inf)  # which no draft is sure enough for
        self._call(DRAFT, draft.exit_layer)
        return space.x[:1].copy(), space.logits[0, : draft.vocab].copy()

    # ---- primitives: hidden states are `Workspace.x`, or rows copied from it -----------

    def _embed(self, run: Run, trace: Trace | None = None) -> np.ndarray:
        space = self._space
        space.set_tokens(run.ids, run.cache, run.first)
        self._call(EMBED)
        if trace is not None:
            _tell(trace, space.embedded())
        return space.x

    def _blocks(
        self, x: np.ndarray, run: Run, first: int, last: int, trace: Trace | None = None
    ) -> np.ndarray:
        space = self._space
        if x is not space.x:
            space.set_tokens(run.ids, run.cache, run.first)
            space.x[: len(x)] = x
        if trace is None:
            self._call(BLOCKS, first, last)
            return space.x
        for i in range(first, last):
            self._call(BLOCKS, i, i + 1)
            _tell(trace, space.block_stages(i))
        return space.x

    def _fill(self, x: np.ndarray, run: Run, first: int, last: int) -> None:
        self._call(FILL, first, last)

    def _exit(
        self, x: np.ndarray, n: int, first: int = 0, trace: Trace | None = None
    ) -> np.ndarray:
        space = self._space
        z = np.empty((space.tokens - first, self.config.vocab_size), f32)
        space.set_exit(n, z.ctypes.data, first)
        self._call(EXIT)
        if trace is not None:
            _tell(trace, space.exit_stages(n, z))
        return z

    def _gate(self, x: np.ndarray, n: int) -> np.float32:
        self._space.set_gate(n)
        self._call(GATE)
        return f32(self._space.gates[0])

    def _confidence(self, z: np.ndarray, measure: str) -> np.float32:
        self._space.set_logits(z.ctypes.data)
        self._call(MEASURE)
        return f32(self._space.state[f"confidence_{measure}"])

    def _join(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(rows)

    # ---- its parts ------------------------------------------------------------------

    def weight_bytes(self, exit_layer: int) -> int:
        """Bytes that a token run to that exit reads: its linear layers as packed here, the head."""
        head = self.weights.head(self.config.exit_names(exit_layer)[1])
        return self._linear_bytes(exit_layer) + sum(a.nbytes for a in head)

    def greedy_bytes(self, exit_layer: int) -> int:
        """`weight_bytes` of a greedy token: of a head in two parts (SPEC 9.6) the first alone.

        All of it where the last such tokens found that this does not pay.
        """
        upper = self.weights.upper(self.config.exit_names(exit_layer)[1])
        if upper is None or self._space.reads_whole:
            return self.weight_bytes(exit_layer)
        return self._linear_bytes(exit_layer) + upper.tiles.nbytes + 8 * len(upper.norms)

    def _linear_bytes(self, exit_layer: int) -> int:
        own = self.weights.exit_bytes if exit_layer in self.config.exit_blocks else 0
        return self.weights.layer_bytes * exit_layer + own

    def _call(self, actions: int, first: int = 0, last: int = 0) -> None:
        """Run actions over blocks first..last-1."""
        if actions & MEASURING and not self._measures:
            self._space.measures()
            self._measures = True
        if self._team:
            self._team.wake()
        if actions & EMBED and self._space.sparse is not None:
            self._look_up()
            actions -= EMBED
        self._run(*self._space.structs, actions, first, last)
        if actions & DRAFT:
            self._space.looked_up(self._space.tokens)
        if CHECK:
            check_canaries()

    def _look_up(self) -> None:
        """Embed the tokens at hand, few at a time, from a large embedding."""
        space = self._space
        first, count = space.from_row, space.tokens
        for start in range(0, count, LOOKED_UP):
            space.window(first + start, min(LOOKED_UP, count - start))
            self._run(*space.structs, EMBED, 0, 0)
            space.looked_up(space.tokens)
        space.window(first, count)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forked() -> None:
    """In a child: a workspace that another thread was working in is not left as anybody expects."""
    for engine in list(_ENGINES):
        if engine._turn.cut_off:
            engine._begin()


if hasattr(os, "register_at_fork"):  # after `bitskip_ref.turn`'s, which finds what was cut off
    os.register_at_fork(after_in_child=_forked)


class _Record:
    """Collects stages chunk by chunk, and tells them whole and in forward order."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._stages: dict[str, list[np.ndarray]] = {}

    def add(self, stages: Mapping[str, np.ndarray]) -> None:
        for name, value in stages.items():
            self._stages.setdefault(name, []).append(value.copy())

    def replay(self) -> None:
        if self._trace:
            _tell(self._trace, {name: np.concatenate(v) for name, v in self._stages.items()})


def _tell(trace: Trace, stages: Mapping[str, np.ndarray]) -> None:
    for name, value in stages.items():
        trace(name, value)


def load(
    path: str | os.PathLike[str], threads: int | None = None, kv_cache: str = "float32"
) -> Engine:
    """Load a model folder. Raises bitskip_ref.FormatError if it is not a whole one."""
    folder = read_folder(path)
    return Engine(folder.config, folder.tensors, threads, kv_cache)


def random_model(config: ModelConfig, seed: int = 0, threads: int | None = None) -> Engine:
    """A model of that shape with random weights, made in memory: for benchmarks and tests."""
    return Engine(config, random_tensors(config, seed), threads)
