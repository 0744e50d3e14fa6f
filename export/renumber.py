"""Tokens numbered by how common they are: first ids make a good draft vocabulary (SPEC 11)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from bitskip_ref.documents import END_OF_TEXT
from bitskip_text.tokenizer import parse_tokenizer

DOCUMENTS = 256  # encoded at a time
VOCABULARY = ("embed_tokens.weight", "head.weight")  # ends of parameters with a row for each token


def frequent_first(
    tokenizer_json: str, documents: Iterable[str], vocab_size: int
) -> tuple[str, np.ndarray]:
    """(the tokenizer with new ids, old id of each new one int64 [V]); merges and pieces are kept.

    Ids are ordered by their number in the documents, each followed by the end-of-text token, equal
    ones as before; ids without a token stay last. Raises ValueError for a tokenizer whose ids are
    not a table.
    """
    tokenizer = parse_tokenizer(tokenizer_json, "the tokenizer")
    stored = json.loads(tokenizer.json)
    vocab = stored["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError(
            f"the tokenizer's model is {stored['model'].get('type')!r}, whose ids are places in a "
            "list: only models with a table of ids can be renumbered"
        )
    counts = np.full(vocab_size, -1, np.int64)
    counts[list(tokenizer.vocabulary().values())] = 0
    end = tokenizer.token_id(END_OF_TEXT)
    left = iter(documents)
    while part := list(islice(left, DOCUMENTS)):
        for ids in tokenizer.encode_batch(part):
            np.add.at(counts, ids, 1)
        if end is not None:
            counts[end] += len(part)
    order = np.argsort(-counts, kind="stable")
    new = np.empty(vocab_size, np.int64)
    new[order] = np.arange(vocab_size)
    stored["model"]["vocab"] = {token: int(new[i]) for token, i in vocab.items()}
    for added in stored.get("added_tokens", []):
        added["id"] = int(new[added["id"]])
    _renumber_template(stored.get("post_processor"), new)
    return json.dumps(stored, ensure_ascii=False), order


def _renumber_template(processor: Any, new: np.ndarray) -> None:
    """Ids that a post-processor holds; raises ValueError for a kind that is not known."""
    kind = processor["type"] if processor else "ByteLevel"
    if kind == "Sequence":
        for part in processor["processors"]:
            _renumber_template(part, new)
    elif kind == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [int(new[i]) for i in special["ids"]]
    elif kind != "ByteLevel":
        raise ValueError(f"the tokenizer's post-processor is {kind!r}: it cannot be renumbered")


def reorder(state: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters with the rows of embedding and heads in a new order; the others are shared."""
    return {name: w[order] if name.endswith(VOCABULARY) else w for name, w in state.items()}
