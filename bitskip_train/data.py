"""From text to batches: documents, a token cache on disk, shuffled windows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.documents import END_OF_TEXT, plain_text, read_documents
from bitskip_ref.files import replace_file
from bitskip_text.tokenizer import Tokenizer, TokenizerError
from bitskip_train.errors import DataError

CACHE_VERSION = 2  # part of the key: raise it when tokens would come out differently
HUB = {
    "tinystories": ("roneneldan/TinyStories", None),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-v1"),
}


@dataclass(frozen=True)
class Split:
    """Tokens of one split, joined with end-of-text."""

    tokens: np.ndarray  # uint16 or uint32 [N], memory-mapped
    bytes: int  # UTF-8 bytes of the documents, without separators

    def padded(self, context: int, end: int) -> Split:
        """The same with every document filled up with `end` (SPEC 10 row 18)."""
        return Split(pad_documents(self.tokens, context, end), self.bytes)


class TextSource:
    """Text files, or a data set of the hub, as a stream of documents.

    Files are split by `bitskip_ref.documents.read_documents`. The names `tinystories` and
    `wikitext-2` load from the Hugging Face hub unless a file or folder of that name exists.
    Raises DataError.
    """

    def __init__(self, places: tuple[str, ...], split: str) -> None:
        """split: `train` or `validation`, for data sets of the hub."""
        self.files: list[Path] = []
        self.hub: list[tuple[str, Any]] = []
        for place in places:
            path = Path(place)
            if path.is_dir():
                found = sorted(path.glob("*.txt"))
                if not found:
                    raise DataError(f"{place}: the folder holds no .txt file")
                self.files += found
            elif path.is_file():
                self.files.append(path)
            elif place in HUB:
                self.hub.append((place, _load_hub(place, split)))
            else:
                raise DataError(f"{place}: no such file or folder; hub names: {', '.join(HUB)}")

    def fingerprint(self) -> str:
        """Changes when the text does."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for _, dataset in self.hub:
            digest.update(str(dataset._fingerprint).encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """The documents in order, without those that are empty."""
        for path in self.files:
            try:
                yield from read_documents(path)
            except ValueError as error:
                raise DataError(str(error)) from None
        for name, dataset in self.hub:
            if name == "wikitext-2":  # rows are lines; the hub's copy has emptied the blank ones
                yield "".join(row or " \n" for row in dataset["text"])
            else:
                yield from (plain_text(text) for text in dataset["text"] if text.strip())


def _load_hub(name: str, split: str) -> Any:
    repository, subset = HUB[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f'data {name!r}: needs the package datasets (pip install "bitskip[hub]"), or the '
            "path of a text file"
        ) from None
    try:
        return load_dataset(repository, subset, split=split)
    except Exception as error:  # many types, for network and for file trouble
        raise DataError(
            f"data {name!r}: {repository} did not load ({type(error).__name__}); without a network "
            "give the path of a text file"
        ) from None


def load_split(source: TextSource, tokenizer: Tokenizer, cache: Path) -> Split:
    """The tokens of a source, from the cache folder, or tokenized now and stored there.

    The key is the text's fingerprint and the tokenizer, so neither can change unnoticed. A cache
    that is not whole, or not what was written, is made anew. Raises DataError, for a tokenizer
    without end-of-text among others.
    """
    end = tokenizer.token_id(END_OF_TEXT)
    if end is None:
        raise DataError(f"the tokenizer has no token {END_OF_TEXT}, which ends documents")
    key = hashlib.sha256(
        f"{CACHE_VERSION} {source.fingerprint()} {tokenizer.json}".encode()
    ).hexdigest()[:32]
    tokens_path, about_path = cache / f"{key}.bin", cache / f"{key}.json"
    dtype = np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")
    split = _stored_split(tokens_path, about_path, dtype)
    if split is None:
        try:
            _store_split(source, tokenizer, end, tokens_path, about_path, dtype)
        except OSError as error:
            raise DataError(f"{tokens_path}: cannot write the token cache ({error})") from None
        split = _stored_split(tokens_path, about_path, dtype)
        if split is None:
            raise DataError(f"{tokens_path}: the token cache changes while it is read")
    return split


def _stored_split(tokens_path: Path, about_path: Path, dtype: np.dtype) -> Split | None:
    """What `_store_split` wrote; None if that is not there in whole."""
    try:
        about = json.loads(about_path.read_bytes())
        with tokens_path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if about["sha256"] != digest or type(about["bytes"]) is not int:
            return None
        return Split(np.memmap(tokens_path, dtype, mode="r"), about["bytes"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _store_split(
    source: TextSource, tokenizer: Tokenizer, end: int, tokens_path: Path, about_path: Path,
    dtype: np.dtype,
) -> None:  # fmt: skip
    """Write the tokens, those of each document and `end`; then what they are: without it they do
    not count."""
    digest, size = hashlib.sha256(), 0
    with replace_file(tokens_path) as file:
        for group in _groups(source.documents()):
            try:
                encoded = tokenizer.encode_batch(group)
            except TokenizerError as error:
                raise DataError(str(error)) from None
            for document, ids in zip(group, encoded, strict=True):
                raw = np.array([*ids, end], dtype).tobytes()
                file.write(raw)
                digest.update(raw)
                size += len(document.encode())
        if not file.tell():
            raise DataError("the data holds no text")
    with replace_file(about_path) as file:
        file.write(json.dumps({"bytes": size, "sha256": digest.hexdigest()}).encode())


def _groups(documents: Iterator[str], size: int = 1024) -> Iterator[list[str]]:
    while group := list(itertools.islice(documents, size)):
        yield group


def pad_documents(tokens: np.ndarray, context: int, end: int) -> np.ndarray:
    """SPEC 10 row 18: every document cut or filled up with `end` to `context` tokens.

    tokens: ids [N], documents divided by `end`. Returns ids [documents * context].
    """
    ends = np.flatnonzero(tokens == end)
    starts = np.concatenate([[0], ends[:-1] + 1])
    rows = np.full((len(ends), context), end, tokens.dtype)
    for row, first, last in zip(rows, starts, ends, strict=True):
        size = min(int(last - first), context)
        row[:size] = tokens[first : first + size]
    return rows.reshape(-1)


class Windows:
    """Training windows in an order that is a function of (seed, position) alone.

    An epoch cuts the tokens into windows of `context + 1` (neighbours share one token) from a
    random offset and shuffles them; offset and order come from (seed, epoch).
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int) -> None:
        """tokens [N]. Raises DataError if they do not fill one window."""
        if len(tokens) <= context:
            raise DataError(
                f"{len(tokens)} tokens of data: context = {context} needs at least {context + 1}"
            )
        self.tokens, self.context, self.seed = tokens, context, seed
        # One window fewer than would fit, so that every offset gives the same number.
        self.per_epoch = max(1, (len(tokens) - context) // context)
        self._epoch = -1
        self._offset = 0
        self._order = np.zeros(0, np.int64)

    def start(self, position: int) -> int:
        """Where window number `position`, counted over all epochs, begins among the tokens."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            free = len(self.tokens) - self.per_epoch * self.context
            self._offset = int(rng.integers(min(self.context, free)))
            self._order = rng.permutation(self.per_epoch)
            self._epoch = epoch
        return self._offset + int(self._order[index]) * self.context

    def starts(self, position: int, size: int) -> list[int]:
        """Where windows position .. position + size - 1 begin."""
        return [self.start(position + i) for i in range(size)]

    def batch(self, position: int, size: int) -> np.ndarray:
        """Windows position .. position + size - 1: int64 [size, context + 1]."""
        cut = [self.tokens[a : a + self.context + 1] for a in self.starts(position, size)]
        return np.stack(cut).astype(np.int64)
