"""A `tokenizer.json` as training, export and the runtime use it: ids of a text, text of ids.

What is stored in the file beside the vocabulary and would make the ids something else than the
text is off: truncation, padding, and dropout of merges. A text that spells a special token is text.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from bitskip_ref.documents import decode_utf8
from bitskip_ref.excerpt import one_line
from bitskip_ref.tensors import FormatError
from bitskip_text.decoders import Decoder, decoder_of

LARGEST = 1 << 24  # ids, as of a ModelConfig
REGEX = '"Regex"'  # in a part that has regular expressions of its own
EARLY = re.compile(r'"normalized"\s*:\s*true')  # such a token is normalized when it is read
GROWTH = {"ByteLevel": 4, "Precompiled": 18}  # characters that a step may make of one, at most
MOST_GROWTH = 1 << 14  # of all steps; those of known tokenizers come to some hundred
RUNS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of equal characters, to try these on
PATIENCE = 1.0  # seconds that a run may take; a common expression takes less than a thousandth
RANDOM = ("dropout", "alpha", "nbest_size")  # settings of a model that make ids a matter of chance


_PRINTING = threading.Lock()  # of two that turn standard error away one would not turn it back


class TokenizerError(FormatError):
    """A tokenizer that cannot be used, or a text that it cannot encode."""


def read_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    vocab_size: of the model that it belongs to. Raises TokenizerError for a file that is none, or
    whose ids the model lacks; OSError if it cannot be read.
    """
    try:
        text = decode_utf8(path.read_bytes(), str(path))
    except ValueError as error:
        raise TokenizerError(str(error)) from None
    return parse_tokenizer(text, str(path), vocab_size)


def parse_tokenizer(text: str, source: str, vocab_size: int | None = None) -> Tokenizer:
    """`read_tokenizer` of a text at hand; `source` names it in errors."""
    with _errors_of_the_library(f"{source}: not a tokenizer.json"), _panics_unprinted():
        if "\\u00" in text or EARLY.search(text):
            stored = json.loads(text)
            _check_growth([stored.get(n) for n in ("normalizer", "pre_tokenizer")], source)
        library = Library.from_str(text)
        steps = (library.normalizer, library.pre_tokenizer, library.decoder)
        states = [step.__getstate__().decode() for step in steps if step is not None]
        _check_growth(map(json.loads, states), source)
        if any(REGEX in state for state in states):
            _probe(library, source)
    return Tokenizer(library, source, vocab_size, text)


