"""One text among many: what it wants to run next, and what it says with the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from bitskip_cpu.generate import Generation, Piece, Telling, check_prompt
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_ref.config import ModelConfig
from bitskip_ref.decoding.draft import GreedyRound
from bitskip_ref.decoding.generate import Choosing, Together, Token
from bitskip_ref.decoding.lookup import Lookup
from bitskip_ref.decoding.speculate import Rounds
from bitskip_ref.engine import Engine
from bitskip_ref.exits import FixedExit
from bitskip_ref.folder import Folder
from bitskip_ref.heldout import log_probabilities
from bitskip_ref.rows import Row
from bitskip_text.tokenizer import Tokenizer

MOST_ALTERNATIVES = 20


class Loaded(Protocol):
    """What is needed of a `bitskip_cpu.model.Model`."""

    engine: Engine
    config: ModelConfig
    folder: Folder

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's."""


@dataclass(frozen=True)
class Likely:
    """Natural logarithms of a token's probability and of the likeliest ones', from raw logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # best first; the lower id among equals


@dataclass(frozen=True)
class Said:
    """A piece of a text, and what there is to know of its token."""

    piece: Piece
    likely: Likely | None = None
    batch: int = 0  # rows of the step that it came from


@dataclass(frozen=True)
class End:
    """The last that is told of a text."""

    generation: Generation
    reused: int = 0  # positions of the prompt that were held already
    echo: tuple[Likely, ...] = ()  # of the prompt's tokens from the second on
    last: Likely | None = None  # of the token by which it ended, if it did by one
    error: str | None = None  # what went wrong; None: nothing


Tell = Callable[[Said | End], None]
"""Called in the scheduler's thread; it must return at once and not raise."""


