"""What every engine offers, so that any can be checked against any other.

An engine runs rows (SPEC 12). It brings primitives: `_embed`, `_blocks`, `_fill`, `_exit`, `_gate`,
`_confidence`. The verbs that everybody calls are written here, once over them, with every check:
`extend`, `extend_exits`, `step`, `step_on`, `choose`, `step_many`, `speculate`, `speculate_many`,
`round`, `logits`. An engine overrides only what it does in one go (`_extend`, `_extend_exits`,
`_one`, `_on`, `_choose`, `_look`, `_many`, `_speculate`, `_speculate_many`), and `beside`.

The NumPy reference, PyTorch, Numba and ONNX Runtime each have one class of this kind. Stages are
reported to a trace in forward order, under the same names, so that a difference can be located.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from bitskip_ref.cache import CacheFill, check_kv_cache
from bitskip_ref.checks import (
    check_exit_layer,
    check_exit_layers,
    check_input,
    check_room,
    check_token,
)
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.choice import Choice, Chosen, check_choice, check_choosing
from bitskip_ref.decoding.contenders import Contenders, check_contenders
from bitskip_ref.decoding.draft import MOST, Draft, GreedyRound
from bitskip_ref.decoding.round import Round
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.probe import Asked
from bitskip_ref.rows import Planned, PlannedRound, Row, Run, asks, plan, plan_round
from bitskip_ref.rule import ExitRule
from bitskip_ref.turn import Turn, in_turn, in_turns

Trace = Callable[[str, np.ndarray], None]
"""Receives (stage, values). Stages, i counting blocks from 0:

