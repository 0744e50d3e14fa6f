"""A model folder written as a GGUF file for llama.cpp."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bitskip_export.foreign.convert import Progress
from bitskip_export.foreign.gguf_file import (
    ARRAY,
    LLAMA3,
    MAGIC,
    Q2_0,
    Q2_0_BLOCK,
    ROPE_FACTORS,
    STRING,
    frequency_factors,
    written_name,
)
from bitskip_export.foreign.gguf_read import OURS, from_pairs
from bitskip_export.foreign.gguf_words import words_of
from bitskip_export.foreign.given import Given, at_exit
from bitskip_export.foreign.source import RefusedError, Report
from bitskip_export.pack import ExportError
from bitskip_ref.config import ModelConfig
from bitskip_ref.files import replace_file
from bitskip_ref.floats import BFLOAT16, stored
from bitskip_ref.folder import Folder
from bitskip_ref.tensors import parameter_shapes

ALIGNMENT = 32
F32, F16, BF16, TQ2_0 = 0, 1, 30, 35  # ggml's numbers of tensor types
FLOATS: dict[type, int] = {np.float32: F32, np.float16: F16, BFLOAT16: BF16}
TQ2_0_BLOCK = 256
FILE_TYPES = {F32: 0, F16: 1, TQ2_0: 37, Q2_0: 0}  # general.file_type; the last has none known


@dataclass(frozen=True)
class Entry:
    """A tensor to write: rows of a type, given piece by piece."""

    kind: int
    shape: tuple[int, ...]  # slowest first
    size: int  # bytes
    pieces: Iterable[np.ndarray]


def write_gguf(
    folder: Folder,
    out: Path,
    *,
    exit_layer: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Write blocks 1..exit_layer (None: all) as one file, whole or not at all.

    Ternary codes are exact and so are their scales, which stand beside them as `.scale` tensors.
    Raises RefusedError, naming what llama.cpp does not compute, and ExportError for a place that
    holds something else, before anything is written.
    """
    if out.is_dir() or (out.exists() and out.suffix != ".gguf" and not force):
        raise ExportError(f"{out} is there and no GGUF file: choose another name with -o")
    model = at_exit(folder, exit_layer)
    architecture = architecture_of(model.config)
    metadata = _metadata(model, architecture, exit_layer)
    entries = dict(_entries(model, architecture))
    kinds = {e.kind for n, e in entries.items() if n.startswith("blk.") and len(e.shape) == 2}
    metadata["general.file_type"] = FILE_TYPES[max(kinds)]
    with replace_file(out) as file:
        write_container(file, metadata, entries, progress)
    return model.report("llama.cpp quantizes them by blocks, or not at all")


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name of the graph that computes this. Raises RefusedError if none does."""
    for wrong, what in (
        (config.norm != "rms", f"norm = {config.norm!r}: layer norms"),
        (config.norm_position != "pre", "norm_position = 'post': norms after each block's parts"),
        (config.hadamard, "hadamard: a rotation before each linear"),
        (config.embedding_norm, "embedding_norm: a norm after the embedding"),
        (config.ffn != "swiglu", f"ffn = {config.ffn!r}: the graph has SiLU built in"),
        (
            config.rope_scaling not in ("none", "linear", "llama3"),
            f"rope_scaling = {config.rope_scaling!r}",
        ),
        (
            config.linear == "ternary" and config.activation_bits != 8,
            f"activation_bits = {config.activation_bits}: activations of other than 8 bits",
        ),
        (config.sub_norm and not config.tie_word_embeddings, "sub_norm with a head of its own"),
        (config.sub_norm and config.attention_size != config.hidden_size,
         "sub_norm with heads wider than the model"),
        (config.sub_norm and (config.qk_norm or config.biases != "none"),
         "sub_norm with biases or norms of each head"),
        (config.qk_norm and config.biases != "none", "qk_norm with biases"),
        (config.rope_scaling == "llama3"
         and (config.sub_norm or config.qk_norm or config.biases == "qkv"),
         "rope_scaling = 'llama3' with sub_norm, qk_norm or biases of q, k, v alone"),
    ):  # fmt: skip
        if wrong:
            raise RefusedError(f"{what}: no graph of llama.cpp computes that, so not exported")
    if config.sub_norm:
        return "bitnet"
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.biases == "qkv" else "llama"


def described(c: ModelConfig, architecture: str) -> dict[str, Any]:
    """The keys that tell llama.cpp a model's shape."""
    found: dict[str, Any] = {
        "general.architecture": architecture,
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
    }
    own: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
    }
    if c.rope_scaling == "linear" or architecture == "bitnet":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.rope_factor}
    return found | {f"{architecture}.{key}": value for key, value in own.items()}


def _metadata(model: Given, architecture: str, exit_layer: int | None) -> dict[str, Any]:
    c, folder = model.config, model.folder
    found = described(c, architecture) | words_of(folder, c.vocab_size)
    carried: dict[str, Any] = {"head_format": c.head_format}
    if c.rope_scaling == "llama3":
        carried |= {key: getattr(c, key) for key in LLAMA3}
    if exit_layer is None:
        carried |= {"exit_layer": folder.exit_layer, "draft_vocab": folder.draft_vocab}
    return found | {f"{OURS}.{k}": v for k, v in carried.items() if v is not None}


