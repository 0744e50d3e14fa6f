"""Text to token ids and back, piece by piece where text is streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Library

from bitskip_ref.tensors import FormatError

INCOMPLETE = "\ufffd"  # what the decoder writes for bytes that are not, or not yet, a character
LONGEST = 3  # bytes of a UTF-8 character that may still wait for the next one


class Tokenizer:
    """A `tokenizer.json`, checked against the model that uses it."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Raises FormatError if the file is no tokenizer or has ids that the model lacks."""
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise FormatError(f"{path}: not a tokenizer ({error})") from None
        self.size = self._library.get_vocab_size(with_added_tokens=True)
        highest = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise FormatError(
                f"{path}: has token id {highest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}: this tokenizer belongs to another model"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added. Raises ValueError for lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the text is not valid Unicode (it was not UTF-8)") from None
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give none, bytes that are no character give U+FFFD."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token written out, or None."""
        return self._library.token_to_id(token)


class StreamDecoder:
    """Decodes token by token; what it has given, joined, is `decode` of all the ids.

    Characters whose bytes are spread over tokens are held back until they are whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # since the last but one place where the text was whole
        self._whole = 0  # how many of them were decoded up to the last such place
        self._given = 0  # characters of the text after `_whole` that were given out

    def feed(self, token_id: int) -> str:
        """The text that is certain now, perhaps none."""
        self._ids.append(token_id)
        text = self._new_text()
        certain = text
        for _ in range(LONGEST):
            certain = certain.removesuffix(INCOMPLETE)
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if text and certain == text:
            # One whole stretch stays in the window: some decoders treat the first token apart.
            self._ids = self._ids[self._whole :]
            self._whole, self._given = len(self._ids), 0
        return piece

    def finish(self) -> str:
        """What was still held back, as the decoder writes it."""
        piece = self._new_text()[self._given :]
        self._given += len(piece)
        return piece

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._whole])) :]


class StopStrings:
    """Cuts a stream of text before the first of some strings."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises ValueError for an empty string, which would stop at once."""
        if "" in strings:
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
        keep = max(
            (n for s in self._strings for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def finish(self) -> str:
        """What was held back as the possible start of a stop string."""
        piece, self._held = self._held, ""
        return piece
