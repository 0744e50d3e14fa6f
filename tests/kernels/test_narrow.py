"""Heads of 6 and 4 bits: packing and products, at the extremes."""

from __future__ import annotations

import numpy as np
import pytest

from bitskip_cpu.kernels import linear, narrow
from bitskip_cpu.kernels.tiles import TILE_ROWS
from tests.kernels.calling import call, same_bits


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("width", [1, 15, 16, 48, 192, 2048])
@pytest.mark.parametrize("kind", ["random", "largest", "smallest"])
def test_products(bits: int, width: int, kind: str) -> None:
    rng, top = np.random.default_rng(0), 2 ** (bits - 1) - 1
    rows = rng.integers(-top, top + 1, (TILE_ROWS + 3, width)).astype(np.int8)
    codes = np.zeros((4, -(-width // narrow.GROUP) * narrow.GROUP), np.int8)
    codes[:, :width] = rng.integers(-127, 128, (4, width))
    if kind != "random":
        rows[:], codes[:, :width] = (top, 127) if kind == "largest" else (-top, -127)
    packed = narrow.pack(rows, bits)
    assert packed.shape == (2 * TILE_ROWS, narrow.row_bytes(width, bits))
    exact = codes[:, :width].astype(np.int32) @ rows.T.astype(np.int32)
    exact += 2 ** (bits - 1) * codes.sum(axis=1, keepdims=True, dtype=np.int32)
    for tokens, present in ((1, 1), (4, 4), (4, 3)):
        out = np.zeros((4, 2 * TILE_ROWS), np.int32)
        for i in range(2):
            kernel, groups = getattr(linear, f"int{bits}_{tokens}"), codes.shape[1] // 16
            tile, to = packed[TILE_ROWS * i :], out.reshape(-1)[TILE_ROWS * i :]
            last = present - 1
            call(kernel, tile, groups, codes, codes.strides[0], last, to, out.strides[0])
        found = np.ascontiguousarray(out[:present, : len(rows)])
        assert same_bits(exact[:present], found)
