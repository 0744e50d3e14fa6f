"""Generation of text over any engine: options, streaming and what was measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bitskip_ref.decoding.generate import EndIds, Token
from bitskip_ref.decoding.generate import stream as stream_tokens
from bitskip_ref.decoding.lookup import Lookup
from bitskip_ref.decoding.lookup import stream as stream_looked_up
from bitskip_ref.decoding.sampling import Sampler
from bitskip_ref.decoding.speculate import Speculation
from bitskip_ref.decoding.speculate import stream as stream_speculated
from bitskip_ref.engine import Engine
from bitskip_ref.rule import ExitRule
from bitskip_text.streaming import StopStrings, StreamDecoder
from bitskip_text.tokenizer import Tokenizer

StopReason = Literal[
    "end_of_text", "stop_string", "max_tokens", "context", "interrupted", "deadline"
]


@dataclass(frozen=True)
class Piece:
    """One step of a stream: a token, and the text that became certain with it (perhaps none).

    The last piece may be text that was held back, without a token.
    """

    text: str
    token_id: int | None = None
    exit_layer: int | None = None  # blocks of the pass whose logits chose the token (SPEC 8.7)
    seconds: float | None = None  # that were waited for it; of those that came at once, a share


@dataclass(frozen=True)
class Generation:
    """A generated text and how it came about. Times are in seconds."""

    text: str  # what follows the prompt's, without the stop string
    token_ids: list[int]  # all that were generated, those of a stop string too
    exit_layers: list[int]  # one per token
    prompt_tokens: int
    stop_reason: StopReason
    ttft_s: float | None  # from the start of the prompt to the first token
    decode_s: float  # from the first token to the last
    speculation: Speculation | Lookup | None = None  # with its statistics

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens over the time to the first token."""
        return self.prompt_tokens / self.ttft_s if self.ttft_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first over the time they took; None for fewer than two tokens."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s else None

    @property
    def mean_exit_layer(self) -> float | None:
        """Mean number of blocks over the generated tokens."""
        return sum(self.exit_layers) / len(self.exit_layers) if self.exit_layers else None


