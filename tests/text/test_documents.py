"""One reader of text: BOM, line ends, and where a bad byte is (faults B6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitskip_ref.documents import BOM, END_OF_TEXT, decode_utf8, read_documents, read_text
from bitskip_train.recipes import read_toml


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


END = END_OF_TEXT.encode()


@pytest.mark.parametrize(
    ("raw", "documents"),
    [
        (b"", []),
        (b"one", ["one"]),
        (b"one\r\ntwo\r\n", ["one\ntwo"]),
        (BOM + b"one", ["one"]),
        (BOM, []),
        (BOM + END + b"\none", ["one"]),
        (b"one\r\n" + END + b"\r\ntwo\r\n" + END + b"\r\n", ["one", "two"]),
        (b"one\n" + END + b"\n\r\n \n" + END + b"\ntwo\n\n", ["one", "two\n"]),
        (b"a\rb\r", ["a\rb\r"]),  # a lone CR is text
        (b"a" + BOM + b"b", ["a\ufeffb"]),  # a BOM within is text
        (b"say " + END + b" twice", [f"say {END_OF_TEXT} twice"]),
        (b"  " + END + b"\t\r\nx", ["x"]),
    ],
)
def test_documents(raw: bytes, documents: list[str], tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "t.txt", raw))) == documents


def test_a_text_as_every_reader_has_it(tmp_path: Path) -> None:
    raw = BOM + "Über\r\n".encode()
    assert read_text(write(tmp_path / "t", raw)) == decode_utf8(raw, "t") == "Über\n"


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_byte_is_where_it_is(bom: bytes, end: bytes, tmp_path: Path) -> None:
    raw = bom + (b"a line of text" + end) * 5000 + END + end + "ü".encode() * 50_000
    raw += end + END + end + b"x" * 10
    at = len(raw)
    path = write(tmp_path / "t.txt", raw + b"\xff tail")
    with pytest.raises(ValueError, match=rf"not UTF-8 text \(byte {at}\)"):
        list(read_documents(path))
    with pytest.raises(ValueError, match=rf"\(byte {at}\)"):
        read_text(path)


def test_toml_with_a_bom_and_crlf(tmp_path: Path) -> None:
    raw = BOM + b'[train]\r\ntokenizer = "bpe:300"\r\n'
    assert read_toml(write(tmp_path / "t.toml", raw)) == {"train": {"tokenizer": "bpe:300"}}
