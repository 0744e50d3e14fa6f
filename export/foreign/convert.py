"""A `Source` written as a model folder (FORMAT), a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitskip_export.foreign.source import (
    Floats,
    RefusedError,
    Report,
    Source,
    Ternary,
    lossless_head,
    pieces,
    vocabulary_types,
)
from bitskip_export.pack import check_target
from bitskip_ref.arithmetic.hadamard import rotate_unpadded
from bitskip_ref.arithmetic.quant import quantize_activations, quantize_weights
from bitskip_ref.config import HEAD_BITS, MOST_ODD, ModelConfig, odd_part
from bitskip_ref.floats import stored
from bitskip_ref.folder import write_folder
from bitskip_ref.packing import pack_ternary, packed_width
from bitskip_ref.tensors import expected_tensors
from bitskip_text.tokenizer import parse_tokenizer

Progress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in all)."""


def import_model(
    source: Source,
    out: Path,
    *,
    linear: str | None = None,
    head_format: str | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Write the folder `out`, whole or not at all; memory is that of the largest tensor.

    linear, head_format: as of `chosen`. Raises RefusedError, ExportError for a place that holds
    something else (unless `force`), and FormatError for values that FORMAT has no place for.
    """
    check_target(out, force)
    config = chosen(source.config, linear, head_format)
    words = source.tokenizer_json
    if words is not None:
        words = parse_tokenizer(words, source.origin, config.vocab_size).json
    tensors = Tensors(config, source, progress)
    write_folder(
        out, config, tensors,
        tokenizer_json=words,
        eos_token_id=source.eos_token_ids,
        bos_token_id=source.bos_token_id,
        exit_layer=source.exit_layer,
        draft_vocab=source.draft_vocab,
        chat=source.chat,
        sampling=source.sampling,
    )  # fmt: skip
    return _report(source, config)


def usual(source: Source) -> str:
    """What linear layers become unless told otherwise: int8 where they are floats."""
    return "int8" if source.config.linear == "float32" else source.config.linear


def chosen(config: ModelConfig, linear: str | None, head_format: str | None) -> ModelConfig:
    """A source's configuration with what was asked for.

    linear: `int8` quantizes float32 layers (SPEC 4.8), rotated where SPEC 5.3 can; `float32` and
    None keep what the source has. head_format: None for the source's, or int8 with `int8`. Raises
    RefusedError for another kind of linear layers than a ternary model's own.
    """
    if config.linear == "ternary" and linear not in (None, "ternary"):
        raise RefusedError(f"linear weights are ternary: they are kept so, not made {linear}")
    if linear == "int8":
        turned = all(odd_part(width) <= MOST_ODD for width in config.linear_inputs())
        config = config.replace(linear="int8", hadamard=turned, head_format="int8")
    return config.replace(head_format=head_format or config.head_format)


class Tensors(Mapping[str, np.ndarray]):
    """A folder's tensors in file order, each made when it is asked for and then forgotten.

    Scales, which lie behind their weights in the file, are kept from when those were made.
    """

    def __init__(self, config: ModelConfig, source: Source, progress: Progress) -> None:
        self.expected = expected_tensors(config)
        self._config, self._source, self._progress = config, source, progress
        self._scales: dict[str, np.ndarray] = {}
        sizes = [np.dtype(k).itemsize * int(np.prod(s)) for k, s in self.expected.values()]
        self._done, self._total = 0, sum(sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.expected)

    def __len__(self) -> int:
        return len(self.expected)

    def __getitem__(self, name: str) -> np.ndarray:
        made = self._scales[name] if name.endswith(".scale") else self._make(name)
        self._done += made.nbytes
        self._progress(self._done, self._total)
        return made

    def _make(self, name: str) -> np.ndarray:
        kind, shape = self.expected[name]
        weight = self._source.weights[name]
        scale = name.removesuffix("weight") + "scale"
        if kind is np.uint8:
            made, alpha = packed(weight)
            self._scales[scale] = np.array([alpha], np.float32)
            return made
        if isinstance(weight, Ternary):
            raise RefusedError(f"{name} is ternary, but {self._source.origin} is float32 there")
        if kind is np.int8:
            linear, config = name.endswith("_proj.weight"), self._config
            if config.hadamard if linear else config.rotated_head:
                weight = rotated(weight)
            bits = HEAD_BITS["int8" if linear else config.head_format]
            made, self._scales[scale] = integer_rows(weight, bits)
            return made
        made = np.empty(shape, kind)
        for first, end in pieces(weight.shape):
            part = weight.rows(first, end)
            try:
                made[first:end] = stored(part, kind)
            except ValueError as error:
                raise RefusedError(f"{name} {error}: choose another head format") from None
        return made


def rotated(weight: Floats) -> Floats:
    """The matrix that gives the same product with inputs turned by SPEC 5.3."""
    return replace(weight, rows=lambda first, end: rotate_unpadded(weight.rows(first, end)))


def packed(weight: Floats | Ternary) -> tuple[np.ndarray, np.float32]:
    """Codes as FORMAT 2 packs them, uint8 [out, bytes], and alpha; floats by SPEC 4.1."""
    if isinstance(weight, Floats):
        codes, alpha = quantize_weights(weight.whole())
        return pack_ternary(codes), alpha
    rows, width = weight.shape
    made = np.empty((rows, packed_width(width)), np.uint8)
    for first, end in pieces(weight.shape):
        made[first:end] = pack_ternary(weight.codes(first, end))
    return made, weight.alpha


def integer_rows(weight: Floats, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """SPEC 4.4: codes int8 [V, D] and scales f32 [V].

    A row that is whole multiples of a step already keeps that step, which dividing its largest
    value by the largest code would miss by a last bit.
    """
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty(weight.shape[0], np.float32)
    for first, end in pieces(weight.shape):
        part = weight.rows(first, end)
        found, step = quantize_activations(part, bits)
        down, up = np.nextafter(step, np.float32(0)), np.nextafter(step, np.float32(1))
        for other in (up, down, step):  # the last that fits stays
            same = (found * other == part).all(-1, keepdims=True)
            step = np.where(same, other, step)
        codes[first:end], scales[first:end] = found, step[:, 0]
    return codes, scales


def _report(source: Source, config: ModelConfig) -> Report:
    """What became of the weights, beside what the reader said."""
    kept, converted = list(source.report.kept), list(source.report.converted)
    if source.sampling:
        said = ", ".join(f"{name} {value:g}" for name, value in source.sampling.items())
        kept.append(f"recommended sampling: {said}")
    linear = {
        (w.stored, isinstance(w, Ternary))
        for name, w in source.weights.items()
        if name.endswith("_proj.weight")
    }
    for word, codes in sorted(linear):
        if codes:
            kept.append(f"linear weights: codes and scales ({word})")
        elif config.linear == "ternary":
            converted.append(f"linear weights: {word} masters to ternary (SPEC 4.1)")
        elif config.linear == "int8":
            turned = ", rotated (SPEC 5.3)" if config.hadamard else ""
            converted.append(f"linear weights: {word} to int8 rows{turned}")
        else:
            kept.append(f"linear weights: {word} as float32")
    words = vocabulary_types(source.weights)
    same = config.head_format in ("float32", lossless_head(source.weights))
    how = f"{' and '.join(words)} {'as' if same else 'to'} {config.head_format}"
    (kept if same else converted).append(f"embedding and head: {how}")
    return replace(source.report, kept=tuple(kept), converted=tuple(converted))