class Sequence:
    """A text that the scheduler runs."""

    def __init__(
        self, model: Loaded, ids: list[int], options: GenerationOptions, tell: Tell, *,
        alternatives: int | None = None, echo: bool = False, deadline: float | None = None,
    ) -> None:  # fmt: skip
        """ids: the prompt, with its first token. alternatives: how many likeliest tokens to tell of
        beside the chosen one (0..20; None: nothing). echo: tell of the prompt's tokens as well.
        deadline: `time.monotonic()` after which the text ends. Raises ValueError.
        """
        config, folder = model.config, model.folder
        options = options.recommended(folder)
        self.rule = options.rule(folder)
        self.depth = self.rule.deepest(config)
        how = options.speculation(self.rule, folder)
        # Drafts that are looked up change no text (SPEC 11.5), and rows of others are at hand here.
        self.speculation = None if isinstance(how, Lookup) else how
        if self.speculation is not None and (alternatives is not None or echo):
            raise ValueError(
                "log probabilities are not told of a text that is speculated: leave one out"
            )
        if alternatives is not None and not 0 <= alternatives <= MOST_ALTERNATIVES:
            raise ValueError(f"logprobs {alternatives}: must be 0..{MOST_ALTERNATIVES}")
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        context = options.positions(config)
        room = check_prompt(len(ids), 0, context)
        self.most = min(context, len(ids) + options.max_tokens)
        """Positions that it may come to."""
        self.ids, self.tell, self.deadline = ids, tell, deadline
        self.alternatives = 0 if echo and alternatives is None else alternatives
        self.contenders = options.sampler.contenders if self.alternatives is None else None
        """The logits that its next token needs (SPEC 9.6); None: all."""
        self.echo = echo
        self._told = Telling(
            model.tokenizer, ids, stop=options.stop, max_tokens=options.max_tokens, room=room,
            speculation=self.speculation,
        )  # fmt: skip
        most = min(options.max_tokens, room)
        free = config.max_position_embeddings - len(ids)
        self._engine, ends = model.engine, folder.end_ids
        self._choosing = Choosing(self._engine, options.sampler, most, free, ends, ids)
        self._sampler, self._ends, self._max_tokens = options.sampler, ends, most
        self._told.begin()
        self.cache: Any = None
        self.reused = 0
        self.cancelled = False
        self.over = False
        self.reason = ""
        """Why it is over."""
        self._next: int | None = None  # the token to be run
        self._together: Together | None = None  # of a text that may run several in a call
        self._rounds: Rounds | None = None  # of a speculated text
        self._echoed: list[Likely] = []
        self._last: Likely | None = None

    # ---- what it wants ----------------------------------------------------------------

    def start(self, cache: Any) -> None:
        """Begin, after the positions that the cache holds."""
        self.cache, self.reused = cache, cache.length
        free = self._choosing.choice is not None and self.alternatives is None
        if free and not self.rule.looks(self._engine.config):
            self._together = Together(
                self._engine, cache, self.depth, self.contenders, self._choosing
            )

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be run."""
        # A speculated text's last token is run by its first round.
        end = len(self.ids) - (self.speculation is not None)
        return max(0, end - self.cache.length) if self._next is None else 0

    def prompt_rows(self, count: int) -> list[Row]:
        """The next `count` tokens of the prompt."""
        first = self.cache.length
        last = len(self.ids) - 1
        rule = FixedExit(self.depth)
        return [
            Row(self.ids[i], self.cache, rule, self.echo or i == last)
            for i in range(first, first + count)
        ]

    def next_row(self) -> Row | None:
        """The token that was chosen last; None while there is none, or rounds run it."""
        return None if self._next is None else Row(self._next, self.cache, self.rule)

    @property
    def runs_on(self) -> bool:
        """Whether `run_on` may be asked for its next tokens."""
        return self._next is not None and self._together is not None

    def run_on(self) -> tuple[list[int], np.ndarray]:
        """Run the token chosen last, and those after it, in one call: for `take_on`."""
        assert self._next is not None and self._together is not None
        return self._together.run(self._next)

    @property
    def kept_ids(self) -> list[int]:
        """Ids of the first positions that all blocks up to `depth` ran."""
        if self.rule.looks(self._engine.config):
            return self.ids[: self.cache.length]
        return [*self.ids, *self._told.ids][: self.cache.length]

    # ---- what it is given ---------------------------------------------------------------

    def read(self, first: int, logits: list[np.ndarray | None], batch: int) -> Token | None:
        """The prompt's tokens from position `first` on were run; the text's first token."""
        for i, z in enumerate(logits, first):
            if z is None:
                continue
            if i + 1 == len(self.ids):
                return self.take(z, self.depth, batch)
            self._echoed.append(self._likely(z, self.ids[i + 1]))
        return None

    def take_on(self, ids: list[int], logits: np.ndarray) -> list[Token]:
        """What `run_on` found: the tokens that the text says with it."""
        assert self._together is not None
        said = list[Token]()
        for token in ids:
            self._choosing.took(token)
            said.append(Token(token, self.depth, len(ids) + 1))
            self._say(said[-1], None, 1)
            if self._told.stopped:
                self._together.keep(len(said) - 1)
                self.end()
                return said
        last = self.take(logits, self.depth, 1, len(ids) + 1)
        return said if last is None else [*said, last]

    def take(self, logits: np.ndarray, depth: int, batch: int, together: int = 1) -> Token | None:
        """Choose the token after logits f32 [V] that `depth` blocks gave; None: it has ended.

        together: tokens that came at once.
        """
        token = self._choosing.next(logits)
        self._next = None
        if token is None:
            end = self._choosing.end
            if self.alternatives is not None and end is not None:
                self._last = self._likely(logits, end)
            self.end()
            return None
        likely = None if self.alternatives is None else self._likely(logits, token)
        said = Token(token, depth, together)
        self._say(said, likely, batch)
        if self._choosing.over or self._told.stopped:
            self.end()
        else:
            self._next = token
        return said

    def next_round(self) -> GreedyRound | None:
        """A speculated text's next round, if it can be run with others'."""
        if self._rounds is None:
            assert self.speculation is not None
            self._rounds = Rounds(
                self._engine, self.ids[-1], self.cache, self.speculation, self._sampler,
                self._max_tokens, self.ids,
            )  # fmt: skip
        return self._rounds.next_greedy()

    def round(self, found: tuple[list[int], np.ndarray] | None, batch: int) -> list[Token]:
        """A speculated text's next tokens, of a round that is run here if it was not yet."""
        assert self._rounds is not None
        tokens, said, ended = self._rounds.run(found), list[Token](), False
        for token in tokens:
            ended = token in self._ends
            if ended or self._told.stopped:
                break
            said.append(Token(token, self.depth, len(tokens)))
            self._say(said[-1], None, batch)
        if tokens:
            self._rounds.keep(len(said) + ended)
        if not tokens or ended or self._told.stopped or len(self._told.ids) == self._max_tokens:
            self.end()
        return said

    def _say(self, token: Token, likely: Likely | None, batch: int) -> None:
        self.tell(Said(self._told.add(token), likely, batch))

    def _likely(self, logits: np.ndarray, token: int) -> Likely:
        z = log_probabilities(logits[None])[0]
        count = min(self.alternatives or 0, len(z))
        found: list[tuple[int, float]] = []
        if count:
            ids = np.flatnonzero(z >= np.partition(z, -count)[-count])
            ids = ids[np.argsort(-z[ids], kind="stable")][:count]
            found = [(int(i), float(z[i])) for i in ids]
        return Likely(token, float(z[token]), tuple(found))

    # ---- its end ------------------------------------------------------------------------

    def end(self, ended: bool = True, error: str | None = None) -> None:
        """Tell what was held back, and the end. ended: by itself; else it was broken off."""
        if self.over:
            return
        self.over, self._told.ended = True, ended
        try:
            rest = self._told.rest()
        except Exception as wrong:  # of a tokenizer that cannot decode
            rest, error = Piece(""), error or str(wrong) or type(wrong).__name__
        if rest.text:
            self.tell(Said(rest))
        generation = self._told.generation()
        if self.late and not ended:
            generation = replace(generation, stop_reason="deadline")
        self.reason = "error" if error else generation.stop_reason
        self.tell(End(generation, self.reused, tuple(self._echoed), self._last, error))

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline
