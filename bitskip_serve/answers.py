"""What is sent back: OpenAI's objects, whole or in pieces, of what the scheduler told."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from typing import Any

from bitskip_cpu.many.sequence import End, Likely, Said
from bitskip_serve.reading import SHOWN, Asked
from bitskip_text.tokenizer import Tokenizer

FINISHED = {"end_of_text": "stop", "stop_string": "stop"}  # all else ends by "length"


class Answer:
    """The objects of one request. Texts are numbered prompt by prompt, n of each."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex[:24]}", "created": int(time.time()),
            "model": asked.model,
        }  # fmt: skip
        self._kind = "chat.completion" if asked.chat else "text_completion"
        self._said: list[list[Said]] = [[] for _ in range(asked.texts)]
        self._ends: list[End | None] = [None] * asked.texts
        self._at = [0] * asked.texts  # characters of a text so far, its echo among them

    # ---- taken from the scheduler -------------------------------------------------------

    def take(self, index: int, event: Said | End) -> list[dict[str, Any]]:
        """Note an event of a text; the chunks that a stream sends for it."""
        if isinstance(event, End):
            self._ends[index] = event
            return [] if event.error is not None else [self._last(index, event)]
        self._said[index].append(event)
        if not self._asked.stream:
            return []
        token = event.piece.token_id is not None
        looked_at = token and (self._asked.details or self._asked.alternatives is not None)
        if not event.piece.text and not looked_at:
            return []
        chunk = self._chunk(index, self._choice(index, event.piece.text, [event]))
        if token and self._asked.details:
            chunk["bitskip"] = self._detail(event)
        return [chunk]

    @property
    def over(self) -> bool:
        """Whether all texts have ended."""
        return all(end is not None for end in self._ends)

    @property
    def error(self) -> str | None:
        """What went wrong with the first text with which anything did."""
        return next((e.error for e in self._ends if e is not None and e.error is not None), None)

    # ---- sent ---------------------------------------------------------------------------

    def first(self) -> list[dict[str, Any]]:
        """A stream's chunks before any token."""
        if not self._asked.chat and not self._asked.echo:
            return []
        chunks = []
        for i in range(len(self._said)):
            if self._asked.chat:
                choice: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}}
            else:
                choice = {"text": self._prompt(i)}
            chunks.append(self._chunk(i, {**choice, "logprobs": None}))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """A stream's last chunk, if it was asked for."""
        return {**self._chunk(0, {}), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed, once all is over."""
        choices = []
        for i, end in enumerate(self._ends):
            assert end is not None
            text = (self._prompt(i) if self._asked.echo else "") + end.generation.text
            choice = self._choice(i, text, self._said[i], end)
            if self._asked.details:
                tokens = [s for s in self._said[i] if s.piece.token_id is not None]
                choice["bitskip"] = [self._detail(s) for s in tokens]
            choices.append({"index": i, **choice, **_ended(end)})
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    # ---- parts --------------------------------------------------------------------------

    def _prompt(self, index: int) -> str:
        return self._tokenizer.decode(self._prompt_ids(index))

    def _prompt_ids(self, index: int) -> list[int]:
        """A text's prompt."""
        return self._asked.prompts[index // len(self._asked.options)]

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.chat else self._kind
        choices = [{"index": index, "finish_reason": None, **choice}]
        return {**self._head, "object": kind, "choices": choices}

    def _last(self, index: int, end: End) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self._asked.chat else {"text": ""}
        return self._chunk(index, {**said, "logprobs": None, **_ended(end)})

    def _choice(
        self, index: int, text: str, said: Iterable[Said], end: End | None = None
    ) -> dict[str, Any]:
        """The part of a choice with a text and the log probabilities of its tokens."""
        logprobs = None
        found = [s.likely for s in said if s.likely]
        if end is not None:
            found = [*end.echo, *found]
            if self._asked.echo and end.last is not None:
                found.append(end.last)  # so that lm-eval, which drops the last, drops no other
        if self._asked.alternatives is not None and (found or not self._asked.stream):
            logprobs = self._logprobs(index, found)
        if not self._asked.chat:
            return {"text": text, "logprobs": logprobs}
        name = "delta" if self._asked.stream else "message"
        role = {} if self._asked.stream else {"role": "assistant"}
        return {name: {**role, "content": text}, "logprobs": logprobs}

    def _logprobs(self, index: int, found: list[Likely]) -> dict[str, Any]:
        most = self._asked.alternatives or 0
        if self._asked.chat:
            return {"content": [
                {**self._named(x.token_id, x.logprob),
                 "top_logprobs": [self._named(*pair) for pair in x.top[:most]]} for x in found
            ]}  # fmt: skip
        tokens, values, tops, offsets = list[str](), list[Any](), list[Any](), list[int]()
        if self._asked.echo:  # nothing predicts the first
            first = self._prompt_ids(index)[0]
            tokens, values, tops, offsets = [self._text(first)], [None], [None], [0]
            self._at[index] = len(tokens[0])
        for x in found:
            tokens.append(self._text(x.token_id))
            values.append(x.logprob)
            top: dict[str, float] = {}
            for i, value in (*x.top[:most], (x.token_id, x.logprob)):
                top.setdefault(self._text(i), value)
            tops.append(top if most else None)
            offsets.append(self._at[index])
            self._at[index] += len(tokens[-1])
        return {
            "tokens": tokens, "token_logprobs": values, "top_logprobs": tops,
            "text_offset": offsets,
        }  # fmt: skip

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def _detail(self, said: Said) -> dict[str, Any]:
        """What the page shows of a token."""
        top = [] if said.likely is None else said.likely.top[:SHOWN]
        return {
            "token_id": said.piece.token_id, "exit_layer": said.piece.exit_layer,
            "seconds": said.piece.seconds, "batch": said.batch,
            "top": [[self._text(i), math.exp(value)] for i, value in top],
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        ends = [e for e in self._ends if e is not None]
        made = sum(len(e.generation.token_ids) for e in ends)
        depths = sum(sum(e.generation.exit_layers) for e in ends)
        read, n = sum(map(len, self._asked.prompts)), len(self._asked.options)
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(e.reused for e in ends[::n])},
            "completion_tokens_details": {"mean_exit_layer": depths / made if made else None},
        }  # fmt: skip


def _ended(end: End) -> dict[str, Any]:
    reason = end.generation.stop_reason
    return {"finish_reason": FINISHED.get(reason, "length"), "stop_reason": reason}
