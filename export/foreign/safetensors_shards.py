"""Safetensors files as other programs write them: any order, bfloat16, several files."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from bitskip_export.foreign.source import Floats, RefusedError, refuse_overlaps
from bitskip_ref.excerpt import shown
from bitskip_ref.floats import BFLOAT16, widened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RANK = 4  # axes that a tensor has at most
LARGEST_JSON = 8 << 20  # bytes of a header or a file beside it; parsed it takes many times that
# The file's word -> what NumPy maps it as.
KINDS = {
    "F32": np.float32, "F16": np.float16, "BF16": BFLOAT16, "U8": np.uint8, "I8": np.int8,
    "F64": np.float64, "I32": np.int32, "I64": np.int64, "BOOL": np.uint8,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")


class Stored:
    """One tensor where it lies in a mapped file, maybe at no multiple of its type's size."""

    def __init__(self, name: str, file: Path, dtype: str, values: np.ndarray) -> None:
        self.name, self.file, self.dtype, self.values = name, file, dtype, values
        self.shape: tuple[int, ...] = values.shape

    def floats(self) -> Floats:
        """As float32 when read. Raises RefusedError for integers."""
        if self.dtype not in FLOATS:
            raise RefusedError(f"{self.file}: {self.name} holds {self.dtype}, not floats")
        if not self.shape:
            raise RefusedError(f"{self.file}: {self.name} has no dimension")
        return Floats(self.shape, self.dtype, self._rows)

    def _rows(self, first: int, end: int) -> np.ndarray:
        part = self.values[first:end]
        if self.dtype == "BF16":
            part = widened(part)
        part = np.array(part, np.float32)
        if not np.isfinite(part).all():
            raise RefusedError(f"{self.file}: {self.name} holds a value that is not finite")
        return part


def open_shards(root: Path) -> dict[str, Stored]:
    """Name -> tensor of a folder's `model.safetensors`, or of the files that its index names.

    Raises RefusedError for missing files and for headers that do not fit their file.
    """
    if (root / SINGLE).is_file():
        files = [root / SINGLE]
    elif (root / INDEX).is_file():
        places = read_json(root / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise RefusedError(f"{root / INDEX}: has no weight_map of tensor to file")
        names = sorted(set(places.values()))
        if odd := [n for n in names if Path(n).name != n]:
            raise RefusedError(f"{root / INDEX}: {odd[0]!r} is not the name of a file beside it")
        files = [root / name for name in names]
    else:
        other = sorted(p.name for p in root.glob("*.bin"))[:1] + sorted(
            p.name for p in root.glob("*.pt*")
        )
        hint = f" ({other[0]} is a pickle, which can run code: convert it first)" if other else ""
        raise RefusedError(f"{root} lacks {SINGLE} and {INDEX}{hint}")
    tensors: dict[str, Stored] = {}
    for file in files:
        for stored in _open(file):
            if stored.name in tensors:
                raise RefusedError(f"{file}: {stored.name} is in {tensors[stored.name].file}, too")
            tensors[stored.name] = stored
    return tensors


def _open(path: Path) -> list[Stored]:
    if not os.path.isfile(path):  # False, too, for a name that no system takes
        raise RefusedError(f"{path.parent} lacks {shown(path.name)}, which its index names")
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, LARGEST_JSON):
            raise RefusedError(f"{path}: truncated, the header does not fit the file")
        header = parse_json(file.read(length), f"{path}: the header")
    header.pop("__metadata__", None)
    if not header:
        raise RefusedError(f"{path}: holds no tensor")
    data = np.memmap(path, np.uint8, mode="r")[8 + length :]
    tensors, places = list[Stored](), list[tuple[int, int, str]]()
    for name, entry in header.items():
        place = f"{path}: {shown(name)}"
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = (*shape, start, end)
            natural = isinstance(shape, list) and len(shape) <= RANK
            natural &= all(type(n) is int and 0 <= n <= data.size for n in numbers)
        except (TypeError, KeyError, ValueError):
            raise RefusedError(f"{place}: its entry in the header is damaged") from None
        if not isinstance(dtype, str) or dtype not in KINDS:
            raise RefusedError(
                f"{path}: {shown(name)} has dtype {shown(dtype)}, known: {', '.join(KINDS)}"
            )
        size = np.dtype(KINDS[dtype]).itemsize
        if not natural or end - start != size * math.prod(shape):
            raise RefusedError(
                f"{path}: {shown(name)} does not lie where the header says, or is cut off"
            )
        places.append((start, end, name))
        part = data[start:end].view(KINDS[dtype])
        tensors.append(Stored(name, path, dtype, part.reshape(shape)))
    refuse_overlaps(path, places)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most LARGEST_JSON bytes. Raises RefusedError."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise RefusedError(f"{path}: cannot be read (no such file)")
        if path.stat().st_size > LARGEST_JSON:
            raise RefusedError(f"{path}: has more than {LARGEST_JSON} bytes")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(text: bytes, place: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises RefusedError, also for nesting without end."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise RefusedError(f"{place} cannot be read as JSON") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{place} must hold a JSON object")
    return value
