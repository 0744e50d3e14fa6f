"""Reading and writing a safetensors file.

Not by its library, because the data must start at a multiple of 64 bytes, keep its order, and be
mapped without a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_ref.excerpt import shown
from bitskip_ref.files import replace_file
from bitskip_ref.floats import BFLOAT16
from bitskip_ref.tensors import FormatError

DTYPES: dict[str, type] = {
    "U8": np.uint8, "I8": np.int8, "F32": np.float32, "F16": np.float16, "BF16": BFLOAT16,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
ALIGNMENT = 64
ENTRY = 192  # most bytes of the header for a tensor; about 120 are usual
REST = 1 << 16  # and for its metadata

# What may stand in the header for one tensor: it bounds the memory that reading it takes.
RANK = 2  # axes that a tensor of a model has at most
SIGNS = {b"{": 1, b"[": 2, b",": 8, b":": 4}


def read_tensors(path: Path, most: int = 4096) -> dict[str, np.ndarray]:
    """Map a safetensors file of at most `most` tensors.

    Raises FormatError if header, offsets or length are off.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise FormatError(f"{path}: truncated, the header does not fit the file")
        if length > most * ENTRY + REST:
            raise FormatError(
                f"{path}: the header has {length} bytes, more than {most} tensors need"
            )
        raw = file.read(length)
    if any(raw.count(sign) > most * n + REST for sign, n in SIGNS.items()):
        raise FormatError(f"{path}: the header holds more than {most} tensors need")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [(n, e["dtype"], e["shape"], e["data_offsets"]) for n, e in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{path}: the header is not that of a safetensors file") from None
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))[8 + length :]  # its slices are slow
    tensors, end = {}, 0
    for name, dtype, shape, offsets in entries:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FormatError(
                f"{path}: {shown(name)} has dtype {shown(dtype)}, known: {', '.join(DTYPES)}"
            )
        # Sizes first: a product of thousands of large numbers would take minutes.
        kind = np.dtype(DTYPES[dtype])
        count = kind.itemsize
        natural = _numbers(shape, RANK, data.size) and _numbers(offsets, 2, data.size)
        if natural:
            count *= math.prod(shape)
        if not natural or offsets != [end, end + count] or end + count > data.size:
            raise FormatError(
                f"{path}: {shown(name)} does not lie where the header says, or is cut off"
            )
        raw_tensor = data[end : end + count]
        if (8 + length + end) % kind.itemsize:
            raw_tensor = raw_tensor.copy()  # a view would be unaligned
        tensors[name] = raw_tensor.view(kind).reshape(shape)
        end += count
    if end != data.size:
        raise FormatError(f"{path}: {data.size - end} bytes after the last tensor")
    return tensors


def _numbers(values: object, most: int, largest: int) -> bool:
    """Whether `values` is a list of at most `most` integers in 0..largest."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(n) is int and 0 <= n <= largest for n in values)
    )


def give_back(array: np.ndarray) -> None:
    """Let the system take back the memory of a mapped file's part; it is mapped anew when read."""
    if array.nbytes < mmap.PAGESIZE:
        return
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise"):
        return
    offset = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (offset + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        base.madvise(mmap.MADV_DONTNEED, start, size)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[type, tuple[int, ...]]],
    pieces: Iterable[np.ndarray],
    metadata: str = "bitskip",
) -> str:
    """Write a safetensors file whose data starts at a multiple of 64. Returns its SHA-256.

    shapes: name -> (dtype, shape), in file order. pieces: the tensors in that order, or their parts
    by rows; taken one by one, so that they need not be in memory together. metadata: the format
    that the header names. Raises ValueError, and writes nothing, if the pieces are not as long as
    the shapes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": metadata}}
    end = 0
    for name, (kind, shape) in shapes.items():
        size = np.dtype(kind).itemsize * math.prod(shape)
        header[name] = {
            "dtype": DTYPE_NAMES[np.dtype(kind)],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()

    with replace_file(path) as file:
        head = struct.pack("<Q", len(text)) + text
        for part in chain((head,), pieces):
            raw = part if isinstance(part, bytes) else np.ascontiguousarray(part).data.cast("B")
            digest.update(raw)
            file.write(raw)
            del part, raw  # before the next is made
        if file.tell() != len(head) + end:
            raise ValueError(f"{path}: {file.tell() - len(head)} bytes of tensors, expected {end}")
    return digest.hexdigest()
