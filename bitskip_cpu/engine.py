"""The engine: `bitskip_ref.engine.Engine` on compiled kernels.

Order and names are those of `bitskip_ref.model`; the arithmetic is in `kernels`, bit for bit the
same. This file only says what is to be run on which memory.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitskip_cpu.cache import KVCache
from bitskip_cpu.compiling import KERNELS
from bitskip_cpu.cores import default_threads
from bitskip_cpu.isa import INTERPRETED
from bitskip_cpu.kernels.layout import BLOCKS, CHUNK, DRAFT, EMBED, EXIT, FILL, GATE, MEASURE
from bitskip_cpu.threads import Team
from bitskip_cpu.weights import Tensors, Weights, random_tensors
from bitskip_cpu.workspace import Workspace
from bitskip_ref.cache import check_kv_cache
from bitskip_ref.checks import check_exit_layer, check_exit_layers, check_input, check_token
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.draft import Choose, Draft
from bitskip_ref.engine import ExitRule, Trace, Visit
from bitskip_ref.folder import Folder, read_folder

f32 = np.float32

SMALL = 4 << 20  # bytes of linear weights; stories-24 (2.4 MB) decodes faster with one thread


class Engine:
    """A model ready to run on this CPU. Several threads may call it; one call runs at a time.

    `weights` may be shared with other engines, of other numbers of threads. `folder` is what it was
    loaded from (tokenizer, end-of-text), None for a random model.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors | Weights,
        threads: int | None = None,
        folder: Folder | None = None,
        kv_cache: str = "float32",
    ) -> None:
        """`tensors` as in a model folder, already checked, or another engine's `weights`.

        Tensors must not change afterwards.

        `threads`: None for every physical core, or one where the weights are so few that waking a
        helper costs more than it saves. Interpreted kernels always have one. `kv_cache`: what new
        caches hold, float32 or float16 (SPEC 6.5). Raises ValueError for less than one thread or
        another word.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads}: must be at least 1")
        self.config, self.folder = config, folder
        self.kv_cache = check_kv_cache(kv_cache)
        self.weights = tensors if isinstance(tensors, Weights) else Weights(config, tensors)
        if self.weights.config != config:
            raise ValueError("the weights are another model's: take its config, too")
        usual = 1 if self.weights.linear.nbytes < SMALL else default_threads()
        self.threads = 1 if INTERPRETED else threads or usual
        self._run = KERNELS.run
        self._space = Workspace(self.weights, self.threads)
        self._lock = threading.Lock()
        self._team: Team | None = None
        if self.threads > 1:
            self._team = Team(self._run, self._space, self.threads - 1)
            weakref.finalize(self, self._team.close)

    # ---- the engine protocol --------------------------------------------------------

    def new_cache(self) -> KVCache:
        return KVCache(self.config, self.kv_cache)

    def logits(self, token_ids: Sequence[int], exit_layer: int | None = None) -> np.ndarray:
        return self.extend(token_ids, self.new_cache(), exit_layer=exit_layer)

    def extend(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        *,
        exit_layer: int | None = None,
        last_only: bool = False,
        trace: Trace | None = None,
    ) -> np.ndarray:
        n = check_exit_layer(exit_layer, self.config)
        ids = self._checked(token_ids, cache, n)
        z = np.empty((1 if last_only else len(ids), self.config.vocab_size), f32)
        with self._lock:
            record = _Record(trace)
            for start in range(0, len(ids), CHUNK):
                part = ids[start : start + CHUNK]
                self._space.set_tokens(part, cache, start)
                if not last_only:
                    self._forward(n, record, z[start : start + CHUNK])
                elif start + CHUNK < len(ids):
                    self._forward(n, record)
                else:
                    self._forward(n, record, z, len(part) - 1)
            record.replay()
            cache.advance(len(ids), n)
        return z

    def extend_exits(
        self, token_ids: Sequence[int], cache: KVCache, exit_layers: Sequence[int], visit: Visit
    ) -> None:
        exits = check_exit_layers(exit_layers, self.config)
        ids = self._checked(token_ids, cache, exits[-1])
        z = np.empty((min(len(ids), CHUNK), self.config.vocab_size), f32)
        with self._lock:
            for start in range(0, len(ids), CHUNK):
                part = ids[start : start + CHUNK]
                self._space.set_tokens(part, cache, start)
                done, actions = 0, EMBED
                for n in exits:
                    self._space.set_exit(n, z.ctypes.data)
                    self._call(actions | BLOCKS | EXIT, done, n)
                    visit(n, start, z[: len(part)])
                    done, actions = n, 0
            cache.advance(len(ids), exits[-1])

    def step(
        self, token_id: int, cache: KVCache, rule: ExitRule, trace: Trace | None = None
    ) -> tuple[np.ndarray, int]:
        looks, deepest = rule.looks(self.config), rule.deepest(self.config)
        if not looks:
            if trace is None:
                return self._one(token_id, cache, deepest), deepest
            return self.extend([token_id], cache, exit_layer=deepest, trace=trace)[0], deepest
        ids = self._checked([token_id], cache, deepest)
        with self._lock:
            record, space = _Record(trace), self._space
            space.set_tokens(ids, cache, 0)
            self._call(EMBED)
            record.add(space.embedded)
            n = 0
            for look in (*looks, deepest):
                self._blocks(n, look, record)
                n = look
                probe = CpuProbe(self, n)
                if n < deepest and rule.stops(probe):
                    break
            z = probe.logits()
            if record.wanted:
                self._call(EXIT)  # once more: the rule may have used the same memory since
                record.add(space.exit_stages, z)
                record.replay()
            self._call(FILL, n, deepest)  # SPEC 8.6
            cache.advance(1, deepest)
        return z[0], n

    def speculate(
        self,
        token_id: int,
        cache: KVCache,
        count: int,
        draft: Draft,
        *,
        exit_layer: int | None = None,
        choose: Choose | None = None,
    ) -> tuple[list[int], np.ndarray]:
        self._own(cache)
        n = draft.check_round(token_id, cache, count, exit_layer, self.config)
        with self._lock:
            space, depth = self._space, draft.exit_layer
            actions = BLOCKS | EXIT
            if choose is not None:
                self._draft_by(choose, token_id, cache, count, draft)
            else:
                space.set_tokens([token_id], cache, 0)
                space.set_draft(draft, count, draft.least_lead)
                if space.exit(depth) == space.exit(n):
                    actions |= DRAFT  # one call for all
                else:
                    space.set_exit(depth, space.logits_at)
                    self._call(DRAFT, depth)
            space.set_exit(n, space.logits_at)
            self._call(actions, depth, n)
            done = space.tokens
            cache.advance(done, n)
            return space.ids[1:done].tolist(), space.logits[:done].copy()

    def weight_bytes(self, exit_layer: int) -> int:
        """Bytes that a token run to that exit reads: its linear layers as packed here, the head."""
        weights = self.weights
        _, head = self.config.exit_names(exit_layer)
        return weights.layer_bytes * exit_layer + sum(a.nbytes for a in weights.head(head))

    # ---- its parts ------------------------------------------------------------------

    def _own(self, cache: KVCache) -> None:
        """Refuse a cache of another shape: kernels check nothing."""
        if cache.config is not self.config and cache.config != self.config:
            raise ValueError("the cache belongs to another model: take one from new_cache()")

    def _checked(self, token_ids: Sequence[int], cache: KVCache, blocks: int) -> np.ndarray:
        """The ids, once they and the cache are known to be safe."""
        self._own(cache)
        return check_input(token_ids, cache, blocks, self.config)

    def _one(self, token_id: int, cache: KVCache, n: int) -> np.ndarray:
        """Logits f32 [V] of one token after n blocks; a small model's token has no time to lose."""
        self._own(cache)
        token = check_token(token_id, cache, n, self.config)
        with self._lock:
            space = self._space
            space.set_tokens((token,), cache, 0)
            space.set_exit(n, space.logits_at)
            self._call(EMBED | BLOCKS | EXIT, 0, n)
            cache.advance(1, n)
            return space.logits[0].copy()  # cheaper than asking a new array for its address

    def _draft_by(
        self, choose: Choose, token_id: int, cache: KVCache, count: int, draft: Draft
    ) -> None:
        """SPEC 11.1 with drafts from outside; ids and hidden states are left at hand."""
        space = self._space
        hidden: list[np.ndarray] = []

        def run(token: int, _: bool) -> np.ndarray:
            space.set_tokens([token], cache, len(hidden))
            space.set_exit(draft.exit_layer, space.logits_at)
            space.set_draft(draft, 1, np.inf)  # which no draft is sure enough for
            self._call(DRAFT, draft.exit_layer)
            hidden.append(space.x[0].copy())
            return space.logits[0]

        ids = draft.ids(token_id, count, choose, run)
        space.x[: len(ids)] = hidden
        space.set_tokens(ids, cache, 0)

    def _forward(
        self, n: int, record: _Record, z: np.ndarray | None = None, first: int = 0
    ) -> None:
        """n blocks on the tokens at hand; logits of those from `first` on into z, if given."""
        if z is not None:
            self._space.set_exit(n, z.ctypes.data, first)
        if not record.wanted:
            self._call(EMBED | BLOCKS | (EXIT if z is not None else 0), 0, n)
            return
        self._call(EMBED)
        record.add(self._space.embedded)
        self._blocks(0, n, record)
        if z is not None:
            self._call(EXIT)
            record.add(self._space.exit_stages, z)

    def _blocks(self, first: int, last: int, record: _Record) -> None:
        """Blocks first..last-1 on the tokens at hand."""
        if not record.wanted:
            self._call(BLOCKS, first, last)
            return
        for i in range(first, last):
            self._call(BLOCKS, i, i + 1)
            record.add(self._space.block_stages, i)

    def _call(self, actions: int, first: int = 0, last: int = 0) -> None:
        """Run actions over blocks first..last-1."""
        if self._team:
            self._team.wake()
        self._run(*self._space.structs, actions, first, last)


