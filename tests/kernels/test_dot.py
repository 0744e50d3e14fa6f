"""Integer products: every tile of this machine's path and of the plain one, at the extremes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from bitskip_cpu.isa import PATH
from bitskip_cpu.kernels import dot_plain
from bitskip_cpu.kernels.linear import unpack
from bitskip_ref.packing import pack_ternary, packed_width
from tests.kernels.calling import call, same_bits

MODULES = [dot_plain]
if PATH != "plain":
    from bitskip_cpu.kernels import dot_simd

    MODULES.append(dot_simd)

STRIDE = 16  # int32 from one token's sums to the next


def tile(
    kernel: Callable[..., None], rows: np.ndarray, columns: np.ndarray, steps: int, outer: int
) -> np.ndarray:
    """Sums [tokens, weight rows] of one tile; borders repeat the last row and column."""
    out = np.full((4, STRIDE), 12345, np.int32)
    call(kernel, rows, rows.strides[0], len(rows) - 1, columns, columns.strides[0],
         len(columns) - 1, steps, out, 4 * STRIDE)  # fmt: skip
    return out[:outer]


def weights(kind: str, rows: int, width: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(0).integers(-1, 2, (rows, width)).astype(np.int8)
    return np.full((rows, width), {"plus": 1, "minus": -1, "zero": 0}[kind], np.int8)


def activations(kind: str, count: int, width: int) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(1).integers(-127, 128, (count, width)).astype(np.int8)
    return np.full((count, width), 127 if kind == "plus" else -127, np.int8)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("width", [1, 64, 255, 256, 257, 2048])
@pytest.mark.parametrize("w", ["random", "plus", "minus", "zero"])
@pytest.mark.parametrize("x", ["random", "plus", "minus"])
def test_ternary_tiles(module: ModuleType, width: int, w: str, x: str) -> None:
    padded = packed_width(width) * 4
    for name, rows, tokens in (
        ("packed_4x1", 4, 1), ("packed_4x1", 3, 1), ("packed_2x2", 2, 2), ("packed_2x2", 1, 2),
        ("packed_1x4", 1, 4), ("packed_1x4", 1, 3), ("bytes_4x4", 4, 4), ("bytes_4x4", 3, 2),
    ):  # fmt: skip
        values, codes = weights(w, rows, width), np.zeros((tokens, padded), np.int8)
        codes[:, :width] = activations(x, tokens, width)
        packed = pack_ternary(values)
        if name == "bytes_4x4":
            matrix, steps = np.zeros((rows, padded), np.uint8), padded // 64
            for i in range(rows):
                call(unpack, packed[i], packed.shape[1], matrix[i])
        else:
            matrix, steps = packed, packed.shape[1] // 64
        found = tile(getattr(module, name), matrix, codes, steps, tokens)[:, :rows]
        exact = codes[:, :width].astype(np.int32) @ values.T.astype(np.int32)
        offset = codes.sum(axis=1, keepdims=True, dtype=np.int32)  # weights count as w + 1
        assert same_bits(exact + offset, found), name


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("width", [64, 128, 2048])
@pytest.mark.parametrize("w", ["random", "plus", "minus", "zero"])
@pytest.mark.parametrize("x", ["random", "plus", "minus"])
def test_head_tiles(module: ModuleType, width: int, w: str, x: str) -> None:
    for name, tokens, rows in (
        ("head_1x4", 1, 4), ("head_1x4", 1, 2), ("head_4x4", 4, 4), ("head_4x4", 3, 1),
    ):  # fmt: skip
        codes = activations(x, tokens, width)
        heads = activations("random", rows, width) if w == "random" else weights(w, rows, width)
        heads = heads if w == "random" else (heads * 127).astype(np.int8)
        shifted = (codes.astype(np.int32) + module.ACTIVATION_OFFSET).astype(np.uint8)
        found = tile(getattr(module, name), shifted, heads, width // 64, tokens)[:, :rows]
        correction = heads.astype(np.int32).sum(axis=1) * module.ACTIVATION_OFFSET
        exact = codes.astype(np.int32) @ heads.T.astype(np.int32)
        assert same_bits(exact.astype(np.int32), (found - correction).astype(np.int32)), name


def test_unpack_order() -> None:
    """Byte j of a group holds weights j, j + 64, j + 128, j + 192 (FORMAT 2)."""
    row = np.zeros(64, np.uint8)
    row[3] = 0b10_01_00_10
    out = np.full(256, 9, np.uint8)
    call(unpack, row, 64, out)
    assert out[[3, 67, 131, 195]].tolist() == [2, 0, 1, 2]
    assert out.sum() == 5