class Tokenizer:
    """Ids of a text and text of ids. Several threads may call it."""

    def __init__(
        self, library: Library, source: str, vocab_size: int | None = None, text: str | None = None
    ) -> None:
        """library: becomes this object's own. source, vocab_size: as of `parse_tokenizer`.

        text: what `library` was made from. Raises TokenizerError for ids from `vocab_size` up, and
        for a decoder that the library cannot run.
        """
        model = library.model
        random = [name for name in RANDOM if getattr(model, name, None) is not None]
        for name in random:
            setattr(model, name, None)
        if random or library.truncation is not None or library.padding is not None:
            text = None
        library.no_truncation()
        library.no_padding()
        self._library, self._source, self._text = library, source, text
        self._lock = threading.Lock()  # whether special tokens are text is a state of the library
        added = library.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in added.items() if token.special}
        self.size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the highest id."""
        if self.size > LARGEST:  # the library lists every id below it, when it writes a file
            raise TokenizerError(
                f"{source}: has token id {self.size - 1}; the largest vocabulary has {LARGEST} ids"
            )
        if vocab_size is not None and self.size > vocab_size:
            raise TokenizerError(
                f"{source}: has token id {self.size - 1}, but the model's vocabulary ends at "
                f"{vocab_size - 1}: this tokenizer belongs to another model"
            )
        stored = None if library.decoder is None else json.loads(library.decoder.__getstate__())
        try:
            self.decoder: Decoder = decoder_of(stored)
        except ValueError as error:
            raise TokenizerError(f"{source}: {error}") from None

    @cached_property
    def json(self) -> str:
        """The text of a tokenizer.json that gives the same ids in any program.

        The text that this tokenizer was made from, unless something stored there had to be off.
        """
        return self._library.to_str() if self._text is None else self._text

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, nothing added.

        special: a special token spelled in the text (`<|endoftext|>`) is that token; otherwise it
        is text like any other. Raises ValueError for what is no text (lone surrogates), and for a
        character that the tokenizer neither has nor can mark as unknown.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of several texts, on several threads of the library."""
        for text in texts:
            check_text(text)
        with self._lock, _errors_of_the_library(f"{self._source}: cannot encode the text"):
            self._library.encode_special_tokens = not special
            batch = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
            return [found.ids if special else self._spelled(found.ids) for found in batch]

    @property
    def special_tokens(self) -> Collection[str]:
        """How special tokens are spelled."""
        return self._special.values()

    def _spelled(self, ids: list[int]) -> list[int]:
        """Special tokens that the model itself found in a text (Unigram) as their characters' ids.

        The unknown token, special or not, is the model's answer to a character and stays.
        """
        if self._special.keys().isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for i in ids:
            token, model = self._special.get(i, ""), self._library.model
            parts = (token[:1], token[1:]) if i in self._reserved and len(token) > 1 else ()
            found = [t.id for part in parts for t in model.tokenize(part)]
            spelled += found or [i]
        return spelled

    @cached_property
    def _reserved(self) -> set[int]:
        model = json.loads(self._library.model.__getstate__())
        unknown = {model.get("unk_id"), self.token_id(model.get("unk_token") or "")}
        return self._special.keys() - unknown

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids as the library decodes them; special tokens and unknown ids give none.

        Bytes that are no character give U+FFFD.
        """
        if not ids:
            return ""
        with _errors_of_the_library(f"{self._source}: cannot decode"):
            return self._library.decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str | None:
        """The token that `decode` takes for an id; None if it leaves the id out."""
        return None if token_id in self._special else self._library.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token written out, or None."""
        return self._library.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens too."""
        return self._library.get_vocab(with_added_tokens=True)


def _check_growth(steps: Iterable[Any], source: str) -> None:
    """Raise TokenizerError for steps, as JSON has them, that make one character absurdly many."""
    if math.prod(map(_growth, steps)) > MOST_GROWTH:
        raise TokenizerError(
            f"{source}: its steps make more than {MOST_GROWTH} characters of one: use a tokenizer "
            "without repeated replacements"
        )


def _growth(step: Any) -> float:
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1
    if isinstance(step.get("pattern"), dict):
        short = step["pattern"].get("String")  # a regular expression may match between characters
        made = len(step.get("content") or "")
        return max(1.0, made / len(short) if short else 1.0 + made)
    inner = (step.get(n) for n in ("normalizers", "pretokenizers", "decoders"))
    return GROWTH.get(step.get("type", ""), 1) * math.prod(map(_growth, inner))


def _probe(library: Library, source: str) -> None:
    """Raise TokenizerError if a regular expression of the file takes absurdly long.

    The library gives up a match after ten million steps back, with a panic, but may come near to
    that at each character of a text. Runs of characters show it while they are short.
    """
    for run in RUNS:
        text = "".join(sign * run for sign in "aA 1\n!é中")
        began = time.thread_time()
        try:
            library.encode(text, add_special_tokens=False)
        except BaseException as error:
            if _is_panic(error) and "Regex" in str(error):
                raise
            if not isinstance(error, Exception) and not _is_panic(error):
                raise  # Ctrl-C
            return  # it lacks a character: no matter of regular expressions
        if (took := time.thread_time() - began) > PATIENCE:
            raise TokenizerError(
                f"{source}: its regular expressions take {took:.1f} s for {len(text)} characters, "
                "and longer texts for ever: use a tokenizer without nested repetitions"
            )


def check_text(text: str) -> None:
    """Raise ValueError unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ValueError(f"a text must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode (it was not UTF-8)") from None


@contextmanager
def _errors_of_the_library(doing: str) -> Iterator[None]:
    """The library's plain Exceptions, and its panics, as a TokenizerError of one line."""
    try:
        yield
    except TokenizerError:
        raise
    except (Exception, BaseException) as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise  # Ctrl-C
        raise TokenizerError(f"{doing} ({one_line(error)})") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # pyo3 has no name for it to import


@contextmanager
def _panics_unprinted() -> Iterator[None]:
    """Keep off standard error the many lines that the library writes there when it panics."""
    with _PRINTING:
        yield from _unprinted()


def _unprinted() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
