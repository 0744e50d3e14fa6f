"""A model of another program as its reader gives it: our configuration, weights piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from bitskip_ref.config import ModelConfig
from bitskip_ref.excerpt import shown
from bitskip_ref.folder import ChatForm


class RefusedError(ValueError):
    """A model that would not run as it was meant; the message names what is missing."""


@dataclass(frozen=True)
class Floats:
    """A tensor of numbers, read by rows so that a large one is never whole in memory."""

    shape: tuple[int, ...]
    stored: str  # the file's own word for its type, for reports
    rows: Callable[[int, int], np.ndarray]  # (first, end) -> f32 [end - first, ...]

    def whole(self) -> np.ndarray:
        """All of it, f32 of `shape`."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class Ternary:
    """A matrix that is codes times one scale already."""

    shape: tuple[int, int]
    stored: str
    codes: Callable[[int, int], np.ndarray]  # (first, end) -> int8 [end - first, in] in -1..1
    alpha: np.float32  # the value of code 1 (SPEC 4.3)


Weight = Floats | Ternary
PIECE = 1 << 19  # values that are converted at a time
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
LOSSLESS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # a file's word: head_format


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, end) of rows of about PIECE values together: scratch does not grow with a model."""
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def vocabulary_types(weights: Mapping[str, Weight]) -> list[str]:
    """The files' words for what they hold embedding and head in."""
    return sorted({weights[name].stored for name in VOCABULARY if name in weights})


def lossless_head(weights: Mapping[str, Weight]) -> str:
    """The head_format that keeps embedding and head as they are: that of the files, or float32."""
    words = vocabulary_types(weights)
    return LOSSLESS.get(words[0], "float32") if len(words) == 1 else "float32"


def refuse_overlaps(file: object, places: Iterable[tuple[int, int, str]]) -> None:
    """Raise RefusedError if two tensors of a file share a byte: (first byte, one behind the last,
    name) of each. A damaged offset shows so, and a small file cannot tell of much.
    """
    last, before = 0, ""
    for first, end, name in sorted(places):
        if first < min(last, end):
            raise RefusedError(f"{file}: {shown(name)} lies where {shown(before)} does")
        if end > last:
            last, before = end, name


@dataclass(frozen=True)
class Report:
    """What became of a model's parts, one sentence each."""

    kept: tuple[str, ...] = ()  # bit for bit
    converted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report, a line for each part."""
        return [
            f"{word}: {part}"
            for word, parts in (
                ("kept", self.kept), ("converted", self.converted), ("dropped", self.dropped),
            )
            for part in parts
        ]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A foreign model, opened: its configuration is known, its weights are read when asked for."""

    origin: str  # what it was read from, for messages
    config: ModelConfig  # head_format: what the file itself says or a lossless one
    weights: Mapping[str, Weight]  # FORMAT 3's names of parameters (no scales)
    tokenizer_json: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    exit_layer: int | None = None  # what the folder recommends, if the file carries it
    draft_vocab: int | None = None
    chat: ChatForm | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)  # as of a Folder (SPEC 9.7)
    report: Report = Report()
