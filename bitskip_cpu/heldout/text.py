"""A held-out text as tokens, cut into documents as in training (SPEC 10, reading 18)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitskip_cpu.model import Model
from bitskip_ref.documents import END_OF_TEXT, read_documents


@dataclass(frozen=True)
class Text:
    """A text as tokens: each document followed by end-of-text."""

    tokens: np.ndarray  # int64 [N]
    bytes: int  # UTF-8 bytes of the documents, without separators
    documents: int


def read_text(path: Path, model: Model, limit: int | None = None) -> Text:
    """Tokenize a file as the trainer does. Raises ValueError if it holds nothing to predict.

    limit: take whole documents from its start until they have more tokens than this (None: all).
    """
    tokenizer, end = model.tokenizer, end_of_text(model)
    ids: list[int] = []
    size = count = 0
    for document in read_documents(path):
        if limit is not None and len(ids) > limit:
            break
        ids += [*tokenizer.encode(document), end]
        size += len(document.encode())
        count += 1
    if len(ids) < 2:
        raise ValueError(f"{path}: holds {len(ids)} tokens; at least 2 are needed")
    return Text(np.array(ids, np.int64), size, count)


def end_of_text(model: Model) -> int:
    """The id that ends a document. Raises ValueError if there is none."""
    end = model.folder.eos_token_id
    if end is None:
        end = model.tokenizer.token_id(END_OF_TEXT)
    if end is None:
        raise ValueError(
            f"the model names no eos_token_id and its tokenizer has no {END_OF_TEXT}, "
            "which ends documents"
        )
    return end
