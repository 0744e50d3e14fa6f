"""Text out of a stream of tokens, as it becomes certain; and its end at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from bitskip_text.decoders import INCOMPLETE
from bitskip_text.tokenizer import Tokenizer

CONTEXT = 8  # tokens before the stream that are looked at; some decoders treat the first one apart


class StreamDecoder:
    """Decodes token by token; what it has given, joined, is the library's text of all the ids.

    Text is given when no further token can change it (`bitskip_text.decoders`): characters whose
    bytes are spread over tokens, and runs of byte tokens, are held back until they are whole. Where
    nothing can be certain earlier, `finish` gives all of it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """before: ids, of a prompt, after which the stream goes on.

        Its text is then `decode(before + ids)` without that of `before`: where a token starts with
        a space, for instance, the first one keeps it.
        """
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self._ids: list[int] = []  # since the last but one place where the text was whole
        if self._decoder.streams:
            shown = [i for i in before if tokenizer.token(i) is not None]
            while shown and not self._is_whole(shown):
                shown.pop()
            tail = shown[-CONTEXT:]
            self._ids = tail if tokenizer.decode(tail) else shown
        self._whole = len(self._ids)  # how many of them were decoded up to the last such place
        self._given = len(tokenizer.decode(self._ids))  # characters of their text, given or before

    def _is_whole(self, ids: list[int]) -> bool:
        if self._decoder.joins(self._tokenizer.token(ids[-1]) or ""):
            return False
        return not (self._decoder.utf8 and self._tokenizer.decode(ids[-8:]).endswith(INCOMPLETE))

    def feed(self, token_id: int) -> str:
        """The text that is certain now, perhaps none."""
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        self._ids.append(token_id)
        if not self._decoder.streams or self._decoder.joins(token):
            return ""
        text = certain = self._tokenizer.decode(self._ids)
        if self._decoder.utf8:
            certain = text.removesuffix(INCOMPLETE)
        if self._decoder.last_differs:  # certain is what it says both as the last one and not
            more = self._tokenizer.decode([*self._ids, token_id])
            same = (a == b for a, b in zip(text, more, strict=False))
            certain = text[: sum(takewhile(bool, same))]
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if piece and certain == text:
            self._start_anew()
        return piece

    def _start_anew(self) -> None:
        """Forget all but the last whole stretch, if that has a text of its own."""
        last = self._ids[self._whole :]
        if text := self._tokenizer.decode(last):
            self._ids, self._given = last, len(text)
        self._whole = len(self._ids)

    def finish(self) -> str:
        """What was still held back, as the library writes it at the end of a text."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._given += len(piece)
        return piece


class StopStrings:
    """Cuts a stream of text before the first of some strings."""

    def __init__(self, strings: str | Sequence[str] | None) -> None:
        """strings: one, several, or None. Raises ValueError for one that is empty, or no string."""
        strings = [strings] if isinstance(strings, str) else list(strings or ())
        for s in strings:
            if not isinstance(s, str):
                raise ValueError(f"stop string {s!r}: must be a string")
            if not s:
                raise ValueError("an empty stop string would stop before the first token")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Text that cannot belong to a stop string; `found` tells that one was complete."""
        self._held += text
        places = [at for s in self._strings if (at := self._held.find(s)) >= 0]
        if places:
            self.found = True
            piece, self._held = self._held[: min(places)], ""
            return piece
        held = len(self._held)
        keep = max(
            (
                n
                for s in self._strings
                for n in range(1, min(len(s), held + 1))  # a string may have millions
                if self._held.endswith(s[:n])
            ),
            default=0,
        )
        cut = held - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def finish(self) -> str:
        """What was held back as the possible start of a stop string."""
        piece, self._held = self._held, ""
        return piece
