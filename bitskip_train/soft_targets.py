"""Soft targets (Hinton et al., arXiv 1503.02531): what a teacher thinks of each token of a text.

A file is made once, by `bitskip soft-targets`, and read in every epoch of a student's training. It
holds for each token of the training data the ids that the teacher found likeliest at its place, and
their probabilities; what these leave of 1 belongs to the token that the text has there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitskip_ref.safetensors_file import read_tensors, write_tensors
from bitskip_ref.tensors import FormatError
from bitskip_train.errors import DataError

UNIT = 1 << 16  # a probability of 1 in the file
MOST_IDS = 1 << 16  # of a vocabulary
FORM = "bitskip soft targets"
PARTS = ("text", "ids", "probabilities")  # of a file: digest of its text, then rows of halves


class Soft(NamedTuple):
    """The teacher's part of the targets of N tokens; what its rows leave of 1 is the text's."""

    ids: Tensor  # int64 [N, K]
    probabilities: Tensor  # f32 [N, K], rows of at most 1


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """Soft targets of the tokens of a text, mapped from their file."""

    ids: np.ndarray  # uint16 [N, K]
    probabilities: np.ndarray  # uint16 [N, K], in units of 2^-16

    def rows(self, starts: Sequence[int], count: int, share: float) -> Soft:
        """Those of `count` tokens from each of `starts`, one window after the other.

        share: what the teacher's probabilities are multiplied by, 0 to 1.
        """
        at = np.concatenate([np.arange(first, first + count) for first in starts])
        return Soft(
            torch.from_numpy(self.ids[at].astype(np.int64)),
            torch.from_numpy(self.probabilities[at].astype(np.float32) * (share / UNIT)),
        )


def likeliest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids with the largest of some logits, f32 [T, V], and their probabilities, both uint16
    [T, min(count, V)]; probabilities are rounded down to units of 2^-16, so a row has at most 1."""
    count = min(count, logits.shape[1])
    ids = np.argpartition(logits, logits.shape[1] - count)[:, -count:]
    logits = logits - logits.max(1, keepdims=True)
    sums = np.exp(logits).sum(1, dtype=np.float64)
    chosen = np.exp(np.take_along_axis(logits, ids, 1), dtype=np.float64) / sums[:, None]
    units = np.minimum(np.floor(chosen * (UNIT - 1)), UNIT - 1)
    return ids.astype(np.uint16), units.astype(np.uint16)


def write_soft_targets(
    path: Path, tokens: np.ndarray, count: int, parts: Sequence[np.ndarray]
) -> None:
    """Write the soft targets of a text's tokens.

    tokens [N]; parts: ids and probabilities, uint16 [N, count] each.
    """
    shape = (len(tokens), 2 * count)
    write_tensors(
        path,
        dict(zip(PARTS, [(np.uint8, (32,)), (np.uint8, shape), (np.uint8, shape)], strict=True)),
        _pieces(tokens, parts),
        FORM,
    )


def _pieces(tokens: np.ndarray, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    yield np.frombuffer(text_digest(tokens), np.uint8)
    for part in parts:
        yield np.ascontiguousarray(part, "<u2").view(np.uint8)


def holds_soft_targets(path: Path) -> bool:
    """Whether a file is one that `write_soft_targets` made, of whatever text."""
    try:
        return read_tensors(path, 3).keys() == set(PARTS)
    except FormatError:
        return False


def read_soft_targets(path: Path, tokens: np.ndarray, vocab_size: int) -> SoftTargets:
    """Map the soft targets of these tokens. Raises DataError unless the file has them."""
    try:
        found = read_tensors(path, 3)
        digest, ids, probabilities = (found[n] for n in PARTS)
    except FileNotFoundError:
        raise DataError(
            f"soft targets {path}: no such file; `bitskip soft-targets` makes it"
        ) from None
    except (OSError, FormatError, KeyError) as error:
        raise DataError(f"soft targets {path}: not such a file ({error})") from None
    if digest.tobytes() != text_digest(tokens):
        raise DataError(
            f"soft targets {path}: of other tokens than this run's; make them for its data and its "
            "tokenizer"
        )
    rows = {part.shape for part in (ids, probabilities)}
    if (
        len(rows) != 1
        or ids.ndim != 2
        or len(ids) != len(tokens)
        or ids.shape[1] < 2
        or ids.shape[1] % 2
    ):
        raise DataError(f"soft targets {path}: damaged (its tensors do not fit each other)")
    ids, probabilities = ids.view("<u2"), probabilities.view("<u2")
    for first in range(0, len(ids), 1 << 16):
        part = slice(first, first + (1 << 16))
        if int(ids[part].max()) >= vocab_size:
            raise DataError(f"soft targets {path}: damaged (an id that the model lacks)")
        if int(probabilities[part].sum(1, dtype=np.uint64).max()) > UNIT:
            raise DataError(f"soft targets {path}: damaged (probabilities above 1)")
    return SoftTargets(ids, probabilities)


def text_digest(tokens: np.ndarray) -> bytes:
    """SHA-256 of a text's ids, whatever type holds them."""
    digest = hashlib.sha256()
    for first in range(0, len(tokens), 1 << 20):
        digest.update(np.ascontiguousarray(tokens[first : first + (1 << 20)], "<u4").data)
    return digest.digest()
