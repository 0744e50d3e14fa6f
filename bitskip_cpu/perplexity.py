"""Held-out loss of a text at chosen exits (SPEC 10, readings 18 and 21)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitskip_cpu.model import Model
from bitskip_cpu.tables import table
from bitskip_cpu.tokenizer import Tokenizer
from bitskip_ref.documents import END_OF_TEXT, read_documents
from bitskip_ref.engine import Engine
from bitskip_ref.exits.fixed import check_exit_layer

LOGITS_AT_ONCE = 1 << 24  # values: 64 MiB in f32


@dataclass(frozen=True)
class Text:
    """A text as tokens: each document followed by end-of-text."""

    tokens: np.ndarray  # int64 [N]
    bytes: int  # UTF-8 bytes of the documents, without separators
    documents: int


@dataclass(frozen=True)
class ExitLoss:
    """Loss of one exit over a whole text."""

    exit_layer: int
    tokens: int  # predicted: all but the first
    loss: float  # nats per predicted token
    loss_se: float | None  # standard error of the loss, over windows; None for one window
    bits_per_byte: float  # end-of-text adds to the loss, not to the bytes

    @property
    def ppl(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def read_text(path: Path, tokenizer: Tokenizer, eos_token_id: int | None) -> Text:
    """Tokenize a file as the trainer does. Raises ValueError if it holds nothing to predict.

    eos_token_id: of the model; None: the token `<|endoftext|>`.
    """
    end = tokenizer.token_id(END_OF_TEXT) if eos_token_id is None else eos_token_id
    if end is None:
        raise ValueError(
            f"the model names no eos_token_id and its tokenizer has no {END_OF_TEXT}, "
            "which ends documents"
        )
    ids: list[int] = []
    size = count = 0
    for document in read_documents(path):
        ids += [*tokenizer.encode(document), end]
        size += len(document.encode())
        count += 1
    if len(ids) < 2:
        raise ValueError(f"{path}: holds {len(ids)} tokens; at least 2 are needed")
    return Text(np.array(ids, np.int64), size, count)


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, scored, end): inputs begin..end-1 predict begin+1..end; new are scored+1..end.

    Every token but the first is scored once. With stride = context windows do not overlap.
    """
    scored = 0
    for begin in range(0, count - 1, stride):
        end = min(begin + context, count - 1)
        yield begin, scored, end
        if end == count - 1:
            return
        scored = end


def perplexity(
    engine: Engine,
    text: Text,
    exits: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[ExitLoss]:
    """Loss at each exit over all tokens but the first, one result per exit, in order of depth.

    context: inputs of a window (None: the model's context); stride: from window to window, at
    most the context (None: the context, no overlap). `advance` is called with the number of newly
    scored tokens, each exit's counted. Raises ValueError for numbers out of range.
    """
    limit = engine.config.max_position_embeddings
    context = limit if context is None else context
    stride = context if stride is None else stride
    if not 1 <= context <= limit:
        raise ValueError(f"context {context}: this model's is {limit}, choose 1..{limit}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: must be within 1..{context}, the context")
    exits = sorted({check_exit_layer(n, engine.config) for n in exits})
    sums: dict[int, list[float]] = {n: [] for n in exits}
    sizes = []
    for begin, scored, end in windows(len(text.tokens), context, stride):
        sizes.append(end - scored)
        for n in exits:
            sums[n].append(_window_loss(engine, text.tokens[begin : end + 1], scored - begin, n))
            advance(end - scored)
    return [_result(n, sums[n], sizes, text.bytes) for n in exits]


def _window_loss(engine: Engine, tokens: np.ndarray, first: int, exit_layer: int) -> float:
    """Summed loss of tokens[first + 1:], each predicted from all before it in the window."""
    rows = max(1, LOGITS_AT_ONCE // engine.config.vocab_size)
    cache, total = engine.new_cache(), 0.0
    for start in range(0, len(tokens) - 1, rows):
        inputs = tokens[start : start + rows][: len(tokens) - 1 - start]
        z = engine.extend(inputs.tolist(), cache, exit_layer=exit_layer)
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        total += float(losses(z, targets)[max(0, first - start) :].sum())
    return total


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in binary64: logits f32 [T, V], targets [T] -> [T]."""
    z = logits.astype(np.float64)
    peak = z.max(1)
    chosen = np.take_along_axis(z, targets[:, None], 1)[:, 0]
    return np.log(np.exp(z - peak[:, None]).sum(1)) + peak - chosen


def _result(exit_layer: int, sums: list[float], sizes: list[int], text_bytes: int) -> ExitLoss:
    total, count = math.fsum(sums), sum(sizes)
    loss = total / count
    error = None
    if len(sizes) > 1:
        # Windows are the independent units: the standard error of a ratio estimate over them.
        residual = np.array(sums) - loss * np.array(sizes)
        error = math.sqrt(float((residual**2).sum()) * len(sizes) / (len(sizes) - 1)) / count
    bits = total / math.log(2) / max(1, text_bytes)
    return ExitLoss(exit_layer, count, loss, error, bits)


def report(
    model: Model,
    path: Path,
    exits: Sequence[int] | None,
    context: int | None,
    stride: int | None,
    as_json: bool,
) -> str:
    """What `bitskip-cpu perplexity` prints, with a progress bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import Progress

    text = read_text(path, model.tokenizer, model.folder.eos_token_id)
    exits = exits or [model.config.num_hidden_layers]
    total = (len(text.tokens) - 1) * len(set(exits))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=total)
        results = perplexity(
            model.engine, text, exits, context=context, stride=stride,
            advance=lambda count: bar.advance(task, count),
        )  # fmt: skip
    context = context or model.config.max_position_embeddings
    if as_json:
        facts = {
            "model": str(model.folder.path),
            "text": str(path),
            "context": context,
            "stride": stride or context,
            "documents": text.documents,
            "bytes": text.bytes,
            "exits": [{**vars(r), "ppl": r.ppl} for r in results],
        }
        return json.dumps(facts)
    rows = [
        (
            r.exit_layer,
            f"{r.loss:.4f}" + ("" if r.loss_se is None else f" ± {r.loss_se:.4f}"),
            f"{r.ppl:.3f}",
            f"{r.bits_per_byte:.4f}",
        )
        for r in results
    ]
    header = ("exit layer", "loss (nats/token)", "perplexity (token)", "bits/byte")
    counted = (
        f"{results[0].tokens} tokens predicted, {text.documents} documents, {text.bytes} bytes; "
        f"context {context}, stride {stride or context}"
    )
    return f"{table(header, rows)}\n{counted}"