class Telling:
    """A text while its tokens come in, from whatever runs them: pieces, times, why it ended."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, stop: str | Sequence[str] | None,
        max_tokens: int, room: int, speculation: Speculation | Lookup | None = None,
    ) -> None:  # fmt: skip
        """room: tokens that the context has place for. Raises ValueError for a wrong `stop`."""
        self._decoder = StreamDecoder(tokenizer, before=prompt_ids)
        self._stop = StopStrings(stop)
        self._prompt_tokens, self._max_tokens, self._room = len(prompt_ids), max_tokens, room
        self._speculation = speculation
        self._text: list[str] = []
        self.ids: list[int] = []
        self._depths: list[int] = []
        self._started: float | None = None
        self._asked = 0.0  # since when a token is waited for
        self._coming, self._each = 0, 0.0  # tokens that came with the last one; seconds of each
        self._times: list[float] = []  # of the first and the latest token
        self.ended = False
        """Whether no token follows any more."""

    def begin(self) -> None:
        """Time runs from now on."""
        self._started = self._asked = time.perf_counter()

    def wait(self) -> None:
        """The next token is waited for from now on, not since the last."""
        self._asked = time.perf_counter()

    def add(self, token: Token) -> Piece:
        """Take a token."""
        now = time.perf_counter()
        self._times = [*self._times[:1], now]
        self.ids.append(token.id)
        self._depths.append(token.depth)
        text = self._stop.feed(self._decoder.feed(token.id))
        self._text.append(text)
        if not self._coming:
            self._coming, self._each = token.together, (now - self._asked) / token.together
        self._coming, self._asked = self._coming - 1, now
        return Piece(text, token.id, token.depth, self._each)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def rest(self) -> Piece:
        """The text still held back, which counts as said from now on."""
        if self._stop.found:
            return Piece("")
        rest = self._stop.feed(self._decoder.finish())
        if not self._stop.found:
            rest += self._stop.finish()
        self._text.append(rest)
        return Piece(rest)

    def generation(self) -> Generation:
        """What there is so far; `interrupted` is the reason if it has not ended."""
        return Generation(
            text="".join(self._text),
            token_ids=list(self.ids),
            exit_layers=list(self._depths),
            prompt_tokens=self._prompt_tokens,
            stop_reason=self._reason(),
            ttft_s=self._times[0] - self._started if self._times and self._started else None,
            decode_s=self._times[-1] - self._times[0] if self._times else 0.0,
            speculation=self._speculation,
        )

    def _reason(self) -> StopReason:
        if self._stop.found:
            return "stop_string"
        if not self.ended:
            return "interrupted"
        if len(self.ids) == self._max_tokens:
            return "max_tokens"
        return "context" if len(self.ids) == self._room else "end_of_text"


def check_prompt(prompt_tokens: int, held: int, context: int) -> int:
    """Tokens that may follow a prompt behind `held` positions: the last one needs no position.

    Raises ValueError for a prompt that does not fit.
    """
    if held + prompt_tokens > context:
        before = f" after {held} that the cache holds" if held else ""
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens{before}, the context holds {context}: "
            "shorten it"
        )
    return context - held - prompt_tokens + 1


class TextStream:
    """Iterate once for `Piece`s as they come; `generation()` tells what there is so far."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        rule: ExitRule,
        sampler: Sampler,
        max_tokens: int,
        stop: str | Sequence[str] | None = (),
        context: int | None = None,
        eos_token_id: EndIds = None,
        speculation: Speculation | Lookup | None = None,
        cache: Any = None,
    ) -> None:
        """context: positions that may be used (None: all the model has).

        speculation: how to draft and verify (SPEC 11); it was made for `rule`, and for this text.
        cache: goes on after what it holds (None: a new one); see `finish`.
        Raises ValueError for a prompt that does not fit and for options out of range.
        """
        context = engine.config.max_position_embeddings if context is None else context
        held = 0 if cache is None else cache.length
        room = check_prompt(len(prompt_ids), held, context)
        self.rule = rule
        self._engine, self._cache, self._read = engine, cache, [*prompt_ids]
        self._held, self._context = held, context
        self._told = Telling(
            tokenizer, prompt_ids, stop=stop, max_tokens=max_tokens, room=room,
            speculation=speculation,
        )  # fmt: skip
        most = min(max_tokens, room)
        beside = sampler, most, eos_token_id
        if speculation is None:
            self._tokens = stream_tokens(engine, prompt_ids, rule, *beside, cache=cache)
        elif isinstance(speculation, Lookup):
            self._tokens = stream_looked_up(engine, prompt_ids, speculation, *beside, cache=cache)
        else:
            self._tokens = stream_speculated(engine, prompt_ids, speculation, *beside, cache=cache)

    def __iter__(self) -> Iterator[Piece]:
        told = self._told
        told.begin()
        for token in self._tokens:
            yield told.add(token)
            told.wait()  # what is done with a piece is not its token's time
            if told.stopped:
                break
        told.ended = True
        rest = self.finish()
        if rest.text:
            yield rest

    def finish(self) -> Piece:
        """The text still held back, which counts as said from now on.

        Iteration does this at its end; whoever breaks it off calls this. A cache that was given
        then holds all tokens of prompt and text, those of a stop string, too, as far as the context
        goes: the next text goes on from there.
        """
        self._catch_up()
        return self._told.rest()

    def _catch_up(self) -> None:
        """Run the tokens that nothing was predicted from yet: the last one, mostly."""
        told = self._told
        if self._cache is None or not (told.ended or told.ids):
            return
        self._tokens.close()
        tokens = [*self._read, *told.ids][: self._context - self._held]
        # Ctrl-C in the middle of a call may have left there what nobody was told.
        self._cache.length = min(self._cache.length, self._held + len(tokens))
        behind = tokens[self._cache.length - self._held :]
        if behind:
            depth = self.rule.deepest(self._engine.config)
            self._engine.extend(behind, self._cache, exit_layer=depth, last_only=True)

    def generation(self) -> Generation:
        """What was generated so far; `interrupted` is the reason if iteration has not ended."""
        return self._told.generation()