class CpuProbe:
    """`bitskip_ref.engine.Probe` of the token at hand after n blocks; nothing is done twice."""

    def __init__(self, engine: Engine, n: int) -> None:
        self._engine, self._n = engine, n
        self._logits: np.ndarray | None = None

    def gate(self) -> np.float32:
        space = self._engine._space
        space.set_gate(self._n)
        self._engine._call(GATE)
        return f32(space.state["gate_probability"])

    def confidence(self, measure: str) -> np.float32:
        self.logits(MEASURE)
        return f32(self._engine._space.state[f"confidence_{measure}"])

    def logits(self, actions: int = 0) -> np.ndarray:
        """Logits at this exit, f32 [1, V]; then `actions` on them."""
        if self._logits is None:
            self._logits = np.empty((1, self._engine.config.vocab_size), f32)
            self._engine._space.set_exit(self._n, self._logits.ctypes.data)
            actions |= EXIT
        if actions:
            self._engine._call(actions)
        return self._logits


class _Record:
    """Collects stages chunk by chunk, and tells them whole and in forward order."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._stages: dict[str, list[np.ndarray]] = {}

    @property
    def wanted(self) -> bool:
        return self._trace is not None

    def add(self, stages: Callable[..., dict[str, np.ndarray]], *arguments: Any) -> None:
        if self._trace:
            for name, value in stages(*arguments).items():
                self._stages.setdefault(name, []).append(value.copy())

    def replay(self) -> None:
        if self._trace:
            for name, parts in self._stages.items():
                self._trace(name, np.concatenate(parts))


def load(
    path: str | os.PathLike[str], threads: int | None = None, kv_cache: str = "float32"
) -> Engine:
    """Load a model folder. Raises bitskip_ref.FormatError if it is not a whole one."""
    folder = read_folder(path)
    return Engine(folder.config, folder.tensors, threads, folder, kv_cache)


def random_model(config: ModelConfig, seed: int = 0, threads: int | None = None) -> Engine:
    """A model of that shape with random weights, made in memory: for benchmarks and tests."""
    return Engine(config, random_tensors(config, seed), threads)
