"""Text files as documents, the same for training and for perplexity (SPEC 10, reading 18)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a UTF-8 file, in order, without those that are blank.

    Lines that hold only `<|endoftext|>` separate documents; a document's last newline is not part
    of it. Without such lines the file is one document. Tokenized, each document is followed by the
    end-of-text token. Raises ValueError for a file that is not UTF-8.
    """
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in itertools.chain(file, [END_OF_TEXT]):
                if line.strip() != END_OF_TEXT:
                    lines.append(line)
                    continue
                text, lines = "".join(lines), []
                if text.strip():
                    yield text.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
