"""Tokenizers, documents, the token cache and windows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models

from bitskip_ref.documents import END_OF_TEXT
from bitskip_text.tokenizer import Tokenizer
from bitskip_train.data import TextSource, Windows, load_split
from bitskip_train.errors import DataError
from bitskip_train.tokenizer import make_tokenizer
from tests.train.conftest import stories


def bpe(size: int = 300) -> Tokenizer:
    return make_tokenizer(f"bpe:{size}", [stories()])


def test_trained_tokenizer_is_lossless_and_reproducible() -> None:
    tokenizer = bpe()
    assert tokenizer.size == 300
    assert tokenizer.token_id(END_OF_TEXT) == 0
    text = "Über 日本語 \x00\n\n  Lily's ball 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert bpe().json == tokenizer.json


def test_tokenizer_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    tokenizer = bpe()
    (tmp_path / "t.json").write_text(tokenizer.json, "utf-8")
    assert make_tokenizer(str(tmp_path / "t.json"), []).json == tokenizer.json
    Library.from_str(tokenizer.json).model.save(str(tmp_path))
    again = make_tokenizer(str(tmp_path), [])
    assert again.encode("Lily saw a dog") == tokenizer.encode("Lily saw a dog")


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("bpe:12", None, "number from 257"),
        ("bpe:many", None, "number from 257"),
        ("nowhere.json", None, "no such file"),
        ("bad.json", "{", "not a tokenizer.json"),
    ],
)
def test_wrong_tokenizers(tmp_path: Path, spec: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / spec).write_text(content)
        spec = str(tmp_path / spec)
    with pytest.raises(DataError, match=message):
        make_tokenizer(spec, [])


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    Library(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="has no token"):
        make_tokenizer(str(tmp_path / "t.json"), [])


def test_documents_are_joined_with_end_of_text(tmp_path: Path) -> None:
    text = f"One.\nTwo.\n{END_OF_TEXT}\n\n{END_OF_TEXT}\nThree ü."
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = bpe()
    split = load_split(TextSource((str(tmp_path),), "train"), tokenizer, tmp_path / "cache")
    want = [*tokenizer.encode("One.\nTwo."), 0, *tokenizer.encode("Three ü."), 0]
    assert split.tokens.tolist() == want
    assert split.tokens.dtype == np.uint16
    assert split.bytes == len("One.\nTwo.") + len("Three ü.".encode())


def test_the_cache_is_used_and_its_key_sees_every_change(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    source = TextSource((str(text),), "train")
    first = load_split(source, bpe(), cache)

    def no_reading(self: TextSource) -> None:
        raise AssertionError("the text was read again")

    with monkeypatch.context() as patch:
        patch.setattr(TextSource, "documents", no_reading)
        again = load_split(source, bpe(), cache)
        assert np.array_equal(again.tokens, first.tokens)
        assert again.bytes == first.bytes
        with pytest.raises(AssertionError):
            load_split(source, bpe(290), cache)
        text.write_text(stories(41))
        with pytest.raises(AssertionError):
            load_split(source, bpe(), cache)
    # The failures above left nothing that a later run could take for tokens.
    assert len(load_split(source, bpe(), cache).tokens) > len(first.tokens)
    assert not list(cache.glob("*.tmp"))


DAMAGE = {
    "shorter": lambda raw: raw[:-2],
    "odd": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0\0",
    "empty": lambda raw: b"",
    "another byte": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "no JSON": lambda raw: b"{",
    "no object": lambda raw: b"[1, 2]",
    "another object": lambda raw: b"{}",
    "a number": lambda raw: b"7",
    "deep": lambda raw: b"[" * 100_000,
    "not UTF-8": lambda raw: b"\xff\xfe",
    "other numbers": lambda raw: raw.replace(b'"bytes": ', b'"bytes": "x", "other": '),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_a_damaged_cache_is_made_anew(text: Path, tmp_path: Path, suffix: str, damage: str) -> None:
    source, cache = TextSource((str(text),), "train"), tmp_path / "cache"
    first = load_split(source, bpe(), cache)
    want = np.array(first.tokens)
    (path,) = cache.glob(f"*{suffix}")
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    again = load_split(source, bpe(), cache)
    assert np.array_equal(again.tokens, want) and again.bytes == first.bytes
    if suffix == ".json":
        assert path.read_bytes() == whole
    path.unlink()
    assert np.array_equal(load_split(source, bpe(), cache).tokens, want)


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = {"text": ["", " = Title = \n", "", " Some text . \n"]}

    class Rows(dict[str, list[str]]):
        _fingerprint = "print"

    def load_dataset(*names: str | None, split: str) -> Rows:
        asked.append((*names, split))
        if split == "validation":
            raise ConnectionError("no network")
        return Rows(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    wiki = TextSource(("wikitext-2",), "train")
    assert list(wiki.documents()) == [" \n = Title = \n \n Some text . \n"]
    tiny = TextSource(("tinystories",), "train")
    assert list(tiny.documents()) == [rows["text"][1], rows["text"][3]]
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-v1", "train"),
        ("roneneldan/TinyStories", None, "train"),
    ]
    with pytest.raises(DataError, match=r"did not load .ConnectionError.; without a network"):
        TextSource(("tinystories",), "validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .bitskip\[hub\]."):
        TextSource(("tinystories",), "train")


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; hub names: tinystories"):
        TextSource(("nothing",), "train")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        TextSource((str(tmp_path),), "train")
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    source = TextSource((str(tmp_path),), "train")
    with pytest.raises(DataError, match="not UTF-8"):
        load_split(source, bpe(), tmp_path / "cache")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        load_split(source, bpe(), tmp_path / "cache")


@given(
    extra=st.integers(1, 100), context=st.integers(2, 20), seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_windows_of_an_epoch_tile_the_tokens(
    extra: int, context: int, seed: int, epoch: int
) -> None:
    tokens = np.arange(context + extra, dtype=np.uint16)
    windows = Windows(tokens, context, seed)
    n = windows.per_epoch
    found = windows.batch(epoch * n, n)
    assert found.shape == (n, context + 1)
    assert (np.diff(found, axis=1) == 1).all()  # each is a stretch of the text
    starts = np.sort(found[:, 0])
    assert (np.diff(starts) == context).all()  # neighbours share one token
    assert n >= len(tokens) // context - 1


def test_windows_depend_on_seed_and_position_only() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    a, b = Windows(tokens, 8, 3), Windows(tokens, 8, 3)
    a.batch(0, 300)  # several epochs
    assert np.array_equal(a.batch(250, 5), b.batch(250, 5))
    assert not np.array_equal(a.batch(0, 5), Windows(tokens, 8, 4).batch(0, 5))
    offsets = {int(a.batch(e * a.per_epoch, 1)[0, 0]) % 8 for e in range(20)}
    assert len(offsets) > 3  # windows differ between epochs
    assert not np.array_equal(np.sort(a._order), a._order)


def test_too_little_data() -> None:
    with pytest.raises(DataError, match="at least 9"):
        Windows(np.arange(8, dtype=np.uint16), 8, 0)


def test_a_tokenizer_without_end_of_text_divides_nothing(text: Path, tmp_path: Path) -> None:
    """Of a model folder, whose tokenizer may be any."""
    words = Tokenizer(Library(models.BPE({"a": 0, "b": 1}, [])), "x")
    with pytest.raises(DataError, match=r"the tokenizer has no token <\|endoftext\|>"):
        load_split(TextSource((str(text),), "train"), words, tmp_path)
