"""Text files as documents, the same for training and for perplexity (SPEC 10, reading 18)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
BOM = b"\xef\xbb\xbf"  # what some editors put before UTF-8


def read_text(path: Path) -> str:
    """The text of a UTF-8 file as every reader of text has it (SPEC 10, reading 18).

    Raises ValueError for a file that is not UTF-8, with the byte's place from 0; OSError.
    """
    return decode_utf8(path.read_bytes(), str(path))


def decode_utf8(raw: bytes, source: str) -> str:
    """`read_text` of bytes at hand; `source` names them in errors."""
    return _decode(raw.removeprefix(BOM), source, len(raw) - len(raw.removeprefix(BOM)))


def plain_text(text: str) -> str:
    """Text of another source as `read_text` gives that of a file: no BOM, line ends LF."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a UTF-8 file, in order, without those that are blank.

    Lines that hold only `<|endoftext|>` separate documents; a document's last newline is not part
    of it. Without such lines the file is one document. Tokenized, each document is followed by the
    end-of-text token. One document at a time is in memory. Raises ValueError as `read_text`.
    """
    end = END_OF_TEXT.encode()
    with path.open("rb") as file:
        first, lines = file.readline(), list[bytes]()
        start = len(first) - len(first.removeprefix(BOM))  # where the next document starts
        for line in itertools.chain([first[start:]], file, [end]):
            if line.strip() != end:
                lines.append(line)
                continue
            raw, lines = b"".join(lines), []
            text = _decode(raw, str(path), start)
            start += len(raw) + len(line)
            if text.strip():
                yield text.removesuffix("\n")


def _decode(raw: bytes, source: str, start: int) -> str:
    """UTF-8 from byte `start` of a source, with line ends as LF."""
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text (byte {start + error.start})") from None
