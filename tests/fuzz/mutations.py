"""Random damage that knows the structure: of JSON, of bytes, of safetensors files."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

Place = tuple[Any, ...]

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 4096, 1 << 15, 1 << 16, (1 << 24) - 1, 1 << 24,
    (1 << 24) + 1, 1 << 31, 1 << 32, 1 << 53, 1 << 63, -(1 << 63), 1 << 64, 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-38, 1e-45, 5e-324, 1e38, 3.4e38, 1e308, float("inf"),
    float("-inf"), float("nan"), "", "a", "0", "null", "é\x00\x1b[2J", "x" * 5000, "\ufffd",
    "../..", [], {}, [[]], [{}], {"": None}, [0] * 2000, [10**30] * 300, ["a", 1, None],
]  # fmt: skip
"""Values that no rule expects, or that lie at the edge of one."""


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(tree: Any, most: int = 12) -> list[Place]:
    """Where values are in a JSON tree; of long lists and objects only some."""
    found: list[Place] = []
    left: list[tuple[Any, Place]] = [(tree, ())]
    while left:
        value, at = left.pop()
        found.append(at)
        if isinstance(value, dict):
            keys = list(value)
        elif isinstance(value, list):
            keys = list(range(len(value)))
        else:
            continue
        if len(keys) > most:
            keys = keys[: most // 2] + keys[-(most // 2) :]
        left += [(value[key], (*at, key)) for key in keys]
    return found[1:]


def get(tree: Any, place: Place) -> Any:
    """The value at a place."""
    for key in place:
        tree = tree[key]
    return tree


def mutate_tree(draw: random.Random, tree: Any, others: list[Any] | None = None) -> Any:
    """A JSON value, changed in one to three places; `others`: trees whose parts may be put in."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        found = places(tree)
        if not found:
            return draw.choice(ODD)
        place = draw.choice(found)
        parent, key, kind = get(tree, place[:-1]), place[-1], draw.randrange(10)
        old = parent[key]
        if kind < 4:
            parent[key] = copy.deepcopy(draw.choice(ODD))
        elif kind == 4 and type(old) in (int, float):
            step = draw.choice([-1, 1, 0.5])
            with suppress(OverflowError):  # 10**400 + 0.5
                parent[key] = old + step if draw.random() < 0.5 else old * 2
        elif kind == 5:
            parent.pop(key)
        elif kind == 6 and isinstance(parent, dict):
            parent[draw.choice(["", "extra", "x" * 300, *map(str, parent)])] = old
        elif kind == 7:
            parent[key] = nested(draw.choice([3, 60, 300]))
        elif kind == 8 and others:
            other = draw.choice(others)
            parent[key] = copy.deepcopy(get(other, draw.choice([(), *places(other)])))
        else:
            with suppress(RecursionError):  # a nest in a nest
                parent[key] = copy.deepcopy(get(tree, draw.choice(found)))
    return tree


def mutate_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Bytes flipped, cut out, doubled, put in, cut off or added."""
    out = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        size = len(out)
        at = draw.randrange(size + 1) if draw.random() < 0.5 else draw.randrange(min(size, 200) + 1)
        run = draw.choice([1, 1, 2, 8, 64])
        kind = draw.randrange(7)
        if kind == 0 and at < size:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at : at + run] = bytes(draw.choices((0, 1, 127, 128, 255), k=run))
        elif kind == 2:
            del out[at : at + run]
        elif kind == 3:
            out[at:at] = out[at : at + run] * draw.choice([1, 2, 50])
        elif kind == 4:
            out[at:at] = draw.randbytes(run)
        elif kind == 5:
            del out[at:]
        else:
            out += draw.randbytes(run)
    return bytes(out)


def dumped(draw: random.Random, tree: Any) -> bytes:
    """JSON text, at times not quite."""
    form = {"ensure_ascii": draw.random() < 0.5, "indent": 1 if draw.random() < 0.05 else None}
    try:
        text = json.dumps(tree, **form)
    except RecursionError:  # a tree that was read may be deeper than one that can be written
        text = "[" * 5000 + "]" * 5000
    raw = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.05:
        raw = b"\xef\xbb\xbf" + raw
    if draw.random() < 0.03:
        raw = draw.choice([b"[" * 50_000, b'{"a":' * 20_000, b"", b"\xff\xfe", b"9" * 6000, b"NaN"])
    return mutate_bytes(draw, raw) if draw.random() < 0.1 else raw


def mutate_safetensors(draw: random.Random, raw: bytes) -> bytes:
    """The header changed as a tree, as bytes, or its length; or the data."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    kind = draw.randrange(6)
    try:
        tree = json.loads(header)
    except (ValueError, RecursionError):
        kind = 5  # it was damaged before
    if kind < 3:
        header = dumped(draw, mutate_tree(draw, tree))
        length = len(header)
    elif kind == 3:
        length = draw.choice([0, 1, length - 1, length + 1, length * 2, 1 << 31, (1 << 64) - 1])
    elif kind == 4:
        at = draw.randrange(len(data) + 1)
        word = draw.choice([b"\xff\xff\x7f\x7f", b"\0\0\x80\x7f", b"\x01\0\0\0", b"\xff" * 4])
        data = data[:at] + word * draw.choice([1, 20]) + data[at:]
        data = data[: len(raw) - 8 - length]
    else:
        return mutate_bytes(draw, raw)
    return struct.pack("<Q", length) + header + data


def put_odd_file(draw: random.Random, path: Path) -> None:
    """What is no regular file, or an empty one, or none at all, where a file should be."""
    kind = draw.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.name)  # to itself
    elif kind == 3:
        path.write_bytes(b"")
