"""The container of GGUF files, read with every length checked before it is believed.

Not by the package `gguf`, which keeps an array object for every string and believes counts; its
dequantizers are used (`Tensor.floats`).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_export.foreign.source import Floats, RefusedError, refuse_overlaps
from bitskip_ref import rope
from bitskip_ref.config import ModelConfig
from bitskip_ref.excerpt import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRINGS = 1 << 21  # most strings of all arrays; a vocabulary's merges are the most
TENSORS = 1 << 16
KEYS = 1 << 12
NUMBERS = {  # value type -> its NumPy type
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9
Q2_0, Q2_0_BLOCK, Q2_0_BYTES = 42, 64, 18  # a type that the package does not know
I2_S, I2_S_BLOCK, I2_S_BYTES = 36, 128, 32  # of bitnet.cpp; behind all blocks 32 bytes more, which
# begin with the matrix's scale, a float32

# Ours -> theirs. One table for reading and writing.
BLOCK = {
    "attn_norm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "attn_sub_norm": "attn_sub_norm", "ffn_norm": "ffn_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "ffn_sub_norm": "ffn_sub_norm",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"  # f32 [E/2]: frequencies are divided by these
LLAMA3 = (
    "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context",
)  # fmt: skip
TOP = {"embed_tokens": "token_embd", "final_norm": "output_norm", "lm_head": "output"}


def written_name(name: str) -> str:
    """`layers.3.q_proj.weight` -> `blk.3.attn_q.weight`."""
    *layer, part, leaf = name.split(".")
    return f"blk.{layer[1]}.{BLOCK[part]}.{leaf}" if layer else f"{TOP[part]}.{leaf}"


def frequency_factors(config: ModelConfig) -> np.ndarray:
    """ROPE_FACTORS of a model, f32 [E/2]."""
    return rope.frequency_factors(config).astype(np.float32)


@dataclass(frozen=True)
class Tensor:
    """One tensor where it lies in the mapped file."""

    name: str
    kind: str  # as ggml calls it: F32, Q4_0, TQ2_0, ...
    shape: tuple[int, ...]  # slowest first, as NumPy has it
    data: np.ndarray  # u8 [rows, bytes of a row]
    scale: float = 1.0  # of I2_S: its codes are multiplied by it

    def floats(self, order: np.ndarray | None = None) -> Floats:
        """Its values; order: which row of the file each row is, int [rows]."""

        def rows(first: int, end: int) -> np.ndarray:
            if len(self.shape) == 1:
                part = _dequantize(self.data[0], self.kind)
                part = (part if order is None else part[order])[first:end]
            else:
                raw = self.data[first:end] if order is None else self.data[order[first:end]]
                part = _dequantize(raw, self.kind)
            part = np.array(part * self.scale, np.float32)
            if not np.isfinite(part).all():
                raise RefusedError(f"{shown(self.name)} holds a value that is not finite")
            return part

        return Floats(self.shape, self.kind, rows)


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors by name. Raises RefusedError for what breaks the format."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise RefusedError(f"{path} is empty") from None
    reader = _Reader(mapped, path)
    if reader.take(4) != MAGIC:
        raise RefusedError(f"{path} is not a GGUF file")
    version = reader.number("<u4")
    if version not in VERSIONS:
        raise RefusedError(f"{path}: GGUF version {version}, known: {VERSIONS} (little-endian)")
    tensor_count = reader.count("<u8", 24, TENSORS, "tensors")
    key_count = reader.count("<u8", 12, KEYS, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string()
        if key in metadata:
            raise RefusedError(f"{path}: the key {shown(key)} is there twice")
        metadata[key] = reader.value(reader.number("<u4"))
    parts = metadata.get("split.count", 1)
    if type(parts) is not int or parts != 1:
        raise RefusedError(f"{path} is one of {shown(parts)} parts: merge them first")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in {1 << n for n in range(3, 17)}:
        raise RefusedError(f"{path}: alignment {shown(alignment)} is no power of two from 8 on")
    entries = [reader.tensor() for _ in range(tensor_count)]
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, shape, number, offset in entries:
        if name in tensors:
            raise RefusedError(f"{path}: the tensor {shown(name)} is there twice")
        kind, block, size = _kind(number, path, name)
        if shape[-1] % block:
            raise RefusedError(
                f"{path}: {shown(name)} has rows of {shape[-1]} weights, {kind} holds {block}s"
            )
        row_bytes, rows = shape[-1] // block * size, math.prod(shape[:-1])
        first, end = start + offset, start + offset + row_bytes * rows
        behind = I2_S_BYTES if number == I2_S else 0
        if offset % alignment or end + behind > len(mapped):
            raise RefusedError(f"{path}: {shown(name)} does not lie in the file, or is cut off")
        data = np.frombuffer(mapped, np.uint8, end - first, first).reshape(rows, row_bytes)
        scale = float(np.frombuffer(mapped, "<f4", 1, end)[0]) if behind else 1.0
        tensors[name] = Tensor(name, kind, shape, data, scale)
        places.append((first, end + behind, name))
    refuse_overlaps(path, places)
    return metadata, tensors


def _dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """u8 [..., bytes] of a type -> f32 [..., n]."""
    if kind == "Q2_0":  # a float16 d, then 64 codes of 2 bits, the first lowest: (code - 1) d
        blocks = raw.reshape(*raw.shape[:-1], -1, Q2_0_BYTES)
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
        codes = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
        values = (codes.astype(np.float32) - 1) * scale[..., None]
        return values.reshape(*raw.shape[:-1], -1)
    if kind == "I2_S":  # byte p: codes of weights p, p + 32, p + 64, p + 96, the first highest
        blocks = raw.reshape(*raw.shape[:-1], -1, 1, I2_S_BYTES)
        fours = (blocks >> np.array([6, 4, 2, 0], np.uint8)[:, None]) & np.uint8(3)
        return fours.reshape(*raw.shape[:-1], -1).astype(np.float32) - np.float32(1)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    found: np.ndarray = dequantize(raw, GGMLQuantizationType[kind])
    return found


def _kind(number: int, path: Path, name: str) -> tuple[str, int, int]:
    """(name, weights in a block, its bytes) of a tensor type."""
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if number == Q2_0:
        return "Q2_0", Q2_0_BLOCK, Q2_0_BYTES
    if number == I2_S:
        return "I2_S", I2_S_BLOCK, I2_S_BYTES
    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, size), np.uint8), kind)  # it knows types that it cannot read
    except (ValueError, KeyError, NotImplementedError):
        raise RefusedError(
            f"{path}: {shown(name)} is of type {number}, which the package gguf cannot read"
        ) from None
    return kind.name, block, size


class _Reader:
    """A cursor in a file that does not go beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.strings = STRINGS  # that arrays may still have

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise RefusedError(f"{self.path}: cut off, or a length in it lies")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self, kind: str, least: int, most: int, what: str) -> int:
        """A number of things of at least so many bytes each."""
        n = int(self.number(kind))
        if n > min(most, (len(self.data) - self.at) // least):
            raise RefusedError(f"{self.path}: tells of {n} {what}: cut off, or the number lies")
        return n

    def string(self) -> str:
        (size,) = struct.unpack("<Q", self.take(8))
        return self.take(size).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise RefusedError(f"{self.path}: a value of unknown type {kind}")
        inner = self.number("<u4")
        if inner in NUMBERS:
            dtype = np.dtype(NUMBERS[inner])
            n = self.count("<u8", dtype.itemsize, 1 << 40, "numbers")
            return np.frombuffer(self.take(n * dtype.itemsize), dtype)
        if inner != STRING:
            raise RefusedError(f"{self.path}: an array of unknown type {inner}")
        n = self.count("<u8", 8, self.strings, "strings")
        self.strings -= n
        return [self.string() for _ in range(n)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape slowest first, type, offset) of one tensor."""
        name, axes = self.string(), self.number("<u4")
        if not 1 <= axes <= 4:
            raise RefusedError(f"{self.path}: {shown(name)} has {axes} axes")
        shape = tuple(int(n) for n in np.frombuffer(self.take(8 * axes), "<u8"))[::-1]
        if not all(1 <= n <= 1 << 32 for n in shape):
            raise RefusedError(f"{self.path}: {shown(name)} has the shape {list(shape)}")
        return name, shape, self.number("<u4"), int(self.number("<u8"))
