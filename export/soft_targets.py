"""The verb `soft-targets`: what a model, the teacher, thinks of each token of a training text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import numpy as np

from bitskip.options import COUNT, MODEL, NEW_FILE, THREADS, TOKEN_CACHE
from bitskip.terminal import progress_bar
from bitskip_export.exit_blocks import window
from bitskip_ref.config import ConfigError
from bitskip_ref.engine import Engine
from bitskip_ref.files import lock
from bitskip_ref.folder import CONFIG
from bitskip_ref.heldout import windows


class Part(NamedTuple):
    """A document, or a part of a long one, that is run by itself."""

    inputs: np.ndarray  # int64 [n], end-of-text and the document's first tokens, or later ones
    first: int  # number of the token that the first new prediction is of
    new: int  # predictions that no earlier part has: the last ones


@click.command("soft-targets")
@MODEL
@click.option(
    "--data", multiple=True, required=True,
    help="The training text, as --data of train and in that order.",
)  # fmt: skip
@click.option("--out", "-o", type=NEW_FILE, required=True, help="The file to write.")
@click.option(
    "--top", type=click.IntRange(1, 1024), default=16, show_default=True,
    help="Ids kept of each prediction.",
)  # fmt: skip
@click.option(
    "--context", type=COUNT, help="Most tokens that a prediction sees. Default: as trained, or 512."
)
@TOKEN_CACHE
@THREADS
def soft_targets(
    model: str | None, data: tuple[str, ...], out: Path, top: int, context: int | None,
    token_cache: Path, threads: int | None,
) -> None:  # fmt: skip
    """What MODEL, the teacher, thinks of each token of a text, for a student to learn from.

    The student trains with `bitskip train --data ... --set tokenizer=MODEL/tokenizer.json --set
    soft_targets=FILE`: the same text, the same tokens. Stopped, the same command goes on from
    FILE.partial.
    """
    from bitskip_cpu.cli.loading import load_model
    from bitskip_ref.documents import END_OF_TEXT, read_text
    from bitskip_train.data import TextSource, load_split
    from bitskip_train.soft_targets import (
        MOST_IDS,
        holds_soft_targets,
        text_digest,
        write_soft_targets,
    )
    from bitskip_train.tokenizer import parse_tokenizer

    if out.is_file() and not holds_soft_targets(out):
        raise ConfigError(f"{out} holds something else than soft targets: choose another --out")
    loaded = load_model(model, threads)
    folder, config = loaded.folder, loaded.config
    if config.vocab_size > MOST_IDS:
        raise ConfigError(
            f"soft targets hold ids of at most {MOST_IDS:,} tokens, and the model's vocabulary has "
            f"{config.vocab_size:,}"
        )
    if folder.tokenizer is None:
        raise ConfigError(f"{folder.path}: has no tokenizer, so no text can be its")
    context = window(folder, context)
    tokenizer = parse_tokenizer(read_text(folder.tokenizer), str(folder.tokenizer))
    tokens = load_split(TextSource(data, "train"), tokenizer, token_cache).tokens
    partial = out.with_name(f"{out.name}.partial")
    top = min(top, config.vocab_size)
    about = {
        "text": text_digest(tokens).hex(),
        "model": hashlib.sha256((folder.path / CONFIG).read_bytes()).hexdigest(),
        "top": top,
        "context": context,
    }
    end = cast(int, tokenizer.token_id(END_OF_TEXT))  # the model's own end may be another
    parts = list(documents(tokens, end, context))
    with closing(Rows(partial, about)) as rows, progress_bar("teaching", len(tokens)) as advance:
        left = rows.left(parts)
        advance(len(tokens) - sum(part.new for part in left))
        for found in predictions(loaded.engine, left, top):
            rows.append(*found)
            advance(len(found[0]))
        write_soft_targets(out, tokens, top, rows.halves(len(tokens)))
    partial.unlink(missing_ok=True)
    click.echo(f"{out}: {len(tokens):,} tokens, {top} ids each")


def documents(tokens: np.ndarray, end: int, context: int) -> Iterator[Part]:
    """What to run for a prediction of each token of a text: each document by itself, begun by an
    `end`, as the token before it; a document of more than `context` in overlapping parts.

    tokens [N], documents followed by `end`.
    """
    first = 0
    for last in np.flatnonzero(tokens == end).tolist():
        text = np.concatenate(([end], tokens[first : last + 1])).astype(np.int64)
        for begin, known, stop in windows(len(text), context, max(1, context // 2)):
            yield Part(text[begin:stop], first + known, stop - known)
        first = last + 1


def predictions(
    engine: Engine, parts: Sequence[Part], top: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`likeliest` of the new predictions of each part, in order, at full depth."""
    from bitskip_cpu.heldout.beside import side_by_side
    from bitskip_train.soft_targets import likeliest

    depth = engine.config.num_hidden_layers

    def run(engine: Engine, cache: Any, part: Part) -> tuple[np.ndarray, np.ndarray]:
        ids = np.empty((len(part.inputs), top), np.uint16)
        probabilities = np.empty_like(ids)

        def visit(n: int, first: int, z: np.ndarray) -> None:
            at = slice(first, first + len(z))
            ids[at], probabilities[at] = likeliest(z, top)

        engine.extend_exits(part.inputs.tolist(), cache, [depth], visit)
        return ids[-part.new :], probabilities[-part.new :]

    yield from side_by_side(engine, run, parts)


class Rows:
    """Rows of the file to be, in one of their own until it is whole: ids, then probabilities."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Open those that were made with these settings, or begin anew. `close` it.

        Raises DataError while another process has them.
        """
        from bitskip_train.errors import DataError

        self.top: int = about["top"]
        head = json.dumps(about).encode() + b"\n"
        self.head = len(head)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115
        if lock(self.file.fileno()) is False:
            self.file.close()
            raise DataError(f"{path}: another process writes there; wait, or choose another --out")
        self.file.seek(0)
        if self.file.read(len(head)) != head:
            self.file.truncate(0)
            self.file.write(head)
            self.file.flush()

    def left(self, parts: Sequence[Part]) -> Sequence[Part]:
        """The parts whose rows are not there in whole; what is there of the first is dropped."""
        rows = (self.file.seek(0, 2) - self.head) // (4 * self.top)
        done = sum(part.first + part.new <= rows for part in parts)
        kept = parts[done - 1].first + parts[done - 1].new if done else 0
        self.file.truncate(self.head + kept * 4 * self.top)
        return parts[done:]

    def append(self, ids: np.ndarray, probabilities: np.ndarray) -> None:
        """Add the rows of a part."""
        self.file.write(np.concatenate((ids, probabilities), 1).astype("<u2").tobytes())

    def halves(self, count: int) -> list[np.ndarray]:
        """Ids and probabilities of all `count` tokens, uint16 [count, top] each, mapped."""
        self.file.flush()
        shape = (count, 2, self.top)
        rows = np.memmap(self.file, "<u2", mode="r", offset=self.head, shape=shape)
        return [rows[:, 0], rows[:, 1]]

    def close(self) -> None:
        """Leave the file as it is."""
        self.file.close()