embed [T, D]; layers.{i}.q [T, H, E] and .k [T, K, E] (after RoPE), .v [T, K, E],
.attn [T, H * E] (SPEC 6.3, before any sub-norm), .mid [T, D] (after the attention sublayer),
.act [T, F] (FFN activation, before any sub-norm), .out [T, D]; of an exit's own block
exits.{n}.block.act and .out, as those (SPEC 8.8); exit_norm [T, D]; logits [T, V].
Arrays may be reused by the engine after the call: copy what is kept.
"""

Visit = Callable[[int, int, np.ndarray], None]
"""Receives (exit layer, first, logits f32 [t, V]) of the tokens at hand from the one numbered
`first` on. Arrays may be reused by the engine after the call."""


class Engine(ABC):
    """A loaded model. Token ids are integers in 0..V-1.

    Several threads may call it; one call runs at a time. Whatever a call is given is checked in its
    turn, and so is what callbacks leave behind. A callback (trace, visit, exit rule) may not call
    the engine (RuntimeError), nor set the length of a cache in use (ValueError).
    """

    config: ModelConfig
    kv_cache: str
    """What new caches hold, one of KV_CACHES (SPEC 6.5, 6.8)."""
    threads: int = 1
    """How many compute; 0: as many as the library takes."""
    cache_type: type[CacheFill]

    def __init__(self, config: ModelConfig, kv_cache: str = "float32") -> None:
        """Raises ValueError for another kind of cache."""
        self.config, self.kv_cache = config, check_kv_cache(kv_cache, config)
        self._turn = Turn()

    def beside(self) -> Sequence[Engine]:
        """Engines of the same model that share this one's threads, for several texts at once.

        This one alone where others would not be faster.
        """
        return [self]

    # ---- verbs ----------------------------------------------------------------------

    def new_cache(self) -> Any:
        """An empty KV cache, a CacheFill, for `config.max_position_embeddings` positions."""
        return self.cache_type(self.config, self.kv_cache)

    def logits(self, token_ids: Sequence[int], exit_layer: int | None = None) -> np.ndarray:
        """`extend` on an empty cache: f32 [T, V]."""
        return self.extend(token_ids, self.new_cache(), exit_layer=exit_layer)

    @in_turn
    def extend(
        self,
        token_ids: Sequence[int],
        cache: Any,
        *,
        exit_layer: int | None = None,
        last_only: bool = False,
        trace: Trace | None = None,
        contenders: Contenders | None = None,
    ) -> np.ndarray:
        """Run the tokens after what the cache holds; advance the cache.

        `exit_layer` 1..L counts executed blocks (None: L). Returns logits f32 [T, V], or [1, V]
        of the last token with `last_only`. With `contenders` those that cannot be chosen may be
        -inf (SPEC 9.6). Raises ValueError for an empty list, an id or exit out of range, more
        positions than the context, or blocks that lack earlier positions.
        """
        n = check_exit_layer(exit_layer, self.config)
        first = cache.require(n)
        ids = check_input(token_ids, first, self.config, cache.room)
        run = Run(ids, cache, first, check_contenders(contenders))
        z = self._extend(run, n, len(run.ids) - 1 if last_only else 0, trace)
        cache.advance(first, len(run.ids), n)
        return z

    @in_turn
    def extend_exits(
        self, token_ids: Sequence[int], cache: Any, exit_layers: Sequence[int], visit: Visit
    ) -> None:
        """`extend` to the deepest of some exits, with the logits at each of them on the way.

        Each exit's logits come in pieces, in the order of the tokens. Raises ValueError as
        `extend`, and for no exits.
        """
        exits = check_exit_layers(exit_layers, self.config)
        first = cache.require(exits[-1])
        run = Run(check_input(token_ids, first, self.config, cache.room), cache, first)
        self._extend_exits(run, exits, visit)
        cache.advance(first, len(run.ids), exits[-1])

    @in_turn
    def step(
        self,
        token_id: int,
        cache: Any,
        rule: ExitRule,
        trace: Trace | None = None,
        contenders: Contenders | None = None,
    ) -> tuple[np.ndarray, int]:
        """Run one token under a rule (SPEC 8.2, 8.3, 8.6). Returns (logits f32 [V], depth).

        With `contenders` logits that cannot be chosen may be -inf (SPEC 9.6). Raises ValueError as
        `extend`, and for a rule whose looks do not rise below its last block.
        """
        looks, deepest = asks(rule, self.config)
        first, n = cache.require(deepest), deepest
        token = check_token(token_id, first, self.config, cache.room)
        run = Run((token,), cache, first, check_contenders(contenders))
        if looks:
            z, n = self._look(run, rule, looks, deepest, trace)
        else:
            z = self._one(run, n, trace)
        cache.advance(first, 1, deepest)
        return z, n

    @in_turn
    def step_on(
        self,
        token_id: int,
        cache: Any,
        count: int,
        choice: Choice,
        *,
        exit_layer: int | None = None,
        contenders: Contenders | None = None,
    ) -> tuple[list[int], np.ndarray]:
        """Run a token, then at most `count` that SPEC 9 chooses from the logits before each.

        Returns those that were chosen and run, and the logits f32 [V] after the last of them, or
        after the token. There are fewer where what follows ends the text or cannot be chosen
        (SPEC 9.5), or where the engine takes fewer in one call. All run to `exit_layer` (None: L).
        `contenders`: those of the sampler, or None for all logits. Raises ValueError as `extend`,
        for others, and for a count that is not 0..32.
        """
        n = check_exit_layer(exit_layer, self.config)
        chosen = check_choice(choice, count, self.config, check_contenders(contenders))
        first = cache.require(n)
        token = check_token(token_id, first, self.config, cache.room)
        check_room(first, 1 + count, cache.room)
        run = Run((token,), cache, first, contenders)
        ids, z = self._on(run, n, count, chosen)
        cache.advance(first, 1 + len(ids), n)
        return ids, z

    def choose(
        self, logits: np.ndarray, sampler: Sampler, seen: Collection[int], index: int
    ) -> int:
        """`Sampler.choose`, as this engine does it, from logits f32 [V], or [V'] of a draft's.

        Raises ValueError as that does, and for arguments of another kind.
        """
        chosen = check_choosing(logits, sampler, seen, index, self.config)
        return in_turns(self, (), lambda: self._choose(logits, chosen))

    def step_many(self, rows: Sequence[Row]) -> list[tuple[np.ndarray | None, int]]:
        """Run rows of any sequences, in one call: `step` for each, in their order (SPEC 12.2).

        Rows of one sequence take its next positions one after the other. Returns for each row
        (logits f32 [V], depth), with None for logits that are not `wanted`. Raises as `step` does,
        and for more than MOST_SEQUENCES caches; no sequence has then advanced.
        """
        rows = [Row(*row) for row in rows]
        caches = self._owned(rows)

        def run() -> list[tuple[np.ndarray | None, int]]:
            planned = plan(rows, self.config)
            found = self._many(planned)
            for row in {id(p.run.cache): p for p in reversed(planned)}.values():
                row.run.cache.unchanged(row.run.first)
            for row in planned:
                row.run.cache.advance(row.run.first, 1, row.deepest)
            return found

        return in_turns(self, caches, run)

    @in_turn
    def speculate(
        self,
        token_id: int,
        cache: Any,
        count: int,
        draft: Draft,
        *,
        exit_layer: int | None = None,
        contenders: Contenders | None = None,
    ) -> tuple[list[int], np.ndarray]:
        """Run a round of at most `count` greedy drafts after one token; advance the cache by k + 1.

        Returns the k drafts that were run and verified at `exit_layer` (None: L), and the logits
        f32 [k + 1, V] after the token and after each of them (SPEC 11.1, 11.2), with `contenders`
        -inf in place of those that cannot be chosen (SPEC 9.6). Raises ValueError as `extend` does,
        and for what cannot draft.
        """
        asked = GreedyRound(token_id, cache, count, draft, exit_layer)
        planned = plan_round(asked, self.config, contenders)
        drafts, z = self._speculate(planned)
        cache.advance(planned.run.first, len(z), planned.depth)
        return drafts, z

    def speculate_many(self, rounds: Sequence[GreedyRound]) -> list[tuple[list[int], np.ndarray]]:
        """Run rounds of several sequences, in one call: `speculate` for each (SPEC 12.2).

        Returns for each round what `speculate` does, with all logits. Raises as it does, and for
        two rounds of one sequence or more than MOST_SEQUENCES; no sequence has then advanced.
        """
        rounds = [GreedyRound(*round_) for round_ in rounds]
        caches = self._owned(rounds)
        if len(caches) < len(rounds):
            raise ValueError(
                f"{len(rounds)} rounds of {len(caches)} sequences: a round begins where the one "
                "before has ended, so give each sequence one, and call again"
            )

        def run() -> list[tuple[list[int], np.ndarray]]:
            planned = [plan_round(round_, self.config) for round_ in rounds]
            found = self._speculate_many(planned)
            for at in planned:
                at.run.cache.unchanged(at.run.first)
            for at, (_, z) in zip(planned, found, strict=True):
                at.run.cache.advance(at.run.first, len(z), at.depth)
            return found

        return in_turns(self, caches, run)

    @in_turn
    def _draft_next(self, token_id: int, cache: Any, under_way: Round) -> np.ndarray:
        """`Round.draft`."""
        under_way.go_on()
        position = under_way.first + len(under_way.ids)
        token = check_token(token_id, position, self.config, cache.room)
        if len(under_way.ids) > MOST:
            raise ValueError(f"a round takes a token and 0..{MOST} drafts: verify it")
        x, z = self._drafted(Run((token,), cache, position), under_way.how)
        under_way.ids.append(token)
        under_way.hidden.append(x)
        return z

    @in_turn
    def _verify(self, ids: list[int], cache: Any, under_way: Round) -> np.ndarray:
        """`Round.verify`."""
        under_way.go_on()
        if not ids:
            raise ValueError("nothing to verify: draft the token at hand first")
        n, run = under_way.depth, Run(ids, cache, under_way.first)
        z = self._verified(run, under_way.hidden, under_way.how, n)
        cache.advance(run.first, len(ids), n)
        return z

    def round(self, cache: Any, draft: Draft, exit_layer: int | None = None) -> Round:
        """A round of speculation whose drafts the caller chooses (SPEC 11.1, 11.3)."""
        return Round(self, cache, draft, exit_layer)

    # ---- primitives: called in the engine's turn, with all that is given checked ------

    @abstractmethod
    def _embed(self, run: Run, trace: Trace | None = None) -> Any:
        """Rows -> hidden states x of T rows, of the engine's own kind (SPEC 4.4, 7.4)."""

    @abstractmethod
    def _blocks(self, x: Any, run: Run, first: int, last: int, trace: Trace | None = None) -> Any:
        """Blocks first..last-1 (from 0) on the rows, which leave keys and values (SPEC 7)."""

    @abstractmethod
    def _fill(self, x: Any, run: Run, first: int, last: int) -> None:
        """Keys and values of skipped blocks first..last-1 (SPEC 8.6)."""

    @abstractmethod
    def _exit(self, x: Any, n: int, first: int = 0, trace: Trace | None = None) -> np.ndarray:
        """Logits f32 [T - first, V] after n blocks, of the rows from `first` on (SPEC 8.1)."""

    @abstractmethod
    def _gate(self, x: Any, n: int) -> np.float32:
        """Exit probability of one row after block n = 1..L (SPEC 8.4)."""

    @abstractmethod
    def _confidence(self, z: np.ndarray, measure: str) -> np.float32:
        """A measure of logits f32 [V] that `_exit` gave (SPEC 8.5)."""

    @abstractmethod
    def _join(self, rows: Sequence[Any]) -> Any:
        """Hidden states of T rows from those of each, as `_drafted` gave them."""

    # ---- what an engine may do in one go ----------------------------------------------

    def _extend(self, run: Run, n: int, first: int, trace: Trace | None) -> np.ndarray:
        """Logits f32 [T - first, V] of the rows from `first` on, after n blocks."""
        x = self._blocks(self._embed(run, trace), run, 0, n, trace)
        return self._exit(x, n, first, trace)

    def _extend_exits(self, run: Run, exits: Sequence[int], visit: Visit) -> None:
        """Blocks up to the last of rising exits, and `visit` at each."""
        x, done = self._embed(run), 0
        for n in exits:
            x = self._blocks(x, run, done, n)
            visit(n, 0, self._exit(x, n))
            done = n

    def _one(self, run: Run, n: int, trace: Trace | None) -> np.ndarray:
        """Logits f32 [V] of one row after n blocks."""
        return self._extend(run, n, 0, trace)[0]

    def _choose(self, logits: np.ndarray, chosen: Chosen) -> int:
        """The token for logits f32 [V], or [V'] of a draft's (SPEC 11.1)."""
        return chosen.sampler.choose(logits, chosen.seen.tolist(), chosen.made)

    def _on(self, run: Run, n: int, count: int, chosen: Chosen) -> tuple[list[int], np.ndarray]:
        """One row after n blocks and at most `count` chosen ones after it: ids, logits f32 [V]."""
        ids, z = list[int](), self._one(run, n, None)
        while len(ids) < count and (token := chosen.next(z, ids)) is not None:
            ids.append(token)
            z = self._one(run._replace(ids=(token,), first=run.first + len(ids)), n, None)
        return ids, z

    def _look(
        self, run: Run, rule: ExitRule, looks: tuple[int, ...], deepest: int, trace: Trace | None
    ) -> tuple[np.ndarray, int]:
        """One row under a rule that decides on the way (SPEC 8.3): logits f32 [V], depth."""
        x, n = self._embed(run, trace), 0
        for look in (*looks, deepest):
            x = self._blocks(x, run, n, look, trace)
            n = look
            asked = Asked(self, x, n)
            if n < deepest and asked.whether(rule):
                break
        z = asked.logits() if trace is None else self._exit(x, n, 0, trace)[0]
        self._fill(x, run, n, deepest)
        return z, n

    def _many(self, rows: Sequence[Planned]) -> list[tuple[np.ndarray | None, int]]:
        """Rows of any sequences; those of one follow each other."""
        found: list[tuple[np.ndarray | None, int]] = []
        for run, rule, looks, n, wanted in rows:
            if looks:
                z, n = self._look(run, rule, looks, n, None)
            else:
                z = self._one(run, n, None)
            found.append((z if wanted else None, n))
        return found

    def _speculate(self, planned: PlannedRound) -> tuple[list[int], np.ndarray]:
        """Greedy drafts after one row, and the logits of all at the depth that verifies."""
        run, count, draft, n = planned
        ids, hidden = list(run.ids), list[Any]()
        while True:
            x, z = self._drafted(run._replace(ids=ids[-1:], first=run.first + len(hidden)), draft)
            hidden.append(x)
            drafted = draft.greedy(z) if len(ids) <= count else None
            if drafted is None:
                return ids[1:], self._verified(run._replace(ids=ids), hidden, draft, n)
            ids.append(drafted)

    def _speculate_many(
        self, planned: Sequence[PlannedRound]
    ) -> list[tuple[list[int], np.ndarray]]:
        """Rounds of different sequences."""
        return [self._speculate(round_) for round_ in planned]

    def _drafted(self, run: Run, draft: Draft) -> tuple[Any, np.ndarray]:
        """One row up to the draft exit: its hidden state, to be kept; draft logits f32 [V']."""
        x = self._blocks(self._embed(run), run, 0, draft.exit_layer)
        return x, self._exit(x, draft.exit_layer)[0][: draft.vocab]

    def _verified(self, run: Run, hidden: Sequence[Any], draft: Draft, n: int) -> np.ndarray:
        """Logits f32 [T, V] at depth n of rows that were run to the draft exit."""
        return self._exit(self._blocks(self._join(hidden), run, draft.exit_layer, n), n)

    # ---- checks ---------------------------------------------------------------------

    def _owned(self, asked: Sequence[Row] | Sequence[GreedyRound]) -> list[Any]:
        """Their caches, each once. Raises ValueError for another engine's."""
        caches = list({id(a.cache): a.cache for a in asked}.values())
        for cache in caches:
            self._own(cache)
        return caches

    def _own(self, cache: Any) -> None:
        """Refuse what is not a cache of this engine's and this model's: kernels check nothing."""
        if not isinstance(cache, self.cache_type):
            raise ValueError(
                f"a cache of type {type(cache).__name__} is not this engine's: take one from "
                "new_cache()"
            )
        if cache.config is not self.config and cache.config != self.config:
            raise ValueError("the cache belongs to another model: take one from new_cache()")