def _entries(model: Given, architecture: str) -> Iterator[tuple[str, Entry]]:
    """Name -> tensor, in our file order; nothing of it is made yet."""
    c = model.config
    if c.rope_scaling == "llama3":
        yield ROPE_FACTORS, Entry(F32, (c.head_dim // 2,), 2 * c.head_dim, [frequency_factors(c)])
    for name, shape in parameter_shapes(c).items():
        order = None
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            order = np.argsort(from_pairs(shape[0], c.head_dim))  # ours of each row of the file
        theirs = written_name(name)
        if c.linear == "ternary" and name.endswith("_proj.weight"):
            kind, row_bytes = ternary_kind(shape[1])
            yield theirs, Entry(kind, shape, shape[0] * row_bytes, _codes(model, name, order, kind))
            scale = name.removesuffix("weight") + "scale"
            yield written_name(scale), Entry(F32, (1,), 4, _alpha(model, name))
            continue
        dtype = model.written_kind(name)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        yield theirs, Entry(FLOATS[dtype], shape, size, _floats(model, name, order, dtype))


def ternary_kind(width: int) -> tuple[int, int]:
    """(type, bytes of a row) of the smallest in which rows of so many codes are exact."""
    if width % TQ2_0_BLOCK == 0:
        return TQ2_0, width // TQ2_0_BLOCK * 66
    if width % Q2_0_BLOCK == 0:
        return Q2_0, width // Q2_0_BLOCK * 18
    return F16, 2 * width


def _codes(model: Given, name: str, order: np.ndarray | None, kind: int) -> Iterator[np.ndarray]:
    codes = model.codes(name)
    yield pack_blocks(codes if order is None else codes[order], kind)


def _alpha(model: Given, name: str) -> Iterator[np.ndarray]:
    yield np.array([model.alpha(name)], np.float32)


def _floats(model: Given, name: str, order: np.ndarray | None, dtype: type) -> Iterator[np.ndarray]:
    if order is None:
        yield from (stored(piece, dtype) for piece in model.pieces(name))
    else:
        yield stored(model.rows(name, 0, len(order))[order], dtype)


def pack_blocks(codes: np.ndarray, kind: int) -> np.ndarray:
    """int8 [out, in] in -1..1 as blocks of scale 1 of a type, uint8 [out, bytes] (INTEROP 4)."""
    if kind == F16:
        return codes.astype(np.float16).view(np.uint8)
    whole, rows = (codes + 1).astype(np.uint8), len(codes)
    one = np.array([1], np.float16).view(np.uint8)
    blocks: list[np.ndarray]
    if kind == TQ2_0:  # two halves of 32 bytes; byte m: bits 2n hold weight 32 n + m
        planes = whole.reshape(rows, -1, 2, 4, 32)
        packed = np.bitwise_or.reduce([planes[..., n, :] << np.uint8(2 * n) for n in range(4)])
        blocks = [packed.reshape(rows, -1, 64), np.broadcast_to(one, (rows, planes.shape[1], 2))]
    else:  # Q2_0: the scale first; byte j / 4, bits 2 (j % 4)
        fours = whole.reshape(rows, -1, 16, 4)
        packed = np.bitwise_or.reduce([fours[..., n] << np.uint8(2 * n) for n in range(4)])
        blocks = [np.broadcast_to(one, (rows, fours.shape[1], 2)), packed]
    return np.concatenate(blocks, -1).astype(np.uint8).reshape(rows, -1)


# ---- the container --------------------------------------------------------------------


def write_container(
    file: IO[bytes],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Entry],
    progress: Progress = lambda done, total: None,
) -> None:
    """GGUF version 3: keys, table and data of tensors, each from a multiple of ALIGNMENT on.

    Not by the package `gguf`, which does not know Q2_0 and holds all tensors until it writes.
    """
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _value(value)]
    offset = 0
    for name, entry in tensors.items():
        axes = entry.shape[::-1]
        header += [
            _text(name), struct.pack(f"<I{len(axes)}Q", len(axes), *axes),
            struct.pack("<IQ", entry.kind, offset),
        ]  # fmt: skip
        offset += _aligned(entry.size)
    whole = b"".join(header)
    file.write(whole.ljust(_aligned(len(whole)), b"\0"))
    done = 0
    for name, entry in tensors.items():
        written = 0
        for piece in entry.pieces:
            file.write(np.ascontiguousarray(piece).data)
            written += piece.nbytes
            progress(done + written, offset)
        assert written == entry.size, name
        file.write(b"\0" * (_aligned(written) - written))
        done += _aligned(written)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value behind its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, np.ndarray):  # int32
        return struct.pack("<IIQ", ARRAY, 5, len(value)) + value.astype("<i4").tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
